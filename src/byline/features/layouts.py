"""Where the examples of a batch are in what a layer is given and in what it gives.

Established, not assumed: from the shapes of the same call at two numbers of examples, and held to in every batch by a
second backward pass. Of values weighted by known random numbers, ``Σ_j r_j v_j``, the gradient of a row that belongs to
example i alone is ``r_i`` times what it is of ``Σ_j v_j``; a row on which another example depends breaks this with
probability one up to equal weights, which a batch has hardly any of. The weights are powers of two, so that
multiplying by them commutes with rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from byline.features.blocks import Block, Flat, Lookup, Outer


@dataclass(frozen=True)
class Layout:
    """The dimension that holds the examples, of a layer's input and output alike."""

    dim: int
    several: bool = False
    """Whether an example has several rows there (flattened positions, windows, frames)."""
    minor: bool = False
    """Whether the example varies fastest along them, as in a flattened (positions, batch)."""

    def per(self, t: Tensor, examples: int) -> int:
        """How many rows an example has, or 0 where the tensor does not have this layout."""
        if t.ndim <= self.dim or t.shape[self.dim] % examples:
            return 0
        per = t.shape[self.dim] // examples
        return per if self.several or per == 1 else 0

    def rows(self, t: Tensor, examples: int) -> Tensor:
        """(examples · per, ..), those of one example after the other."""
        t = t.movedim(self.dim, 0) if self.dim else t
        if self.minor:
            t = t.unflatten(0, (-1, examples)).transpose(0, 1).flatten(0, 1)
        return t


def of_shapes(many: Sequence[int], few: Sequence[int], examples: int, fewer: int) -> Layout | None:
    """The layout of an output that has the shape ``many`` of so many examples and ``few`` of fewer.

    None where the shape does not depend on their number, or not in one place and in proportion.
    """
    if len(many) != len(few):
        return None
    differ = [d for d, (a, b) in enumerate(zip(many, few, strict=True)) if a != b]
    if len(differ) != 1:
        return None
    dim = differ[0]
    if many[dim] % examples or many[dim] // examples * fewer != few[dim]:
        return None
    return Layout(dim, many[dim] != examples)


def orders(layout: Layout) -> list[Layout]:
    """The layouts that have these shapes: of flattened rows, either order."""
    return [layout, replace(layout, minor=True)] if layout.several else [layout]


def folded(block: Block, per: int) -> Block:
    """A block whose ``per`` rows of each example became one."""
    if per == 1:
        return block
    if isinstance(block, Flat):
        return Flat(block.params, block.grad.unflatten(0, (-1, per)).sum(1))
    if isinstance(block, Lookup):
        return Lookup(block.params, block.ids.reshape(-1, per * block.ids.shape[1]), _joined(block.right, per), block.n)

    def side(t: Tensor) -> Tensor:
        return t.unflatten(0, (-1, per)).transpose(1, 2).flatten(2, 3)

    return Outer(block.params, side(block.left), side(block.right))


def _joined(t: Tensor, per: int) -> Tensor:
    return t.reshape(-1, per * t.shape[1], *t.shape[2:])


class Weights:
    """The known random weights of a batch's examples.

    Args:
        examples: how many.
        like: gives dtype and device.
        seed: another for every batch.
    """

    def __init__(self, examples: int, like: Tensor, seed: int):
        # wide enough for all to differ in most batches, narrow enough for squares of gradients to stay finite
        reach = {torch.float16: 3, torch.float64: 200}.get(like.dtype, 30)
        values = torch.arange(-reach, reach + 1, dtype=torch.float64).exp2()
        values = torch.cat([values, -values])
        generator = torch.Generator().manual_seed(seed)
        places = torch.cat(
            [torch.randperm(len(values), generator=generator) for _ in range(-(-examples // len(values)))]
        )
        self.values = values[places[:examples]].to(like)

    def tells(self, plain: Tensor) -> bool:
        """Whether the rows of every example have something to tell: zeros are anybody's.

        Args:
            plain: (examples · per, ..) gradients of the values' sum, by example.
        """
        return bool(plain.reshape(len(self.values), -1).any(1).all())

    def apart(self, plain: Tensor, weighted: Tensor) -> bool:
        """Whether each row's gradient is that of its own example alone.

        Args:
            plain: (examples · per, ..) gradients of the values' sum, by example.
            weighted: the same of the weighted sum.
        """
        examples = len(self.values)
        a = plain.reshape(examples, -1)
        b = weighted.reshape(examples, -1) / self.values.unsqueeze(1).to(weighted)
        if not a.numel():
            return True
        a, b = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (a, b))
        size = a.norm(dim=1)
        # scaling by powers of two is exact, so that this leaves room for kernels that sum in another order alone
        close = (b - a).norm(dim=1) <= 1e-3 * size + 1e-7 * size.max()
        return bool((close | ~size.isfinite()).all())
