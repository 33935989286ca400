"""The linear datamodeling score (LDS): do scores foretell what retraining on a subset would say?

For a test example z and random subsets A_1 … A_S of the training set, each with models retrained on it,

    LDS(z) = spearman( [Σ_{i ∈ A_s} score(z, i)]_s , [mean over seeds of f(z; θ(A_s, seed))]_s ),

and the LDS of a method is its mean over test examples (Park et al. 2023, "TRAK: Attributing Model Behavior at
Scale", section 2; the linear datamodels it rests on are those of Ilyas et al. 2022, "Datamodels: Predicting
Predictions from Training Data").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from scipy.stats import rankdata

from byline.evaluate.bank import Bank
from byline.evaluate.measure import array_of, check_bootstrap, percentile

Correlation = Callable[[np.ndarray, np.ndarray], np.ndarray]

_SPLITS = 20  # ways of halving the seeds that are averaged, where there are more
_NOTHING = 1e-5  # rounding of 1 - r² in the bootstrap's float32; a swap of two ranks in 150 subsets is more
_CELLS = 500_000  # float32 cells of the bootstrap's largest array: 2 MB stay in the cache


@dataclass(frozen=True, eq=False)
class LDS:
    """How well scores foretell retraining.

    Attributes:
        mean: Mean over the test examples that count.
        interval: Bootstrap confidence interval of the mean, (low, high), over subsets and test examples
            together; NaN if no bootstrap was asked for.
        per_example: (n_test,) float64; NaN where the bank's outputs or the summed scores are constant, and of a partial
            LDS where the baselines rank as the bank does.
        ceiling: What a perfect prediction of the expected output would reach against this bank: the root of
            the reliability of the mean over seeds, see `noise_ceiling`. NaN with one seed. Of a partial LDS that of
            what the baselines leave, see `partial_lds`: neither it nor the mean is on the scale of an LDS.
        split_half: Mean rank correlation between halves of the seeds, as it is. NaN with one seed.
        left_out: Number of test examples without a value.
        subsets: Number of subsets.
        confidence: That of the interval.
        name: What it is called: "LDS", or "partial LDS" of `byline.partial_lds`.
    """

    mean: float
    interval: tuple[float, float]
    per_example: np.ndarray = field(repr=False)
    ceiling: float
    split_half: float
    left_out: int
    subsets: int
    confidence: float
    name: str = "LDS"

    def __float__(self) -> float:
        return self.mean

    def __repr__(self) -> str:
        low, high = self.interval
        parts = [f"{self.name} {self.mean:.3f}"]
        if np.isfinite(low):
            parts.append(f"{self.confidence * 100:g} % interval {low:.3f} to {high:.3f}")
        parts.append(f"{len(self.per_example) - self.left_out} test examples × {self.subsets} subsets")
        if np.isfinite(self.ceiling):
            parts.append(f"noise ceiling {self.ceiling:.3f} (halves agree {self.split_half:.3f})")
        if self.left_out:
            why = "constant" if self.name == "LDS" else "constant or fully explained"
            parts.append(f"{self.left_out} {why} test examples left out")
        return ", ".join(parts)


def lds(scores: Any, bank: Bank, *, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0) -> LDS:
    """The linear datamodeling score of scores against a bank.

    Args:
        scores: `byline.Scores`, or an array or tensor, (n_test, n_train); positive means proponent.
        bank: The ground truth, of the same training and test examples in the same order.
        bootstrap: Resamples for the interval; 0 for none. Time and memory grow with the square of the
            subsets.
        confidence: Of the interval, between 0 and 1.
        seed: Of the resamples.

    Returns:
        The score with its interval and noise ceiling.

    Raises:
        ValueError: If shapes do not match, a score is not finite, or the bank has fewer than 3 subsets.
    """
    return _judged(scores, bank, [], bootstrap, confidence, seed)


@dataclass(frozen=True, eq=False)
class LDSDifference:
    """How much better one set of scores foretells retraining than another.

    Attributes:
        mean: Difference of the mean LDS, over the test examples that count for both.
        interval: Bootstrap confidence interval of the difference, (low, high).
        per_example: (n_test,) float64; NaN where either LDS is.
        confidence: That of the interval.
    """

    mean: float
    interval: tuple[float, float]
    per_example: np.ndarray = field(repr=False)
    confidence: float

    def __float__(self) -> float:
        return self.mean

    def __repr__(self) -> str:
        low, high = self.interval
        return f"LDS difference {self.mean:+.3f}, {self.confidence * 100:g} % interval {low:+.3f} to {high:+.3f}"


def lds_difference(
    scores: Any,
    baseline: Any,
    bank: Bank,
    *,
    given: Any = None,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LDSDifference:
    """The LDS of scores minus that of a baseline's, against one bank.

    Both are judged on the same resamples of subsets and test examples, so that what makes a bank or a test example
    hard for both cancels: the interval is narrower than two intervals side by side suggest.

    Args:
        scores: `byline.Scores`, or an array or tensor, (n_test, n_train); positive means proponent.
        baseline: The same, of what it is compared with.
        bank: The ground truth of both.
        given: What is taken as known, as the baselines of `partial_lds`: the difference is then of two partial LDS.
        bootstrap: Resamples for the interval.
        confidence: Of the interval, between 0 and 1.
        seed: Of the resamples.

    Returns:
        The difference with its interval.

    Raises:
        ValueError: If shapes do not match, a score is not finite, or the bank has fewer than 3 subsets, or fewer than
            four to each of what is given.
    """
    mine, actual = _sums(scores, bank, "scores")
    theirs, _ = _sums(baseline, bank, "baseline")
    known = [] if given is None else _known(given, bank, "given")
    check_bootstrap(bootstrap, confidence, least=1)
    one, two = (partial_correlation(_pairs([x, actual, *known], spearman))[0] for x in (mine, theirs))
    each = one - two
    valid = np.isfinite(each)
    if not valid.any():
        nan = float("nan")
        return LDSDifference(nan, (nan, nan), each, confidence)
    # a generator each, alike: the same resamples
    one, two = (
        _resample(predicted[valid], actual[valid], bootstrap, np.random.default_rng(seed), *(x[valid] for x in known))
        for predicted in (mine, theirs)
    )
    return LDSDifference(float(each[valid].mean()), percentile(one - two, confidence), each, confidence)


def partial_lds(
    scores: Any, baselines: Any, bank: Bank, *, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0
) -> LDS:
    """What scores foretell of retraining beyond what baselines foretell already: the partial rank correlation.

        partial(z) = (r_xy - r_xb r_yb) / sqrt((1 - r_xb²) (1 - r_yb²)),

    with r the rank correlation over subsets of x, the summed scores, y, the bank's outputs, and b, the summed scores of
    a baseline (Yule 1907, "On the theory of correlation for any number of variables", on ranks as Kendall 1942,
    "Partial rank correlation"); of several baselines one after the other.

    An LDS asks in great part what is in the data: a method that has never seen the model may have a good one. With
    the scores of such methods as baselines this asks for the rest.

    Args:
        scores: `byline.Scores`, or an array or tensor, (n_test, n_train); positive means proponent.
        baselines: The same, of what is taken as known; or a list or tuple of several.
        bank: The ground truth of all.
        bootstrap: Resamples for the interval; 0 for none.
        confidence: Of the interval, between 0 and 1.
        seed: Of the resamples.

    Returns:
        As `byline.lds` does. Scores that rank the subsets as a baseline does have 0, and a baseline that is constant
        for a test example says nothing of it. The ceiling is that of a perfect prediction, sqrt((ρ - R²) / (1 - R²))
        with ρ the bank's reliability and R² the share of its ranks that the baselines explain, adjusted for how much
        as many would by chance (Ezekiel 1930), in the mean over test examples. It is no share of an LDS: the scale is
        that of what the baselines leave.

    Raises:
        ValueError: If shapes do not match, a score is not finite, there is no baseline, or the bank has fewer than 3
            subsets, or fewer than four to each baseline.
    """
    return _judged(scores, bank, _known(baselines, bank, "baselines"), bootstrap, confidence, seed)


def _known(baselines: Any, bank: Bank, name: str) -> list[np.ndarray]:
    """What each of one or several baselines foretells, (n_test, subsets).

    Raises:
        ValueError: None, too many, or one that does not fit.
    """
    # a list of rows of numbers is one matrix
    several = isinstance(baselines, list | tuple) and (not baselines or any(_depth(each) != 1 for each in baselines))
    count, most = len(baselines) if several else 1, len(_bank(bank).subsets) // 4
    if not 0 < count <= most:
        raise ValueError(
            f"{name}: got {count} for a bank of {len(bank.subsets)} subsets; expected at least one, and at most one to "
            "every four subsets, for more explain much by chance"
        )
    if not several:
        return [_sums(baselines, bank, name)[0]]
    return [_sums(each, bank, f"{name}[{i}]")[0] for i, each in enumerate(baselines)]


def _depth(value: Any) -> int:
    """How many indices it takes: 1 of a row of numbers."""
    value = getattr(value, "values", value)
    if isinstance(value, list | tuple):
        return 1 + max(map(_depth, value), default=0)
    return getattr(value, "ndim", 0)


def _judged(scores: Any, bank: Bank, known: list[np.ndarray], bootstrap: int, confidence: float, seed: int) -> LDS:
    """The LDS, partial given what baselines foretell, (n_test, subsets) each."""
    predicted, actual = _sums(scores, bank, "scores")
    check_bootstrap(bootstrap, confidence)
    split_half, ceiling = noise_ceiling(bank)
    each, explained, used = partial_correlation(_pairs([predicted, actual, *known], spearman))
    valid = np.isfinite(each)
    if known and valid.any():
        subsets = len(bank.subsets)
        adjusted = 1 - (1 - explained) * (subsets - 1) / (subsets - 1 - used)
        share = adjusted[valid].mean()
        ceiling = float(np.sqrt(np.clip((ceiling**2 - share) / (1 - share), 0.0, 1.0)))
    interval = (float("nan"), float("nan"))
    if bootstrap and valid.any():
        given, rng = [x[valid] for x in known], np.random.default_rng(seed)
        interval = percentile(_resample(predicted[valid], actual[valid], bootstrap, rng, *given), confidence)
    return LDS(
        mean=float(each[valid].mean()) if valid.any() else float("nan"),
        interval=interval,
        per_example=each,
        ceiling=ceiling,
        split_half=split_half,
        left_out=int((~valid).sum()),
        subsets=len(bank.subsets),
        confidence=confidence,
        name="partial LDS" if known else "LDS",
    )


def _pairs(values: list[np.ndarray], correlation: Correlation) -> np.ndarray:
    """(k, k, …) the correlations of each pair, ones with themselves."""
    places = list(combinations(range(len(values)), 2))
    each = [correlation(values[a], values[b]) for a, b in places]
    found = np.ones((len(values), len(values), *each[0].shape), dtype=each[0].dtype)
    for (a, b), value in zip(places, each, strict=True):
        found[a, b] = found[b, a] = value
    return found


def partial_correlation(r: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The partial correlation of the first and the second given all others.

    Where 1 - r² is below `_NOTHING`, the first is explained, and its partial correlation 0; another is known
    already, and says nothing more; of the second nothing is left, and the correlation is NaN. A correlation with one of
    the others that is NaN counts as 0.

    Args:
        r: (k, k, …) correlations.

    Returns:
        That, the share of the second that the others explain, and how many of them are not explained by those after
        them, (…) each.
    """
    left, used = np.ones_like(r[0, 1]), np.zeros(r.shape[2:], dtype=int)
    r = np.concatenate([r[:2], np.nan_to_num(r[2:])])
    r = np.concatenate([r[:, :2], np.nan_to_num(r[:, 2:])], axis=1)
    while len(r) > 2:
        last = r[-1]
        rest = 1 - last[:-1] ** 2  # (k - 1, …)
        used = used + (last[-1] != 0)
        left = left * rest[1]
        with np.errstate(invalid="ignore", divide="ignore"):
            r = (r[:-1, :-1] - last[:-1, None] * last[None, :-1]) / np.sqrt(rest[:, None] * rest[None, :])
        r = np.clip(r, -1, 1)
        gone = rest < _NOTHING  # NaN is not below anything, and stays
        r = np.where(gone[:, None] | gone[None, :], 0.0, r)
        r = np.where(gone[1], np.nan, r)
    return r[0, 1], 1 - left, used


