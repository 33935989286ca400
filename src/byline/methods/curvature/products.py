"""Products H·v without H, over the training set in batches (Pearlmutter 1994; Schraudolph 2002).

    GGN     (1/n) Σ_i J_iᵀ M_i J_i v,  J the Jacobian of what the loss is a likelihood of, M = w (diag p - p pᵀ) or 1
    Fisher  (1/n) Σ_i ∇ℓ_i (∇ℓ_iᵀ v)
    Hessian (1/n) Σ_i ∇²ℓ_i v

J·v is taken by two reverse passes (the gradient of Jᵀu with respect to u) rather than by forward mode: it asks no more
of a model than that its backward pass can be differentiated, whatever masks, noise or adapters are on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from byline.batches import Batch, size
from byline.features.capture import wide
from byline.methods.curvature.layout import Layout
from byline.task import Task

log = logging.getLogger("byline")
_ROWS = 4096  # vectors × examples that go through the model side by side


class CurvatureProducts:
    """H·v for vectors in a layout.

    Args:
        task: whose training loss is meant.
        model: the member's model, with its changes applied.
        params: the attributed parameters by name.
        layout: of the vectors.
        curvature: "ggn", "fisher" or "hessian".
        batches: the batches of the training set, or those of the examples at some indices.
        n: number of training examples.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        params: dict[str, nn.Parameter],
        layout: Layout,
        curvature: str,
        batches: Callable[[Sequence[int] | None], Iterator[Batch]],
        n: int,
    ):
        self.task, self.model, self.params = task, model, params
        self.layout, self.curvature, self.n = layout, curvature, n
        self._batches = batches
        self._batched = True

    def __call__(self, vectors: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """(k, P) H·v for each row, or the mean over the examples at ``indices`` in place of all."""
        out = torch.zeros_like(vectors)
        for batch in self._batches(indices):
            # attention's fused kernels have no second derivative
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                apply = self._linearised(batch)
                step = max(1, _ROWS // size(batch))
                for start in range(0, len(vectors), step):
                    out[start : start + step] += apply(vectors[start : start + step])
        return out.div_(self.n if indices is None else len(indices))

    def _linearised(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """V -> the batch's sum of curvatures times V; the model runs forward and backward once for all V."""
        params = list(self.params.values())
        if self.curvature == "hessian":
            loss = wide(self.task.loss(self.model, batch)).sum()
            first = self._grad([loss], params, None, create_graph=True)

            def second(vectors: Tensor) -> Tensor:
                return self._flat(self._vjp(first, params, self._tangents(vectors)))

            return second
        outputs, middle = self._outputs(batch)
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        pulled = self._grad([outputs], params, [cotangent], create_graph=True)

        def gauss_newton(vectors: Tensor) -> Tensor:
            pushed = self._vjp(pulled, [cotangent], self._tangents(vectors))[0]
            return self._flat(self._vjp([outputs], params, [middle(pushed)]))

        return gauss_newton

    def _outputs(self, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What J is the Jacobian of, and the matrix M between J and Jᵀ."""
        if self.curvature == "fisher":
            return wide(self.task.loss(self.model, batch)), lambda v: v
        outputs, weight = map(wide, self.task.natural(self.model, batch))
        if self.task.name == "regression":
            return outputs, lambda v: v
        p = outputs.detach().softmax(-1)
        return outputs, lambda v: weight.unsqueeze(-1) * p * (v - (p * v).sum(-1, keepdim=True))

    @staticmethod
    def _grad(
        outputs: list[Tensor], inputs: list[nn.Parameter], cotangents: list[Tensor] | None, create_graph: bool
    ) -> list[Tensor]:
        found = torch.autograd.grad(outputs, inputs, cotangents, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, found, strict=True)]

    def _vjp(self, outputs: list[Tensor], inputs: Sequence[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        """Vector-Jacobian products for k cotangents at once, (k, ...) per input."""
        k = len(vectors[0])
        # an output on which no input has an influence says nothing
        pairs = [(out, v) for out, v in zip(outputs, vectors, strict=True) if out.requires_grad]
        if not pairs:
            return [value.new_zeros(k, *value.shape) for value in inputs]
        outs, vs = [out for out, _ in pairs], [v for _, v in pairs]
        if self._batched:
            try:
                found = torch.autograd.grad(
                    outs, inputs, vs, is_grads_batched=True, retain_graph=True, allow_unused=True
                )
                return [
                    value.new_zeros(k, *value.shape) if g is None else g for value, g in zip(inputs, found, strict=True)
                ]
            except (RuntimeError, NotImplementedError) as error:
                log.info("curvature products run one vector at a time: %s", str(error).splitlines()[0])
                self._batched = False
        rows = [
            torch.autograd.grad(outs, inputs, [v[i] for v in vs], retain_graph=True, allow_unused=True)
            for i in range(k)
        ]
        return [
            torch.stack([torch.zeros_like(value) if g is None else g for g in column])
            for value, column in zip(inputs, zip(*rows, strict=True), strict=True)
        ]

    def _tangents(self, vectors: Tensor) -> list[Tensor]:
        """Vectors by parameter, in the parameters' own precision."""
        parts = self.layout.to_params(vectors)
        return [parts[name].to(parameter.dtype) for name, parameter in self.params.items()]

    def _flat(self, grads: list[Tensor]) -> Tensor:
        return self.layout.from_params({name: g.detach() for name, g in zip(self.params, grads, strict=True)})
