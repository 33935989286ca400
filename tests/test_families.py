"""Families of models as people write them, small: GradDot and TRAK against autograd, one example at a time, in float64.

The references say by themselves what each output is; nothing of byline's formulas is used (the draws of a denoising
model are recorded, as what the model was shown).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

import byline
import reference as ref
from architectures import randomised

TRAIN, TEST = 10, 4


@dataclass(frozen=True)
class Family:
    """A model, its examples, and what an output of it is."""

    model: Callable[[], nn.Module]
    items: Callable[[int], list[Any]]
    output: Any
    reference: Callable[[nn.Module, Any], tuple[Any, Any, Any]]
    collate: Any = default_collate


# references: f, ℓ, Q of a batch of one


def logits_of(model, batch):
    batch = dict(batch)
    labels = batch.pop("labels")
    out = model(**batch)
    return getattr(out, "logits", out), labels


def of_tokens(logits, labels):
    """Means over the labelled tokens of one sequence."""
    kept = labels != -100
    p = logits[kept].softmax(-1).gather(1, labels[kept, None])[:, 0]
    return (p / (1 - p)).log().mean(), -p.log().mean(), (1 - p).mean()


def of_class(logits, label):
    p = logits[0].softmax(-1)[int(label)]
    return (p / (1 - p)).log(), -p.log(), 1 - p


def named_class(model, batch):
    return of_class(*logits_of(model, batch))


def named_tokens(model, batch):
    logits, labels = logits_of(model, batch)
    return of_tokens(logits[0], labels[0])


def aligned_tokens(model, batch):
    return of_tokens(model(batch[0])[0][0], batch[1][0])


def several_labels(model, batch):
    z, y = model(*batch[:-1])[0], batch[-1][0]
    p = torch.where(y == 1, z.sigmoid(), 1 - z.sigmoid())
    loss = F.binary_cross_entropy_with_logits(z, y.to(z))
    return (p / (1 - p)).log().mean(), loss, (1 - p).mean()


def one_logit(model, batch):
    z, y = model(*batch[:-1]).reshape(()), batch[-1].reshape(())
    p = z.sigmoid() if y == 1 else 1 - z.sigmoid()
    return (p / (1 - p)).log(), F.binary_cross_entropy_with_logits(z, y.to(z)), 1 - p


def several_numbers(model, batch):
    loss = F.mse_loss(model(*batch[:-1]), batch[-1]) / 2
    return -loss, loss, torch.ones(())


def to_sequence(model, batch):
    labels = batch["labels"]
    start = torch.cat([labels.new_zeros(1, 1), labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)], 1)
    named = {k: v for k, v in batch.items() if k != "labels"}
    return of_tokens(model(**named, decoder_input_ids=start).logits[0], labels[0])


# transformers


def words(n, length=7, vocabulary=30, classes=3, types=True):
    """Of different lengths; a collate pads them."""
    out = []
    for i in range(n):
        size = length - i % 4
        item = {"input_ids": torch.randint(3, vocabulary, (size,)), "labels": torch.tensor(i % classes)}
        if types:
            item["token_type_ids"] = (torch.arange(size) > size // 2).long()
        out.append(item)
    return out


def padding(items):
    """What ``DataCollatorWithPadding`` does: every batch to its own longest example."""
    longest = max(len(i["input_ids"]) for i in items)
    batch = {
        key: torch.stack([F.pad(i[key], (0, longest - len(i[key]))) for i in items])
        for key in items[0]
        if key != "labels"
    }
    batch["attention_mask"] = torch.stack([(torch.arange(longest) < len(i["input_ids"])).long() for i in items])
    if items[0]["labels"].ndim:
        longest = max(len(i["labels"]) for i in items)
        fill = [F.pad(i["labels"], (0, longest - len(i["labels"])), value=-100) for i in items]
    else:
        fill = [i["labels"] for i in items]
    batch["labels"] = torch.stack(fill)
    return batch


def tagged(n, classes=5):
    out = words(n)
    for i, item in enumerate(out):
        item["labels"] = torch.randint(classes, item["input_ids"].shape)
        item["labels"][i % 3] = -100
    return out


def masked(n):
    out = words(n, types=False)
    for i, item in enumerate(out):
        hidden = torch.zeros_like(item["input_ids"], dtype=torch.bool)
        hidden[[0, 1 + i % 2]] = True
        item["labels"] = item["input_ids"].masked_fill(~hidden, -100)
        item["input_ids"] = item["input_ids"].masked_fill(hidden, 2)
    return out


def sources(n):
    out = words(n, types=False)
    for i, item in enumerate(out):
        item["labels"] = torch.randint(3, 30, (5 - i % 3,))
    return out


def transformers():
    return pytest.importorskip("transformers")


def bert(head, **options):
    t = transformers()
    config = t.BertConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, **options,
    )  # fmt: skip
    return getattr(t, head)(config)


def distilbert():
    t = transformers()
    config = t.DistilBertConfig(
        vocab_size=30, dim=12, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=16, num_labels=3
    )
    return t.DistilBertForSequenceClassification(config)


def t5():
    t = transformers()
    config = t.T5Config(vocab_size=30, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return t.T5ForConditionalGeneration(config)


def bart():
    t = transformers()
    config = t.BartConfig(
        vocab_size=30, d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
        decoder_start_token_id=0, pad_token_id=0, bos_token_id=1, eos_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return t.BartForConditionalGeneration(config)


def hf_vit():
    t = transformers()
    config = t.ViTConfig(
        image_size=8, patch_size=4, num_channels=2, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    return t.ViTForImageClassification(config)


# pictures


class ViT(nn.Module):
    """As in a hundred notebooks: patches by a convolution, a class token, positions as a parameter, pre-norm blocks."""

    def __init__(self, d=12, heads=2, classes=3):
        super().__init__()
        self.patch = nn.Conv2d(2, d, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, d) * 0.1)
        self.position = nn.Parameter(torch.randn(1, 5, d) * 0.1)
        self.norm1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2, self.mlp = nn.LayerNorm(d), nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.norm, self.head, self.heads = nn.LayerNorm(d), nn.Linear(d, classes), heads

    def forward(self, x):
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.position
        b, t, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        h = h + self.mlp(self.norm2(h))
        return self.head(self.norm(h)[:, 0])


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of a picture."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A stem, a block with a depthwise convolution and a layer scale, a downsampling, a head."""

    def __init__(self, d=6):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, d, 2, stride=2), LayerNorm2d(d))
        self.depthwise, self.norm = nn.Conv2d(d, d, 3, padding=1, groups=d), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.gamma = nn.Parameter(0.5 * torch.ones(d))
        self.shrink = nn.Sequential(LayerNorm2d(d), nn.Conv2d(d, 2 * d, 2, stride=2))
        self.last, self.head = nn.LayerNorm(2 * d), nn.Linear(2 * d, 3)

    def forward(self, x):
        x = self.stem(x)
        h = self.depthwise(x).permute(0, 2, 3, 1)
        h = self.gamma * self.down(F.gelu(self.up(self.norm(h))))
        x = self.shrink(x + h.permute(0, 3, 1, 2))
        return self.head(self.last(x.mean((2, 3))))


