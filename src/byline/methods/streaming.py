"""Top-k without the matrix: training examples pass by in chunks, and only the strongest so far are kept.

All members hold their prepared test rows (preconditioned gradients). For each chunk of training examples every member
gives its scores, the mean and the standard error over members are formed with the very code that forms the whole
matrices, and the chunk's best are merged into the running top-k. Test examples are taken in blocks, as many as what is
held of them fits; each block is one pass over the training examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from byline import batches
from byline.engines.local import Job
from byline.features.base import Products, Rows
from byline.methods.mean import RunningMean
from byline.progress import bar
from byline.scores import Ranked

if TYPE_CHECKING:
    from byline.methods.base import Attributor, Voter

HELD = 2**28
"""Bytes of prepared test rows, over all members."""
MATRIX = 2**28
"""Bytes of one block's scores where a method does not stream."""
_TESTS = 4096  # in a block at most
_ROWS = (4096, 1024)  # training examples of a chunk: narrow rows, wide rows
_NARROW = 4096  # columns
_LARGER = 4  # times the chunks of rows that are in memory, as many times fewer test examples in a block


@dataclass
class Query:
    """A batch of test examples as one member holds them.

    Attributes:
        nbytes: what is held.
        against: (train, start, stop) -> (B, stop - start) what the member says of the training examples at that place,
            given their rows.
    """

    nbytes: int
    against: Callable[[Any, int, int], Tensor]

    @classmethod
    def of(cls, rows: Rows, against: Callable[[Any, int, int], Tensor]) -> Query:
        """One that holds these rows."""
        return cls(sum(value.numel() * value.element_size() for value in rows.values()), against)


class Best:
    """The k first so far of every row, by a key and, where keys are equal, by place."""

    def __init__(self, rows: int, k: int):
        self.k = k
        self.key = np.empty((rows, 0), np.float32)
        self.place = np.empty((rows, 0), np.int64)
        self.score = np.empty((rows, 0), np.float32)
        self.error = np.empty((rows, 0), np.float32)

    def add(self, start: int, sign: int, values: np.ndarray, errors: np.ndarray) -> None:
        """Scores (rows, n) of the training examples from ``start`` on, which come after all that came before."""
        key = sign * values
        # NaN would win or lose every comparison: it is last
        key[np.isnan(key)] = np.inf
        if self.key.shape[1] < self.k:
            # whoever reaches the k-th may be among the best, equal ones too: sorting all costs ten times as much
            bound = np.partition(key, self.k - 1, 1)[:, self.k - 1] if key.shape[1] > self.k else key.max(1)
            chosen = key <= bound[:, None]
        else:
            # what equals the last one kept came later, and stays behind it
            chosen = key < self.key[:, -1:]
        row, column = np.nonzero(chosen)
        if not len(row):
            return
        counts = np.bincount(row, minlength=len(key))
        kept = np.full((len(key), counts.max()), -1)
        kept[row, np.arange(len(row)) - (counts.cumsum() - counts)[row]] = column
        none = kept < 0
        merged = np.concatenate([self.key, np.where(none, np.inf, np.take_along_axis(key, kept, 1))], 1)
        order = np.argsort(merged, axis=1, kind="stable")[:, : self.k]
        for name, new in (("place", start + kept), ("score", None), ("error", None)):
            if new is None:
                new = np.take_along_axis(values if name == "score" else errors, kept, 1)
            setattr(self, name, np.take_along_axis(np.concatenate([getattr(self, name), new], 1), order, 1))
        self.key = np.take_along_axis(merged, order, 1)

    def ranked(self) -> Ranked:
        """What was kept."""
        return Ranked(self.place, self.score, self.error)


