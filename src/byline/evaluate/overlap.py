"""Top-k overlap: do two attributions name the same training examples?

    overlap(z) = |top_k(a, z) ∩ top_k(b, z)| / k,

its mean over test examples (the set overlap of top-k lists, as in Fagin, Kumar & Sivakumar 2003, "Comparing Top k
Lists").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from byline.evaluate.measure import Measure, check_bootstrap, is_whole, matrix_of, mean_interval
from byline.scores import Scores


def topk_overlap(
    a: Any,
    b: Any,
    k: int = 10,
    *,
    sign: str = "proponents",
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Measure:
    """Share of the k strongest training examples that two sets of scores have in common.

    Args:
        a: `byline.Scores` or (n_test, n_train).
        b: Others, of the same examples.
        k: How many of the strongest.
        sign: "proponents" or "opponents": the highest scores or the lowest.
        bootstrap: Resamples of test examples; 0 for none.
        confidence: Of the interval.
        seed: Of the resamples.

    Returns:
        Mean over test examples; ``details["chance"]`` is what two random rankings share, k / n_train.

    Raises:
        ValueError: Shapes that differ, k out of range, or an unknown sign.
    """
    first, second = matrix_of(a, "a"), matrix_of(b, "b")
    check_bootstrap(bootstrap, confidence)
    if first.shape != second.shape:
        raise ValueError(f"a has shape {first.shape} and b {second.shape}; expected the same")
    if sign not in ("proponents", "opponents"):
        raise ValueError(f"sign is {sign!r}; expected 'proponents' or 'opponents'")
    if not is_whole(k, 1, first.shape[1]):
        raise ValueError(f"k is {k!r}; expected a whole number from 1 to the {first.shape[1]} training examples")
    tops = [getattr(Scores(values).top(k), sign).indices for values in (first, second)]
    each = np.array([len(np.intersect1d(x, y)) / k for x, y in zip(*tops, strict=True)])
    mean, interval = mean_interval(each, bootstrap, confidence, seed)
    return Measure(
        name=f"top-{k} overlap",
        mean=mean,
        interval=interval,
        per_example=each,
        protocol=f"Share of the {k} strongest {sign} that both name, for each test example.",
        source="Fagin et al. 2003",
        details={"chance": k / first.shape[1]},
        confidence=confidence,
    )
