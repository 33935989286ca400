"""What ``byline serve STORE --task module:object`` expects of the object."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byline import batches
from byline.methods.base import Attributor
from byline.names import named
from byline.store import Store

if TYPE_CHECKING:
    from byline.report.scores import Shown

TAKES = ("image", "row", "text", "file")


@dataclass
class Served:
    """An attributor, the training set that it is fitted on, and what is told of the training examples.

    Args:
        attributor: any method; with ``store=None`` it gets the store that is served.
        train_set: its map-style dataset; None where the attributor is fitted already.
        metadata: what is told of training example i: a sequence of n_train JSON values, or a function of i. None tells
            nothing.
        decode: makes an item as those of the training set of one example as JSON; raises ValueError for what it
            refuses. By default JSON must have the form of the training set's items (`byline.serve.decode`).
        title: of the service.
        test_set: examples that the page offers to explain, and that a training example is followed to; the training
            set's own first ones when left out.
        train: how training examples are shown on the page, a `byline.report.Shown`. Without one, pictures, texts, short
            rows of numbers and labels are taken from the items, names and owners from ``metadata`` of dicts.
        test: how test examples are shown.
        classes: names of the labels 0, 1, …
        upload: makes an item of the bytes of a file that somebody brings to the page, with any label where items have
            one; raises ValueError for what it refuses.
        takes: what ``upload`` reads: "image", "row", "text" or "file".
    """

    attributor: Attributor
    train_set: Any = None
    metadata: Sequence[Any] | Callable[[int], Any] | None = None
    decode: Callable[[Any], Any] | None = None
    title: str = "byline"
    test_set: Any = None
    train: Shown | None = None
    test: Shown | None = None
    classes: Sequence[str] = ()
    upload: Callable[[bytes], Any] | None = None
    takes: str = "file"

    def __post_init__(self) -> None:
        if not isinstance(self.attributor, Attributor):
            raise TypeError(
                f"attributor is a {type(self.attributor).__name__}; expected a byline method such as byline.TRAK"
            )
        if self.decode is not None and not callable(self.decode):
            raise TypeError(f"decode is a {type(self.decode).__name__}; expected a function of one JSON value")
        if self.upload is not None and not callable(self.upload):
            raise TypeError(f"upload is a {type(self.upload).__name__}; expected a function of bytes")
        if self.takes not in TAKES:
            raise ValueError(f"takes is {self.takes!r}; expected one of {list(TAKES)}")
        for name in ("train", "test"):
            value = getattr(self, name)
            if value is not None and not hasattr(value, "check"):
                raise TypeError(f"{name} is a {type(value).__name__}; expected a byline.report.Shown")
        if self.test_set is not None:
            self.test_set = batches.as_dataset(self.test_set, "test_set")
        elif self.test is not None:
            raise ValueError("test is given, and there is no test_set that it shows")
        if self.train_set is None and self.attributor._train_set is None:
            raise ValueError("train_set is missing, and the attributor is not fitted; expected one of the two")

    def ready(self, store: str | os.PathLike[str] | None = None) -> Served:
        """Fit the attributor on the store: what the store holds is not computed again.

        Raises:
            ValueError: the store was made for something else, or the metadata are not those of the training set.
        """
        attributor = self.attributor
        if store is not None and attributor.store.path is None:
            attributor.store = Store(Path(store))
        elif store is not None and Path(store).resolve() != Path(attributor.store.path or "").resolve():
            raise ValueError(f"store is {store}, and the attributor has its own, {attributor.store.path}")
        attributor.progress = attributor.progress and sys.stderr.isatty()
        if self.train_set is None:
            attributor._as_whole(lambda made: made._again())
        else:
            attributor.fit(self.train_set)
        told = self.metadata
        if told is not None and not callable(told) and len(told) != attributor.n_train_:
            raise ValueError(
                f"metadata has {len(told)} entries; expected one per training example, {attributor.n_train_}"
            )
        if self.train is not None:
            self.train.check(attributor.n_train_, "train")
        if self.test is not None:
            self.test.check(len(self.test_set), "test")
        return self

    def about(self, index: int) -> Any:
        """The metadata of training example ``index``."""
        if self.metadata is None:
            return None
        return self.metadata(index) if callable(self.metadata) else self.metadata[index]

    @property
    def known(self) -> Any:
        """The examples that the page offers to explain."""
        return self.attributor._train_set if self.test_set is None else self.test_set


def load(spec: str, store: str | os.PathLike[str] | None = None) -> Served:
    """The object that ``module:object`` names, looked for in the working directory too.

    It is a `Served`, a fitted method, or a function that returns one of them. A function with a parameter ``store``
    gets the store's path.

    Raises:
        ValueError: there is no such module or object, or it is something else.
    """
    found = named(spec, "task")
    if callable(found) and not isinstance(found, Attributor | Served):
        wants = "store" in inspect.signature(found).parameters
        found = found(store=store) if wants else found()
    if isinstance(found, Attributor):
        found = Served(found)
    if not isinstance(found, Served):
        raise ValueError(
            f"task is {spec!r}, a {type(found).__name__}; expected a byline.serve.Served, a fitted "
            "method, or a function that returns one"
        )
    return found
