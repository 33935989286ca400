"""K-FAC: a Kronecker product per layer (Martens & Grosse 2015; Grosse & Martens 2016 for convolutions).

    H ≈ ⊕_layers (N/n) · A ⊗ S,   A = E[x xᵀ],  S = E[g gᵀ]
    (H + λI)⁻¹ V = Q_S [(Q_Sᵀ V Q_A) / ((N/n) · σ αᵀ + λ)] Q_Aᵀ

x the inputs of a layer and g the gradients of its outputs at the N positions of the n examples, Q and α, σ from their
eigendecompositions. λ is added to the product itself, not split between the factors. Positions count as independent
(the "expand" form); of a classification's GGN the labels are drawn from the model.

What has no such factors: a bias that stands alone, a norm, or a parameter that fell back to autograd gets its dense
second moment up to 512 entries, and its diagonal beyond. An embedding's left factor is diagonal over the ids. A factor
wider than 4096 is replaced by its diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from byline.features.base import Rows, State
from byline.features.blocks import Block, Flat, Lookup, Outer
from byline.methods.curvature.base import Inverse, Problem, Quadratic, Solver
from byline.methods.curvature.layout import Part, block_of

_DENSE = 512
_WIDEST = 4096
_LONG = 32  # positions from which a product per example costs no more than one of all


@dataclass
class _Moments:
    """Sums over the training set of one block's factors; a factor kept as its diagonal has one dimension less."""

    left: Tensor | None = None
    right: Tensor | None = None
    positions: float = 0.0


class KFAC(Solver):
    """Kronecker factors.

    Args:
        samples: labels drawn per example for the GGN of a classification; None takes every label, weighted by its
            probability (classification alone: as many passes as there are classes).
    """

    name = "kfac"
    curvatures = ("ggn", "fisher")

    def __init__(self, samples: int | None = 1):
        if samples is not None and samples < 1:
            raise ValueError(f"samples is {samples!r}; expected None or an int of at least 1")
        self.samples = samples

    def describe(self) -> dict[str, int | None]:
        """The number of drawn labels."""
        return {"samples": self.samples}

    def fit(self, problem: Problem) -> State:
        """Bases (none where a factor is diagonal) and eigenvalues of every block."""
        if self.samples is None and problem.job.task.name not in ("classification", "binary", "regression"):
            raise ValueError("samples is None, which asks for every label of every token; expected an int")
        moments: dict[str, _Moments] = {part.name: _Moments() for part in problem.layout.parts}
        for blocks, weight in problem.gradients(self.samples):
            for name, block in blocks.items():
                _add(moments[name], block, weight)
        state: State = {}
        for part in problem.layout.parts:
            found = moments.pop(part.name)
            assert found.right is not None
            right, basis = _eigen(found.right)
            if basis is not None:
                state[f"{part.name}/right"] = basis
            if found.left is None:
                values = right.unsqueeze(-2) / problem.n
            else:
                left, basis = _eigen(found.left)
                if basis is not None:
                    state[f"{part.name}/left"] = basis
                values = left.unsqueeze(-1) * right.unsqueeze(-2) / (problem.n * max(found.positions, 1e-30))
            state[f"{part.name}/values"] = values.expand(part.shape).contiguous().float()
        return state

    def _damped(self, problem: Problem, state: State, damping: float) -> dict[str, Tensor]:
        """The eigenvalues of every block, with λ."""
        values = {part.name: state[f"{part.name}/values"] for part in problem.layout.parts}
        ridge = problem.ridge(sum(float(v.double().sum()) for v in values.values()), damping)
        largest = max(float(v.max()) for v in values.values())
        if min(float(v.min()) for v in values.values()) + ridge <= 1e-12 * largest or largest == 0:
            raise ValueError(f"damping is too small: the curvature of {problem.name} is singular; raise damping")
        return {name: value + ridge for name, value in values.items()}

    def quadratic(self, problem: Problem, state: State, damping: float) -> Quadratic:
        """Squares in each block's eigenbasis; of one position, without ever forming the gradient."""
        damped = self._damped(problem, state, damping)

        def apply(rows: Rows) -> Tensor:
            parts = problem.layout.parts
            return torch.stack([_weighted(block_of(p, rows), 1 / damped[p.name], p, state) for p in parts]).sum(0)

        return apply

    def inverse(self, problem: Problem, state: State, damping: float) -> Inverse:
        """Divide in each block's eigenbasis."""
        damped = self._damped(problem, state, damping)

        def apply(vectors: Tensor) -> Tensor:
            out = torch.empty_like(vectors)
            for part in problem.layout.parts:
                own = vectors[:, part.start : part.stop].reshape(-1, *part.shape)
                turned = turn(own, state, part.name) / damped[part.name].to(own)
                out[:, part.start : part.stop] = turn(turned, state, part.name, back=True).flatten(1)
            return out

        return apply


