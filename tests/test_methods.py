"""Methods over members: standard errors, self-influence, damping, members added later."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import byline
import reference as ref
from byline.features.capture import Capture
from conftest import build

METHODS = [byline.TRAK, byline.GradDot, byline.GradCos, byline.TracIn]


@pytest.fixture
def many():
    """Four trained models and their gradients."""
    made = build("mlp")
    torch.manual_seed(3)
    made.models = []
    for _ in range(4):
        model = copy.deepcopy(made.model)
        for p in model.parameters():
            p.data.add_(0.4 * torch.randn_like(p))
        made.models.append(model)
    made.tests, made.trains = (
        [ref.side(m, part, ref.classification) for m in made.models] for part in (made.test, made.train)
    )
    return made


def fitted(method, task, ensemble, train, **arguments):
    return method(task, ensemble, **{"damping": 0.3, "progress": False, **arguments}).fit(train)


@pytest.mark.parametrize(
    ("method", "one"),
    [(byline.GradDot, ref.graddot), (byline.GradCos, ref.gradcos), (byline.TracIn, ref.graddot)],
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_standard_errors_of_plain_methods(many, method, one, count):
    votes = np.stack([one(a, b) for a, b in zip(many.tests[:count], many.trains[:count], strict=True)])
    scores = fitted(method, many.task, byline.Independent(many.models[:count]), many.train).attribute(many.test)
    assert scores.stderr.dtype == scores.values.dtype == np.float32
    if count == 1:
        assert np.isnan(scores.stderr).all()
    else:
        ref.assert_close(scores.stderr, votes.std(0, ddof=1) / count**0.5, 1e-3)


def delta(kernels, q):
    """√Var(q̄ k̄) to first order, from the covariance of the members' q and k."""
    m = len(kernels)
    k, r = kernels.mean(0), q.mean(0)
    dk, dr = kernels - k, (q - r)[:, None, :]
    var_k, var_q, cov = ((x * y).sum(0) / (m - 1) / m for x, y in ((dk, dk), (dr, dr), (dk, dr)))
    return np.sqrt(np.maximum(r**2 * var_k + 2 * r * k * cov + k**2 * var_q, 0))


@pytest.mark.parametrize("count", [2, 4])
def test_standard_errors_of_trak(many, count):
    kernels = np.stack([ref.trak_kernel(a, b, 0.3) for a, b in zip(many.tests, many.trains, strict=True)])[:count]
    q = np.stack([b.q for b in many.trains])[:count]
    scores = fitted(byline.TRAK, many.task, byline.Independent(many.models[:count]), many.train).attribute(many.test)
    ref.assert_close(scores.values, kernels.mean(0) * q.mean(0))
    ref.assert_close(scores.stderr, delta(kernels, q), 1e-3)


def test_one_model_forward_only_has_an_error_from_q_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3)).eval()
    data = build("mlp").train
    ensemble = byline.Dropout(byline.Independent([model]), masks=4, forward_only=True)
    attributor = fitted(byline.TRAK, byline.Task(model), ensemble, data)
    scores = attributor.attribute(data)
    q = np.stack([attributor.store.vector("residual", m.identity("residual")) for m in ensemble.members()])
    side = ref.side(model, data, ref.classification)
    kernel = ref.trak_kernel(side, side, 0.3)
    ref.assert_close(scores.values, kernel * q.mean(0))
    ref.assert_close(scores.stderr, np.abs(kernel) * q.std(0, ddof=1) / 2, 1e-3)


def test_a_model_that_stands_twice_votes_twice(many):
    a, b = many.models[:2]
    ensemble = byline.Independent([a, a, b])
    for method, one in ((byline.GradDot, ref.graddot), (byline.TRAK, None)):
        scores = fitted(method, many.task, ensemble, many.train).attribute(many.test)
        tests, trains = ([part[0], part[0], part[1]] for part in (many.tests, many.trains))
        expected = ref.trak(tests, trains, 0.3) if one is None else ref.mean(one, tests, trains)
        ref.assert_close(scores.values, expected)


def logit(model, batch):
    return model(batch[0]).gather(1, batch[1].unsqueeze(1)).squeeze(1)


def smooth(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1, reduction="none")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "conv2d-groups", "tied-head", "regression", "gru", "callable", "loss"])
@pytest.mark.parametrize(
    "features",
    [byline.Exact(), byline.Factorized(7), byline.Factorized(60, "pca"), byline.Nystrom(6), byline.LowRank(3)],
)
def test_self_influence_is_the_diagonal(method, name, features):
    made = build(name if name not in ("callable", "loss") else "mlp")
    task = made.task
    if name == "callable":
        task = byline.Task(made.model, output=logit)
    elif name == "loss":
        task = byline.Task(made.model, loss=smooth)
    other = copy.deepcopy(made.model)
    for p in other.parameters():
        p.data.mul_(0.8)
    attributor = fitted(
        method, task, byline.Independent([made.model, other]), made.train, features=features, batch_size=4
    )
    found = attributor.self_influence()
    assert found.shape == (len(made.train),)
    ref.assert_close(found, attributor.attribute(made.train).values.diagonal(), 1e-4)


