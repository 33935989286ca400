"""What members say of test examples, as pieces of work: a member and a range of test examples each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from byline.engines.base import HERE, Work
from byline.engines.local import Job, shared_device, shared_place
from byline.engines.workbench import Workbench
from byline.features.base import Products
from byline.guards import Lock
from byline.ledger import Ledger
from byline.progress import Advance
from byline.store import Store

if TYPE_CHECKING:
    from byline.methods.base import Attributor

Piece = tuple[int, int, int]
"""The place of a voter, and the first and last of its test examples."""
Block = tuple[int, int, Tensor]
"""Test examples from, to, and (to - from, n_train) what a member says of them."""

_SPAN = 1024  # test examples


class Voting(Work):
    """A fitted attributor's votes.

    Args:
        attributor: whose.
        job: the test examples; None for the training examples' scores for themselves.
        shared: digests of stored arrays that several members have.
    """

    what = "the attributor, its training set and the test set"

    def __init__(self, attributor: Attributor, job: Job | None, shared: set[str]):
        self.attributor, self.job, self.shared = attributor, job, shared

    def pieces(self, processes: int) -> list[Piece]:
        """Voter by voter; in ranges of test examples where several processes share the work."""
        length, step = 1, 1
        if self.job is not None:
            length, size = len(self.job.dataset), self.job.batch_size
            # whole batches, so that every batch is the one that it is in one process
            step = -(-_SPAN // size) * size if processes else length
        ranges = [(start, min(start + step, length)) for start in range(0, length, step)]
        return [(place, *span) for place in range(len(self.attributor._voters)) for span in ranges]

    def do(self, piece: Piece, advance: Advance) -> Iterator[Block]:
        """The votes, batch by batch, as they are asked for."""
        place, first, last = piece
        voter = self.attributor._voters[place]
        if self.job is None:
            yield 0, 1, self.attributor._self(voter).unsqueeze(0)
            advance(1, f"self-influence of {voter.member.name}")
            return
        part = replace(self.job, first=first, last=last, ledger=self.attributor.ledger)
        for block in self.attributor._votes(voter, part, self.shared):
            yield block
            advance(block[1] - block[0], f"scores of {voter.member.name}")

    def steps(self, piece: Piece) -> float:
        """Test examples."""
        return 1 if self.job is None else piece[2] - piece[1]

    def send(self, result: Iterator[Block]) -> tuple[list[Block], dict[str, Any], Ledger | None]:
        """All of the votes, what was noted meanwhile, and what it cost."""
        attributor = self.attributor
        if attributor.ledger is None:
            return list(result), attributor._noted(), None
        attributor.ledger = Ledger()
        with attributor.ledger.phase("serving"):
            blocks = list(result)
        return blocks, attributor._noted(), attributor.ledger

    def receive(self, sent: tuple[list[Block], dict[str, Any], Ledger | None]) -> Iterator[Block]:
        """The votes again."""
        blocks, noted, ledger = sent
        self.attributor._note(noted)
        if ledger is not None and self.attributor.ledger is not None:
            for phase, cost in ledger.costs.items():
                # the clock on the wall is the driver's
                self.attributor.ledger.add(phase, replace(cost, wall=0.0))
        return iter(blocks)

    def __getstate__(self) -> dict[str, Any]:
        made = self.attributor
        return {
            "class": type(made),
            "attributes": made._sent(),
            "counts": made.ledger is not None,
            "place": shared_place(made.store),
            "device": shared_device(made._bench.device),
            "job": None if self.job is None else replace(self.job, ledger=None, progress=False),
            "shared": self.shared,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        made = object.__new__(state["class"])
        vars(made).update(state["attributes"])
        made.engine, made.progress = HERE, False
        made.ledger = Ledger() if state["counts"] else None
        made.store = Store(state["place"], worker=True)
        made._let_go()
        made._lock = Lock()
        made._bench = Workbench(made.task, made._train_set, made.collate, state["device"])
        made._products = Products(state["shared"])
        self.attributor, self.job, self.shared = made, state["job"], state["shared"]
