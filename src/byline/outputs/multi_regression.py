"""Regression to K numbers per example.

``ℓ = mean_k (z_k - y_k)² / 2`` over all numbers of an example; ``f = -ℓ``, how well the targets are met; ``Q = 1``.

A mean of the predictions themselves would be no output to explain: what pushes one number up and another one down would
cancel. For one of the numbers, pass ``output=lambda model, batch: model(batch[0])[:, k]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from byline.batches import Batch
from byline.outputs.base import Evaluation, Output, kind


class MultiRegression(Output):
    """Batches ``(*inputs, targets)`` or dicts with ``targets``; predictions and targets (B, K), or (B, K, …)."""

    name = "multi-regression"
    loss_follows_output = True
    likelihood = False
    residual_varies = False
    expects = "predictions of the targets' shape"

    def fits(self, prediction: Tensor, target: Any, batch: Batch) -> bool:
        """The targets' shape."""
        return isinstance(target, Tensor) and prediction.shape == target.shape

    def evaluate(self, prediction: Tensor, target: Any, batch: Batch) -> Evaluation:
        """From predictions and targets of one shape."""
        if not isinstance(target, Tensor) or target.shape != prediction.shape or prediction.ndim < 2:
            one = '; one number per example is output="regression"' if prediction.ndim < 2 else ""
            raise ValueError(
                f"the predictions have shape {tuple(prediction.shape)} and the targets are {kind(target)}; "
                f"multi-regression expects both of one shape (batch, numbers){one}"
            )
        loss = (prediction - target.to(prediction.dtype)).square().flatten(1).mean(1) / 2
        return Evaluation(-loss, loss, torch.ones_like(loss).detach())
