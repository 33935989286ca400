"""Scoring kernels: a few vectors against very many rows that stay in memory, chunk by chunk.

One vector against N rows reads every row once and computes next to nothing, so its speed is that of memory, and rows
of a quarter of the size are scored four times as fast:

- float32: a matrix product;
- float16: converted block by block, in cache;
- int8 with a scale per row (the largest entry is 127): integer products with the vectors in two halves of 7 bits each,
  hi + lo / 126, so that rounding the vectors costs 1e-4 of a score where rounding the rows costs 1e-2.

The integer products are those of FBGEMM through torch, whose rows are packed once. Where torch has none (another
processor; the operator is one that PyTorch means to remove, issue 184982), int8 is converted block by block too. The
other candidate, ``aten::_weight_int8pack_mm``, gives its results in bfloat16, 3 digits, at less than half the speed;
with float32 vectors it is exact and twenty times slower. `bench/serving.py` measures all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from byline import batches
from byline.features.base import Features, State

DTYPES = ("float32", "float16", "int8")
_BLOCK = 2**18  # numbers of a block that is converted in cache
_STEPS = 63  # of either half of a vector, on either side of 0: a sum of two products fits 16 bits


class Vectors:
    """A few vectors (B, k) that are held against many chunks: what integer products need of them is computed once."""

    def __init__(self, vectors: Tensor):
        self.given, self.values = vectors, vectors.float()

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """(2B, k) the vectors' upper and lower 7 bits, in units of each vector's largest entry, and that, (B, 1)."""
        largest = self.values.abs().amax(1, keepdim=True)
        unit = self.values / torch.where(largest > 0, largest, 1.0)
        high = (unit * _STEPS).round() / _STEPS
        # what the first half leaves is at most half a step: as a vector of its own it fills the range again
        return torch.cat([high, (unit - high) * (2 * _STEPS)]), largest


class Chunk:
    """Consecutive rows (n, k) in memory.

    Args:
        rows: floating-point.
        dtype: "float32", "float16" or "int8".
        packed: use the packed integer products, where there are any.
    """

    def __init__(self, rows: Tensor, dtype: str, packed: bool = True):
        self.shape, self.dtype = tuple(rows.shape), dtype
        self._scale: Tensor | None = None
        self._rows: Any
        if dtype == "int8":
            codes, self._scale = quantised(rows)
            self._packed = packed and packs()
            self._rows = _pack(codes, self._scale) if self._packed else codes
        else:
            self._packed = False
            self._rows = rows.to(getattr(torch, dtype)).contiguous()
            if dtype == "float16" and not self._rows.isfinite().all():
                raise ValueError("dtype is 'float16', which ends at 65504, and rows go beyond it; use 'int8'")
        each = {"float32": 4, "float16": 2, "int8": 1}[dtype]
        self.nbytes = rows.numel() * each + (0 if self._scale is None else 4 * len(rows))

    def __len__(self) -> int:
        return self.shape[0]

    def dots(self, vectors: Vectors | Tensor) -> Tensor:
        """(B, n) float32 inner products with vectors (B, k)."""
        vectors = vectors if isinstance(vectors, Vectors) else Vectors(vectors)
        if self._packed:
            return _packed_dots(vectors, self._rows)
        if self._rows.dtype == torch.float32:
            return _matrix_product(vectors.values, self._rows)
        out = torch.cat([_matrix_product(vectors.values, block.float()) for block in _blocks(self._rows)], 1)
        return out if self._scale is None else out.mul_(self._scale)


class Resident:
    """All rows of one member in memory.

    Args:
        chunks: in order, each of the same number of rows but the last.
    """

    def __init__(self, chunks: list[Chunk]):
        self.chunks = chunks
        self.size = len(chunks[0])
        self.nbytes = sum(chunk.nbytes for chunk in chunks)

    @classmethod
    def load(cls, parts: Iterable[Tensor], dtype: str) -> Resident:
        """Rows that come chunk by chunk.

        Raises:
            ValueError: another dtype than float32, float16 and int8.
        """
        check_dtype(dtype)
        return cls([Chunk(part, dtype) for part in parts])

    def read(self, start: int, stop: int) -> Chunk:
        """Rows ``start`` to ``stop``, which are a whole chunk."""
        chunk = self.chunks[start // self.size]
        assert (start % self.size, stop - start) == (0, len(chunk)), "resident rows are read in whole chunks"
        return chunk


def dots(vectors: Vectors, train: Any, features: Features, state: State) -> Tensor:
    """(B, n) inner products of vectors (B, k) with a chunk, or with rows of features as the store reads them."""
    if isinstance(train, Chunk):
        return train.dots(vectors).to(vectors.given)
    return vectors.given @ features.vectors(train, state).to(vectors.given).T


def check_dtype(dtype: Any) -> str:
    """Refuse what rows cannot be kept as."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {list(DTYPES)}")
    return str(dtype)


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (n, k) and float32 scales (n,) with ``rows ≈ codes * scales``; a row of zeros keeps the scale 0."""
    rows = rows.float()
    scale = rows.abs().amax(1) / 127
    safe = torch.where(scale > 0, scale, 1.0)
    return (rows / safe.unsqueeze(1)).round_().to(torch.int8), scale


@cache
def packs() -> bool:
    """Whether torch's packed integer products are here and right: one small case against float64."""
    try:
        rows = torch.arange(-30, 34, dtype=torch.float32).repeat(3).view(6, 32).cos() * 100
        codes, scale = quantised(rows)
        vectors = torch.linspace(-2, 3, 64).view(2, 32).sin()
        got = _packed_dots(Vectors(vectors), _pack(codes, scale)).double()
        want = vectors.double() @ (codes.double() * scale.double().unsqueeze(1)).T
        return bool((got - want).norm() <= 1e-3 * want.norm())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _pack(codes: Tensor, scale: Tensor) -> Any:
    # a scale of 0 is refused by the operator, and codes of 0 are 0 at any scale
    safe = torch.where(scale > 0, scale, 1.0).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch._make_per_channel_quantized_tensor(codes, safe, torch.zeros(len(codes), dtype=torch.long), 0)
        return torch.ops.quantized.linear_prepack(made, None)


def _packed_dots(vectors: Vectors, packed: Any) -> Tensor:
    halves, largest = vectors.halves
    out = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(halves, 1 / _STEPS, _STEPS + 1, packed)
    return out[: len(largest)].add_(out[len(largest) :], alpha=1 / (2 * _STEPS)).mul_(largest)


def _matrix_product(vectors: Tensor, rows: Tensor) -> Tensor:
    # one vector is a matrix-vector product, which BLAS reads faster than a product with a thin matrix
    if len(vectors) > 1:
        return vectors @ rows.T
    if rows.device.type != "cpu":
        return (rows @ vectors[0]).unsqueeze(0)
    # numpy's BLAS reads with every thread, where torch's has one for this product on some processors
    return torch.from_numpy(rows.numpy() @ vectors[0].numpy()).unsqueeze(0)


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    for start, stop in batches.spans(len(rows), max(1, _BLOCK // rows.shape[1])):
        yield rows[start:stop]
