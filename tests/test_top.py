"""Top-k without the matrix: against the whole matrix, for every method and every kind of ensemble that it takes."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import byline
from byline.methods import scan, streaming
from byline.methods.registry import make, methods
from byline.scores import Scores

N, T = 70, 9


def mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3)).eval()


def examples(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator))


@pytest.fixture(scope="module")
def ensembles() -> dict[str, byline.Ensemble]:
    models = [mlp(seed) for seed in range(3)]
    independent = byline.Independent(models)
    task = byline.Task(models[0])
    checkpoints = []
    model = copy.deepcopy(models[0])
    data = examples(N, 0)
    for _ in range(3):
        checkpoints.append(copy.deepcopy(model.state_dict()))
        loss = F.cross_entropy(model(data.tensors[0]), data.tensors[1])
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.data.sub_(0.3 * g)
    return {
        "independent": independent,
        "one": byline.Independent(models[:1]),
        "dropout": byline.Dropout(byline.Independent(models[:2]), masks=2, p=0.3),
        "forward-only": byline.Dropout(byline.Independent(models[:2]), masks=2, p=0.3, forward_only=True),
        "forward-only of one": byline.Dropout(byline.Independent(models[:1]), masks=3, p=0.3, forward_only=True),
        "lora": byline.train_lora(
            task, byline.Independent(models[:1]), data, adapters=2, rank=2, epochs=1, seed=0, progress=False
        ),
        "weight noise": byline.WeightNoise(byline.Independent(models[:1]), draws=2, scale=0.4),
        "trajectory": byline.Trajectory([checkpoints, checkpoints[::-1]], weights=[0.01, 0.02, 0.01]),
        "repeated": byline.Independent([models[0], models[0], models[1]]),
    }


@pytest.fixture
def small(monkeypatch):
    """Many chunks and many blocks, of sizes that fit nothing evenly."""
    monkeypatch.setattr(streaming, "_ROWS", (16, 16))
    monkeypatch.setattr(streaming, "_TESTS", 5)


def check(attributor: byline.methods.Attributor, tests: TensorDataset, k: int = 6, tolerance: float = 2e-5) -> None:
    """The same scores and errors at the same places, up to places whose scores differ by no more than rounding."""
    scores = attributor.attribute(tests)
    ranking, whole = attributor.top(tests, k), scores.top(k)
    assert isinstance(ranking, byline.Ranking)
    assert ranking.n_train == attributor.n_train_
    assert ranking.info == scores.info
    scale = np.abs(scores.values).max() + 1e-30
    for got, want in ((ranking.proponents, whole.proponents), (ranking.opponents, whole.opponents)):
        assert got.indices.shape == want.indices.shape == (len(tests), k)
        np.testing.assert_allclose(got.scores, want.scores, atol=tolerance * scale, rtol=0)
        own = np.take_along_axis(scores.values, got.indices, 1)
        np.testing.assert_allclose(got.scores, own, atol=tolerance * scale, rtol=0)
        error = np.take_along_axis(scores.stderr, got.indices, 1)
        np.testing.assert_array_equal(np.isnan(got.stderr), np.isnan(error))
        np.testing.assert_allclose(np.nan_to_num(got.stderr), np.nan_to_num(error), atol=1e-3 * scale, rtol=1e-3)
        for row in got.indices:
            assert len(set(row)) == k


def kinds(info: byline.methods.registry.MethodInfo) -> tuple[str, ...]:
    """What a method takes; iterative solvers, which are slow and differ in how they prepare alone, with two of them."""
    if info.cls is byline.Influence and info.options.get("solver") not in ("ekfac", "explicit"):
        return ("independent",) if info.options["solver"] in ("lissa", "arnoldi", "cg") else ("independent", "lora")
    return (*info.ensembles, "forward-only of one") if info.forward_only else info.ensembles


CASES = [pytest.param(info.name, kind, id=f"{info.name}-{kind}") for info in methods() for kind in kinds(info)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_method_with_every_ensemble(ensembles, name, kind):
    task = byline.Task(mlp(0))
    options = {"features": byline.Factorized(24)} if name in ("logra",) else {}
    attributor = make(name, task, ensembles[kind], progress=False, **options).fit(examples(N, 0))
    # conjugate gradients stop at a residual that all test examples of a block share
    check(attributor, examples(T, 1), tolerance=1e-3 if name == "influence-cg" else 2e-5)


FEATURES = [byline.Exact(), byline.Factorized(24), byline.Dense(20), byline.Nystrom(15), byline.Factorized(90)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("features", FEATURES, ids=repr)
@pytest.mark.parametrize("method", [byline.TRAK, byline.TrackStar, byline.GradDot, byline.GradCos, byline.TracIn])
@pytest.mark.parametrize("kind", ["dropout", "repeated"])
def test_every_kind_of_features(ensembles, method, features, kind):
    attributor = method(byline.Task(mlp(0)), ensembles[kind], features=features, damping=0.2, progress=False)
    check(attributor.fit(examples(N, 0)), examples(T, 1))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["independent", "dropout", "forward-only", "forward-only of one"])
def test_trak_errors_are_those_of_the_matrix(ensembles, kind):
    attributor = byline.TRAK(
        byline.Task(mlp(0)), ensembles[kind], features=byline.Factorized(24), damping=0.2, progress=False
    ).fit(examples(N, 0))
    assert all(attributor._streams(voter) for voter in attributor._voters)
    check(attributor, examples(T, 1))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("normalization", [None, "relatif", "theta-relatif"])
@pytest.mark.parametrize("solver", ["ekfac", "explicit"])
def test_influence_and_its_normalisations(ensembles, solver, normalization):
    attributor = byline.Influence(
        byline.Task(mlp(0)), ensembles["independent"], solver=solver, normalization=normalization, progress=False
    ).fit(examples(N, 0))
    check(attributor, examples(T, 1), tolerance=1e-4)


def smooth(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1, reduction="none")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("method", [byline.GradDot, byline.GradCos, byline.TrackStar])
def test_a_loss_of_its_own(ensembles, method):
    task = byline.Task(mlp(0), loss=smooth)
    attributor = method(task, ensembles["independent"], features=byline.Factorized(24), damping=0.3, progress=False)
    check(attributor.fit(examples(N, 0)), examples(T, 1))


@pytest.mark.usefixtures("small")
def test_ties_stand_in_the_order_of_the_training_set():
    """Whole numbers throughout, so that equal examples have equal scores whichever chunk they are in."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (10, 5), generator=generator).float()
    y = torch.randint(-3, 4, (10, 1), generator=generator).float()
    model = nn.Linear(5, 1)
    model.weight.data.copy_(torch.tensor([[1.0, -2.0, 0.0, 3.0, 1.0]]))
    model.bias.data.fill_(1.0)
    # each example seven times, spread over all chunks
    train, tests = TensorDataset(x.repeat(7, 1), y.repeat(7, 1)), TensorDataset(x, y)
    attributor = byline.GradDot(
        byline.Task(model.eval(), output="regression"), byline.Independent([model]), progress=False
    ).fit(train)
    ranking, whole = attributor.top(tests, 30), attributor.attribute(tests).top(30)
    assert len(np.unique(whole.scores[0])) < 10
    for got, want in ((ranking.proponents, whole.proponents), (ranking.opponents, whole.opponents)):
        np.testing.assert_array_equal(got.indices, want.indices)
        np.testing.assert_array_equal(got.scores, want.scores)


