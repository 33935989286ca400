"""Features against the exact kernel: equal at full width, closer as they widen, and never a (B, P) matrix."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

import byline
import reference as ref
from architectures import CASES, Net, arrays, ids, vectors
from byline.features import directions, exact, factorized, lowrank, preconditioned
from byline.features.blocks import Flat, Lookup, Outer
from conftest import build

KINDS = ["mlp", "tokens-mlp", "conv2d-groups", "embedding-padding", "tied-head", "gru", "layer-norm"]


def values(made, features, method=byline.GradDot, **arguments):
    attributor = method(made.task, byline.Independent([made.model]), features=features, progress=False, **arguments)
    return attributor.fit(made.train).attribute(made.test).values


def error(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("basis", ["random", "pca"])
@pytest.mark.parametrize("method", [byline.GradDot, byline.TRAK])
def test_factorized_at_full_width_is_exact(name, basis, method):
    made = build(name)
    found = values(made, byline.Factorized(10**6, basis), method, damping=0.3)
    ref.assert_close(found, values(made, byline.Exact(), method, damping=0.3), 1e-3)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", [byline.GradDot, byline.TRAK])
def test_nystrom_with_all_landmarks_is_exact(name, method):
    made = build(name)
    found = values(made, byline.Nystrom(len(made.train)), method, damping=0.3)
    ref.assert_close(found, values(made, byline.Exact(), method, damping=0.3), 3e-3)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", [byline.GradDot, byline.GradCos, byline.TRAK])
def test_low_rank_at_full_rank_is_exact(name, method):
    made = build(name)
    found = values(made, byline.LowRank(10**6), method, damping=0.3)
    ref.assert_close(found, values(made, byline.Exact(), method, damping=0.3), 1e-4)


def factors_by_autograd(made, data, what):
    """(gradient of the outputs, inputs and ones) of every linear layer."""
    batch = torch.utils.data.default_collate(list(data))
    layers = [layer for layer in made.model.modules() if isinstance(layer, nn.Linear)]
    seen = {}
    hooks = [m.register_forward_hook(lambda m, i, o: seen.update({m: (i[0].detach(), o)})) for m in layers]
    value = what(made.model, batch)
    for hook in hooks:
        hook.remove()
    grads = torch.autograd.grad(value.sum(), [seen[m][1] for m in layers])
    ones = torch.ones(len(value), 1)
    return [(g, torch.cat([seen[m][0], ones], 1)) for m, g in zip(layers, grads, strict=True)]


def test_low_rank_is_the_kernel_of_projected_gradients():
    """By autograd: each layer's gradient between the eigenvectors of the second moments of its factors."""
    made, rank = build("mlp", train=40, test=5), 3
    found = values(made, byline.LowRank(rank))
    train = factors_by_autograd(made, made.train, made.task.loss)
    test = factors_by_autograd(made, made.test, made.task.output)
    # the directions are those of the output's gradients: GradDot takes the loss of a classifier as their multiple
    learnt = factors_by_autograd(made, made.train, made.task.output)
    want = torch.zeros(len(made.test), len(made.train))
    for (g, x), (gz, xz), pair in zip(train, test, learnt, strict=True):
        u, v = (torch.linalg.eigh((f.T @ f).double())[1].flip(1)[:, :rank].float() for f in pair)
        one = torch.einsum("bo,bi->boi", gz @ u, xz @ v).flatten(1)
        two = torch.einsum("bo,bi->boi", g @ u, x @ v).flatten(1)
        want -= one @ two.T
    ref.assert_close(found, want.numpy(), 1e-4)


@pytest.mark.parametrize("name", ["mlp", "conv2d-groups", "layer-norm", "tokens-mlp"])
@pytest.mark.parametrize("method", [byline.TRAK, byline.TrackStar])
@pytest.mark.parametrize("hessian", ["unweighted", "weighted"])
def test_low_rank_rows_are_vectors_where_they_are_fewer_than_examples(name, method, hessian, monkeypatch):
    """The primal form of them, and the dual of the very same rows, give the same scores."""
    extra = {"hessian": hessian} if method is byline.TRAK else {}
    made, found = build(name, train=150, test=4), []
    for form in ("primal", "dual"):
        if form == "dual":
            monkeypatch.setattr(byline.LowRank, "width", lambda self, forms, state: None)
        attributor = method(
            made.task,
            byline.Independent([made.model]),
            features=byline.LowRank(3),
            damping=0.3,
            progress=False,
            **extra,
        ).fit(made.train)
        assert attributor._in_primal(attributor._voters[0]) == (form == "primal")
        top = attributor.top(made.test, 5).proponents
        found.append((attributor.attribute(made.test).values, attributor.self_influence(), top.scores))
    for one, other in zip(*found, strict=True):
        ref.assert_close(one, other, 2e-3)


