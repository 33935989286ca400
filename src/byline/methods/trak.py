"""TRAK (Park et al. 2023, equation 13; ensembles as in arXiv 2405.17293, equation 3).

Over members m, with φ the gradient of the output and Q the residual:

    score(z, i) = [mean_m Q_m(i)] · [mean_m φ_m(z)ᵀ (Φ_mᵀ Φ_m + λ_m I)⁻¹ φ_m(i)]

λ_m = damping × mean_i ‖φ_m(i)‖². With fewer columns than examples the (k, k) matrix is solved against, otherwise
``φ(z)ᵀ (ΦᵀΦ + λI)⁻¹ Φᵀ = k(z, ·) (K + λI)⁻¹``: the same numbers.

The Hessian of a logistic loss in the margin is ``ΦᵀWΦ``, W = diag Q (1 - Q). TRAK's estimator leaves W out, which is
the default here too; ``hessian="weighted"`` keeps it. Then the rows of Φ in the second moment are multiplied by S = √W,
and in the dual the solution is ``k(z, ·) S (S K S + λI)⁻¹ S⁻¹``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from byline import batches
from byline.ensembles.base import Ensemble
from byline.features.base import Rows
from byline.methods import residuals, scan
from byline.methods.base import Prepare, Scorer, Voter, averaged
from byline.methods.mean import RunningMean
from byline.methods.ridge import Ridge
from byline.methods.streaming import Query
from byline.task import Task

HESSIANS = ("unweighted", "weighted")


class TRAK(Ridge):
    """TRAK under any ensemble.

    The standard error comes from the members by the delta method: the kernel's and Q's deviations, and their
    covariance, to first order. Forward-only members of one trained model share its kernel and count there once.

    Args:
        task: what is explained.
        ensemble: who votes.
        hessian: of the training loss in the output: "unweighted" is TRAK's ``ΦᵀΦ``; "weighted" is ``ΦᵀWΦ`` with
            ``W = Q (1 - Q)`` of each member, at least 0.001. Of regression, whose W is 1, both are the same.
        **options: the other arguments of every method (`Attributor`): ``residual``, ``damping``, ``store``, …

    Attributes:
        damping_: relative damping per member, as given or as chosen by ``"auto"``, after ``fit``.

    Raises:
        ValueError: "weighted" or ``residual="leave-one-out"`` with a task whose residual is the caller's own: how it
            depends on the output is not known.
    """

    train_side = "output"
    residuals = residuals.KINDS
    _with_residuals = True

    def __init__(self, task: Task, ensemble: Ensemble, *, hessian: str = "unweighted", **options: Any):
        super().__init__(task, ensemble, **options)
        if hessian not in HESSIANS:
            raise ValueError(f"hessian is {hessian!r}; expected one of {', '.join(map(repr, HESSIANS))}")
        self.hessian = hessian
        for name, value in (("hessian", hessian), ("residual", self.residual)):
            if value in ("weighted", "leave-one-out") and task.own_residual:
                raise ValueError(
                    f"{name} is {value!r}, which needs to know how the residual depends on the output, and the task's "
                    "residual is a callable; expected a named output, or a callable one that is read as a margin"
                )
            if value in ("weighted", "leave-one-out") and not task.residual_varies:
                raise ValueError(
                    f"{name} is {value!r}, which needs a residual that depends on the output, and that of the output "
                    f"{task.name!r} is 1 throughout; expected the default"
                )

    def _choose_residuals(self) -> None:
        super()._choose_residuals()
        self._scale_of: dict[str, Tensor] = {}

    def _key(self, voter: Voter) -> str:
        own, fold = super()._key(voter), voter.member.trained_on
        # weights are made of the residuals of all members that share the gradients and the fold
        return own if self.hessian == "unweighted" or fold is None else f"{own}-{batches.digest_of([fold])}"

    def _scales(self, voter: Voter) -> Tensor | None:
        if self.hessian == "unweighted" or self.task.name == "regression":
            return None
        key = self._key(voter)
        if key not in self._scale_of:
            weights = residuals.curvature(voter.residual, self.task.name)
            self._scale_of[key] = weights.clamp_min(residuals.FLOOR).sqrt()
        return self._scale_of[key]

    def _q(self, voter: Voter) -> Tensor:
        if self.residual == "leave-one-out" and voter.made is None:
            scales, each = self._scales(voter), self._residuals_of(voter)
            weights = None if scales is None else scales.square()
            moved = residuals.leave_one_out(each, self._self(voter), weights, self.task.name)
            # what a member was not trained on is left out already
            unseen = voter.member.unseen(self.n_train_)
            made, variance = averaged(voter.members, torch.where(unseen, each, moved))
            # in this order: where it is made, all of it is
            voter.residual_variance = variance
            voter.made = made
        return super()._q(voter)

    def _query(self, voter: Voter) -> Prepare:
        factor, _ = self._factor(voter)
        state = self._state(voter)

        def prepare(rows: Rows) -> Query:
            own = self.features.vectors(rows, state)
            self._count(voter, len(own), len(factor))
            solved = torch.cholesky_solve(own.double().T, factor).T.float().contiguous()
            vectors = scan.Vectors(solved)
            return Query.of({"rows": solved}, lambda train, a, b: scan.dots(vectors, train, self.features, state))

        return prepare

    def _scorer(self, voter: Voter) -> Scorer:
        if self._in_primal(voter):
            return super()._scorer(voter)
        stored, scales = self._stored(voter), self._scales(voter)
        factor, _ = self._factor(voter)

        def in_dual(rows: Rows) -> Tensor:
            cross = self._cross(rows, stored)
            self._count(voter, len(cross), len(factor))
            if scales is None:
                return torch.cholesky_solve(cross.double().T, factor).T.float()
            return (torch.cholesky_solve((cross * scales).double().T, factor).T / scales).float()

        return in_dual

    def _count(self, voter: Voter, rows: int, size: int) -> None:
        if self.ledger is not None:
            # triangular solves and products with the stored rows, which torch's counter does not see
            columns = size if self._in_primal(voter) else self._stored(voter).columns
            each = size * size + self.n_train_ * columns
            self.ledger.add_flops("serving", 2.0 * rows * each)

    def _self(self, voter: Voter) -> Tensor:
        factor, ridge = self._factor(voter)
        if self._in_primal(voter):
            parts = [
                torch.linalg.solve_triangular(factor, rows.double().T, upper=False).square().sum(0)
                for rows in self._vectors(voter)
            ]
            return torch.cat(parts).float()
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
        # diag(K (K + λI)⁻¹) = 1 - λ diag((K + λI)⁻¹)
        leverage = 1 - ridge * inverse.square().sum(0)
        scales = self._scales(voter)
        return (leverage if scales is None else leverage / scales.double().square()).float()

    def info(self) -> dict[str, Any]:
        """Adds the Hessian, where it is not TRAK's own."""
        return {**super().info(), **({"hessian": self.hessian} if self.hessian != "unweighted" else {})}

    def _finish(self, mean: RunningMean, place: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        assert mean.residual is not None
        kernel, q = mean.mean(), mean.residual.numpy()
        only = self._voters[0].residual_variance
        own, both = mean.residual_factors()
        error = mean.stderr() if mean.moment is None or np.isnan(mean.error_factor) else mean.moment
        for start, stop in batches.spans(len(kernel), 256):
            k = kernel[start:stop]
            if mean.moment is not None and mean.comoment is not None and mean.residual_moment is not None:
                # Var(q̄ k̄) ≈ q̄² Var(k̄) + 2 q̄ k̄ Cov(q̄, k̄) + k̄² Var(q̄)
                square = mean.moment[start:stop] * (q**2 * mean.error_factor)
                square += mean.comoment[start:stop] * (2 * q * _array(both)) * k
                square += k**2 * (mean.residual_moment.numpy() * _array(own))
                error[start:stop] = np.sqrt(np.maximum(square, 0))
            elif only is not None:
                error[start:stop] = np.abs(k) * only[place].sqrt().numpy()
            k *= q
        return kernel, error


def _array(factor: Tensor | float) -> np.ndarray | float:
    return factor.numpy() if isinstance(factor, Tensor) else factor