def top(attributor: Attributor, job: Job, k: int) -> tuple[Ranked, Ranked]:
    """Proponents and opponents of every test example of a job."""
    streams = all(attributor._streams(voter) for voter in attributor._voters)
    blocks = _streamed(attributor, job, k) if streams else _blockwise(attributor, job, k)
    found: list[tuple[Ranked, Ranked]] = []
    with bar(len(job.dataset), "top", job.progress) as advance:
        for first, last, best in blocks:
            found.append((best[0].ranked(), best[1].ranked()))
            advance(last - first, f"top {k} of {job.name}")
    return _joined([pair[0] for pair in found]), _joined([pair[1] for pair in found])


def spans(attributor: Attributor, voters: list[Voter], resident: bool) -> list[tuple[int, int]]:
    """The chunks of the training set: the same for all voters, whatever the test examples.

    Few vectors against rows in memory take so little time that larger chunks pay.
    """
    wide = max(attributor._stored(voter).columns for voter in voters) > _NARROW
    return batches.spans(attributor.n_train_, _ROWS[wide] * (_LARGER if resident else 1))


Block = tuple[int, int, tuple[Best, Best]]


def _streamed(attributor: Attributor, job: Job, k: int) -> Iterator[Block]:
    shared, voters = attributor._shared(), attributor._voters
    readers = [attributor._reader(voter) for voter in voters]
    chunks = spans(attributor, voters, bool(attributor._resident))
    first, n = 0, len(job.dataset)
    while first < n:
        held, last = _hold(attributor, job, shared, first)
        best = Best(last - first, k), Best(last - first, k)
        for start, stop in chunks:
            # factors that several members share are multiplied once per chunk
            attributor._products = Products(shared)
            mean = _mean(attributor, (last - first, stop - start))
            for voter, read, queries in zip(voters, readers, held, strict=True):
                attributor._begin(mean, voter, slice(start, stop))
                train = read(start, stop)
                for a, b, query in queries:
                    mean.add(a - first, b - first, query.against(train, start, stop))
            values, errors = attributor._finish(mean, slice(start, stop))
            best[0].add(start, -1, values, errors)
            best[1].add(start, 1, values, errors)
        yield first, last, best
        first = last


def _hold(
    attributor: Attributor, job: Job, shared: set[str], first: int
) -> tuple[list[list[tuple[int, int, Query]]], int]:
    """Every member's queries from test example ``first`` on, as many as fit; where they end."""
    held: list[list[tuple[int, int, Query]]] = []
    block = max(1, _TESTS // _LARGER) if attributor._resident else _TESTS
    last = min(len(job.dataset), first + block)
    for voter in attributor._voters:
        own: list[tuple[int, int, Query]] = []
        with closing(attributor._queries(voter, replace(job, first=first, last=last), shared)) as queries:
            for start, stop, query in queries:
                own.append((start, stop, query))
                # the first member finds out how many there is room for
                if not held and sum(q.nbytes for _, _, q in own) * len(attributor._voters) >= HELD:
                    last = stop
                    break
        held.append(own)
    return held, last


def _blockwise(attributor: Attributor, job: Job, k: int) -> Iterator[Block]:
    """Blocks of test examples against all training examples, one member after the other."""
    shared, n = attributor._shared(), attributor.n_train_
    size = min(_TESTS, max(1, MATRIX // (4 * n)))
    for first, last in batches.spans(len(job.dataset), size):
        window = replace(job, first=first, last=last)
        attributor._products = Products(shared)
        mean = _mean(attributor, (last - first, n))
        for voter in attributor._voters:
            attributor._begin(mean, voter)
            for a, b, votes in attributor._votes(voter, window, shared):
                mean.add(a - first, b - first, votes)
        values, errors = attributor._finish(mean)
        best = Best(last - first, k), Best(last - first, k)
        best[0].add(0, -1, values, errors)
        best[1].add(0, 1, values, errors)
        yield first, last, best


def _mean(attributor: Attributor, shape: tuple[int, int]) -> RunningMean:
    return RunningMean(lambda: np.zeros(shape, np.float32), attributor._with_residuals)


def _joined(parts: list[Ranked]) -> Ranked:
    return Ranked(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("indices", "scores", "stderr"))
    )
