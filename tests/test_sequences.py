"""Sequence models: padding, masks, positions and lengths, through the fast rules, against per-example autograd."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

import byline
import byline.engines.workbench
import reference as ref
from byline.features.calibrate import calibrate
from byline.features.capture import attributed
from conftest import build
from test_features import Largest

pytest.importorskip("transformers")

DECODERS = ["gpt2-labels", "llama", "llama-tied", "qwen3", "gemma2", "peft-gpt2", "peft-llama"]
FAST = [*DECODERS, "own-rms-norm", "own-rms-norm-plus-one"]


def sequences(n, longest=7, seed=0):
    """Items of their own lengths, without labels: what `pad` collates."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [2 + (3 * i) % (longest - 1) for i in range(n)]
    return [{"input_ids": torch.randint(13, (length,), generator=generator)} for length in lengths]


def pad(items, side="right", width=None):
    width = width or max(len(i["input_ids"]) for i in items)

    def placed(values, fill):
        gaps = [width - len(v) for v in values]
        return torch.stack(
            [F.pad(v, (g, 0) if side == "left" else (0, g), value=fill) for v, g in zip(values, gaps, strict=True)]
        )

    ids = placed([i["input_ids"] for i in items], 3)
    mask = placed([torch.ones_like(i["input_ids"]) for i in items], 0)
    labels = placed([i.get("labels", i["input_ids"]) for i in items], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def left(items):
    return pad(items, "left")


def wide(items):
    return pad(items, width=8)


def fitted(made, method, data, **arguments):
    arguments = {"damping": 0.3, "progress": False, "collate": pad, **arguments}
    return method(made.task, byline.Independent([made.model]), **arguments).fit(data)


@pytest.mark.parametrize("name", FAST)
def test_every_parameter_of_a_decoder_goes_through_the_rules(name):
    made = build(name)
    params = attributed(made.task, made.model, lambda _: True)
    probe = default_collate([made.train[i] for i in (0, 4, 8)])
    found = calibrate(made.task, made.model, params, probe, "output")
    assert not found.fallback
    assert not found.forms
    bench = byline.engines.workbench.Workbench(made.task, made.train)
    with bench.active(byline.Independent([made.model]).members()[0], "gradient") as active:
        _, _, _, late, _ = active.capture("output").ruled(probe, "output")
    assert not late


@pytest.mark.parametrize("name", ["own-rms-norm-squared", "gated", "prelu", "instance-norm"])
def test_what_only_looks_like_a_norm_does_not_go_by_the_rule_of_norms(name):
    made = build(name)
    params = attributed(made.task, made.model, lambda _: True)
    found = calibrate(made.task, made.model, params, default_collate([made.train[i] for i in (0, 4, 8)]), "output")
    odd = {
        "own-rms-norm-squared": "0.weight",
        "gated": "inner.weight",
        "prelu": "1.weight",
        "instance-norm": "0.weight",
    }
    otherwise = {*found.fallback, *found.forms, *(f"{key}.weight" for key in found.rules)}
    assert any(name_.endswith(odd[name]) for name_ in otherwise)
    assert len(found.fallback) < len(params)


@pytest.mark.parametrize("collate", [pad, left, wide])
@pytest.mark.parametrize("name", DECODERS)
def test_gradients_and_scores_with_padding_equal_those_of_each_sequence_alone(name, collate):
    made = build(name)
    train, test = sequences(8), sequences(3, seed=1)
    own = ref.side(made.model, train, ref.language_modeling)
    other = ref.side(made.model, test, ref.language_modeling)
    for size in (3, 8):
        expected = {byline.GradDot: ref.graddot(other, own), byline.TRAK: ref.trak([other], [own], 0.3)}
        for method, values in expected.items():
            found = fitted(made, method, train, batch_size=size, collate=collate).attribute(test)
            ref.assert_close(found.values, values, 5e-4)


@pytest.mark.parametrize("name", ["gpt2-labels", "llama", "peft-llama"])
def test_influence_of_sequences(name):
    made = build(name)
    train, test = sequences(8), sequences(3, seed=1)
    own = ref.side(made.model, train, ref.language_modeling)
    other = ref.side(made.model, test, ref.language_modeling)
    found = fitted(made, byline.Influence, train, solver="explicit", curvature="fisher", batch_size=3)
    h = own.loss.T @ own.loss / len(train)
    ridge = 0.3 * np.trace(h) / len(h)
    expected = other.output @ np.linalg.solve(h + ridge * np.eye(len(h)), -own.loss.T)
    ref.assert_close(found.attribute(test).values, expected, 2e-3)


@pytest.mark.parametrize("labelled", [True, False])
def test_labels_are_made_of_the_ids_that_are_kept(labelled):
    made = build("llama")
    batch = pad(sequences(5))
    if not labelled:
        del batch["labels"]
    for i, item in enumerate(sequences(5)):
        alone = {"input_ids": item["input_ids"][None], "labels": item["input_ids"][None]}
        hf = made.model(**alone).loss
        torch.testing.assert_close(made.task.loss(made.model, batch)[i], hf, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "place"), [("gpt2-labels", 0), ("llama", 4), ("peft-gpt2", 7)])
