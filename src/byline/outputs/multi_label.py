"""Multi-label classification: each of C labels is 0 or 1, by a logit z_c of its own.

``f = mean_c m_c``, ``m_c = (2 y_c - 1) z_c`` the margin of label c; ``ℓ = mean_c softplus(-m_c)``, which is
``BCEWithLogitsLoss`` of the example; ``Q = mean_c sigmoid(-m_c)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from byline.batches import Batch
from byline.outputs.base import Evaluation, Output, kind, with_target
from byline.outputs.logits import refuse_squashed, signs


class MultiLabel(Output):
    """Batches ``(*inputs, labels)`` or dicts with ``labels``; logits (B, C) and as many labels, 0 or 1."""

    name = "multi-label"
    expects = "logits (batch, labels)"

    def fits(self, prediction: Tensor, target: Any, batch: Batch) -> bool:
        """(B, C) as the labels are."""
        return prediction.ndim == 2 and isinstance(target, Tensor) and prediction.shape == target.shape

    def _margins(self, prediction: Tensor, target: Any) -> Tensor:
        if prediction.ndim != 2 or not isinstance(target, Tensor) or target.shape != prediction.shape:
            raise ValueError(
                f"the model's logits have shape {tuple(prediction.shape)} and the labels are {kind(target)}; "
                "multi-label expects (batch, labels) of both"
            )
        refuse_squashed(prediction, self.name)
        return signs(target, prediction) * prediction

    def evaluate(self, prediction: Tensor, target: Any, batch: Batch) -> Evaluation:
        """From logits and labels (B, C)."""
        m = self._margins(prediction, target)
        return Evaluation(m.mean(1), F.softplus(-m).mean(1), torch.sigmoid(-m.detach()).mean(1))

    def natural(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (0, z_c) of two classes for each label, which weigh 1/C each."""
        logits = torch.stack([torch.zeros_like(prediction), prediction], -1)
        return logits, torch.full_like(prediction, 1 / prediction.shape[1]).detach()

    def relabelled(self, batch: Batch, labels: Tensor) -> Batch:
        """All labels of each example, in the dtype of its own."""
        return with_target(batch, labels.to(self.split(batch)[2].dtype))
