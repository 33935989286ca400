"""Votes: what each member of an ensemble says apart, and what that tells of how sure their mean is.

A standard error says how far one score may be off. What people do with scores is rarely one score: a rank, a sum over
an owner's examples, a share. Their errors hang together, because a member that rates one example high rates its
neighbours high too, so they are found by resampling members (Efron 1979, "Bootstrap Methods: Another Look at the
Jackknife").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from byline.scores import Scores

Array = np.ndarray
Statistic = Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class Interval:
    """A figure with its bootstrap interval.

    Attributes:
        value: Of all members.
        low: Lower end, of the same shape; NaN where there is a single model and a single member.
        high: Upper end.
        confidence: Of the interval.
    """

    value: Array
    low: Array
    high: Array
    confidence: float = 0.95

    @property
    def distinct(self) -> Array:
        """Whether the interval leaves out zero, elementwise; False where there is no interval."""
        with np.errstate(invalid="ignore"):
            return (self.low > 0) | (self.high < 0)


@dataclass(frozen=True, eq=False)
class Votes:
    """What each member says of each pair of a test and a training example.

    Members that share their gradients (forward-only masks of one trained model) are one vote.

    Attributes:
        values: (votes, n_test, n_train) float32.
        weights: (votes,) float64.
        residuals: (votes, n_train) Q, for methods that average it apart (TRAK), else None.
        models: (votes,) which trained model each belongs to, from 0.
        scale: What the weighted mean is multiplied by (TracIn's sum over a run).
        info: How they came about; JSON, as that of `byline.Scores`.
        carried: (votes, n_train) Q, where a vote's columns are multiplied by it already (GradDot), else None.
        counted: (votes, n_train) bool, whether a vote counts in the mean of Q; None where all do.
    """

    values: Array
    weights: Array
    residuals: Array | None
    models: Array
    scale: float = 1.0
    info: dict[str, Any] = field(default_factory=dict, repr=False)
    carried: Array | None = None
    counted: Array | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, int]:
        """(n_test, n_train)."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def units(self) -> Array:
        """(votes,) what is resampled together: the votes of a trained model, or each by itself if there is one model.

        Masks of one model share whatever is odd about that model. With several models, they are drawn and left out
        together; with one, an interval says how far the masks agree, and nothing of other models.
        """
        several = len(np.unique(self.models)) > 1
        return np.unique(self.models if several else np.arange(len(self)), return_inverse=True)[1]

    def mean(self, counts: Any = None, tests: slice | Array = slice(None)) -> Array:
        """(tests, n_train) float32: the scores when each vote counts so often.

        Args:
            counts: (votes,) how often; once when left out, which gives what ``attribute`` gives.
            tests: which test examples.

        Raises:
            ValueError: another length, or nothing counts.
        """
        often = np.ones(len(self)) if counts is None else np.asarray(counts, np.float64)
        if often.shape != (len(self),) or not (often @ self.weights):
            raise ValueError(f"counts has shape {often.shape}; expected ({len(self)},), not all of them 0")
        share = self.weights * often
        share = (share / share.sum()).astype(np.float32)
        found = np.zeros((len(range(self.shape[0])[tests]) if isinstance(tests, slice) else len(tests), self.shape[1]))
        found = found.astype(np.float32)
        for part, own in zip(share, self.values, strict=True):
            if part:
                found += part * own[tests]
        if self.residuals is not None:
            found *= share @ self.residuals if self.counted is None else self._mean_of_counted(share)
        return found * np.float32(self.scale) if self.scale != 1 else found

    def _mean_of_counted(self, share: Array) -> Array:
        """(n_train,) the mean Q over the votes that count; over all of them where a resample has none."""
        assert self.residuals is not None
        assert self.counted is not None
        every = (self.weights / self.weights.sum()).astype(np.float32)
        weights = np.stack([part @ self.counted for part in (share, every)])
        sums = np.stack([part @ (self.counted * self.residuals) for part in (share, every)])
        return np.where(weights[0] > 0, sums[0] / np.maximum(weights[0], 1e-30), sums[1] / weights[1])

    def kernel(self) -> Array:
        """(n_test, n_train) float32: the mean without Q, in methods that have one: how alike two examples are.

        Q is near zero for examples that a model has learnt. In scores these count for little, however alike they are
        to the test example.
        """
        values = self.values
        if self.carried is not None:
            learnt = np.abs(self.carried) < 1e-30
            values = values / np.where(learnt, 1, self.carried)[:, None]
            values[np.broadcast_to(learnt[:, None], values.shape)] = 0
        share = (self.weights / self.weights.sum()).astype(np.float32)
        return np.einsum("m,mzi->zi", share, values)

    def scores(self) -> Scores:
        """All members together, with the standard deviation over resamples of `units` as the standard error.

        ``attribute`` takes masks of one model as independent draws; this does not, where there are several models.
        """
        errors = np.full(self.shape, np.nan, np.float32)
        draws = self.draws(100, 0)
        if len(draws):
            middle = self.mean()
            square = np.zeros(self.shape)
            for counts in draws:
                square += (self.mean(counts) - middle).astype(np.float64) ** 2
            errors = np.sqrt(square / len(draws)).astype(np.float32)
        return Scores(self.mean(), errors, self.info)

    def draws(self, count: int, seed: int) -> Array:
        """(count, votes) how often each vote counts in each resample of `units`; none where there is one unit."""
        units = self.units
        size = int(units.max()) + 1
        if size < 2:
            return np.empty((0, len(self)))
        # n drawn from n vary by (n - 1)/n of what they should; n - 1 drawn from n vary as much as the mean does
        drawn = np.random.default_rng(seed).multinomial(size - 1, np.full(size, 1 / size), count)[:, units]
        return drawn[drawn @ self.weights > 0].astype(np.float64)

    def bootstrap(
        self,
        statistic: Statistic,
        *,
        draws: int = 200,
        confidence: float = 0.95,
        seed: int = 0,
        tests: slice | Array = slice(None),
    ) -> Interval:
        """Something computed from scores, with an interval over members.

        Args:
            statistic: Scores (tests, n_train) -> an array of any shape.
            draws: Resamples.
            confidence: Of the interval.
            seed: Of the resamples.
            tests: Which test examples.

        Raises:
            ValueError: An argument out of range.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence!r}: expected a number between 0 and 1")
        if not isinstance(draws, int) or draws < 1:
            raise ValueError(f"draws is {draws!r}; expected an int of at least 1")
        value = np.asarray(statistic(self.mean(tests=tests)), np.float64)
        found = [np.asarray(statistic(self.mean(counts, tests)), np.float64) for counts in self.draws(draws, seed)]
        if not found:
            return Interval(value, np.full_like(value, np.nan), np.full_like(value, np.nan), confidence)
        tail = (1 - confidence) / 2
        low, high = np.quantile(np.stack(found), [tail, 1 - tail], axis=0)
        return Interval(value, low, high, confidence)


class Collected:
    """Votes as they arrive, kept apart, by the calls that `byline.methods.mean.RunningMean` takes.

    Args:
        values: (voters, n_test, n_train) room for them.
        with_residuals: also keep each voter's Q.
    """

    def __init__(self, values: Array, with_residuals: bool):
        self.values, self.with_residuals = values, with_residuals
        self.weights: list[float] = []
        self.residuals: list[Array] = []

    def begin(self, weight: float, residual: Any, counted: Any = None, deviation: Any = None) -> None:
        """The next voter, before its blocks."""
        self.weights.append(weight)
        if self.with_residuals:
            self.residuals.append(residual.detach().cpu().numpy())

    def add(self, start: int, stop: int, block: Any) -> None:
        """This voter's rows ``start`` to ``stop``."""
        self.values[len(self.weights) - 1, start:stop] = block.detach().cpu().numpy()

    def votes(
        self,
        models: Sequence[str],
        scale: float,
        carried: Array | None,
        info: dict[str, Any],
        counted: Array | None = None,
    ) -> Votes:
        """All of them, once they are there."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(models))}
        return Votes(
            values=self.values,
            weights=np.array(self.weights),
            residuals=np.stack(self.residuals) if self.with_residuals else None,
            models=np.array([numbers[name] for name in models]),
            scale=scale,
            carried=carried,
            counted=counted,
            info=info,
        )
