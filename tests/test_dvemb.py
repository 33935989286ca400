"""DVEmb: derivatives through unrolled training, dense P × P matrices, and every refusal."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import byline
import reference as ref
from architectures import TiedHead
from byline.features.capture import Capture
from byline.methods import dvemb
from byline.methods.dvemb import DVEmb
from conftest import build

WIDE = 10**5  # Factorized columns that leave nothing out: the identity


def fitted(task, ensemble, train, **arguments):
    return DVEmb(task, ensemble, progress=False, **arguments).fit(train)


def pairs(x, y):
    return list(zip(x, y, strict=True))


# a linear model: the definition itself


@pytest.fixture(scope="module")
def descent():
    """Least squares by full-batch gradient descent, each example's loss weighted; a checkpoint before every step."""
    torch.manual_seed(0)
    x, y, z = torch.randn(14, 4).double(), torch.randn(14).double(), torch.randn(5, 4).double()
    rates = [0.05, 0.04, 0.03, 0.02, 0.02, 0.01, 0.03, 0.05]
    start = torch.randn(5).double()

    def trained(weights):
        theta, kept = start, [start]
        for rate in rates:
            residual = x @ theta[:4] + theta[4] - y
            pull = weights * residual
            theta = theta - rate * torch.cat([pull @ x, pull.sum()[None]])
            kept.append(theta)
        return z @ theta[:4] + theta[4], kept

    weights = torch.ones(14).double().requires_grad_()
    end, kept = trained(weights)
    exact = torch.stack([torch.autograd.grad(f, weights, retain_graph=True)[0] for f in end]).numpy()
    run = [{"weight": t[None, :4].detach().float(), "bias": t[4:].detach().float()} for t in kept]
    made = SimpleNamespace(run=run, steps=[*rates, 0.0], exact=exact, trained=trained)
    made.task = byline.Task(nn.Linear(4, 1).eval(), output="regression")
    made.train, made.test = pairs(x.float(), y.float()), pairs(z.float(), torch.zeros(5))
    return made


@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(WIDE)], ids=["exact", "linear"])
def test_it_is_the_derivative_of_the_final_output(descent, features):
    """With a checkpoint before every step and the final one, curvature "ggn" and steps=1: no approximation is left."""
    ensemble = byline.Trajectory([descent.run], weights=descent.steps)
    attributor = fitted(descent.task, ensemble, descent.train, curvature="ggn", steps=1, features=features)
    found = attributor.attribute(descent.test).values
    ref.assert_close(found, descent.exact, 1e-4)
    other = fitted(descent.task, ensemble, descent.train, curvature="fisher", steps=1, features=features)
    assert np.abs(other.attribute(descent.test).values - descent.exact).max() > 1e-2 * np.abs(descent.exact).max()


def test_retraining_with_an_example_left_out_moves_the_output_so(descent):
    ensemble = byline.Trajectory([descent.run], weights=descent.steps)
    found = fitted(descent.task, ensemble, descent.train, curvature="ggn", steps=1).attribute(descent.test).values
    everything = torch.ones(14).double()
    whole, _ = descent.trained(everything)
    moved = []
    for i in range(14):
        less = everything.clone()
        less[i] -= 0.01
        moved.append(((whole - descent.trained(less)[0]) / 0.01).numpy())
    ref.assert_close(found, np.stack(moved, 1), 1e-2)


def test_a_long_segment_is_followed_by_one_checkpoint_at_either_end(descent):
    """On a quadratic H is the same everywhere; the residuals alone are those of the checkpoint."""
    x = torch.stack([a for a, _ in descent.train]).double()
    full = torch.cat([x, torch.ones(14, 1)], 1)
    rate, steps = 6e-3, 20
    theta = torch.zeros(5).double()
    y = torch.stack([b for _, b in descent.train]).double()
    kept = [theta]
    for _ in range(steps):
        theta = theta - rate * full.T @ (full @ theta - y)
        kept.append(theta)
    states = [{"weight": t[None, :4].float(), "bias": t[4:].float()} for t in kept]
    often = fitted(
        descent.task, byline.Trajectory([states], weights=[*[rate] * steps, 0.0]), descent.train,
        curvature="ggn", steps=1,
    ).attribute(descent.test).values  # fmt: skip
    for chosen, weights in (([0, *range(2, 21, 2)], [0.0, *[2 * rate] * 10]), (range(0, 21, 2), [*[2 * rate] * 10, 0])):
        ensemble = byline.Trajectory([[states[i] for i in chosen]], weights=list(weights))
        seldom = fitted(descent.task, ensemble, descent.train, curvature="ggn", steps=2).attribute(descent.test).values
        ref.assert_close(seldom, often, 0.05)


