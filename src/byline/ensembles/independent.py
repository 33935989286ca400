"""INDEPENDENT ENSEMBLE: I trained models, one member each (the naive ensemble of arXiv 2405.17293, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from byline.ensembles.base import Ensemble, Member, Weights


class Independent(Ensemble):
    """One member per trained model.

    Args:
        checkpoints: state dicts, modules or paths (``.safetensors``, or ``.pt`` read with ``weights_only=True``), in
            the order in which the members count. Also what loops save around a state dict (``{"model": …, "epoch":
            3}``), of which the one entry that fits the task's model is taken; names with the prefixes of
            DistributedDataParallel, ``torch.compile`` or Lightning; an index of weights in parts, or the folder of a
            Hugging Face checkpoint.

    Raises:
        TypeError: ``checkpoints`` is not a list of these.
        ValueError: it is empty, or a path is not one checkpoint of a model.
        FileNotFoundError: a path that is not there.
    """

    kind = "independent"

    def __init__(self, checkpoints: Any):
        if isinstance(checkpoints, nn.Module | Mapping | str | Path):
            raise TypeError("checkpoints is one checkpoint; expected a list of them, as in Independent([checkpoint])")
        self.weights = [Weights(source, f"checkpoint {i}") for i, source in enumerate(checkpoints)]
        if not self.weights:
            raise ValueError("checkpoints is empty; expected at least one trained model")

    def members(self) -> list[Member]:
        """One member per trained model, in the order given."""
        return [Member(f"model {i}", weights, i, run=i) for i, weights in enumerate(self.weights)]
