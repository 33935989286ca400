"""Mislabel detection: are the training examples with flipped labels the ones that look suspicious?

Labels of a random share of the training set are flipped, models are trained on them, examples are ranked by suspicion,
their self-influence as a rule, and the ranking is judged by ROC-AUC, by average precision, and by how many of the
flipped are found after checking so many (Koh & Liang 2017, "Understanding Black-box Predictions via Influence
Functions", section 5.4; Pruthi et al. 2020, "Estimating Training Data Influence by Tracing Gradient Descent",
section 4).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from byline.evaluate.measure import Measure, check_bootstrap, matrix_of, percentile

CHECKED = np.array([0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0])
"""Shares of the training set at which the found-against-checked curve is given."""


def flip_labels(labels: Any, fraction: float, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels with a share of them moved to another class, each other class as likely.

    Args:
        labels: (n,) int, from 0 to classes - 1.
        fraction: Share that is flipped, above 0 and below 1.
        classes: Number of classes, at least 2.
        seed: Of the draw. Which ones are flipped depends on the seed and their number alone.

    Returns:
        the new labels (n,), and which were flipped (n,) bool.

    Raises:
        ValueError: An argument out of range.
    """
    given = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ValueError(f"labels has shape {given.shape}, {given.dtype}; expected (n,) whole numbers")
    if classes < 2 or (len(given) and not 0 <= given.min() <= given.max() < classes):
        raise ValueError(f"classes is {classes}; expected at least 2, and labels from 0 to classes - 1")
    count = round(fraction * len(given)) if 0 < fraction < 1 else 0
    if not 0 < count < len(given):
        raise ValueError(f"fraction={fraction!r}: flips {count} of {len(given)} labels; expected some, not all")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(given), count, replace=False)
    shift = rng.integers(1, classes, size=count)
    flipped = np.zeros(len(given), dtype=bool)
    flipped[chosen] = True
    new = given.copy()
    new[chosen] = (given[chosen] + shift) % classes
    return new, flipped


