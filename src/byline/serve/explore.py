"""What the page asks: all scores of one example, what removing some would change, and where a training example leads.

The error of a sum of scores is not the sum of their errors: what one member rates high it rates high elsewhere too. So
what each member says is kept, as its deviation from the mean to first order,

    d_m(i) = k_m(i) - k̄(i),    or    q̄(i) (k_m(i) - k̄(i)) + k̄(i) (q_m(i) - q̄(i))    where Q is averaged apart (TRAK),

of which the score's own error is √(c Σ_m w_m d_m(i)²), and that of a sum over S is √(c Σ_m w_m (Σ_{i∈S} d_m(i))²): the
same delta method, so that the error of removing one example is the error of its score.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from byline import batches
from byline.engines.local import Job
from byline.features.base import Products
from byline.methods import streaming
from byline.methods.base import Attributor, Voter
from byline.methods.influence import Influence
from byline.methods.mean import RunningMean
from byline.methods.trak import TRAK
from byline.scores import Scores
from byline.serve.contract import Served
from byline.serve.worker import Items, Refused

Array = np.ndarray

KNOWN = 1000  # test examples that a training example is followed to
_KEPT = 2**28  # bytes of answers that are kept, so that a change of mind costs no scoring


@dataclass(frozen=True, eq=False)
class Said:
    """What all members say of one example.

    Attributes:
        values: (n_train,) float32 scores.
        stderr: (n_train,) float32; NaN with one member.
        deviations: (voters, n_train) float32 how far each is from the mean, to first order; None where not known.
        weights: (voters,) what each weighs.
        factor: c above.
        output: the output now, the mean over the members that have gradients of their own.
        predicted: the class that they hold most probable; None where there are none.
    """

    values: Array
    stderr: Array
    deviations: Array | None
    weights: Array
    factor: float
    output: float
    predicted: int | None

    @property
    def nbytes(self) -> int:
        """What it takes to keep."""
        kept = 0 if self.deviations is None else self.deviations.nbytes
        return self.values.nbytes + self.stderr.nbytes + kept

    def total(self, places: Array) -> tuple[float, float, bool]:
        """The sum of some scores, its standard error, and whether that is only known to be no larger."""
        value = float(self.values[places].sum(dtype=np.float64))
        if self.deviations is not None:
            sums = self.deviations[:, places].sum(1, dtype=np.float64)
            return value, float(np.sqrt(self.factor * (self.weights @ sums**2))), False
        # errors that hang together in full add up
        return value, float(self.stderr[places].sum(dtype=np.float64)), len(places) > 1


class Explorer:
    """Asks a fitted attributor what the page wants to know; one call at a time.

    Args:
        served: fitted.
    """

    def __init__(self, served: Served):
        self.attributor: Attributor = served.attributor
        known = served.known
        self.known = known if len(known) <= KNOWN else Subset(known, range(KNOWN))
        self._said: OrderedDict[str, Said] = OrderedDict()
        self._queries: list[list[tuple[int, int, streaming.Query]]] = []
        self._last = 0
        self._matrix: Scores | None = None

    @property
    def unit(self) -> float | None:
        """What a sum of scores is multiplied by to be a change of the output; None where scores know no scale."""
        attributor = self.attributor
        if attributor.residual == "sqrt":
            # the root of how far an example still pushes is no step that leaving it out would undo
            return None
        if isinstance(attributor, Influence):
            return None if getattr(attributor, "normalization", None) else 1 / attributor.n_train_
        return 1.0 if isinstance(attributor, TRAK) else None

    def said(self, item: Any) -> Said:
        """All scores of one example; those asked for last are kept."""
        key = batches.digest_of(item)
        found = self._said.pop(key, None)
        found = self._ask(item) if found is None else found
        self._said[key] = found
        while len(self._said) > 1 and sum(one.nbytes for one in self._said.values()) > _KEPT:
            self._said.popitem(last=False)
        return found

    def predict(self, item: Any) -> int | None:
        """The class that the members hold most probable; None where the task has no classes."""
        if self.attributor.task.name != "classification":
            return None
        return self._forward(item, with_output=False)[1]

    def classes(self) -> int:
        """How many classes the model tells apart."""
        batch = self.attributor._bench.probe
        return int(self.attributor.task.natural(self.attributor._bench.model, batch)[0].shape[-1])

    def moved(self, index: int) -> tuple[Array, Array]:
        """The scores of one training example for every known example, and their errors, each (known,)."""
        a = self.attributor
        if not all(a._streams(voter) for voter in a._voters):
            return self._columns(index)
        while self.prepare():
            pass
        held, last = self._queries, self._last
        a._products = Products(a._shared())
        mean = RunningMean(lambda: np.zeros((last, 1), np.float32), a._with_residuals)
        for voter, queries in zip(a._voters, held, strict=True):
            a._begin(mean, voter, slice(index, index + 1))
            train = a._stored(voter).read(index, index + 1)
            for start, stop, query in queries:
                mean.add(start, stop, query.against(train, index, index + 1))
        values, errors = a._finish(mean, slice(index, index + 1))
        return values[:, 0], errors[:, 0]

    def prepare(self) -> bool:
        """One more member's side of the known examples, which every `moved` needs; whether there was one to make."""
        a, place = self.attributor, len(self._queries)
        if place == len(a._voters) or not all(a._streams(voter) for voter in a._voters):
            return False
        job, shared = a._job(self.known, "test_set", "output"), a._shared()
        a._products = Products(shared)
        own: list[tuple[int, int, streaming.Query]] = []
        last = self._last or len(self.known)
        with closing(a._queries(a._voters[place], replace(job, first=0, last=last), shared)) as queries:
            for query in queries:
                own.append(query)
                # as many as there is room for, which for rows without a projection may be few
                if not place and sum(q.nbytes for _, _, q in own) * len(a._voters) >= streaming.HELD:
                    break
        self._last = own[-1][1]
        self._queries.append(own)
        return True

    def _columns(self, index: int) -> tuple[Array, Array]:
        """Of a method that needs all training examples at once: the whole matrix, once."""
        if self._matrix is None:
            room = max(1, _KEPT // (8 * self.attributor.n_train_))
            self._matrix = self.attributor.attribute(Subset(self.known, range(min(room, len(self.known)))))
        return self._matrix.values[:, index], self._matrix.stderr[:, index]

    def _ask(self, item: Any) -> Said:
        a = self.attributor
        n, voters = a.n_train_, a._voters
        job, shared = a._job(Items([item]), "example", "output"), a._shared()
        a._products = Products(shared)
        mean = RunningMean(lambda: np.zeros((1, n), np.float32), a._with_residuals)
        votes = np.empty((len(voters), n), np.float32)
        for place, voter in enumerate(voters):
            a._begin(mean, voter)
            found = self._vote(voter, job, shared)
            votes[place] = found[0].detach().cpu().numpy()
            mean.add(0, 1, found)
        weights = np.array([voter.weight for voter in voters])
        deviations, factor = self._deviations(votes, weights), mean.error_factor
        values, errors = a._finish(mean)
        output, predicted = self._forward(item)
        if not np.isfinite(values).all():
            raise Refused("the example has scores that are not finite")
        known = np.isfinite(factor) and not (a._with_residuals and any(v.counted is not None for v in voters))
        return Said(values[0], errors[0], deviations if known else None, weights, factor, output, predicted)

    def _vote(self, voter: Voter, job: Job, shared: set[str]) -> torch.Tensor:
        """(1, n_train) what one member says, held against rows in memory where they are."""
        a = self.attributor
        if not a._streams(voter):
            return torch.cat([votes for _, _, votes in a._votes(voter, job, shared)])
        read, chunks = a._reader(voter), streaming.spans(a, a._voters, bool(a._resident))
        ((_, _, query),) = a._queries(voter, job, shared)
        return torch.cat([query.against(read(start, stop), start, stop) for start, stop in chunks], 1)

    def _deviations(self, votes: Array, weights: Array) -> Array:
        a = self.attributor
        share = (weights / weights.sum()).astype(np.float32)
        middle = share @ votes
        apart = votes - middle
        if a._with_residuals:
            residuals = torch.stack([a._q(voter) for voter in a._voters]).numpy().astype(np.float32)
            mean = share @ residuals
            apart *= mean
            apart += middle * (residuals - mean)
        return apart * np.float32(a._scale())

    def _forward(self, item: Any, with_output: bool = True) -> tuple[float, int | None]:
        """The output and the most probable class, means over members."""
        a, bench = self.attributor, self.attributor._bench
        batch = batches.to(batches.gather(Items([item]), [0], a.collate), bench.device)
        output, odds, total = 0.0, None, sum(voter.weight for voter in a._voters) or 1.0
        for voter in a._voters:
            with bench.active(voter.member, "gradient") as active, torch.no_grad():
                if with_output:
                    output += voter.weight / total * float(a.task.output(active.model, batch)[0])
                if a.task.name == "classification":
                    odds_of_one = a.task.natural(active.model, batch)[0][0, 0].softmax(0) * voter.weight
                    odds = odds_of_one if odds is None else odds + odds_of_one
        return output, None if odds is None else int(odds.argmax())