class SqueezeExcite(nn.Module):
    """Channels weighed by what the whole picture says."""

    def __init__(self, d):
        super().__init__()
        self.pool, self.reduce, self.expand = nn.AdaptiveAvgPool2d(1), nn.Conv2d(d, 3, 1), nn.Conv2d(3, d, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(self.pool(x)))))


def mobilenet():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.Hardswish(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), SqueezeExcite(6),
        nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 3),
    )  # fmt: skip


def pictures(n):
    return [(torch.randn(2, 8, 8), torch.randint(3, ())) for _ in range(n)]


def pixels(n):
    return [{"pixel_values": x, "labels": y} for x, y in pictures(n)]


# diffusion


class UNet(nn.Module):
    """Down, middle, up, a skip, and sines of the time that go through a layer of their own."""

    def __init__(self, d=4):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2 * d))
        self.enter, self.down = nn.Conv2d(1, d, 3, padding=1), nn.Conv2d(d, 2 * d, 3, stride=2, padding=1)
        self.norm, self.middle = nn.GroupNorm(2, 2 * d), nn.Conv2d(2 * d, 2 * d, 3, padding=1)
        self.up, self.leave = nn.ConvTranspose2d(2 * d, d, 2, stride=2), nn.Conv2d(2 * d, 1, 3, padding=1)

    def forward(self, x, t):
        angle = t[:, None] * torch.exp(-torch.arange(4, device=t.device, dtype=x.dtype))
        a = F.silu(self.enter(x))
        h = F.silu(self.down(a)) + self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, :, None, None]
        h = F.silu(self.middle(self.norm(h)))
        return self.leave(torch.cat([self.up(h), a], 1))


