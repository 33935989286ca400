"""Batches of any shape: tuples, lists, dicts and Hugging Face ``BatchEncoding``.

Every function here treats a tensor whose first dimension is the batch size as one row per example, and leaves
everything else alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

Batch = Any


def map_tensors(batch: Batch, f: Callable[[Tensor], Tensor]) -> Batch:
    """Apply ``f`` to every tensor in a batch and keep the batch's structure."""
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, f) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(item, f) for item in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(item, f) for item in batch)
    return batch


def tensors(batch: Batch) -> Iterator[Tensor]:
    """Every tensor in a batch, in a fixed order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in sorted(batch, key=str):
            yield from tensors(batch[key])
    elif isinstance(batch, tuple | list):
        for item in batch:
            yield from tensors(item)


def size(batch: Batch) -> int:
    """Number of examples in a batch: the length of the first tensor that has one."""
    for tensor in tensors(batch):
        if tensor.ndim:
            return tensor.shape[0]
    raise ValueError("a batch holds no tensor with a batch dimension, so its size cannot be told")


def transformed() -> bool:
    """Whether vmap or another of torch's transforms runs, under which numbers cannot be looked at.

    The batch was looked at before: every transform comes after a plain forward pass over it.
    """
    return torch._C._functorch.maybe_current_level() is not None


def to(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return map_tensors(batch, lambda t: t.to(device, non_blocking=True))


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Examples ``start`` to ``stop`` of a batch."""
    n = size(batch)
    return map_tensors(batch, lambda t: t[start:stop] if t.ndim and t.shape[0] == n else t)


def pick(batch: Batch, order: list[int]) -> Batch:
    """The examples at these places of a batch, in this order."""
    n = size(batch)
    return map_tensors(batch, lambda t: t[order] if t.ndim and t.shape[0] == n else t)


def tile(batch: Batch, copies: int) -> Batch:
    """The batch repeated ``copies`` times along its examples: rows (copy, example) in row-major order."""
    n = size(batch)
    return map_tensors(batch, lambda t: t.repeat(copies, *[1] * (t.ndim - 1)) if t.ndim and t.shape[0] == n else t)


def as_dataset(data: Any, name: str) -> Any:
    """Accept any map-style dataset with a length; refuse, in one sentence, what has no fixed order.

    Raises:
        TypeError: without ``__getitem__`` and ``__len__``, or a ``DataLoader`` that shuffles.
        ValueError: an empty dataset, or one that gives another item on a second read.
    """
    if isinstance(data, DataLoader):
        sampler: Sampler[Any] | None = getattr(data, "sampler", None)
        if not isinstance(sampler, SequentialSampler):
            raise TypeError(
                f"{name} is a DataLoader that shuffles or samples ({type(sampler).__name__}); "
                "expected a map-style dataset, whose order is fixed"
            )
        data = data.dataset
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(
            f"{name} is a {type(data).__name__} without __len__ and __getitem__; "
            "expected a map-style torch Dataset, whose length and order are fixed"
        )
    try:
        length = len(data)
    except TypeError as error:
        raise TypeError(f"{name} ({type(data).__name__}) has no length: {error}") from error
    if length == 0:
        raise ValueError(f"{name} is empty; expected at least one example")
    if not _holds_tensors(data):
        for index in sorted({0, length // 2, length - 1}):
            if digest_of(data[index]) != digest_of(data[index]):
                raise ValueError(
                    f"{name}[{index}] is not the same on a second read; expected a dataset that neither shuffles "
                    "nor augments at random"
                )
    return data


def collate_of(dataset: Any, given: Callable[[list[Any]], Batch] = default_collate) -> Callable[[list[Any]], Batch]:
    """What makes a batch of a dataset's items: what was given, or the ``collate_fn`` that the dataset has itself."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    own = getattr(dataset, "collate_fn", None)
    return own if given is default_collate and callable(own) else given


def _holds_tensors(dataset: Any) -> bool:
    """Whether a dataset's items are rows of its tensors: a subclass may have a ``__getitem__`` of its own."""
    return isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__


def gather(dataset: Any, indices: list[int], collate: Callable[[list[Any]], Batch] = default_collate) -> Batch:
    """The examples at these indices, collated by the dataset's own ``collate_fn`` where no other is given."""
    collate = collate_of(dataset, collate)
    if _holds_tensors(dataset) and collate is default_collate:
        return tuple(t[indices] for t in dataset.tensors)
    items = dataset.__getitems__(indices) if hasattr(dataset, "__getitems__") else [dataset[i] for i in indices]
    if isinstance(items[0], Mapping) and type(items[0]) is not dict:
        items = [dict(item) for item in items]
    return collate(items)


def fetch(dataset: Any, start: int, stop: int) -> Batch:
    """Examples ``start`` to ``stop``, collated; a copy, so that a model that works in place leaves the data alone."""
    if _holds_tensors(dataset):
        return tuple(t[start:stop].clone() for t in dataset.tensors)
    return gather(dataset, list(range(start, stop)))


def spans(length: int, batch_size: int) -> list[tuple[int, int]]:
    """The (start, stop) of each batch."""
    return [(start, min(start + batch_size, length)) for start in range(0, length, batch_size)]


def fingerprint(dataset: Any) -> str:
    """SHA-256 over the content of every example, independent of the batch size."""
    digest = hashlib.sha256(str(len(dataset)).encode())
    if _holds_tensors(dataset):
        for tensor in dataset.tensors:
            _update(digest, tensor)
    else:
        for index in range(len(dataset)):
            _update(digest, dataset[index])
    return digest.hexdigest()


def digest_of(item: Any) -> str:
    """SHA-256 of tensors, arrays and whatever holds them, by content."""
    digest = hashlib.sha256()
    _update(digest, item)
    return digest.hexdigest()


def _update(digest: Any, item: Any) -> None:
    if isinstance(item, Tensor):
        data = item.detach().cpu().contiguous()
        digest.update(f"{data.dtype}{tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(item, Mapping):
        for key in sorted(item, key=str):
            digest.update(str(key).encode())
            _update(digest, item[key])
    elif isinstance(item, tuple | list):
        digest.update(f"({len(item)}".encode())
        for part in item:
            _update(digest, part)
    elif hasattr(item, "tobytes"):
        digest.update(f"{getattr(item, 'dtype', '')}{getattr(item, 'shape', '')}".encode())
        digest.update(item.tobytes())
    else:
        digest.update(repr(item).encode())