@pytest.mark.parametrize("name", [case.name for case in CASES])
@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_knows_beforehand_how_many_columns_there_are_at_least(name, rank):
    made = build(name)
    attributor = byline.GradDot(
        made.task, byline.Independent([made.model]), features=byline.LowRank(rank), progress=False
    ).fit(made.train)
    voter = attributor._voters[0]
    width = attributor.features.width(attributor._stored(voter).forms, attributor._state(voter))
    named = made.model.named_parameters()
    least = attributor.features.least_width(
        tuple(p.shape) for n, p in named if p.requires_grad and made.task.selects(n)
    )
    assert width is None or least <= width


@pytest.mark.parametrize("name", ["mlp", "conv2d-groups", "layer-norm", "tokens-mlp"])
def test_low_rank_with_few_columns(name):
    """All columns are those of no choice; few are the strongest pairs, and closer to all than as many at random."""
    made, ensemble = build(name, train=150, test=4), None
    ensemble = byline.Independent([made.model])

    def scores(columns):
        features = byline.LowRank(4, columns=columns)
        attributor = byline.TRAK(made.task, ensemble, features=features, damping=0.3, progress=False).fit(made.train)
        voter = attributor._voters[0]
        assert attributor._in_primal(voter)
        return attributor.attribute(made.test).values, attributor._width(voter)

    (whole, _), (everything, most) = scores(None), scores(10**6)
    few = [scores(columns) for columns in (2, 8, 24)]
    assert all(a[1] < b[1] for a, b in itertools.pairwise(few))
    assert few[-1][1] <= most
    errors = [error(values, everything) for values, _ in few]
    assert errors[-1] < errors[0]
    # directions of factors no wider than the rank are turned, which changes no kernel of all of them
    ref.assert_close(everything, whole, 2e-3)


class Backwards(nn.Module):
    """Parameters whose names are not in the order of the layers."""

    def __init__(self):
        super().__init__()
        self.z = nn.Linear(6, 5)
        self.a = nn.Linear(5, 3)

    def forward(self, x):
        return self.a(torch.relu(self.z(x)))


@pytest.mark.parametrize("columns", [None, 12])
@pytest.mark.parametrize("method", [byline.TRAK, byline.TrackStar])
def test_low_rank_is_the_same_from_a_store(method, columns, tmp_path):
    torch.manual_seed(0)
    model = Backwards().eval()
    train = torch.utils.data.TensorDataset(torch.randn(80, 6), torch.randint(3, (80,)))
    found = []
    for store in (None, tmp_path, tmp_path):
        attributor = method(
            byline.Task(model), byline.Independent([model]), features=byline.LowRank(3, columns=columns), damping=0.3,
            store=store, progress=False,
        ).fit(train)  # fmt: skip
        assert attributor._in_primal(attributor._voters[0])
        found.append(attributor.attribute(train).values)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_low_rank_with_columns_keeps_the_kernel_of_all(monkeypatch):
    """Columns choose among vectors; methods that take kernels see every factor, kept as factors or as products."""
    made = build("conv2d-groups", train=60)
    one, other = (values(made, byline.LowRank(10**6, columns=c)) for c in (1, None))
    ref.assert_close(one, other, 1e-4)


