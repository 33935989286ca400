"""Methods on embeddings, the random baseline and the registry, each against something worked out another way."""

from __future__ import annotations

import copy
from itertools import combinations
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

import byline
from byline.ensembles.base import Ensemble
from byline.features.capture import Capture
from byline.methods import representer
from byline.methods.embedding import Tap
from byline.methods.knn_shapley import shapley
from byline.methods.registry import ALL, make, methods
from conftest import build

N, B, D, C = 24, 6, 10, 3

METHODS = {
    "cosine": (byline.RepresentationSimilarity, {"similarity": "cosine"}),
    "dot": (byline.RepresentationSimilarity, {"similarity": "dot"}),
    "l2": (byline.RepresentationSimilarity, {"similarity": "l2"}),
    "knn": (byline.KNNShapley, {"k": 3}),
    "representer": (byline.RepresenterPoints, {"l2": 0.01}),
    "random": (byline.Random, {"seed": 4}),
}
EMBEDDING = [name for name in METHODS if name != "random"]
KINDS = ["independent", "dropout", "lora", "noise", "trajectory", "dropout of lora"]


class Net(nn.Module):
    """Counts the examples that it sees; its embedding is what ``head`` gets."""

    seen: list[int] = []  # noqa: RUF012

    def __init__(self, outputs: int = C):
        super().__init__()
        self.body = nn.Linear(5, D)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(D, outputs)

    def embed(self, x):
        return self.drop(torch.tanh(self.body(x)))

    def forward(self, x):
        Net.seen.append(len(x))
        return self.head(self.embed(x))


def nets(count, outputs=C):
    out = []
    for seed in range(count):
        torch.manual_seed(seed)
        out.append(Net(outputs).eval())
    return out


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(1)
    x, y = torch.randn(N + B, 5), torch.randint(C, (N + B,))
    models = nets(4)
    out = SimpleNamespace(x=x, y=y, models=models, task=byline.Task(models[0]))
    out.train, out.test = TensorDataset(x[:N], y[:N]), TensorDataset(x[N:], y[N:])
    first = byline.Independent(models[:2])
    options = {"adapters": 2, "rank": 2, "epochs": 2, "lr": 0.05, "batch_size": 8, "progress": False}
    adapters = byline.train_lora(out.task, first, out.train, **options)
    out.ensembles = {
        "independent": byline.Independent(models[:3]),
        "dropout": byline.Dropout(first, masks=2, p=0.3),
        "lora": adapters,
        "noise": byline.WeightNoise(first, draws=2),
        "trajectory": byline.Trajectory([models[:2], models[2:]]),
        "dropout of lora": byline.Dropout(adapters, masks=1),
    }
    return out


def fitted(name, made, ensemble=None, **options):
    cls, own = METHODS[name]
    ensemble = byline.Independent(made.models[:1]) if ensemble is None else ensemble
    return cls(made.task, ensemble, **{"progress": False, **own, **options}).fit(made.train)


class One(Ensemble):
    """A single member of an ensemble."""

    def __init__(self, member):
        self.member = member

    def members(self):
        return [self.member]


def direct(member, made, x):
    """A member's embeddings by hand, in float64: nothing of byline's hooks, masks or adapters at work."""
    model = copy.deepcopy(made.models[0])
    model.load_state_dict(member.weights.load())
    mask = 1.0
    for change in member.changes:
        spec = change.spec()
        if "noise" in spec:
            seed, index, draw, scale = spec["noise"]
            g = torch.Generator().manual_seed((seed * 1_000_003 + index) * 1_000_003 + draw)
            for p in (p for p in model.parameters() if p.ndim > 1):
                p.data.mul_(1 + scale * torch.randn(p.shape, generator=g))
        elif "mask" in spec:
            # the mask shows on any one input
            with change.apply(copy.deepcopy(model)) as masked, torch.no_grad():
                kept = masked.embed(torch.full((1, 5), 0.4))[0] != 0
            mask = kept.double() / (1 - (0.5 if change.p is None else change.p))
        else:
            a, b = (change.adapter.tensors[f"base_model.model.body.lora_{k}.weight"] for k in "AB")
            model.body.weight.data += change.adapter.config["lora_alpha"] / change.adapter.config["r"] * (b @ a)
    model = model.double()
    with torch.no_grad():
        return torch.tanh(model.body(x.double())) * mask


# embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_input_of_the_last_layer_under_the_member(made, kind):
    found = fitted("cosine", made, made.ensembles[kind])
    members = made.ensembles[kind].members()
    assert len(members) > 1
    for member in members:
        expected = direct(member, made, made.x[:N])
        torch.testing.assert_close(found._embeddings(member).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_similarities_are_those_of_embeddings_worked_out_by_hand(made, kind):
    pairs = [(direct(m, made, made.x[N:]), direct(m, made, made.x[:N])) for m in made.ensembles[kind].members()]
    for name, likeness in (
        ("cosine", lambda a, b: F.cosine_similarity(a[:, None], b[None], dim=2)),
        ("dot", lambda a, b: (a[:, None] * b[None]).sum(2)),
        ("l2", lambda a, b: -(a[:, None] - b[None]).square().sum(2)),
    ):
        votes = torch.stack([likeness(a, b) for a, b in pairs])
        scores = fitted(name, made, made.ensembles[kind]).attribute(made.test)
        np.testing.assert_allclose(scores.values, votes.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(scores.stderr, votes.std(0) / len(votes) ** 0.5, rtol=1e-3, atol=1e-5)


def test_masks_are_the_same_for_training_and_test_examples(made):
    ensemble = byline.Dropout(byline.Independent(made.models[:1]), masks=1, p=0.5)
    found = fitted("cosine", made, ensemble, batch_size=7)
    assert (found._embeddings(ensemble.members()[0]) == 0).all(0).sum() >= 2
    assert (found.attribute(made.train).values.diagonal() == 1).all()
    found.batch_size = 256
    for i in (0, 11):
        assert found.attribute(Subset(made.train, [i])).values[0, i] == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(METHODS))
def test_scores_are_the_mean_of_the_members_scores(made, kind, name):
    ensemble = made.ensembles[kind]
    votes = np.stack([fitted(name, made, One(m)).attribute(made.test).values for m in ensemble.members()])
    assert np.abs(votes - votes[:1]).max() > 1e-3
    attributor = fitted(name, made, ensemble)
    np.testing.assert_allclose(attributor.attribute(made.test).values, votes.mean(0), rtol=1e-5, atol=1e-6)
    own = attributor.attribute(made.train).values.diagonal()
    np.testing.assert_allclose(attributor.self_influence(), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(METHODS))
def test_the_batch_size_changes_no_score(made, name):
    ensemble = made.ensembles["dropout"]
    one, five, all_ = (fitted(name, made, ensemble, batch_size=b).attribute(made.test).values for b in (1, 5, 64))
    np.testing.assert_allclose(one, all_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(five, all_, rtol=1e-4, atol=1e-6)


def test_weights_of_a_trajectory_weigh_its_members(made):
    runs = [made.models[:2]]
    a, b = (fitted("dot", made, byline.Independent([m])).attribute(made.test).values for m in made.models[:2])
    found = fitted("dot", made, byline.Trajectory(runs, weights=[3.0, 1.0])).attribute(made.test).values
    np.testing.assert_allclose(found, (3 * a + b) / 4, rtol=1e-5, atol=1e-6)


class Tokens(nn.Module):
    """Ids to logits per position, positions second or first inside."""

    def __init__(self, first=False):
        super().__init__()
        self.first = first
        self.embed = nn.Embedding(9, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, C)

    def hidden(self, ids):
        h = torch.tanh(self.mix(self.embed(ids)))
        return h.transpose(0, 1) if self.first else h

    def forward(self, ids, attention_mask=None):
        return self.head(self.hidden(ids)).mean(0 if self.first else 1)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("size", [4, 7, 64])
def test_sequences_are_averaged_over_positions(first, size):
    """With batches of as many examples as there are positions too."""
    torch.manual_seed(0)
    model, data = Tokens(first).eval(), TensorDataset(torch.randint(9, (12, 4)), torch.randint(C, (12,)))
    found = byline.RepresentationSimilarity(
        byline.Task(model), byline.Independent([model]), similarity="dot", batch_size=size, progress=False
    ).fit(data)
    h = model.hidden(data.tensors[0]).mean(0 if first else 1).detach()
    np.testing.assert_allclose(found.attribute(data).values, h @ h.T, rtol=1e-4, atol=1e-5)


def test_padding_is_left_out_of_the_mean():
    torch.manual_seed(0)
    model, ids, mask = Tokens().eval(), torch.randint(9, (9, 5)), torch.ones(9, 5, dtype=torch.long)
    for i in range(9):
        mask[i, 5 - i % 4 :] = 0
    data = [{"ids": i, "attention_mask": m, "labels": torch.tensor(0)} for i, m in zip(ids, mask, strict=True)]
    found = byline.RepresentationSimilarity(
        byline.Task(model), byline.Independent([model]), similarity="dot", batch_size=4, progress=False
    ).fit(data)
    h = torch.stack([model.hidden(i[m.bool()][None])[0].mean(0) for i, m in zip(ids, mask, strict=True)]).detach()
    np.testing.assert_allclose(found.attribute(data).values, h @ h.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["tied-head", "gpt2-labels", "regression", "conv2d-groups", "attention", "mlp-dict"])
def test_similarity_takes_models_of_all_kinds(case):
    one = build(case)
    found = byline.RepresentationSimilarity(one.task, byline.Independent([one.model]), progress=False).fit(one.train)
    assert np.isfinite(found.attribute(one.test).values).all()


def test_a_callable_output_runs_the_model(made):
    task = byline.Task(made.models[0], output=lambda model, batch: model(batch[0])[:, 0])
    found = byline.RepresentationSimilarity(task, byline.Independent(made.models[:1]), progress=False).fit(made.train)
    expected = fitted("cosine", made).attribute(made.test).values
    np.testing.assert_allclose(found.attribute(made.test).values, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["independent", "lora"])
def test_a_layer_can_be_named(made, kind):
    found = fitted("dot", made, made.ensembles[kind], layer="body").attribute(made.test).values
    np.testing.assert_allclose(found, made.x[N:] @ made.x[:N].T, rtol=1e-4, atol=1e-4)


def test_a_layer_that_works_in_place_is_seen_before_it_does(made):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, C)).eval()
    found = byline.RepresentationSimilarity(
        byline.Task(model), byline.Independent([model]), layer="1", similarity="dot", progress=False
    ).fit(made.train)
    a, b = (model[0](x).detach() for x in (made.x[N:], made.x[:N]))
    np.testing.assert_allclose(found.attribute(made.test).values, a @ b.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EMBEDDING)
