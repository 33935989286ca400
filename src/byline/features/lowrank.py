"""LOW-RANK features: the kernel of `Exact`, of factors that are kept in their leading directions alone.

For ``∇W = Σ_t g_t ⊗ x_t``: ``⟨∇W(a), ∇W(b)⟩ ≈ Σ_ts (U'g_at · U'g_bs)(V'x_at · V'x_bs)``, U and V the leading
eigenvectors of the second moments of g and x over the training set (the K-FAC eigenbasis, George et al. 2018,
arXiv 1806.03884, as `Factorized` has it) or, where these are nearly the same, coordinates. The factors are kept,
2·rank numbers a layer, and not their rank² products: a row is as small as one of a few columns, and its kernel as rich
as one of thousands. Factors that several members share, such as the inputs themselves, are kept once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from byline.features.base import Passes, Rows, State, bytes_of, check_dim, check_dtype, sampled, seeded, widened
from byline.features.blocks import Block, Flat, Lookup, Outer
from byline.features.directions import entries, leading, onto, product, projected, strongest, used_positions
from byline.features.exact import Kernels

_SAMPLE = 2048  # training examples from which the directions are learnt
_LARGEST = 4096  # numbers of a factor; of wider ones no square matrix of second moments is made
_MORE = 64  # random vectors that stand for it, beyond twice the rank


class LowRank(Kernels):
    """Kernels from per-layer factors, each kept in its ``rank`` leading directions.

    With ``rank`` at least as large as every layer it is `Exact`. Where the layers' products have fewer entries than
    there are training examples (at most rank² a layer, and no embeddings), ``TRAK`` works with those, made of the
    factors as they are read; otherwise it needs N × N numbers per member while it works, as with `Exact`.

    Args:
        rank: directions of each factor, at most.
        columns: how many of the products' entries count there, those of the strongest pairs of directions over all
            layers (what has no factors, such as norms, comes on top); None for all. A query costs in proportion; the
            rows that are kept stay the factors.
        seed: of the sample of training examples that the directions are learnt from.
        dtype: what rows are kept as: ``"float32"`` (as computed), or ``"float16"`` or ``"int8"`` with a scale per row.

    Raises:
        ValueError: ``rank`` or ``columns`` is no int of at least 1, or the dtype is another.
    """

    def __init__(self, rank: int = 64, columns: int | None = None, seed: int = 0, dtype: str = "float32"):
        self.rank = check_dim(rank, "rank")
        self.columns = None if columns is None else check_dim(columns, "columns")
        self.seed = seed
        self.dtype = check_dtype(dtype)

    def describe(self) -> dict[str, Any]:
        """Kind, rank, columns, seed and dtype."""
        some = {} if self.columns is None else {"columns": self.columns}
        return {"kind": "low-rank", "rank": self.rank, **some, "seed": self.seed, "dtype": self.dtype}

    def learn(self, passes: Passes, length: int) -> State:
        """The directions of every factor, which pairs count, and per block whether factors or product are kept."""
        count = min(length, _SAMPLE)
        chosen = sampled(length, count, self.seed, "sample")
        sums: dict[str, Tensor] = {}
        sketches: State = {}
        state: State = {}
        groups: dict[str, int] = {}
        positions: dict[str, int] = {}
        for blocks in passes(chosen):
            for name, block in blocks.items():
                used = used_positions(block)
                for side, factor in _factors(block).items():
                    width, key = factor.shape[-1], f"{name}/{side}"
                    if width <= self.rank and self.columns is None:
                        continue
                    flat = factor[used[side]]
                    other = flat
                    if width > _LARGEST:
                        size = min(2 * self.rank + _MORE, width)
                        if key not in sketches:
                            sketches[key] = torch.randn(width, size, generator=seeded(self.seed, name, side))
                        other = flat @ sketches[key].to(flat)
                    sums[key] = sums.get(key, 0) + (flat.T @ other).double()
                if f"flat/{name}" not in state:
                    state[f"flat/{name}"] = torch.tensor(self._product_is_smaller(block))
                if isinstance(block, Outer):
                    groups[name] = block.left.shape[1]
                    positions[name] = positions.get(name, 0) + int(used["right"].sum())
        values: dict[str, Tensor] = {}
        for key, total in sums.items():
            if key in sketches:
                # what the second moments do to random vectors spans their leading directions (Halko et al. 2011)
                vectors, value, _ = torch.linalg.svd(total, full_matrices=False)
                values[key] = value[: self.rank] / sketches[key].shape[1] ** 0.5
                state[key] = vectors[:, : self.rank].float().contiguous()
            else:
                values[key], state[key] = leading(total, self.rank)
        if self.columns is not None:
            grids = {n: values[f"{n}/left"].unsqueeze(1) * values[f"{n}/right"] / max(1, positions[n]) for n in groups}
            none = torch.zeros(2, 0, dtype=torch.long)
            found = strongest(grids, groups, self.columns)
            state.update({f"pairs/{name}": found.get(name, none) for name in groups})
        return state

    def row_bytes(self, blocks: dict[str, Block]) -> dict[str, int]:
        """Of the factors in as many directions as are kept, or of their product."""
        forms: dict[str, tuple[int, ...]] = {}
        for name, block in blocks.items():
            if isinstance(block, Flat):
                forms[f"{name}:flat"] = (block.grad.shape[1],)
                continue
            *tokens, inputs = block.right.shape[1:]
            right = min(self.rank, inputs)
            if isinstance(block, Lookup):
                forms[f"{name}:ids"], forms[f"{name}:right"] = tuple(tokens), (*tokens, right)
                continue
            left = min(self.rank, block.left.shape[3])
            if self._product_is_smaller(block):
                forms[f"{name}:flat"] = (tokens[0] * left * right,)
            else:
                forms[f"{name}:left"], forms[f"{name}:right"] = (*tokens, left), (*tokens, right)
        return bytes_of(forms, self.dtype)

    def rows(self, blocks: dict[str, Block], state: State) -> Rows:
        """The factors of every block in their directions, or their product; what has no factors is whole."""
        out: Rows = {}
        for name, block in blocks.items():
            if isinstance(block, Flat):
                out[f"{name}:flat"] = block.rows()
                continue
            left, right = state.get(f"{name}/left"), state.get(f"{name}/right")
            if isinstance(block, Lookup):
                out[f"{name}:ids"], out[f"{name}:right"] = block.ids, onto(block.right, right)
            elif bool(state[f"flat/{name}"]):
                out[f"{name}:flat"] = projected(block, left, right, None)
            else:
                out[f"{name}:left"], out[f"{name}:right"] = onto(block.left, left), onto(block.right, right)
        return widened(out)

    def vectors(self, rows: Rows, state: State) -> Tensor:
        """(B, k) the entries of every layer's product that count."""
        parts = []
        # rows come in the order of the model, or of the manifest that they were read by
        for name in sorted(rows):
            block, _, part = name.rpartition(":")
            pairs = state.get(f"pairs/{block}")
            if part == "left":
                parts.append(product(rows[name], rows[f"{block}:right"], pairs))
            elif part == "flat" and pairs is not None:
                o, i = (state[f"{block}/{side}"].shape[-1] for side in ("left", "right"))
                parts.append(entries(rows[name].unflatten(1, (-1, o, i)), pairs))
            elif part == "flat":
                parts.append(rows[name])
        return torch.cat(parts, 1)

    def width(self, forms: Mapping[str, tuple[int, ...]], state: State) -> int | None:
        """Entries of every layer's product; None with embeddings, whose product is as long as the vocabulary."""
        total = 0
        for name, form in forms.items():
            block, _, part = name.rpartition(":")
            pairs = state.get(f"pairs/{block}")
            if part == "ids":
                return None
            if part == "flat":
                o, i = (1, 1) if pairs is None else (state[f"{block}/{s}"].shape[-1] for s in ("left", "right"))
                total += form[0] // (o * i) * (1 if pairs is None else pairs.shape[1])
            elif part == "left":
                total += form[0] * (form[2] * forms[f"{block}:right"][2] if pairs is None else pairs.shape[1])
        return total

    def least_width(self, forms: Iterable[tuple[int, ...]]) -> int:
        """What `width` is at least, from the forms of the parameters alone: vectors count for nothing, being biases."""
        factors = [(form[0], math.prod(form[1:])) for form in forms if len(form) > 1]
        least = sum(min(self.rank, rows) * min(self.rank, columns) for rows, columns in factors)
        return least if self.columns is None else 0

    def _product_is_smaller(self, block: Block) -> bool:
        if not isinstance(block, Outer):
            return isinstance(block, Flat)
        o, i = (min(self.rank, factor.shape[-1]) for factor in (block.left, block.right))
        return o * i <= block.left.shape[2] * (o + i)


def _factors(block: Block) -> dict[str, Tensor]:
    if isinstance(block, Flat):
        return {}
    return {"right": block.right} if isinstance(block, Lookup) else {"left": block.left, "right": block.right}
