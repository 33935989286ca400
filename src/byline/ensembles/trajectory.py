"""TRAJECTORY: checkpoints along each training run, one member each (Pruthi et al. 2020, TracIn)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from byline.ensembles.base import Ensemble, Member, Weights


class Trajectory(Ensemble):
    """Checkpoints along each run, unweighted unless ``weights`` is given.

    Args:
        runs: a list of runs, each a list of checkpoints (state dicts, modules or paths) in the order of training.
        weights: one number per checkpoint, as lists of the same lengths (or one list for all runs): the step sizes η
            of TracIn. `byline.TracIn` sums η · score over a run; every other method takes the weighted mean.

    Every checkpoint is a trained model of its own to a mask: ``Dropout(Trajectory(...))`` draws masks per checkpoint.
    """

    kind = "trajectory"

    def __init__(self, runs: Sequence[Sequence[Any]], weights: Sequence[Any] | None = None):
        if not isinstance(runs, list | tuple) or not runs or not all(isinstance(run, list | tuple) for run in runs):
            raise TypeError(
                "runs must be a list of runs, each a list of checkpoints, as in Trajectory([[epoch_1, epoch_2]])"
            )
        if not all(len(run) for run in runs):
            raise ValueError("runs has a run without checkpoints; expected at least one in each")
        self.runs = [
            [Weights(source, f"run {r}, checkpoint {c}") for c, source in enumerate(run)] for r, run in enumerate(runs)
        ]
        self.weights = None if weights is None else self._check(weights)

    def _check(self, weights: Sequence[Any]) -> list[list[float]]:
        lists = [list(w) if isinstance(w, list | tuple) else None for w in weights]
        if all(w is None for w in lists):
            nested = [[float(w) for w in weights] for _ in self.runs]
        else:
            nested = [[float(x) for x in (w or [])] for w in lists]
        lengths, expected = [len(w) for w in nested], [len(run) for run in self.runs]
        if lengths != expected:
            raise ValueError(f"weights has lengths {lengths}; expected one number per checkpoint, {expected}")
        flat = [w for run in nested for w in run]
        if not all(math.isfinite(w) and w >= 0 for w in flat) or sum(flat) == 0:
            raise ValueError("weights must be finite, at least 0 and not all 0")
        return nested

    def members(self) -> list[Member]:
        """One member per checkpoint, run by run."""
        out: list[Member] = []
        for r, run in enumerate(self.runs):
            for c, weights in enumerate(run):
                weight = 1.0 if self.weights is None else self.weights[r][c]
                out.append(
                    Member(
                        f"run {r}, checkpoint {c}",
                        weights,
                        len(out),
                        weight=weight,
                        weighted=self.weights is not None,
                        run=r,
                    )
                )
        return out
