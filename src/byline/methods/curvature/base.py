"""What the solvers share: the problem of one member, and the interface.

    H = (1/n) Σ_i curvature of ℓ_i,   λ = damping × tr(H) / P

A solver's ``fit`` sees the training set and returns tensors, which the store keeps; they do not depend on the damping.
Its ``inverse`` turns them into the function that is applied once to each test gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from byline import batches
from byline.batches import Batch
from byline.engines.local import Job
from byline.engines.workbench import Active
from byline.features.base import Rows, State, seeded
from byline.features.blocks import Block
from byline.features.capture import wide
from byline.methods.curvature.layout import Layout
from byline.methods.curvature.products import CurvatureProducts

CURVATURES = ("ggn", "fisher", "hessian")
Inverse = Callable[[Tensor], Tensor]
"""(B, P) gradients -> (B, P) gradients times ``(H + λI)⁻¹``."""

Quadratic = Callable[[Rows], Tensor]
"""B rows of `Exact` features -> (B,) of their gradients r, ``rᵀ (H + λI)⁻¹ r``."""

_EXACT_TRACE = 5000  # parameters up to which the Hessian's trace is summed exactly
_EXACT_LABELS = 32  # classes up to which the GGN's trace is summed over every label
_PROBES = 64


@dataclass
class Problem:
    """One member's curvature; its model stays on the workbench for as long as this is used.

    Args:
        name: of the member, in messages.
        job: the training set.
        active: the member's model.
        curvature: "ggn", "fisher" or "hessian".
        seed: of sampled labels and probes.
        state: what the features learnt.
    """

    name: str
    job: Job
    active: Active
    curvature: str
    seed: int
    state: State

    @property
    def n(self) -> int:
        """Number of training examples."""
        return len(self.job.dataset)

    @cached_property
    def layout(self) -> Layout:
        """Where each block of parameters stands in a vector."""
        capture = self.active.capture(self.job.of)
        shapes = {name: parameter.shape for name, parameter in capture.params.items()}
        return Layout(capture(next(self.batches([0])), self.job.of)[2], shapes)

    @cached_property
    def products(self) -> CurvatureProducts:
        """H·v."""
        capture, task = self.active.capture(self.job.of), self.job.task
        return CurvatureProducts(
            task, self.active.model, capture.params, self.layout, self.curvature, self.batches, self.n
        )

    def batches(self, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """The training set, or the examples at these indices."""
        device = next(self.active.model.parameters()).device
        if indices is None:
            for start, stop in self.job.spans():
                yield self.job.batch(start, stop, device)
            return
        for start, stop in batches.spans(len(indices), self.job.batch_size):
            yield batches.to(batches.gather(self.job.dataset, list(indices[start:stop]), self.job.collate), device)

    def gradients(self, samples: int | None = 1) -> Iterator[tuple[dict[str, Block], Tensor]]:
        """Blocks of gradients r with weights w (B,), batch by batch, with ``H = (1/n) Σ w r rᵀ``, exactly or expected.

        Fisher: r = ∇ℓ. GGN of regression: r = ∇f. GGN of a classification: r = ∇ℓ with labels drawn by the model's
        own prediction, whose weighted second moment is expected to be the GGN (Martens 2020, section 8).

        Args:
            samples: labels drawn per example; None takes every label, weighted by its probability (one token only).
        """
        task, model = self.job.task, self.active.model
        assert self.curvature != "hessian", "the Hessian is no second moment of gradients"
        exact_of = {"fisher": "loss"}.get(self.curvature, "output" if task.name == "regression" else None)
        start = 0
        for batch in self.batches():
            if exact_of is not None:
                value, _, blocks = self.active.capture(exact_of)(batch, exact_of)
                yield blocks, torch.ones_like(wide(value))
                continue
            with torch.no_grad():
                logits, token = map(wide, task.natural(model, batch))
                p = logits.double().softmax(-1)
            # the mean over T tokens has weights 1/T, and its gradient's second moment is 1/T of the GGN
            scale = token.sum(1) / token.square().sum(1)
            for labels, weight in self._labels(p, start, samples):
                blocks = self.active.capture("loss")(task.relabelled(batch, labels), "loss")[2]
                yield blocks, scale * weight.to(scale)
            start += len(p)

    def _labels(self, p: Tensor, start: int, samples: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels (B, T) and their weights (B,); drawn by one number per example and token, whatever the batch size.

        One token's label is drawn with a chance in proportion to ``p_c ‖e_c - p‖``, the length of its part of the GGN
        in the logits, and weighted by p over that chance. Drawn from p itself, the labels of a model that has
        memorised its examples would nearly all be their own, and nearly all gradients 0. Over several tokens that is
        not open: the cross terms between tokens cancel under p alone.
        """
        size, tokens, classes = p.shape
        if samples is None:
            for label in range(classes):
                yield torch.full((size, 1), label, device=p.device), p[:, 0, label]
            return
        chance = p
        if tokens == 1:
            others = p.square().sum(-1, keepdim=True) - p.square()
            chance = p * ((1 - p).square() + others.clamp_min(0)).sqrt()
            chance = torch.where(chance.sum(-1, keepdim=True) > 1e-12, chance, p)
            chance = chance / chance.sum(-1, keepdim=True)
        cumulated = chance.cumsum(-1)
        for sample in range(samples):
            drawn = torch.stack(
                [
                    torch.rand(tokens, generator=seeded(self.seed, "labels", sample, start + i), dtype=torch.float64)
                    for i in range(size)
                ]
            ).to(p.device)
            labels = (cumulated < drawn.unsqueeze(-1)).sum(-1).clamp_max(classes - 1)
            weight = (p / chance.clamp_min(1e-300)).gather(-1, labels.unsqueeze(-1))[..., 0] if tokens == 1 else None
            yield labels, p.new_full((size,), 1 / samples) if weight is None else weight[:, 0] / samples

    def trace(self) -> float:
        """tr(H): exact for all that is small, else Hutchinson's for the Hessian and by drawn labels for the GGN."""
        features, total = self.job.features, 0.0
        second = self.curvature == "ggn" and self.job.task.name != "regression"
        if self.layout.size <= _EXACT_TRACE and (self.curvature == "hessian" or (second and not self.countable)):
            return sum(float(rows.diagonal(offset).double().sum()) for offset, rows in self.columns())
        if self.curvature == "hessian":
            probes = torch.randint(2, (_PROBES, self.layout.size), generator=seeded(self.seed, "trace"))
            vectors = (2 * probes - 1).to(next(iter(self.products.params.values())))
            return float((self.products(vectors) * vectors).sum()) / _PROBES
        for blocks, weight in self.gradients(None if self.countable else 1):
            rows = features.rows(blocks, self.state)
            total += float((weight * features.diagonal(rows, rows)).sum())
        return total / self.n

    @property
    def countable(self) -> bool:
        """Whether few enough labels are there to take each with its probability."""
        if self.curvature != "ggn" or self.job.task.name != "classification":
            return False
        with torch.no_grad():
            logits, _ = self.job.task.natural(self.active.model, next(self.batches([0])))
        return logits.shape[-1] <= _EXACT_LABELS

    def columns(self, step: int = 256) -> Iterator[tuple[int, Tensor]]:
        """(offset, rows offset onwards) of H itself, for small models."""
        like = next(iter(self.products.params.values()))
        for start in range(0, self.layout.size, step):
            stop = min(start + step, self.layout.size)
            unit = torch.zeros(stop - start, self.layout.size, dtype=like.dtype, device=like.device)
            unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
            yield start, self.products(unit)

    def ridge(self, trace: float, damping: float) -> float:
        """λ.

        Raises:
            ValueError: the curvature's mean eigenvalue is not positive.
        """
        if not 0 <= trace < float("inf"):
            raise ValueError(
                f"the {self.curvature} curvature of {self.name} has the trace {trace:.3g}; expected a positive one "
                '(is the model trained?); curvature="ggn" or "fisher" always has'
            )
        return damping * trace / self.layout.size