SCHEDULE = (1 - torch.linspace(0.01, 0.2, 30)).cumprod(0)
DENOISING = byline.Denoising(SCHEDULE, draws=3)


class Shown(nn.Module):
    """Keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.zeros(())), []

    def forward(self, x, t):
        self.seen.append((x.double(), t))
        return x * self.w


def denoised(model, batch):
    shown = Shown()
    byline.Task(shown, DENOISING).output(shown, batch[0].float())
    losses = []
    for noisy, t in shown.seen:
        a = SCHEDULE.double()[t].view(-1, 1, 1, 1)
        losses.append(F.mse_loss(model(noisy, t), (noisy - a.sqrt() * batch[0]) / (1 - a).sqrt()))
    loss = torch.stack(losses).mean()
    return -loss, loss, torch.ones(())


# graphs, tables, experts


class Graph(nn.Module):
    """Two rounds of messages over a dense adjacency, GIN's ε among the parameters."""

    def __init__(self, d=6):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, d), nn.Linear(d, d), nn.Linear(d, 3)
        self.eps = nn.Parameter(torch.full((1,), 0.2))

    def forward(self, x, adjacency):
        adjacency = adjacency / adjacency.sum(-1, keepdim=True).clamp_min(1)
        h = torch.relu(self.first(adjacency @ x + (1 + self.eps) * x))
        h = torch.relu(self.second(adjacency @ h + (1 + self.eps) * h))
        return self.head(h.sum(1))


def graphs(n):
    out = []
    for i in range(n):
        edges = (torch.rand(5, 5) < 0.5).float()
        x = torch.randn(5, 4)
        size = 5 - i % 3
        x[size:], edges[size:], edges[:, size:] = 0, 0, 0
        out.append((x, edges, torch.tensor(i % 3)))
    return out


class Table(nn.Module):
    """Numbers, and a bag of ids of each row."""

    def __init__(self, mode="mean", outputs=3):
        super().__init__()
        self.bag, self.numbers = nn.EmbeddingBag(20, 6, mode=mode), nn.Linear(4, 6)
        self.head = nn.Linear(6, outputs)

    def forward(self, x, ids):
        return self.head(torch.tanh(self.numbers(x) + self.bag(ids)))


def rows(target):
    return lambda n: [(torch.randn(4), torch.randint(20, (5,)), target()) for _ in range(n)]


class Experts(nn.Module):
    """Every token goes to the best of three experts, gathered from the whole batch; a balancing loss beside."""

    def __init__(self, d=6):
        super().__init__()
        self.emb, self.gate, self.head = nn.Embedding(12, d), nn.Linear(d, 3), nn.Linear(d, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, 8), nn.ReLU(), nn.Linear(8, d)) for _ in range(3))

    def forward(self, ids):
        h = self.emb(ids)
        weight = self.gate(h).softmax(-1)
        best = weight.argmax(-1)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            at = best == number
            if at.any():
                out[at] = expert(h[at]) * weight[at][:, number, None]
        return self.head((h + out).mean(1)), weight.mean((0, 1)).square().sum()


def labelled_ids(n):
    return [(torch.randint(12, (6,)), torch.randint(3, ())) for _ in range(n)]


# sequences without attention