# dense matrices


def segment(h, weight, steps):
    """What a segment leaves of a vector, and the step size times the mean of what follows each of its steps."""
    p = len(h)
    if steps is None:
        both = expm(np.block([[-weight * h, weight * np.eye(p)], [np.zeros((p, 2 * p))]]))
        return both[:p, :p], both[:p, p:]
    one = np.eye(p) - weight / steps * h
    power, total = np.eye(p), np.zeros((p, p))
    for _ in range(steps):
        total += power * weight / steps
        power = power @ one
    return power, total


def dense(tests, trains, weights, steps=None, curvature="fisher"):
    """(test, train) of one run, from gradients (N, P) at each checkpoint."""
    v, total = tests[-1].output, 0.0
    for side, weight in reversed(list(zip(trains, weights, strict=True))):
        rows = side.loss if curvature == "fisher" else side.output
        decay, mean = segment(rows.T @ rows, weight, steps)
        total = total + v @ mean @ -side.loss.T
        v = v @ decay
    return total


def smooth(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1, reduction="none")


def logit(model, batch):
    return model(batch[0]).gather(1, batch[1].unsqueeze(1)).squeeze(1)


def moved(model, count, size=0.15):
    """A run: the model and where a drift takes it."""
    torch.manual_seed(5)
    run = [model]
    for _ in range(count - 1):
        following = copy.deepcopy(run[-1])
        for p in following.parameters():
            p.data.add_(size * torch.randn_like(p))
        run.append(following)
    return run


def case(name, n, checkpoints=3):
    """A case with a run; "loss" and "callable" are the mlp with functions of one's own."""
    made = build(name if name not in ("loss", "callable") else "mlp", train=n)
    kind = ref.NAMED[made.case.output]
    if name == "loss":
        made.task = byline.Task(made.model, loss=smooth)
        kind = lambda m, b: (*ref.classification(m, b)[:1], smooth(m, b).squeeze(0), ref.classification(m, b)[2])  # noqa: E731
    elif name == "callable":
        made.task, kind = byline.Task(made.model, output=logit), ref.called(logit)
    made.run = moved(made.model, checkpoints)
    made.tests, made.trains = ([ref.side(m, d, kind, made.selects) for m in made.run] for d in (made.test, made.train))
    return made


WEIGHTS = [0.05, 0.02, 0.08]


@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(WIDE)], ids=["exact", "linear"])
@pytest.mark.parametrize(
    ("name", "n", "steps"),
    [
        *(("mlp", n, steps) for n in (9, 90) for steps in (None, 7)),
        *((name, 9, None) for name in ("conv2d-groups", "gru", "callable")),
        ("regression", 50, None),
        ("tied-head", 12, 3),
        ("loss", 90, None),
    ],
)
def test_it_is_its_formula(name, n, steps, features):
    """With 50 examples and more, linear features have fewer columns than that: the primal."""
    made = case(name, n)
    attributor = fitted(
        made.task, byline.Trajectory([made.run], weights=WEIGHTS), made.train, steps=steps, features=features
    )
    assert attributor._is_primal(attributor._voters[0]) == (features.linear and n >= 50)
    found = attributor.attribute(made.test)
    ref.assert_close(found.values, dense(made.tests, made.trains, WEIGHTS, steps), 2e-4)
    assert np.isnan(found.stderr).all()


@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(WIDE)], ids=["exact", "linear"])
@pytest.mark.parametrize("n", [9, 60])
def test_ggn_of_a_regression_that_is_not_linear(n, features):
    made = case("regression", n)
    ensemble = byline.Trajectory([made.run], weights=WEIGHTS)
    found = fitted(made.task, ensemble, made.train, curvature="ggn", features=features).attribute(made.test).values
    ref.assert_close(found, dense(made.tests, made.trains, WEIGHTS, None, "ggn"), 2e-4)


@pytest.mark.parametrize("weight", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(20)], ids=repr)
def test_the_limit_of_many_steps_never_blows_up(weight, features):
    made = case("mlp", 30, 2)
    found = fitted(made.task, byline.Trajectory([made.run], weights=[weight] * 2), made.train, features=features)
    values = found.attribute(made.test).values
    assert np.isfinite(values).all()
    if not features.linear and weight <= 1:
        ref.assert_close(values, dense(made.tests, made.trains, [weight] * 2), 1e-3)


