"""Writing while the next batch is computed: creating a file waits for the disk, and takes no processor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_MOST = 8  # pieces of work that may wait


class Background:
    """Does what it is given in order, on one thread; after an error it does no more until `drain` has raised it."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()
        self._error: BaseException | None = None

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do this after all that was given before; waits while too much is waiting.

        Raises:
            Whatever earlier work raised.
        """
        if self._error is not None:
            self.drain()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "byline-store")
        while len(self._pending) >= _MOST:
            self._first()
        self._pending.append(self._pool.submit(self._guarded, work, *arguments))

    def drain(self) -> None:
        """Wait until all is done.

        Raises:
            Whatever the work raised.
        """
        while self._pending:
            self._first()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """End the thread, when all is done."""
        # a pool whose end was interrupted takes no more work: the next piece needs another
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def _first(self) -> None:
        # forgotten only when it is done: an interrupted wait is taken up again
        self._pending[0].result()
        self._pending.popleft()

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._error is None:
            try:
                work(*arguments)
            except BaseException as error:
                self._error = error
