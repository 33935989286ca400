"""Choosing the damping without ground truth: by the effective dimension that it leaves.

    d(λ) = tr K (K + λI)⁻¹ = mean leverage × N

is how many degrees of freedom the damped kernel has (Hastie & Tibshirani 1990, section 3.5), and d(λ)/N the average
weight with which an example decides its own output. ``damping="auto"`` is the λ at which each degree of freedom is
backed by so many training examples that it is not the noise of a few: `EXAMPLES_PER_FREEDOM`, within the 10 to 20
observations per parameter that statisticians ask of a regression (Harrell 2001, section 4.4).

Damping trades bias for variance, and the mean over members takes variance away at no bias: M members want less damping
than one. The freedom grows as the fourth root of M, up to 16 members: members that share data are not independent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from byline.features.base import seeded

EXAMPLES_PER_FREEDOM = 13.5
"""It and the exponent were chosen on the first four cases of ``bench/damping.py``; the fifth judges them."""

_EXACT = 512  # up to this size all eigenvalues are computed
_STEPS = 32
_PROBES = 4  # at least; small matrices average less by themselves, and more probes cost them little


def auto(gram: Tensor, n: int, members: int = 1) -> float:
    """The relative damping that leaves ``members^¼ · n / EXAMPLES_PER_FREEDOM`` degrees of freedom.

    Args:
        gram: the dual kernel (n, n) or the primal matrix (k, k) of the same rows: they share their eigenvalues.
        n: number of training examples.
        members: how many kernels are averaged.

    Returns:
        λ over the mean squared norm of the rows.
    """
    values, weights = _spectrum(gram)
    mean = float((values * weights).sum()) / n
    if mean <= 0:
        return 1.0
    # of few columns no more than half may be left free, or nothing would be damped at all
    target = min(min(members, 16) ** 0.25 * n / EXAMPLES_PER_FREEDOM, len(gram) / 2)
    low, high = math.log(1e-8), math.log(1e8)
    for _ in range(60):
        middle = (low + high) / 2
        freedom = float((weights * values / (values + math.exp(middle) * mean)).sum())
        low, high = (middle, high) if freedom > target else (low, middle)
    return math.exp((low + high) / 2)


def _spectrum(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Points and weights with Σ w f(θ) ≈ tr f(gram): the eigenvalues, or stochastic Lanczos quadrature for them.

    Golub & Welsch 1969; Ubaru, Chen & Saad 2017, algorithm 1. The probes are seeded: equal matrices give equal bits.
    """
    size = len(gram)
    if size <= _EXACT:
        values = torch.linalg.eigvalsh(gram.double()).clamp_min(0)
        return values, torch.ones_like(values)
    probes = _PROBES * max(1, 2048 // size)
    start = torch.randint(2, (size, probes), generator=seeded(0, "lanczos", size)).to(gram) * 2 - 1
    basis = [start / start.norm(dim=0)]
    diagonal, side = [], []
    for step in range(_STEPS):
        w = gram @ basis[-1]
        diagonal.append((w * basis[-1]).sum(0))
        for _ in range(2):
            for v in basis:
                w = w - v * (v * w).sum(0)
        norm = w.norm(dim=0)
        if step + 1 < _STEPS:
            side.append(norm)
            basis.append(w / norm.clamp_min(1e-30))
    tridiagonal = torch.diag_embed(torch.stack(diagonal, 1).double())
    off = torch.stack(side, 1).double()
    tridiagonal += torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    weights = vectors[:, 0].square() * size / probes
    return values.clamp_min(0).flatten(), weights.flatten()
