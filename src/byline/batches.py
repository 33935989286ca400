"""Batches of any shape: tuples, lists, dicts and Hugging Face ``BatchEncoding``.

Every function here treats a tensor or an array whose first dimension is the batch size as one row per example, and a
list of as many strings, numbers, dicts or Nones as one entry per example; it leaves everything else alone. Whether that
is what they are, `byline.arrivals` finds out before work starts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from byline.forms import describe, first_line, not_items, odd_kind

Batch = Any

_LEAVES = (str, bytes, int, float, complex, type(None))
_READS = 3


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


def is_field(value: Any) -> bool:
    """Whether a list has one entry per example, rather than being a part of the batch's structure.

    A tuple or a list of tensors is structure, as torch's default collate makes it of tuples. So is a tuple of numbers
    or Nones. Strings stay in the tuple in which the default collate leaves them.
    """
    if isinstance(value, tuple):
        return bool(value) and not hasattr(value, "_fields") and all(isinstance(item, str | bytes) for item in value)
    return isinstance(value, list) and bool(value) and all(isinstance(i, (*_LEAVES, Mapping)) for i in value)


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
    for tensor in tensors(_without_fields(batch)):
        if tensor.ndim:
            return tensor.shape[0]
    raise ValueError("a batch holds no tensor with a batch dimension, so its size cannot be told")


def transformed() -> bool:
    """Whether vmap or another of torch's transforms runs, under which numbers cannot be looked at.

    The batch was looked at before: every transform comes after a plain forward pass over it.
    """
    return torch._C._functorch.maybe_current_level() is not None


def has_fields(batch: Batch) -> bool:
    """Whether a list or an array in the batch has something of each example beside the tensors."""
    if isinstance(batch, Mapping):
        return any(has_fields(value) for value in batch.values())
    if isinstance(batch, tuple | list):
        return is_field(batch) or any(has_fields(item) for item in batch)
    return isinstance(batch, np.ndarray)


def _without_fields(batch: Batch) -> Batch:
    """The batch without what a list has of each example, whose tensors have another first dimension."""
    if isinstance(batch, Mapping):
        return {key: _without_fields(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return None if is_field(batch) else [_without_fields(item) for item in batch]
    return batch


def _map_rows(batch: Batch, n: int, tensor: Callable[[Tensor], Tensor], places: Sequence[int]) -> Batch:
    """Apply ``tensor`` to tensors of n rows; of arrays and lists that have n, take those at ``places``."""
    if isinstance(batch, Tensor):
        return tensor(batch) if batch.ndim and batch.shape[0] == n else batch
    if isinstance(batch, np.ndarray):
        return batch[list(places)] if batch.ndim and len(batch) == n else batch
    if isinstance(batch, Mapping):
        return {key: _map_rows(value, n, tensor, places) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        if is_field(batch):
            return type(batch)(batch[place] for place in places) if len(batch) == n else batch
        parts = [_map_rows(item, n, tensor, places) for item in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def to(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return map_tensors(ordinary(batch), lambda t: t.to(device, non_blocking=True))


def ordinary(batch: Batch) -> Batch:
    """The batch with tensors that were made under ``torch.inference_mode`` as ordinary ones."""
    return map_tensors(batch, lambda t: t.clone() if t.is_inference() else t)


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Examples ``start`` to ``stop`` of a batch."""
    n = size(batch)
    return _map_rows(batch, n, lambda t: t[start:stop], range(n)[start:stop])


def pick(batch: Batch, order: list[int]) -> Batch:
    """The examples at these places of a batch, in this order."""
    return _map_rows(batch, size(batch), lambda t: t[order], order)


def tile(batch: Batch, copies: int) -> Batch:
    """The batch repeated ``copies`` times along its examples: rows (copy, example) in row-major order."""
    n = size(batch)
    return _map_rows(batch, n, lambda t: t.repeat(copies, *[1] * (t.ndim - 1)), list(range(n)) * copies)


