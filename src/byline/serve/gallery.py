"""What the page is told of examples: pictures, texts, rows, names, labels and owners, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from byline.report.picture import data_uri
from byline.report.scores import Shown, thumbnail
from byline.serve.client import encode

_LEAST = 4  # pixels of a picture's side: smaller matrices are numbers
_CELLS, _ALL_CELLS = 4, 64  # of a row, in a list and by itself
_TEXT, _ALL_TEXT = 300, 20_000  # characters, likewise
_LARGE = 512  # pixels of a picture's longer side by itself


class Gallery:
    """A dataset's examples as the page shows them.

    Args:
        dataset: the items.
        shown: how they are shown; what it leaves out is taken from the items and from `about`.
        classes: names of the labels 0, 1, …
        about: metadata of example i, if there are any.
        told: all metadata, where they are a sequence: names, labels and owners of dicts are taken from it.
    """

    def __init__(
        self,
        dataset: Any,
        shown: Shown | None = None,
        classes: Sequence[str] = (),
        about: Callable[[int], Any] | None = None,
        told: Sequence[Any] | None = None,
    ):
        self.dataset, self.n = dataset, len(dataset)
        self.shown, self.classes, self.about = shown or Shown(), classes, about
        given = self.shown.labels if self.shown.labels is not None else _noted(told, "label")
        self.labels = [_text(v) for v in given] if given is not None else self._own_labels()
        owners = self.shown.owners if self.shown.owners is not None else _noted(told, "owner")
        self.owners = None if owners is None else [_text(value) for value in owners]
        self._names = self.shown.names if self.shown.names is not None else _noted(told, "name")

    @cached_property
    def columns(self) -> dict[str, Any]:
        """Labels and owners of all examples: distinct texts, and the place of each example's among them."""
        said = self.shown.predicted
        predicted = None if said is None else [_text(value) for value in said]
        return {"labels": _coded(self.labels), "owners": _coded(self.owners), "predicted": _coded(predicted)}

    def called(self, index: int) -> str | None:
        """An example's name."""
        return None if self._names is None else _text(self._names[index])

    def one(self, index: int, whole: bool = False) -> dict[str, Any]:
        """An example: in short, as in a list, or as much as there is room for."""
        shown = self.shown
        item = None
        if shown.pictures is None and shown.texts is None and shown.rows is None:
            item = self.dataset[index]
        text = None if shown.texts is None else _text(shown.texts[index])
        picture = None if shown.pictures is None else shown.pictures[index]
        look = seen(item) if item is not None else {"picture": picture, "text": text, "cells": shown.cells(index)}
        told = None if self.about is None else self.about(index)
        return {
            "index": index,
            "name": self.called(index),
            "label": None if self.labels is None else self.labels[index],
            "owner": None if self.owners is None else self.owners[index],
            "predicted": None if shown.predicted is None else _text(shown.predicted[index]),
            "metadata": _pairs(told) if whole else [],
            **drawn(look, whole),
        }

    def name(self, label: int) -> str:
        """What a class is called."""
        return _text(self.classes[label]) if 0 <= label < len(self.classes) else str(label)

    def _own_labels(self) -> list[str] | None:
        """The whole numbers that a dataset's items end with, where they can be had without reading all items."""
        data, chosen = self.dataset, None
        while isinstance(data, Subset):
            chosen = data.indices if chosen is None else [data.indices[i] for i in chosen]
            data = data.dataset
        if isinstance(data, TensorDataset) and len(data.tensors) > 1:
            found: Any = data.tensors[-1]
        else:
            found = next((getattr(data, key) for key in ("targets", "labels") if hasattr(data, key)), None)
        try:
            array = np.asarray(found.detach().cpu() if isinstance(found, Tensor) else found)
        except (TypeError, ValueError):
            return None
        if array.shape[:1] != (len(data),) or array.dtype.kind not in "iu" or array.size != len(data):
            return None
        array = array.reshape(-1) if chosen is None else array.reshape(-1)[np.asarray(chosen)]
        return [self.name(int(label)) for label in array]


def seen(item: Any) -> dict[str, Any]:
    """What can be shown of an item without being told how: its first part as a picture, a text or a few numbers."""
    first = item
    while isinstance(first, tuple | list) and len(first):
        first = first[0]
    if isinstance(first, Mapping):
        first = next(iter(first.values()), None)
    if isinstance(first, str):
        return {"picture": None, "text": first, "cells": []}
    if isinstance(first, Tensor | np.ndarray):
        array = first.detach().cpu() if isinstance(first, Tensor) else torch.from_numpy(np.asarray(first))
        shape = array.shape
        channels = array.ndim == 3 and (shape[0] in (1, 3) or shape[2] in (1, 3))
        sides = shape[:2] if array.ndim == 2 or (channels and shape[2] in (1, 3)) else shape[1:]
        if (array.ndim == 2 or channels) and min(sides) >= _LEAST and array.dtype != torch.bool:
            return {"picture": array.float().numpy(), "text": None, "cells": []}
        if array.ndim == 1:
            cells = [(str(place), f"{value:.4g}") for place, value in enumerate(array[:_ALL_CELLS].tolist())]
            return {"picture": None, "text": None, "cells": cells}
    return {"picture": None, "text": None, "cells": []}


def drawn(look: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    """A look as the page takes it: a picture as a data URI, and no more text and cells than there is room for."""
    text, limit = look["text"], _ALL_TEXT if whole else _TEXT
    return {
        "picture": None if look["picture"] is None else _uri(look["picture"], whole),
        "text": text if text is None or len(text) <= limit else text[:limit] + "…",
        "cells": [[name, _cut(value)] for name, value in look["cells"][: _ALL_CELLS if whole else _CELLS]],
    }


def _uri(picture: Any, whole: bool) -> str | None:
    array = np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture)
    try:
        # a service goes on where one picture of its operator's cannot be drawn
        return data_uri(array if whole and max(array.shape) <= _LARGE else thumbnail(array))
    except ValueError:
        return None


def _cut(value: str, limit: int = 200) -> str:
    return value if len(value) <= limit else value[:limit] + "…"


def _text(value: Any) -> str:
    if isinstance(value, Tensor | np.generic):
        value = value.item()
    return str(value)


def _noted(told: Sequence[Any] | None, key: str) -> list[Any] | None:
    """What metadata say of every example under a key; None where most do not have it."""
    if told is None or not len(told) or not all(isinstance(one, Mapping) and key in one for one in told):
        return None
    return ["" if one[key] is None else one[key] for one in told]


def _coded(values: Sequence[str] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    distinct = {value: place for place, value in enumerate(sorted(set(values)))}
    codes = np.fromiter((distinct[value] for value in values), np.uint32, len(values))
    # the service's own numbers end at int32, and no training set of this size is held here
    return {"values": list(distinct), "codes": encode(codes.astype(np.int32))}


def _pairs(told: Any) -> list[list[str]]:
    if told is None:
        return []
    if isinstance(told, Mapping):
        return [[_cut(str(key)), _cut(str(value), 2000)] for key, value in list(told.items())[:_ALL_CELLS]]
    return [["", _cut(str(told), 2000)]]