def _sums(scores: Any, bank: Bank, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What scores foretell of each subset, and what the bank says, both (n_test, subsets)."""
    _bank(bank)
    values = _values(scores, name)
    if values.shape != (bank.n_test, bank.n_train):
        raise ValueError(
            f"{name}: got shape {values.shape}; the bank expects (n_test, n_train) = ({bank.n_test}, {bank.n_train})"
        )
    if not np.isfinite(values).all():
        z, i = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"{name}: test example {z}, training example {i} is {values[z, i]}; expected finite numbers")
    if len(bank.subsets) < 3:
        raise ValueError(f"bank: has {len(bank.subsets)} subsets; a rank correlation needs at least 3")
    return values.astype(np.float64) @ bank.subsets.T.astype(np.float64), bank.outputs.astype(np.float64).mean(1).T


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of `a` with that of `b`, (rows,); NaN where either row is constant."""
    a, b = (rankdata(x, axis=1) - (x.shape[1] + 1) / 2 for x in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def noise_ceiling(bank: Bank, correlation: Correlation = spearman) -> tuple[float, float]:
    """How far the bank's noise lets any prediction come: (split-half, ceiling); NaN with one seed.

    The correlation over subsets between the mean outputs of two disjoint halves of the seeds, taken for each
    test example and averaged over them (and over the ways to halve the seeds, 20 at most), is stepped up to
    the mean of all seeds by the Spearman-Brown formula. The root of that reliability is the correlation a
    perfect predictor would have (Spearman 1904). The root is taken of the mean: each example's own estimate
    is so noisy that the mean of their roots would be far above zero for a bank of pure noise. Where
    reliabilities differ this errs upwards, as a ceiling should. A negative mean counts as none. `correlation` takes
    the place of the rank correlation, row by row.
    """
    seeds = bank.seeds
    if seeds < 2:
        return float("nan"), float("nan")
    half, outputs = seeds // 2, bank.outputs.astype(np.float64)
    correlations = [
        correlation(outputs[:, list(left)].mean(1).T, outputs[:, list(right)].mean(1).T)
        for left, right in _halves(seeds, half)
    ]
    halves = np.mean(correlations, axis=0)
    halves = halves[np.isfinite(halves)]
    if not len(halves):
        return float("nan"), float("nan")
    mean, factor = float(halves.mean()), seeds / half
    clipped = max(mean, 0.0)
    return mean, float(np.sqrt(factor * clipped / (1 + (factor - 1) * clipped)))


def _halves(seeds: int, half: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of disjoint sets of `half` seeds: all halvings if they are few, else a fixed random sample."""
    if comb(seeds, half) <= 2 * _SPLITS:
        pairs = []
        for left in combinations(range(seeds), half):
            rest = [r for r in range(seeds) if r not in left]
            pairs += [(left, right) for right in combinations(rest, half) if left < right]
        return pairs
    rng = np.random.default_rng(0)
    orders = [rng.permutation(seeds).tolist() for _ in range(_SPLITS)]
    return [(tuple(order[:half]), tuple(order[half : 2 * half])) for order in orders]


def _resample(
    predicted: np.ndarray, actual: np.ndarray, draws: int, rng: np.random.Generator, *known: np.ndarray
) -> np.ndarray:
    """The mean rank correlation of each bootstrap resample of subsets and rows, (draws,).

    All are (rows, subsets); the correlation is partial given what is known. Drawing subset j w_j times gives subset i
    the centred rank Σ_j w_j sign(x_i - x_j) / 2, ties averaged, so the ranks of all resamples are one matrix product,
    and nothing is sorted again. Their weighted mean is zero by antisymmetry.
    """
    rows, subsets = actual.shape
    subset_counts = rng.multinomial(subsets, np.full(subsets, 1 / subsets), draws).astype(np.float32)
    row_counts = rng.multinomial(rows, np.full(rows, 1 / rows), draws)
    correlations = np.empty((rows, draws), dtype=np.float32)
    step = max(1, _CELLS // (subsets * max(draws, subsets)))
    weights = subset_counts.T
    for start in range(0, rows, step):
        part = slice(start, start + step)
        ranks = [
            np.sign(x[part, :, None] - x[part, None, :]).astype(np.float32) @ weights
            for x in (predicted, actual, *known)
        ]
        for x in ranks:  # (rows, subsets, draws) each
            scaled = x * np.sqrt(weights)
            with np.errstate(invalid="ignore", divide="ignore"):
                np.divide(scaled, np.sqrt((scaled * scaled).sum(1, keepdims=True)), out=x)
        correlations[part] = partial_correlation(_pairs(ranks, lambda a, b: (a * b).sum(1)))[0]
    finite = np.isfinite(correlations)  # a resample of very few subsets may be constant
    if known:  # the correlation of what is left of so few is chance
        finite &= (subset_counts > 0).sum(1) >= len(known) + 3
    counts = row_counts.T * finite
    with np.errstate(invalid="ignore"):
        return (np.where(finite, correlations, 0) * counts).sum(0) / counts.sum(0)


def _bank(bank: Any) -> Bank:
    if not isinstance(bank, Bank):
        raise ValueError(f"bank is a {type(bank).__name__}; expected a byline.Bank, as byline.retrain makes it")
    return bank


def _values(scores: Any, name: str) -> np.ndarray:
    array = array_of(scores, name)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: got a {type(scores).__name__} of {array.dtype}; expected a matrix of real numbers")
    return array
