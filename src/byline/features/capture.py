"""Per-example gradients from one batched forward and backward pass.

Hooks keep each ruled layer's input and the gradient of its output; the backward pass stops there, so that no weight
gradient is ever summed over the batch. Which parameters the rules really cover is measured, not assumed: on a few
examples their gradients are held against autograd's, and what does not agree (a weight used functionally, a layer
whose batch is not its first dimension, a layer without a rule) goes to per-example autograd.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, grad, vmap

from byline import batches
from byline.batches import Batch
from byline.features.blocks import Block, Flat, merge
from byline.features.layers import SPATIAL, block_of, groups_of, rule_for
from byline.task import Task, chosen

log = logging.getLogger("byline")

HALF = (torch.bfloat16, torch.float16)


def wide(t: Tensor) -> Tensor:
    """Half precisions as float32, everything else as it is."""
    return t.float() if t.dtype in HALF else t


class _Differentiated(nn.Module):
    """The task's value as a module's forward, so that functional_call can exchange parameters anywhere inside."""

    def __init__(self, task: Task, model: nn.Module, of: str):
        super().__init__()
        self.model = model
        self._task = [task]
        self.of = of

    def forward(self, batch: Batch) -> Tensor:
        return self._task[0].differentiate(self.model, batch, self.of)[0]


@dataclass(frozen=True)
class Verdict:
    """What holding the rules against autograd showed of a model's structure."""

    fallback: frozenset[str] = frozenset()
    """Parameters that no rule covers: per-example autograd, in every batch."""
    unproven: frozenset[str] = frozenset()
    """Parameters whose gradient was 0 on the examples looked at, so that no rule could be checked."""
    vectorised: bool = True
    """Whether per-example autograd gives the same under vmap as one example at a time."""


