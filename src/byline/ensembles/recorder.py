"""Checkpoints recorded while a model trains, whatever the loop."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import SupportsFloat

import torch
from torch import nn

from byline.ensembles import record
from byline.ensembles.base import StateDict, check_count, save_trained
from byline.ensembles.trajectory import Trajectory

_RECORD = "recorded.json"


class Recorder:
    """Records checkpoints and step sizes along a training run of your own.

    Call ``step`` after every optimizer step; ``trajectory()`` is the run as an ensemble. The last step is recorded when
    ``finish`` is called, unless it has just been.

    Args:
        every: optimizer steps between checkpoints; the steps of one epoch are a good start.
        folder: where checkpoints are written, as ``.safetensors`` of what is trained; a folder that has some already is
            refused. None keeps them in memory, on the CPU.
        first: also keep the weights before the first step: then pass the model to ``start``.

    Attributes:
        checkpoints: state dicts, or files, in order.
        steps: after which optimizer step each was taken.
        rates: per checkpoint, the sum of the learning rates of the steps that led to it from the one before.
    """

    def __init__(self, every: int, *, folder: str | os.PathLike[str] | None = None, first: bool = False):
        self.every, self.first = check_count(every, "every"), first
        self.folder = None if folder is None else Path(folder)
        self.checkpoints: list[StateDict | Path] = []
        self.steps: list[int] = []
        self.rates: list[float] = []
        self._count, self._rate = 0, 0.0
        if self.folder is not None and any(self.folder.glob("step-*.safetensors")):
            raise ValueError(f"folder {self.folder} has checkpoints of a run already; expected an empty one")

    def start(self, model: nn.Module) -> None:
        """Before the first step, where ``first`` was asked for."""
        if self.first and not self.steps:
            self._keep(model)

    def step(self, model: nn.Module, lr: SupportsFloat = 1.0) -> None:
        """After an optimizer step.

        Args:
            model: as it is now.
            lr: the learning rate of this step; it matters to methods that sum over a run (`byline.TracIn`).

        Raises:
            ValueError: ``lr`` is not a finite number of at least 0.
        """
        try:
            # a schedule may give a NumPy number or a tensor of one
            rate = float(lr)
        except (TypeError, ValueError, RuntimeError):
            rate = math.nan
        if isinstance(lr, str) or not math.isfinite(rate) or rate < 0:
            raise ValueError(f"lr is {lr!r}; expected a finite number of at least 0")
        if self.first and not self._count and not self.steps:
            raise ValueError("first=True, and the first step is over; expected start(model) before it")
        self._count += 1
        self._rate += rate
        if self._count % self.every == 0:
            self._keep(model)

    def finish(self, model: nn.Module) -> None:
        """After the last step."""
        if self._count and (not self.steps or self.steps[-1] != self._count):
            self._keep(model)

    def trajectory(self, examples: int | None = None) -> Trajectory:
        """The run as an ensemble.

        Args:
            examples: in the training set. With it, checkpoints are weighted by how far one example's loss moved the
                weights on the way to each (the sum of the learning rates over ``examples``), as `byline.TracIn` sums;
                without it they weigh the same.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self.checkpoints:
            raise ValueError(f"no checkpoint was recorded in {self._count} steps; expected at least every={self.every}")
        if examples is None:
            return Trajectory([list(self.checkpoints)])
        check_count(examples, "examples")
        return Trajectory([list(self.checkpoints)], weights=[[rate / examples for rate in self.rates]])

    def _keep(self, model: nn.Module) -> None:
        if self.folder is None:
            with torch.no_grad():
                self.checkpoints.append({k: v.detach().cpu().clone() for k, v in model.state_dict().items()})
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step-{self._count:08d}.safetensors"
            save_trained(model, path)
            self.checkpoints.append(path)
        self.steps.append(self._count)
        self.rates.append(self._rate)
        self._rate = 0.0
        if self.folder is not None:
            files = [Path(str(p)) for p in self.checkpoints]
            record.write(self.folder / _RECORD, files, self.steps, self.rates, "rates")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Recorder:
        """What was recorded in a folder, by a run that is over.

        Raises:
            FileNotFoundError: nothing was.
            ValueError: the record is damaged, or of no checkpoint.
        """
        place = Path(folder)
        files, steps, rates = record.read(place / _RECORD, "rates", "byline.Recorder")
        if not files:
            raise ValueError(f"{place / _RECORD} names no checkpoint; expected at least one")
        found = cls(1)
        found.folder, found.checkpoints, found.steps, found.rates = place, list(files), steps, rates
        found._count = found.steps[-1]
        return found
