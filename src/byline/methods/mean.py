"""The mean over members and its standard error, one member at a time.

Welford's update keeps the weighted mean and the sum of squared deviations without a second pass and without the
cancellation of E[x²] - E[x]² (West 1979).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class RunningMean:
    """Weighted mean over members of matrices that arrive in blocks of rows.

    Args:
        zeros: makes a matrix (n_test, n_train).
        with_residuals: also keep each member's Q and its co-moment with the matrices.
    """

    def __init__(self, zeros: Callable[[], np.ndarray], with_residuals: bool):
        self._zeros = zeros
        self.with_residuals = with_residuals
        self.average: np.ndarray | None = None
        self.moment: np.ndarray | None = None
        self.comoment: np.ndarray | None = None
        self.total = 0.0
        self.squares = 0.0
        self.count = 0
        self._weight = 0.0
        self.residual: Tensor | None = None
        self.residual_moment: Tensor | None = None
        self.sums: tuple[Tensor, Tensor] | None = None
        """(n_train,) the sum of the weights that count in the mean of Q, and of their squares; None where all do."""

    def begin(
        self, weight: float, residual: Tensor, counted: Tensor | None = None, deviation: Tensor | None = None
    ) -> None:
        """The next member, before its blocks.

        Args:
            weight: of the member.
            residual: (n_train,) its Q.
            counted: (n_train,) bool, whether it counts in the mean of Q; True where it is left out.
            deviation: (n_train,) where it counts, its weight times its Q less the mean of Q, which is known beforehand;
                given with ``counted``.
        """
        self._weight = weight
        self.total += weight
        self.squares += weight**2
        self.count += 1
        if self.average is None:
            self.average = self._zeros()
            # with the mean of Q known, the first member's part of the co-moment is too
            self.comoment = self._zeros() if self.with_residuals and deviation is not None else None
        if self.count == 2:
            self.moment = self._zeros()
            self.comoment = self._zeros() if self.with_residuals and deviation is None else self.comoment
        self._deviation = deviation
        if self.with_residuals:
            if self.residual is None:
                self.residual, self.residual_moment = torch.zeros_like(residual), torch.zeros_like(residual)
            assert self.residual_moment is not None
            share: float | Tensor = self._share
            if counted is not None:
                own = weight * counted
                first = torch.zeros_like(own)
                sums = self.sums or (first, first)
                self.sums = sums[0] + own, sums[1] + own * own
                share, weight = torch.where(counted, own / self.sums[0].clamp_min(1e-38), 0.0), own  # type: ignore[assignment]
            difference = residual - self.residual
            self.residual = self.residual + share * difference
            self._residual_after = residual - self.residual
            self.residual_moment = self.residual_moment + weight * difference * self._residual_after

    @property
    def _share(self) -> float:
        return self._weight / self.total if self.total else 0.0

    def add(self, start: int, stop: int, block: Tensor) -> None:
        """This member's rows ``start`` to ``stop``."""
        assert self.average is not None
        values = block.detach().cpu().to(torch.float32)
        average = torch.from_numpy(self.average[start:stop])
        before = values - average
        average.add_(before, alpha=self._share)
        if self.comoment is not None and self._deviation is not None:
            torch.from_numpy(self.comoment[start:stop]).addcmul_(values, self._deviation)
        if self.moment is not None:
            after = values - average
            torch.from_numpy(self.moment[start:stop]).addcmul_(before, after, value=self._weight)
            if self.comoment is not None and self._deviation is None:
                torch.from_numpy(self.comoment[start:stop]).addcmul_(before, self._residual_after, value=self._weight)

    def mean(self) -> np.ndarray:
        """(n_test, n_train) the weighted mean."""
        assert self.average is not None, "no member has voted"
        return self.average

    def residual_factors(self) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """What turns the moment of Q, and its co-moment with the matrices, into (co)variances of the means.

        NaN where one member counts. A member that counts for Q counts in the mean of the matrices too, which all do.
        """
        if self.sums is None:
            return self.error_factor, self.error_factor
        total, squares = self.sums
        one = squares >= total * total  # one member alone
        spread = torch.where(one, torch.nan, total * (1 - squares / total**2))
        return squares / total**2 / spread, squares / (total * self.total) / spread

    @property
    def error_factor(self) -> float:
        """What turns a sum of weighted squared deviations into the squared standard error of the mean."""
        share = self.squares / self.total**2 if self.total else 1.0
        return share / (self.total * (1 - share)) if self.count > 1 and share < 1 else float("nan")

    def stderr(self) -> np.ndarray:
        """(n_test, n_train) standard error of the mean; NaN with one member."""
        if self.moment is None or np.isnan(self.error_factor):
            out = self._zeros()
            out[:] = np.nan
            return out
        np.multiply(self.moment, self.error_factor, out=self.moment)
        return np.sqrt(self.moment, out=self.moment)
