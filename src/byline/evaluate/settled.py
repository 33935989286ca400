"""Are there enough members? What their agreement foretells of the ranking (Spearman 1910; Brown 1910)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from byline.evaluate.lds import spearman
from byline.votes import Votes


@dataclass(frozen=True, eq=False)
class Settled:
    """Whether more members would change the ranking.

    Attributes:
        agreement: Mean rank correlation between two votes' scores, over pairs and test examples.
        reliability: What that says of the mean of all: the expected rank correlation with another ensemble like it.
        members: How many votes there are.
        needed: How many reach the target; None where votes do not agree at all.
        target: The reliability asked for.
    """

    agreement: float
    reliability: float
    members: int
    needed: int | None
    target: float

    @property
    def enough(self) -> bool:
        """Whether the target is reached."""
        return self.reliability >= self.target

    def __repr__(self) -> str:
        needed = "more than can be said" if self.needed is None else str(self.needed)
        return (
            f"{self.members} members, reliability {self.reliability:.2f} (votes agree {self.agreement:.2f}); "
            f"{self.target:.2f} takes {needed}"
        )


def settled(votes: Votes, target: float = 0.6, *, examples: int = 100, seed: int = 0) -> Settled:
    """Are there enough members for the ranking of training examples to hold?

    Two ensembles of m members whose members agree with each other by r̄ agree by ``m r̄ / (1 + (m - 1) r̄)`` (Spearman
    1910, Brown 1910). So r̄, which two members suffice to estimate, says how many are needed:
    ``target (1 - r̄) / (r̄ (1 - target))``.

    It says that the ranking is repeatable. Whether it is *right* only retraining can say (`byline.lds`). On digits,
    beyond a reliability of 0.5 to 0.6 more members add little to the LDS; a ranking that is quoted example by example
    wants more.

    Args:
        votes: Of the members so far, at least two.
        target: The reliability wanted, between 0 and 1.
        examples: At most so many test examples are looked at.
        seed: Of their choice.

    Raises:
        ValueError: One vote, or a target out of range.
    """
    if len(votes) < 2:
        raise ValueError(f"votes holds {len(votes)}; agreement needs at least 2")
    if not 0 < target < 1:
        raise ValueError(f"target is {target!r}; expected a number between 0 and 1")
    chosen = np.sort(np.random.default_rng(seed).permutation(votes.shape[0])[:examples])
    # a vote's own score, as if it were the whole ensemble
    own = [votes.mean(np.eye(len(votes))[m], chosen) for m in range(len(votes))]
    pairs = [np.nanmean(spearman(a, b)) for i, a in enumerate(own) for b in own[:i]]
    agreement = float(np.mean(pairs))
    m = len(votes)
    if agreement <= 0:
        return Settled(agreement, 0.0, m, None, target)
    reliability = m * agreement / (1 + (m - 1) * agreement)
    needed = max(1, int(np.ceil(target * (1 - agreement) / (agreement * (1 - target)) - 1e-9)))
    return Settled(agreement, reliability, m, needed, target)
