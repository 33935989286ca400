"""Choosing the damping without ground truth."""

from __future__ import annotations

from torch import Tensor


def auto(gram: Tensor, n: int) -> float:
    """Placeholder."""
    return 1.0
