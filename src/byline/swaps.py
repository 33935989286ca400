"""Another function in a module's place, for one thread alone and for as long as a context lasts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_LOCK = threading.RLock()


@contextmanager
def swapped(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Call ``value`` where this thread calls ``owner.name``.

    Other threads that call it meanwhile get the original, and wait for their own turn to swap it.
    """
    with _LOCK:
        original, thread = getattr(owner, name), threading.get_ident()

        def chosen(*args: Any, **kwargs: Any) -> Any:
            return (value if threading.get_ident() == thread else original)(*args, **kwargs)

        setattr(owner, name, chosen)
        try:
            yield
        finally:
            setattr(owner, name, original)


_CHANGE = threading.Lock()
_plain: Counter[tuple[int, bool]] = Counter()


@contextmanager
def uncheckpointed(reentrant: bool) -> Iterator[None]:
    """Keep what ``torch.utils.checkpoint`` would compute again in the backward pass, for this thread alone.

    Args:
        reentrant: of its two ways, the one through which no gradient of chosen tensors can be asked; the other way
            otherwise, which calls modules again after the contexts of the forward pass are gone.
    """
    key = (threading.get_ident(), reentrant)
    with _CHANGE:
        _plain[key] += 1
        _install()
    try:
        yield
    finally:
        with _CHANGE:
            _plain[key] -= 1
            if not _plain[key]:
                del _plain[key]
            _install()


_originals: list[Any] = []


def _install() -> None:
    """Put the ways of checkpointing that look at `_plain` in their place, or take them away where nobody needs them."""
    from torch.utils import checkpoint

    if _plain and not _originals:
        apply, generator = checkpoint.CheckpointFunction.apply, checkpoint._checkpoint_without_reentrant_generator

        def applied(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return function(*args) if _plain[threading.get_ident(), True] else apply(function, preserve, *args)

        def generated(*args: Any, **kwargs: Any) -> Iterator[None]:
            # what is asked for one step before the function runs and one after it
            return (_ for _ in [None]) if _plain[threading.get_ident(), False] else generator(*args, **kwargs)

        _originals.append(generator)
        checkpoint.CheckpointFunction.apply = staticmethod(applied)  # type: ignore[method-assign]
        checkpoint._checkpoint_without_reentrant_generator = generated
    elif _originals and not _plain:
        del checkpoint.CheckpointFunction.apply
        checkpoint._checkpoint_without_reentrant_generator = _originals.pop()