def as_dataset(data: Any, name: str) -> Any:
    """Accept any map-style dataset with a length; refuse, in one sentence, what has no fixed order.

    Raises:
        TypeError: without ``__getitem__`` and ``__len__``, a ``DataLoader`` that shuffles, or what scikit-learn takes:
            arrays, a table, a dict of columns.
        ValueError: an empty dataset, or one that gives another item on a second read, or none.
    """
    if isinstance(data, DataLoader):
        data = _loaded(data, name)
    problem = not_items(data)
    if problem is not None:
        raise TypeError(f"{name} is {problem}")
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(
            f"{name} is a {type(data).__name__} without __len__ and __getitem__; "
            "expected a map-style torch Dataset, whose length and order are fixed, or a list of the items"
        )
    try:
        length = len(data)
    except TypeError as error:
        raise TypeError(f"{name} ({type(data).__name__}) has no length: {error}") from error
    if length == 0:
        raise ValueError(f"{name} is empty; expected at least one example")
    if not _holds_tensors(data):
        # an item may well be the same twice by chance, where something is done to it every second time
        for index in sorted({0, length // 4, length // 2, 3 * length // 4, length - 1}):
            if not repeats(partial(_item, data, index, name), index):
                raise ValueError(
                    f"{name}[{index}] is not the same on a second read; expected a dataset that neither shuffles "
                    "nor augments at random"
                )
    return data


def _loaded(loader: DataLoader[Any], name: str) -> Any:
    """The dataset of a loader that visits it in its order."""
    sampler = loader.batch_sampler
    if sampler is None:
        raise TypeError(
            f"{name} is a DataLoader with batch_size=None, which makes no batches; expected its dataset "
            f"({name}.dataset), where an item of that is one example"
        )
    # a batch sampler of the caller's own leaves the loader's sampler at its default
    shown = sampler.sampler if type(sampler) is BatchSampler else sampler
    plain = isinstance(shown, SequentialSampler) and len(shown) == len(loader.dataset)  # type: ignore[arg-type]
    if not isinstance(loader.dataset, IterableDataset) and not plain:
        raise TypeError(
            f"{name} is a DataLoader that shuffles or samples ({type(shown).__name__}); expected a map-style dataset, "
            f"whose order is fixed, such as its own ({name}.dataset)"
        )
    return loader.dataset


def _item(dataset: Any, index: int, name: str) -> Any:
    try:
        return dataset[index]
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{name}[{index}] cannot be read ({type(error).__name__}: {first_line(error)}); expected an example at "
            f"every place from 0 to len({name}) - 1, {len(dataset) - 1}"
        ) from error


def repeats(make: Callable[[], Any], salt: int = 0) -> bool:
    """Whether something comes out the same again, whatever torch's, numpy's and Python's global random state is.

    Args:
        make: what makes it.
        salt: other states for another number.
    """
    found = set()
    for time in range(_READS):
        with _other_randomness(salt * _READS + time):
            found.add(digest_of(make()))
    return len(found) == 1


@contextmanager
def _other_randomness(seed: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # the state is everyone's: another thread may be drawing
        yield
        return
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - what others use
    try:
        # not torch.manual_seed, which would seed the accelerators too
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def collate_of(dataset: Any, given: Callable[[list[Any]], Batch] = default_collate) -> Callable[[list[Any]], Batch]:
    """What makes a batch of a dataset's items: what was given, or the ``collate_fn`` that the dataset has itself."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    own = getattr(dataset, "collate_fn", None)
    return own if given is default_collate and callable(own) else given


def _holds_tensors(dataset: Any) -> bool:
    """Whether a dataset's items are rows of its tensors: a subclass may have a ``__getitem__`` of its own."""
    return isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__


def gather(
    dataset: Any,
    indices: list[int],
    collate: Callable[[list[Any]], Batch] = default_collate,
    name: str = "the dataset",
) -> Batch:
    """The examples at these indices, collated by the dataset's own ``collate_fn`` where no other is given.

    Raises:
        ValueError: they do not go into one batch; says which, what they are, and what to do.
    """
    collate = collate_of(dataset, collate)
    if _holds_tensors(dataset) and collate is default_collate:
        return tuple(t[indices] for t in dataset.tensors)
    items = dataset.__getitems__(indices) if hasattr(dataset, "__getitems__") else [dataset[i] for i in indices]
    if isinstance(items[0], Mapping) and type(items[0]) is not dict:
        items = [dict(item) for item in items]
    try:
        return collate(items)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(_uncollated(items, indices, collate is default_collate, name, error)) from error


def _uncollated(items: list[Any], indices: list[int], default: bool, name: str, error: Exception) -> str:
    forms = [describe(item) for item in items]
    odd = next((i for i, form in enumerate(forms) if form != forms[0]), None)
    told = f"{name}[{indices[0]}] is {forms[0]}" + (f" and {name}[{indices[odd]}] is {forms[odd]}" if odd else "")
    if not default:
        expected = "a collate that takes a list of these"
    elif odd is not None and any(isinstance(item, Tensor | np.ndarray | Mapping | tuple | list) for item in items):
        strange = odd_kind(items[odd]) or odd_kind(items[0])
        expected = strange or "all of one form, or collate= that pads them (byline.hf.dataset does so with tokens)"
    else:
        expected = (
            odd_kind(items[0]) or "items of tensors and numbers, or collate= that makes a batch of a list of them"
        )
    shown = f"{indices[0]}:{indices[-1] + 1}" if len(indices) > 3 else ", ".join(map(str, indices))
    return (
        f"{name}[{shown}] does not go into one batch ({type(error).__name__}: "
        f"{first_line(error)}); {told}; expected {expected}"
    )


def fetch(dataset: Any, start: int, stop: int, name: str = "the dataset") -> Batch:
    """Examples ``start`` to ``stop``, collated; a copy, so that a model that works in place leaves the data alone."""
    if _holds_tensors(dataset):
        return tuple(t[start:stop].clone() for t in dataset.tensors)
    return gather(dataset, list(range(start, stop)), name=name)


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


def _update(digest: Any, item: Any, depth: int = 4) -> None:
    if isinstance(item, Tensor):
        data = (item.detach() if item.layout == torch.strided else item.detach().to_dense()).cpu().contiguous()
        digest.update(f"{data.dtype}{tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(item, Mapping):
        for key in sorted(item, key=str):
            digest.update(str(key).encode())
            _update(digest, item[key], depth)
    elif isinstance(item, tuple | list):
        digest.update(f"({len(item)}".encode())
        for part in item:
            _update(digest, part, depth)
    elif getattr(getattr(item, "dtype", None), "kind", "") == "O":
        # its bytes are addresses
        _update(digest, [list(item.shape), item.reshape(-1).tolist()], depth)
    elif hasattr(item, "tobytes"):
        digest.update(f"{getattr(item, 'dtype', '')}{getattr(item, 'shape', '')}".encode())
        digest.update(item.tobytes())
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        _update(digest, {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}, depth)
    else:
        # an address says nothing, and what a class says of its tensors is seldom all of them
        kind = type(item)
        digest.update((kind.__qualname__ if kind.__repr__ is object.__repr__ else repr(item)).encode())
        if depth and not isinstance(item, _LEAVES) and not callable(item):
            _update(digest, dict(getattr(item, "__dict__", {})), depth - 1)
