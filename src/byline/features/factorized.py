"""FACTORIZED features: project each layer's inputs and output gradients before their product is formed.

For ``∇W = Σ_t g_t ⊗ x_t``: ``row = Σ_t (g_t A) ⊗ (x_t B)`` with A (o, o') and B (i, i') (LoGra, Choe et al. 2024).
With ``basis="random"`` A and B are Gaussian and unbiased; with ``basis="pca"`` they are the leading directions of
the layer's gradients and inputs on the training set, and of all pairs of directions, over all layers, those with the
largest products of eigenvalues are kept (the K-FAC eigenbasis, Martens & Grosse 2015; George et al. 2018). Factors that
have their coordinates for directions, such as the logits of a vocabulary, keep these (`byline.features.directions`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from byline.features.base import (
    Features,
    Passes,
    Rows,
    State,
    bytes_of,
    check_dim,
    check_dtype,
    sampled,
    seeded,
    widened,
)
from byline.features.blocks import Block, Flat, Lookup, Outer
from byline.features.directions import leading, onto, product, projected, strongest, used_positions

_SAMPLE = 2048  # training examples from which the pca basis is learnt
_LARGEST = 4096  # a basis is learnt for factors up to this width; wider ones are projected at random first


class Factorized(Features):
    """Project the factors: ``dim`` columns in all, shared out among the layers.

    Args:
        dim: columns per member, at most.
        basis: ``"random"`` or ``"pca"``.
        seed: of the random projections (the same for every member) and of the sample that the pca sees.
        dtype: what rows are kept as: ``"float32"`` (as computed), or ``"float16"`` or ``"int8"`` with a scale per row.
    """

    def __init__(self, dim: int = 1024, basis: str = "random", seed: int = 0, dtype: str = "float32"):
        self.dim = check_dim(dim)
        if basis not in ("random", "pca"):
            raise ValueError(f"basis is {basis!r}; expected 'random' or 'pca'")
        self.basis = basis
        self.seed = seed
        self.dtype = check_dtype(dtype)

    def describe(self) -> dict[str, Any]:
        """Kind, columns, basis and seed."""
        return {"kind": "factorized", "dim": self.dim, "basis": self.basis, "seed": self.seed, "dtype": self.dtype}

    def learn(self, passes: Passes, length: int) -> State:
        """The projections of every block."""
        return self._random(next(iter(passes([0])))) if self.basis == "random" else self._pca(passes, length)

    def row_bytes(self, blocks: dict[str, Block]) -> dict[str, int]:
        """Of the columns."""
        return bytes_of({"rows": (self.dim,)}, self.dtype)

    def rows(self, blocks: dict[str, Block], state: State) -> Rows:
        """(B, dim) or fewer."""
        parts = []
        for name, block in blocks.items():
            right, pairs = state.get(f"{name}/right"), state.get(f"{name}/pairs")
            whole = state.get(f"{name}/whole")
            if whole is not None:
                parts.append(block.rows() @ whole.to(next(iter(_factors(block).values())).dtype))
                continue
            if isinstance(block, Flat):
                if right is not None:
                    parts.append(onto(block.rows(), right))
                continue
            if right is None:
                continue
            if isinstance(block, Lookup):
                left = _left(block, state[f"{name}/left"])
                parts.append(product(left, onto(block.right, right).unsqueeze(1), pairs))
            else:
                parts.append(projected(block, state[f"{name}/left"], right, pairs))
        return widened({"rows": torch.cat(parts, 1)})

    def _random(self, blocks: dict[str, Block]) -> State:
        state: State = {}
        shares = shares_of({name: _size(block) for name, block in blocks.items()}, self.dim)
        for name, block in blocks.items():
            share = shares[name]
            if share == 0:
                continue
            if isinstance(block, Flat):
                state[f"{name}/right"] = self._gaussian(block.grad.shape[1], share, name, "right")
                continue
            groups, o, i = _widths(block)
            if groups > 1 and share < _size(block):
                # many small groups: their gradient is no larger than its factors, and is projected whole
                state[f"{name}/whole"] = self._gaussian(_size(block), share, name, "whole")
                continue
            ko, ki = rectangle(max(1, share // groups), o, i)
            state[f"{name}/left"] = self._gaussian(o, ko, name, "left")
            state[f"{name}/right"] = self._gaussian(i, ki, name, "right")
        return state

    def _gaussian(self, rows: int, columns: int, *path: str) -> Tensor:
        """(rows, columns) with E[P Pᵀ] = I; the identity where nothing is saved."""
        if columns >= rows:
            return torch.eye(rows)
        return torch.randn(rows, columns, generator=seeded(self.seed, *path)) / math.sqrt(columns)

    def _pca(self, passes: Passes, length: int) -> State:
        count = min(length, _SAMPLE)
        order = sampled(length, count, self.seed, "sample")
        moments: dict[str, Tensor] = {}
        groups: dict[str, int] = {}
        positions: dict[str, int] = {}
        reduced: State = {}
        for blocks in passes(order):
            for name, block in blocks.items():
                used = used_positions(block)
                for side, factor in _factors(block).items():
                    if side == "ids":
                        counts = torch.bincount(factor[used["right"]], minlength=block.n).double()  # type: ignore[union-attr]
                        moments[f"{name}/ids"] = moments.get(f"{name}/ids", 0) + counts
                        continue
                    if factor.shape[-1] > _LARGEST:
                        key = f"{name}/{side}"
                        reduced.setdefault(key, self._gaussian(factor.shape[-1], _LARGEST // 4, name, side, "wide"))
                        factor = factor @ reduced[key].to(factor)
                    flat = factor[used[side]] if used else factor
                    moments[f"{name}/{side}"] = moments.get(f"{name}/{side}", 0) + (flat.T @ flat).double()
                groups[name] = 1 if isinstance(block, Flat) else _widths(block)[0]
                if not isinstance(block, Flat):
                    positions[name] = positions.get(name, 0) + int(used["right"].sum())
        return self._leading(moments, reduced, groups, positions)

    def _leading(
        self, moments: dict[str, Tensor], reduced: State, groups: dict[str, int], positions: dict[str, int]
    ) -> State:
        values: dict[str, Tensor] = {}
        bases: State = {}
        for key, moment in moments.items():
            if key.endswith("/ids"):
                # one-hot factors: the directions are the ids themselves, the most frequent first
                value, order = moment.sort(descending=True)
                kept = min(len(order), self.dim)
                values[key], bases[key] = value[:kept], order[:kept]
                continue
            # the coordinates of a random projection mean nothing
            values[key], found = leading(moment, self.dim, coordinates=key not in reduced)
            bases[key] = reduced[key] @ found if key in reduced else found
        grids = {}
        for name in groups:
            right = values[f"{name}/right"]
            left = values.get(f"{name}/left", values.get(f"{name}/ids"))
            grid = right.unsqueeze(0) if left is None else left.unsqueeze(1) * right.unsqueeze(0)
            # Σ (g·a)²(x·b)² over examples and positions, were the two independent
            grids[name] = grid / max(1, positions.get(name, 1))
        state: State = {}
        for name, own in strongest(grids, groups, self.dim).items():
            if f"{name}/left" not in bases and f"{name}/ids" not in bases:
                state[f"{name}/right"] = bases[f"{name}/right"][..., own[1]]
                continue
            left = bases.get(f"{name}/left", bases.get(f"{name}/ids"))
            assert left is not None
            keep_left = int(own[0].max()) + 1
            state[f"{name}/left"] = left[..., :keep_left].contiguous()
            state[f"{name}/right"] = bases[f"{name}/right"][..., : int(own[1].max()) + 1].contiguous()
            state[f"{name}/pairs"] = own
        return state


def _widths(block: Outer | Lookup) -> tuple[int, int, int]:
    """Groups, and the widths of the two factors."""
    if isinstance(block, Lookup):
        return 1, block.n, block.right.shape[-1]
    return block.left.shape[1], block.left.shape[3], block.right.shape[3]


def _size(block: Block) -> int:
    if isinstance(block, Flat):
        return block.grad.shape[1]
    groups, o, i = _widths(block)
    return groups * o * i


def _factors(block: Block) -> dict[str, Tensor]:
    if isinstance(block, Flat):
        return {"right": block.grad}
    if isinstance(block, Lookup):
        return {"ids": block.ids, "right": block.right}
    return {"left": block.left, "right": block.right}


def _left(block: Lookup, projection: Tensor) -> Tensor:
    """(B, 1, T, o') the projected left factor of an embedding: rows of the projection, or its kept ids."""
    if projection.is_floating_point():
        return projection.to(block.right)[block.ids].unsqueeze(1)
    return (block.ids.unsqueeze(-1) == projection).to(block.right.dtype).unsqueeze(1)


def shares_of(sizes: dict[str, int], dim: int) -> dict[str, int]:
    """Columns per block: equal shares, what a small block cannot use going to the others."""
    shares = dict.fromkeys(sizes, 0)
    left, open_blocks = dim, sorted(sizes, key=lambda name: (sizes[name], name))
    while open_blocks:
        share = left // len(open_blocks)
        name = open_blocks.pop(0)
        shares[name] = min(sizes[name], share)
        left -= shares[name]
    return shares


def rectangle(share: int, o: int, i: int) -> tuple[int, int]:
    """O' ≤ o and i' ≤ i with o'·i' ≤ share, in the proportions of the factors."""
    if share >= o * i:
        return o, i
    ko = min(o, max(1, round(math.sqrt(share * o / i))))
    ki = min(i, max(1, share // ko))
    ko = min(o, max(1, share // ki))
    return ko, ki
