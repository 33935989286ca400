"""An output of the caller's own: ``f(model, batch) -> (B,)``.

``ℓ = -f`` without a ``loss=``, and ``Q = sigmoid(-f)`` without a ``residual=``: f is read as a margin.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from byline.batches import Batch
from byline.outputs.base import Output, PerExample


class Called(Output):
    """A function; read as a margin where a probability is needed."""

    name = "callable"
    likelihood = False

    def __init__(self, function: PerExample):
        self.function = function

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the function says."""
        return self.function(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Less that."""
        return -self.function(model, batch)

    def residual(self, model: nn.Module, batch: Batch) -> Tensor:
        """``1 - p`` of a margin."""
        return torch.sigmoid(-self.function(model, batch))

    def both(self, model: nn.Module, batch: Batch, of: str) -> tuple[Tensor, Tensor]:
        """The function's value for either, since ``-ℓ = f``."""
        value = self.function(model, batch)
        if not isinstance(value, Tensor):
            return value, value
        return value, torch.sigmoid(-value.detach())