class Capture:
    """The gradients of a model's attributed parameters.

    Args:
        task: what is differentiated.
        model: the member's model, in eval mode.
        params: the attributed parameters by name.
        verdict: which of them the rules cover (from `calibrate`).
    """

    def __init__(self, task: Task, model: nn.Module, params: dict[str, nn.Parameter], verdict: Verdict | None = None):
        verdict = verdict or Verdict()
        self.task, self.model, self.params = task, model, params
        self.vectorised, self.unproven = verdict.vectorised, verdict.unproven
        names = {id(parameter): name for name, parameter in params.items()}
        slots: list[tuple[nn.Module, str, str]] = [
            (module, attribute, names[id(parameter)])
            for module in model.modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in names
        ]
        self._uses: dict[str, int] = {}
        for _, _, name in slots:
            self._uses[name] = self._uses.get(name, 0) + 1
        ruled = {name for name in params if all(rule_for(m) for m, _, n in slots if n == name) and name in self._uses}
        self.fallback = frozenset((set(params) - ruled) | verdict.fallback) - self.unproven
        self.refused: set[str] = set()
        """Parameters of calls that a rule turned out not to cover."""
        self._slots: dict[nn.Module, dict[str, str]] = {}
        for module, attribute, name in slots:
            if name not in self.fallback and name not in self.unproven:
                self._slots.setdefault(module, {})[attribute] = name

    @property
    def fast(self) -> bool:
        """Whether the rules cover every parameter."""
        return not self.fallback and not self.unproven

    def __call__(self, batch: Batch, of: str) -> tuple[Tensor, Tensor, dict[str, Block]]:
        """Differentiate ``of`` ("output" or "loss") for every example.

        Returns:
            the value (B,), the residual (B,), and a block per parameter in the order of the parameters.
        """
        value, residual, blocks, late = self._ruled(batch, of)
        rows = self._autograd(batch, of, self.fallback | late)
        return value, residual, self._complete(blocks, len(value), rows)

    def _ruled(self, batch: Batch, of: str) -> tuple[Tensor, Tensor, dict[str, Block], set[str]]:
        """Value, residual, a block for each parameter that the rules reached, and names that need autograd here."""
        value, residual, calls, late = self._calls(batch, of)
        found: dict[tuple[str, ...], list[Block]] = {}
        for module, x, g in calls:
            if len(x) != len(value) or len(g) != len(value):
                # rows are not examples (experts get the tokens routed to them): no rule for this batch
                late |= set(self._slots[module].values())
            elif not self._collect(found, module, x, g):
                self.refused |= set(self._slots[module].values())
                late |= self.refused
        return value, residual, _merged(found, late), late

    def positions(self, batch: Batch, of: str, length: int) -> tuple[dict[str, Block], dict[str, Block]]:
        """One example's gradient, split into the parts that flow through its positions.

        Args:
            batch: one example.
            of: "output" or "loss".
            length: T, how many positions it has.

        Returns:
            blocks of T rows, one per position, and blocks of one row: what has no position, empty where there is none.
            Their rows add up to the example's gradient.
        """
        value, _, calls, late = self._calls(batch, of)
        at: dict[tuple[str, ...], list[Block]] = {}
        rest: dict[tuple[str, ...], list[Block]] = {}
        for module, x, g in calls:
            # a layer that sees positions as channels or side by side in a picture has another dimension second
            placed = rule_for(module) not in SPATIAL and x.shape[:2] == g.shape[:2] == (1, length)
            if len(x) != 1 or len(g) != 1:
                covered = False
            elif placed:
                covered = self._collect(at, module, x[0].unsqueeze(1), g[0].unsqueeze(1))
            else:
                covered = self._collect(rest, module, x, g)
            if not covered:
                late |= set(self._slots[module].values())
        rows = self._autograd(batch, of, self.fallback | late)
        parts, others = _merged(at, late), _merged(rest, late)
        whole = bool(rows or others)
        return self._complete(parts, length, {}), self._complete(others, len(value), rows) if whole else {}

    def _complete(self, blocks: dict[str, Block], examples: int, rows: dict[str, Tensor]) -> dict[str, Block]:
        """A block per parameter, in their order: those found, those of rows by autograd, and zeros for the others."""
        plain = self.fallback | self.unproven
        for name in plain:
            zeros = self._like(name).new_zeros(examples, self.params[name].numel()) if name not in rows else rows[name]
            blocks[name] = Flat((name,), zeros)
        self._fill(blocks, examples, {name: r for name, r in rows.items() if name not in plain})
        order = list(self.params)
        return dict(sorted(blocks.items(), key=lambda item: order.index(item[0])))

    def _calls(self, batch: Batch, of: str) -> tuple[Tensor, Tensor, list[tuple[nn.Module, Tensor, Tensor]], set[str]]:
        """Value, residual, each ruled call's input and output gradient, and unproven names that matter here."""
        calls: list[tuple[nn.Module, Tensor, Any]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if isinstance(out, Tensor) and out.requires_grad and isinstance(x, Tensor):
                # the edge stays that of this output even if an in-place operation changes the tensor later
                calls.append((module, x.detach(), get_gradient_edge(out)))

        handles = [module.register_forward_hook(keep, with_kwargs=True) for module in self._slots]
        try:
            with torch.enable_grad():
                value, residual = self.task.differentiate(self.model, batch, of)
        finally:
            for handle in handles:
                handle.remove()
        late: set[str] = set()
        watched = sorted(self.unproven)
        inputs = [edge for _, _, edge in calls] + [self.params[name] for name in watched]
        reached: list[tuple[nn.Module, Tensor, Tensor]] = []
        if inputs and value.requires_grad:
            grads = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
            # the batch's summed gradient tells whether an unproven parameter matters here at all
            late = {n for n, g in zip(watched, grads[len(calls) :], strict=True) if g is not None and bool(g.any())}
            reached = [(m, x, g) for (m, x, _), g in zip(calls, grads, strict=False) if g is not None]
        return value.detach(), residual, reached, late

    def _joined(self, module: nn.Module) -> bool:
        return all(self._uses[name] == 1 for name in self._slots[module].values())

    def _collect(self, found: dict[tuple[str, ...], list[Block]], module: nn.Module, x: Tensor, g: Tensor) -> bool:
        """Add the blocks of one call; False where its rule does not cover it."""
        rule = rule_for(module)
        assert rule is not None
        names = self._slots[module]
        with torch.no_grad():
            # sums over positions and products of factors in float32, whatever the weights
            blocks = rule(module, wide(x), wide(g), set(names), self._joined(module))
            for attributes, block in blocks.items():
                block.params = tuple(names[a] for a in attributes)
                found.setdefault(block.params, []).append(block)
        return bool(blocks)

    def _fill(self, blocks: dict[str, Block], examples: int, rows: dict[str, Tensor]) -> None:
        """Blocks, in the form their rule gives, for parameters that this batch reached otherwise or not at all."""
        seen = {name for block in blocks.values() for name in block.params}
        for module, names in self._slots.items():
            if seen.issuperset(names.values()):
                continue
            for attributes in groups_of(module, set(names), self._joined(module)):
                params = tuple(names[a] for a in attributes)
                if params[0] not in seen:
                    own = [rows.get(name) for name in params]
                    if own == [None]:
                        # of a weight that layers of several kinds share, the form that their sum has
                        users = [m for m, named in self._slots.items() if params[0] in named.values()]
                        module = next((m for m in users if not isinstance(m, nn.Embedding)), module)
                    blocks[params[0]] = block_of(module, attributes, params, own, self._like(params[0]), examples)
                    seen |= set(params)

    def _like(self, name: str) -> Tensor:
        """A tensor of a parameter's shape and of its gradient's dtype; its numbers mean nothing."""
        parameter = self.params[name]
        return torch.empty_like(parameter, dtype=torch.float32) if parameter.dtype in HALF else parameter

    def _autograd(self, batch: Batch, of: str, wanted: Collection[str]) -> dict[str, Tensor]:
        """(B, numel) rows of these parameters by per-example autograd."""
        names = [name for name in self.params if name in wanted]
        return {name: wide(rows) for name, rows in self._rows(batch, of, names).items()} if names else {}

    def _rows(self, batch: Batch, of: str, names: list[str]) -> dict[str, Tensor]:
        if self.vectorised:
            try:
                return self._vectorised(batch, of, names)
            except (RuntimeError, NotImplementedError) as error:
                log.info("per-example autograd runs one example at a time: %s", str(error).splitlines()[0])
                self.vectorised = False
        return self._looped(batch, of, names)

    def _vectorised(self, batch: Batch, of: str, names: list[str]) -> dict[str, Tensor]:
        wrapped = _Differentiated(self.task, self.model, of)
        n = batches.size(batch)
        mapped: list[Tensor] = []
        batches.map_tensors(batch, lambda t: mapped.append(t) or t if t.ndim and t.shape[0] == n else t)  # type: ignore[func-returns-value]

        def value(params: dict[str, Tensor], *rows: Tensor) -> Tensor:
            remaining = iter(rows)
            one = batches.map_tensors(
                batch, lambda t: next(remaining).unsqueeze(0) if t.ndim and t.shape[0] == n else t
            )
            return functional_call(wrapped, params, (one,)).sum()

        params = {f"model.{name}": self.params[name].detach() for name in names}
        size = sum(p.numel() for p in params.values())
        chunk = max(1, min(n, 2**27 // max(1, size)))
        rows = vmap(grad(value), in_dims=(None, *[0] * len(mapped)), chunk_size=chunk)(params, *mapped)
        return {name: rows[f"model.{name}"].flatten(1).detach() for name in names}

    def _looped(self, batch: Batch, of: str, names: list[str]) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        parameters = [self.params[name] for name in names]
        for index in range(batches.size(batch)):
            with torch.enable_grad():
                value, _ = self.task.differentiate(self.model, batches.take(batch, index, index + 1), of)
            grads = torch.autograd.grad(value.sum(), parameters, allow_unused=True)
            for name, parameter, g in zip(names, parameters, grads, strict=True):
                g = torch.zeros_like(parameter) if g is None else g.to_dense() if g.is_sparse else g
                rows[name].append(g.detach().flatten())
        return {name: torch.stack(value) for name, value in rows.items()}


def _merged(found: dict[tuple[str, ...], list[Block]], late: set[str]) -> dict[str, Block]:
    """One block per parameter, but for those that autograd takes."""
    kept = [merge(blocks) for names, blocks in found.items() if late.isdisjoint(names)]
    return {block.params[0]: block for block in kept}


def calibrate(task: Task, model: nn.Module, params: dict[str, nn.Parameter], batch: Batch, of: str) -> Verdict:
    """Hold the rules against autograd on a few examples, in their order and in the opposite one.

    Args:
        task: what is differentiated.
        model: the member's model.
        params: the attributed parameters by name.
        batch: a few examples.
        of: "output" or "loss".

    Raises:
        ValueError: the model is not deterministic, or an example's output depends on the others in its batch.
    """
    coarse = _coarse(task, model, batch, of)
    _check_separable(task, model, batch, of, coarse)
    capture = Capture(task, model, params)
    expected = capture._looped(batch, of, list(params))
    total = max(float(rows.norm()) for rows in expected.values())
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}.get(next(iter(params.values())).dtype, 5e-2)
    tolerance = 5e-2 if coarse else tolerance
    orders = [list(range(batches.size(batch))), list(reversed(range(batches.size(batch))))]

    def agrees(name: str, rows: Tensor | None, order: list[int]) -> bool:
        reference = wide(expected[name][order])
        if rows is None or rows.shape != reference.shape:
            return rows is None and not reference.any()
        error = float((rows - reference).norm())
        return error <= tolerance * (float(reference.norm()) + 1e-2 * total)

    unproven = frozenset(name for name, rows in expected.items() if not rows.any()) - capture.fallback
    wrong = capture.fallback
    while True:
        capture = Capture(task, model, params, Verdict(wrong, unproven))
        found: set[str] = set()
        try:
            for order in orders:
                _, _, blocks, late = capture._ruled(batches.pick(batch, order), of)
                rows = {
                    name: part
                    for block in blocks.values()
                    for name, part in zip(block.params, block.split(), strict=True)
                }
                checked = set(params) - capture.fallback - unproven - (late - capture.refused)
                found |= {name for name in checked if not agrees(name, rows.get(name), order)}
        except (RuntimeError, ValueError, IndexError) as error:
            # a rule that cannot even run, on a shape it does not foresee: leave everything to autograd
            log.info("no fast path for this model: %s", str(error).splitlines()[0])
            capture = Capture(task, model, params, Verdict(frozenset(params)))
            unproven = frozenset()
            break
        if not found:
            break
        # without them other weights and biases are stored apart, so measure again
        wrong = capture.fallback | found
    vectorised = True
    if capture.fallback or unproven:
        log.info("per-example autograd for %d of %d parameters", len(capture.fallback), len(params))
        fast = capture._autograd(batch, of, capture.fallback | unproven)
        vectorised = capture.vectorised and all(agrees(name, fast[name], orders[0]) for name in fast)
    return Verdict(frozenset(capture.fallback), unproven, vectorised)


def _coarse(task: Task, model: nn.Module, batch: Batch, of: str) -> bool:
    """Whether layers compute in half precision, as they do under autocast whatever their weights are."""
    seen: list[bool] = []

    def look(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(isinstance(out, Tensor) and out.dtype in HALF)

    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    handles = [module.register_forward_hook(look) for module in modules]
    try:
        with torch.no_grad():
            value = task.differentiate(model, batch, of)[0]
    finally:
        for handle in handles:
            handle.remove()
    return any(seen) or value.dtype in HALF


def _check_separable(task: Task, model: nn.Module, batch: Batch, of: str, coarse: bool) -> None:
    with torch.no_grad():
        whole = task.differentiate(model, batch, of)[0]
        again = task.differentiate(model, batch, of)[0]
        alone = [task.differentiate(model, batches.take(batch, i, i + 1), of)[0] for i in range(len(whole))]
    if not torch.allclose(whole, again, rtol=1e-6, atol=1e-6, equal_nan=True):
        raise ValueError(
            "the model gives another output on a second call with the same batch; expected a deterministic model "
            "(is something random left on in eval mode?)"
        )
    loose = 5e-2 if coarse else 1e-3
    if whole.isfinite().all() and not torch.allclose(whole, torch.cat(alone), rtol=loose, atol=loose):
        raise ValueError(
            "an example's output depends on the other examples in its batch (batch statistics?); attribution needs "
            "one output per example"
        )


def attributed(task: Task, model: nn.Module, selects: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """The parameters that count: trainable, and chosen by the task or brought by the member.

    Raises:
        ValueError: none is left.
    """
    params = chosen(model, selects)
    if not params:
        raise ValueError("no parameter is attributed: none is trainable and chosen by params=")
    return params