def test_what_a_model_cannot_take_is_named(name, place):
    made = build(name)

    def refused(match, change):
        data = sequences(8)
        data[place] = change(data[place])
        with pytest.raises(ValueError, match=rf"train_set\[{place}\]:? {match}"):
            fitted(made, byline.GradDot, data, batch_size=3)
        good = fitted(made, byline.GradDot, sequences(8), batch_size=3)
        with pytest.raises(ValueError, match=rf"test_set\[{place}\]:? {match}"):
            good.attribute(data)

    long = {"input_ids": torch.arange(9) % 13}
    refused(r"is 9 tokens long with its padding, and the model's context is 8", lambda _: long)
    refused(
        r"token 13 is outside the model's vocabulary; expected 0 to 12", lambda _: {"input_ids": torch.tensor([1, 13])}
    )
    refused(r"token -1 is outside", lambda _: {"input_ids": torch.tensor([1, -1])})
    refused(r"has no target token", lambda _: {"input_ids": torch.tensor([4])})
    none = torch.full((3,), -100)
    refused(r"has no target token", lambda _: {"input_ids": torch.tensor([1, 2, 3]), "labels": none})


def test_a_row_that_is_all_padding_is_refused_though_it_has_labels():
    made = build("gpt2-labels")

    def collate(items):
        batch = pad(items)
        batch["attention_mask"][batch["input_ids"][:, 0] == 12] = 0
        return batch

    data = sequences(6)
    data = [{"input_ids": i["input_ids"] % 12} for i in data]
    data[4]["input_ids"][0] = 12
    with pytest.raises(ValueError, match=r"train_set\[4\]:? is all padding"):
        fitted(made, byline.TRAK, data, collate=collate, batch_size=2)


class Wide(nn.Module):
    """A head far wider than the rest."""

    def __init__(self, vocabulary, tied):
        super().__init__()
        self.emb, self.head = nn.Embedding(vocabulary, 16), nn.Linear(16, vocabulary, bias=False)
        self.mix = nn.Linear(16, 16)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.emb(x))))


@pytest.mark.parametrize("tied", [False, True])
def test_memory_does_not_grow_with_the_batch_nor_with_a_head_gradient_per_example(tied, monkeypatch):
    """A budget for logits bounds every tensor, whatever the batch; a head gradient per example would not fit in it."""
    from byline.engines import local

    vocabulary, tokens, limit = 4000, 6, 4 * 6 * 4000
    monkeypatch.setattr(local, "_LOGITS", limit)
    torch.manual_seed(0)
    model = Wide(vocabulary, tied).eval()
    largest = []
    for n in (8, 48):
        data = [torch.randint(vocabulary, (tokens,)) for _ in range(n)]
        attributor = byline.GradDot(
            byline.Task(model, "language-modeling"),
            byline.Independent([model]),
            features=byline.Factorized(16),
            batch_size=n,
            progress=False,
        )
        with Largest() as watch:
            attributor.fit(data).attribute(data)
        largest.append(watch.numel)
    per_example = vocabulary * 16
    assert largest[0] == largest[1]
    # the largest are the bytes of a weight, of which a digest is taken; a tied weight has one-hot factors too
    assert largest[0] <= max(4 * per_example, (2 if tied else 1) * limit) < 8 * per_example


@pytest.mark.parametrize("name", ["gpt2-labels", "llama"])
@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(64)])
def test_bfloat16_weights_give_rows_in_float32(name, features):
    made = build(name)
    half = copy.deepcopy(made.model).to(torch.bfloat16)
    full = copy.deepcopy(half).float()
    train, test = sequences(8), sequences(3, seed=1)
    found = []
    for model in (half, full):
        task = byline.Task(model, "language-modeling")
        attributor = byline.GradDot(
            task, byline.Independent([model]), features=features, collate=pad, progress=False
        ).fit(train)
        found.append(attributor.attribute(test).values)
        (entry,) = attributor.store.manifest.features
        rows = attributor.store.features(entry).read(0, 8)
        assert {v.dtype for n, v in rows.items() if not n.endswith(":ids")} == {torch.float32}
        bench = byline.engines.workbench.Workbench(task, train, pad)
        with bench.active(attributor.ensemble.members()[0], "gradient") as active:
            blocks = active.capture("loss")(pad(train), "loss")[2]
        assert {part.dtype for block in blocks.values() for part in block.split()} == {torch.float32}
    assert np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] > 0.999
    assert found[0].ravel() != pytest.approx(found[1].ravel(), abs=1e-9), "both were float32"
