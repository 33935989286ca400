"""TrackStar against its definition: dense matrices in float64, gradients from torch.autograd one example at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import byline
import reference as ref
from byline.engines.workbench import Workbench
from byline.features.capture import Capture
from byline.methods.trackstar import TrackStar
from conftest import build

WIDE = 10**5  # Factorized columns that leave nothing out


def trackstar(test, train, damping):
    """Cosines of R^(-1/2) g, R = GᵀG + λI through its eigenvectors; 0 where a gradient is 0."""
    g = -train.loss
    values, vectors = np.linalg.eigh(g.T @ g)
    half = vectors / np.sqrt(values.clip(0) + damping * (g**2).sum(1).mean())
    a, b = (x @ half for x in (test.output, g))
    a, b = (x / np.where(np.linalg.norm(x, axis=1) > 0, np.linalg.norm(x, axis=1), 1)[:, None] for x in (a, b))
    return a @ b.T


def fitted(task, ensemble, train, **arguments):
    ensemble = byline.Independent([ensemble]) if isinstance(ensemble, nn.Module) else ensemble
    return TrackStar(task, ensemble, **{"damping": 0.1, "progress": False, **arguments}).fit(train)


def smooth(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1, reduction="none")


def logit(model, batch):
    return model(batch[0]).gather(1, batch[1].unsqueeze(1)).squeeze(1)


def case(name, n):
    """A case, its task and its reference gradients; "loss" and "callable" are the mlp with functions of one's own."""
    made = build(name if name not in ("loss", "callable") else "mlp", train=n)
    kind = ref.NAMED[made.case.output]
    if name == "loss":
        made.task = byline.Task(made.model, loss=smooth)
        kind = lambda m, b: (*ref.classification(m, b)[:1], smooth(m, b).squeeze(0), ref.classification(m, b)[2])  # noqa: E731
    elif name == "callable":
        made.task, kind = byline.Task(made.model, output=logit), ref.called(logit)
    made.tests, made.trains = (ref.side(made.model, d, kind, made.selects) for d in (made.test, made.train))
    return made


@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(WIDE)])
@pytest.mark.parametrize(
    ("name", "n", "damping"),
    [
        *(("mlp", n, damping) for n in (9, 90) for damping in (1e-3, 0.1, 10.0)),
        *((name, 9, 0.1) for name in ("conv2d-groups", "tied-head", "bare-parameters", "callable")),
        ("regression", 50, 1e-3),
        ("loss", 90, 0.1),
    ],
)
def test_it_is_its_definition(name, n, damping, features):
    """With 9 examples both features are solved in the dual, with 50 and more the wide ones in the primal."""
    made = case(name, n)
    attributor = fitted(made.task, made.model, made.train, damping=damping, features=features)
    assert attributor._in_primal(attributor._voters[0]) == (features.linear and n >= 50)
    found = attributor.attribute(made.test)
    ref.assert_close(found.values, trackstar(made.tests, made.trains, damping), 1e-3)
    assert np.isnan(found.stderr).all()


def test_examples_the_model_is_sure_of_keep_their_digits():
    """Q down to 1e-8 beside Q of 1: what an example says must not drown in the rounding of the others."""
    made = build("mlp", train=30)
    with torch.no_grad():
        for p in made.model.parameters():
            p.mul_(7)  # beyond, the reference itself rounds p to 1
    sides = [ref.side(made.model, d, ref.classification) for d in (made.test, made.train)]
    assert sides[1].q.min() < 1e-7
    for features in (byline.Exact(), byline.Factorized(WIDE)):
        found = fitted(made.task, made.model, made.train, features=features).attribute(made.test).values
        sure = sides[1].q < 1e-5
        ref.assert_close(found[:, sure], trackstar(*sides, 0.1)[:, sure], 1e-3)


PROJECTED = [
    byline.Factorized(12),
    byline.Factorized(200, "pca"),
    byline.Nystrom(8),
    byline.Dense(12),
    byline.Dense(200, "gaussian"),
    byline.Dense(12, "sjlt"),
]


@pytest.mark.parametrize("features", PROJECTED, ids=repr)
def test_projected_features_are_the_definition_on_their_rows(features):
    """Rows of the training set taken from the store; half of these have more columns than examples."""
    made = build("mlp", train=20)
    attributor = fitted(made.task, made.model, made.train, features=features)
    voter = attributor._voters[0]
    rows = attributor._stored(voter).read(0, 20)["rows"].double().numpy()
    q = voter.residual.double().numpy()
    side = ref.Side(rows, -q[:, None] * rows, q, q)
    ref.assert_close(attributor.attribute(made.train).values, trackstar(side, side, 0.1), 1e-3)


