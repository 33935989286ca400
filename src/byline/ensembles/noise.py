"""WEIGHT NOISE: multiplicative Gaussian noise on the weights, for models without dropout.

Draw d of trained model m multiplies every weight: ``w ← w · (1 + scale · ε)``, ε ~ N(0, 1), drawn from
(seed, m, d).
It is Gaussian dropout (Srivastava et al. 2014, section 10) moved from the activations to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from byline.ensembles.base import Change, Ensemble, Member, as_ensemble, check_count, check_seed


class NoiseChange(Change):
    """One draw of the noise."""

    def __init__(self, seed: int, model_index: int, draw: int, scale: float):
        self.seed, self.model_index, self.draw, self.scale = seed, model_index, draw, scale

    def spec(self) -> dict[str, Any]:
        """What the draw depends on."""
        return {"noise": [self.seed, self.model_index, self.draw, self.scale]}

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """Multiply the weights of two dimensions or more, and put them back afterwards."""
        # all of them before the first is changed: whatever happens meanwhile, each is put back
        kept = [(p, p.detach().clone()) for p in model.parameters() if p.ndim >= 2 and p.is_floating_point()]
        # numpy-style mixing of the three numbers, so that neighbouring draws share no stream
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.model_index) * 1_000_003 + self.draw)
        try:
            with torch.no_grad():
                for parameter, _ in kept:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.mul_(1 + self.scale * noise.to(parameter.device, parameter.dtype))
            yield model
        finally:
            with torch.no_grad():
                for parameter, value in kept:
                    parameter.copy_(value)


class WeightNoise(Ensemble):
    """D noisy copies of each trained model.

    Args:
        base: the trained models.
        draws: noisy copies of each.
        scale: standard deviation of the relative noise.
        seed: of the noise.
    """

    kind = "weight noise"

    def __init__(self, base: Ensemble, draws: int = 10, scale: float = 0.6, seed: int = 0):
        self.base = as_ensemble(base, "base")
        self.draws = check_count(draws, "draws")
        if not isinstance(scale, int | float) or not math.isfinite(scale) or scale < 0:
            raise ValueError(f"scale is {scale!r}; expected a finite number of at least 0")
        self.scale = float(scale)
        self.seed = check_seed(seed)

    def members(self) -> list[Member]:
        """Draw by draw within each base member."""
        return [
            member.under(NoiseChange(self.seed, index, draw, self.scale), f"draw {draw}")
            for index, member in enumerate(self.base.members())
            for draw in range(self.draws)
        ]

    def validate(self, model: nn.Module) -> None:
        """Validate the base."""
        self.base.validate(model)