def test_half_precision_is_taken(made, name):
    model = copy.deepcopy(made.models[0]).bfloat16()
    train, test = (TensorDataset(d.tensors[0].bfloat16(), d.tensors[1]) for d in (made.train, made.test))
    cls, own = METHODS[name]
    found = cls(byline.Task(model), byline.Independent([model]), progress=False, **own).fit(train).attribute(test)
    assert np.isfinite(found.values).all()


def test_the_model_is_left_as_it_was(made):
    before = copy.deepcopy(made.models[0].state_dict())
    fitted("knn", made, made.ensembles["noise"]).attribute(made.test)
    assert all(torch.equal(before[k], v) for k, v in made.task.model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in made.task.model.modules())


# k nearest neighbours


def brute(distances, agree, k):
    """The Shapley value from its definition, over all subsets."""
    n = len(distances)

    def worth(players):
        return sum(agree[i] for i in sorted(players, key=lambda i: (distances[i], i))[:k]) / k

    out = []
    for i in range(n):
        others, total = [j for j in range(n) if j != i], 0.0
        for size in range(n):
            parts = [worth((*s, i)) - worth(s) for s in combinations(others, size)]
            total += sum(parts) / comb(n - 1, size) / n
        out.append(total)
    return out


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 7, 9])
def test_knn_shapley_is_the_shapley_value(made, k):
    train, test = Subset(made.train, range(7)), Subset(made.test, range(3))
    made_of = byline.KNNShapley(made.task, byline.Independent(made.models[:1]), k=k, progress=False).fit(train)
    found = made_of.attribute(test).values
    member = made_of.ensemble.members()[0]
    h, g = direct(member, made, made.x[:7]), direct(member, made, made.x[N : N + 3])
    for z in range(3):
        distances, agree = (h - g[z]).norm(dim=1).tolist(), (made.y[:7] == made.y[N + z]).int().tolist()
        np.testing.assert_allclose(found[z], brute(distances, agree, k), atol=1e-6)
        nearest = np.argsort(distances)[:k]
        assert found[z].sum() == pytest.approx(np.array(agree)[nearest].sum() / k, abs=1e-6)


