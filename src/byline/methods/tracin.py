"""TRACIN over the checkpoints of a run (Pruthi et al. 2020, equation 1).

    TracIn(z, i) = Σ_c η_c ⟨∇f_c(z), -∇ℓ_c(i)⟩

summed over the checkpoints of a run with step sizes η (``Trajectory(..., weights=...)``), the mean over runs. Without
weights it is the mean over members, as every other method.
"""

from __future__ import annotations

import numpy as np

from byline.methods.mean import RunningMean
from byline.methods.similarity import GradDot


class TracIn(GradDot):
    """Inner products along training, weighted by step sizes where the ensemble has them."""

    def _scale(self) -> float:
        members = self.ensemble.members()
        if not any(member.weighted for member in members):
            return 1.0
        # a weighted mean times the sum of the weights is the weighted sum, of all runs
        total = sum(voter.weight for voter in self._voters)
        return total / len({member.run for member in members}) / self._copies()

    def _finish(self, mean: RunningMean, place: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        values, error = super()._finish(mean, place)
        scale = self._scale()
        if scale != 1:
            values *= scale
            error *= scale
        return values, error

    def _copies(self) -> float:
        """How many members stand for each checkpoint: the masks or draws of a nested ensemble."""
        members = self.ensemble.members()
        return len(members) / len({(member.run, id(member.weights)) for member in members})
