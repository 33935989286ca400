"""The result type: order, ties, round trips, and large results on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import byline
import reference as ref
from byline.methods import base
from byline.scores import Scores, matrix
from conftest import build


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return Scores(rng.normal(size=(5, 30)), rng.random((5, 30)), {"method": "TRAK", "members": 3})


@pytest.mark.parametrize("k", [1, 5, 29, 30])
def test_top_is_argsort(scores, k):
    top = scores.top(k)
    order = np.argsort(-scores.values, axis=1, kind="stable")
    assert (top.indices == order[:, :k]).all()
    assert (top.opponents.indices == np.argsort(scores.values, axis=1, kind="stable")[:, :k]).all()
    for z, row in enumerate(top):
        assert row.test == z
        for ranked in (row.proponents, row.opponents):
            assert (ranked.scores == scores.values[z, ranked.indices]).all()
            assert (ranked.stderr == scores.stderr[z, ranked.indices]).all()
    assert len(top) == 5
    assert (top[-1].proponents.indices == top[4].proponents.indices).all()
    assert [row.test for row in top[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        top[5]


def test_ties_are_in_the_order_of_the_training_set():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 3, (20, 50)).astype(np.float32)
    for k in (1, 7, 49, 50):
        top = Scores(values).top(k)
        assert (top.indices == np.argsort(-values, axis=1, kind="stable")[:, :k]).all()
        assert (top.opponents.indices == np.argsort(values, axis=1, kind="stable")[:, :k]).all()


@pytest.mark.parametrize("k", [0, 31, -1, 2.0, None])
def test_top_of_an_impossible_number_is_refused(scores, k):
    with pytest.raises(ValueError, match=f"k is {k}; expected an int from 1 to the 30 training examples"):
        scores.top(k)


def test_save_and_load(scores, tmp_path):
    path = tmp_path / "deep" / "s.safetensors"
    scores.save(path)
    found = Scores.load(path)
    assert (found.values == scores.values).all()
    assert (found.stderr == scores.stderr).all()
    assert found.info == scores.info
    assert repr(found) == repr(scores)
    assert [p.name for p in path.parent.iterdir()] == ["s.safetensors"]
    single = Scores(scores.values)
    single.save(path)
    assert np.isnan(Scores.load(str(path)).stderr).all()


def test_load_refuses_what_holds_no_scores(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(FileNotFoundError, match="no scores at"):
        Scores.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello, this is no such file")
    with pytest.raises(ValueError, match="no safetensors file"):
        Scores.load(tmp_path / "text")
    save_file({"values": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no byline scores"):
        Scores.load(tmp_path / "other.safetensors")


def test_to_dataframe(scores):
    frame = scores.to_dataframe()
    assert list(frame.columns) == ["test", "train", "score", "stderr"]
    assert len(frame) == 150
    back = frame.pivot(index="test", columns="train", values="score").to_numpy()
    assert (back == scores.values).all()
    assert (frame.pivot(index="test", columns="train", values="stderr").to_numpy() == scores.stderr).all()
    few = scores.to_dataframe(2)
    assert len(few) == 5 * 4
    for row in few.itertuples():
        assert row.score == scores.values[row.test, row.train]
        assert row.stderr == scores.stderr[row.test, row.train]
    top = scores.top(2)
    assert set(few[few.test == 3].train) == {*top[3].proponents.indices, *top[3].opponents.indices}


def test_values_are_checked():
    with pytest.raises(ValueError, match=r"values has shape \(3,\)"):
        Scores(np.zeros(3))
    with pytest.raises(ValueError, match=r"stderr has shape \(2, 2\); expected that of values, \(2, 3\)"):
        Scores(np.zeros((2, 3)), np.zeros((2, 2)))
    found = Scores(torch.ones(2, 3, dtype=torch.float64, requires_grad=True))
    assert found.values.dtype == np.float32
    assert found.shape == (2, 3)


def test_repr_is_useful(scores):
    assert "5 test × 30 train" in repr(scores)
    assert "median stderr" in repr(scores)
    assert "stderr" not in repr(Scores(np.zeros((2, 3))))
    assert "±" in repr(scores.top(3))
    assert "±" not in repr(Scores(np.zeros((2, 3))).top(1))


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("method", [byline.TRAK, byline.GradDot, byline.GradCos])
def test_large_results_are_memory_mapped_and_equal(monkeypatch, tmp_path, folder, method):
    made = build("mlp")
    other = build("mlp", seed=1)
    ensemble = byline.Independent([made.model, other.model])
    store = tmp_path / "store" if folder else None
    attributor = method(made.task, ensemble, damping=0.3, store=store, progress=False).fit(made.train)
    plain = attributor.attribute(made.test)
    assert not isinstance(plain.values, np.memmap)
    monkeypatch.setattr(base, "_IN_MEMORY", 10)
    mapped = attributor.attribute(made.test)
    assert isinstance(mapped.values, np.memmap)
    assert isinstance(mapped.stderr, np.memmap)
    assert (mapped.values == plain.values).all()
    assert (mapped.stderr == plain.stderr).all()
    mapped.save(tmp_path / "s.safetensors")
    ref.assert_close(Scores.load(tmp_path / "s.safetensors").values, plain.values, 0)
    assert mapped.top(2)[0].proponents.indices.tolist() == plain.top(2)[0].proponents.indices.tolist()


def test_the_file_of_a_mapped_matrix_goes_with_it(tmp_path):
    small, large = matrix((2, 2), 16), matrix((2, 3), 16, tmp_path)
    assert not isinstance(small, np.memmap)
    large[:] = 3
    assert large.sum() == 18
    assert not list(tmp_path.iterdir())
