"""Binary classification by one logit z, y being 0 or 1.

``f = (2y - 1) z``, the margin ``log p/(1-p)`` of the label; ``ℓ = softplus(-f)``, binary cross-entropy with logits;
``Q = sigmoid(-f) = 1 - p``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from byline.batches import Batch
from byline.outputs.base import Evaluation, Output, is_column, kind, with_target
from byline.outputs.logits import refuse_squashed, signs


class Binary(Output):
    """Batches ``(*inputs, labels)`` or dicts with ``labels``; one logit and one label per example, (B,) or (B, 1)."""

    name = "binary"
    loss_follows_output = True
    expects = "one logit per example, (batch,) or (batch, 1)"

    def fits(self, prediction: Tensor, target: Any, batch: Batch) -> bool:
        """One number per example."""
        return is_column(prediction, batch)

    def evaluate(self, prediction: Tensor, target: Any, batch: Batch) -> Evaluation:
        """From logits and labels, one per example each."""
        z = self._logits(prediction, batch)
        if not isinstance(target, Tensor) or target.numel() != z.numel():
            raise ValueError(f"the labels are {kind(target)}; binary expects a 0 or 1 per example, ({len(z)},)")
        f = signs(target, z) * z
        return Evaluation(f, F.softplus(-f), torch.sigmoid(-f.detach()))

    def natural(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (0, z) of two classes; one token of weight 1."""
        z = self._logits(prediction, batch)
        return torch.stack([torch.zeros_like(z), z], -1).unsqueeze(1), z.new_ones(len(z), 1)

    def relabelled(self, batch: Batch, labels: Tensor) -> Batch:
        """One label per example, in the form of its own."""
        own = self.split(batch)[2]
        return with_target(batch, labels[:, 0].reshape(own.shape).to(own.dtype))

    def _logits(self, prediction: Tensor, batch: Batch) -> Tensor:
        if not is_column(prediction, batch):
            hint = '; two classes or more are output="classification"' if prediction.ndim == 2 else ""
            raise ValueError(
                f"the model's logits have shape {tuple(prediction.shape)}; binary expects one per example, (batch,) or "
                f"(batch, 1){hint}"
            )
        refuse_squashed(prediction, self.name)
        return prediction.reshape(-1)
