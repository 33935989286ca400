"""Outputs that are a mean over the tokens of a sequence; subclasses say which label belongs to which logits.

Over the target tokens t, those whose label is not -100, with the weight 1/T of each: ``f = mean_t m_t``,
``m_t = log p_t/(1-p_t)`` the margin of the token's label; ``ℓ = mean_t -log p_t``; ``Q = mean_t (1 - p_t)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byline import batches, sequences
from byline.batches import Batch
from byline.outputs.base import Evaluation, ExampleError, Output, kind, with_target
from byline.outputs.logits import check_labels, margin, refuse_probabilities


class Tokens(Output):
    """Labels (B, T) that stand where the logits (B, T, C) stand that predict them; -100 is no target."""

    expects = "logits (batch, tokens, classes)"

    def __init__(self) -> None:
        self._classes = 0

    def prepared(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any], target: Any) -> dict[str, Any]:
        """Refuse sequences that the model cannot take, by their place."""
        found = sequences.problem(model, *sequences.inputs(args, named))
        if found is not None:
            raise ExampleError(*found)
        return named

    def numbers(self, batch: Batch) -> int:
        """Tokens times classes, as far as they are known."""
        longest = max((t.shape[1] for t in batches.tensors(batch) if t.ndim > 1), default=1)
        return longest * self._classes

    def fits(self, prediction: Tensor, target: Any, batch: Batch) -> bool:
        """(B, T, C), with the T of the labels."""
        labels = target if isinstance(target, Tensor) else next(iter(batches.tensors(batch)))
        return prediction.ndim == 3 and labels.ndim >= 2 and prediction.shape[:2] == labels.shape[:2]

    def placed(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and the labels that they predict."""
        if not isinstance(target, Tensor):
            raise ValueError(f"the labels are {kind(target)}; {self.name} expects a tensor (batch, tokens)")
        return prediction, target

    def aligned(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the labels they predict, and the weight of each token in the mean."""
        if prediction.ndim != 3:
            raise ValueError(
                f"the model's logits have shape {tuple(prediction.shape)}; {self.name} expects "
                f"{self.expects.removeprefix('logits ')}"
            )
        self._classes = prediction.shape[-1]
        refuse_probabilities(prediction, self.name)
        if prediction.dtype in (torch.bfloat16, torch.float16):
            # the log-sum-exp of a vocabulary and a mean over tokens need more digits than these have
            prediction = prediction.float()
        logits, labels = self.placed(prediction, target, batch)
        if labels.shape != logits.shape[:2]:
            raise ValueError(f"the labels have shape {tuple(labels.shape)}; expected {tuple(logits.shape[:2])}")
        labels = labels.long()
        ignored = labels == sequences.IGNORED
        check_labels(labels, logits.shape[-1], ignored)
        count = (~ignored).sum(1)
        if not batches.transformed() and (count == 0).any():
            position = int((count == 0).nonzero()[0, 0])
            raise ExampleError(position, "has no target token (all are padding or -100); expected at least one")
        return logits, labels.masked_fill(ignored, 0), (~ignored).to(logits.dtype) / count.unsqueeze(1)

    def evaluate(self, prediction: Tensor, target: Any, batch: Batch) -> Evaluation:
        """Means over the target tokens."""
        logits, labels, weight = self.aligned(prediction, target, batch)
        f = margin(logits, labels)
        return Evaluation(
            (f * weight).sum(1),
            (F.softplus(-f) * weight).sum(1),
            (torch.sigmoid(-f.detach()) * weight).sum(1),
        )

    def natural(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of all tokens; those that are no target weigh nothing."""
        logits, _, weight = self.aligned(prediction, target, batch)
        return logits, weight

    def relabelled(self, batch: Batch, labels: Tensor) -> Batch:
        """Other labels for the tokens that have one."""
        own = self.split(batch)[2]
        return with_target(batch, labels.masked_fill(own == sequences.IGNORED, sequences.IGNORED))