@pytest.mark.parametrize("features", [byline.LowRank(3), byline.Factorized(16, "pca")], ids=repr)
def test_directions_do_not_come_from_padding(features):
    """Longer batches pad more; what is learnt, and so the scores, stays the same."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3 + i // 2 for i in range(24)]
    data = [(torch.randn(n, 6, generator=generator), torch.randint(7, (n,), generator=generator)) for n in lengths]

    def collate(items):
        longest = max(len(x) for x, _ in items)
        x, y = torch.full((len(items), longest, 6), 3.0), torch.full((len(items), longest), -100)
        for row, (own, targets) in enumerate(items):
            x[row, : len(own)], y[row, : len(own)] = own, targets
        return x, y

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7)).eval()
    found = []
    for size in (2, 24):
        attributor = byline.GradDot(
            byline.Task(model, output="language-modeling"), byline.Independent([model]), features=features,
            batch_size=size, collate=collate, progress=False,
        ).fit(data)  # fmt: skip
        found.append(attributor.attribute(data[:4]).values)
    ref.assert_close(found[0], found[1], 1e-4)


def test_low_rank_beyond_memory_is_refused_before_it_starts(monkeypatch):
    made = build("mlp", train=20)
    monkeypatch.setattr("byline.methods.kernels.os.sysconf", lambda name: 50)
    fitted = byline.TRAK(made.task, byline.Independent([made.model]), features=byline.LowRank(1), damping=1.0)
    fitted.fit(made.train)
    adapted = byline.train_lora(
        made.task, byline.Independent([made.model]), made.train, adapters=1, rank=1, epochs=1, progress=False
    )
    byline.TRAK(made.task, adapted, features=byline.LowRank(1), damping=1.0, progress=False).fit(made.train)
    for features in (byline.LowRank(5), byline.Exact()):
        with pytest.raises(ValueError, match="needs a kernel of 20 × 20"):
            byline.TRAK(made.task, byline.Independent([made.model]), features=features).fit(made.train)


@pytest.mark.parametrize("name", ["mlp", "tied-head", "conv2d-groups"])
def test_wide_factors_find_their_directions_by_a_sketch(name, monkeypatch):
    made = build(name)
    exact, narrow = values(made, byline.Exact()), values(made, byline.LowRank(3))
    monkeypatch.setattr("byline.features.lowrank._LARGEST", 3)
    found = values(made, byline.LowRank(3))
    assert not np.array_equal(found, narrow)
    assert error(found, exact) < 1.5 * error(narrow, exact) + 1e-3


def test_low_rank_keeps_less_and_shares_the_inputs():
    """Three checkpoints keep their common inputs once; every layer keeps 2·rank numbers at most."""
    torch.manual_seed(0)
    made = build("mlp", train=30, test=3)
    models = [made.model.state_dict()]
    for _ in range(2):
        models.append({k: v + 0.1 * torch.randn_like(v) for k, v in models[0].items()})
    one = byline.GradDot(made.task, byline.Independent(models[:1]), features=byline.LowRank(3), progress=False)
    all_three = byline.GradDot(made.task, byline.Independent(models), features=byline.LowRank(3), progress=False)
    for attributor in (one, all_three):
        attributor.fit(made.train)
    layers = sum(isinstance(layer, nn.Linear) for layer in made.model.modules())
    assert one._stored(one._voters[0]).columns <= layers * 2 * 3
    paths = {c["path"] for e in all_three.store.manifest.features.values() for c in e["arrays"].values()}
    assert len(paths) == 3 * 2 * layers - 2


@pytest.mark.parametrize("name", ["mlp", "conv2d-groups", "tied-head"])
@pytest.mark.parametrize(
    ("make", "widths", "last"),
    [
        (lambda w, s: byline.Dense(w, "rademacher", s), (8, 64, 2048), 0.2),
        (lambda w, s: byline.Dense(w, "gaussian", s), (8, 64, 2048), 0.2),
        (lambda w, s: byline.Dense(w, "sjlt", s), (8, 64, 2048), 0.2),
        (lambda w, s: byline.Factorized(w, "random", s), (6, 60, 10**6), 1e-3),
        (lambda w, s: byline.Factorized(w, "pca", s), (8, 40, 10**6), 1e-3),
        (lambda w, s: byline.Nystrom(w, s), (2, 5, 9), 1e-2),
        (lambda w, s: byline.LowRank(w, seed=s), (1, 3, 10**6), 1e-5),
    ],
    ids=["rademacher", "gaussian", "sjlt", "random", "pca", "nystrom", "low-rank"],
)
def test_wider_features_are_closer_to_exact(name, make, widths, last):
    made = build(name)
    exact = values(made, byline.Exact())
    errors = [np.mean([error(values(made, make(w, s)), exact) for s in range(5)]) for w in widths]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < last


@pytest.mark.parametrize(
    "make",
    [lambda s, k=k: byline.Dense(16, k, s) for k in ("rademacher", "gaussian", "sjlt")]
    + [lambda s: byline.Factorized(64, "random", s)],
    ids=["rademacher", "gaussian", "sjlt", "random"],
)
def test_random_projections_are_unbiased(make):
    """The mean over seeds comes closer to the exact kernel than one seed does."""
    made = build("mlp", train=4, test=2)
    exact = values(made, byline.Exact())
    found = [values(made, make(s)) for s in range(40)]
    assert error(np.mean(found, 0), exact) < 0.4 * np.mean([error(f, exact) for f in found])


@pytest.mark.parametrize("make", [byline.Dense, byline.Factorized, byline.Nystrom])
def test_features_are_seeded(make):
    made = build("mlp")
    one, again, other = (values(made, make(5, seed=s)) for s in (0, 0, 1))
    assert (one == again).all()
    assert not np.allclose(one, other)


@pytest.mark.parametrize("basis", ["random", "pca"])
@pytest.mark.parametrize("name", ["mlp", "conv2d-groups", "conv2d-depthwise", "tied-head"])
@pytest.mark.parametrize("dim", [1, 7, 33, 60])
def test_factorized_keeps_to_its_columns(name, basis, dim):
    made = build(name)
    attributor = byline.GradDot(
        made.task, byline.Independent([made.model]), features=byline.Factorized(dim, basis), progress=False
    ).fit(made.train)
    (entry,) = attributor.store.manifest.features
    columns = attributor.store.features(entry).columns
    # a convolution of g groups takes g columns at least
    assert 1 <= columns <= max(dim, 4)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, views apart."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf._base is None:
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize(("vocabulary", "lengths"), [(5, (7, 4)), (40, (6, 9)), (3, (1, 1)), (4, (0, 3))])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_kernel_of_an_embedding_is_that_of_its_gradients(vocabulary, lengths, dtype):
    torch.manual_seed(0)
    a, b = (
        Lookup(
            ("w",),
            torch.randint(0, vocabulary, (n, t), dtype=dtype),
            torch.randn(n, t, 3, dtype=torch.float64),
            vocabulary,
        )
        for n, t in zip((6, 5), lengths, strict=True)
    )
    rows = [{"w:ids": block.ids, "w:right": block.right} for block in (a, b)]
    torch.testing.assert_close(byline.Exact().kernel(*rows), a.rows() @ b.rows().T)


@pytest.mark.parametrize(
    ("positions", "widths", "formed"),
    [((9, 6), (4, 50), True), ((40, 30), (20, 25), True), ((2, 3), (20, 25), False), ((3, 1), (9, 8), False)],
)
@pytest.mark.parametrize("at_once", [1500, 2**24])
def test_the_kernel_of_factors_is_that_of_their_gradients(positions, widths, formed, at_once, monkeypatch):
    calls, form = [], exact._formed
    monkeypatch.setattr(exact, "_AT_ONCE", at_once)
    monkeypatch.setattr(exact, "_formed", lambda *factors: calls.append(1) or form(*factors))
    torch.manual_seed(0)
    a, b = (
        Outer(("w",), *(torch.randn(n, 2, t, width, dtype=torch.float64) for width in widths))
        for n, t in zip((6, 5), positions, strict=True)
    )
    rows = [{"w:left": block.left, "w:right": block.right} for block in (a, b)]
    ref.assert_close(byline.Exact().kernel(*rows), a.rows() @ b.rows().T)
    assert bool(calls) == formed, "whether gradients were formed"


def test_the_kernel_of_no_examples_is_empty():
    some, none = torch.randn(3, 1, 40, 4), torch.randn(0, 1, 40, 4)
    rows = [{"w:left": x, "w:right": x} for x in (some, none)]
    assert byline.Exact().kernel(*rows).shape == (3, 0)
    assert byline.Exact().kernel(*reversed(rows)).shape == (0, 3)


def test_the_way_to_a_kernel_does_not_depend_on_how_many_examples_there_are(monkeypatch):
    torch.manual_seed(0)
    many = {"w:left": torch.randn(20, 1, 12, 30), "w:right": torch.randn(20, 1, 12, 30)}
    calls, form = [], exact._formed
    monkeypatch.setattr(exact, "_formed", lambda *factors: calls.append(1) or form(*factors))
    for count in (20, 1):
        byline.Exact().kernel({name: x[:count] for name, x in many.items()}, many)
    assert len(calls) == 4, "gradients of both sides, twice"


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize(
    ("positions", "left", "right", "order"),
    [
        (1, (9, 4), (6, 5), "both"),
        (2, (9, 4), (6, 5), "both"),
        (40, (30, 20), (6, 2), "right"),
        (40, (6, 2), (30, 20), "left"),
        (40, (9, 0), (30, 20), "left"),
        (40, (30, 20), (6, 0), "right"),
        (2, (9, 0), (6, 0), "both"),
    ],
)
def test_projected_factors_are_the_projected_gradient_in_any_order(positions, left, right, order, some):
    torch.manual_seed(0)
    a, b = (torch.randn(*form, dtype=torch.float64) if form[1] else None for form in (left, right))
    factors = [torch.randn(3, 2, positions, width, dtype=torch.float64) for width in (left[0], right[0])]
    pairs = torch.tensor([[0, 1, 1], [1, 0, 1]]) if some else None
    assert directions.cheapest(positions, left, right) == order
    found = directions.projected(Outer(("w",), *factors), a, b, pairs)
    whole = torch.einsum("bgto,bgti->bgoi", *factors)
    whole = whole if a is None else a.T @ whole
    whole = whole if b is None else whole @ b
    ref.assert_close(found, (whole if pairs is None else whole[:, :, pairs[0], pairs[1]]).flatten(1))


@pytest.mark.parametrize("positions", [1, 40])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_coordinates_are_the_directions_of_a_unit_basis(positions, side):
    torch.manual_seed(0)
    factors = [torch.randn(3, 1, positions, width) for width in (9, 6)]
    places = [torch.tensor([7, 0, 3]), torch.tensor([5, 1])]
    units = [torch.eye(factor.shape[3])[:, own] for factor, own in zip(factors, places, strict=True)]
    used = {"left": (places[0], units[1]), "right": (units[0], places[1]), "both": tuple(places)}[side]
    pairs = torch.tensor([[0, 2, 2], [1, 0, 1]])
    block = Outer(("w",), *factors)
    ref.assert_close(directions.projected(block, *used, pairs), directions.projected(block, *units, pairs))


def vocabulary(n, generator):
    """Second moments of one-hot minus softmax, where tokens are as frequent as in Zipf's law, in a random order."""
    probabilities = torch.arange(1, n + 1, dtype=torch.float64)[torch.randperm(n, generator=generator)] ** -1.0
    probabilities /= probabilities.sum()
    left = torch.eye(n, dtype=torch.float64) - probabilities
    return left.T @ (probabilities.unsqueeze(1) * left), probabilities