class StateSpace(nn.Module):
    """A block of Mamba, by a loop: a causal depthwise convolution and a selective scan, gated."""

    def __init__(self, d=6, state=3, vocabulary=11):
        super().__init__()
        self.emb, self.norm = nn.Embedding(vocabulary, d), nn.RMSNorm(d)
        self.enter, self.conv = nn.Linear(d, 2 * d, bias=False), nn.Conv1d(d, d, 3, padding=2, groups=d)
        self.select, self.step = nn.Linear(d, 2 * state + 2, bias=False), nn.Linear(2, d)
        self.log_a = nn.Parameter(torch.log(torch.arange(1, state + 1.0)).repeat(d, 1))
        self.skip, self.leave = nn.Parameter(torch.ones(d)), nn.Linear(d, d, bias=False)
        self.last, self.head = nn.RMSNorm(d), nn.Linear(d, vocabulary, bias=False)
        self.state = state

    def forward(self, ids):
        h = self.emb(ids)
        x, gate = self.enter(self.norm(h)).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : ids.shape[1]].transpose(1, 2))
        b, c, low = self.select(x).split([self.state, self.state, 2], -1)
        delta = F.softplus(self.step(low))
        decay = torch.exp(-delta.unsqueeze(-1) * self.log_a.exp())
        held, out = torch.zeros_like(decay[:, 0]), []
        for t in range(ids.shape[1]):
            held = decay[:, t] * held + (delta[:, t] * x[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(1)
            out.append((held * c[:, t].unsqueeze(1)).sum(-1))
        y = torch.stack(out, 1) + self.skip * x
        return (self.head(self.last(h + self.leave(y * F.silu(gate)))),)


class Recurrent(nn.Module):
    """Returns its state beside the logits, as these do."""

    def __init__(self, kind, **options):
        super().__init__()
        self.emb, self.rnn, self.head = nn.Embedding(11, 5), kind(5, 6, batch_first=True, **options), nn.Linear(6, 11)

    def forward(self, ids):
        h, state = self.rnn(self.emb(ids))
        return self.head(h), state


def aligned(n):
    rows = torch.randint(11, (n, 7))
    return [(row[:-1], row[1:]) for row in rows]


def first_class(model, batch):
    return of_class(model(batch[0])[0], batch[1])


FAMILIES = {
    "bert-classification": Family(
        lambda: bert("BertForSequenceClassification", num_labels=3), words, "classification", named_class, padding
    ),
    "bert-token-classification": Family(
        lambda: bert("BertForTokenClassification", num_labels=5), tagged, "token-classification", named_tokens, padding
    ),
    "bert-masked": Family(lambda: bert("BertForMaskedLM"), masked, "masked-language-modeling", named_tokens, padding),
    "distilbert": Family(distilbert, lambda n: words(n, types=False), "classification", named_class, padding),
    "t5": Family(t5, sources, "seq2seq", to_sequence, padding),
    "bart": Family(bart, sources, "seq2seq", to_sequence, padding),
    "vit": Family(ViT, pictures, "classification", ref.classification),
    "vit-of-transformers": Family(hf_vit, pixels, "classification", named_class),
    "convnext": Family(ConvNeXt, pictures, "classification", ref.classification),
    "mobilenet": Family(mobilenet, pictures, "classification", ref.classification),
    "unet": Family(UNet, lambda n: [(torch.randn(1, 6, 6),) for _ in range(n)], DENOISING, denoised),
    "graph": Family(Graph, graphs, "classification", ref.classification),
    "table-classes": Family(Table, rows(lambda: torch.randint(3, ())), "classification", ref.classification),
    "table-sum-binary": Family(
        lambda: Table("sum", 1), rows(lambda: torch.randint(2, ()).float()), "binary", one_logit
    ),
    "table-multi-label": Family(Table, rows(lambda: torch.randint(2, (3,)).float()), "multi-label", several_labels),
    "table-multi-regression": Family(Table, rows(lambda: torch.randn(3)), "multi-regression", several_numbers),
    "experts": Family(Experts, labelled_ids, "classification", first_class),
    "state-space": Family(StateSpace, aligned, "language-modeling", aligned_tokens),
    "lstm": Family(lambda: Recurrent(nn.LSTM), aligned, "language-modeling", aligned_tokens),
    "lstm-two-layers": Family(lambda: Recurrent(nn.LSTM, num_layers=2), aligned, "language-modeling", aligned_tokens),
    "gru": Family(lambda: Recurrent(nn.GRU), aligned, "language-modeling", aligned_tokens),
}


@functools.cache
def made(name):
    """A family's model, examples, and reference rows of both sides."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = randomised(family.model()).eval()
    items = family.items(TRAIN + TEST)
    both = ref.side(model, items, family.reference, collate=family.collate)
    train, test = (
        ref.Side(both.output[part], both.loss[part], both.q[part], both.f[part])
        for part in (slice(TRAIN), slice(TRAIN, None))
    )
    task = byline.Task(model, family.output)
    return SimpleNamespace(family=family, task=task, model=model, items=items, train=train, test=test)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["graddot", "trak"])
def test_scores_equal_autograd_of_one_example_at_a_time(name, method):
    m = made(name)
    options = {"collate": m.family.collate, "batch_size": 4, "progress": False}
    ensemble = byline.Independent([m.model])
    if method == "graddot":
        found, expected = byline.GradDot(m.task, ensemble, **options), ref.graddot(m.test, m.train)
    else:
        found = byline.TRAK(m.task, ensemble, damping=0.3, features=byline.Exact(), **options)
        expected = ref.trak([m.test], [m.train], 0.3)
    scores = found.fit(m.items[:TRAIN]).attribute(m.items[TRAIN:])
    ref.assert_close(scores.values, expected, 1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_output_loss_and_residual_are_what_they_are_called(name):
    m = made(name)
    batch = m.family.collate(m.items[TRAIN:])
    ref.assert_close(m.task.output(m.model, batch).detach(), m.test.f, 1e-4)
    ref.assert_close(m.task.residual(m.model, batch), m.test.q, 1e-4)


def test_the_losses_of_transformers_are_those_of_its_models():
    for name in ("bert-token-classification", "bert-masked", "t5", "bart", "bert-classification"):
        m = made(name)
        for item in m.items[:3]:
            batch = m.family.collate([item])
            torch.testing.assert_close(m.task.loss(m.model, batch)[0], m.model(**batch).loss, rtol=1e-4, atol=1e-5)


# what is taken for what it is not


def test_models_of_transformers_are_held_to_their_own_output():
    t = transformers()
    hf = pytest.importorskip("byline.hf")
    masked_lm = bert("BertForMaskedLM")

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = masked_lm

        def forward(self, **batch):
            return self.inner(**batch).logits

    for model in (masked_lm, Wrapped()):
        with pytest.raises(ValueError, match=r"BertForMaskedLM, .* shifts them by one; .*\"masked-language-modeling\""):
            byline.Task(model, "language-modeling")
    with pytest.raises(ValueError, match='expected output="masked-language-modeling"'):
        hf.task(masked_lm)
    assert hf.task(masked_lm, output="masked-language-modeling").name == "masked-language-modeling"
    with pytest.raises(ValueError, match=r'BertForTokenClassification, .*expected output="token-classification"'):
        byline.Task(bert("BertForTokenClassification"), "language-modeling")
    gpt = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=30, n_positions=16, n_embd=12, n_layer=1, n_head=2))
    for output in ("masked-language-modeling", "token-classification"):
        with pytest.raises(ValueError, match=f'GPT2LMHeadModel, .* {output} does not shift .*"language-modeling"'):
            byline.Task(gpt, output)
    with pytest.raises(ValueError, match="GPT2LMHeadModel, which is no encoder with a decoder"):
        byline.Task(gpt, "seq2seq")
    for model in (t5(), bart()):
        for output in ("language-modeling", "masked-language-modeling", "token-classification"):
            with pytest.raises(ValueError, match=r'encoder-decoder .* expected output="seq2seq"'):
                byline.Task(model, output)
        assert hf.task(model, output="seq2seq").name == "seq2seq"
    body = bert("BertModel").eval()
    with pytest.raises(ValueError, match=r"gave a BaseModelOutput.* with last_hidden_state, pooler_output; expected"):
        byline.Task(body).output(body, padding(words(3)))


class Towers(nn.Module):
    """Two encoders, whose examples are each other's negatives."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, y):
        return F.normalize(self.a(x), dim=1), F.normalize(self.b(y), dim=1)


def pairs():
    torch.manual_seed(0)
    return Towers().eval(), [(torch.randn(4), torch.randn(6)) for _ in range(9)]


def test_contrastive_losses_have_no_example_of_their_own():
    model, items = pairs()

    def negatives_of_the_batch(model, batch):
        u, v = model(*batch)
        return -F.cross_entropy(model.scale * u @ v.T, torch.arange(len(u)), reduction="none")

    task = byline.Task(model, negatives_of_the_batch)
    with pytest.raises(ValueError, match="depends on the other examples in its batch"):
        byline.GradDot(task, byline.Independent([model]), progress=False).fit(items)


@pytest.mark.parametrize("batch_size", [4, 9])
def test_contrastive_losses_against_negatives_that_are_the_same_for_everyone(batch_size):
    """With as many negatives as a batch has examples too: rows of a layer that are no examples."""
    model, items = pairs()
    negatives = default_collate(items)[1]

    def against_them(model, batch):
        u, v = model(*batch)
        others = F.normalize(model.b(negatives.to(v.dtype)), dim=1)
        return model.scale * (u * v).sum(1) - (model.scale * u @ others.T).logsumexp(1)

    task = byline.Task(model, against_them)
    found = byline.GradDot(task, byline.Independent([model]), batch_size=batch_size, progress=False).fit(items)
    side = ref.side(model, items, ref.called(against_them))
    ref.assert_close(found.attribute(items).values, ref.graddot(side, side), 1e-3)
