"""Leave-one-out correlation: do scores foretell what retraining without one example does?

    LOO(z) = spearman over removed i of ( score(z, i),  f(z; all) - f(z; all but i) ),

both outputs means over seeds (Koh & Liang 2017, section 5.2). One example's effect is small beside the noise of
training, so many seeds are needed, and the ceiling says how far the noise lets any scores come.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from byline.evaluate.bank import Bank
from byline.evaluate.lds import noise_ceiling, spearman
from byline.evaluate.measure import Measure, check_bootstrap, matrix_of, resampled


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
    scores: Any, bank: Bank, *, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Measure:
    """Rank correlation of scores with leave-one-out retraining.

    Args:
        scores: `byline.Scores` or (n_test, n_train); positive means proponent.
        bank: Retrained with ``subsets=leave_one_out_subsets(...)``: one subset is the whole training set, each other
            lacks one example.
        bootstrap: Resamples of test examples and removed examples together; 0 for none.
        confidence: Of the interval.
        seed: Of the resamples.

    Returns:
        Mean over test examples; ``details`` has the noise ceiling, see `byline.evaluate.lds.noise_ceiling`.

    Raises:
        ValueError: Shapes that do not match, or a bank of other subsets.
    """
    values = matrix_of(scores)
    check_bootstrap(bootstrap, confidence)
    if values.shape != (bank.n_test, bank.n_train):
        raise ValueError(f"scores: got {values.shape}; the bank expects {(bank.n_test, bank.n_train)}")
    sizes = bank.subsets.sum(1)
    whole = np.flatnonzero(sizes == bank.n_train)
    without = np.flatnonzero(sizes == bank.n_train - 1)
    if len(whole) != 1 or len(without) < 3 or len(whole) + len(without) != len(sizes):
        raise ValueError(
            f"bank: has subsets of {sorted(set(sizes.tolist()))[:5]} of {bank.n_train} examples; expected the whole "
            "set once and at least 3 that lack one, as leave_one_out_subsets makes them"
        )
    removed = (~bank.subsets[without]).argmax(1)
    outputs = bank.outputs.astype(np.float64)
    effect = (outputs[whole[0]].mean(0)[None] - outputs[without].mean(1)).T  # (n_test, removed)
    predicted = values[:, removed].astype(np.float64)
    each = spearman(predicted, effect)
    valid = np.flatnonzero(np.isfinite(each))

    def statistic(tests: np.ndarray, drawn: np.ndarray) -> float:
        rows = valid[tests]
        return float(np.nanmean(spearman(predicted[np.ix_(rows, drawn)], effect[np.ix_(rows, drawn)])))

    draws = bootstrap if len(valid) else 0
    split_half, ceiling = noise_ceiling(Bank(bank.subsets[without], bank.outputs[without]))
    return Measure(
        name="leave-one-out correlation",
        mean=float(each[valid].mean()) if len(valid) else float("nan"),
        interval=resampled((len(valid), len(removed)), statistic, min(draws, 300), confidence, seed),
        per_example=each,
        protocol=f"Spearman over {len(removed)} removed training examples, for each test example; {bank.seeds} seeds.",
        source="Koh & Liang 2017, section 5.2",
        details={"ceiling": ceiling, "split_half": split_half, "removed": removed},
        confidence=confidence,
    )
