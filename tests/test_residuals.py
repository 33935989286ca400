"""Whose Q a score carries and what is made of it, the weighted Hessian, and members that left examples out."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
import reference as ref
from conftest import build

DAMPING = 0.3


@pytest.fixture(scope="module")
def fold():
    """Six models from three complementary halves, and their gradients."""
    made = build("mlp", train=12, test=4)
    torch.manual_seed(3)
    made.models = [copy.deepcopy(made.model) for _ in range(6)]
    for model in made.models:
        for p in model.parameters():
            p.data.add_(0.4 * torch.randn_like(p))
    made.trained_on = byline.folds(12, parts=2, repeats=3, seed=1)
    made.seen = np.stack([np.isin(np.arange(12), own) for own in made.trained_on])
    made.tests, made.trains = (
        [ref.side(m, part, ref.classification) for m in made.models] for part in (made.test, made.train)
    )
    made.q = np.stack([side.q for side in made.trains])
    made.kernels = np.stack([ref.trak_kernel(a, b, DAMPING) for a, b in zip(made.tests, made.trains, strict=True)])
    made.ensemble = byline.CrossFit(made.models, made.trained_on)
    return made


def fitted(fold, method=byline.TRAK, ensemble=None, **options):
    options = {"damping": DAMPING, "progress": False, **options}
    return method(fold.task, fold.ensemble if ensemble is None else ensemble, **options).fit(fold.train)


def counted(fold, residual):
    return {"out-of-sample": ~fold.seen, "in-sample": fold.seen, "mean": np.ones_like(fold.seen)}[residual]


def mean_q(fold, residual):
    if residual == "sqrt":
        return np.sqrt(fold.q).mean(0)
    who = counted(fold, residual)
    return (who * fold.q).sum(0) / who.sum(0)


@pytest.mark.parametrize("residual", ["mean", "in-sample", "out-of-sample", "sqrt"])
def test_q_is_that_of_the_members_that_count(fold, residual):
    expected = fold.kernels.mean(0) * mean_q(fold, residual)
    attributor = fitted(fold, residual=residual)
    ref.assert_close(attributor.attribute(fold.test).values, expected)
    ref.assert_close(attributor.votes(fold.test).mean(), expected)
    own = np.mean([ref.trak_kernel(side, side, DAMPING).diagonal() for side in fold.trains], axis=0)
    ref.assert_close(attributor.self_influence(), own * mean_q(fold, residual))


def test_auto_is_the_mean_and_changes_nothing_of_a_crossfit(fold):
    auto, mean = fitted(fold), fitted(fold, ensemble=byline.Independent(fold.models))
    assert (auto.attribute(fold.test).values == mean.attribute(fold.test).values).all()


@pytest.mark.parametrize("residual", ["in-sample", "out-of-sample"])
def test_standard_errors_count_the_members_that_count(fold, residual):
    """Cov of means over sets of 3 and 6 members that share 3: σ/6; Var of the mean of 3: σ²/3."""
    who = counted(fold, residual)
    k, q = fold.kernels.mean(0), mean_q(fold, residual)
    dq = who * (fold.q - q)
    var_q = (dq**2).sum(0) / 2 / 3
    cov = (dq[:, None] * (fold.kernels - k)).sum(0) / 2 / 6
    var_k = fold.kernels.var(0, ddof=1) / 6
    expected = np.sqrt(np.maximum(q**2 * var_k + 2 * q * k * cov + k**2 * var_q, 0))
    ref.assert_close(fitted(fold, residual=residual).attribute(fold.test).stderr, expected, 1e-3)


def test_one_member_that_left_it_out_has_no_standard_error(fold):
    ensemble = byline.CrossFit(fold.models[:2], fold.trained_on[:2])
    scores = fitted(fold, ensemble=ensemble, residual="out-of-sample").attribute(fold.test)
    assert np.isnan(scores.stderr).all()
    assert np.isfinite(scores.values).all()


@pytest.mark.parametrize("residual", ["mean", "out-of-sample", "leave-one-out", "sqrt"])
@pytest.mark.parametrize("hessian", ["unweighted", "weighted"])
@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(7)])
def test_top_votes_and_self_influence_agree_with_the_matrix(fold, residual, hessian, features):
    attributor = fitted(fold, residual=residual, hessian=hessian, features=features)
    scores = attributor.attribute(fold.train)
    ref.assert_close(attributor.self_influence(), scores.values.diagonal())
    ref.assert_close(attributor.votes(fold.train).mean(), scores.values)
    top = attributor.top(fold.train, k=12)
    order = np.argsort(-scores.values, axis=1, kind="stable")
    ref.assert_close(top.proponents.scores, np.take_along_axis(scores.values, order, 1))
    found = np.take_along_axis(top.proponents.stderr, np.argsort(top.proponents.indices, 1), 1)
    ref.assert_close(found, scores.stderr, 1e-3)


def weighted(test, train, damping, floor=1e-3):
    """φ(z)ᵀ (ΦᵀWΦ + λI)⁻¹ φ(i), λ = damping · mean w‖φ‖², from a dense inverse."""
    w = np.maximum(train.q * (1 - train.q), floor)
    rows = np.sqrt(w)[:, None] * train.output
    lam = damping * (rows**2).sum(1).mean()
    inverse = np.linalg.inv(rows.T @ rows + lam * np.eye(rows.shape[1]))
    return test.output @ inverse @ train.output.T, (train.output @ inverse @ train.output.T).diagonal(), w


def test_the_weighted_hessian(fold):
    kernel = np.mean([weighted(a, b, DAMPING)[0] for a, b in zip(fold.tests, fold.trains, strict=True)], axis=0)
    found = fitted(fold, hessian="weighted").attribute(fold.test)
    ref.assert_close(found.values, kernel * fold.q.mean(0))
    assert found.info["hessian"] == "weighted"
    plain = fitted(fold).attribute(fold.test)
    assert "hessian" not in plain.info
    assert np.abs(plain.values / found.values - 1).max() > 0.1


@pytest.mark.parametrize("n", [9, 60])
def test_the_weighted_hessian_in_the_primal_and_the_dual(n):
    """Factorized at full width is solved in k × k where k < n, Exact in n × n."""
    made = build("mlp-dict", train=n)
    few = byline.Task(made.model, params="parts.2.weight")
    made.task, ensemble = few, byline.Independent([made.model])
    exact = fitted(made, ensemble=ensemble, hessian="weighted", residual="leave-one-out")
    wide = fitted(
        made, ensemble=ensemble, hessian="weighted", residual="leave-one-out", features=byline.Factorized(10**5)
    )
    ref.assert_close(exact.attribute(made.test).values, wide.attribute(made.test).values, 1e-3)
    sides = [ref.side(made.model, d, ref.classification, few.selects) for d in (made.test, made.train)]
    kernel, g, w = weighted(*sides, DAMPING)
    q = sides[1].q
    moved = 1 / (1 + np.exp(sides[1].f - g * q / (1 - w * g)))
    ref.assert_close(exact.attribute(made.test).values, kernel * moved, 1e-3)


def test_of_regression_both_hessians_are_the_same():
    made = build("regression")
    one, two = (
        fitted(made, ensemble=byline.Independent([made.model]), hessian=h).attribute(made.test).values
        for h in ("weighted", "unweighted")
    )
    assert (one == two).all()


def test_leave_one_out_leaves_alone_what_a_member_never_saw(fold):
    seen_all = fitted(fold, ensemble=byline.Independent(fold.models), residual="leave-one-out")
    own = fitted(fold, residual="leave-one-out")
    g = np.stack([ref.trak_kernel(side, side, DAMPING).diagonal() for side in fold.trains])
    f = np.stack([side.f for side in fold.trains])
    moved = 1 / (1 + np.exp(f - g * fold.q / (1 - g)))
    ref.assert_close(seen_all.attribute(fold.test).values, fold.kernels.mean(0) * moved.mean(0))
    mixed = np.where(fold.seen, moved, fold.q).mean(0)
    ref.assert_close(own.attribute(fold.test).values, fold.kernels.mean(0) * mixed)


# against models that were fitted anew without the example


def classes(seed=0, n=40):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64)
    y = (x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0], dtype=torch.float64) + torch.randn(n, generator=g) > 0).long()
    return x, y


def minimised(model, loss):
    """The model at the minimum of the loss."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return model


