"""Scores of every architecture against per-example autograd in float64, written from the formulas alone."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import byline
import reference as ref
from architectures import CASES, Net, arrays, padded, vectors
from conftest import build

METHODS = {"TRAK": byline.TRAK, "GradDot": byline.GradDot, "GradCos": byline.GradCos}


def expected(method, test, train, damping=0.3):
    if method == "TRAK":
        return ref.trak([test], [train], damping)
    return {"GradDot": ref.graddot, "GradCos": ref.gradcos}[method](test, train)


def sides(made, values=None):
    values = values or ref.NAMED[made.case.output]
    return (
        ref.side(made.model, made.test, values, made.selects),
        ref.side(made.model, made.train, values, made.selects),
    )


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_scores_equal_per_example_autograd(name):
    made = build(name)
    test, train = sides(made)
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    for method, kind in METHODS.items():
        attributor = kind(made.task, byline.Independent([made.model]), damping=0.3, batch_size=7, progress=False)
        scores = attributor.fit(made.train).attribute(made.test)
        ref.assert_close(scores.values, expected(method, test, train))
    assert all(torch.equal(v, before[k]) for k, v in made.model.state_dict().items()), "the model was changed"


@pytest.mark.parametrize("name", ["conv2d-groups", "embedding-padding", "tied-head", "functional", "gru"])
@pytest.mark.parametrize(
    "features",
    [
        byline.Dense(6, "gaussian"),
        byline.Factorized(8),
        byline.Factorized(8, "pca"),
        byline.Nystrom(5),
        byline.LowRank(2),
    ],
    ids=["dense", "random", "pca", "nystrom", "low-rank"],
)
def test_float64_models_work_with_every_feature(name, features):
    made = build(name)
    model = made.model.double()
    data = [ref.double(item) for item in made.train]
    attributor = byline.TRAK(
        byline.Task(model, made.case.output), byline.Independent([model]), features=features, progress=False
    )
    values = attributor.fit(data).attribute(data[:3]).values
    single = byline.TRAK(
        byline.Task(made.model.float(), made.case.output),
        byline.Independent([made.model]),
        features=features,
        progress=False,
    )
    ref.assert_close(values, single.fit(made.train).attribute(made.train[:3]).values, 1e-3)


@pytest.mark.parametrize(
    "method", [byline.TRAK, byline.GradDot, byline.GradCos, byline.TrackStar, "explicit", "cg", "ekfac", "datainf"]
)
def test_half_precision_models_come_near_those_of_float32(method):
    made = build("mlp")
    half = copy.deepcopy(made.model).to(torch.bfloat16)
    found = []
    for model in (half, copy.deepcopy(half).float()):
        dtype = next(model.parameters()).dtype
        train, test = (pairs_as(part, dtype) for part in (made.train, made.test))
        arguments = {"damping": 1.0, "progress": False}
        cls = functools.partial(byline.Influence, solver=method) if isinstance(method, str) else method
        attributor = cls(byline.Task(model), byline.Independent([model]), **arguments).fit(train)
        found.append(attributor.attribute(test).values)
    assert np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    "features",
    [byline.Dense(64), byline.Factorized(64), byline.Factorized(64, basis="pca"), byline.Nystrom(8), byline.LowRank(4)],
)
def test_half_precision_models_work_with_every_feature(features):
    made = build("mlp")
    model = copy.deepcopy(made.model).to(torch.bfloat16)
    train, test = (pairs_as(part, torch.bfloat16) for part in (made.train, made.test))
    attributor = byline.GradDot(byline.Task(model), byline.Independent([model]), features=features, progress=False)
    assert np.isfinite(attributor.fit(train).attribute(test).values).all()


def pairs_as(data, dtype):
    return [(x.to(dtype), y) for x, y in data]


def smooth_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1, reduction="none")


def logit(model, batch):
    return model(batch[0]).gather(1, batch[1].unsqueeze(1)).squeeze(1)


def distance(model, batch):
    return 1 - logit(model, batch).sigmoid() ** 2


@pytest.mark.parametrize(
    ("output", "loss", "residual"),
    [
        (logit, None, None),
        (logit, smooth_loss, None),
        (logit, smooth_loss, distance),
        ("classification", smooth_loss, None),
        ("classification", None, distance),
    ],
)
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["mlp", "gru"])
def test_callable_outputs_losses_and_residuals(name, method, output, loss, residual):
    made = build(name)
    if output == "classification":

        def values(model, batch):
            f, ell, q = ref.classification(model, batch)
            return (
                f,
                ell if loss is None else loss(model, batch)[0],
                q if residual is None else residual(model, batch)[0],
            )
    else:
        values = ref.called(output, loss, residual)
    task = byline.Task(made.model, output=output, loss=loss, residual=residual)
    attributor = METHODS[method](task, byline.Independent([made.model]), damping=0.3, progress=False)
    scores = attributor.fit(made.train).attribute(made.test)
    ref.assert_close(scores.values, expected(method, *sides(made, values)))


def test_callable_output_that_calls_the_model_twice_or_only_a_part_of_it():
    made = build("mlp")

    def contrast(model, batch):
        return (model(batch[0]) - model(-batch[0])).square().sum(1)

    def hidden(model, batch):
        return torch.tanh(model.parts[0](batch[0])).sum(1)

    for output in (contrast, hidden):
        task = byline.Task(made.model, output=output)
        scores = byline.GradDot(task, byline.Independent([made.model]), progress=False).fit(made.train)
        ref.assert_close(scores.attribute(made.test).values, ref.graddot(*sides(made, ref.called(output))), 1e-4)


def test_language_modeling_shifts_a_lone_tensor_of_ids():
    made = build("tied-head")
    data = [torch.cat([x, y[-1:]]) for x, y in made.train]
    attributor = byline.GradDot(made.task, byline.Independent([made.model]), progress=False).fit(data)
    side = ref.side(made.model, data, ref.language_modeling)
    ref.assert_close(attributor.attribute(data).values, ref.graddot(side, side))


def test_batches_of_another_length_than_the_training_set():
    """Test examples with more tokens than the training examples, and a ragged collate in training."""
    made = build("tied-head")
    longer = [(torch.randint(11, (9,)), torch.randint(11, (9,))) for _ in range(3)]
    attributor = byline.GradDot(made.task, byline.Independent([made.model]), progress=False).fit(made.train)
    test = ref.side(made.model, longer, ref.language_modeling)
    train = ref.side(made.model, made.train, ref.language_modeling)
    ref.assert_close(attributor.attribute(longer).values, ref.graddot(test, train))


def ragged(items):
    """Pads each batch to its own longest example."""
    longest = max(len(x) for x, _ in items)
    x = torch.stack([F.pad(x, (0, longest - len(x))) for x, _ in items])
    y = torch.stack([F.pad(y, (0, longest - len(y)), value=-100) for _, y in items])
    return x, y


@pytest.mark.parametrize(
    "features", [byline.Exact(), byline.Nystrom(9), byline.Factorized(10**6), byline.Factorized(10**6, "pca")]
)
def test_batches_padded_to_different_lengths(features):
    made = build("tied-head")
    data = [(x[: 2 + i % 4], y[: 2 + i % 4]) for i, (x, y) in enumerate(made.train)]
    data += [(torch.randint(11, (8,)), torch.randint(11, (8,)))]
    features = byline.Nystrom(len(data)) if isinstance(features, byline.Nystrom) else features
    attributor = byline.GradDot(
        made.task,
        byline.Independent([made.model]),
        features=features,
        collate=ragged,
        batch_size=3,
        progress=False,
    ).fit(data)
    side = ref.side(made.model, data, ref.language_modeling)
    ref.assert_close(attributor.attribute(data).values, ref.graddot(side, side), 2e-3)


def test_collate_is_used_with_a_tensor_dataset():
    made = build("mlp-dict")
    x = torch.stack([item["x"] for item in made.train])
    y = torch.stack([item["labels"] for item in made.train])

    def named(items):
        return {"x": torch.stack([a for a, _ in items]), "labels": torch.stack([b for _, b in items])}

    attributor = byline.GradDot(made.task, byline.Independent([made.model]), collate=named, progress=False)
    found = attributor.fit(TensorDataset(x, y)).attribute(TensorDataset(x, y)).values
    side = ref.side(made.model, made.train, ref.classification)
    ref.assert_close(found, ref.graddot(side, side))


class Scaled(TensorDataset):
    """A TensorDataset whose items are not its tensors."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return 3 * x + 1, y