def test_equal_distances_stand_in_the_order_of_the_training_set():
    distances, agree = torch.tensor([[1.0, 2.0, 1.0, 1.0]]), torch.tensor([[0, 1, 1, 0]])
    np.testing.assert_allclose(shapley(distances, agree, 2)[0], brute([1, 2, 1, 1], [0, 1, 1, 0], 2), atol=1e-6)


def test_a_training_example_is_its_own_nearest_neighbour(made):
    found = fitted("knn", made)
    h = direct(found.ensemble.members()[0], made, made.x[:N])
    order = (h[:, None] - h[None]).norm(dim=2).argsort(1)
    assert (order[:, 0] == torch.arange(N)).all()
    lonely = (made.y[:N][order[:, 1:4]] != made.y[:N, None]).all(1).numpy()
    friendly = (made.y[:N][order[:, 1:4]] == made.y[:N, None]).all(1).numpy()
    assert lonely.any()
    assert friendly.any()
    assert found.self_influence()[lonely].min() > found.self_influence()[friendly].max()


# representer points


def refit(found, member):
    return found.store.state(f"representer-{member.identity('residual')}-{found.l2!r}")


def with_one(h):
    return torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_representers_of_a_classification_add_up_and_agree_with_autograd_and_sklearn(made, l2):
    found = byline.RepresenterPoints(made.task, byline.Independent(made.models[:1]), l2=l2, progress=False)
    found.fit(made.train)
    member = found.ensemble.members()[0]
    scores = found.attribute(made.test).values
    h, g = (with_one(direct(member, made, x)) for x in (made.x[:N], made.x[N:]))
    solver = LogisticRegression(C=1 / (2 * l2 * N), fit_intercept=False, tol=1e-12, max_iter=100_000)
    w = torch.from_numpy(solver.fit(h.numpy(), made.y[:N].numpy()).coef_)
    w -= w.mean(0)
    torch.testing.assert_close(refit(found, member)["weight"], w, rtol=1e-4, atol=1e-4)

    logits = (g @ w.T).requires_grad_()
    task = byline.Task(nn.Identity())
    (slope,) = torch.autograd.grad(task.output(nn.Identity(), (logits, made.y[N:])).sum(), logits)
    own = (h @ w.T).requires_grad_()
    (loss,) = torch.autograd.grad(task.loss(nn.Identity(), (own, made.y[:N])).sum(), own)
    expected = torch.einsum("zc,ic,zd,id->zi", slope, -loss / (2 * l2 * N), g, h)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    np.testing.assert_allclose(scores.sum(1), (slope * logits).sum(1).detach(), rtol=1e-4, atol=1e-4)
    assert (found.self_influence() >= 0).all()


@pytest.mark.parametrize("l2", [1e-5, 1e-2])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_representers_of_a_regression_add_up_and_agree_with_sklearn(made, l2, shape):
    model = nets(1, outputs=1)[0]
    y = torch.sin(3 * made.x.sum(1)).reshape(-1, *shape)
    train, test = TensorDataset(made.x[:N], y[:N]), TensorDataset(made.x[N:], y[N:])
    found = byline.RepresenterPoints(byline.Task(model, "regression"), byline.Independent([model]), l2=l2)
    found.progress = False
    scores = found.fit(train).attribute(test).values
    member = found.ensemble.members()[0]
    reference = SimpleNamespace(models=[model])
    h, g = (with_one(direct(member, reference, x)) for x in (made.x[:N], made.x[N:]))
    w = torch.from_numpy(Ridge(alpha=2 * l2 * N, fit_intercept=False).fit(h.numpy(), y[:N].flatten()).coef_)
    expected = (y[:N].flatten() - h @ w) / (2 * l2 * N) * (g @ h.T)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    # scores are kept in float32: with a small penalty they are large and cancel
    rounding = N * float(np.abs(scores).max()) * 2**-24
    np.testing.assert_allclose(scores.sum(1, dtype=np.float64), g @ w, rtol=1e-4, atol=1e-4 + rounding)


