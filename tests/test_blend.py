"""Blended scores: by hand, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import byline


def made(seed: int, scale: float, stderr: float | None = 0.1) -> byline.Scores:
    values = scale * np.random.default_rng(seed).normal(size=(3, 7)).astype(np.float32)
    errors = None if stderr is None else np.full((3, 7), stderr * scale, np.float32)
    return byline.Scores(values, errors, {"seed": seed})


def test_scales_do_not_matter_and_signs_stay() -> None:
    a, b = made(0, 1.0), made(1, 1000.0)
    found = byline.blend(a, b)
    by_hand = (a.values / a.values.std(1, keepdims=True) + b.values / b.values.std(1, keepdims=True)) / 2
    np.testing.assert_allclose(found.values, by_hand, rtol=1e-5)
    np.testing.assert_allclose(byline.blend(a, made(1, 1.0)).values, by_hand, rtol=1e-5)
    both = (a.values > 0) & (b.values > 0)
    assert both.any()
    assert (found.values[both] > 0).all()
    assert [part["seed"] for part in found.info["parts"]] == [0, 1]


def test_errors_are_independent() -> None:
    a, b = made(0, 1.0), made(1, 3.0)
    found = byline.blend(a, b, weights=[1, 3])
    parts = [one.stderr / one.values.std(1, keepdims=True) for one in (a, b)]
    np.testing.assert_allclose(found.stderr, np.hypot(parts[0] / 4, 3 * parts[1] / 4), rtol=1e-5)
    assert np.isnan(byline.blend(a, made(1, 1.0, None)).stderr).all(), "what is not known stays so"


def test_a_weight_of_nothing_leaves_the_other() -> None:
    a, flat = made(0, 5.0), byline.Scores(np.full((3, 7), 2.0, np.float32), np.zeros((3, 7), np.float32))
    np.testing.assert_allclose(
        byline.blend(a, made(1, 1.0), weights=[2, 0]).values, a.values / a.values.std(1, keepdims=True), rtol=1e-5
    )
    np.testing.assert_allclose(byline.blend(a, flat).values, a.values / a.values.std(1, keepdims=True) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ([made(0, 1.0)], ValueError, "blend got 1 scores; expected two or more"),
        ([made(0, 1.0), np.zeros((3, 7))], TypeError, "scores has a ndarray"),
        ([made(0, 1.0), byline.Scores(np.zeros((3, 6)))], ValueError, r"shapes \(3, 7\), \(3, 6\); expected one"),
    ],
)
def test_what_is_no_pair_of_scores_is_refused(given, error, said) -> None:
    with pytest.raises(error, match=said):
        byline.blend(*given)


@pytest.mark.parametrize("weights", [[1], [0, 0], [1, -1], [1, float("nan")], [1, "much"], 2])
def test_weights_that_do_not_fit_are_refused(weights) -> None:
    with pytest.raises(ValueError, match=r"weights is .*; expected 2 numbers, none negative and not all 0"):
        byline.blend(made(0, 1.0), made(1, 1.0), weights=weights)
