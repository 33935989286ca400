"""Ensembles × features × ways that gradients come about × kinds of models, held against autograd example by example.

The ways (`byline.features.capture`): one pass for all parameters; per-example autograd under vmap, which a parameter
without a rule needs; per-example autograd one example at a time, where the model asks its own numbers what to do.

Here every pair of choices appears in some combination, always the same ones. The whole product, some thousands, with::

    BYLINE_ALL_PATHS=1 python -m pytest tests/test_paths.py
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

import byline
import reference as ref
from byline.engines.workbench import Workbench, counting
from byline.ensembles.base import Ensemble, Member
from byline.ensembles.copies import copied
from byline.features import blocks
from decoders import needs

TRAIN, TEST, LENGTH, VOCABULARY, CLASSES = 7, 3, 5, 12, 3
WIDE = 4000
"""Columns, more than any of the models has parameters."""


# models, and what an example of each is


def picture(i: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 8, 8), "labels": torch.tensor(i % CLASSES)}


def text(i: int, labels: bool = True) -> dict[str, Any]:
    """Padded on the right, to one length: a mask is drawn for the form of what it masks."""
    keep = (torch.arange(LENGTH) < LENGTH - i % 3).long()
    item = {"input_ids": torch.randint(1, VOCABULARY, (LENGTH,)) * keep, "attention_mask": keep}
    return {**item, "labels": torch.tensor(i % CLASSES)} if labels else item


def translation(i: int) -> dict[str, Any]:
    labels = torch.randint(1, VOCABULARY, (4,))
    labels[4 - i % 2 :] = -100
    read = F.pad(labels.clamp(min=0), (1, -1))
    return {**text(i, labels=False), "decoder_input_ids": read, "labels": labels}


def of_translation(model: nn.Module, batch: Any) -> tuple[Any, Any, Any]:
    batch = dict(batch)
    labels = batch.pop("labels")[0]
    kept = labels != -100
    p = model(**batch).logits[0][kept].softmax(-1).gather(1, labels[kept, None])[:, 0]
    return (p / (1 - p)).log().mean(), -p.log().mean(), (1 - p).mean()


def bert() -> nn.Module:
    t = pytest.importorskip("transformers")
    config = t.BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=10,
        max_position_embeddings=LENGTH + 1, num_labels=CLASSES, hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
    )  # fmt: skip
    return t.BertForSequenceClassification(config)


def t5() -> nn.Module:
    t = pytest.importorskip("transformers")
    config = t.T5Config(
        vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=10, num_layers=1, num_heads=2, decoder_start_token_id=0,
        dropout_rate=0.2, relative_attention_num_buckets=4, relative_attention_max_distance=8,
    )  # fmt: skip
    return t.T5ForConditionalGeneration(config)


def gpt() -> nn.Module:
    t = pytest.importorskip("transformers")
    config = t.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=LENGTH, resid_pdrop=0.2, embd_pdrop=0.2,
        attn_pdrop=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return t.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    t = pytest.importorskip("transformers")
    config = t.ViTConfig(
        image_size=8, patch_size=4, num_channels=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=10, num_labels=CLASSES, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2,
    )  # fmt: skip
    return t.ViTForImageClassification(config)


class Encoder(nn.Module):
    """torch's own layer, the mean over the tokens that are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, 8), nn.Parameter(torch.randn(1, LENGTH, 8))
        # adapters go here: torch's fused layer, in eval mode and with frozen weights, goes past those on its own
        self.mixed = nn.Linear(8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 10, 0.2, batch_first=True)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, input_ids, attention_mask):
        h = self.embed(input_ids) + self.position[:, : input_ids.shape[1]]
        h = self.layer(self.mixed(h), src_key_padding_mask=attention_mask == 0)
        keep = attention_mask.unsqueeze(-1).to(h)
        return self.classifier((h * keep).sum(1) / keep.sum(1))


