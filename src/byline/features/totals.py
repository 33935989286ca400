"""Rows must add up: the gradient of a batch's summed values is the sum of its examples' gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from byline.features.blocks import Block, Flat, Lookup


@dataclass
class Totals:
    """Gradients of a batch's summed values, to which rows must add up."""

    of: dict[str, Tensor]
    scale: float
    """Of the values, to tell rounding from a gradient."""
    half: bool
    """Whether half precisions take part."""

    def odd(self, rows: Mapping[str, Tensor]) -> set[str]:
        """Parameters whose (B, numel) rows do not add up,"""
        return {n for n, own in rows.items() if n in self.of and not self._close(n, own.sum(0), float(own.norm()))}

    def unequal(self, sides: Sequence[Mapping[str, Block]]) -> set[str]:
        """Parameters whose blocks, those of all sides together, do not add up."""
        sums: dict[str, Tensor] = {}
        beside: dict[str, set[str]] = {}
        for block in (block for side in sides for block in side.values()):
            if self.of.keys().isdisjoint(block.params):
                continue
            for name, whole in zip(block.params, _sums(block), strict=True):
                sums[name] = whole if name not in sums else sums[name] + whole
                beside.setdefault(name, set()).update(block.params)
        return {
            other
            for name, whole in sums.items()
            if name in self.of and not self._close(name, whole, 0.0)
            for other in beside[name]
        }

    def _close(self, name: str, whole: Tensor, size: float) -> bool:
        total = self.of[name].flatten()
        loose = 0.1 if self.half else 1e-6 if total.dtype == torch.float64 else 2e-3
        error = float((whole.to(total) - total).norm())
        size = max(size, float(total.norm()))
        # NaN is for others to name
        return not error > loose * size + 1e-3 * loose * self.scale


def _sums(block: Block) -> list[Tensor]:
    """The gradient of a batch's examples together, one flat tensor per parameter."""
    if isinstance(block, Flat):
        return [block.grad.sum(0)]
    if isinstance(block, Lookup):
        out = block.right.new_zeros(block.n, block.right.shape[-1])
        return [out.index_add_(0, block.ids.flatten(), block.right.flatten(0, 1)).flatten()]
    left, right = (t.transpose(0, 1).flatten(1, 2) for t in (block.left, block.right))
    whole = left.mT @ right
    return [whole[..., :-1].flatten(), whole[..., -1].flatten()] if len(block.params) == 2 else [whole.flatten()]
