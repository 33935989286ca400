"""EXACT features: no projection. The kernel of two gradients is the sum over layers of products of small kernels.

For a linear layer, ∇W = g ⊗ x, so ``⟨∇W(a), ∇W(b)⟩ = (g_a·g_b)(x_a·x_b)``: the (B, P) gradients are never formed. With
T positions the sum runs over pairs of positions, or, where these are so many that it is less work, the gradients are
formed a few at a time; where the gradient itself is smaller than its factors (small convolutions over many positions),
it is kept instead. Of an embedding only positions of the same id meet.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from byline.features.base import Features, Passes, Products, Rows, State, bytes_of, check_dtype, widened
from byline.features.blocks import Block, Flat, Lookup, Outer

_AT_ONCE = 2**24  # numbers of an intermediate result: 64 MB in float32
_BATCH = 64  # examples a side for which the cheaper way is chosen, so that it does not depend on the batch


class Kernels(Features):
    """Rows that are factors by layer, ``<block>:left`` and ``:right``, ids and ``:right``, or ``:flat`` gradients."""

    linear = False

    def kernel(self, a: Rows, b: Rows, products: Products | None = None) -> Tensor:
        """(A, B) inner products of full gradients."""
        products = products or Products()
        total: Tensor | None = None
        for name, x in a.items():
            block, _, part = name.rpartition(":")
            if part == "flat":
                term = x @ b[name].T
            elif part == "right":
                continue
            elif part == "ids":
                term = _lookup_kernel(x, a[f"{block}:right"], b[name], b[f"{block}:right"])
            else:
                right = f"{block}:right"
                term = _outer_kernel(x, a[right], b[name], b[right], products, _keys(a, b, name), _keys(a, b, right))
            total = term if total is None else total.add_(term)
        assert total is not None
        return total

    def diagonal(self, a: Rows, b: Rows) -> Tensor:
        """(B,) inner products of pairs of gradients."""
        total: Tensor | None = None
        for name, x in a.items():
            block, _, part = name.rpartition(":")
            if part == "right":
                continue
            y = b[name]
            if part == "flat":
                term = (x * y).sum(1)
            else:
                right = torch.einsum("b...ti,b...si->b...ts", a[f"{block}:right"], b[f"{block}:right"])
                if part == "ids":
                    left = (x.unsqueeze(2) == y.unsqueeze(1)).to(right.dtype)
                else:
                    left = torch.einsum("bgto,bgso->bgts", x, y)
                term = (left * right).flatten(1).sum(1)
            total = term if total is None else total + term
        assert total is not None
        return total


class Exact(Kernels):
    """Kernels from per-layer factors, without projection.

    ``TRAK`` needs the kernel of all pairs of training examples with it, N × N numbers per member while it works; take
    `Nystrom` or `Factorized` where that is too many. ``GradDot``, ``GradCos`` and ``TracIn`` do not.

    Args:
        dtype: what rows are kept as: ``"float32"`` (as computed), or ``"float16"`` or ``"int8"`` with a scale per row.
    """

    def __init__(self, dtype: str = "float32"):
        self.dtype = check_dtype(dtype)

    def describe(self) -> dict[str, Any]:
        """The kind, and the dtype."""
        return {"kind": "exact", "dtype": self.dtype}

    def learn(self, passes: Passes, length: int) -> State:
        """Decide per block, from one example, whether its factors or its gradient are kept."""
        blocks = next(iter(passes([0])))
        return {
            f"flat/{name}": torch.tensor(isinstance(block, Flat) or (isinstance(block, Outer) and block.smaller_flat))
            for name, block in blocks.items()
        }

    def row_bytes(self, blocks: dict[str, Block]) -> dict[str, int]:
        """Of the factors, or of the gradient where it is smaller."""
        rows = self.rows(blocks, self.learn(lambda indices: iter([blocks]), 1))
        return bytes_of({name: tuple(value.shape[1:]) for name, value in rows.items()}, self.dtype)

    def rows(self, blocks: dict[str, Block], state: State) -> Rows:
        """The factors of every block, or its gradient."""
        out: Rows = {}
        for name, block in blocks.items():
            if bool(state[f"flat/{name}"]) or isinstance(block, Flat):
                out[f"{name}:flat"] = block.rows()
            elif isinstance(block, Lookup):
                out[f"{name}:ids"], out[f"{name}:right"] = block.ids, block.right
            else:
                out[f"{name}:left"], out[f"{name}:right"] = block.left, block.right
        return widened(out)


def _keys(a: Rows, b: Rows, name: str) -> tuple[str, str] | None:
    one, two = getattr(a, "keys_of", {}).get(name), getattr(b, "keys_of", {}).get(name)
    return (one, two) if one and two else None


def _outer_kernel(
    la: Tensor,
    ra: Tensor,
    lb: Tensor,
    rb: Tensor,
    products: Products,
    left_keys: tuple[str, str] | None,
    right_keys: tuple[str, str] | None,
) -> Tensor:
    """Σ over groups g and positions t, s of ``(l_at · l_bs)(r_at · r_bs)``."""
    if la.shape[1] == 1 and la.shape[2] == 1 and lb.shape[2] == 1:
        left = products(la[:, 0, 0], lb[:, 0, 0], left_keys)
        right = products(ra[:, 0, 0], rb[:, 0, 0], right_keys)
        return left * right
    total = la.new_zeros(la.shape[0], lb.shape[0])
    if 0 in (*la.shape, *lb.shape):
        return total
    t, s, o, i = la.shape[2], lb.shape[2], la.shape[3], ra.shape[3]
    block = max(1, _AT_ONCE // (o * i))
    if o * i * (1 + (t + s) / min(block, _BATCH)) < t * s * (o + i):
        # over so many positions it is less work to form the gradients, some at a time
        for group in range(la.shape[1]):
            for b in range(0, len(lb), block):
                of_b = _formed(lb[b : b + block, group], rb[b : b + block, group])
                for a in range(0, len(la), block):
                    of_a = _formed(la[a : a + block, group], ra[a : a + block, group])
                    total[a : a + block, b : b + block] += of_a @ of_b.T
        return total
    # (A·T, B·S) products at once would not fit: as many rows of a as keep them near 64 MB
    per_row = la.shape[2] * lb.shape[0] * lb.shape[2]
    step = max(1, _AT_ONCE // per_row)
    for group in range(la.shape[1]):
        lbg, rbg = lb[:, group].flatten(0, 1), rb[:, group].flatten(0, 1)
        for start in range(0, la.shape[0], step):
            lag, rag = la[start : start + step, group], ra[start : start + step, group]
            pairs = (lag.flatten(0, 1) @ lbg.T).mul_(rag.flatten(0, 1) @ rbg.T)
            total[start : start + step] += pairs.view(lag.shape[0], la.shape[2], lb.shape[0], lb.shape[2]).sum((1, 3))
    return total


def _formed(left: Tensor, right: Tensor) -> Tensor:
    """(B, o·i) gradients of (B, T, o) and (B, T, i) factors."""
    return (left.transpose(1, 2) @ right).flatten(1)


def _lookup_kernel(ia: Tensor, ra: Tensor, ib: Tensor, rb: Tensor) -> Tensor:
    """Σ over positions t, s with the same id of ``r_at · r_bs``.

    Id by id: pairs of positions of different ids, nearly all there are, are never looked at.
    """
    total = ra.new_zeros(ra.shape[0], rb.shape[0])
    (of_a, sums_a, spans_a), (of_b, sums_b, spans_b) = _by_id(ia, ra), _by_id(ib, rb)
    for one, a in spans_a.items():
        if (b := spans_b.get(one)) is not None:
            total[of_a[a].unsqueeze(1), of_b[b]] += sums_a[a] @ sums_b[b].T
    return total


def _by_id(ids: Tensor, right: Tensor) -> tuple[Tensor, Tensor, dict[int, slice]]:
    """Each example's sum at each id it has, sorted by id: (E,) examples, (E, d) sums, and the place of every id."""
    examples = max(1, len(ids))
    keys = ids.long() * examples + torch.arange(len(ids), device=ids.device).unsqueeze(1)
    found, places = keys.unique(return_inverse=True)
    sums = right.new_zeros(len(found), right.shape[2]).index_add_(0, places.flatten(), right.flatten(0, 1))
    present, counts = (found // examples).unique_consecutive(return_counts=True)
    ends = [0, *counts.cumsum(0).tolist()]
    spans = {one: slice(a, b) for one, (a, b) in zip(present.tolist(), itertools.pairwise(ends), strict=True)}
    return found % examples, sums, spans