def test_leading_directions_are_coordinates_where_they_are_nearly_eigenvectors():
    generator = torch.Generator().manual_seed(0)
    moment, probabilities = vocabulary(80, generator)
    value, places = directions.leading(moment, 5)
    assert places.tolist() == probabilities.topk(5).indices.tolist()
    ref.assert_close(value, moment.diagonal()[places])
    ref.assert_close(directions.onto(moment, places), moment[:, places])
    turned = torch.linalg.qr(torch.randn(80, 80, dtype=torch.float64, generator=generator))[0]
    for other in (turned @ moment @ turned.T, vocabulary(40, generator)[0]):
        value, vectors = directions.leading(other, 5)
        assert vectors.shape == (len(other), 5)
        ref.assert_close(value, torch.linalg.eigvalsh(other).flip(0)[:5])
    assert directions.leading(moment, 5, coordinates=False)[1].is_floating_point()


def test_a_nearly_diagonal_moment_alone_does_not_make_coordinates():
    classes = torch.eye(100, dtype=torch.float64) - 0.01  # as frequent as each other: no class is to be dropped
    x = torch.randn(500, 4, dtype=torch.float64) @ torch.randn(4, 70, dtype=torch.float64)
    massive = x.clone()
    massive[:, 7] += 1000  # or the ones that stand for a bias, beside small inputs
    for moment in (classes, x.T @ x, massive.T @ massive):
        assert directions.leading(moment, 10)[1].is_floating_point()
    assert (massive.T @ massive).diagonal().norm() > 0.99 * (massive.T @ massive).norm()