class Block(nn.Module):
    """Pre-norm attention and MLP, as by hand; one Linear for queries, keys and values."""

    def __init__(self, d: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(d), nn.LayerNorm(d), heads
        self.qkv, self.out, self.drop = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Dropout(0.2)
        self.mlp = nn.Sequential(nn.Linear(d, 10), nn.GELU(), nn.Linear(10, d), nn.Dropout(0.2))

    def forward(self, h, causal: bool = False, keep=None):
        b, t, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf)
        if keep is not None:
            scores = scores.masked_fill(keep[:, None, None] == 0, -1e9)
        h = h + self.drop(self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d)))
        return h + self.mlp(self.norm2(h))


class Decoder(nn.Module):
    """As nanoGPT: positions are looked up once for all, and the head is the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position, self.block = nn.Embedding(VOCABULARY, 8), nn.Embedding(LENGTH + 2, 8), Block()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        h = self.embed(input_ids) + self.position(torch.arange(input_ids.shape[1]))
        return self.head(self.norm(self.block(h, True, attention_mask)))


class Patches(nn.Module):
    """A ViT by hand: a class token, positions as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block = nn.Conv2d(2, 8, 4, stride=4), Block()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.norm, self.classifier = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, pixel_values):
        h = self.patch(pixel_values).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.position
        return self.classifier(self.norm(self.block(h))[:, 0])


@dataclass(frozen=True)
class Kind:
    """A kind of model."""

    build: Callable[[], nn.Module]
    item: Callable[[int], dict[str, Any]]
    output: str
    reference: Callable[[nn.Module, Any], tuple[Any, Any, Any]]
    targets: tuple[str, ...]
    """What adapters are put on."""
    classes: int


MODELS = {
    "bert": Kind(bert, text, "classification", ref.classification, ("query", "dense"), CLASSES),
    "t5": Kind(t5, translation, "seq2seq", of_translation, ("q", "wo"), VOCABULARY),
    "gpt": Kind(
        gpt, lambda i: text(i, False), "language-modeling", ref.language_modeling, ("c_attn", "c_fc"), VOCABULARY
    ),
    "vit": Kind(vit, picture, "classification", ref.classification, ("q_proj", "fc1", "classifier"), CLASSES),
    "encoder": Kind(Encoder, text, "classification", ref.classification, ("mixed", "classifier"), CLASSES),
    "decoder": Kind(
        Decoder, lambda i: text(i, False), "language-modeling", ref.language_modeling, ("qkv", "out"), VOCABULARY
    ),
    "patches": Kind(Patches, picture, "classification", ref.classification, ("qkv", "classifier"), CLASSES),
}


# ways


