"""Whose work is in it? The share of each owner in what a model made.

For a work z (a test example) and owners that each hold a part of the training set, an owner's *contribution* is the sum
of its examples' scores, which foretells how much the output would fall were all of them left out: scores add up as
linear datamodels do (Ilyas et al. 2022), and for additive games the Shapley value of a player is its own contribution
(Shapley 1953). Royalties cannot be negative, so contributions are made into shares by a *scheme*:

- ``"net"``: max(0, Σ_i s(z, i)) per owner, over their sum. An owner's examples that pushed the work away count against
  those that taught it. Splitting an owner's catalogue between two names changes the sum of their shares only where one
  of the parts is negative on the whole.
- ``"clipped"``: Σ_i max(0, s(z, i)) per owner, over their sum. Invariant: however a catalogue is split among names, the
  names together get what the one would have got. It pays for noise, too: an owner of many unrelated examples collects
  many small positive scores.
- ``"equal"``: every example the same, whatever its score: an owner's share of the training set. The control that any
  scheme has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from byline.evaluate.measure import labels_of
from byline.scores import Scores
from byline.votes import Interval, Votes

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
SCHEMES = ("net", "clipped", "equal")


@dataclass(frozen=True, eq=False)
class Shares:
    """What share each owner has in each work, and in all of them.

    Attributes:
        owners: The owners' names, in order.
        works: (n_test, owners) shares with intervals over members. A row sums to 1, or to 0 where nobody has a claim
            (no positive contribution).
        catalogue: (owners,) the mean over works that have a claim, with intervals over members.
        contributions: (n_test, owners) summed scores before the scheme, with intervals: signed, in the output's units.
        sizes: (owners,) how many training examples each has.
        scheme: Which.
    """

    owners: list[Any]
    works: Interval
    catalogue: Interval
    contributions: Interval
    sizes: Array
    scheme: str
    info: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_dataframe(self, work: int | None = None) -> pd.DataFrame:
        """A row per owner, the largest share first: owner, share, low, high, examples, contribution, distinct.

        Args:
            work: Which test example; the whole catalogue when left out.
        """
        import pandas as pd

        place: Any = slice(None) if work is None else work
        found = self.catalogue if work is None else self.works
        signed = self.contributions.value.mean(0) if work is None else self.contributions.value[work]
        frame = pd.DataFrame(
            {
                "owner": self.owners,
                "share": found.value[place],
                "low": found.low[place],
                "high": found.high[place],
                "examples": self.sizes,
                "contribution": signed,
            }
        )
        return frame.sort_values("share", ascending=False, kind="stable", ignore_index=True)

    def __repr__(self) -> str:
        lines = [f"Shares({len(self.works.value)} works, {len(self.owners)} owners, scheme {self.scheme!r})"]
        for row in self.to_dataframe().head(5).itertuples():
            width = "" if np.isnan(row.low) else f" ({row.low * 100:.1f} to {row.high * 100:.1f} %)"
            lines.append(f"  {row.owner}: {row.share * 100:.1f} %{width}, {row.examples} training examples")
        return "\n".join(lines)


def shares(
    source: Votes | Scores | Array,
    owners: Any,
    *,
    scheme: str = "net",
    draws: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Shares:
    """The share of each owner in each work.

    Args:
        source: `byline.Votes` (``attributor.votes(works)``), from which intervals come; or `byline.Scores` or an array
            (n_test, n_train), without intervals.
        owners: (n_train,) whose each training example is: strings or numbers.
        scheme: ``"net"``, ``"clipped"`` or ``"equal"``: see this module.
        draws: Resamples of members for the intervals.
        confidence: Of the intervals.
        seed: Of the resamples.

    Returns:
        Shares per work and over all works.

    Raises:
        ValueError: Owners of another length, one that is missing, or an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; expected one of {list(SCHEMES)}")
    votes = source if isinstance(source, Votes) else _alone(source)
    whose = labels_of(owners, votes.shape[1], "owners")
    missing = [i for i, owner in enumerate(whose.tolist()) if owner is None or owner == ""]
    if missing:
        raise ValueError(f"owners: training example {missing[0]} has none ({len(missing)} in all); expected one each")
    names, place = np.unique(whose.astype(str) if whose.dtype == object else whose, return_inverse=True)
    mine = np.zeros((votes.shape[1], len(names)), np.float32)
    mine[np.arange(len(place)), place] = 1
    sizes = mine.sum(0).astype(np.int64)

    def signed(scores: Array) -> Array:
        return scores @ mine

    def per_work(scores: Array) -> Array:
        if scheme == "equal":
            return np.broadcast_to(sizes / sizes.sum(), (len(scores), len(names)))
        claim = np.maximum(scores @ mine, 0) if scheme == "net" else np.maximum(scores, 0) @ mine
        total = claim.sum(1, keepdims=True)
        return np.divide(claim, total, out=np.zeros_like(claim), where=total > 0)

    def overall(scores: Array) -> Array:
        found = per_work(scores)
        claimed = found.sum(1) > 0
        return found[claimed].mean(0) if claimed.any() else np.zeros(len(names))

    options: dict[str, Any] = {"draws": draws, "confidence": confidence, "seed": seed}
    return Shares(
        owners=names.tolist(),
        works=votes.bootstrap(per_work, **options),
        catalogue=votes.bootstrap(overall, **options),
        contributions=votes.bootstrap(signed, **options),
        sizes=sizes,
        scheme=scheme,
        info=votes.info,
    )


def _alone(source: Any) -> Votes:
    """Scores as the one vote that they are."""
    scores = source if isinstance(source, Scores) else Scores(source)
    if not np.isfinite(scores.values).all():
        raise ValueError("source has scores that are not finite")
    return Votes(scores.values[None], np.ones(1), None, np.zeros(1, np.int64), info=scores.info)
