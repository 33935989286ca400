"""Gram matrices of stored rows, and solving against them."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from byline.engines.room import available
from byline.features.base import Features, Products, State
from byline.store import Stored, StoredRows

_CHUNK = 1024
_ROOM = 2**30  # bytes of rows that may be kept while a kernel is made


def kernel_bytes(n: int) -> int:
    """What a kernel of n examples takes, with its factor, while it is made."""
    return 3 * 8 * n * n


def check_room(n: int, features: Features) -> None:
    """Refuse an N × N kernel that cannot fit.

    Raises:
        ValueError: says how much it would take, and which features take less.
    """
    need = kernel_bytes(n)
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**36
    have = min(have, available())
    if need > 0.8 * have:
        raise ValueError(
            f"features is {features!r}, which needs a kernel of {n} × {n} training examples, about {need / 1e9:.0f} GB "
            f"of {have / 1e9:.0f} GB that are free; use byline.Nystrom(landmarks=...) or byline.Factorized(dim=...)"
        )


def dual(features: Features, stored: Stored, products: Products) -> Tensor:
    """(N, N) float32: the kernel of all pairs of training examples, each pair of chunks once."""
    n = len(stored)
    check_room(n, features)
    out = torch.empty(n, n)
    spans = stored.spans(_CHUNK)
    kept: dict[int, StoredRows] = {}

    def rows(index: int) -> StoredRows:
        # read once where all fit, as often as needed where they do not
        found = kept[index] if index in kept else stored.read(*spans[index])
        if (index + 1) * (spans[0][1] * stored.columns * 4) <= _ROOM:
            kept[index] = found
        return found

    for i, (a, b) in enumerate(spans):
        own = rows(i)
        for j, (c, d) in enumerate(spans[: i + 1]):
            block = features.kernel(own, own if i == j else rows(j), products)
            out[a:b, c:d] = block
            if i != j:
                out[c:d, a:b] = block.T
    return out


def primal(features: Features, stored: Stored, state: State, scales: Tensor | None = None) -> Tensor:
    """(k, k) float32: the sum of outer products of rows as vectors, each times its scale (N,) where there are some."""
    out: Tensor | None = None
    for start, stop in stored.spans(_CHUNK):
        rows = features.vectors(stored.read(start, stop), state)
        rows = rows if scales is None else rows * scales[start:stop, None].to(rows)
        out = rows.T @ rows if out is None else out.addmm_(rows.T, rows)
    assert out is not None
    return out


def factorise(matrix: Tensor, ridge: float, name: str) -> Tensor:
    """Cholesky factor of ``matrix + ridge · I`` in float64.

    Raises:
        ValueError: the sum is not positive definite.
    """
    damped = matrix.double()
    damped.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        raise ValueError(f"damping is too small: the kernel of {name} is singular; expected damping above 0")
    return factor