class Mix(nn.Module):
    """A weight that no rule covers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(classes) + 0.3 * torch.randn(classes, classes))

    def forward(self, logits):
        return torch.einsum("...i,ij->...j", logits, self.weight.sin())


class Way(nn.Module):
    """A model whose logits are mixed, and asked what they are."""

    def __init__(self, model: nn.Module, classes: int, asks: bool) -> None:
        super().__init__()
        self.model, self.mix, self.asks = model, Mix(classes), asks

    def forward(self, **inputs):
        if not self.asks and type(self.model).__name__.startswith(("Bert", "T5")):
            # of a mask as it is fed they ask whether it masks anything
            inputs["attention_mask"] = (1 - inputs["attention_mask"][:, None, None].float()) * -1e9
        out = self.model(**inputs)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        if self.asks and logits.max() > 100:
            logits = logits * 0
        return SimpleNamespace(logits=self.mix(logits))


def made(name: str, way: str) -> nn.Module:
    kind = MODELS[name]
    model = kind.build()
    if way == "vmapped" and hasattr(model, "set_attn_implementation"):
        # for torch's own attention its masks are asked whether they mask anything
        model.set_attn_implementation("eager")
    model = model if way == "fast" else Way(model, kind.classes, way == "looped")
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


# ensembles


def later(model: nn.Module) -> dict[str, torch.Tensor]:
    """Another checkpoint of a model; tied weights stay tied."""
    other = copied(model)
    for parameter in other.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return other.state_dict()


def adapter(name: str, model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    # of what no rule covers, too
    saved = ["mix"] if isinstance(model, Way) else None
    targets = list(MODELS[name].targets)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, modules_to_save=saved)
    return peft.get_peft_model(copied(model), config).eval()


ENSEMBLES: dict[str, Callable[[str, nn.Module], Ensemble]] = {
    "independent": lambda name, m: byline.Independent([m, later(m)]),
    "dropout": lambda name, m: byline.Dropout(byline.Independent([m]), masks=3),
    "forward-only": lambda name, m: byline.Dropout(byline.Independent([m]), masks=3, forward_only=True),
    "trajectory": lambda name, m: byline.Trajectory([[m, later(m)]]),
    "noise": lambda name, m: byline.WeightNoise(byline.Independent([m]), draws=2, scale=0.1),
    "crossfit": lambda name, m: byline.CrossFit([m, later(m)], trained_on=[range(4), range(4, TRAIN)]),
    "lora": lambda name, m: byline.LoRA(byline.Independent([m]), [[adapter(name, m)]]),
    "dropout of lora": lambda name, m: byline.Dropout(
        byline.LoRA(byline.Independent([m]), [[adapter(name, m)]]), masks=2, p=0.3
    ),
}


class Alone(Ensemble):
    """One member."""

    def __init__(self, member: Member, of: Ensemble) -> None:
        self.member, self.of = member, of

    def members(self) -> list[Member]:
        return [self.member]

    def validate(self, model: nn.Module) -> None:
        self.of.validate(model)


# features: how near they come to the plain inner products, or None where they are no such

FEATURES: dict[str, tuple[Callable[[], Any], float | None]] = {
    "exact": (lambda: byline.Exact(), 1e-3),
    "low-rank": (lambda: byline.LowRank(64), 1e-3),
    "low-rank sketch": (lambda: byline.LowRank(3), None),
    "random": (lambda: byline.Factorized(WIDE), 1e-3),
    "random sketch": (lambda: byline.Factorized(60), None),
    "pca": (lambda: byline.Factorized(WIDE, "pca"), 1e-3),
    "pca sketch": (lambda: byline.Factorized(60, "pca"), None),
    # the landmarks are the training set; their kernel is inverted
    "nystrom": (lambda: byline.Nystrom(TRAIN), 2e-3),
    "nystrom sketch": (lambda: byline.Nystrom(4), None),
    "dense": (lambda: byline.Dense(50), 1e-3),
    "preconditioned": (lambda: byline.Preconditioned(byline.Exact()), None),
    # the basis is kept in half precision
    "principal": (lambda: byline.Principal(byline.Factorized(WIDE), TRAIN), 2e-2),
}

WAYS = ("fast", "vmapped", "looped")
FEW_ENSEMBLES = [name for name in ENSEMBLES if name != "dropout of lora"]
FEW_FEATURES = [name for name in FEATURES if "sketch" not in name]


def covering() -> list[tuple[str, str, str, str]]:
    """Combinations in which every pair of choices appears; each next one has the most that are new."""
    if os.environ.get("BYLINE_ALL_PATHS"):
        return list(itertools.product(MODELS, WAYS, ENSEMBLES, FEATURES))
    whole = list(itertools.product(MODELS, WAYS, FEW_ENSEMBLES, FEW_FEATURES))
    pairs = {c: set(itertools.combinations(enumerate(c), 2)) for c in whole}
    left = set().union(*pairs.values())
    found = []
    while left:
        best = max(whole, key=lambda c: len(pairs[c] & left))
        left -= pairs[best]
        found.append(best)
    return found


@functools.cache
def case(name: str, way: str, kind: str) -> SimpleNamespace:
    """A model under an ensemble, its task and examples, and the gradients of its members."""
    needs("transformers")
    torch.manual_seed(0)
    model = made(name, way)
    items = [MODELS[name].item(i) for i in range(TRAIN + TEST)]
    ensemble = ENSEMBLES[kind](name, model)
    task = byline.Task(model, MODELS[name].output)
    found = SimpleNamespace(task=task, model=model, ensemble=ensemble, train=items[:TRAIN], test=items[TRAIN:])
    sides = [side(member, task, MODELS[name].reference, items) for member in ensemble.members()]
    found.trains = [part(one, slice(TRAIN)) for one in sides]
    found.tests = [part(one, slice(TRAIN, None)) for one in sides]
    return found


def side(member: Member, task: byline.Task, values: Any, items: list[Any]) -> ref.Side:
    """Per-example autograd on a copy of the model under the member's changes."""
    model = copied(task.model)
    member.weights.into(model, task.model)
    with member.applied(model, "gradient") as changed:
        chosen = counting(member, task)
        names = [n for n, p in changed.named_parameters() if p.requires_grad and chosen(n)]
        own = ref.side(changed, items, values, chosen, own=True)
        sizes = [changed.get_parameter(n).numel() for n in names]
    with member.applied(model, "residual") as changed, torch.no_grad():
        own.q = np.array([float(values(changed, default_collate([item]))[2]) for item in items])
    own.names, own.sizes = names, sizes  # type: ignore[attr-defined]
    return own


