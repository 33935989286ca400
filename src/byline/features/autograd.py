"""Per-example autograd: the gradients of whatever parameters no rule covers, and what the rules are held against."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from byline import batches
from byline.batches import Batch
from byline.features.tracing import exchanged
from byline.task import Task

log = logging.getLogger("byline")

HALF = (torch.bfloat16, torch.float16)


def wide(t: Tensor) -> Tensor:
    """Half precisions as float32, everything else as it is."""
    return t.float() if t.dtype in HALF else t


class PerExample:
    """One example's gradient after the other, or all of a batch under vmap.

    Args:
        task: what is differentiated.
        model: the member's model, in eval mode.
        params: the attributed parameters by name.
        vectorised: whether vmap may be tried; it is given up where the model cannot run under it.
    """

    def __init__(self, task: Task, model: nn.Module, params: dict[str, nn.Parameter], vectorised: bool = True):
        self.task, self.model, self.params = task, model, params
        self.vectorised = vectorised

    def rows(self, batch: Batch, of: str, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """(B, numel) per parameter, half precisions as float32; and (B,) what is differentiated, of each alone."""
        if self.vectorised:
            try:
                rows, values = self._together(batch, of, names)
                return {name: wide(own) for name, own in rows.items()}, values
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                # whatever is wrong with the batch itself, the loop says too
                log.info("per-example autograd runs one example at a time: %s", str(error).splitlines()[0])
                self.vectorised = False
        rows, values = self.looped(batch, of, names)
        return {name: wide(own) for name, own in rows.items()}, values

    def _together(self, batch: Batch, of: str, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        if batches.has_fields(batch):
            raise NotImplementedError("a batch holds lists or arrays, of which vmap would hand on all")
        n = batches.size(batch)
        mapped: list[Tensor] = []

        def noted(t: Tensor) -> Tensor:
            if t.ndim and t.shape[0] == n:
                mapped.append(t)
            return t

        batches.map_tensors(batch, noted)

        def value(params: dict[str, Tensor], *rows: Tensor) -> Tensor:
            remaining = iter(rows)
            one = batches.map_tensors(
                batch, lambda t: next(remaining).unsqueeze(0) if t.ndim and t.shape[0] == n else t
            )
            # by identity: a parameter under several names, or of a module under several, is one
            with exchanged(self.model, {id(self.params[name]): tensor for name, tensor in params.items()}):
                return self.task.differentiate(self.model, one, of)[0].sum()

        params = {name: self.params[name].detach() for name in names}
        size = sum(p.numel() for p in params.values())
        chunk = max(1, min(n, 2**27 // max(1, size)))
        # fused attention has no batching rule, and without one runs example by example
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            mapping = vmap(grad_and_value(value), in_dims=(None, *[0] * len(mapped)), chunk_size=chunk)
            found, values = mapping(params, *mapped)
        return {name: found[name].reshape(n, -1).detach() for name in names}, values.detach()

    def looped(self, batch: Batch, of: str, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """(B, numel) per parameter in its own precision, one forward and backward pass per example."""
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        values: list[Tensor] = []
        parameters = [self.params[name] for name in names]
        for index in range(batches.size(batch)):
            with torch.enable_grad():
                value, _ = self.task.differentiate(self.model, batches.take(batch, index, index + 1), of)
            values.append(value.detach())
            grads: Sequence[Tensor | None] = [None] * len(names)
            if value.requires_grad:
                grads = torch.autograd.grad(value.sum(), parameters, allow_unused=True)
            for name, parameter, g in zip(names, parameters, grads, strict=True):
                g = torch.zeros_like(parameter) if g is None else g.to_dense() if g.is_sparse else g
                rows[name].append(g.detach().flatten())
        return {name: torch.stack(own) for name, own in rows.items()}, torch.cat(values)
