"""Whether what a model says of an example depends on the others in its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from byline import batches
from byline.task import ExampleError

_LOOKED_AT = 16  # items whose sizes are compared


class Company:
    """A few examples alone and in several companies, collated anew for each.

    What varies in a batch is what its examples differ in: the smallest and the largest of those looked at are among
    them, so that padding is there if there is any.

    Args:
        dataset: the training set; nothing is read before the first check.
        collate: makes a batch of its items.
        device: where to work.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], device: torch.device):
        self._dataset, self._collate, self._device = dataset, collate, device
        self._made: list[tuple[list[int], Any]] | None = None

    def _batches(self) -> list[tuple[list[int], Any]]:
        n = len(self._dataset)
        looked = sorted({i * (n - 1) // max(1, min(n, _LOOKED_AT) - 1) for i in range(min(n, _LOOKED_AT))})
        items = {i: self._dataset[i] for i in looked}
        sizes = {i: _numbers(item) for i, item in items.items()}
        smallest, largest = min(looked, key=lambda i: (sizes[i], i)), max(looked, key=lambda i: (sizes[i], -i))
        places = list(dict.fromkeys([smallest, largest, looked[len(looked) // 3], looked[-1]]))[:3]
        orders = [[place] for place in places]
        orders += [places, [places[-1], places[0]]] if len(places) > 1 else []
        collate = batches.collate_of(self._dataset, self._collate)

        def made(order: list[int]) -> Any:
            batch = batches.gather([items[place] for place in order], list(range(len(order))), collate)
            return batches.to(batch, self._device)

        return [(order, made(order)) for order in orders]

    def check(self, said: Callable[[Any], Tensor | tuple[Tensor, Tensor]], coarse: bool) -> None:
        """Refuse a model whose output for one of the examples is another in other company.

        Args:
            said: what the model says of a batch: (B,), or two of them.
            coarse: whether half precisions take part.

        Raises:
            ValueError: names the example.
        """
        if self._made is None:
            self._made = self._batches()
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
