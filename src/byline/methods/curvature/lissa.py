"""LISSA: the Neumann series of the inverse (Agarwal et al. 2017, section 3; Koh & Liang 2017, section 3).

    x_{j+1} = v + (I - (H + λI)/σ) x_j,   (H + λI)⁻¹ v = x_∞ / σ

which converges where every eigenvalue of H + λI is below 2σ. What is left of a component with eigenvalue μ is
multiplied by 1 - (μ + λ)/σ a step: small damping asks for many steps. σ is 0.55 × (λ_max + 2λ), λ_max by power
iteration: a tenth above the middle of the eigenvalues, where both ends shrink alike. On samples, whose λ_max may be
higher, it is 1.1 × (λ_max + λ).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from byline.features.base import State, seeded
from byline.methods.curvature.base import Inverse, Problem, Solver

_POWER = 30


class LiSSA(Solver):
    """The Neumann series, with products over the training set or a sample of it.

    Args:
        iterations: most steps; stopping there warns of the residual that is left (with ``sample`` none is known).
        tolerance: stop when ‖v - (H + λI) x‖ ≤ tolerance · ‖v‖.
        sample: training examples per step, drawn by the member's seed; None takes all of them, and is deterministic.
        scale: σ; None takes it from the largest eigenvalue.
    """

    name = "lissa"

    def __init__(
        self, iterations: int = 500, tolerance: float = 1e-3, sample: int | None = None, scale: float | None = None
    ):
        if scale is not None and not scale > 0:
            raise ValueError(f"scale is {scale!r}; expected None or a number above 0")
        self.iterations, self.tolerance, self.sample, self.scale = iterations, tolerance, sample, scale

    def fit(self, problem: Problem) -> State:
        """The trace and the largest eigenvalue."""
        like = next(iter(problem.products.params.values()))
        v = torch.randn(1, problem.layout.size, generator=seeded(problem.seed, "power")).to(like)
        largest = 0.0
        for _ in range(_POWER):
            image = problem.products(v / v.norm())
            largest, v = float(image.norm()), image
            if largest == 0:
                break
        return {
            "trace": torch.tensor(problem.trace(), dtype=torch.float64),
            "largest": torch.tensor(largest, dtype=torch.float64),
        }

    def inverse(self, problem: Problem, state: State, damping: float) -> Inverse:
        """Sum the series for a batch of vectors."""
        ridge = problem.ridge(float(state["trace"]), damping)
        largest = float(state["largest"])
        scale = 0.55 * (largest + 2 * ridge) if self.sample is None else 1.1 * (largest + ridge)
        scale = scale if self.scale is None else self.scale
        return lambda vectors: self._sum(problem, vectors, ridge, scale)

    def _sum(self, problem: Problem, vectors: Tensor, ridge: float, scale: float) -> Tensor:
        draws = seeded(problem.seed, "lissa")
        x, norm = vectors.clone(), vectors.norm(dim=1).clamp_min(1e-30)
        left = float("inf")
        for step in range(self.iterations):
            chosen = None
            if self.sample is not None and self.sample < problem.n:
                chosen = torch.randperm(problem.n, generator=draws)[: self.sample].tolist()
            image = problem.products(x, chosen).add_(x, alpha=ridge)
            change = vectors - image / scale
            x = x + change
            # with 0 ≤ H + λI ≤ 2σ no term of the series is longer than v; samples may exceed it for a while
            growth = float((x.norm(dim=1) / norm).max())
            if not growth <= (1.01 if chosen is None else 10) * (step + 2):
                raise ValueError(
                    f'solver="lissa" diverges on {problem.name} after {step + 1} steps: '
                    f"its scale {scale:.3g} is too small for the largest eigenvalue of the {problem.curvature}"
                    f"{', or that has negative ones' if problem.curvature == 'hessian' else ''}; raise damping"
                    f'{"" if self.scale is None else " or LiSSA(scale=...)"}, or use solver="cg"'
                )
            left = float((change.norm(dim=1) / norm).max())
            if chosen is None and left <= self.tolerance:
                return x / scale
        if self.sample is None:
            warnings.warn(
                f'solver="lissa" stopped after {self.iterations} steps at a relative residual of {left:.2g}, above '
                f'the tolerance {self.tolerance:.2g}; raise damping or LiSSA(iterations=...), or use solver="cg"',
                stacklevel=2,
            )
        return x / scale
