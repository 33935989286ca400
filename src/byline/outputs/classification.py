"""Classification: one of C classes is right.

``f = log p_y / (1 - p_y)``, the margin of the label; ``ℓ = -log p_y = softplus(-f)``; ``Q = 1 - p_y``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from byline import batches
from byline.batches import Batch
from byline.outputs.base import Evaluation, Output, kind, with_target
from byline.outputs.logits import check_labels, margin, refuse_probabilities


class Classification(Output):
    """Batches ``(*inputs, labels)`` or dicts with ``labels``; logits (B, C)."""

    name = "classification"
    loss_follows_output = True
    expects = "logits (batch, classes) with two classes or more"

    def fits(self, prediction: Tensor, target: Any, batch: Batch) -> bool:
        """(B, C), C at least 2."""
        return prediction.ndim == 2 and len(prediction) == batches.size(batch) and prediction.shape[1] >= 2

    def evaluate(self, prediction: Tensor, target: Any, batch: Batch) -> Evaluation:
        """From logits (B, C) and labels (B,)."""
        if prediction.ndim != 2 or prediction.shape[1] < 2:
            other = {1: "binary", 2: "binary", 3: "token-classification"}.get(prediction.ndim)
            hint = f'; is it output="{other}"?' if other else ""
            raise ValueError(
                f"the model's logits have shape {tuple(prediction.shape)}; classification expects (batch, classes) "
                f"with two classes or more{hint}"
            )
        if not isinstance(target, Tensor) or target.is_floating_point():
            hint = ""
            if isinstance(target, Tensor) and target.shape == prediction.shape:
                hint = (
                    '; for one-hot rows give their argmax(1), for several labels an example output="multi-label", and '
                    "for soft labels a callable output and loss"
                )
            raise ValueError(
                f"the labels are {kind(target)}; classification expects a tensor of integer labels ({len(prediction)},)"
                f"{hint}"
            )
        labels = target.long()
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        if labels.shape != prediction.shape[:1]:
            hint = ' (several labels an example are output="multi-label")' if target.shape == prediction.shape else ""
            raise ValueError(f"the labels have shape {tuple(target.shape)}; expected ({prediction.shape[0]},){hint}")
        check_labels(labels, prediction.shape[1])
        refuse_probabilities(prediction, self.name)
        f = margin(prediction, labels)
        return Evaluation(f, F.softplus(-f), torch.sigmoid(-f.detach()))

    def natural(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits; one token of weight 1."""
        return prediction.unsqueeze(1), prediction.new_ones(len(prediction), 1)

    def relabelled(self, batch: Batch, labels: Tensor) -> Batch:
        """One label per example."""
        return with_target(batch, labels[:, 0])
