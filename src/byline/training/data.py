"""A dataset fetched once into memory, and the order in which a run visits it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Subset, TensorDataset, default_collate

from byline import batches
from byline.batches import Batch


def fetch(dataset: Any, name: str, collate: Callable[[list[Any]], Batch] | None = None) -> Batch:
    """The whole dataset as one batch: what its items collate to, every tensor (n, ...).

    Small models are trained many at a time, so each example would otherwise be fetched hundreds of times. A
    dataset of tensors is taken as it is.

    Args:
        dataset: Map-style dataset.
        name: What to call it in an error.
        collate: Makes a batch of a list of items; the dataset's own ``collate_fn`` or torch's when left out.

    Raises:
        TypeError: If it has no length or no fixed order.
        ValueError: If it is empty, its items do not stack, or a batch holds something else than tensors.
    """
    dataset = batches.as_dataset(dataset, name)
    size = len(dataset)
    if collate is None and (own := batches.collate_of(dataset)) is not default_collate:
        collate = own
    if type(dataset) is Subset and type(dataset.dataset) is TensorDataset:
        index = torch.as_tensor(np.asarray(dataset.indices, dtype=np.int64))
        dataset = TensorDataset(*(tensor[index] for tensor in dataset.dataset.tensors))
    if type(dataset) is TensorDataset and collate is None:
        return tuple(dataset.tensors)
    items = [dataset[i] for i in range(size)]
    if collate is None and isinstance(items[0], Mapping):
        items = [dict(item) for item in items]  # torch cannot collate Hugging Face's BatchEncoding
    try:
        batch = (collate or default_collate)(items)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name}: its {size} items do not stack into one batch ({error}); collate= can pad them"
        ) from error
    batch = batches.map_tensors(batch, lambda tensor: tensor)  # mappings of every kind become dicts
    for leaf in tree_leaves(batch):
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0 or len(leaf) != size:
            got = f"shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else f"a {type(leaf).__name__}"
            raise ValueError(f"{name}: a batch must hold tensors with a row for each of {size} examples; got {got}")
    return batch


def take(data: Batch, index: torch.Tensor) -> Batch:
    """The examples at these positions: every (n, ...) tensor becomes (*index.shape, ...)."""
    return tree_map(lambda tensor: tensor[index], data)


def derive(*keys: int) -> int:
    """A seed from several numbers, so that unrelated uses of one seed never share a random stream."""
    return int(np.random.SeedSequence(list(keys)).generate_state(1, np.uint64)[0] >> 1)


def order(seed: int, epoch: int, examples: int) -> torch.Tensor:
    """The order, (examples,) int64, in which the run of this seed visits its examples in this epoch (from 0).

    A function of its arguments alone: no random state has to be kept to repeat or resume a run.
    """
    return torch.from_numpy(np.random.default_rng([seed, epoch, 1]).permutation(examples))
