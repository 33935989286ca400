"""DATAINF: the mean of inverses for the inverse of the mean, layer by layer (Kwon et al. 2024, equation 5).

    ((1/n) Σ_i r_i r_iᵀ + λI)⁻¹ ≈ (1/n) Σ_i (r_i r_iᵀ + λI)⁻¹ = (1/λ) (I - (1/n) Σ_i r_i r_iᵀ / (λ + ‖r_i‖²))

r_i the gradients of one layer (weight with bias) whose second moment is the curvature: ∇ℓ(i) for "fisher", as in the
paper; ∇f for the GGN of a regression, and the loss gradient at one drawn label for that of a classification.
"""

from __future__ import annotations

import torch
from torch import Tensor

from byline.features.base import Rows, State
from byline.methods.curvature.base import Inverse, Problem, Quadratic, Solver


class DataInf(Solver):
    """The closed form with swapped mean and inverse; it needs damping, and no memory."""

    name = "datainf"
    curvatures = ("ggn", "fisher")

    def fit(self, problem: Problem) -> State:
        """The trace alone, for λ: gradients are taken again as they are needed."""
        return {"trace": torch.tensor(problem.trace(), dtype=torch.float64)}

    def inverse(self, problem: Problem, state: State, damping: float) -> Inverse:
        """One pass over the training set per batch of vectors."""
        ridge = _ridge(problem, state, damping)

        def apply(vectors: Tensor) -> Tensor:
            total = torch.zeros_like(vectors)
            for blocks, weight in problem.gradients():
                weight = weight.to(vectors)
                for part in problem.layout.parts:
                    place = slice(part.start, part.stop)
                    rows = blocks[part.name].rows().to(vectors)
                    share = weight / (ridge + weight * rows.square().sum(1))
                    total[:, place].addmm_(vectors[:, place] @ rows.T * share, rows)
            return (vectors - total / problem.n) / ridge

        return apply

    def quadratic(self, problem: Problem, state: State, damping: float) -> Quadratic:
        """Kernels of each layer's gradients, which are never formed."""
        ridge, features = _ridge(problem, state, damping), problem.job.features

        def apply(rows: Rows) -> Tensor:
            own = {part.name: _of(part.name, rows) for part in problem.layout.parts}
            squares = features.diagonal(rows, rows)
            taken = torch.zeros_like(squares)
            for blocks, weight in problem.gradients():
                others = features.rows(blocks, problem.state)
                for name, mine in own.items():
                    other = _of(name, others)
                    share = weight / (ridge + weight * features.diagonal(other, other))
                    taken += features.kernel(mine, other).square() @ share.to(taken)
            return (squares - taken / problem.n) / ridge

        return apply


def _ridge(problem: Problem, state: State, damping: float) -> float:
    ridge = problem.ridge(float(state["trace"]), damping)
    if ridge <= 0:
        raise ValueError('solver="datainf" divides by λ; expected damping above 0')
    return ridge


def _of(block: str, rows: Rows) -> Rows:
    """The rows of one block."""
    return {name: value for name, value in rows.items() if name.rpartition(":")[0] == block}
