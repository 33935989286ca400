"""What an engine is: something that has pieces of work done, in this process or in others."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from byline.progress import Advance
from byline.store import Store

Take = Callable[[int, Any], None]
"""Is told a piece's place among all pieces, and its result."""


class Work(ABC):
    """Something that is done piece by piece.

    Engines that work elsewhere pickle it, once for all its pieces. What cannot be sent is left out and made anew there.
    """

    what: ClassVar[str]
    """What is sent, in messages."""

    @abstractmethod
    def do(self, piece: Any, advance: Advance) -> Any:
        """Do a piece, in whatever process; returns its result."""

    def steps(self, piece: Any) -> float:
        """How far the bar moves for a piece that was done elsewhere."""
        return 1

    def left(self, piece: Any) -> Any:
        """What of a piece is not done yet, after the process that did it was lost; None if all is."""
        return piece

    def pack(self, piece: Any) -> Any:
        """A piece as it is sent, without what every process has already."""
        return piece

    def unpack(self, packed: Any) -> Any:
        """The piece again."""
        return packed

    def send(self, result: Any) -> Any:
        """A result as it is sent back; an iterator ends here."""
        return result

    def receive(self, sent: Any) -> Any:
        """The result again."""
        return sent

    def credit(self, seconds: float) -> None:  # noqa: B027 - most work measures itself
        """CPU seconds that another process spent on a piece."""


class Engine(ABC):
    """Where work runs."""

    @abstractmethod
    def processes(self) -> int:
        """How many other processes work at once; 0 where all is done in this one."""

    @abstractmethod
    def run(
        self, work: Work, stages: Sequence[Sequence[Any]], take: Take, advance: Advance, ordered: bool = False
    ) -> None:
        """Have all pieces done.

        Args:
            work: what does them.
            stages: pieces; those of a stage are independent, and begin when all of the stage before are done.
            take: is given each result, in this process.
            advance: is told of the progress.
            ordered: give the results in the order of the pieces, and let none wait long for its turn.

        Raises:
            Whatever `Work.do` raises, wherever it did.
        """

    def check(self, store: Store) -> None:  # noqa: B027 - this process can use any store
        """Refuse a store that the engine's processes cannot write to."""


class InProcess(Engine):
    """One piece after the other, in this process."""

    def processes(self) -> int:
        """No others."""
        return 0

    def run(
        self, work: Work, stages: Sequence[Sequence[Any]], take: Take, advance: Advance, ordered: bool = False
    ) -> None:
        """A loop."""
        for place, piece in enumerate(piece for stage in stages for piece in stage):
            take(place, work.do(piece, advance))

    def __repr__(self) -> str:
        return "InProcess()"


HERE = InProcess()


def as_engine(value: Any) -> Engine:
    """The engine of a name, or the engine itself; None is this process.

    Raises:
        ValueError: it is neither.
        ModuleNotFoundError: it is ``"ray"``, which is not installed.
    """
    if value is None or value == "local":
        return HERE
    if isinstance(value, Engine):
        return value
    if value == "ray":
        from byline.engines.ray import Ray

        return Ray()
    raise ValueError(f"engine is {value!r}; expected None (this process), 'ray' or byline.engines.Ray(...)")


def installed(module: str, extra: str, asked: str) -> None:
    """Refuse what needs a package that is not there.

    Raises:
        ModuleNotFoundError: names the extra that brings it.
    """
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{asked} needs {module}, which is not installed: pip install 'byline[{extra}]'")