def skewed(rows, positions, generator):
    """Blocks whose factors have their largest coordinates for directions: a layer, an embedding and a bias."""
    places = {name: torch.randperm(70, generator=generator) for name in ("left", "right", "table", "bias")}
    size = {name: 0.8 ** place.double() for name, place in places.items()}

    def draw(name, *form):
        return torch.randn(*form, 70, dtype=torch.float64, generator=generator) * size[name]

    blocks = {
        "layer": Outer(("w",), draw("left", rows, 1, positions), draw("right", rows, 1, positions) / positions**0.5),
        "table": Lookup(("e",), torch.randint(3, (rows, 4), generator=generator), draw("table", rows, 4), 3),
        "bias": Flat(("b",), draw("bias", rows)),
    }
    return blocks, {name: place.argsort() for name, place in places.items()}


@pytest.mark.parametrize("positions", [1, 30])
def test_few_coordinates_are_entries_of_the_gradient(positions):
    blocks, largest = skewed(400, positions, torch.Generator().manual_seed(0))
    wide = {name: block.rows() for name, block in blocks.items()}
    outer, table = wide["layer"].unflatten(1, (70, 70)), wide["table"].unflatten(1, (3, 70))

    features = byline.Factorized(20, "pca")
    state = features.learn(lambda indices: [blocks], 400)
    parts = []
    for name, whole, left in (("layer", outer, "left"), ("table", table, None)):
        rows, columns = state[f"{name}/left"], state[f"{name}/right"]
        a, b = state[f"{name}/pairs"]
        side = "right" if name == "layer" else name
        assert columns.tolist() == largest[side][: len(columns)].tolist()
        if left:
            assert rows.tolist() == largest[left][: len(rows)].tolist()
        parts.append(whole[:, rows[a], columns[b]])
    assert state["bias/right"].tolist() == largest["bias"][: len(state["bias/right"])].tolist()
    parts.append(wide["bias"][:, state["bias/right"]])
    ref.assert_close(features.rows(blocks, state)["rows"], torch.cat(parts, 1))
    assert features.rows(blocks, state)["rows"].shape[1] == 20

    low = byline.LowRank(3, 8)
    del blocks["table"]
    state = low.learn(lambda indices: [blocks], 400)
    a, b = state["pairs/layer"]
    expected = outer[:, largest["left"][a], largest["right"][b]]
    found = low.vectors(low.rows(blocks, state), state)
    ref.assert_close(found, torch.cat([wide["bias"], expected], 1))


