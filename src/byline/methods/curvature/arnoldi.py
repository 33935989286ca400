"""ARNOLDI: the inverse on the leading eigenvectors of H (Schioppa et al. 2022, section 4; Arnoldi 1951; Lanczos 1950).

    (H + λI)⁻¹ v ≈ Σ_k u_k (u_kᵀ v) / (μ_k + λ)

over the ``top`` largest eigenvalues μ_k. What is outside their span is dropped, as in the paper. H is symmetric, so the
Krylov basis is Lanczos's; it is orthogonalised in full, twice, at every step.
"""

from __future__ import annotations

import torch

from byline.features.base import State, seeded
from byline.methods.curvature.base import Inverse, Problem, Solver, not_positive


class Arnoldi(Solver):
    """Projection on the leading eigenvectors.

    Args:
        top: eigenvectors that are kept, P numbers each.
        iterations: size of the Krylov space they are taken from; ``2 · top`` by default.
    """

    name = "arnoldi"

    def __init__(self, top: int = 50, iterations: int | None = None):
        if top < 1 or (iterations is not None and iterations < top):
            raise ValueError(f"top is {top!r} and iterations {iterations!r}; expected 1 ≤ top ≤ iterations")
        self.top = top
        self.iterations = 2 * top if iterations is None else iterations

    def describe(self) -> dict[str, int]:
        """Both numbers."""
        return {"top": self.top, "iterations": self.iterations}

    def fit(self, problem: Problem) -> State:
        """The leading eigenpairs, and the trace for λ."""
        size = problem.layout.size
        like = next(iter(problem.products.params.values()))
        generator = seeded(problem.seed, "lanczos")
        steps = min(self.iterations, size)
        basis = like.new_zeros(steps, size)
        images = like.new_zeros(steps, size)
        w = torch.randn(size, generator=generator).to(like)
        for step in range(steps):
            known = basis[:step]
            before = w.norm()
            for _ in range(2):
                w = w - known.T @ (known @ w)
            if w.norm() <= 1e-5 * before:
                # the Krylov space is exhausted: go on from a random vector outside it
                w = torch.randn(size, generator=generator).to(like)
                for _ in range(3):
                    w = w - known.T @ (known @ w)
            basis[step] = w / w.norm()
            images[step] = problem.products(basis[step : step + 1])[0]
            w = images[step]
            if not w.isfinite().all():
                raise ValueError(
                    f'solver="arnoldi" met a product with the {problem.curvature} of {problem.name} that is not '
                    "finite; check the checkpoint"
                )
        small = basis.double() @ images.double().T
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        top = min(self.top, steps)
        return {
            "trace": torch.tensor(problem.trace(), dtype=torch.float64),
            "values": values[-top:],
            "vectors": vectors[:, -top:].T.to(basis) @ basis,
        }

    def inverse(self, problem: Problem, state: State, damping: float) -> Inverse:
        """Divide in the eigenbasis."""
        damped = state["values"] + problem.ridge(float(state["trace"]), damping)
        if (damped <= 0).any():
            raise not_positive(problem, 'solver="arnoldi" keeps an eigenvalue below -λ (top= may be too large)')
        vectors = state["vectors"]
        return lambda v: ((v @ vectors.T) / damped.to(v)) @ vectors