def logistic(x, y, ridge):
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()

    def loss():
        squares = sum(p.square().sum() for p in model.parameters())
        return nn.functional.cross_entropy(model(x), y, reduction="sum") + ridge / 2 * squares

    return minimised(model, loss)


def refitted(x, y, ridge):
    """(n,) Q of each example under the model that was fitted without it."""
    out = []
    for i in range(len(y)):
        keep = torch.arange(len(y)) != i
        with torch.no_grad():
            p = logistic(x[keep], y[keep], ridge)(x[i : i + 1]).softmax(1)[0, y[i]]
        out.append(1 - float(p))
    return np.array(out)


def test_leave_one_out_is_what_a_refit_without_the_example_says():
    x, y = classes()
    ridge = 0.5
    model = logistic(x, y, ridge)
    with torch.no_grad():
        q = 1 - model(x).softmax(1).gather(1, y[:, None])[:, 0]
    truth = refitted(x, y, ridge)
    # rows of the two logits' weights and biases: ±(x, 1) for either, so ‖φ‖² = 2 (‖x‖² + 1)
    norms = 2 * (x.square().sum(1) + 1)
    task = byline.Task(model.float().eval())
    data = TensorDataset(x.float(), y)

    def carried(hessian):
        w = (q * (1 - q)).clamp_min(1e-3) if hessian == "weighted" else torch.ones_like(q)
        damping = float(ridge / (w * norms).mean())
        options = {"damping": damping, "hessian": hessian, "residual": "leave-one-out", "progress": False}
        attributor = byline.TRAK(task, byline.Independent([model]), **options).fit(data)
        return attributor.votes(data).residuals[0]

    moved = truth - q.numpy()
    assert (moved > 0).all()
    assert moved.max() > 0.05
    newton = np.abs(carried("weighted") - truth)
    assert newton.mean() < 0.05 * moved.mean(), "one Newton step is most of the way"
    assert newton.max() < 0.1 * moved.max()
    # TRAK's Hessian, with W left out, is at least four times too large: its step falls short, in the right direction
    short = carried("unweighted") - q.numpy()
    assert (short > 0).all()
    assert (short < moved).all()
    assert np.corrcoef(short, moved)[0, 1] > 0.9


