"""Features: one row per example and member, made from its gradient blocks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from byline.features.blocks import Block
from byline.guards import Lock

Rows = dict[str, Tensor]
"""The features of a batch: named tensors, each with the batch first."""
State = dict[str, Tensor]
"""What features learnt from the training set, per member."""
Passes = Callable[[list[int] | None], Iterator[dict[str, Block]]]
"""Gradient blocks of the training examples at these indices (None: of a pass over all of them), batch by batch."""


DTYPES = ("float32", "float16", "int8")


class Features(ABC):
    """How gradients become rows whose inner products are the kernel of the methods."""

    linear = True
    """Whether rows are vectors in ``rows["rows"]`` (B, k), with ``rows @ rows.T`` the kernel."""

    dtype: str = "float32"
    """What rows of training examples are kept as: "float32", or "float16" or "int8" with a scale per row."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON that identifies the features in a store."""

    def learn(self, passes: Passes, length: int) -> State:
        """Learn what depends on the member and the training set; nothing by default."""
        return {}

    @abstractmethod
    def rows(self, blocks: dict[str, Block], state: State) -> Rows:
        """The features of a batch."""

    def kernel(self, a: Rows, b: Rows, products: Products | None = None) -> Tensor:
        """(A, B) inner products of the gradients behind two batches of rows."""
        return a["rows"] @ b["rows"].T

    def vectors(self, rows: Rows, state: State) -> Tensor:
        """(B, k) the rows as vectors, where `width` says that they are some."""
        return rows["rows"]

    def width(self, forms: Mapping[str, tuple[int, ...]], state: State) -> int | None:
        """Columns of `vectors`, from the forms of rows without the batch; None where rows are no vectors."""
        return forms["rows"][0] if self.linear else None

    def least_width(self, forms: Iterable[tuple[int, ...]]) -> int | None:
        """What `width` is at least, from the forms of the parameters; None where rows are no vectors."""
        return 0 if self.linear else None

    def row_bytes(self, blocks: dict[str, Block]) -> dict[str, int] | None:
        """Bytes that are kept of an example, before anything is learnt; None where that cannot be said.

        Args:
            blocks: of one example.

        Returns:
            those of "rows", and of "inputs", which members that differ in a mask may have in common.
        """
        return None

    def learnt_bytes(self, blocks: dict[str, Block]) -> int:
        """Bytes that are held while the features learn, where they are many."""
        return 0

    def diagonal(self, a: Rows, b: Rows) -> Tensor:
        """(B,) inner products of pairs of rows."""
        return (a["rows"] * b["rows"]).sum(1)

    def __repr__(self) -> str:
        hidden = {"kind"} | ({"dtype"} if self.dtype == "float32" else set())
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.describe().items() if k not in hidden)
        return f"{type(self).__name__}({arguments})"


class Products:
    """Inner products of factors, kept where several members share the factors (raw inputs, units before a mask).

    Args:
        shared: digests of the stored arrays that several members have; only their products are kept.
        limit: bytes that may be kept.
    """

    def __init__(self, shared: Set[str] = frozenset(), limit: int = 2**30):
        self.shared = shared
        self.limit = limit
        self.used = 0
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._lock = Lock()

    def __call__(self, a: Tensor, b: Tensor, keys: tuple[str, str] | None) -> Tensor:
        """``a @ b.T``, from the cache where ``keys`` names the content of both."""
        if keys is None or keys[1].partition("/")[0] not in self.shared:
            return a @ b.T
        found = self._kept.get(keys)
        if found is None:
            found = a @ b.T
            size = found.numel() * found.element_size()
            with self._lock():
                if keys not in self._kept and self.used + size <= self.limit:
                    self._kept[keys] = found
                    self.used += size
        return found


def widened(rows: Rows) -> Rows:
    """Half precisions as float32: what the store keeps, so that test rows are of the same kind."""
    half = (torch.bfloat16, torch.float16)
    return {name: value.float() if value.dtype in half else value for name, value in rows.items()}


def bytes_of(forms: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, int]:
    """What `Features.row_bytes` gives, from the forms of one example's rows."""
    out = {"rows": 0, "inputs": 0}
    for name, form in forms.items():
        numbers = math.prod(form)
        size = 8 * numbers if name.endswith(":ids") else {"float16": 2, "int8": 1}.get(dtype, 4) * numbers
        scales = 0 if dtype == "float32" or name.endswith(":ids") else 4 * math.prod(form[:-1])
        out["inputs" if name.endswith((":right", ":ids")) else "rows"] += size + scales
    return out


def check_dtype(dtype: Any) -> str:
    """One of the dtypes that rows may be kept as."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {DTYPES}")
    return str(dtype)


def seeded(seed: int, *path: int | str) -> torch.Generator:
    """A generator whose stream depends on the seed and on what it is for."""
    import hashlib

    text = "/".join(map(str, (seed, *path)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little"))


def sampled(length: int, count: int, seed: int, name: str) -> list[int]:
    """``count`` of ``length`` examples, in their order."""
    return torch.randperm(length, generator=seeded(seed, name))[:count].sort().values.tolist()


def check_dim(dim: Any, name: str = "dim") -> int:
    """A number of columns is an int of at least 1."""
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise ValueError(f"{name} is {dim!r}; expected an int of at least 1")
    return dim
