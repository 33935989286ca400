"""Whether what a model says of an example depends on the others in its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from byline import batches
from byline.task import ExampleError

_LOOKED_AT = 64  # items whose sizes are compared


class Company:
    """A few examples alone and in several companies, collated anew for each.

    What varies in a batch is what its examples differ in: the smallest and the largest of those looked at are among
    them, so that padding is there if there is any.

    Args:
        dataset: the training set.
        batch: makes a batch of the examples at these places, on the device.
    """

    def __init__(self, dataset: Any, batch: Callable[[list[int]], Any]):
        n = len(dataset)
        looked = (
            sorted({i * (n - 1) // (_LOOKED_AT - 1) for i in range(_LOOKED_AT)}) if n > _LOOKED_AT else list(range(n))
        )
        sizes = {i: _numbers(dataset[i]) for i in looked}
        smallest, largest = min(looked, key=lambda i: (sizes[i], i)), max(looked, key=lambda i: (sizes[i], -i))
        self.places = list(dict.fromkeys([smallest, largest, n // 3, n - 1]))
        self._batch = batch
        self._made: list[tuple[list[int], Any]] | None = None

    def check(self, said: Callable[[Any], Tensor | tuple[Tensor, Tensor]], coarse: bool) -> None:
        """Refuse a model whose output for one of the examples is another in other company.

        Args:
            said: what the model says of a batch: (B,), or two of them.
            coarse: whether half precisions take part.

        Raises:
            ValueError: names the example.
        """
        if self._made is None:
            orders = [[place] for place in self.places]
            orders += [self.places, self.places[:2], self.places[::-1][:3]] if len(self.places) > 1 else []
            self._made = [(order, self._batch(order)) for order in orders]
        alone: dict[int, Tensor] = {}
        loose = 5e-2 if coarse else 1e-3
        for order, batch in self._made:
            with torch.enable_grad(), naming("train_set", order):
                found = said(batch)
            values = torch.stack([f.detach().double() for f in (found if isinstance(found, tuple) else (found,))], 1)
            for place, value in zip(order, values, strict=True):
                if place not in alone:
                    alone[place] = value
                elif not _same(alone[place], value, loose, max(float(v.abs().max()) for v in alone.values())):
                    raise ValueError(
                        f"an example's output depends on the other examples in its batch: train_set[{place}] gives "
                        f"{_shown(alone[place])} alone and {_shown(value)} beside {len(order) - 1} others (padding "
                        "that the model does not mask, batch statistics, sorting?); attribution needs one output per "
                        "example"
                    )


def _numbers(item: Any) -> int:
    return sum(t.numel() for t in batches.tensors(item)) or _length(item)


def _length(item: Any) -> int:
    """Numbers in an item of lists and arrays."""
    parts: Sequence[Any] = (
        list(item.values()) if isinstance(item, dict) else item if isinstance(item, tuple) else [item]
    )
    return sum(getattr(part, "size", 0) if not hasattr(part, "__len__") else len(part) for part in parts)


def _same(a: Tensor, b: Tensor, loose: float, scale: float) -> bool:
    scale = max(scale if scale == scale else 1.0, 1.0 if loose > 1e-2 else 0.0)
    return torch.allclose(a, b, rtol=loose, atol=loose * scale, equal_nan=True)


def _shown(values: Tensor) -> str:
    return " and ".join(f"{float(v):.5g}" for v in values)


@contextmanager
def naming(dataset_name: str, indices: Sequence[int]) -> Iterator[None]:
    """Say which example of the dataset a problem in a batch belongs to."""
    try:
        yield
    except ExampleError as error:
        raise ValueError(f"{dataset_name}[{indices[error.position % len(indices)]}]: {error.problem}") from None