def part(one: ref.Side, rows: slice) -> ref.Side:
    own = ref.Side(one.output[rows], one.loss[rows], one.q[rows], one.f[rows])
    own.names, own.sizes = one.names, one.sizes  # type: ignore[attr-defined]
    return own


def dense(of: ref.Side, attribute: str) -> np.ndarray:
    """What `byline.Dense` makes of a whole gradient."""
    grads = torch.from_numpy(getattr(of, attribute)).float().split(of.sizes, 1)  # type: ignore[attr-defined]
    given: dict[str, blocks.Block] = {n: blocks.Flat((n,), g) for n, g in zip(of.names, grads, strict=True)}  # type: ignore[attr-defined]
    return FEATURES["dense"][0]().rows(given, {})["rows"].double().numpy()


def projected(of: ref.Side, features: str) -> ref.Side:
    return ref.Side(dense(of, "output"), dense(of, "loss"), of.q, of.f) if features == "dense" else of


def scores(c: SimpleNamespace, kind: str, features: str, batch_size: int, ensemble: Any = None) -> Any:
    options = {"features": FEATURES[features][0](), "batch_size": batch_size, "progress": False}
    ensemble = ensemble or c.ensemble
    if kind in ("forward-only", "crossfit"):
        method: Any = byline.TRAK(c.task, ensemble, damping=0.3, residual="mean", **options)
    else:
        method = byline.GradDot(c.task, ensemble, **options)
    return method.fit(c.train).attribute(c.test).values


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "way", "kind", "features"), covering(), ids=lambda name: name.replace(" ", "_"))
def test_path(name: str, way: str, kind: str, features: str) -> None:
    c = case(name, way, kind)
    together = scores(c, kind, features, 64)
    near = FEATURES[features][1]
    if near is None:
        alone = scores(c, kind, features, 1)
        ref.assert_close(together, alone, 2e-3)
        if kind not in ("forward-only", "crossfit"):
            # a member's sketch is its own
            one_by_one = [scores(c, kind, features, 3, Alone(m, c.ensemble)) for m in c.ensemble.members()]
            ref.assert_close(together, np.mean(one_by_one, 0), 2e-3)
        return
    tests, trains = ([projected(s, features) for s in sides] for sides in (c.tests, c.trains))
    if kind in ("forward-only", "crossfit"):
        expected = ref.trak(tests, trains, 0.3)
    else:
        expected = ref.mean(ref.graddot, tests, trains)
    ref.assert_close(together, expected, near)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_the_way_is_what_it_is_called(name: str, way: str) -> None:
    c = case(name, way, "independent")
    bench = Workbench(c.task, c.train)
    with bench.active(c.ensemble.members()[0], "gradient") as active:
        capture = active.capture("output")
    # T5's table of distances is looked up once for all, and turned over
    autograd = {n for n in capture.fallback if "relative_attention_bias" not in n}
    assert autograd == (set() if way == "fast" else {"mix.weight"})
    if autograd:
        assert capture.verdict.vectorised == (way == "vmapped")


def test_every_pair_of_choices_appears() -> None:
    found = {pair for c in covering() for pair in itertools.combinations(enumerate(c), 2)}
    choices = [[(i, value) for value in values] for i, values in enumerate((MODELS, WAYS, FEW_ENSEMBLES, FEW_FEATURES))]
    assert found >= {pair for a, b in itertools.combinations(choices, 2) for pair in itertools.product(a, b)}