def test_one_checkpoint_and_a_small_step_are_tracin():
    made = case("mlp", 20, 1)
    ensemble = byline.Trajectory([made.run], weights=[1e-6])
    expected = byline.TracIn(made.task, ensemble, progress=False).fit(made.train).attribute(made.test).values
    ref.assert_close(fitted(made.task, ensemble, made.train).attribute(made.test).values, expected, 1e-4)


@pytest.mark.parametrize("steps", [None, 1, 2, 3, 80])
def test_what_a_segment_leaves_keeps_its_digits(steps):
    """Against sums of powers, in which nothing cancels."""
    x = torch.logspace(-20, 0.2, 300, dtype=torch.float64)
    x[0] = 0
    s = 200_000 if steps is None else steps
    q = 1 - x.numpy() / s
    if steps is None:
        decay = np.exp(-x.numpy())
        first = np.array([1 - v / 2 + v**2 / 6 - v**3 / 24 if v < 1e-3 else -np.expm1(-v) / v for v in x.numpy()])
        second = np.array([0.5 - v / 6 + v**2 / 24 - v**3 / 120 if v < 1e-3 else np.nan for v in x.numpy()])
        second = np.where(np.isnan(second), (1 - first) / np.where(x.numpy() > 0, x.numpy(), 1), second)
    else:
        powers = q[None] ** np.arange(steps)[:, None]
        decay, first = q**steps, powers.mean(0)
        second = np.cumsum(powers, 0)[:-1].sum(0) / steps**2
    for found, expected in zip(dvemb._propagated(x, steps), (decay, first, second), strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-12)


# features


@pytest.mark.parametrize(
    "features",
    [byline.Factorized(12), byline.Dense(12), byline.Dense(12, "gaussian"), byline.Dense(12, "sjlt"),
     byline.Factorized(60), byline.Dense(80)],
    ids=repr,
)  # fmt: skip
def test_projected_features_are_the_formula_on_their_rows(features):
    """Rows of the training set taken from the store; the last two have more columns than examples."""
    made = case("mlp", 20)
    attributor = fitted(made.task, byline.Trajectory([made.run], weights=WEIGHTS), made.train, features=features)
    sides = []
    for voter in attributor._runs[0]:
        rows = attributor._stored(voter).read(0, 20)["rows"].double().numpy()
        q = voter.residual.double().numpy()
        sides.append(ref.Side(rows, -q[:, None] * rows, q, q))
    ref.assert_close(attributor.attribute(made.train).values, dense(sides, sides, WEIGHTS), 2e-4)


def test_the_primal_is_the_dual(monkeypatch):
    made = case("mlp", 60)
    ensemble = byline.Trajectory([made.run], weights=WEIGHTS)
    one, two = (
        fitted(made.task, ensemble, made.train, features=byline.Dense(15)).attribute(made.test).values
        for form in (True, False)
        if monkeypatch.setattr(DVEmb, "_is_primal", lambda self, voter, form=form: form) is None
    )
    ref.assert_close(one, two, 1e-4)
    assert (one != two).any()


@pytest.mark.parametrize(
    "features",
    [byline.Nystrom(8), byline.LowRank(2), byline.Factorized(20, "pca"), byline.Preconditioned(byline.Exact())],
    ids=repr,
)
def test_a_basis_per_checkpoint_is_refused(features):
    made = build("mlp")
    with pytest.raises(ValueError, match=r"whose basis differs from checkpoint to checkpoint; DVEmb takes"):
        DVEmb(made.task, byline.Trajectory([[made.model]], weights=[0.1]), features=features)


def test_batch_size_and_blocks_are_irrelevant(monkeypatch):
    made = case("mlp", 12, 2)
    for features in (byline.Exact(), byline.Factorized(8)):
        found = []
        for batch_size, block in ((2, 1), (5, 8), (256, 1024)):
            monkeypatch.setattr(dvemb, "_BLOCK", block)
            attributor = fitted(
                made.task, byline.Trajectory([made.run], weights=[0.05, 0.1]), made.train,
                features=features, batch_size=batch_size,
            )  # fmt: skip
            found.append((attributor.attribute(made.train).values, attributor.self_influence()))
        for scores, own in found:
            ref.assert_close(scores, found[0][0], 1e-4)
            ref.assert_close(own, scores.diagonal(), 1e-4)