def test_leave_one_out_of_a_ridge_regression_is_exact():
    """PRESS (Allen 1974): the residual without the example is Q / (1 - h)."""
    x, _ = classes(1, 20)
    y = x @ torch.arange(1.0, 6.0, dtype=torch.float64) + torch.sin(7 * x[:, 0])
    ridge = 0.7
    a = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], 1)

    def solution(rows, targets):
        return torch.linalg.solve(rows.T @ rows + ridge * torch.eye(6, dtype=torch.float64), rows.T @ targets)

    truth = []
    for i in range(20):
        keep = torch.arange(20) != i
        truth.append(float(y[i] - a[i] @ solution(a[keep], y[keep])))
    model = nn.Linear(5, 1).eval()
    theta = solution(a, y).float()
    model.load_state_dict({"weight": theta[None, :5], "bias": theta[5:]})
    data = TensorDataset(x.float(), y.float())
    damping = float(ridge / a.square().sum(1).mean())
    task = byline.Task(model, output="regression")
    attributor = byline.TRAK(
        task, byline.Independent([model]), damping=damping, residual="leave-one-out", progress=False
    ).fit(data)
    ref.assert_close(attributor.votes(data).residuals[0], np.array(truth), 1e-3)


# other methods


@pytest.mark.parametrize("residual", ["in-sample", "out-of-sample", "sqrt"])
def test_the_training_gradient_carries_the_same_q(fold, residual):
    dots = np.stack([a.output @ b.output.T for a, b in zip(fold.tests, fold.trains, strict=True)])
    carried = np.sqrt(fold.q) if residual == "sqrt" else np.stack([mean_q(fold, residual)] * 6)
    expected = (dots * carried[:, None]).mean(0)
    for method in (byline.GradDot, byline.TracIn):
        attributor = fitted(fold, method, residual=residual)
        ref.assert_close(attributor.attribute(fold.test).values, expected)
        ref.assert_close(attributor.votes(fold.test).kernel(), dots.mean(0))


