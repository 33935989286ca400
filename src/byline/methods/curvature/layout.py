"""One flat vector per example: where each block of parameters stands in it.

A block of a layer holds its weight with the bias as one more column, so a vector in this layout is a permutation of
the parameters. Layer by layer the solvers see it as matrices; products with H see it as parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from byline.features.base import Rows
from byline.features.blocks import Block, Flat, Lookup, Outer


@dataclass(frozen=True)
class Part:
    """A block's place."""

    name: str
    params: tuple[str, ...]
    start: int
    stop: int
    shape: tuple[int, int, int]
    """(groups, rows, columns); (1, 1, n) for what has no factors."""


class Layout:
    """Where each block stands.

    Args:
        blocks: of any batch.
        shapes: of the attributed parameters, by name.
    """

    def __init__(self, blocks: dict[str, Block], shapes: dict[str, torch.Size]):
        self.shapes = shapes
        self.parts: list[Part] = []
        start = 0
        for name, block in blocks.items():
            shape = _shape(block)
            stop = start + shape[0] * shape[1] * shape[2]
            self.parts.append(Part(name, block.params, start, stop, shape))
            start = stop
        self.size = start

    def of_blocks(self, blocks: dict[str, Block]) -> Tensor:
        """(B, size) the gradients themselves."""
        return torch.cat([blocks[part.name].rows() for part in self.parts], 1)

    def of_rows(self, rows: Rows) -> Tensor:
        """(B, size) from the rows of `Exact` features."""
        return torch.cat([_part_of(part, rows) for part in self.parts], 1)

    def products(self, vectors: Tensor, rows: Rows) -> Tensor:
        """(B, N) inner products of vectors (B, size) with the gradients behind N rows of `Exact` features."""
        total = vectors.new_zeros(len(vectors), len(next(iter(rows.values()))))
        for part in self.parts:
            own = vectors[:, part.start : part.stop]
            left = rows.get(f"{part.name}:left")
            if left is None or left.shape[1:3] != (1, 1):
                total.addmm_(own, _part_of(part, rows).to(own).T)
                continue
            # of one position, l ⊗ r need not be formed: lᵀ V r
            right = rows[f"{part.name}:right"][:, 0, 0].to(own)
            middle = (own.reshape(-1, part.shape[2]) @ right.T).view(len(own), part.shape[1], -1)
            total += middle.mul_(left[:, 0, 0].to(own).T).sum(1)
        return total

    def to_params(self, vectors: Tensor) -> dict[str, Tensor]:
        """(k, size) as one (k, ...) per parameter."""
        out: dict[str, Tensor] = {}
        k = len(vectors)
        for part in self.parts:
            own = vectors[:, part.start : part.stop]
            if len(part.params) == 2:
                weight, bias = part.params
                matrix = own.reshape(k, *part.shape)
                out[weight], out[bias] = matrix[..., :-1], matrix[..., -1]
            else:
                out[part.params[0]] = own
        return {name: value.reshape(k, *self.shapes[name]) for name, value in out.items()}

    def from_params(self, params: dict[str, Tensor]) -> Tensor:
        """The inverse of `to_params`."""
        out = []
        for part in self.parts:
            own = [params[name] for name in part.params]
            if len(own) == 2:
                k, (groups, rows, columns) = len(own[0]), part.shape
                weight, bias = own[0].reshape(k, groups, rows, columns - 1), own[1].reshape(k, groups, rows, 1)
                out.append(torch.cat([weight, bias], -1).flatten(1))
            else:
                out.append(own[0].flatten(1))
        return torch.cat(out, 1)


def _part_of(part: Part, rows: Rows) -> Tensor:
    """(B, n) one block's gradients from its rows."""
    return block_of(part, rows).rows()


def block_of(part: Part, rows: Rows) -> Block:
    """One block from the rows of `Exact` features."""
    if f"{part.name}:flat" in rows:
        return Flat(part.params, rows[f"{part.name}:flat"])
    right = rows[f"{part.name}:right"]
    if f"{part.name}:ids" in rows:
        return Lookup(part.params, rows[f"{part.name}:ids"], right, part.shape[1])
    return Outer(part.params, rows[f"{part.name}:left"], right)


def _shape(block: Block) -> tuple[int, int, int]:
    if isinstance(block, Outer):
        return block.left.shape[1], block.left.shape[3], block.right.shape[3]
    if isinstance(block, Lookup):
        return 1, block.n, block.right.shape[-1]
    return 1, 1, block.grad.shape[1]