def test_a_tensor_dataset_with_a_getitem_of_its_own():
    made = build("mlp")
    data = Scaled(torch.stack([x for x, _ in made.train]), torch.stack([y for _, y in made.train]))
    attributor = byline.GradDot(made.task, byline.Independent([made.model]), progress=False).fit(data)
    side = ref.side(made.model, data, ref.classification)
    ref.assert_close(attributor.attribute(data).values, ref.graddot(side, side))


class Gated(nn.Module):
    """Attention behind a gate that starts at zero (ReZero): at first nothing behind it has a gradient."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gate = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.inner(x)
        return self.head((h + self.gate * self.attention(h, h, h)[0]).mean(1))


def test_a_gradient_that_is_zero_at_the_first_checkpoint_is_not_lost_at_the_next():
    torch.manual_seed(0)
    data = arrays(5, 4)(12)
    first = Gated().eval()
    second = Gated().eval()
    second.gate.data.fill_(2.0)
    ensemble = byline.Trajectory([[first, second]])
    attributor = byline.GradDot(byline.Task(first), ensemble, progress=False).fit(data)
    pairs = [ref.side(m, data, ref.classification) for m in (first, second)]
    ref.assert_close(attributor.attribute(data).values, ref.mean(ref.graddot, pairs, pairs))


class Rare(nn.Module):
    """A weight used through F.linear, by examples that calibration does not see."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        extra = F.linear(h, self.b.weight) * (x[:, :1] > 0)
        return self.c(h + extra)