def test_influence_carries_it_and_keeps_its_curvature(fold):
    options = {"solver": "explicit", "curvature": "fisher"}
    plain = fitted(fold, byline.Influence, **options).votes(fold.test)
    found = fitted(fold, byline.Influence, residual="out-of-sample", **options).attribute(fold.test).values
    per_member = plain.values / fold.q[:, None]
    ref.assert_close(found, (per_member * mean_q(fold, "out-of-sample")).mean(0), 1e-3)


# nesting


def test_masks_and_checkpoints_know_what_their_run_was_trained_on(fold):
    nested = byline.Dropout(byline.CrossFit([fold.models[:2], fold.models[2:4]], fold.trained_on[:2]), masks=3)
    members = nested.members()
    assert len(members) == 12
    for member in members:
        assert (member.trained_on == fold.trained_on[member.run]).all()
    joined = byline.Independent(fold.models[4:]) + byline.CrossFit(fold.models[:2], fold.trained_on[:2])
    assert [m.trained_on is None for m in joined.members()] == [True, True, False, False]
    assert not joined.members()[0].unseen(12).any()
    assert (joined.members()[2].unseen(12).numpy() == ~fold.seen[0]).all()


def test_checkpoints_along_each_fold(fold):
    ensemble = byline.CrossFit(byline.Trajectory([fold.models[:3], fold.models[3:]]), fold.trained_on[:2])
    seen = np.repeat(fold.seen[:2], 3, axis=0)
    q = (~seen * fold.q).sum(0) / (~seen).sum(0)
    found = fitted(fold, ensemble=ensemble, residual="out-of-sample").attribute(fold.test).values
    ref.assert_close(found, fold.kernels.mean(0) * q)


def test_a_store_is_shared_by_all_kinds_and_computed_once(fold, tmp_path):
    first = fitted(fold, store=tmp_path, residual="out-of-sample").attribute(fold.test)
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    for residual in ("mean", "in-sample", "sqrt", "leave-one-out"):
        fitted(fold, store=tmp_path, residual=residual, ensemble=byline.CrossFit(fold.models, fold.trained_on))
    again = fitted(fold, store=tmp_path, residual="out-of-sample").attribute(fold.test)
    assert (again.values == first.values).all()
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before


def test_members_added_later_count(fold):
    half = byline.CrossFit(fold.models[:4], fold.trained_on[:4])
    attributor = fitted(fold, ensemble=half, residual="out-of-sample")
    attributor.add_members(byline.CrossFit(fold.models[4:], fold.trained_on[4:]))
    found, whole = attributor.attribute(fold.test), fitted(fold, residual="out-of-sample").attribute(fold.test)
    ref.assert_close(found.values, whole.values, 1e-6)


def test_forward_only_masks_under_every_kind():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3)).eval()
    data = build("mlp").train
    ensemble = byline.Dropout(byline.Independent([model]), masks=4, forward_only=True)
    side = ref.side(model, data, ref.classification)
    kernel, g = ref.trak_kernel(side, side, DAMPING), ref.trak_kernel(side, side, DAMPING).diagonal()
    for residual in ("sqrt", "leave-one-out"):
        attributor = byline.TRAK(byline.Task(model), ensemble, damping=DAMPING, residual=residual, progress=False).fit(
            data
        )
        q = np.stack([attributor.store.vector("residual", m.identity("residual")) for m in ensemble.members()])
        made = np.sqrt(q) if residual == "sqrt" else 1 / (1 + (1 / q - 1) * np.exp(-g * q / (1 - g)))
        scores = attributor.attribute(data)
        ref.assert_close(scores.values, kernel * made.mean(0))
        ref.assert_close(scores.stderr, np.abs(kernel) * made.std(0, ddof=1) / 2, 1e-3)


# folds, and what is refused


