"""Regression: one number per example.

``f`` is the prediction; ``ℓ = (f - y)² / 2``; ``Q = y - f``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from byline.batches import Batch
from byline.outputs.base import Evaluation, Output, column, is_column, kind


class Regression(Output):
    """Batches ``(*inputs, targets)`` or dicts with ``targets``; predictions (B,) or (B, 1)."""

    name = "regression"
    loss_follows_output = True
    expects = "predictions (batch,) or (batch, 1)"

    def fits(self, prediction: Tensor, target: Any, batch: Batch) -> bool:
        """One number per example."""
        return is_column(prediction, batch)

    def evaluate(self, prediction: Tensor, target: Any, batch: Batch) -> Evaluation:
        """From predictions and targets, one number per example each."""
        f = self._column(prediction, batch)
        if not isinstance(target, Tensor) or target.numel() != f.numel():
            raise ValueError(f"the targets are {kind(target)}; regression expects one number per example")
        difference = f - target.reshape(f.shape).to(f.dtype)
        return Evaluation(f, difference.square() / 2, -difference.detach())

    def natural(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The prediction, with weight 1."""
        f = self._column(prediction, batch)
        return f[:, None, None], torch.ones_like(f).unsqueeze(1)

    @staticmethod
    def _column(prediction: Tensor, batch: Batch) -> Tensor:
        try:
            return column(prediction, batch, "prediction")
        except ValueError as error:
            hint = '; several numbers per example are output="multi-regression"' if prediction.ndim > 1 else ""
            raise ValueError(f"{error}{hint}") from None