class Solver(ABC):
    """A way to apply ``(H + λI)⁻¹``. Options are the constructor's arguments."""

    name: ClassVar[str]
    curvatures: ClassVar[tuple[str, ...]] = CURVATURES

    def describe(self) -> dict[str, Any]:
        """JSON of the options that what `fit` returns depends on."""
        return {}

    def check(self, n_params: int) -> None:  # noqa: B027 - most solvers take any size
        """Refuse, before any work, a model that is too large."""

    @abstractmethod
    def fit(self, problem: Problem) -> State:
        """What is learnt from the training set; independent of the damping."""

    @abstractmethod
    def inverse(self, problem: Problem, state: State, damping: float) -> Inverse:
        """The function that preconditions gradients."""

    def quadratic(self, problem: Problem, state: State, damping: float) -> Quadratic | None:
        """The function that gives ``rᵀ (H + λI)⁻¹ r`` for less than two such products; None where there is none."""
        return None

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({options})"


def not_positive(problem: Problem, what: str) -> ValueError:
    """What a curvature that cannot be inverted is refused with."""
    other = "ggn" if problem.job.task.has_likelihood else "fisher"
    hint = "" if problem.curvature != "hessian" else f', or take curvature="{other}", which is never negative'
    return ValueError(
        f"{what}: {problem.curvature} + λI of {problem.name} is not positive definite; raise damping{hint}"
    )