def test_a_random_projection_has_no_coordinates(monkeypatch):
    monkeypatch.setattr(factorized, "_LARGEST", 300)
    moment = []
    real = directions.leading
    monkeypatch.setattr(factorized, "leading", lambda *a, **k: moment.append(k) or real(*a, **k))
    blocks = {"bias": Flat(("b",), torch.randn(50, 400))}
    features = byline.Factorized(20, "pca")
    state = features.learn(lambda indices: [blocks], 50)
    assert moment == [{"coordinates": False}]
    assert state["bias/right"].shape == (400, 20)
    ref.assert_close(features.rows(blocks, state)["rows"], blocks["bias"].grad @ state["bias/right"])


def test_what_is_kept_by_its_coordinates_scores_as_exact(monkeypatch):
    torch.manual_seed(0)
    frequent = 0.9 ** torch.arange(70.0)
    data = TensorDataset(torch.randn(300, 4), torch.multinomial(frequent, 300, replacement=True))
    model, found = nn.Linear(4, 70).eval(), []
    with torch.no_grad():
        model.bias.copy_(frequent.log())
    for module in (factorized, lowrank):
        monkeypatch.setattr(module, "leading", lambda *a, **k: found.append(directions.leading(*a, **k)) or found[-1])

    def scores(features):
        attributor = byline.TRAK(
            byline.Task(model), byline.Independent([model]), features=features, damping=1.0, progress=False
        )
        return attributor.fit(data).attribute(TensorDataset(*data[:50])).values

    exact = scores(byline.Exact())
    for features in (byline.Factorized(10**6, "pca"), byline.LowRank(70, 10**6)):
        found.clear()
        ref.assert_close(scores(features), exact, 1e-3)
        assert any(not basis.is_floating_point() for _, basis in found), "tokens are nearly eigenvectors"


def test_embeddings_of_a_huge_vocabulary_meet_by_id_alone():
    ids = torch.tensor([[5, 2**30], [5 + 2**22, 7]], dtype=torch.int32).repeat(512, 1)
    rows = {"w:ids": ids, "w:right": torch.ones(1024, 2, 1)}
    with Largest() as watch:
        found = byline.Exact().kernel(rows, rows)
    assert torch.equal(found[:2, :2], 2 * torch.eye(2))
    assert watch.numel == found.numel(), "nothing is as long as the vocabulary"


def test_the_kernel_of_an_embedding_looks_at_no_pairs_of_positions():
    ids = torch.arange(400).repeat(30, 1)
    rows = {"w:ids": ids, "w:right": torch.randn(30, 400, 2)}
    with Largest() as watch:
        byline.Exact().kernel(rows, rows)
    assert watch.numel < 5 * rows["w:right"].numel() < ids.numel() ** 2 / 1000


WIDE = {
    "linear": (lambda: Net(nn.Linear(600, 900), torch.tanh, nn.Linear(900, 3)), vectors(600), 16),
    "tokens": (
        lambda: Net(nn.Linear(500, 800), torch.tanh, nn.Linear(800, 3), lambda t: t.mean(1)),
        arrays(4, 500),
        16,
    ),
    "conv": (
        lambda: Net(nn.Conv2d(200, 300, 3), torch.tanh, nn.Flatten(), nn.Linear(300 * 4, 3)),
        arrays(200, 4, 4),
        16,
    ),
    "embedding": (lambda: Net(nn.Embedding(3000, 200), lambda t: t.mean(1), nn.Linear(200, 3)), ids(4, 3000), 16),
}


FEATURES = {
    "exact": byline.Exact(),
    "random": byline.Factorized(64),
    "nystrom": byline.Nystrom(8),
    "low-rank": byline.LowRank(2),
    "pca": byline.Factorized(64, "pca"),
    "dense": byline.Dense(4),
    "preconditioned": byline.Preconditioned(byline.Exact()),
}
# the eigenvectors of the convolution's 1801 inputs would take seconds; the random basis has the same path
NARROW = [(name, kind) for name in WIDE for kind in FEATURES if (name, kind) != ("conv", "pca")]


@pytest.mark.parametrize(("name", "features"), [(n, FEATURES[k]) for n, k in NARROW], ids=["-".join(c) for c in NARROW])
def test_never_a_gradient_per_example(name, features):
    torch.manual_seed(0)
    make, data, n = WIDE[name]
    model, items = make().eval(), data(n)
    size = max(p.numel() for p in model.parameters())
    attributor = byline.TRAK(
        byline.Task(model), byline.Independent([model]), features=features, damping=1, progress=False
    )
    with Largest() as watch:
        attributor.fit(items).attribute(items)
    if isinstance(features, byline.Dense):
        assert watch.numel >= n * size, "the watch does not see what it is there to see"
    else:
        # calibration holds three examples against autograd
        assert watch.numel < 8 * size < n * size