@pytest.mark.parametrize(("scale", "l2"), [(1e3, 1e-3), (1.0, 1e-7), (1e-3, 1e3)])
def test_representers_add_up_where_the_layer_is_hard_to_fit(made, scale, l2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, C)).eval()
    model[0].weight.data.mul_(scale)
    task, ensemble = byline.Task(model), byline.Independent([model])
    found = byline.RepresenterPoints(task, ensemble, l2=l2, progress=False).fit(made.train)
    w = refit(found, found.ensemble.members()[0])["weight"]
    logits = (with_one(model[1](model[0](made.x[N:])).double().detach()) @ w.T).requires_grad_()
    (slope,) = torch.autograd.grad(byline.Task(nn.Identity()).output(nn.Identity(), (logits, made.y[N:])).sum(), logits)
    total = (slope * logits).sum(1).detach().numpy()
    scores = found.attribute(made.test).values
    np.testing.assert_allclose(scores.sum(1, dtype=np.float64), total, atol=1e-4 * max(1, np.abs(scores).max()))


def test_balanced_labels_on_nothing_are_stationary_at_zero():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, C)).eval()
    data = TensorDataset(torch.zeros(9, 2), torch.arange(9) % C)
    model[0].bias.data.fill_(-1.0)
    found = byline.RepresenterPoints(byline.Task(model), byline.Independent([model]), progress=False).fit(data)
    assert np.abs(found.attribute(data).values.sum(1)).max() < 1e-3


def test_a_last_layer_that_does_not_become_stationary_is_an_error(made, monkeypatch):
    with pytest.raises(ValueError, match=r"l2 is 1e-300: .* does not become stationary"):
        fitted("representer", made, l2=1e-300)
    monkeypatch.setattr(representer, "_STEPS", 1)
    with pytest.raises(ValueError, match=r"does not become stationary .* larger"):
        fitted("representer", made)


def test_fitting_works_without_gradients_being_on(made):
    with torch.no_grad():
        found = fitted("representer", made).attribute(made.test).values
    assert (found == fitted("representer", made).attribute(made.test).values).all()


# random


def test_random_scores_are_normal_and_a_function_of_their_place(made):
    task, ensemble = made.task, byline.Independent(made.models[:1])
    wide = TensorDataset(torch.zeros(300, 5), torch.zeros(300, dtype=torch.long))
    values = byline.Random(task, ensemble, progress=False).fit(wide).attribute(wide).values
    assert stats.kstest(values.ravel(), "norm").pvalue > 0.01
    assert len(np.unique(values)) > 0.99 * values.size
    for other in (values.T, np.roll(values, 1, 0), np.roll(values, 1, 1)):
        assert abs(np.corrcoef(values.ravel(), other.ravel())[0, 1] - (300**-1 if other is values.T else 0)) < 0.02
    few = byline.Random(task, ensemble, progress=False, batch_size=2).fit(made.train).attribute(made.test).values
    assert (few == values[:B, :N]).all()
    other = byline.Random(task, ensemble, seed=1, progress=False).fit(made.train).attribute(made.test).values
    assert np.abs(few - other).min() > 0


def test_random_scores_of_members_are_averaged_and_cost_nothing(made):
    ledger = byline.Ledger()
    for forward_only in (False, True):
        ensemble = byline.Dropout(byline.Independent(made.models[:2]), masks=50, forward_only=forward_only)
        Net.seen.clear()
        scores = fitted("random", made, ensemble, ledger=ledger).attribute(made.test)
        assert not Net.seen
        assert scores.values.std() == pytest.approx(0.1, rel=0.2)
        assert scores.stderr.mean() == pytest.approx(0.1, rel=0.1)
    assert ledger.total.flops == 0


# the store, the ledger


