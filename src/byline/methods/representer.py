"""REPRESENTER POINTS (Yeh et al. 2018, theorem 3.1), the mean over members.

    score(z, i) = (∂f(z)/∂logits · α_i) ⟨h(i), h(z)⟩,   α_i = -1/(2 λ n) ∂ℓ_i/∂logits

The last linear layer, its bias as one more column of h, is fitted anew on the frozen embeddings h until
``(1/n) Σ ℓ_i + λ ‖W‖²`` is stationary (the bias is penalised too). Then ``W = Σ_i α_i ⊗ h(i)``: the scores of a test
example sum to ``∂f(z)/∂logits · W h(z)``, with nothing left over. f and ℓ are those of the refitted layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from byline import batches
from byline.ensembles import Ensemble
from byline.methods.base import Voter
from byline.methods.embedding import EmbeddingMethod, EmbeddingScorer
from byline.task import Task, margin

_STEPS = 100
_AIM, _TOLERANCE = 1e-10, 1e-6
_CHUNK = 4096


class RepresenterPoints(EmbeddingMethod):
    """What each training example adds to a prediction of the refitted last layer.

    ``self_influence()`` is what an example adds to its own output, ``(∂f(i)/∂logits · α_i) ‖h(i)‖²``: never negative
    for a classification, and large where the refitted layer still gets it wrong.

    Args:
        task: "classification" or "regression", with its own loss.
        ensemble: who votes.
        l2: λ, above 0.
        **options: those of `EmbeddingMethod`. With ``layer=`` a linear layer is fitted on that module's input.

    Raises:
        ValueError: another task, λ out of range, or what `EmbeddingMethod` refuses; while fitting, targets that do not
            fit the task, and a last layer that does not become stationary (its gradient stays above 1e-6 of the
            penalty's): never NaN, and never scores that do not add up.
    """

    with_targets = True

    def __init__(self, task: Task, ensemble: Ensemble, *, l2: float = 1e-3, **options: Any):
        super().__init__(task, ensemble, **options)
        if not isinstance(l2, int | float) or isinstance(l2, bool) or not 0 < l2 < float("inf"):
            raise ValueError(f"l2 is {l2!r}; expected a finite number above 0")
        if task.name not in ("classification", "regression") or not task.has_likelihood:
            what = "a loss of its own" if task.name in ("classification", "regression") else f"the output {task.name!r}"
            raise ValueError(
                f"task has {what}; RepresenterPoints needs output='classification' or 'regression' with its usual loss"
            )
        self.l2 = float(l2)

    def _target(self, targets: Any, name: str) -> Tensor:
        if self.task.name == "classification":
            return super()._target(targets, name)
        if not isinstance(targets, Tensor) or targets.numel() != len(targets):
            raise ValueError(f"{name} has targets of another form; expected one number per example")
        bad = (~targets.reshape(-1).isfinite()).nonzero()
        if len(bad):
            raise ValueError(f"{name} has a NaN or infinite target, example {int(bad[0, 0])}; expected finite numbers")
        return targets.reshape(-1).double().cpu()

    def _prepare(self) -> None:
        self._heads = {voter.member.identity("residual"): self._head(voter) for voter in self._voters}

    def _head(self, voter: Voter) -> tuple[Tensor, Tensor]:
        """The refitted layer (C, d + 1) and α (n_train, C), in float64."""
        key = f"representer-{voter.member.identity('residual')}-{self.l2!r}"
        found = self.store.state(key)
        if found is None:
            h, targets = _with_one(self._embeddings(voter.member)), self._targets()
            if self.task.name == "regression":
                weight, slope = _ridge(h, targets, self.l2)
            else:
                weight, slope = _softmax_regression(h, targets, self._classes(), self.l2)
            rest, alpha = _rest(h, weight, slope, self.l2), -slope / (2 * self.l2 * len(h))
            # the comparison is false for NaN
            if not (rest <= _TOLERANCE and bool(alpha.isfinite().all())):
                raise ValueError(
                    f"l2 is {self.l2}: the refitted last layer of {voter.member.name} does not become stationary (its "
                    f"gradient is {rest:.1g} of the penalty's, expected at most {_TOLERANCE:g}); expected another l2, "
                    "most likely a larger one"
                )
            found = {"weight": weight, "alpha": alpha}
            self.store.put_state(key, found)
        return found["weight"], found["alpha"]

    def _classes(self) -> int:
        with torch.no_grad():
            return int(self.task.natural(self._bench.model, self._bench.probe)[0].shape[-1])

    def _slope(self, h: Tensor, weight: Tensor, targets: Tensor | None) -> Tensor:
        """(B, C) ∂f/∂logits of the refitted layer."""
        logits = (h @ weight.T).detach()
        if self.task.name == "regression":
            return torch.ones_like(logits)
        assert targets is not None
        with torch.enable_grad():
            logits.requires_grad_()
            (slope,) = torch.autograd.grad(margin(logits, targets).sum(), logits)
        return slope

    def _embedding_scorer(self, voter: Voter) -> EmbeddingScorer:
        weight, alpha = self._heads[voter.member.identity("residual")]
        train = self._embeddings(voter.member)

        def scorer(found: Tensor, targets: Tensor | None) -> Tensor:
            h = _with_one(found)
            slope = self._slope(h, weight, targets)
            parts = [
                ((slope @ alpha[a:b].T) * (h @ _with_one(train[a:b]).T)).float()
                for a, b in batches.spans(len(train), _CHUNK)
            ]
            return torch.cat(parts, 1)

        return scorer

    def _self(self, voter: Voter) -> Tensor:
        weight, alpha = self._heads[voter.member.identity("residual")]
        h = _with_one(self._embeddings(voter.member))
        return (self._slope(h, weight, self._targets()) * alpha).sum(1) * h.square().sum(1)

    def info(self) -> dict[str, Any]:
        """Adds λ."""
        return {**super().info(), "l2": self.l2}


def _with_one(h: Tensor) -> Tensor:
    h = h.double()
    return torch.cat([h, h.new_ones(len(h), 1)], 1)


def _rest(h: Tensor, weight: Tensor, slope: Tensor, l2: float) -> float:
    """The length of the objective's gradient, over that of the penalty's part of it."""
    gradient = slope.T @ h / len(h) + 2 * l2 * weight
    # W may be 0 by symmetry, and then rounding is all there is
    floor = 1e-9 * float((slope.abs().T @ h.abs()).norm()) / len(h)
    return float(gradient.norm()) / max(2 * l2 * float(weight.norm()), floor, 1e-300)


def _ridge(h: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """The stationary layer (1, d) of the squared error / 2, and ∂ℓ/∂prediction (n, 1)."""
    gram = h.T @ h / len(h)
    gram.diagonal().add_(2 * l2)
    factor, _ = torch.linalg.cholesky_ex(gram)
    weight = torch.zeros_like(h[:1])
    for _ in range(3):  # the solution, and two refinements of it
        gradient = (h @ weight.T - y.unsqueeze(1)).T @ h / len(h) + 2 * l2 * weight
        weight = weight - torch.cholesky_solve(gradient.T, factor).T
    return weight, h @ weight.T - y.unsqueeze(1)


def _softmax_regression(h: Tensor, labels: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """The stationary layer (classes, d) of the cross-entropy, and ∂ℓ/∂logits (n, classes): Newton's method."""
    n = len(h)
    truth = F.one_hot(labels, classes).to(h)
    weight = h.new_zeros(classes, h.shape[1])

    def objective(w: Tensor) -> float:
        return float(F.cross_entropy(h @ w.T, labels) + l2 * w.square().sum())

    for _ in range(_STEPS):
        p = (h @ weight.T).softmax(1)
        rest = _rest(h, weight, p - truth, l2)
        if not rest > _AIM:
            break
        gradient = (p - truth).T @ h / n + 2 * l2 * weight
        step = _newton_step(h, p, gradient, l2, min(0.1, rest))
        slope, before, size = float((gradient * step).sum()), objective(weight), 1.0
        # near the end the objective's own rounding hides what a step gains
        while not objective(weight - size * step) <= before - 1e-4 * size * slope + 1e-14 * abs(before):
            size /= 2
            if size < 1e-8:
                return weight, p - truth
        weight = weight - size * step
    return weight, (h @ weight.T).softmax(1) - truth


def _newton_step(h: Tensor, p: Tensor, gradient: Tensor, l2: float, tolerance: float) -> Tensor:
    """The Hessian's inverse times the gradient, by conjugate gradients; classes share one matrix as preconditioner."""
    shared = (h.T * (p * (1 - p)).mean(1)) @ h / len(h)
    shared.diagonal().add_(2 * l2)
    factor, _ = torch.linalg.cholesky_ex(shared)

    def curved(v: Tensor) -> Tensor:
        u = p * (h @ v.T)
        return (u - p * u.sum(1, keepdim=True)).T @ h / len(h) + 2 * l2 * v

    def conditioned(r: Tensor) -> Tensor:
        return torch.cholesky_solve(r.T, factor).T

    return _conjugate_gradients(curved, conditioned, gradient, tolerance)


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], right: Tensor, tolerance: float
) -> Tensor:
    x, residual = torch.zeros_like(right), right.clone()
    aim = tolerance * float(right.norm())
    z = precondition(residual)
    direction, rho = z, float((residual * z).sum())
    for _ in range(min(1000, right.numel())):
        image = product(direction)
        curvature = float((direction * image).sum())
        if not curvature > 0:  # what is left is beneath the smallest number
            break
        length = rho / curvature
        x, residual = x + length * direction, residual - length * image
        if not float(residual.norm()) > aim:
            break
        z = precondition(residual)
        rho, last = float((residual * z).sum()), rho
        direction = z + rho / last * direction
    return x
