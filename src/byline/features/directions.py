"""Which directions of a layer's two factors say most: from which positions they are learnt, and which pairs count."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from byline.features.blocks import Block, Flat, Lookup


def strongest(grids: Mapping[str, Tensor], groups: Mapping[str, int], count: int) -> dict[str, Tensor]:
    """The pairs with the largest products of eigenvalues, as many as ``count`` columns hold.

    Args:
        grids: per block, (left directions, right directions) what a pair carries: ``E (g·a)²(x·b)²``, were the two
            independent; (1, directions) where there is one factor.
        groups: per block, how many columns a pair takes.
        count: columns in all; the strongest pair of all is always taken.

    Returns:
        per block that has some, (2, k) places in its grid, the strongest first.
    """
    names: list[str] = []
    strengths, pairs = [], []
    for name, grid in grids.items():
        top = grid.flatten().topk(min(count, grid.numel()))
        names += [name] * len(top.values)
        strengths.append(top.values / groups[name])
        pairs.append(torch.stack([top.indices // grid.shape[1], top.indices % grid.shape[1]]))
    if not names:
        return {}
    strength, pair = torch.cat(strengths), torch.cat(pairs, 1)
    cost = torch.tensor([groups[name] for name in names])
    order = strength.argsort(descending=True, stable=True)
    chosen = order[cost[order].cumsum(0) <= max(count, int(cost[order[0]]))]
    owner: dict[str, list[int]] = {}
    for index in chosen.tolist():
        owner.setdefault(names[index], []).append(index)
    return {name: pair[:, owner[name]] for name in grids if name in owner}


def used_positions(block: Block) -> dict[str, Tensor]:
    """Per factor, the positions at which the gradient is not 0: neither padding nor what a loss leaves out."""
    if isinstance(block, Flat):
        return {}
    if isinstance(block, Lookup):
        return {"right": block.right.ne(0).any(-1)}
    left = block.left.ne(0).any(-1)
    # one factor of inputs may serve all groups
    return {"left": left, "right": left if block.right.shape[1] == left.shape[1] else left.any(1, keepdim=True)}


def product(left: Tensor, right: Tensor, pairs: Tensor | None) -> Tensor:
    """(B, k) the entries of ``Σ_t left_t ⊗ right_t``, all or those of these pairs."""
    if pairs is not None and left.shape[1:3] == (1, 1) and right.shape[1:3] == (1, 1):
        return left[:, 0, 0][:, pairs[0]] * right[:, 0, 0][:, pairs[1]]
    return entries(torch.einsum("bgto,bgti->bgoi", left, right), pairs)


def entries(whole: Tensor, pairs: Tensor | None) -> Tensor:
    """(B, k) of (B, G, o, i) all, or those of these pairs."""
    return (whole if pairs is None else whole[:, :, pairs[0], pairs[1]]).flatten(1)
