"""Per-example gradients of one parameter (or of a weight with its bias), kept as factors where that is smaller.

A block stands for the rows ``∇_w f(z_b)``, b = 1..B, without forming them:

- `Outer`: sum over positions t of ``left_t ⊗ right_t`` (linear and convolutional weights; groups g side by side),
- `Lookup`: ``right_t`` added to row ``ids_t`` (embeddings),
- `Flat`: the rows themselves (biases, norms, whatever fell back to autograd).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Flat:
    """(B, n): the gradient itself."""

    params: tuple[str, ...]
    grad: Tensor

    def rows(self) -> Tensor:
        """(B, n)."""
        return self.grad

    def split(self) -> list[Tensor]:
        """One (B, numel) per parameter."""
        return [self.grad]


@dataclass
class Outer:
    """left (B, G, T, o), right (B, G, T, i): gradient ``Σ_t left_gt ⊗ right_gt``, of G·o·i entries."""

    params: tuple[str, ...]
    left: Tensor
    right: Tensor

    @property
    def size(self) -> int:
        """Entries of the gradient of one example."""
        return self.left.shape[1] * self.left.shape[3] * self.right.shape[3]

    @property
    def smaller_flat(self) -> bool:
        """Whether the gradient takes no more space than its factors."""
        t, o = self.left.shape[2:]
        return o * self.right.shape[3] <= t * (o + self.right.shape[3])

    def rows(self) -> Tensor:
        """(B, G·o·i)."""
        return torch.einsum("bgto,bgti->bgoi", self.left, self.right).flatten(1)

    def split(self) -> list[Tensor]:
        """One (B, numel) per parameter; the bias is the last column of ``right``."""
        if len(self.params) == 1:
            return [self.rows()]
        full = torch.einsum("bgto,bgti->bgoi", self.left, self.right)
        return [full[..., :-1].flatten(1), full[..., -1].flatten(1)]


@dataclass
class Lookup:
    """ids (B, T) into n rows, right (B, T, d): gradient ``right_t`` added to row ``ids_t``."""

    params: tuple[str, ...]
    ids: Tensor
    right: Tensor
    n: int

    def outer(self) -> Outer:
        """The same with one-hot factors."""
        left = F.one_hot(self.ids, self.n).to(self.right.dtype)
        return Outer(self.params, left.unsqueeze(1), self.right.unsqueeze(1))

    def rows(self) -> Tensor:
        """(B, n·d)."""
        b, _, d = self.right.shape
        out = self.right.new_zeros(b, self.n, d)
        return out.scatter_add_(1, self.ids.unsqueeze(-1).expand_as(self.right), self.right).flatten(1)

    def split(self) -> list[Tensor]:
        """One (B, numel)."""
        return [self.rows()]


Block = Flat | Outer | Lookup


def merge(blocks: list[Block]) -> Block:
    """The sum of the gradients that several calls, or several modules, give to one parameter."""
    first = blocks[0]
    if len(blocks) == 1:
        return first
    if all(isinstance(block, Flat) for block in blocks):
        return Flat(first.params, torch.stack([block.rows() for block in blocks]).sum(0))
    if all(isinstance(block, Lookup) for block in blocks):
        lookups = [block for block in blocks if isinstance(block, Lookup)]
        return Lookup(
            first.params,
            torch.cat([block.ids for block in lookups], 1),
            torch.cat([block.right for block in lookups], 1),
            lookups[0].n,
        )
    outers = [block.outer() if isinstance(block, Lookup) else block for block in blocks]
    if not all(isinstance(block, Outer) for block in outers):
        return Flat(first.params, torch.stack([block.rows() for block in blocks]).sum(0))
    return Outer(
        first.params,
        torch.cat([block.left for block in outers], 2),  # type: ignore[union-attr]
        torch.cat([block.right for block in outers], 2),  # type: ignore[union-attr]
    )
