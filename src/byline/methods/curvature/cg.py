"""CONJUGATE GRADIENTS on ``(H + λI) x = ∇f(z)`` (Hestenes & Stiefel 1952; Martens 2010; Koh & Liang 2017, section 3).

    x ← x + α p,  r ← r - α (H + λI) p,  p ← r + β p;   α = rᵀr / pᵀ(H + λI)p,  β = r'ᵀr' / rᵀr

for all test examples of a batch at once, each with its own α and β. Exact after as many steps as H has distinct
eigenvalues, and within the tolerance after about √κ, κ = (λ_max + λ) / λ.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from byline.features.base import State
from byline.methods.curvature.base import Inverse, Problem, Solver, not_positive

# on the way to the solution the residual may well grow; this far, rounding has taken over
_LOST = 10.0


class CG(Solver):
    """Conjugate gradients with products over the whole training set.

    Args:
        tolerance: stop when ‖residual‖ ≤ tolerance · ‖∇f(z)‖.
        iterations: most steps; stopping there warns of the residual that is left, or refuses one beyond 10.
    """

    name = "cg"

    def __init__(self, tolerance: float = 1e-4, iterations: int = 200):
        if not tolerance > 0:
            raise ValueError(f"tolerance is {tolerance!r}; expected a number above 0")
        self.tolerance, self.iterations = tolerance, iterations

    def fit(self, problem: Problem) -> State:
        """The trace alone, for λ."""
        return {"trace": torch.tensor(problem.trace(), dtype=torch.float64)}

    def inverse(self, problem: Problem, state: State, damping: float) -> Inverse:
        """Solve for a batch of right-hand sides."""
        ridge = problem.ridge(float(state["trace"]), damping)
        return lambda vectors: self._solve(problem, vectors, ridge)

    def _solve(self, problem: Problem, right: Tensor, ridge: float) -> Tensor:
        x, r, p = torch.zeros_like(right), right.clone(), right.clone()
        square = r.double().square().sum(1)
        goal = square * self.tolerance**2
        for _ in range(self.iterations):
            # those that have converged rest: their α would be 0/0
            open_ = (square > goal).nonzero().squeeze(1)
            if not len(open_):
                return x
            direction = p[open_]
            image = problem.products(direction).add_(direction, alpha=ridge)
            bend = (direction.double() * image.double()).sum(1)
            if not bend.isfinite().all():
                raise ValueError(
                    f'solver="cg" met a product with the {problem.curvature} of {problem.name} that is not finite; '
                    'raise damping, or use solver="ekfac"'
                )
            if (bend <= 0).any():
                raise not_positive(problem, 'solver="cg" met a direction of negative curvature')
            alpha = (square[open_] / bend).to(right).unsqueeze(1)
            x[open_] += alpha * direction
            r[open_] -= alpha * image
            after = r[open_].double().square().sum(1)
            p[open_] = r[open_] + (after / square[open_]).to(right).unsqueeze(1) * direction
            square[open_] = after
        left = float((square / (goal / self.tolerance**2).clamp_min(1e-300)).max().sqrt())
        if not left <= _LOST:
            raise ValueError(
                f'solver="cg" does not converge on {problem.name}: its relative residual is {left:.2g} after '
                f"{self.iterations} steps, and doing nothing has 1; raise damping, or CG(iterations=...)"
            )
        if left > self.tolerance:
            warnings.warn(
                f'solver="cg" stopped after {self.iterations} steps at a relative residual of {left:.2g}, above the '
                f"tolerance {self.tolerance:.2g}; raise damping, or CG(iterations=...)",
                stacklevel=2,
            )
        return x
