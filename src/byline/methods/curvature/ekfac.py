"""EK-FAC: K-FAC's eigenbasis with the right second moments in it (George et al. 2018; Grosse et al. 2023, section 2.3).

    Λ_ab = E[(Q_Sᵀ r Q_A)_ab²]   in place of (N/n) · σ_a α_b

r the gradient of a layer's weight: the best diagonal in that basis, so that H's trace is met exactly. Everything else
is as in `byline.methods.curvature.kfac`, and so are the blocks without factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from byline.features.base import State
from byline.features.blocks import Block, Outer
from byline.methods.curvature.base import Problem
from byline.methods.curvature.kfac import KFAC, cut, turned_factors, turned_rows
from byline.methods.curvature.layout import Part


class EKFAC(KFAC):
    """Kronecker factors with corrected eigenvalues; a second pass over the training set, with the same labels."""

    name = "ekfac"

    def fit(self, problem: Problem) -> State:
        """K-FAC's bases, and the eigenvalues that gradients have in them."""
        state = super().fit(problem)
        values = {
            part.name: torch.zeros(part.shape, dtype=torch.float64, device=state[f"{part.name}/values"].device)
            for part in problem.layout.parts
        }
        for blocks, weight in problem.gradients(self.samples):
            for part in problem.layout.parts:
                values[part.name] += _squares(blocks[part.name], weight, part, state)
        for name, value in values.items():
            state[f"{name}/values"] = (value / problem.n).float()
        return state


def _squares(block: Block, weight: Tensor, part: Part, state: State) -> Tensor:
    """(G, o, i) the weighted sum over a batch of squared gradients in the eigenbasis."""
    if isinstance(block, Outer) and block.left.shape[2] == 1:
        # one position: the square of a product is the product of squares
        a, b = turned_factors(block, part, state)
        return torch.einsum("bgto,bgti->goi", a.square() * weight.view(-1, 1, 1, 1), b.square())
    total = torch.zeros(part.shape, dtype=weight.dtype, device=weight.device)
    step = max(1, 2**24 // max(1, part.stop - part.start))
    for start in range(0, len(weight), step):
        turned = turned_rows(cut(block, start, start + step), part, state).square_()
        total += torch.einsum("b,bgoi->goi", weight[start : start + step], turned)
    return total
