"""What every measure says: a mean with its interval, the value of each example, and by which protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Measure:
    """How scores fared by one protocol.

    Attributes:
        name: Of the measure.
        mean: Over the examples that count.
        interval: Bootstrap confidence interval of the mean, (low, high); NaN where none was asked for.
        per_example: (n,) float64, what the measure says it is; NaN for examples without a value.
        protocol: How it was measured, in a sentence.
        source: Where the protocol comes from.
        details: Further figures.
        confidence: That of the interval.
        left_out: Number of examples that do not count in the mean; those without a value, unless said otherwise.
    """

    name: str
    mean: float
    interval: tuple[float, float]
    per_example: np.ndarray = field(repr=False)
    protocol: str
    source: str
    details: dict[str, Any] = field(default_factory=dict, repr=False)
    confidence: float = 0.95
    left_out: int = -1

    def __post_init__(self) -> None:
        if self.left_out < 0:
            object.__setattr__(self, "left_out", int(np.isnan(self.per_example).sum()))

    def __float__(self) -> float:
        return self.mean

    def __repr__(self) -> str:
        low, high = self.interval
        parts = [f"{self.name} {self.mean:.3f}"]
        if np.isfinite(low):
            parts.append(f"{self.confidence * 100:g} % interval {low:.3f} to {high:.3f}")
        every = len(self.per_example)
        parts.append(f"{every - self.left_out} of {every} examples" if self.left_out else f"{every} examples")
        return ", ".join(parts)


def matrix_of(scores: Any, name: str = "scores") -> np.ndarray:
    """(n_test, n_train) float array of `byline.Scores`, a tensor or an array.

    Raises:
        ValueError: No matrix of numbers, an empty one, or a number that is not finite.
    """
    array = array_of(scores, name)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; expected (n_test, n_train), neither of them 0")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} has dtype {array.dtype}; expected real numbers")
    if not np.isfinite(array).all():
        z, i = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{name}: test example {z}, training example {i} is {array[z, i]}; expected finite numbers")
    return array


def array_of(scores: Any, name: str) -> np.ndarray:
    """`byline.Scores`, a tensor or an array as an array.

    Raises:
        ValueError: Rows of different lengths.
    """
    values = scores if isinstance(scores, torch.Tensor) else getattr(scores, "values", scores)
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: got a {type(scores).__name__} that is no matrix of numbers ({error})") from None


def labels_of(labels: Any, length: int, name: str) -> np.ndarray:
    """(length,) labels as an array.

    Raises:
        ValueError: Another shape, or a label that is NaN.
    """
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if array.shape != (length,):
        raise ValueError(f"{name} has shape {array.shape}; expected ({length},)")
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"{name}: number {int(np.isnan(array).argmax())} is nan; expected labels")
    return array


def is_whole(value: Any, low: int, high: float = float("inf")) -> TypeGuard[int]:
    """Whether it is an int, of Python or NumPy but no bool, from low to high."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(low <= value <= high)


def check_bootstrap(bootstrap: int, confidence: float, least: int = 0) -> None:
    """Refuse a number of resamples or a confidence that has no meaning."""
    if not is_whole(bootstrap, least):
        raise ValueError(f"bootstrap={bootstrap!r}: expected a whole number of at least {least}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}: expected a number between 0 and 1")


def percentile(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    """The percentile interval of bootstrap draws (Efron 1979); NaN without any."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def resampled(
    sizes: tuple[int, ...], statistic: Callable[..., float], draws: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Interval of a statistic whose units are drawn anew with replacement.

    Args:
        sizes: Number of units of each kind (test examples, removed examples, …).
        statistic: Of one array of drawn places per kind.
        draws: Resamples; 0 for none.
        confidence: Of the interval.
        seed: Of the draws.
    """
    if not draws:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    found = [statistic(*(rng.integers(size, size=size) for size in sizes)) for _ in range(draws)]
    return percentile(np.array(found, dtype=np.float64), confidence)


def mean_interval(values: np.ndarray, draws: int, confidence: float, seed: int) -> tuple[float, tuple[float, float]]:
    """The mean of the values that are numbers, and its interval over them."""
    valid = values[np.isfinite(values)]
    if not len(valid):
        return float("nan"), (float("nan"), float("nan"))
    return float(valid.mean()), resampled(
        (len(valid),), lambda drawn: float(valid[drawn].mean()), draws, confidence, seed
    )