def test_a_gradient_that_is_zero_on_the_first_examples_is_not_lost_on_the_others():
    torch.manual_seed(0)
    data = vectors()(12)
    for i, (x, _) in enumerate(data):
        x[0] = -1.0 if i < 5 else 1.0
    model = Rare().eval()
    attributor = byline.GradDot(byline.Task(model), byline.Independent([model]), progress=False).fit(data)
    side = ref.side(model, data, ref.classification)
    ref.assert_close(attributor.attribute(data).values, ref.graddot(side, side))


def test_the_sign_training_on_a_proponent_pushes_the_output_up():
    """One step of SGD on the training example's loss moves the test output by lr · GradDot."""
    made = build("mlp")
    model = made.model.double()
    train, test = [ref.double(i) for i in made.train], [ref.double(i) for i in made.test]
    scores = byline.GradDot(byline.Task(model), byline.Independent([model]), progress=False)
    values = scores.fit(train).attribute(test).values
    lr = 1e-5
    for i, (x, y) in enumerate(train):
        before = ref.side(model, test, ref.classification).f
        loss = F.cross_entropy(model(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            p.data -= lr * g
        moved = (ref.side(model, test, ref.classification).f - before) / lr
        for p, g in zip(model.parameters(), grads, strict=True):
            p.data += lr * g
        ref.assert_close(values[:, i], moved, 1e-2)


def test_batchencoding_and_model_output():
    transformers = pytest.importorskip("transformers")
    made = build("gpt2-labels")
    data = [transformers.BatchEncoding(dict(item.items())) for item in padded()(6)]
    attributor = byline.TRAK(made.task, byline.Independent([made.model]), damping=0.3, progress=False).fit(data)
    plain = [dict(item) for item in data]
    side = ref.side(made.model, plain, ref.language_modeling)
    ref.assert_close(attributor.attribute(data).values, ref.trak([side], [side], 0.3))


def test_one_training_example():
    made = build("sequence-first", train=1)
    attributor = byline.GradDot(made.task, byline.Independent([made.model]), progress=False).fit(made.train)
    ref.assert_close(attributor.attribute(made.test).values, ref.graddot(*sides(made)))
    one_token = Net(nn.Linear(4, 3), lambda t: t.mean(0))

    def output(model, batch):
        return model(batch[0].transpose(0, 1)).sum(1)

    data = arrays(1, 4)(5)
    task = byline.Task(one_token.eval(), output=output)
    found = byline.GradDot(task, byline.Independent([one_token]), progress=False).fit(data[:1])
    test, train = (ref.side(one_token, part, ref.called(output)) for part in (data, data[:1]))
    ref.assert_close(found.attribute(data).values, ref.graddot(test, train))