def turn(matrices: Tensor, state: State, name: str, back: bool = False) -> Tensor:
    """(B, G, o, i) into a block's eigenbasis, or out of it."""
    left, right = state.get(f"{name}/left"), state.get(f"{name}/right")
    if left is not None:
        left = left.to(matrices)
        matrices = (left if back else left.mT) @ matrices
    if right is not None:
        right = right.to(matrices)
        matrices = matrices @ (right.mT if back else right)
    return matrices


def _weighted(block: Block, weights: Tensor, part: Part, state: State) -> Tensor:
    """(B,) sums of the squares of each gradient in the eigenbasis, by weights (G, o, i)."""
    if isinstance(block, Outer) and block.left.shape[2] == 1:
        a, b = turned_factors(block, part, state)
        inner = torch.einsum("bgto,goi->bgti", a.square(), weights.to(a))
        return (inner * b.square()).flatten(1).sum(1)
    out = []
    step = max(1, 2**24 // max(1, part.stop - part.start))
    for start in range(0, len(block.right if not isinstance(block, Flat) else block.grad), step):
        turned = turned_rows(cut(block, start, start + step), part, state)
        out.append((turned.square_() * weights.to(turned)).flatten(1).sum(1))
    return torch.cat(out)


def turned_factors(block: Outer, part: Part, state: State) -> tuple[Tensor, Tensor]:
    """(B, G, T, o) and (B, G, T, i): the factors of gradients in the block's eigenbasis."""
    left, right = state.get(f"{part.name}/left"), state.get(f"{part.name}/right")
    a = block.left if left is None else block.left @ left.to(block.left)
    b = block.right if right is None else block.right @ right.to(block.right)
    return a, b


def turned_rows(block: Block, part: Part, state: State) -> Tensor:
    """(B, G, o, i) gradients in the block's eigenbasis; of few positions, factors are turned before their product."""
    if isinstance(block, Outer):
        (o, i), tokens = part.shape[-2:], block.left.shape[2]
        if tokens * (o * o + i * i) < o * i * (o + i):
            a, b = turned_factors(block, part, state)
            return (a.mT @ b).view(-1, *part.shape)
    return turn(block.rows().view(-1, *part.shape), state, part.name)


def cut(block: Block, start: int, stop: int) -> Block:
    """Some examples of a block."""
    if isinstance(block, Outer):
        return Outer(block.params, block.left[start:stop], block.right[start:stop])
    if isinstance(block, Lookup):
        return Lookup(block.params, block.ids[start:stop], block.right[start:stop], block.n)
    return Flat(block.params, block.grad[start:stop])


def _add(moments: _Moments, block: Block, weight: Tensor) -> None:
    """Add a batch's Σ w r rᵀ of each factor."""
    if isinstance(block, Flat):
        moments.right = _sum(moments.right, block.grad.unsqueeze(1).unsqueeze(2), weight, _DENSE)
        return
    tokens = block.right.shape[-2]
    moments.positions += float(weight.sum()) * tokens
    if isinstance(block, Lookup):
        counts = torch.zeros(1, block.n, dtype=torch.float64, device=block.right.device)
        counts.view(-1).index_add_(0, block.ids.flatten(), weight.double().repeat_interleave(tokens))
        moments.left = counts if moments.left is None else moments.left + counts
        moments.right = _sum(moments.right, block.right.unsqueeze(1), weight, _WIDEST)
        return
    moments.left = _sum(moments.left, block.left, weight, _WIDEST)
    moments.right = _sum(moments.right, block.right, weight, _WIDEST)


def _sum(total: Tensor | None, factor: Tensor, weight: Tensor, widest: int) -> Tensor:
    """Σ over examples and positions of a factor (B, G, T, d) with itself: (G, d, d), or (G, d) if that is too wide."""
    groups, tokens, width = factor.shape[1:]
    if width > widest:
        found = (factor.square().sum(2) * weight.view(-1, 1, 1).to(factor)).sum(0)
    elif tokens >= _LONG and factor.mT.is_contiguous():
        # of convolutions a factor is large, and lies turned: the product takes it as it is
        found = factor.new_zeros(groups, width, width)
        for one, by in zip(factor, weight.tolist(), strict=True):
            found.baddbmm_(one.mT, one, alpha=by)
    else:
        flat = factor.transpose(0, 1).flatten(1, 2)
        weighted = (factor * weight.view(-1, 1, 1, 1).to(factor)).transpose(0, 1).flatten(1, 2)
        found = weighted.mT @ flat
    return found.double() if total is None else total.add_(found)


def _eigen(moment: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues (G, d), and eigenvectors (G, d, d) where the moment is no diagonal."""
    if moment.ndim == 2:
        return moment, None
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp_min(0), vectors.float()