def mislabel_detection(
    suspicion: Any, flipped: Any, *, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Measure:
    """How well a ranking by suspicion finds flipped labels.

    Args:
        suspicion: (n_train,), higher is more suspicious: self-influence, or a loss. Or `byline.Scores` (n_test,
            n_train) on examples that are trusted, of which minus the mean over test examples is taken: what pushes the
            outputs of trusted examples down is suspicious.
        flipped: (n_train,) bool, or the places of the flipped examples.
        bootstrap: Resamples of flipped and of clean examples, each by themselves; 0 for none.
        confidence: Of the interval.
        seed: Of the resamples.

    Returns:
        ROC-AUC as the mean; ``per_example`` is, of each training example that was flipped, the share of clean examples
        that are less suspicious (their mean is the AUC), NaN for the clean ones. ``details``: ``average_precision``
        with ``average_precision_interval``, ``base_rate``, and the curve ``checked`` (shares of the training set)
        against ``found`` (shares of the flipped) with ``found_interval`` (2, points). Among equally suspicious
        examples the curve goes by the mean over their orders.

    Raises:
        ValueError: Shapes that do not match, a number that is not finite, none or all flipped.
    """
    check_bootstrap(bootstrap, confidence)
    array = _suspicion(suspicion)
    mask = _mask(flipped, len(array))
    # ties count as half, as in the area under the curve
    ranks = rankdata(array)
    bad, clean = array[mask], array[~mask]
    above = (ranks[mask] - rankdata(bad)) / len(clean)
    each = np.full(len(array), np.nan)
    each[mask] = above
    aucs, precisions, found = _resample(array, mask, bootstrap, np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    return Measure(
        name="mislabel detection, ROC-AUC",
        mean=float(roc_auc_score(mask, array)),
        interval=percentile(aucs, confidence),
        per_example=each,
        protocol=f"{mask.sum()} of {len(array)} labels flipped, all ranked by suspicion; ROC-AUC of flipped against "
        "clean, resampled within each.",
        source="Koh & Liang 2017, section 5.4; Pruthi et al. 2020, section 4",
        details={
            "average_precision": float(average_precision_score(mask, array)),
            "average_precision_interval": percentile(precisions, confidence),
            "base_rate": float(mask.mean()),
            "checked": CHECKED,
            "found": _curves(array, mask, np.ones((1, len(array)), dtype=np.int64))[2][0],
            "found_interval": np.quantile(found, [tail, 1 - tail], axis=0)
            if bootstrap
            else np.full((2, len(CHECKED)), np.nan),
        },
        confidence=confidence,
    )


def _resample(
    array: np.ndarray, mask: np.ndarray, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_curves` of bootstrap resamples of the flipped and of the clean, a few at a time to stay small."""
    parts = []
    for start in range(0, draws, 64):
        counts = np.zeros((min(64, draws - start), len(array)), dtype=np.int64)
        for part in (mask, ~mask):
            total = int(part.sum())
            counts[:, part] = rng.multinomial(total, np.full(total, 1 / total), len(counts))
        parts.append(_curves(array, mask, counts))
    empty = np.empty(0), np.empty(0), np.empty((0, len(CHECKED)))
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True)) if parts else empty  # type: ignore[return-value]


def _curves(array: np.ndarray, mask: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ROC-AUC (draws,), average precision (draws,) and found (draws, points): one sort, and counts in place of copies.

    Args:
        array: (n,) suspicion.
        mask: (n,) which are flipped.
        counts: (draws, n) how often each example was drawn.
    """
    order = np.argsort(-array, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(array[order]) != 0])  # equal values share a threshold
    bad = np.add.reduceat(np.where(mask, counts, 0)[:, order], starts, axis=1)
    clean = np.add.reduceat(np.where(mask, 0, counts)[:, order], starts, axis=1)
    hits, false = bad.cumsum(1), clean.cumsum(1)
    rest = false[:, -1:] - false + clean / 2
    aucs = (bad * rest).sum(1) / (hits[:, -1] * false[:, -1])
    precisions = (bad * hits / np.maximum(hits + false, 1)).sum(1) / hits[:, -1]
    # linear within a block of equals: the mean over their orders
    points = CHECKED * counts.shape[1]
    found = [np.interp(points, np.r_[0, h + f], np.r_[0, h]) / h[-1] for h, f in zip(hits, false, strict=True)]
    return aucs, precisions, np.array(found)


def _suspicion(given: Any) -> np.ndarray:
    """(n_train,) float64, of what either form gives."""
    # a tensor's own `values` is a method for sparse ones
    value = given if isinstance(given, torch.Tensor) else getattr(given, "values", given)
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.ndim == 2:
        return -matrix_of(array, "suspicion").astype(np.float64).mean(0)
    if array.ndim != 1 or array.dtype.kind not in "fiu":
        raise ValueError(
            f"suspicion: got {array.dtype} {array.shape}; expected numbers (n_train,), or scores (n_test, n_train)"
        )
    if not np.isfinite(array).all():
        i = int((~np.isfinite(array)).argmax())
        raise ValueError(f"suspicion: training example {i} is {array[i]}; expected (n_train,) finite numbers")
    return array.astype(np.float64)


def _mask(flipped: Any, length: int) -> np.ndarray:
    given = flipped.detach().cpu().numpy() if isinstance(flipped, torch.Tensor) else np.asarray(flipped)
    if given.dtype == bool:
        if given.shape != (length,):
            raise ValueError(f"flipped has shape {given.shape}; expected ({length},)")
        mask = given
    else:
        if (
            given.ndim != 1
            or given.dtype.kind not in "iu"
            or (len(given) and not 0 <= given.min() <= given.max() < length)
        ):
            raise ValueError(f"flipped: expected ({length},) bool, or places from 0 to {length - 1}")
        mask = np.zeros(length, dtype=bool)
        mask[given] = True
    if not 0 < mask.sum() < length:
        raise ValueError(f"flipped: {mask.sum()} of {length} examples are; expected some, not all")
    return mask
