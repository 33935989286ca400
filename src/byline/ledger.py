"""The ledger: what something cost.

Everything that claims to be cheap in byline is measured with this one object: FLOPs, CPU seconds, wall
seconds and bytes, split into the three phases a user pays for at different times. It sits at the top of the
package, and imports next to nothing from it, so that every room can write into it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from byline.guards import Lock

PHASES: tuple[str, ...] = ("training", "fitting", "serving")
"""Paid once per model, once per training set, and once per query batch."""


@dataclass
class Cost:
    """What one phase cost so far.

    Attributes:
        flops: floating-point operations, as torch's counter counts them (a multiply-add is two).
        seconds: CPU seconds of this process, summed over its threads: a busy machine hardly changes them.
        wall: seconds on the clock.
        bytes: what is kept because of this phase (weights, features), not what passed through memory.
    """

    flops: float = 0.0
    seconds: float = 0.0
    wall: float = 0.0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.seconds + other.seconds,
            self.wall + other.wall,
            self.bytes + other.bytes,
        )

    def scaled(self, factor: float) -> Cost:
        """The same cost `factor` times: a share of it, or several such things."""
        return Cost(self.flops * factor, self.seconds * factor, self.wall * factor, round(self.bytes * factor))


@dataclass
class Ledger:
    """Costs split into training, fitting and serving.

    Time is exclusive: a phase opened inside another pauses the outer one, so nothing is counted twice and a
    phase nested in itself is harmless. Threads may share a ledger: what several do at once is booked once, in the phase
    that was opened last.

    Example:
        >>> ledger = Ledger()
        >>> with ledger.phase("fitting"):
        ...     ledger.add_flops("fitting", 2e9)
        >>> human_flops(ledger["fitting"].flops)
        '2 GFLOP'
    """

    costs: dict[str, Cost] = field(default_factory=lambda: {name: Cost() for name in PHASES})
    _open: list[tuple[str, object]] = field(default_factory=list, repr=False, compare=False)
    _since: tuple[float, float] = field(default=(0.0, 0.0), repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def __getitem__(self, phase: str) -> Cost:
        return self.costs[_known(phase)]

    @property
    def training(self) -> Cost:
        """What making the models cost."""
        return self.costs["training"]

    @property
    def fitting(self) -> Cost:
        """What computing the features of the training set cost."""
        return self.costs["fitting"]

    @property
    def serving(self) -> Cost:
        """What answering all queries so far cost: divide by their number for the cost of one."""
        return self.costs["serving"]

    @property
    def total(self) -> Cost:
        """All phases together."""
        return self.training + self.fitting + self.serving

    @contextmanager
    def phase(self, phase: str) -> Iterator[Cost]:
        """Measures CPU and wall seconds of the block and adds them to `phase`."""
        _known(phase)
        own = (phase, object())
        try:
            with self._lock():
                self._book()
                self._open.append(own)
            yield self.costs[phase]
        finally:
            # by itself, not the last one: another thread may have opened one since
            with self._lock():
                self._book()
                self._open = [one for one in self._open if one is not own]

    def _book(self) -> None:
        """Credits the time since the last change to the innermost open phase, and starts counting anew."""
        now = (time.process_time(), time.perf_counter())
        if self._open:
            cost = self.costs[self._open[-1][0]]
            cost.seconds += now[0] - self._since[0]
            cost.wall += now[1] - self._since[1]
        self._since = now

    def __getstate__(self) -> dict[str, Any]:
        # a phase that is open here is not open in a copy
        return {"costs": self.costs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def add_flops(self, phase: str, flops: float) -> None:
        """Adds floating-point operations, counted on one representative batch and multiplied."""
        with self._lock():
            self[phase].flops += flops

    def add_bytes(self, phase: str, n_bytes: int) -> None:
        """Adds bytes that are kept."""
        with self._lock():
            self[phase].bytes += int(n_bytes)

    def add_seconds(self, phase: str, seconds: float, wall: float | None = None) -> None:
        """Adds time measured elsewhere, such as the recorded cost of models that were trained earlier."""
        with self._lock():
            self[phase].seconds += seconds
            self[phase].wall += seconds if wall is None else wall

    def add(self, phase: str, cost: Cost) -> None:
        """Adds a whole cost."""
        with self._lock():
            self.costs[_known(phase)] = self[phase] + cost

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger({name: self.costs[name] + other.costs[name] for name in PHASES})

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers, for JSON."""
        return {name: asdict(cost) for name, cost in self.costs.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> Ledger:
        """The inverse of `to_dict`; phases that are missing cost nothing."""
        ledger = cls()
        for name, cost in data.items():
            ledger.costs[_known(name)] = Cost(**cost)
        return ledger

    def __repr__(self) -> str:
        parts = [
            f"{name}: {human_flops(c.flops)}, {human_seconds(c.seconds)}, {human_bytes(c.bytes)}"
            for name, c in self.costs.items()
            if c != Cost()
        ]
        return f"Ledger({'; '.join(parts) or 'nothing yet'})"


def _known(phase: str) -> str:
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}: a ledger has {', '.join(PHASES)}")
    return phase


def count_flops(fn: Callable[[], Any]) -> int:
    """Runs `fn` once under torch's counter and returns its floating-point operations.

    The counter intercepts every operation and is slow, so call it on one representative batch and multiply.
    It counts matrix products, convolutions and attention; element-wise work is not counted, here or in the
    literature's figures.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        fn()
    return int(counter.get_total_flops())


def _human(value: float, units: tuple[str, ...], step: float) -> str:
    if value < 0:
        return "-" + _human(-value, units, step)
    index = 0
    # Three significant digits would round 999.6 up to "1e+03": move to the next unit before that.
    while value >= step * 0.9995 and index < len(units) - 1:
        value /= step
        index += 1
    digits = f"{value:.0f}" if value >= 99.95 else f"{value:.3g}" if value < 9.995 else f"{value:.1f}"
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return f"{digits} {units[index]}"


def human_flops(flops: float) -> str:
    """Operations for people: 1234567890 → `1.23 GFLOP`."""
    return _human(flops, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"), 1000.0)


def human_bytes(n_bytes: float) -> str:
    """Bytes for people, in powers of ten: 1230000 → `1.23 MB`."""
    return _human(n_bytes, ("B", "kB", "MB", "GB", "TB", "PB"), 1000.0)


def human_seconds(seconds: float) -> str:
    """Seconds for people: `250 µs`, `12 ms`, `3.2 s`, `4.1 min`, `2.5 h`."""
    if seconds < 0:
        return "-" + human_seconds(-seconds)
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995:
        return _human(seconds * 1e6, ("µs", "ms"), 1000.0)
    if seconds < 119.5:
        return _human(seconds, ("s",), 1000.0)
    if seconds < 7170:
        return _human(seconds / 60, ("min",), 1000.0)
    return _human(seconds / 3600, ("h",), 1000.0)