def metric(model, gradients, power):
    """Per parameter, what its gradient is multiplied by: r^(-power/2) and c^(-power/2), of a weight with its bias."""
    named, out = dict(model.named_parameters()), {}
    for prefix, module in model.named_modules():
        own = {n: f"{prefix}.{n}".lstrip(".") for n, _ in module.named_parameters(recurse=False)}
        if not own or any(n in out for n in own.values()):
            continue
        parts = {n: gradients[full].reshape(len(gradients[full]), *named[full].shape) for n, full in own.items()}
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            out.update({own[n]: _powered((g**2).sum(0), power) for n, g in parts.items()})
            continue
        groups = getattr(module, "groups", 1)
        weight = parts["weight"].reshape(len(parts["weight"]), groups, -1, np.prod(named[own["weight"]].shape[1:]))
        if "bias" in parts:
            weight = np.concatenate([weight, parts["bias"].reshape(*weight.shape[:3], 1)], 3)
        v = (weight**2).sum(0)
        rows, columns = v.sum(2), v.sum(1)
        scale = _powered(rows, power)[:, :, None] * _powered(columns / columns.sum(1, keepdims=True), power)[:, None]
        inside = scale[..., :-1] if "bias" in parts else scale
        out[own["weight"]] = inside.reshape(named[own["weight"]].shape)
        if "bias" in parts:
            out[own["bias"]] = scale[..., -1].reshape(named[own["bias"]].shape)
    return np.concatenate([out[n].reshape(-1) for n in named])


def _powered(moment, power):
    return np.maximum(moment, 1e-4 * moment.mean()) ** (-power / 2)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("name", ["mlp", "tokens-mlp", "conv2d-groups", "embedding-padding", "layer-norm"])
def test_preconditioned_divides_by_factored_second_moments(name, power):
    made = build(name)
    values_of = getattr(ref, made.task.name.replace("-", "_"))
    train, test = (ref.side(made.model, data, values_of) for data in (made.train, made.test))
    sizes = {n: p.numel() for n, p in made.model.named_parameters()}
    cuts = np.split(train.output, np.cumsum(list(sizes.values()))[:-1], axis=1)
    scale = metric(made.model, dict(zip(sizes, cuts, strict=True)), power)
    before = (train.output**2).sum()
    for one in (train, test):
        one.output = one.output * scale
    expected = ref.trak([test], [train], 0.3)
    features = byline.Preconditioned(byline.Exact(), power)
    ref.assert_close(values(made, features, byline.TRAK, damping=0.3), expected, 1e-3)
    own = byline.TRAK(made.task, byline.Independent([made.model]), features=features, damping=0.3, progress=False)
    rows = own.fit(made.train).store.features(next(iter(own.store.manifest.features))).read(0, len(made.train))
    # factored moments are the true ones on the whole, and gradients keep their length about
    assert 0.3 < float(features.diagonal(rows, rows).sum()) / before < 3


@pytest.mark.parametrize("features", [*FEATURES.values()][:-1], ids=repr)
def test_preconditioned_nests_with_all_features(features):
    made = build("tokens-mlp")
    plain = values(made, features, byline.TRAK, damping=0.3)
    ref.assert_close(values(made, byline.Preconditioned(features, 0), byline.TRAK, damping=0.3), plain, 1e-4)
    changed = byline.Preconditioned(features)
    assert error(values(made, changed, byline.TRAK, damping=0.3), plain) > 1e-2
    assert (changed.linear, changed.dtype) == (features.linear, features.dtype)
    assert eval(repr(changed), vars(byline)).describe() == changed.describe()


@pytest.mark.parametrize("numbers", [2**24, 1])
@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize(("groups", "shared"), [(1, False), (3, False), (3, True)])
def test_second_moments_of_factors_are_those_of_gradients(numbers, positions, groups, shared, monkeypatch):
    monkeypatch.setattr(preconditioned, "_NUMBERS", numbers)
    torch.manual_seed(0)
    left, right = torch.randn(7, groups, positions, 4), torch.randn(7, 1 if shared else groups, positions, 5)
    square = torch.einsum("bgto,bgti->bgoi", left, right.expand(-1, groups, -1, -1)).double().square().sum(0)
    rows, columns = preconditioned._second_moments(Outer(("w",), left, right))
    torch.testing.assert_close(rows, square.sum(2), rtol=1e-5, atol=0)
    across = square.sum(1)
    torch.testing.assert_close(columns, across.sum(0, keepdim=True) if shared else across, rtol=1e-5, atol=0)
    ids = torch.randint(3, (7, positions))
    for empty in (Outer(("w",), left[:, :, :0], right[:, :, :0]), Lookup(("w",), ids[:, :0], right[:, 0, :0], 3)):
        assert not any(moment.any() for moment in preconditioned._second_moments(empty))
    looked_up = Lookup(("w",), ids, right[:, 0], 3)
    square = looked_up.rows().double().square().sum(0).unflatten(0, (3, 5))
    each, across = preconditioned._second_moments(looked_up)
    torch.testing.assert_close(each, square.sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(across, square.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("exact",), TypeError, "features is a str; expected byline's"),
        ((byline.Exact(), 1.5), ValueError, "power is 1.5; expected a number from 0 to 1"),
        ((byline.Exact(), True), ValueError, "power is True"),
        ((byline.Preconditioned(byline.Exact()),), ValueError, "preconditioned already"),
    ],
)
def test_preconditioned_checks_its_arguments(arguments, error, said):
    with pytest.raises(error, match=said):
        byline.Preconditioned(*arguments)


