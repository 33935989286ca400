"""What keeps threads apart, and random numbers where they were."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class Lock:
    """Gives the re-entrant lock of this process, as in ``with lock():``.

    It goes where its owner goes, into a pickle, a copy or a forked process, and is a new one there.

    It is no context manager itself: an interrupt in a method written in Python could come between taking the lock and
    the block that gives it back.
    """

    def __init__(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()

    def __call__(self) -> AbstractContextManager[Any]:
        """The lock."""
        if self._process != os.getpid():
            # whoever held it when this process was forked is not in it
            self.__init__()  # type: ignore[misc]
        return self._lock

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Lock:
        return Lock()


class kept_grad:
    """Leave torch's grad mode as it was: an interrupt inside of ``torch.no_grad`` can leave it switched off."""

    def __enter__(self) -> None:
        import torch

        self._mode = torch.is_grad_enabled()

    def __exit__(self, *error: Any) -> None:
        import torch

        torch.set_grad_enabled(self._mode)


@contextmanager
def kept_random(devices: Sequence[Any] | None = ()) -> Iterator[None]:
    """Leave torch's global random numbers, and its grad mode, as they were.

    Args:
        devices: CUDA devices whose numbers are kept too; None for all of them.
    """
    import torch

    own = None if devices is None else list(devices)
    # twice, because an interrupt may come while the first puts them back
    with kept_grad(), torch.random.fork_rng(devices=own), torch.random.fork_rng(devices=own):
        yield
