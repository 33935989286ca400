"""TRAK (Park et al. 2023, equation 13; ensembles as in arXiv 2405.17293, equation 3).

Over members m, with φ the gradient of the output and Q the residual:

    score(z, i) = [mean_m Q_m(i)] · [mean_m φ_m(z)ᵀ (Φ_mᵀ Φ_m + λ_m I)⁻¹ φ_m(i)]

λ_m = damping × mean_i ‖φ_m(i)‖². With fewer columns than examples the (k, k) matrix is solved against, otherwise
``φ(z)ᵀ (ΦᵀΦ + λI)⁻¹ Φᵀ = k(z, ·) (K + λI)⁻¹``: the same numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from byline import batches
from byline.features.base import Products, Rows
from byline.methods.base import Attributor, Scorer, Voter, phase
from byline.methods.damping import auto
from byline.methods.kernels import check_room, dual, factorise, primal
from byline.methods.mean import RunningMean

_KEPT = 2**28  # bytes of factors that stay in memory


class TRAK(Attributor):
    """TRAK under any ensemble.

    The standard error comes from the members by the delta method: the kernel's and Q's deviations, and their
    covariance, to first order. Forward-only members of one trained model share its kernel and count there once.

    Attributes:
        damping_: relative damping per member, as given or as chosen by ``"auto"``, after ``fit``.
    """

    train_side = "output"
    _with_residuals = True

    def _prepare(self) -> None:
        self._factors: OrderedDict[str, tuple[Tensor, float]] = OrderedDict()
        self._chosen: dict[str, float] = {}
        self._products = Products()

    @property
    def damping_(self) -> dict[str, float]:
        """Relative damping per member; ``"auto"`` looks at a member's kernel when it is first needed."""
        self._check_fitted()
        if self.damping == "auto":
            for voter in self._voters:
                if voter.member.identity("gradient") not in self._chosen:
                    self._factor(voter)
        return {v.member.name: self._relative(v.member.identity("gradient"), None) for v in self._voters}

    def _relative(self, identity: str, gram: Tensor | None) -> float:
        if self.damping != "auto":
            return float(self.damping)
        if identity not in self._chosen:
            assert gram is not None
            self._chosen[identity] = auto(gram, self.n_train_, len(self._voters))
        return self._chosen[identity]

    def _check_size(self, n_train: int) -> None:
        if not self.features.linear:
            check_room(n_train, self.features)

    def _in_primal(self, voter: Voter) -> bool:
        return self.features.linear and self._stored(voter).columns < self.n_train_

    def _factor(self, voter: Voter) -> tuple[Tensor, float]:
        """Cholesky factor of the damped matrix and its λ; the last ones used are kept, up to 256 MB."""
        name, key = voter.member.name, voter.member.identity("gradient")  # joined ensembles repeat names
        if key in self._factors:
            self._factors.move_to_end(key)
            return self._factors[key]
        with phase(self.ledger, "fitting"):
            stored, n = self._stored(voter), self.n_train_
            primal_form = self._in_primal(voter)
            gram = primal(stored) if primal_form else dual(self.features, stored, self._products)
            # the trace is that of the dual kernel in either form: Σ_i ‖φ(i)‖²
            ridge = self._relative(key, gram) * float(gram.diagonal().double().sum()) / n
            factor = factorise(gram, ridge, name)
            if self.ledger is not None:
                product = 2 * n * stored.columns**2 if primal_form else n**2 * stored.columns
                self.ledger.add_flops("fitting", product + len(factor) ** 3 / 3)
        self._factors[key] = factor, ridge
        while len(self._factors) > 1 and sum(8 * f.numel() for f, _ in self._factors.values()) > _KEPT:
            self._factors.popitem(last=False)
        return factor, ridge

    def _scorer(self, voter: Voter) -> Scorer:
        stored = self._stored(voter)
        factor, _ = self._factor(voter)
        size = len(factor)

        def count(rows: Tensor) -> None:
            if self.ledger is not None:
                # triangular solves and products with the stored rows, which torch's counter does not see
                self.ledger.add_flops("serving", 2.0 * len(rows) * (size * size + self.n_train_ * stored.columns))

        def in_primal(rows: Rows) -> Tensor:
            count(rows["rows"])
            solved = torch.cholesky_solve(rows["rows"].double().T, factor).float()
            return torch.cat([stored.read(a, b)["rows"].to(solved) @ solved for a, b in self._chunks(stored)]).T

        def in_dual(rows: Rows) -> Tensor:
            cross = self._cross(rows, stored)
            count(cross)
            return torch.cholesky_solve(cross.double().T, factor).T.float()

        return in_primal if self._in_primal(voter) else in_dual

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

    def _finish(self, mean: RunningMean) -> tuple[np.ndarray, np.ndarray]:
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
                error[start:stop] = np.abs(k) * only.sqrt().numpy()
            k *= q
        return kernel, error

    def info(self) -> dict[str, Any]:
        """Adds the damping that was used."""
        chosen = [float(self.damping)] if self.damping != "auto" else sorted(self._chosen.values())
        return {
            **super().info(),
            "damping": self.damping,
            "damping_median": chosen[len(chosen) // 2] if chosen else None,
        }