def test_batches_of_different_lengths():
    torch.manual_seed(0)
    model = TiedHead().eval()
    data = [(torch.randint(11, (n,)), torch.randint(11, (n,))) for n in (3, 4, 5, 6, 7, 3, 5, 4)]

    def collate(items):
        return pad_sequence([a for a, _ in items], True, 0), pad_sequence([b for _, b in items], True, -100)

    run = moved(model, 2)
    task = byline.Task(model, output="language-modeling")
    sides = [ref.side(m, data, ref.language_modeling) for m in run]
    for batch_size in (1, 2, 8):
        found = fitted(
            task, byline.Trajectory([run], weights=[0.05, 0.1]), data, collate=collate, batch_size=batch_size
        ).attribute(data)
        ref.assert_close(found.values, dense(sides, sides, [0.05, 0.1]), 2e-4)


# runs


def test_the_mean_over_runs_and_its_error():
    made = case("mlp", 12, 5)
    runs, steps = [made.run[:3], made.run[2:4], made.run[3:]], [[0.05, 0.02, 0.08], [0.1, 0.03], [0.02, 0.06]]
    places = [slice(0, 3), slice(2, 4), slice(3, 5)]
    each = [dense(made.tests[p], made.trains[p], w) for p, w in zip(places, steps, strict=True)]
    found = fitted(made.task, byline.Trajectory(runs, weights=steps), made.train).attribute(made.test)
    ref.assert_close(found.values, np.mean(each, 0), 2e-4)
    ref.assert_close(found.stderr, np.std(each, 0, ddof=1) / 3**0.5, 1e-3)


def test_runs_that_begin_at_the_same_checkpoint_both_have_it():
    made = case("mlp", 12, 3)
    a, b, c = made.run
    ensemble = byline.Trajectory([[a, b], [a, c], [a, b]], weights=[0.05, 0.1])
    first, second = (
        dense([made.tests[0], made.tests[i]], [made.trains[0], made.trains[i]], [0.05, 0.1]) for i in (1, 2)
    )
    attributor = fitted(made.task, ensemble, made.train)
    ref.assert_close(attributor.attribute(made.test).values, (2 * first + second) / 3, 2e-4)


def test_a_checkpoint_that_returns_in_a_run_counts_at_both_places():
    made = case("mlp", 12, 2)
    order, weights = [0, 1, 0], [0.05, 0.1, 0.02]
    ensemble = byline.Trajectory([[made.run[i] for i in order]], weights=weights)
    expected = dense([made.tests[i] for i in order], [made.trains[i] for i in order], weights)
    ref.assert_close(fitted(made.task, ensemble, made.train).attribute(made.test).values, expected, 2e-4)


def test_checkpoints_without_a_step_are_passed_over():
    made = case("mlp", 12, 3)
    found = fitted(made.task, byline.Trajectory([made.run], weights=[0.05, 0.0, 0.0]), made.train)
    expected = dense(made.tests, made.trains, [0.05, 0.0, 0.0])
    ref.assert_close(found.attribute(made.test).values, expected, 2e-4)


@pytest.mark.parametrize("joined", [True, False])
def test_runs_added_later_are_as_if_they_had_been_there(joined):
    made = case("mlp", 12, 4)
    first, second = (byline.Trajectory([made.run[i : i + 2]], weights=[0.05, 0.1]) for i in (0, 2))
    if joined:
        found = fitted(made.task, first + second, made.train)
    else:
        found = fitted(made.task, first, made.train)
        found.attribute(made.test)
        found.add_members(second)
    both = byline.Trajectory([made.run[:2], made.run[2:]], weights=[0.05, 0.1])
    direct = fitted(made.task, both, made.train).attribute(made.test)
    ref.assert_close(found.attribute(made.test).values, direct.values, 1e-6)
    ref.assert_close(found.attribute(made.test).stderr, direct.stderr, 1e-6)


# fitting


def test_a_second_fit_on_other_data_answers_for_the_other_data():
    made = case("mlp", 9)
    attributor = fitted(made.task, byline.Trajectory([made.run], weights=WEIGHTS), made.train)
    attributor.attribute(made.test)
    other = [(x + 1, y) for x, y in made.train]
    trains = [ref.side(m, other, ref.classification) for m in made.run]
    found = attributor.fit(other).attribute(made.test).values
    ref.assert_close(found, dense(made.tests, trains, WEIGHTS), 2e-4)


