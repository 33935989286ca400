"""Which directions of a layer's two factors say most, which pairs of them count, and their products with least work."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from byline.features.blocks import Block, Flat, Lookup, Outer

_SAME = 0.8  # of the two subspaces: vocabularies have more, other factors far less (bench/directions.py)
_WIDE = 64  # numbers of a factor; of narrower ones eigenvectors cost next to nothing


def leading(moment: Tensor, count: int, coordinates: bool = True) -> tuple[Tensor, Tensor]:
    """The directions in which a factor is largest, and how large it is there.

    Where the largest coordinates span nearly what the leading eigenvectors do, as tokens of a vocabulary do that
    softmax minus one-hot is taken of, they are taken instead: nothing is multiplied, and nothing kept but their places.

    Args:
        moment: (n, n) the sum of the factor's second moments.
        count: directions, at most.
        coordinates: whether they may be.

    Returns:
        (k,) values, the largest first, and either (n, k) eigenvectors or (k,) the places of coordinates.
    """
    value, vectors = (part.flip(-1) for part in torch.linalg.eigh(moment))
    if coordinates and len(moment) >= _WIDE:
        diagonal, places = moment.diagonal().sort(descending=True, stable=True)
        if min(overlap(vectors, places, k) for k in (len(moment) // 4, len(moment) // 2)) >= _SAME:
            return diagonal[:count], places[:count]
    return value[:count].clamp_min(0), vectors[:, :count].float().contiguous()


def overlap(vectors: Tensor, places: Tensor, count: int) -> float:
    """Of the subspaces of so many vectors and coordinates: 1 if they are the same, count / n by chance."""
    return float(vectors[places[:count], :count].square().sum() / count)


def onto(factor: Tensor, basis: Tensor | None) -> Tensor:
    """(..., k) a factor's components: along eigenvectors (n, k), at the places (k,) of coordinates, or all of them."""
    if basis is None:
        return factor
    return factor @ basis.to(factor) if basis.is_floating_point() else factor[..., basis]


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


def projected(block: Outer, left: Tensor | None, right: Tensor | None, pairs: Tensor | None) -> Tensor:
    """(B, k) the entries of ``Σ_t (left_t L) ⊗ (right_t R)``, all or those of these pairs, with least work.

    Args:
        block: the factors.
        left: L, as `onto` has it.
        right: R.
        pairs: (2, k) places in the product.
    """
    factors, bases = [], []
    for factor, basis in ((block.left, left), (block.right, right)):
        taken = basis is not None and not basis.is_floating_point()
        factors.append(onto(factor, basis) if taken else factor)
        bases.append(None if taken or basis is None else basis.to(factor))
    (g, x), (a, b) = factors, bases
    first = cheapest(g.shape[2], _form(g, a), _form(x, b))
    if first == "right":
        whole = g.transpose(2, 3) @ onto(x, b)
        return entries(whole if a is None else a.T @ whole, pairs)
    if first == "left":
        return entries(onto(onto(g, a).transpose(2, 3) @ x, b), pairs)
    return product(onto(g, a), onto(x, b), pairs)


def _form(factor: Tensor, basis: Tensor | None) -> tuple[int, int]:
    return factor.shape[3], 0 if basis is None else basis.shape[1]


def cheapest(t: int, left: tuple[int, int], right: tuple[int, int]) -> str:
    """Which factors are best projected before the sum over positions: "both", or one where the other follows after.

    Args:
        t: positions.
        left: (o, o') the shape of the left projection; o' is 0 where there is none, all of it being kept.
        right: (i, i') of the right one.
    """
    work = projection_work(t, left, right)
    return min(work, key=work.__getitem__)


def projection_work(t: int, left: tuple[int, int], right: tuple[int, int]) -> dict[str, int]:
    """Multiply-adds of each order. At one position the product is element by element, which is not counted."""
    (o, a), (i, b) = left, right
    to, ti = a or o, b or i
    both = {"both": t * (o * a + i * b + to * ti * (t > 1))}
    if t == 1:
        return both
    return both | {"right": t * (i * b + o * ti) + o * a * ti, "left": t * (o * a + i * to) + i * b * to}
