"""Another function in a module's place, for one thread alone and for as long as a context lasts."""

from __future__ import annotations

import threading
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
