"""DENSE features: the literature's projection of the whole gradient (Park et al. 2023), the reference for the others.

``row = ∇f P / √dim`` with P (parameters, dim): independent ±1 (rademacher), N(0, 1) (gaussian), or a sparse
Johnson-Lindenstrauss transform with a few ±1 per row (sjlt; Kane & Nelson 2014). P is drawn block by block from the
seed and never held whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from byline.features.base import Features, Rows, State, bytes_of, check_dim, check_dtype, seeded, widened
from byline.features.blocks import Block

_KINDS = ("rademacher", "gaussian", "sjlt")
_PER_ROW = 4  # nonzeros per parameter of an sjlt
_SLICE = 4096  # parameters projected at once


class Dense(Features):
    """Project the whole gradient; forms it batch by batch, so that it is slow and large: a reference.

    Args:
        dim: columns.
        kind: ``"rademacher"``, ``"gaussian"`` or ``"sjlt"``.
        seed: of the projection, which members share.
        dtype: what rows are kept as: ``"float32"`` (as computed), or ``"float16"`` or ``"int8"`` with a scale per row.
    """

    def __init__(self, dim: int = 512, kind: str = "rademacher", seed: int = 0, dtype: str = "float32"):
        self.dim = check_dim(dim)
        if kind not in _KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {_KINDS}")
        self.kind_of = kind
        self.seed = seed
        self.dtype = check_dtype(dtype)

    def describe(self) -> dict[str, Any]:
        """Kind, columns, projection and seed."""
        return {"kind": "dense", "dim": self.dim, "projection": self.kind_of, "seed": self.seed, "dtype": self.dtype}

    def __repr__(self) -> str:
        return super().__repr__().replace("projection=", "kind=")

    def row_bytes(self, blocks: dict[str, Block]) -> dict[str, int]:
        """Of the columns."""
        return bytes_of({"rows": (self.dim,)}, self.dtype)

    def rows(self, blocks: dict[str, Block], state: State) -> Rows:
        """(B, dim)."""
        out: Tensor | None = None
        for block in blocks.values():
            for param, grad in zip(block.params, block.split(), strict=True):
                for start in range(0, grad.shape[1], _SLICE):
                    part = self._project(grad[:, start : start + _SLICE], f"{param}/{start}")
                    out = part if out is None else out.add_(part)
        assert out is not None, "no blocks"
        return widened({"rows": out})

    def _project(self, grad: Tensor, key: str) -> Tensor:
        generator = seeded(self.seed, "dense", self.kind_of, key)
        n = grad.shape[1]
        if self.kind_of == "sjlt":
            columns = torch.randint(self.dim, (n, _PER_ROW), generator=generator)
            signs = torch.randint(2, (n, _PER_ROW), generator=generator) * 2.0 - 1
            out = grad.new_zeros(grad.shape[0], self.dim)
            for hop in range(_PER_ROW):
                out.index_add_(1, columns[:, hop].to(grad.device), grad * signs[:, hop].to(grad) * _PER_ROW**-0.5)
            return out
        if self.kind_of == "gaussian":
            matrix = torch.randn(n, self.dim, generator=generator)
        else:
            matrix = torch.randint(2, (n, self.dim), generator=generator) * 2.0 - 1
        return grad @ matrix.to(grad) * self.dim**-0.5
