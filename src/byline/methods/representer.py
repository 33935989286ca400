"""REPRESENTER POINTS (Yeh et al. 2018, theorem 3.1), the mean over members.

    score(z, i) = (∂f(z)/∂logits · α_i) ⟨h(i), h(z)⟩,   α_i = -1/(2 λ n) ∂ℓ_i/∂logits

The last linear layer, its bias as one more column of h, is fitted anew on the frozen embeddings h until
``(1/n) Σ ℓ_i + λ ‖W‖²`` is stationary. Then ``W = Σ_i α_i ⊗ h(i)``: the scores of a test example sum to
``∂f(z)/∂logits · W h(z)``, with nothing left over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from byline.batches import Batch
from byline.ensembles import Ensemble
from byline.methods.base import Voter
from byline.methods.embedding import EmbeddingMethod, labels_of
from byline.task import Task, margin

_ITERATIONS = 2000
_TOLERANCE = 1e-4


class RepresenterPoints(EmbeddingMethod):
    """What each training example adds to a prediction of the refitted last layer.

    Args:
        task: "classification" or "regression", with its own loss.
        ensemble: who votes.
        l2: λ, above 0.
        **options: those of `EmbeddingMethod`.

    Raises:
        ValueError: another task, or λ out of range; while fitting, a last layer that does not become stationary.
    """

    def __init__(self, task: Task, ensemble: Ensemble, *, l2: float = 1e-3, **options: Any):
        if not isinstance(l2, int | float) or isinstance(l2, bool) or not 0 < l2 < float("inf"):
            raise ValueError(f"l2 is {l2!r}; expected a finite number above 0")
        if task.name not in ("classification", "regression") or not task.has_likelihood:
            raise ValueError(
                f"task is {task!r}; RepresenterPoints needs output='classification' or 'regression' with its own loss"
            )
        self.l2 = float(l2)
        super().__init__(task, ensemble, **options)

    def _prepare(self) -> None:
        self._heads = {voter.member.identity("gradient"): self._fitted(voter) for voter in self._voters}

    def _fitted(self, voter: Voter) -> tuple[Tensor, Tensor]:
        """The refitted layer (C, d + 1) and α (n_train, C), in float64."""
        key = f"representer-{voter.member.identity('gradient')}-{self.l2!r}"
        found = self.store.state(key)
        if found is None:
            h = _with_one(self._train(voter))
            if self.task.name == "regression":
                weight, slope = _ridge(h, self._targets().reshape(-1, 1).double(), self.l2)
            else:
                weight, slope = self._logistic(h, labels_of(self._targets(), "train_set"), voter.member.name)
            found = {"weight": weight, "alpha": -slope / (2 * self.l2 * len(h))}
            self.store.put_state(key, found)
        return found["weight"], found["alpha"]

    def _logistic(self, h: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
        classes = int(labels.max()) + 1
        with torch.no_grad():
            job = self._job(self._train_set, "train_set", "output")
            logits, _ = self.task.natural(self._bench.model, job.batch(0, 1, self._bench.device))
            classes = max(classes, logits.shape[-1])
        weight = torch.zeros(classes, h.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight], max_iter=_ITERATIONS, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(h @ weight.T, labels) + self.l2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(objective)
        with torch.no_grad():
            slope = (h @ weight.T).softmax(1)
            slope[torch.arange(len(h)), labels] -= 1
            rest = (slope.T @ h / len(h) + 2 * self.l2 * weight).norm() / (2 * self.l2 * weight).norm().clamp_min(1e-12)
        if not rest <= _TOLERANCE:
            raise ValueError(
                f"l2 is {self.l2}: the last layer of {name} is not stationary after {_ITERATIONS} steps (its gradient "
                f"is {float(rest):.1g} of the penalty's); expected a larger l2"
            )
        return weight.detach(), slope

    def _embedding_scorer(self, voter: Voter) -> Callable[[Tensor, Batch], Tensor]:
        weight, alpha = self._heads[voter.member.identity("gradient")]
        train = _with_one(self._train(voter))

        def scorer(found: Tensor, batch: Batch) -> Tensor:
            h = _with_one(found)
            logits = (h @ weight.T).requires_grad_()
            if self.task.name == "regression":
                slope = torch.ones_like(logits)
            else:
                with torch.enable_grad():
                    output = margin(logits, labels_of(self.task.targets(batch), "the batch"))
                    (slope,) = torch.autograd.grad(output.sum(), logits)
            return ((slope @ alpha.T) * (h @ train.T)).float()

        return scorer

    def info(self) -> dict[str, Any]:
        """Adds λ."""
        return {**super().info(), "l2": self.l2}


def _with_one(h: Tensor) -> Tensor:
    h = h.double()
    return torch.cat([h, h.new_ones(len(h), 1)], 1)


def _ridge(h: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """The stationary layer (1, d) of the squared error / 2, and ∂ℓ/∂prediction (n, 1)."""
    gram = h.T @ h / len(h) + 2 * l2 * torch.eye(h.shape[1], dtype=h.dtype)
    weight = torch.linalg.solve(gram, h.T @ y / len(h)).T
    return weight, h @ weight.T - y