@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(8)], ids=repr)
def test_a_store_is_resumed(tmp_path, monkeypatch, features):
    made = build("mlp", train=12)
    ensemble = byline.Trajectory([moved(made.model, 3)], weights=WEIGHTS)
    before = fitted(made.task, ensemble, made.train, store=tmp_path, features=features).attribute(made.test).values
    seen = []
    original = Capture.__call__
    monkeypatch.setattr(Capture, "__call__", lambda self, b, of: (seen.append(len(b[0])), original(self, b, of))[1])
    monkeypatch.setattr(torch.linalg, "eigh", None)
    attributor = fitted(made.task, ensemble, made.train, store=tmp_path, features=features)
    assert sum(seen) == 0
    np.testing.assert_array_equal(attributor.attribute(made.test).values, before)
    # other steps and another order ask for nothing new
    fitted(made.task, ensemble, made.train, store=tmp_path, features=features, steps=50).attribute(made.test)


def test_costs_are_told_and_change_nothing():
    made = build("mlp", train=12)
    ensemble = byline.Trajectory([moved(made.model, 2)], weights=[0.05, 0.1])
    for features in (byline.Exact(), byline.Factorized(4)):
        ledger, other = byline.Ledger(), byline.Ledger()
        told = fitted(made.task, ensemble, made.train, ledger=ledger, features=features).attribute(made.test)
        plain = fitted(made.task, ensemble, made.train, features=features).attribute(made.test)
        np.testing.assert_array_equal(told.values, plain.values)
        dots = byline.TracIn(made.task, ensemble, progress=False, ledger=other, features=features).fit(made.train)
        dots.attribute(made.test)
        assert ledger.fitting.flops > other.fitting.flops > 0
        assert ledger.serving.flops > 0


def test_info_says_what_was_done():
    made = build("mlp")
    scores = fitted(made.task, byline.Trajectory([[made.model]], weights=[0.1]), made.train, steps=4).attribute(
        made.test
    )
    assert (scores.info["method"], scores.info["curvature"], scores.info["steps"]) == ("DVEmb", "fisher", 4)


# refusals


@pytest.fixture
def masked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)).eval()
    return SimpleNamespace(model=model, task=byline.Task(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: byline.Independent([m]), "needs the step sizes of a run"),
        (lambda m: byline.Trajectory([[m, m]]), "needs the step sizes of a run"),
        (lambda m: byline.Trajectory([[m]], weights=[1]) + byline.Independent([m]), "needs the step sizes of a run"),
        (lambda m: byline.Dropout(byline.Trajectory([[m]], weights=[1]), masks=2), "expected a plain byline.Traj"),
        (lambda m: byline.WeightNoise(byline.Trajectory([[m]], weights=[1])), "expected a plain byline.Trajectory"),
        (
            lambda m: byline.Dropout(byline.Trajectory([[m]], weights=[1]), masks=2, forward_only=True),
            "expected a plain byline.Trajectory",
        ),
        (lambda m: byline.Trajectory([[m], [m]], weights=[[1], [0]]), "weights of run 1 are all 0"),
    ],
)
def test_ensembles_that_are_no_run_are_refused(masked, make, message):
    with pytest.raises(ValueError, match=message):
        DVEmb(masked.task, make(masked.model))


def test_added_members_are_refused_as_well(masked):
    attributor = DVEmb(masked.task, byline.Trajectory([[masked.model]], weights=[0.1]))
    with pytest.raises(ValueError, match="needs the step sizes of a run"):
        attributor.add_members(byline.Independent([masked.model]))
    assert len(attributor.ensemble) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "hessian"}, r"curvature is 'hessian'; expected one of \['fisher', 'ggn'\]"),
        ({"curvature": "ggn"}, "curvature is 'ggn', which DVEmb knows for regression alone"),
        ({"steps": 0}, "steps is 0; expected an int of at least 1"),
        ({"steps": 2.5}, r"steps is 2.5; expected an int of at least 1"),
    ],
)
def test_options_are_checked(masked, options, message):
    with pytest.raises(ValueError, match=message):
        DVEmb(masked.task, byline.Trajectory([[masked.model]], weights=[0.1]), **options)


def test_steps_that_diverge_are_refused_in_fit():
    made = build("mlp", train=40)
    with pytest.raises(
        ValueError, match=r"steps is 9, too few for the step size 50 per example of run 0, checkpoint 0"
    ):
        fitted(made.task, byline.Trajectory([[made.model]], weights=[50.0]), made.train, steps=9)