@pytest.mark.parametrize("name", EMBEDDING)
def test_a_second_process_finds_the_embeddings(made, name, tmp_path):
    ensemble = made.ensembles["dropout"]
    members = len(ensemble)
    Net.seen.clear()
    first = fitted(name, made, ensemble, store=tmp_path)
    # locating the masks and the layer, and the checks of the first batch and of company, take a few examples more
    assert N * members <= sum(Net.seen) < N * members + 36
    Net.seen.clear()
    second = fitted(name, made, ensemble, store=tmp_path)
    assert sum(Net.seen) < 36
    Net.seen.clear()
    assert (second.self_influence() == first.self_influence()).all()
    assert sum(Net.seen) == 0
    assert (second.attribute(made.test).values == first.attribute(made.test).values).all()
    assert sum(Net.seen) == 2 * B * members


def test_methods_on_one_layer_share_a_store(made, tmp_path):
    fitted("cosine", made, store=tmp_path)
    for name in ("knn", "representer", "l2"):
        Net.seen.clear()
        found = fitted(name, made, store=tmp_path).attribute(made.test).values
        assert sum(Net.seen) < 20 + B
        assert (found == fitted(name, made).attribute(made.test).values).all()
    with pytest.raises(ValueError, match=r"features\.layer is body here and None"):
        fitted("cosine", made, store=tmp_path, layer="body")
    with pytest.raises(ValueError, match="made for another configuration"):
        byline.GradDot(made.task, byline.Independent(made.models[:1]), store=tmp_path, progress=False).fit(made.train)


@pytest.mark.parametrize("name", list(METHODS))
def test_added_members_alone_are_computed(made, name):
    found = fitted(name, made, byline.Independent(made.models[:3]))
    Net.seen.clear()
    found.add_members(byline.Independent(made.models[3:]))
    assert sum(Net.seen) < 2 * N
    whole = fitted(name, made, byline.Independent(made.models))
    np.testing.assert_allclose(
        found.attribute(made.test).values, whole.attribute(made.test).values, rtol=1e-5, atol=1e-6
    )


def test_a_model_whose_code_changed_is_refused(made, tmp_path, monkeypatch):
    fitted("cosine", made, store=tmp_path)
    monkeypatch.setattr(Net, "embed", lambda self, x: 2 * torch.tanh(self.body(x)))
    with pytest.raises(ValueError, match=r"was made (by|for) another"):
        fitted("cosine", made, store=tmp_path)


@pytest.mark.parametrize("name", list(METHODS))
def test_no_gradient_is_computed_and_no_features_are_kept(made, name, monkeypatch):
    monkeypatch.setattr(Capture, "__call__", lambda *_: pytest.fail("a gradient was taken"))
    found = fitted(name, made, made.ensembles["lora"])
    found.attribute(made.test)
    assert not found.store.manifest.features
    assert "features" not in found.info()
    assert "features" not in repr(found)


@pytest.mark.parametrize("name", EMBEDDING)
def test_the_ledger_counts_forward_passes(made, name):
    ledger, members = byline.Ledger(), len(made.ensembles["dropout"])
    found = fitted(name, made, made.ensembles["dropout"], ledger=ledger, batch_size=8)
    forward = 2 * (5 * D + D * C)
    assert ledger.fitting.flops == pytest.approx(members * N * forward)
    assert ledger.fitting.seconds > 0
    scores = found.attribute(made.test).values
    assert ledger.serving.flops == pytest.approx(members * B * (forward + 2 * N * D))
    assert (scores == fitted(name, made, made.ensembles["dropout"], batch_size=8).attribute(made.test).values).all()


def test_a_second_fit_answers_for_the_other_data(made):
    found = fitted("knn", made)
    other = found.fit(made.test).attribute(made.train).values
    direct_ = byline.KNNShapley(made.task, byline.Independent(made.models[:1]), k=3, progress=False).fit(made.test)
    assert (other == direct_.attribute(made.train).values).all()


