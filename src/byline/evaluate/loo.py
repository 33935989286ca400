"""Leave-one-out correlation: do scores foretell what retraining without one example does?

    LOO(z) = spearman over removed i of ( score(z, i),  f(z; all) - f(z; all but i) ),

both outputs means over seeds, and the mean of it over test examples (Koh & Liang 2017, "Understanding Black-box
Predictions via Influence Functions", section 4.1, who give Pearson's correlation for one test example). One example's
effect is small beside the noise of training, so many seeds are needed, and the ceiling says how far the noise lets any
scores come.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from byline.evaluate.bank import Bank
from byline.evaluate.lds import _resample, noise_ceiling, spearman
from byline.evaluate.measure import Measure, check_bootstrap, matrix_of, percentile


def leave_one_out_subsets(n_train: int, removed: Any) -> np.ndarray:
    """(1 + removed, n_train) bool for `byline.retrain`: the whole training set, then it without each of these.

    Raises:
        ValueError: A place outside the training set, or one that comes twice.
    """
    places = np.asarray(removed)
    if places.ndim != 1 or not len(places) or places.dtype.kind not in "iu":
        raise ValueError(f"removed has shape {places.shape}, {places.dtype}; expected places in the training set")
    if places.min() < 0 or places.max() >= n_train or len(np.unique(places)) != len(places):
        raise ValueError(f"removed: expected distinct places from 0 to {n_train - 1}")
    masks = np.ones((1 + len(places), n_train), dtype=bool)
    masks[np.arange(1, len(masks)), places] = False
    return masks


def leave_one_out(
    scores: Any,
    bank: Bank,
    *,
    correlation: str = "spearman",
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Measure:
    """Correlation of scores with leave-one-out retraining.

    Args:
        scores: `byline.Scores` or (n_test, n_train); positive means proponent.
        bank: Retrained with ``subsets=leave_one_out_subsets(...)``: one subset is the whole training set, each other
            lacks one example.
        correlation: "spearman" or "pearson".
        bootstrap: Resamples of test examples and removed examples together; 0 for none. Time and memory grow with
            the square of the removed examples.
        confidence: Of the interval.
        seed: Of the resamples.

    Returns:
        Mean over test examples; ``per_example`` (n_test,) is NaN where the scores or the effects are constant.
        ``details``: ``removed``, their places; ``ceiling`` and ``split_half`` of the effects, see
        `byline.evaluate.lds.noise_ceiling`, NaN with one seed.

    Raises:
        ValueError: Shapes that do not match, a bank of other subsets, or an unknown correlation.
    """
    values = matrix_of(scores)
    check_bootstrap(bootstrap, confidence)
    if correlation not in ("spearman", "pearson"):
        raise ValueError(f"correlation is {correlation!r}; expected 'spearman' or 'pearson'")
    if values.shape != (bank.n_test, bank.n_train):
        raise ValueError(f"scores: got {values.shape}; the bank expects {(bank.n_test, bank.n_train)}")
    sizes = bank.subsets.sum(1)
    whole = np.flatnonzero(sizes == bank.n_train)
    without = np.flatnonzero(sizes == bank.n_train - 1)
    removed = (~bank.subsets[without]).argmax(1)
    others = len(sizes) - len(whole) - len(without)
    if len(whole) != 1 or len(set(removed.tolist())) != len(removed) or len(removed) < 3 or others:
        raise ValueError(
            f"bank: {len(whole)} of its subsets are the whole training set, {len(without)} lack one example "
            f"({len(set(removed.tolist()))} different ones), {others} are of other sizes; expected the whole set once "
            "and at least 3 that lack one each, as leave_one_out_subsets makes them"
        )
    outputs = bank.outputs.astype(np.float64)
    effect = (outputs[whole[0]].mean(0)[None] - outputs[without].mean(1)).T  # (n_test, removed)
    predicted = values[:, removed].astype(np.float64)
    correlate, resample = (spearman, _resample) if correlation == "spearman" else (pearson, _resample_pearson)
    each = correlate(predicted, effect)
    valid = np.isfinite(each)
    draws = np.empty(0)
    if bootstrap and valid.any():
        draws = resample(predicted[valid], effect[valid], bootstrap, np.random.default_rng(seed))
    # f(z; all) is one number per test example, so the effects are as reliable as the outputs without i
    split_half, ceiling = noise_ceiling(Bank(bank.subsets[without], bank.outputs[without]), correlate)
    return Measure(
        name="leave-one-out correlation",
        mean=float(each[valid].mean()) if valid.any() else float("nan"),
        interval=percentile(draws, confidence),
        per_example=each,
        protocol=f"{correlation.capitalize()} correlation over {len(removed)} removed training examples between score "
        f"and f(all) - f(all but it), for each test example; {bank.seeds} models each.",
        source="Koh & Liang 2017, section 4.1",
        details={"ceiling": ceiling, "split_half": split_half, "removed": removed},
        confidence=confidence,
    )


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of each row of `a` with that of `b`, (rows,); NaN where either row is constant."""
    a, b = (np.where(np.ptp(x, axis=1, keepdims=True) > 0, x - x.mean(1, keepdims=True), 0) for x in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def _resample_pearson(a: np.ndarray, b: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """The mean correlation of each bootstrap resample of columns and rows, (draws,), from weighted moments."""
    rows, columns = a.shape
    weights = rng.multinomial(columns, np.full(columns, 1 / columns), draws).T / columns
    row_counts = rng.multinomial(rows, np.full(rows, 1 / rows), draws).T
    a, b = ((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (a, b))
    mean_a, mean_b = a @ weights, b @ weights  # (rows, draws)
    spread = ((a * a) @ weights - mean_a**2) * ((b * b) @ weights - mean_b**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where(spread > 1e-20, ((a * b) @ weights - mean_a * mean_b) / np.sqrt(spread), np.nan)
        counts = row_counts * np.isfinite(each)  # a resample of very few columns may be constant
        return (np.nan_to_num(each) * counts).sum(0) / counts.sum(0)
