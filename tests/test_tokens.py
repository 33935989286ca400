"""Per-token attribution: parts of positions against autograd, and their sums against scores of whole sequences."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

import byline
import byline.engines.workbench
import language
import reference as ref
from test_sequences import DECODERS, pad, sequences

hf = pytest.importorskip("byline.hf")


@pytest.fixture(scope="module")
def made():
    from types import SimpleNamespace

    model, tokenizer = language.gpt2(dropout=0.1), language.tokenizer()
    return SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        task=hf.task(model),
        train=hf.dataset(language.texts(8), tokenizer),
        test=hf.generated(model, tokenizer, language.PROMPTS[:1], seed=2, max_new_tokens=4),
    )


class Placed(nn.Module):
    """A linear language model whose weights can be given position by position, so that autograd tells their parts."""

    def __init__(self, tokens=13, d=5):
        super().__init__()
        self.emb, self.mix, self.head = nn.Embedding(tokens, d), nn.Linear(d, d), nn.Linear(d, tokens, bias=False)
        self.start = nn.Parameter(torch.randn(d))
        self.tables = None

    def forward(self, input_ids, attention_mask=None):
        emb, mix, bias, head = self.tables or (self.emb.weight, self.mix.weight, self.mix.bias, self.head.weight)
        if self.tables is None:
            h = self.mix(self.emb(input_ids) + self.start)
            # a token sees all before it
            return self.head(torch.tanh(h.cumsum(1)))
        e = torch.stack([emb[t][input_ids[:, t]] for t in range(input_ids.shape[1])], 1) + self.start
        h = torch.stack([e[:, t] @ mix[t].T + bias[t] for t in range(e.shape[1])], 1)
        h = torch.tanh(h.cumsum(1))
        return torch.stack([h[:, t] @ head[t].T for t in range(h.shape[1])], 1)


def test_parts_of_positions_equal_autograd_with_weights_of_their_own():
    """Give each position its own copy of the weights: the gradient of a copy is the part of its position."""
    torch.manual_seed(0)
    model = Placed().eval()
    task = byline.Task(model, "language-modeling")
    train = sequences(6)
    attributor = byline.GradDot(task, byline.Independent([model]), collate=pad, progress=False).fit(train)
    item = sequences(1, seed=3)[0] | {"input_ids": torch.tensor([3, 1, 4, 1, 5])}
    found = byline.tokens(attributor, item, [2, 4], train=[5, 1])
    for p, position in enumerate((2, 4)):
        labels = torch.full((1, 5), -100)
        labels[0, position] = item["input_ids"][position]
        output = task.output(model, {"input_ids": item["input_ids"][None], "labels": labels})
        names = [model.emb.weight, model.mix.weight, model.mix.bias, model.head.weight, model.start]
        test = torch.autograd.grad(output.sum(), names)
        for i, place in enumerate((5, 1)):
            ids = train[place]["input_ids"]
            model.tables = [w.detach().expand(len(ids), *w.shape).clone().requires_grad_() for w in names[:4]]
            loss = -task.loss(model, {"input_ids": ids[None]}).sum()
            own = torch.autograd.grad(loss, [*model.tables, model.start])
            model.tables = None
            expected = sum((g * t).flatten(1).sum(1) for g, t in zip(own[:4], test[:4], strict=True))
            ref.assert_close(found.values[p, i, : len(ids)], expected, 1e-4)
            assert np.isnan(found.values[p, i, len(ids) :]).all()
            ref.assert_close(found.rest[p, i], float((own[4] * test[4]).sum()), 1e-4)


METHODS = {
    "grad-dot": byline.GradDot,
    "grad-cos": byline.GradCos,
    "ekfac": functools.partial(byline.Influence, solver="ekfac"),
    "datainf": functools.partial(byline.Influence, solver="datainf"),
    "trak": functools.partial(byline.TRAK, features=byline.Factorized(6), damping=0.3),
    "trackstar": functools.partial(byline.TrackStar, features=byline.Factorized(6)),
    "dense": functools.partial(byline.GradDot, features=byline.Dense(8)),
    "nystrom": functools.partial(byline.GradDot, features=byline.Nystrom(4)),
}


@pytest.mark.parametrize("method", METHODS)
def test_positions_and_rest_add_up_to_the_scores_of_sequences(made, method):
    ensemble = byline.Dropout(byline.Independent([made.model]), masks=2)
    attributor = METHODS[method](made.task, ensemble, progress=False, batch_size=3).fit(made.train)
    found = byline.tokens(attributor, made.test[0], k=3)
    copies = []
    for position in found.positions:
        item = {k: v.clone() for k, v in made.test[0].items()}
        item["labels"][:] = -100
        item["labels"][position] = item["input_ids"][position]
        copies.append(item)
    scores = attributor.attribute(copies).values
    ref.assert_close(found.scores, scores[:, found.train], 1e-3)
    ref.assert_close(np.nansum(found.values, 2) + found.rest, scores[:, found.train], 1e-3)
    assert not found.rest.any()
    assert (found.train == np.argsort(-scores.mean(0), kind="stable")[:3]).all()
    assert np.isfinite(found.stderr[~np.isnan(found.values)]).all()
    if method in ("grad-dot", "ekfac", "datainf", "dense", "nystrom"):
        whole = attributor.attribute(made.test).values[0]
        ref.assert_close(found.scores.mean(0), whole[found.train], 1e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_of_every_decoder(name):
    from conftest import build

    made = build(name)
    train, item = sequences(5), sequences(3, seed=1)[2]
    attributor = byline.GradDot(made.task, byline.Independent([made.model]), collate=pad, progress=False).fit(train)
    found = byline.tokens(attributor, item, train=range(5))
    scores = attributor.attribute([item]).values[0]
    assert not found.rest.any()
    ref.assert_close(np.nansum(found.values, 2).mean(0), scores, 5e-4)


def test_of_adapters_and_as_a_table(made):
    ensemble = byline.train_lora(
        made.task, byline.Independent([made.model]), made.train, 2, 2, epochs=1, batch_size=4, progress=False
    )
    attributor = byline.TRAK(made.task, ensemble, features=byline.Factorized(6), progress=False).fit(made.train)
    found = byline.tokens(attributor, made.test[0], k=2)
    frame = found.to_dataframe(made.tokenizer)
    ref.assert_close(frame.groupby(["test_position", "train"], sort=False)["score"].sum(), found.scores.ravel(), 1e-4)
    before = len(language.PROMPTS[0].split())
    assert sorted(set(frame["test_position"])) == list(range(before, len(made.test.ids[0])))
    one = frame[(frame["train"] == found.train[0]) & (frame["test_position"] == before)]
    assert " ".join(one["train_token"]) == made.train.texts[found.train[0]]
    assert one["test_token"].iloc[0] == made.tokenizer.decode([made.test.ids[0][before]])


def test_what_has_no_parts_is_refused(made):
    def fit(method, **arguments):
        return method(made.task, byline.Independent([made.model]), progress=False, **arguments).fit(made.train)

    item = made.test[0]
    with pytest.raises(ValueError, match=r"TRAK with Exact.* scores all training examples together"):
        byline.tokens(fit(byline.TRAK), item)
    good = fit(byline.GradDot)
    with pytest.raises(ValueError, match="normalization='relatif'"):
        byline.tokens(fit(byline.Influence, normalization="relatif"), item)
    with pytest.raises(ValueError, match=r"positions is \[0\]; expected targets of the sequence, among \[2"):
        byline.tokens(good, item, [0])
    with pytest.raises(ValueError, match=r"train is \[8\]; expected places from 0 to 7"):
        byline.tokens(good, item, train=[8])
    with pytest.raises(TypeError, match="sequence is a list"):
        byline.tokens(good, [1, 2])
    with pytest.raises(TypeError, match="attributor is a Task"):
        byline.tokens(made.task, item)
    with pytest.raises(RuntimeError, match="not fitted"):
        byline.tokens(byline.GradDot(made.task, byline.Independent([made.model])), item)
