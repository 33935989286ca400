"""Scores of several models about the same examples, made one.

    blend(z, i) = Σ_m w_m S_m(z, i) / sd_i S_m(z, i)

Scores of different models, features or methods have scales of their own, so those of each test example are divided by
their standard deviation over the training set first. Signs stay: a proponent for all is a proponent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from byline.scores import Scores


def blend(*scores: Scores, weights: Sequence[float] | None = None) -> Scores:
    """The weighted mean of scores, each test example's over their standard deviation.

    Args:
        scores: two or more, of the same test and training examples in the same order.
        weights: one a piece, none negative; equal ones when left out. They are divided by their sum.

    Returns:
        Scores in standard deviations. A test example whose scores are all the same adds nothing. ``stderr`` takes the
        errors as independent, and is NaN where any of them is. ``info`` has those of the parts.

    Raises:
        TypeError: something that is no `Scores`.
        ValueError: fewer than two, other shapes, or weights that do not fit.
    """
    if odd := [type(one).__name__ for one in scores if not isinstance(one, Scores)]:
        raise TypeError(f"scores has a {odd[0]}; expected byline.Scores")
    if len(scores) < 2:
        raise ValueError(f"blend got {len(scores)} scores; expected two or more")
    if len({one.shape for one in scores}) > 1:
        raise ValueError(f"scores have the shapes {', '.join(str(one.shape) for one in scores)}; expected one")
    try:
        given = [1.0] * len(scores) if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError):
        given = []
    if len(given) != len(scores) or not all(math.isfinite(w) and w >= 0 for w in given) or not sum(given) > 0:
        raise ValueError(f"weights is {weights!r}; expected {len(scores)} numbers, none negative and not all 0")
    values = np.zeros(scores[0].shape)
    variance = np.zeros(scores[0].shape)
    for one, weight in zip(scores, given, strict=True):
        own = np.asarray(one.values, dtype=np.float64)
        scale = own.std(1, keepdims=True)
        factor = weight / sum(given) / np.where(scale > 0, scale, np.inf)
        values += factor * own
        variance += (factor * one.stderr) ** 2
    info = {"method": "blend", "weights": given, "parts": [one.info for one in scores]}
    return Scores(values.astype(np.float32), np.sqrt(variance).astype(np.float32), info)