def test_nystrom_on_every_example_is_exact():
    made = case("mlp", 20)
    found = fitted(made.task, made.model, made.train, features=byline.Nystrom(20)).attribute(made.train)
    ref.assert_close(found.values, trackstar(made.trains, made.trains, 0.1), 1e-2)


def test_batch_size_is_irrelevant():
    made = build("mlp", train=60)
    for features in (byline.Exact(), byline.Factorized(20)):
        one, two = (
            fitted(made.task, made.model, made.train, features=features, batch_size=size).attribute(made.test).values
            for size in (1, 256)
        )
        ref.assert_close(one, two, 1e-4)


@pytest.mark.parametrize("damping", [1e-12, 1e-8, 1e-4, 1e4, 1e12, "auto"])
@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(WIDE), byline.Nystrom(9)], ids=repr)
def test_extreme_damping_gives_cosines_or_a_sentence(damping, features):
    made = build("mlp", train=60)
    twice = made.train + made.train[:20]
    try:
        found = fitted(made.task, made.model, twice, damping=damping, features=features).attribute(made.test).values
    except ValueError as error:
        assert "damping is too small" in str(error)  # noqa: PT017
        assert damping < 1e-4
        return
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1
    assert np.abs(found).max() > 0.05


def test_much_damping_is_gradcos():
    made = build("mlp", train=20)
    cosines = byline.GradCos(made.task, byline.Independent([made.model]), progress=False).fit(made.train)
    found = fitted(made.task, made.model, made.train, damping=1e6).attribute(made.test).values
    ref.assert_close(found, cosines.attribute(made.test).values, 1e-4)


def test_what_has_no_gradient_scores_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).eval()
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    x[3] = 0
    data = list(zip(x, y, strict=True))
    for features in (byline.Exact(), byline.Factorized(WIDE), byline.Factorized(6)):
        found = fitted(byline.Task(model), model, data, features=features).attribute(data).values
        assert (found[3] == 0).all()
        assert (found[:, 3] == 0).all()
        assert (np.abs(found[0]) > 0).sum() == 11


def test_the_sign_is_that_of_training_on_it():
    """A training example like the test example pulls its output up, one with another label down."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).eval()
    x = torch.randn(5)
    train = [(x, torch.tensor(0)), (x, torch.tensor(1)), *((torch.randn(5), torch.tensor(i % 3)) for i in range(6))]
    found = fitted(byline.Task(model), model, train, damping=1.0).attribute(train[:1]).values[0]
    assert found[0] == pytest.approx(1, abs=1e-5)
    assert found[1] < 0


# ensembles


@pytest.fixture(scope="module")
def voters():
    pytest.importorskip("peft")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3)).eval()
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    made = build("mlp", train=12)
    made.task, one = byline.Task(model), byline.Independent([model])
    lora = byline.train_lora(
        made.task, one, made.train, adapters=2, rank=2, epochs=2, lr=0.05, batch_size=8, progress=False
    )
    made.ensembles = {
        "independent": byline.Independent([model, other]),
        "dropout": byline.Dropout(one, masks=3),
        "lora": lora,
        "noise": byline.WeightNoise(one, draws=2),
        "trajectory": byline.Trajectory([[model, other]]),
        "weighted": byline.Trajectory([[model, other]], weights=[0.3, 0.1]),
        "nested": byline.Dropout(byline.Trajectory([[model, other]]), masks=2),
        "joined": byline.Independent([model]) + byline.WeightNoise(one, draws=2, seed=3),
        "twice": byline.Independent([model, other, model]),
    }
    return made


class Masked(nn.Module):
    """A fixed multiplication where a dropout layer was."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return x * self.mask


def masked(model, member):
    """A member as a model of its own, its mask written into it."""
    with torch.no_grad():
        mask = model[2](torch.ones(1, 5))[0].clone()
    fixed = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Identity(), nn.Linear(5, 3)).eval()
    fixed.load_state_dict(member.weights.load())
    fixed[2] = Masked(mask)
    return fixed


KINDS = ["independent", "dropout", "lora", "noise", "trajectory", "weighted", "nested", "joined", "twice"]


