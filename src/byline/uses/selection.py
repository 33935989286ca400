"""Which training examples to keep, for the sake of a target set.

What an example does for the target is its mean score over target examples: by the linear datamodel, the sum over kept
examples foretells the target's mean output (Ilyas et al. 2022; Engstrom et al. 2024, "DsDm: Model-Aware Dataset
Selection with Datamodels"). Taken alone that keeps ten copies of one good example. So each further example counts for
less where it helps the same target examples in the same way as one that is kept already: greedily,

    gain(i | S) = m_i - diversity · |m_i| · max_{j ∈ S} max(0, cos(s_·i, s_·j)),

m_i the mean of column i and s_·i the column: its effects on all target examples. The form is that of maximal marginal
relevance (Carbonell & Goldstein 1998).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from byline.evaluate.measure import labels_of, matrix_of

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Selection:
    """What to keep.

    Attributes:
        keep: Places in the training set, the first chosen first.
        drop: The others, the most harmful first.
        value: (n_train,) mean score over the target examples.
        groups: How many of each group are kept; empty without groups.
    """

    keep: Array
    drop: Array
    value: Array = field(repr=False)
    groups: dict[Any, int] = field(default_factory=dict)

    @property
    def mask(self) -> Array:
        """(n_train,) bool, True where kept."""
        found = np.zeros(len(self.value), dtype=bool)
        found[self.keep] = True
        return found


def select(
    scores: Any,
    budget: int | float,
    *,
    diversity: float = 0.0,
    groups: Any = None,
    per_group: str = "free",
) -> Selection:
    """The training examples that do most for a target set.

    Args:
        scores: `byline.Scores` or an array (n_target, n_train) on the target examples. Outputs whose rise is good:
            margins, log-likelihoods.
        budget: How many to keep, an int; or a share of the training set, a float between 0 and 1.
        diversity: How much an example loses that does what a kept one does already: 0 for nothing, 1 for all of it
            where it is an exact copy. Time grows with budget × n_train × n_target.
        groups: (n_train,) a group each, such as the class or the source.
        per_group: ``"free"``: groups are only counted; ``"same"``: each keeps its share of the training set, to
            rounding; ``"balanced"``: each keeps the same number, as far as it has so many.

    Returns:
        What to keep and what to drop.

    Raises:
        ValueError: An argument out of range, scores that are not finite, or groups of another length.
    """
    values = matrix_of(scores).astype(np.float32)
    n = values.shape[1]
    count = _count(budget, n)
    if not isinstance(diversity, int | float) or isinstance(diversity, bool) or not 0 <= diversity <= 1:
        raise ValueError(f"diversity is {diversity!r}; expected a number from 0 to 1")
    if per_group not in ("free", "same", "balanced"):
        raise ValueError(f"per_group is {per_group!r}; expected 'free', 'same' or 'balanced'")
    if groups is None and per_group != "free":
        raise ValueError(f"per_group is {per_group!r}, which needs groups")
    whose = None if groups is None else labels_of(groups, n, "groups")
    mean = values.mean(0, dtype=np.float64)
    rooms = {None: (np.arange(n), count)} if whose is None or per_group == "free" else _rooms(whose, count, per_group)
    chosen = [_greedy(values, mean, members, room, float(diversity)) for members, room in rooms.values()]
    keep = np.concatenate(chosen)
    keep = keep[np.argsort(-mean[keep], kind="stable")] if len(chosen) > 1 else keep
    rest = np.setdiff1d(np.arange(n), keep)
    counts = {} if whose is None else {g: int((whose[keep] == g).sum()) for g in np.unique(whose).tolist()}
    return Selection(keep, rest[np.argsort(mean[rest], kind="stable")], mean, counts)


def _greedy(values: Array, mean: Array, members: Array, room: int, diversity: float) -> Array:
    """The best of some examples, one after the other."""
    if not diversity:
        return members[np.argsort(-mean[members], kind="stable")[:room]]
    columns = values[:, members]
    columns = columns / np.maximum(np.linalg.norm(columns, axis=0, keepdims=True), 1e-30)
    own = mean[members]
    alike, taken, out = np.zeros(len(members), np.float32), np.zeros(len(members), bool), []
    for _ in range(room):
        gain = np.where(taken, -np.inf, own - diversity * np.abs(own) * alike)
        best = int(gain.argmax())
        taken[best] = True
        out.append(members[best])
        np.maximum(alike, columns[:, best] @ columns, out=alike)
    return np.array(out)


def _count(budget: Any, n: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, int | float | np.integer | np.floating):
        raise ValueError(f"budget is {budget!r}; expected an int, or a share between 0 and 1")
    whole = isinstance(budget, int | np.integer)
    count = int(budget) if whole else round(float(budget) * n) if 0 < budget < 1 else 0
    if not 1 <= count <= n:
        raise ValueError(
            f"budget is {budget!r}; expected an int from 1 to the {n} training examples, or a share of them"
        )
    return count


def _rooms(whose: Array, count: int, how: str) -> dict[Any, tuple[Array, int]]:
    """The members of each group and how many of them may stay."""
    names, sizes = np.unique(whose, return_counts=True)
    exact = sizes * count / len(whose) if how == "same" else _levelled(sizes, count)
    room = np.floor(exact + 1e-9).astype(int)
    # what rounding left over goes where most of it was cut off
    for place in np.argsort(-(exact - room), kind="stable")[: count - room.sum()]:
        room[place] += 1
    places = [np.flatnonzero(whose == name) for name in names]
    return {name: (members, int(r)) for name, members, r in zip(names.tolist(), places, room, strict=True)}


def _levelled(sizes: Array, count: int) -> Array:
    """As many from each group, but no more than it has: the level at which they add up to the budget."""
    level, left, out = 0.0, float(count), np.zeros(len(sizes))
    for rank, place in enumerate(np.argsort(sizes, kind="stable")):
        level = left / (len(sizes) - rank)
        out[place] = min(float(sizes[place]), level)
        left -= out[place]
    return out
