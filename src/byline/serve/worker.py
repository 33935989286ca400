"""The one thread that scores: members take turns on one copy of the model, so requests wait for one another.

Whatever waits when the thread becomes free is scored together, up to the limit of a batch: one pass over the training
examples then serves several requests. What the explorer asks waits in the same queue, and is done by itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from byline import batches
from byline.ledger import Ledger
from byline.methods.base import Attributor
from byline.scores import Ranked
from byline.serve.limits import Limits

_log = logging.getLogger("byline.serve")

Answer = list[tuple[Ranked, Ranked]]
"""Proponents and opponents of each example."""


class Full(Exception):
    """The queue has no room."""


class Refused(Exception):
    """The model does not take an example; says why in one sentence."""


@dataclass
class Ask:
    """A request in the queue."""

    items: list[Any]
    k: int
    answer: Future[Answer] = field(default_factory=Future)


@dataclass
class Call:
    """Other work in the queue, as much as one example."""

    work: Callable[[], Any]
    answer: Future[Any] = field(default_factory=Future)
    items: tuple[None] = (None,)


class Items:
    """A request's examples as a dataset."""

    def __init__(self, items: list[Any]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Worker:
    """Scores requests one batch after the other.

    Args:
        attributor: fitted.
        limits: of the batch and the queue.

    Attributes:
        waiting: examples in the queue.
        batches: how many examples each batch scored so far had, newest last, at most 1000.
        ledger: what scoring cost so far, as serving, and the bytes of the store, as fitting.
        scored: examples that were scored.
        identity: of what is served, a digest: training set, task, members, method and its choices.
    """

    def __init__(self, attributor: Attributor, limits: Limits):
        self.attributor, self.limits = attributor, limits
        self.waiting = 0
        self.batches: deque[int] = deque(maxlen=1000)
        self.ledger, self.scored = Ledger(), 0
        self.ledger.add_bytes("fitting", attributor.store.nbytes())
        self.identity = _identity(attributor)
        self._queue: deque[Ask | Call] = deque()
        self._spare: deque[Callable[[], Any]] = deque()
        self._change = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="byline-serve", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what waits, and end."""
        with self._change:
            self._stopping = True
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def cost(self) -> dict[str, float]:
        """Queries so far, CPU seconds and seconds on the clock of one, and the bytes of the store."""
        spent, each = self.ledger.serving, self.scored or float("nan")
        return {
            "queries": self.scored,
            "seconds": spent.seconds / each,
            "wall": spent.wall / each,
            "store_bytes": self.ledger.fitting.bytes,
        }

    def submit(self, items: list[Any], k: int) -> Future[Answer]:
        """Put a request in the queue.

        Raises:
            Full: too many examples wait.
        """
        return self._put(Ask(items, k))

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Put other work in the queue.

        Raises:
            Full: too many examples wait.
        """
        return self._put(Call(work))

    def when_idle(self, *work: Callable[[], Any]) -> None:
        """Do work, piece by piece, while nothing waits; what fails is left out."""
        with self._change:
            self._spare.extend(work)
            self._change.notify()

    def _put(self, ask: Ask | Call) -> Future[Any]:
        size = len(ask.items)
        with self._change:
            if self._stopping or (self.waiting and self.waiting + size > self.limits.queue):
                raise Full
            self._queue.append(ask)
            self.waiting += size
            self._change.notify()
        return ask.answer

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._queue and not self._spare and not self._stopping:
                    self._change.wait()
                if not self._queue and self._stopping:
                    return
                spare = self._spare.popleft() if not self._queue else None
                asks = [] if spare is not None else self._next()
            if spare is not None:
                with suppress(Exception), torch.inference_mode(False):
                    spare()
                continue
            # a request that nobody waits for any more costs nothing
            asks = [ask for ask in asks if ask.answer.set_running_or_notify_cancel()]
            if asks and isinstance(asks[0], Call):
                self._do(asks[0])
            elif asks:
                self._answer(asks)  # type: ignore[arg-type]

    def _next(self) -> list[Ask | Call]:
        """As many of those that wait as make a batch of examples of one form; or other work."""
        asks = [self._taken()]
        if isinstance(asks[0], Call):
            return asks
        form, size = _form(asks[0].items[0]), len(asks[0].items)
        while self._queue and size + len(self._queue[0].items) <= self.limits.batch:
            waiting = self._queue[0]
            if isinstance(waiting, Call) or any(_form(item) != form for item in waiting.items):
                break
            asks.append(self._taken())
            size += len(waiting.items)
        return asks

    def _do(self, call: Call) -> None:
        try:
            with torch.inference_mode(False):
                call.answer.set_result(call.work())
        except Exception as error:
            if not isinstance(error, Refused):
                _log.error("exploring failed", exc_info=error)
            call.answer.set_exception(error)

    def _taken(self) -> Ask | Call:
        ask = self._queue.popleft()
        self.waiting -= len(ask.items)
        return ask

    def _answer(self, asks: list[Ask]) -> None:
        try:
            found = self._top([item for ask in asks for item in ask.items], max(ask.k for ask in asks))
        except Exception as error:
            if len(asks) > 1:
                # one bad example is no reason to fail the others
                for ask in asks:
                    self._answer([ask])
                return
            asks[0].answer.set_exception(self.reason(asks[0].items, error))
            return
        start = 0
        for ask in asks:
            stop = start + len(ask.items)
            own = [(_first(a, ask.k), _first(b, ask.k)) for a, b in found[start:stop]]
            odd = [i for i, pair in enumerate(own) if not all(np.isfinite(ranked.scores).all() for ranked in pair)]
            if odd:
                ask.answer.set_exception(Refused(f"examples[{odd[0]}] has scores that are not finite"))
            else:
                ask.answer.set_result(own)
            start = stop

    def _top(self, items: list[Any], k: int) -> Answer:
        self.batches.append(len(items))
        with self.ledger.phase("serving"), torch.inference_mode(False):
            ranking = self.attributor.top(Items(items), k)
        self.scored += len(items)
        return [(row.proponents, row.opponents) for row in ranking]

    def reason(self, items: list[Any], error: Exception) -> Exception:
        """Whether the examples are to blame: then the model alone refuses them too."""
        attributor = self.attributor
        for place, item in enumerate(items):
            try:
                batch = batches.gather(Items([item]), [0], attributor.collate)
                batch = batches.to(batch, attributor._bench.device)
                value = attributor.task.differentiate(attributor._bench.model, batch, "output")[0]
                if value.isfinite().all():
                    continue
                why = "its output is not finite"
            except Exception as cause:
                why = str(getattr(cause, "problem", cause)).splitlines()[0][:300] if str(cause) else "no reason given"
            return Refused(f"the model does not take examples[{place}]: {why}")
        if len(items) > 1 and len({_form(item) for item in items}) > 1:
            return Refused("examples are of different sizes, which do not go into one batch; send them one by one")
        _log.error("scoring failed", exc_info=error)
        return error


# of an attributor: how it works, not what it finds
_ASIDE = {"batch_size", "progress", "device"}


def _identity(attributor: Attributor) -> str:
    """A digest of all that scores depend on: a page must not set those of one model beside those of another."""
    parts = {
        # of the training set, the task and the features
        "made_for": attributor.store.manifest.made_for,
        "members": [
            [voter.weight, [(m.identity("gradient"), m.identity("residual")) for m in voter.members or (voter.member,)]]
            for voter in attributor._voters
        ],
        "method": _choices(attributor),
        "solver": _choices(getattr(attributor, "solver", None)),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _choices(made: Any) -> dict[str, Any]:
    """The plain values that an object was made with; no repr, which may hold an address and differ at every start."""
    found = vars(made) if hasattr(made, "__dict__") else {}
    plain = {
        name: value
        for name, value in found.items()
        if not name.startswith("_") and name not in _ASIDE and isinstance(value, str | int | float | bool | None)
    }
    return {"": type(made).__name__, **plain}


def _first(ranked: Ranked, k: int) -> Ranked:
    return Ranked(ranked.indices[:k], ranked.scores[:k], ranked.stderr[:k])


def _form(item: Any) -> tuple[Any, ...]:
    """What must be equal for examples to go into one batch."""
    return tuple(tuple(tensor.shape) for tensor in batches.tensors(item))