@pytest.mark.parametrize(("parts", "repeats"), [(2, 1), (3, 2), (5, 4)])
def test_folds_leave_every_example_out_once_a_repeat(parts, repeats):
    found = byline.folds(23, parts=parts, repeats=repeats, seed=4)
    assert len(found) == parts * repeats
    seen = np.stack([np.isin(np.arange(23), own) for own in found]).reshape(repeats, parts, 23)
    assert ((~seen).sum(1) == 1).all()
    assert all((a == b).all() for a, b in zip(found, byline.folds(23, parts, repeats, seed=4), strict=True))
    assert any(not np.array_equal(a, b) for a, b in itertools.pairwise(found))


def test_bad_input(fold):
    one = [fold.models[0]]
    cases = [
        (lambda: byline.CrossFit(one, [[0, 1], [2]]), "trained_on has 2 lists of positions; expected one per run, 1"),
        (lambda: byline.CrossFit(one, [[0, 0]]), "below 0 or twice"),
        (lambda: byline.CrossFit(one, [[0.5]]), "whole numbers"),
        (lambda: byline.CrossFit(one, [[True, False]]), "whole numbers"),
        (lambda: byline.CrossFit(one, 3), "expected a list of positions"),
        (lambda: byline.folds(3, parts=4), "parts is 4; expected 2 to the number of training examples, 3"),
        (lambda: byline.folds(3, parts=2, repeats=0), "repeats is 0"),
        (lambda: fitted(fold, residual="loo"), "residual is 'loo'; TRAK takes 'auto', 'mean'"),
        (lambda: fitted(fold, hessian="full"), "hessian is 'full'"),
        (lambda: fitted(fold, byline.GradCos, residual="sqrt"), "GradCos takes 'auto', 'mean'"),
        (lambda: fitted(fold, byline.GradDot, residual="leave-one-out"), "GradDot takes"),
        (
            lambda: fitted(fold, ensemble=byline.Independent(one), residual="out-of-sample"),
            "12 of 12 training examples are left out by no member",
        ),
        (
            lambda: fitted(fold, ensemble=byline.CrossFit(one, [[0, 1]]), residual="in-sample"),
            "10 of 12 training examples are trained on by no member",
        ),
        (lambda: fitted(fold, ensemble=byline.CrossFit(one, [[0, 12]])), "was trained on the example at 12"),
        (
            lambda: fitted(fold, byline.Influence, residual="sqrt", normalization="relatif"),
            "leaves the sign of Q alone",
        ),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
            call()
    called = byline.Task(fold.model, output=lambda m, b: m(b[0])[:, 0], residual=lambda m, b: m(b[0])[:, 1])
    for options in ({"hessian": "weighted"}, {"residual": "leave-one-out"}):
        with pytest.raises(ValueError, match="needs to know how the residual depends"):
            byline.TRAK(called, byline.Independent(one), **options)
    lossy = byline.Task(fold.model, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"))
    with pytest.raises(ValueError, match="whose gradient is Q times"):
        byline.GradDot(lossy, fold.ensemble, residual="out-of-sample", progress=False).fit(fold.train)


@pytest.mark.parametrize("residual", ["out-of-sample", "in-sample", "leave-one-out", "sqrt"])
@pytest.mark.parametrize("hessian", ["unweighted", "weighted"])
def test_one_model_under_two_folds_is_two_members(fold, residual, hessian):
    """The same weights said to be trained on other examples: as if they were other models."""
    one, other = fold.trained_on[:2]
    twin = copy.deepcopy(fold.models[0])
    next(twin.parameters()).data.flatten()[0] += 1e-7
    options = {"residual": residual, "hessian": hessian, "features": byline.Factorized(8)}
    both = byline.CrossFit(fold.models[:1], [one]) + byline.CrossFit(fold.models[:1], [other])
    apart = byline.CrossFit([fold.models[0], twin], [one, other])
    found, want = (fitted(fold, ensemble=e, **options).attribute(fold.test) for e in (both, apart))
    np.testing.assert_allclose(found.values, want.values, rtol=1e-3, atol=1e-5)
    assert not (found.values == 0).all(0).any()
    swapped = byline.CrossFit(fold.models[:1], [other]) + byline.CrossFit(fold.models[:1], [one])
    again = fitted(fold, ensemble=swapped, **options).attribute(fold.test)
    np.testing.assert_allclose(again.values, found.values, rtol=1e-4, atol=1e-6)