def test_self_influence_under_masks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3)).eval()
    data = build("mlp").train
    for method in METHODS:
        ensemble = byline.Dropout(byline.Independent([model]), masks=3)
        attributor = fitted(method, byline.Task(model), ensemble, data)
        ref.assert_close(attributor.self_influence(), attributor.attribute(data).values.diagonal())


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("n", [9, 60])
def test_damping_means_the_same_in_the_primal_and_the_dual(damping, n):
    """Factorized at full width is solved in k × k where k < n, Exact in n × n."""
    made = build("mlp-dict", train=n)
    made.task = byline.Task(made.model, params=["parts.4.*", "parts.2.weight"])
    few = byline.Task(made.model, params="parts.2.weight")
    assert sum(p.numel() for p in made.model.parts[2].parameters()) < 60
    exact = fitted(byline.TRAK, few, byline.Independent([made.model]), made.train, damping=damping)
    wide = fitted(
        byline.TRAK, few, byline.Independent([made.model]), made.train, damping=damping,
        features=byline.Factorized(10**5),
    )  # fmt: skip
    one, two = exact.attribute(made.test).values, wide.attribute(made.test).values
    ref.assert_close(one, two, 1e-3)
    sides = [ref.side(made.model, d, ref.classification, few.selects) for d in (made.test, made.train)]
    ref.assert_close(one, ref.trak([sides[0]], [sides[1]], damping), 1e-3)


def test_damping_zero_of_a_singular_kernel_is_refused():
    made = build("mlp")
    with pytest.raises(ValueError, match="damping is too small"):
        byline.TRAK(made.task, byline.Independent([made.model]), damping=0.0, progress=False).fit(
            made.train + made.train
        ).attribute(made.test)


@pytest.mark.parametrize("damping", [-1, float("nan"), float("inf"), "none", True, None])
def test_damping_is_checked(damping):
    made = build("mlp")
    with pytest.raises((ValueError, TypeError), match="damping is"):
        byline.TRAK(made.task, byline.Independent([made.model]), damping=damping)


@pytest.fixture
def calls(monkeypatch):
    """How many examples were differentiated."""
    seen = []
    original = Capture.__call__

    def counted(self, batch, of):
        out = original(self, batch, of)
        seen.append(len(out[0]))
        return out

    monkeypatch.setattr(Capture, "__call__", counted)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_added_members_alone_are_computed(many, calls, method):
    attributor = fitted(method, many.task, byline.Independent(many.models[:3]), many.train)
    whole = sum(calls)
    calls.clear()
    attributor.add_members(byline.Independent(many.models[3:]))
    # a member differentiates its training examples, and one more to learn what to keep
    assert sum(calls) == whole / 3
    assert len(attributor.ensemble) == 4
    found = attributor.attribute(many.test)
    direct = fitted(method, many.task, byline.Independent(many.models), many.train).attribute(many.test)
    ref.assert_close(found.values, direct.values, 1e-6)
    ref.assert_close(found.stderr, direct.stderr, 1e-5)


def test_members_added_before_fitting_count(many):
    attributor = byline.GradDot(many.task, byline.Independent(many.models[:1]), progress=False)
    attributor.add_members(byline.Independent(many.models[1:2]))
    found = attributor.fit(many.train).attribute(many.test)
    ref.assert_close(found.values, ref.mean(ref.graddot, many.tests[:2], many.trains[:2]))


def test_members_that_do_not_fit_leave_the_attributor_as_it_was(many):
    attributor = fitted(byline.GradDot, many.task, byline.Independent(many.models[:2]), many.train)
    before = attributor.attribute(many.test).values
    with pytest.raises(ValueError, match="does not fit"):
        attributor.add_members(byline.Independent([nn.Linear(2, 2)]))
    assert len(attributor.ensemble) == 2
    assert (attributor.attribute(many.test).values == before).all()


def test_info_and_repr_say_what_was_done(many):
    attributor = fitted(byline.TRAK, many.task, byline.Independent(many.models[:2]), many.train)
    info = attributor.attribute(many.test).info
    assert info["method"] == "TRAK"
    assert info["members"] == 2
    assert info["damping"] == 0.3
    assert "TRAK(Task(Net, output='classification'" in repr(attributor)


def test_a_second_fit_on_other_data_answers_for_the_other_data(many):
    attributor = fitted(byline.GradDot, many.task, byline.Independent(many.models[:1]), many.train)
    attributor.fit(many.test)
    found = attributor.attribute(many.test).values
    ref.assert_close(found, ref.graddot(many.tests[0], many.tests[0]))


def test_a_ledger_changes_no_score(many):
    ledger = byline.Ledger()
    plain = fitted(byline.TRAK, many.task, byline.Independent(many.models[:2]), many.train)
    told = fitted(byline.TRAK, many.task, byline.Independent(many.models[:2]), many.train, ledger=ledger)
    assert (plain.attribute(many.test).values == told.attribute(many.test).values).all()


@pytest.mark.parametrize("method", [byline.TRAK, byline.GradDot, byline.GradCos, byline.TracIn, byline.Influence])
def test_every_method_takes_the_choice_of_parameters(method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).eval()
    data = torch.utils.data.TensorDataset(torch.randn(12, 5), torch.randint(0, 3, (12,)))
    ensemble, damping = byline.Independent([model]), 0.1

    def scores(task, **options):
        return method(task, ensemble, damping=damping, progress=False, **options).fit(data).attribute(data).values

    chosen = scores(byline.Task(model), params=["2.*"])
    np.testing.assert_allclose(chosen, scores(byline.Task(model, params=["2.*"])), rtol=1e-5, atol=1e-7)
    assert not np.allclose(chosen, scores(byline.Task(model)), rtol=1e-2)