# refusals


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize(
    "option", [{"features": byline.Exact()}, {"damping": 0.1}, {"damping": "auto"}, {"params": ["*"]}]
)
def test_options_of_gradients_are_refused(made, name, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is given; .* takes no gradients"):
        fitted(name, made, **option)


@pytest.mark.parametrize("name", EMBEDDING)
def test_forward_only_is_refused(made, name):
    with pytest.raises(ValueError, match="use forward_only=False"):
        fitted(name, made, byline.Dropout(byline.Independent(made.models[:1]), forward_only=True))
    found = fitted(name, made)
    with pytest.raises(ValueError, match="use forward_only=False"):
        found.add_members(byline.Dropout(byline.Independent(made.models[:1]), forward_only=True))
    assert len(found.ensemble) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("knn", {"k": 0}, "k is 0"),
        ("knn", {"k": 2.0}, "k is 2.0"),
        ("representer", {"l2": 0}, "l2 is 0"),
        ("representer", {"l2": float("nan")}, "l2 is nan"),
        ("representer", {"l2": True}, "l2 is True"),
        ("cosine", {"similarity": "euclid"}, "similarity is 'euclid'; expected one of"),
        ("cosine", {"similarity": ["dot"]}, "similarity is"),
        ("cosine", {"layer": "tail"}, "layer is 'tail'; expected the name of a module"),
        ("cosine", {"layer": 3}, "layer is 3"),
        ("random", {"seed": -1}, "seed is -1"),
        ("cosine", {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_arguments_are_checked_before_anything_runs(made, name, options, message):
    Net.seen.clear()
    with pytest.raises(ValueError, match=message):
        fitted(name, made, **options)
    assert not Net.seen


@pytest.mark.parametrize("name", list(METHODS))
def test_what_is_no_task_is_named(made, name):
    cls, own = METHODS[name]
    with pytest.raises(TypeError, match="task is a Net"):
        cls(made.models[0], byline.Independent(made.models[:1]), **own)
    with pytest.raises(RuntimeError, match="not fitted"):
        cls(made.task, byline.Independent(made.models[:1]), **own).attribute(made.test)


def test_tasks_that_are_no_classification_are_refused(made):
    ensemble = byline.Independent(made.models[:1])
    called = byline.Task(made.models[0], output=lambda m, b: m(b[0])[:, 0])
    for task in (byline.Task(made.models[0], "regression"), byline.Task(made.models[0], "language-modeling"), called):
        with pytest.raises(ValueError, match=f"task has the output '{task.name}'; KNNShapley needs labels"):
            byline.KNNShapley(task, ensemble)
    lossy = byline.Task(made.models[0], loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    for task in (byline.Task(made.models[0], "language-modeling"), called, lossy):
        with pytest.raises(ValueError, match="RepresenterPoints needs output='classification' or 'regression'"):
            byline.RepresenterPoints(task, ensemble)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.rand(N), "train_set has as labels a torch.float32 tensor"),
        (torch.zeros(N, 2, dtype=torch.long), r"labels a torch.int64 tensor of shape \(24, 2\)"),
    ],
)
def test_labels_are_checked_before_any_forward_pass(made, labels, message):
    for name in ("knn", "representer"):
        cls, own = METHODS[name]
        Net.seen.clear()
        with pytest.raises(ValueError, match=message):
            cls(made.task, byline.Independent(made.models[:1]), progress=False, **own).fit(
                TensorDataset(made.x[:N], labels)
            )
        assert not Net.seen


def test_examples_that_cannot_be_taken_are_named(made):
    x = made.x[:N].clone()
    x[17] = float("nan")
    with pytest.raises(ValueError, match=r"train_set\[17\] has a NaN or infinite embedding"):
        fitted("cosine", SimpleNamespace(**{**vars(made), "train": TensorDataset(x, made.y[:N])}), batch_size=5)
    y = made.y[:N].clone()
    y[9] = 7
    with pytest.raises(ValueError, match=r"train_set\[9\]: label 7"):
        fitted("knn", SimpleNamespace(**{**vars(made), "train": TensorDataset(made.x[:N], y)}), batch_size=5)
    model = nets(1, outputs=1)[0]
    values = torch.zeros(N)
    values[5] = float("inf")
    with pytest.raises(ValueError, match="train_set has a NaN or infinite target, example 5"):
        byline.RepresenterPoints(byline.Task(model, "regression"), byline.Independent([model]), progress=False).fit(
            TensorDataset(made.x[:N], values)
        )
    with pytest.raises(ValueError, match="targets that are no tensor"):
        fitted("knn", SimpleNamespace(**{**vars(made), "train": [{"x": row} for row in made.x[:N]]}))


class Flattened(nn.Module):
    """Its last layer gets examples and positions in one dimension."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, C)

    def forward(self, x):
        return self.head(x.reshape(-1, 4)).view(len(x), -1, C).mean(1)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Flattened(), {}, r"shape \(9, 4\) for 3 examples; expected layer="),
        (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 4)), nn.AvgPool1d(1)), {}, "the model has no nn.Linear"),
    ],
)
def test_layers_without_one_row_per_example_are_refused(model, options, message):
    data = TensorDataset(torch.randn(8, 3, 4), torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        byline.RepresentationSimilarity(
            byline.Task(model.eval()), byline.Independent([model]), progress=False, **options
        ).fit(data)


def test_a_layer_that_is_not_called_is_refused(made):
    model = copy.deepcopy(made.models[0])
    model.unused = nn.Linear(2, 2).eval()
    found = byline.RepresentationSimilarity(byline.Task(model), byline.Independent([model]), layer="unused")
    with pytest.raises(ValueError, match="the model ran without giving the module 'unused' a floating-point tensor"):
        found.fit(made.train)
    model.forward = lambda x: torch.tanh(x)[:, :C]
    tap, task = Tap(None), byline.Task(model)
    with tap.on(model), pytest.raises(ValueError, match=r"the model ran without giving an nn\.Linear"):
        tap.run(task, model, made.train[:4])


# the registry

NAMES = [
    "trak", "logra", "trackstar", "influence-ekfac", "influence-kfac", "influence-cg", "influence-lissa",
    "influence-arnoldi", "influence-datainf", "influence-explicit", "grad-dot", "grad-cos", "tracin", "dvemb",
    "representer", "knn-shapley", "representation", "random",
]  # fmt: skip


def test_the_registry_knows_every_method_and_says_what_it_is():
    assert [info.name for info in methods()] == NAMES
    for info in methods():
        assert info.title
        assert info.description
        assert info.citation
        assert info.needs[0] in ("gradients", "embeddings", "nothing")
        assert set(info.ensembles) <= set(ALL)
        assert info.forward_only == (info.name in ("trak", "random"))
        assert info.to_dict()["forward_only"] == info.forward_only


@pytest.mark.parametrize("name", NAMES)
def test_methods_are_made_by_name_under_every_ensemble_they_take(made, name):
    info = next(i for i in methods() if i.name == name)
    first = byline.Independent(made.models[:1])
    kinds = {
        "independent": first,
        "dropout": byline.Dropout(first, masks=2),
        "forward-only": byline.Dropout(first, masks=2, forward_only=True),
        "lora": made.ensembles["lora"],
        "weight noise": byline.WeightNoise(first, draws=2),
        "trajectory": byline.Trajectory([made.models[:2]], weights=[0.1, 0.1]),
    }
    assert set(kinds) == set(ALL)
    for kind, ensemble in kinds.items():
        if kind in info.ensembles:
            assert type(make(name, made.task, ensemble, progress=False)) is info.cls
        else:
            with pytest.raises(ValueError, match=r"\w+"):
                make(name, made.task, ensemble, progress=False)
    kind = info.ensembles[0]
    scores = make(name, made.task, kinds[kind], progress=False).fit(made.train).attribute(made.test)
    assert scores.values.shape == (B, N)
    assert np.isfinite(scores.values).all()


def test_names_stand_for_options_that_can_be_overruled(made):
    first = byline.Independent(made.models[:1])
    logra = make("logra", made.task, first)
    assert isinstance(logra, byline.Influence)
    assert (logra.solver.name, logra.curvature) == ("explicit", "fisher")
    assert isinstance(logra.features, byline.Factorized)
    assert make("logra", made.task, first, features=byline.Factorized(8)).features.describe()["dim"] == 8
    assert make("knn-shapley", made.task, first, k=2).k == 2
    assert make("representation", made.task, first, similarity="l2").similarity == "l2"
    with pytest.raises(ValueError, match="no method 'knn'; there are trak, logra"):
        make("knn", made.task, first)
