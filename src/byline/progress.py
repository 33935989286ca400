"""Progress bars for long work: what is being done, and how far it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class Advance(Protocol):
    """Called with the work done since the last call, and what is being done now."""

    def __call__(self, steps: float = 1, doing: str | None = None) -> None:
        """Move the bar."""


@contextmanager
def bar(total: int, doing: str, show: bool = True) -> Iterator[Advance]:
    """A bar on stderr that goes away when done; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield lambda steps=1, doing=None: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(doing, total=total)

        def advance(steps: float = 1, doing: str | None = None) -> None:
            progress.update(task, advance=steps, description=doing)

        yield advance


def track(items: Iterable[T], doing: str, show: bool = True) -> Iterator[T]:
    """Iterate over items under a bar."""
    known: Sequence[T] = list(items)
    with bar(len(known), doing, show) as advance:
        for item in known:
            yield item
            advance()