@pytest.mark.parametrize("seed", range(20))
def test_the_running_best_is_the_top_of_the_whole(seed):
    """Integer scores, so that most are tied, in chunks of random lengths, some shorter than k."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(1, 60)), 0
    k = int(rng.integers(1, n + 1))
    values = rng.integers(-3, 4, (5, n)).astype(np.float32)
    values[rng.random(values.shape) < 0.05] = np.inf
    errors = rng.random(values.shape).astype(np.float32)
    cuts = sorted({0, n, *rng.integers(0, n, 5).tolist()})
    both = streaming.Best(5, k), streaming.Best(5, k)
    for a, b in itertools.pairwise(cuts):
        for best, sign in zip(both, (-1, 1), strict=True):
            best.add(a, sign, values[:, a:b], errors[:, a:b])
    whole = Scores(values, errors).top(k)
    for best, want in zip(both, (whole.proponents, whole.opponents), strict=True):
        got = best.ranked()
        np.testing.assert_array_equal(got.indices, want.indices)
        np.testing.assert_array_equal(got.scores, want.scores)
        np.testing.assert_array_equal(got.stderr, want.stderr)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_no_number_comes_last(seed):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(2, 60)), 3
    values = rng.standard_normal((5, n)).astype(np.float32)
    values[rng.random(values.shape) < 0.5] = np.nan
    best = streaming.Best(5, min(k, n))
    for a, b in itertools.pairwise(sorted({0, n, *rng.integers(0, n, 5).tolist()})):
        best.add(a, -1, values[:, a:b], np.zeros_like(values[:, a:b]))
    found = best.ranked()
    for row, places in zip(values, found.indices, strict=True):
        assert len(set(places.tolist())) == len(places)
        assert min(places) >= 0
        real = np.sort(row[~np.isnan(row)])[::-1][: len(places)]
        np.testing.assert_array_equal(row[places][: len(real)], real)


@pytest.mark.parametrize("method", [byline.TRAK, byline.GradCos, byline.Influence, byline.KNNShapley, byline.Random])
def test_batch_and_block_sizes_change_nothing(ensembles, method, monkeypatch):
    extra = {} if method in (byline.Influence, byline.KNNShapley, byline.Random) else {"features": byline.Factorized(9)}
    task, train, tests = byline.Task(mlp(0)), examples(N, 0), examples(T, 1)
    found = []
    for batch_size, rows, block, held in ((256, 4096, 4096, 2**28), (3, 16, 4, 2**28), (2, 32, 4096, 500)):
        monkeypatch.setattr(streaming, "_ROWS", (rows, rows))
        monkeypatch.setattr(streaming, "_TESTS", block)
        monkeypatch.setattr(streaming, "HELD", held)
        attributor = method(task, ensembles["independent"], batch_size=batch_size, progress=False, **extra)
        found.append(attributor.fit(train).top(tests, 7))
    for other in found[1:]:
        for a, b in ((found[0].proponents, other.proponents), (found[0].opponents, other.opponents)):
            np.testing.assert_array_equal(a.indices, b.indices)
            np.testing.assert_allclose(a.scores, b.scores, rtol=2e-4, atol=1e-6)
            np.testing.assert_allclose(a.stderr, b.stderr, rtol=2e-3, atol=1e-6)


def test_no_matrix_of_all_scores_is_formed(ensembles, monkeypatch):
    """Every array of scores is of one block of tests and one chunk of training examples, and few rows are held."""
    monkeypatch.setattr(streaming, "_ROWS", (16, 16))
    monkeypatch.setattr(streaming, "HELD", 24 * 4 * 3 * 4)  # four test examples of 24 columns and three members
    shapes, made = set(), streaming._mean

    def noted(attributor, shape):
        shapes.add(shape)
        return made(attributor, shape)

    monkeypatch.setattr(streaming, "_mean", noted)
    attributor = byline.TRAK(
        byline.Task(mlp(0)), ensembles["independent"], features=byline.Factorized(24), progress=False, batch_size=2
    ).fit(examples(N, 0))
    monkeypatch.setattr(attributor, "_cross", lambda *_: pytest.fail("a row of all scores was formed"))
    attributor.top(examples(T, 1), 3)
    assert max(a for a, _ in shapes) <= 4
    assert max(b for _, b in shapes) <= 16


def test_what_does_not_stream_goes_in_blocks(ensembles, monkeypatch):
    monkeypatch.setattr(streaming, "MATRIX", 4 * N * 2)
    shapes, made = set(), streaming._mean
    monkeypatch.setattr(streaming, "_mean", lambda a, shape: shapes.add(shape) or made(a, shape))
    attributor = byline.TRAK(byline.Task(mlp(0)), ensembles["independent"], damping=0.2, progress=False)
    attributor.fit(examples(N, 0))
    check(attributor, examples(T, 1))
    assert shapes == {(2, N), (1, N)}


def test_memory_stays_flat_in_the_number_of_examples(ensembles):
    """60 000 training examples against 300 tests: the matrices would take 144 MB, and less than a tenth is used."""
    import tracemalloc

    train, tests = examples(60_000, 0), examples(300, 1)
    attributor = byline.GradDot(
        byline.Task(mlp(0)), ensembles["one"], features=byline.Factorized(4), progress=False, batch_size=4096
    ).fit(train)
    tracemalloc.start()  # NumPy's arrays, which all scores are
    ranking = attributor.top(tests, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ranking.indices.shape == (300, 5)
    assert peak < 60_000 * 300 * 4 * 0.75


@pytest.mark.parametrize("k", [0, -1, N + 1, 2.0, "3", True, None])
def test_a_k_that_is_none(ensembles, k):
    attributor = byline.GradDot(byline.Task(mlp(0)), ensembles["one"], progress=False).fit(examples(N, 0))
    with pytest.raises(ValueError, match=r"k is .*; expected an int from 1 to the 70 training examples"):
        attributor.top(examples(T, 1), k)


def test_unfitted_and_empty(ensembles):
    attributor = byline.GradDot(byline.Task(mlp(0)), ensembles["one"], progress=False)
    with pytest.raises(RuntimeError, match="call fit"):
        attributor.top(examples(T, 1))
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        attributor.fit(examples(N, 0)).hold("int4")
    with pytest.raises(ValueError, match="test_set is empty"):
        attributor.top(TensorDataset(torch.zeros(0, 5)))


def test_a_bad_test_example_is_named_by_its_own_number(ensembles, monkeypatch):
    monkeypatch.setattr(streaming, "_TESTS", 4)
    attributor = byline.GradDot(byline.Task(mlp(0)), ensembles["one"], progress=False).fit(examples(N, 0))
    x, y = examples(T, 1).tensors
    x[6, 0] = float("nan")
    with pytest.raises(ValueError, match=r"test_set\[6\]"):
        attributor.top(TensorDataset(x, y), 3)


def test_the_whole_training_set_in_order(ensembles):
    attributor = byline.GradDot(byline.Task(mlp(0)), ensembles["independent"], progress=False).fit(examples(N, 0))
    ranking = attributor.top(examples(2, 1), N)
    np.testing.assert_array_equal(np.sort(ranking.indices, 1), np.tile(np.arange(N), (2, 1)))
    table = ranking.to_dataframe()
    assert list(table.columns) == ["test", "train", "score", "stderr"]
    assert len(table) == 2 * 2 * N


# rows that stay in memory


def test_float32_rows_in_memory_change_nothing(ensembles, monkeypatch):
    monkeypatch.setattr(streaming, "_ROWS", (16, 16))
    for method in (byline.TRAK, byline.TrackStar, byline.GradDot, byline.GradCos):
        attributor = method(
            byline.Task(mlp(0)), ensembles["independent"], features=byline.Factorized(24), damping=0.2, progress=False
        ).fit(examples(N, 0))
        before = attributor.top(examples(T, 1), 5)
        assert attributor.hold() == N * attributor._stored(attributor._voters[0]).columns * 4 * 3
        after = attributor.top(examples(T, 1), 5)
        np.testing.assert_array_equal(before.indices, after.indices)
        np.testing.assert_allclose(before.scores, after.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("int8", 3e-2)])
@pytest.mark.parametrize("method", [byline.TRAK, byline.TrackStar, byline.GradDot, byline.GradCos, "logra"])
def test_small_rows_round_and_no_more(ensembles, dtype, tolerance, method, monkeypatch):
    monkeypatch.setattr(streaming, "_ROWS", (16, 16))
    options = {"features": byline.Factorized(24), "damping": 0.2, "progress": False}
    task = byline.Task(mlp(0))
    if method == "logra":
        attributor = make("logra", task, ensembles["independent"], **options)
    else:
        attributor = method(task, ensembles["independent"], **options)
    attributor.fit(examples(N, 0))
    scores = attributor.attribute(examples(T, 1))
    full = attributor.hold("float32")
    assert attributor.hold(dtype) < 0.6 * full
    got = attributor.top(examples(T, 1), 5)
    want = np.take_along_axis(scores.values, got.indices, 1)
    assert np.abs(got.scores - want).max() < tolerance * np.abs(scores.values).max()


def test_a_new_fit_lets_go_of_the_rows(ensembles):
    attributor = byline.GradDot(
        byline.Task(mlp(0)), ensembles["one"], features=byline.Factorized(24), progress=False
    ).fit(examples(N, 0))
    attributor.hold("int8")
    check(attributor.fit(examples(50, 3)), examples(T, 1))


def test_exact_rows_stay_in_the_store(ensembles):
    attributor = byline.GradDot(byline.Task(mlp(0)), ensembles["one"], progress=False).fit(examples(N, 0))
    assert attributor.hold("int8") == 0
    check(attributor, examples(T, 1))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("vectors", [1, 2, 3, 9])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (100, 64), (33, 2048)])
def test_int8_products_against_float64(packed, vectors, n, k):
    if packed and not scan.packs():
        pytest.skip("this processor's torch has no packed integer products")
    torch.manual_seed(n + k)
    rows = torch.randn(n, k) * torch.logspace(-6, 6, n).unsqueeze(1)
    rows[0, 0] = 0
    x = torch.randn(vectors, k)
    x[-1] *= 1e-9
    codes, scale = scan.quantised(rows)
    assert codes.abs().max() <= 127
    stored = codes.double() * scale.double().unsqueeze(1)
    assert ((stored - rows.double()).abs() <= 0.5001 * scale.double().unsqueeze(1)).all()
    got = scan.Chunk(rows, "int8", packed).dots(x)
    assert got.dtype == torch.float32
    want = x.double() @ stored.T
    bound = x.double().norm(dim=1, keepdim=True) * stored.norm(dim=1)
    # 1/126 of half a step for each entry of a vector, and no saturation
    assert ((got.double() - want).abs() <= 1.2e-4 * bound * max(1, k**0.5 / 8) + 1e-30).all()


def test_extremes_do_not_saturate():
    """All entries at the ends of the range, where 16-bit sums of two products are largest."""
    for packed in (True, False):
        rows, x = torch.ones(5, 256), torch.ones(2, 256)
        rows[1] *= -1
        x[1] *= -3
        got = scan.Chunk(rows, "int8", packed).dots(x)
        torch.testing.assert_close(got, x @ rows.T, rtol=1e-3, atol=1e-3)
    zero = scan.Chunk(torch.zeros(3, 8), "int8").dots(torch.randn(2, 8))
    assert (zero == 0).all()
    assert (scan.Chunk(torch.ones(3, 8), "int8").dots(torch.zeros(2, 8)) == 0).all()


def test_float16_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="65504"):
        scan.Chunk(torch.full((2, 2), 1e6), "float16")
