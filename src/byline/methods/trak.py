"""TRAK (Park et al. 2023, equation 13; ensembles as in arXiv 2405.17293, equation 3).

Over members m, with φ the gradient of the output and Q the residual:

    score(z, i) = [mean_m Q_m(i)] · [mean_m φ_m(z)ᵀ (Φ_mᵀ Φ_m + λ_m I)⁻¹ φ_m(i)]

λ_m = damping × mean_i ‖φ_m(i)‖². With fewer columns than examples the (k, k) matrix is solved against, otherwise
``φ(z)ᵀ (ΦᵀΦ + λI)⁻¹ Φᵀ = k(z, ·) (K + λI)⁻¹``: the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from byline import batches
from byline.features.base import Rows
from byline.methods import scan
from byline.methods.base import Prepare, Scorer, Voter
from byline.methods.mean import RunningMean
from byline.methods.ridge import Ridge
from byline.methods.streaming import Query


class TRAK(Ridge):
    """TRAK under any ensemble.

    The standard error comes from the members by the delta method: the kernel's and Q's deviations, and their
    covariance, to first order. Forward-only members of one trained model share its kernel and count there once.

    Attributes:
        damping_: relative damping per member, as given or as chosen by ``"auto"``, after ``fit``.
    """

    train_side = "output"
    _with_residuals = True

    def _query(self, voter: Voter) -> Prepare:
        factor, _ = self._factor(voter)

        def prepare(rows: Rows) -> Query:
            self._count(voter, len(rows["rows"]), len(factor))
            solved = torch.cholesky_solve(rows["rows"].double().T, factor).T.float().contiguous()
            vectors = scan.Vectors(solved)
            return Query.of({"rows": solved}, lambda train, a, b: scan.dots(vectors, train))

        return prepare

    def _scorer(self, voter: Voter) -> Scorer:
        if self._in_primal(voter):
            return super()._scorer(voter)
        stored = self._stored(voter)
        factor, _ = self._factor(voter)

        def in_dual(rows: Rows) -> Tensor:
            cross = self._cross(rows, stored)
            self._count(voter, len(cross), len(factor))
            return torch.cholesky_solve(cross.double().T, factor).T.float()

        return in_dual

    def _count(self, voter: Voter, rows: int, size: int) -> None:
        if self.ledger is not None:
            # triangular solves and products with the stored rows, which torch's counter does not see
            each = size * size + self.n_train_ * self._stored(voter).columns
            self.ledger.add_flops("serving", 2.0 * rows * each)

    def _self(self, voter: Voter) -> Tensor:
        stored = self._stored(voter)
        factor, ridge = self._factor(voter)
        if self._in_primal(voter):
            parts = [
                torch.linalg.solve_triangular(factor, stored.read(a, b)["rows"].double().T, upper=False).square().sum(0)
                for a, b in self._chunks(stored)
            ]
            return torch.cat(parts).float()
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
        # diag(K (K + λI)⁻¹) = 1 - λ diag((K + λI)⁻¹)
        return (1 - ridge * inverse.square().sum(0)).float()

    def _finish(self, mean: RunningMean, place: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        assert mean.residual is not None
        kernel, q = mean.mean(), mean.residual.numpy()
        only = self._voters[0].residual_variance
        error = mean.stderr() if mean.moment is None or np.isnan(mean.error_factor) else mean.moment
        for start, stop in batches.spans(len(kernel), 256):
            k = kernel[start:stop]
            if mean.moment is not None and mean.comoment is not None and mean.residual_moment is not None:
                # Var(q̄ k̄) ≈ q̄² Var(k̄) + 2 q̄ k̄ Cov(q̄, k̄) + k̄² Var(q̄)
                square = mean.moment[start:stop] * q**2
                square += 2 * mean.comoment[start:stop] * q * k
                square += k**2 * mean.residual_moment.numpy()
                error[start:stop] = np.sqrt(np.maximum(square * mean.error_factor, 0))
            elif only is not None:
                error[start:stop] = np.abs(k) * only[place].sqrt().numpy()
            k *= q
        return kernel, error