@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(WIDE)], ids=["exact", "linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_ensemble_is_the_mean_of_its_members(voters, kind, features):
    members = voters.ensembles[kind].members()
    each = []
    for member in members:
        bench = Workbench(voters.task, voters.train)
        with bench.active(member, "gradient") as active:
            model = masked(active.model, member) if kind in ("dropout", "nested") else active.model
            sides = [ref.side(model, d, ref.classification, member.selects) for d in (voters.test, voters.train)]
        each.append(trackstar(*sides, 0.1))
    assert np.abs(each[0] - each[1]).max() > 1e-3
    found = fitted(voters.task, voters.ensembles[kind], voters.train, features=features).attribute(voters.test)
    weights = np.array([member.weight for member in members])
    ref.assert_close(found.values, np.average(each, axis=0, weights=weights), 1e-3)
    if kind not in ("weighted", "twice"):
        ref.assert_close(found.stderr, np.std(each, 0, ddof=1) / len(each) ** 0.5, 2e-3)


def test_forward_only_is_refused(voters):
    ensemble = byline.Dropout(voters.ensembles["independent"], masks=2, forward_only=True)
    with pytest.raises(ValueError, match=r"forward_only=True masks TRAK's Q alone, and TrackStar has no Q"):
        TrackStar(voters.task, ensemble)


# self-influence


@pytest.mark.parametrize("name", ["mlp", "tied-head", "loss", "callable"])
@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(7), byline.Nystrom(6)], ids=repr)
def test_self_influence_is_the_diagonal(name, features):
    made = case(name, 9)
    attributor = fitted(made.task, made.model, made.train, features=features, batch_size=4)
    found = attributor.self_influence()
    ref.assert_close(found, attributor.attribute(made.train).values.diagonal(), 1e-4)
    if name == "mlp":
        np.testing.assert_allclose(found, 1, atol=1e-4)


# fitting


def test_a_second_fit_on_other_data_answers_for_the_other_data():
    made = case("mlp", 9)
    attributor = fitted(made.task, made.model, made.train)
    attributor.attribute(made.test)
    other = [(x + 1, y) for x, y in made.train]
    found = attributor.fit(other).attribute(made.test).values
    ref.assert_close(found, trackstar(made.tests, ref.side(made.model, other, ref.classification), 0.1), 1e-3)


def test_added_members_are_as_if_they_had_been_there():
    made = build("mlp")
    other = copy.deepcopy(made.model)
    for p in other.parameters():
        p.data.mul_(0.7)
    attributor = fitted(made.task, made.model, made.train)
    attributor.attribute(made.test)
    found = attributor.add_members(byline.Independent([other])).attribute(made.test).values
    direct = fitted(made.task, byline.Independent([made.model, other]), made.train).attribute(made.test).values
    np.testing.assert_array_equal(found, direct)


def test_a_store_is_resumed(tmp_path, monkeypatch):
    made = build("mlp")
    before = fitted(made.task, made.model, made.train, store=tmp_path).attribute(made.test).values
    seen = []
    original = Capture.__call__
    monkeypatch.setattr(Capture, "__call__", lambda self, b, of: (seen.append(len(b[0])), original(self, b, of))[1])
    attributor = fitted(made.task, made.model, made.train, store=tmp_path)
    assert sum(seen) == 0
    np.testing.assert_array_equal(attributor.attribute(made.test).values, before)


def test_damping_and_cost_are_told():
    made, ledger = build("mlp"), byline.Ledger()
    attributor = fitted(made.task, made.model, made.train, damping="auto", ledger=ledger)
    info = attributor.attribute(made.test).info
    assert attributor.damping_["model 0"] == info["damping_median"] > 0
    assert info["method"] == "TrackStar"
    assert ledger.serving.flops > 0
    assert ledger.fitting.flops > 0


def test_damping_zero_is_refused_in_the_dual_before_any_work(monkeypatch):
    made = build("mlp", train=60)
    monkeypatch.setattr(Capture, "__call__", None)
    with pytest.raises(ValueError, match=r"damping is 0; TrackStar with Exact\(\) expects a number above 0"):
        fitted(made.task, made.model, made.train, damping=0)


def test_damping_zero_is_taken_where_the_second_moment_is_regular():
    made = build("regression", train=60)
    few = byline.Task(made.model, output="regression", params=lambda name: name.endswith("bias"))
    sides = [ref.side(made.model, d, ref.regression, few.selects) for d in (made.test, made.train)]
    found = fitted(few, made.model, made.train, damping=0, features=byline.Factorized(WIDE)).attribute(made.test)
    ref.assert_close(found.values, trackstar(*sides, 0.0), 1e-2)