@pytest.mark.parametrize("inner", [byline.Factorized(10**6), byline.Dense(6), byline.Nystrom(9)], ids=repr)
def test_all_principal_components_are_the_features(inner):
    made = build("mlp")
    plain = values(made, inner, byline.TRAK, damping=0.3)
    # the basis has half precision
    ref.assert_close(values(made, byline.Principal(inner, 200), byline.TRAK, damping=0.3), plain, 3e-3)


@pytest.mark.parametrize("name", ["mlp", "tokens-mlp", "conv2d-groups"])
@pytest.mark.parametrize("wide", [2, 10**6])
def test_principal_components_are_those_of_the_training_rows(name, wide):
    made = build(name)
    inner, found = byline.Dense(wide) if wide == 2 else byline.Factorized(wide), {}
    for features in (inner, byline.Principal(inner, 2)):
        attributor = byline.TRAK(
            made.task, byline.Independent([made.model]), features=features, damping=1, progress=False
        )
        (key,) = attributor.fit(made.train).store.manifest.features
        found[features] = attributor.store.features(key).read(0, len(made.train))["rows"].double()
    whole, few = found.values()
    assert few.shape == (len(made.train), 2)
    values_of, vectors_of = torch.linalg.eigh(whole @ whole.T)
    best = vectors_of[:, -2:] * values_of[-2:] @ vectors_of[:, -2:].T
    torch.testing.assert_close(few @ few.T, best, rtol=3e-3, atol=3e-3 * float(best.abs().max()))


def test_principal_components_of_nothing_are_nothing():
    made = build("mlp")
    zeros = {name: torch.zeros_like(value) for name, value in made.model.state_dict().items()}
    task = byline.Task(made.model, lambda model, batch: 0 * model(batch[0]).sum(1))
    for features in (byline.Principal(byline.Factorized(10**6), 3), byline.Preconditioned(byline.Factorized(64))):
        attributor = byline.GradCos(task, byline.Independent([zeros]), features=features, progress=False)
        assert not attributor.fit(made.train).attribute(made.test).values.any()


def test_a_basis_takes_half_the_bytes_in_the_store():
    made = build("mlp")
    features = byline.Principal(byline.Factorized(10**6), 3)
    attributor = byline.GradDot(made.task, byline.Independent([made.model]), features=features, progress=False)
    (key,) = attributor.fit(made.train).store.manifest.state
    assert attributor.store.state(key)["basis"].dtype == torch.float16


def test_principal_nests_and_checks_its_arguments():
    made = build("tokens-mlp")
    around = byline.Preconditioned(byline.Principal(byline.Factorized(10**6), 5))
    inside = byline.Principal(byline.Preconditioned(byline.Factorized(10**6)), 5)
    one, two = (values(made, features, byline.TRAK, damping=0.3) for features in (around, inside))
    ref.assert_close(one, two, 1e-5)
    for features in (around, inside):
        assert eval(repr(features), vars(byline)).describe() == features.describe()
    with pytest.raises(TypeError, match="features is a int"):
        byline.Principal(512)
    with pytest.raises(ValueError, match=r"features is Exact\(\), whose rows are no vectors"):
        byline.Principal(byline.Exact())
    with pytest.raises(ValueError, match="principal components already"):
        byline.Principal(byline.Principal(byline.Dense(4)))
    with pytest.raises(ValueError, match="sample is 0"):
        byline.Principal(byline.Dense(4), sample=0)


@pytest.mark.parametrize("arguments", [{"dim": 0}, {"dim": 2.0}, {"dim": True}])
@pytest.mark.parametrize("make", [byline.Dense, byline.Factorized])
def test_dim_is_checked(make, arguments):
    with pytest.raises(ValueError, match=r"dim is .*; expected an int of at least 1"):
        make(**arguments)


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="landmarks is 0"):
        byline.Nystrom(0)
    with pytest.raises(ValueError, match="rank is 0; expected"):
        byline.LowRank(0)
    with pytest.raises(ValueError, match="columns is 0; expected"):
        byline.LowRank(4, columns=0)
    with pytest.raises(ValueError, match="kind is 'dct'"):
        byline.Dense(4, "dct")
    with pytest.raises(ValueError, match="basis is 'svd'"):
        byline.Factorized(4, "svd")
    made = build("mlp")
    with pytest.raises(TypeError, match="features is a str"):
        byline.TRAK(made.task, byline.Independent([made.model]), features="exact")
