"""The residual Q that scores are multiplied by: whose it is, and what is made of it.

Q = -∂ℓ/∂f is how far an example still pushes its own output. Taken from models that were trained on the example it says
what the example teaches a model that knows it already; docs/frontier-theory.md has the derivations.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("mean", "in-sample", "out-of-sample", "leave-one-out", "sqrt")
"""What ``residual=`` takes beside "auto"."""

FLOOR = 1e-3
"""The least weight of an example in a weighted second moment: its rows are divided by it again."""


def curvature(residual: Tensor, task_name: str) -> Tensor:
    """ℓ''(f) of each example: ``Q (1 - Q)`` of a margin, 1 of a squared error."""
    return torch.ones_like(residual) if task_name == "regression" else residual * (1 - residual)


def leave_one_out(residual: Tensor, leverage: Tensor, weights: Tensor | None, task_name: str) -> Tensor:
    """Q after one Newton step away from the example.

    Args:
        residual: (n,) Q at the member's weights.
        leverage: (n,) ``g = φ(i)ᵀ (ΦᵀWΦ + λI)⁻¹ φ(i)``.
        weights: (n,) the diagonal of W; None for 1.
        task_name: the task's output; all but "regression" are read as margins.

    Returns:
        (n,) ``-ℓ'`` at ``f - g Q / (1 - w g)``.
    """
    g = leverage.double()
    # rounding alone leads to a leverage of 1 or beyond
    left = (1 - (g if weights is None else weights.double() * g)).clamp_min(1e-6)
    q = residual.double()
    if task_name == "regression":
        return (q * (1 + g / left)).to(residual.dtype)
    # the margin is that of the mean over tokens of a language model, as Q is: f = -logit Q
    return torch.sigmoid(torch.logit(q.clamp(1e-12, 1 - 1e-12)) + g * q / left).to(residual.dtype)


def root(residual: Tensor) -> Tensor:
    """``sign(Q) √|Q|``."""
    return residual.sign() * residual.abs().sqrt()
