"""EXPLICIT: H itself, and its Cholesky factor (Koh & Liang 2017, equation 2).

Influence(z, i) = ∇f(z)ᵀ (H + λI)⁻¹ (-∇ℓ(i)),   H (P, P) from P products with unit vectors
"""

from __future__ import annotations

import torch
from torch import Tensor

from byline.features.base import State
from byline.methods.curvature.base import Inverse, Problem, Solver, not_positive


class Explicit(Solver):
    """The dense matrix: the oracle of the other solvers, for small models.

    Args:
        limit: most parameters that are accepted; H takes 4·P² bytes and its factor 8·P².
    """

    name = "explicit"

    def __init__(self, limit: int = 5000):
        self.limit = limit

    def check(self, n_params: int) -> None:
        """Refuse more parameters than the limit."""
        if n_params > self.limit:
            raise ValueError(
                f'solver="explicit" forms a dense matrix over {n_params:,} parameters, more than its limit of '
                f'{self.limit:,}; use solver="ekfac", or choose fewer parameters with Task(params=...)'
            )

    def fit(self, problem: Problem) -> State:
        """H."""
        self.check(problem.layout.size)
        matrix = torch.cat([rows for _, rows in problem.columns()])
        return {"matrix": (matrix + matrix.T) / 2}

    def inverse(self, problem: Problem, state: State, damping: float) -> Inverse:
        """Two triangular solves."""
        matrix = state["matrix"]
        ridge = problem.ridge(float(matrix.diagonal().double().sum()), damping)
        factor = cholesky(matrix, ridge)
        if factor is None:
            raise not_positive(problem, 'solver="explicit" cannot factorise')
        return lambda vectors: solve(factor, vectors)


def cholesky(matrix: Tensor, ridge: float) -> Tensor | None:
    """Factor of ``matrix + ridge · I`` in float64; None where it is not positive definite."""
    damped = matrix.double()
    damped.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(damped)
    return None if int(info) else factor


def solve(factor: Tensor, vectors: Tensor) -> Tensor:
    """(B, P) rows times the inverse."""
    return torch.cholesky_solve(vectors.double().T, factor).T.to(vectors.dtype)
