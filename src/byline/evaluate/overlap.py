"""Top-k overlap: do two attributions name the same training examples?

overlap(z) = |top_k(a, z) ∩ top_k(b, z)| / k
"""

from __future__ import annotations

from typing import Any

import numpy as np

from byline.evaluate.measure import Measure, check_bootstrap, matrix_of, mean_interval
from byline.scores import Scores

_SIDES = ("proponents", "opponents")


def topk_overlap(
    a: Any,
    b: Any,
    k: int = 10,
    *,
    side: str = "proponents",
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Measure:
    """Share of the k strongest training examples that two sets of scores have in common.

    Args:
        a: `byline.Scores` or (n_test, n_train).
        b: Others, of the same examples.
        k: How many of the strongest.
        side: "proponents" or "opponents".
        bootstrap: Resamples of test examples; 0 for none.
        confidence: Of the interval.
        seed: Of the resamples.

    Returns:
        Mean over test examples; ``details["chance"]`` is what two random rankings share, k / n_train.

    Raises:
        ValueError: Shapes that differ, k or side out of range.
    """
    first, second = matrix_of(a, "a"), matrix_of(b, "b")
    check_bootstrap(bootstrap, confidence)
    if first.shape != second.shape:
        raise ValueError(f"a has shape {first.shape} and b {second.shape}; expected the same")
    if side not in _SIDES:
        raise ValueError(f"side is {side!r}; expected one of {list(_SIDES)}")
    tops = [getattr(Scores(values).top(k), side).indices for values in (first, second)]
    each = np.array([len(np.intersect1d(x, y)) / k for x, y in zip(*tops, strict=True)])
    mean, interval = mean_interval(each, bootstrap, confidence, seed)
    return Measure(
        name=f"top-{k} overlap",
        mean=mean,
        interval=interval,
        per_example=each,
        protocol=f"Share of the {k} strongest {side} that both name, for each test example.",
        source="set overlap at k, as in rank comparison (Fagin et al. 2003)",
        details={"chance": k / first.shape[1]},
        confidence=confidence,
    )
