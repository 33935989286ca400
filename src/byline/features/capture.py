"""Per-example gradients from one batched forward and backward pass.

Hooks keep each ruled call's input and the gradient of its output; the backward pass stops there, so that no weight
gradient is ever summed over the batch. Nothing is assumed of the model: `calibrate.calibrate` finds out on a few
examples which rule covers which parameter and where the examples are in each layer, and every batch is held to it.

- A second backward pass, of the values weighted by known random numbers, shows that each row belongs to one example
  alone (`layouts`). It takes gradients of activations only: a third of a forward and backward pass at most. Where the
  operations and shapes of a batch alone decide what belongs to whom (`graphs`), and have been seen before, it is left
  out but for every sixteenth batch; where indices, sorting or routing decide, every batch has it.
- Every use of a parameter in autograd's graph is accounted for by a watched call (`tracing`).
- Where a rule is no theorem of the layer's own code (subclasses, norms of one's own, embeddings that renormalise), its
  rows must add up to the batch's gradient.

What does not hold in a batch goes to per-example autograd there, and so does what no rule covers, always; its rows
must add up to the batch's gradient as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from byline import batches
from byline.batches import Batch
from byline.features import graphs
from byline.features.autograd import HALF, PerExample, wide
from byline.features.blocks import Block, Flat, merge
from byline.features.layers import SPATIAL, block_of, groups_of
from byline.features.layouts import Layout, Weights, folded
from byline.features.totals import Totals
from byline.features.tracing import Call, Site, Trace, repeated, traced
from byline.features.verdict import Sites, Verdict
from byline.task import ExampleError, Task, chosen

log = logging.getLogger("byline")

_AGAIN = 16  # batches after which what was seen is looked at again

_WIRINGS = 64  # a model that has another one in every batch gains nothing by being looked at


class Capture:
    """The gradients of a model's attributed parameters.

    Args:
        task: what is differentiated.
        model: the member's model, in eval mode.
        params: the attributed parameters by name.
        verdict: what was found out of its structure (by `calibrate`).
        copies: how many members run side by side on as many copies of each batch, one copy after the other.
        only: gives a context in which the model is that of one copy alone.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        params: dict[str, nn.Parameter],
        verdict: Verdict | None = None,
        copies: int = 1,
        only: Callable[[int], AbstractContextManager[Any]] = lambda copy: nullcontext(),
    ):
        verdict = verdict or Verdict()
        self.task, self.model, self.params, self.verdict = task, model, params, verdict
        self.copies, self.only = copies, only
        uncovered = Sites(model, params, verdict.rules, verdict.functional).uncovered
        self.fallback = frozenset((uncovered | verdict.fallback) - set(verdict.forms))
        """Parameters for per-example autograd in every batch."""
        without = self.fallback | set(verdict.forms)
        self._sites = Sites(model, params, verdict.rules, verdict.functional, without)
        self.sites = self._sites.sites
        self._watched = self._sites.watched()
        self._names = {id(parameter): name for name, parameter in params.items() if name not in self.fallback}
        self._functional = {
            id(params[name]): name
            for key, site in self.sites.items()
            if site.module is None
            for name in site.slots.values()
        }
        self._constants = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self._autograd = PerExample(task, model, params, verdict.vectorised)
        self._batch = 0
        self.refused: set[str] = set()
        """Parameters of calls that a rule turned out not to cover."""

    @property
    def fast(self) -> bool:
        """Whether one pass gives every parameter's gradients."""
        return not self.fallback

    @property
    def vectorised(self) -> bool:
        """Whether per-example autograd runs under vmap."""
        return self._autograd.vectorised

    def __call__(self, batch: Batch, of: str) -> tuple[Tensor, Tensor, dict[str, Block]]:
        """Differentiate ``of`` ("output" or "loss") for every example.

        Returns:
            the value (B,), the residual (B,), and a block per parameter in the order of the parameters.

        Raises:
            ExampleError: an example's output depends on the others in its batch.
        """
        value, residual, blocks, late, totals = self.ruled(batch, of)
        rows = self._by_autograd(batch, of, self.fallback | late, value, totals)
        return value, residual, self._complete(blocks, len(value), rows)

    def ruled(self, batch: Batch, of: str) -> tuple[Tensor, Tensor, dict[str, Block], set[str], Totals]:
        """What one pass gives.

        Returns:
            value, residual, a block for each parameter that it reached, the parameters that need autograd in this
            batch, and the batch's summed gradients of those whose rows must add up to them.
        """
        value, residual, calls, leaves, late, totals = self._pass(batch, of)
        n = len(value)
        found: dict[tuple[str, ...], list[Block]] = {}
        for call, x, g, per in calls:
            if not self._collect(found, call.site, x, g, per):
                self.refused |= set(call.site.slots.values())
                late |= set(call.site.slots.values())
        blocks = _merged(found, late)
        for name, rows in leaves.items():
            if name not in late:
                blocks[name] = Flat((name,), wide(rows.reshape(n, -1)))
        odd = totals.unequal([blocks])
        if odd:
            late |= odd
            blocks = _merged(found, late) | {
                name: b for name, b in blocks.items() if name in leaves and name not in late
            }
        return value, residual, blocks, late, totals

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
        value, _, calls, leaves, late, totals = self._pass(batch, of)
        at: dict[tuple[str, ...], list[Block]] = {}
        rest: dict[tuple[str, ...], list[Block]] = {}
        for call, x, g, per in calls:
            # a layer that sees positions as channels or side by side in a picture has another dimension second
            if call.site.rule not in SPATIAL and per == 1 and x.shape[:2] == g.shape[:2] == (1, length):
                covered = self._collect(at, call.site, x[0].unsqueeze(1), g[0].unsqueeze(1), 1)
            elif call.site.rule not in SPATIAL and per == length and length > 1:
                covered = self._collect(at, call.site, x, g, 1)
            else:
                covered = self._collect(rest, call.site, x, g, per)
            if not covered:
                late |= set(call.site.slots.values())
        parts, others = _merged(at, late), _merged(rest, late)
        odd = totals.unequal([parts, others])
        if odd:
            late |= odd
            parts, others = _merged(at, late), _merged(rest, late)
        for name, own in leaves.items():
            if name not in late:
                others[name] = Flat((name,), wide(own.reshape(1, -1)))
        rows = self._by_autograd(batch, of, self.fallback | late, value, totals)
        whole = bool(rows or others)
        return self._complete(parts, length, {}), self._complete(others, len(value), rows) if whole else {}

    def _complete(self, blocks: dict[str, Block], examples: int, rows: dict[str, Tensor]) -> dict[str, Block]:
        """A block per parameter, in their order: those found, those of rows by autograd, and zeros for the others."""
        plain = self.fallback | set(self.verdict.forms)
        for name in plain - set(blocks):
            zeros = self._like(name).new_zeros(examples, self.params[name].numel()) if name not in rows else rows[name]
            blocks[name] = Flat((name,), zeros)
        self._fill(blocks, examples, {name: r for name, r in rows.items() if name not in plain})
        order = list(self.params)
        return dict(sorted(blocks.items(), key=lambda item: order.index(item[0])))

    def _pass(
        self, batch: Batch, of: str
    ) -> tuple[Tensor, Tensor, list[tuple[Call, Tensor, Tensor, int]], dict[str, Tensor], set[str], Totals]:
        """One forward pass and what is needed of the backward one.

        Returns:
            value, residual, the calls with input and output gradient by example (and how many rows each has), the
            gradients of repeated parameters, the parameters that need autograd here, and summed gradients.
        """
        n = batches.size(batch)
        self._batch += 1
        late: set[str] = set()
        try:
            value, residual, trace, leaves = self._forward(batch, of, n, self.verdict.forms, self.verdict.spread)
        except Exception as error:
            if not self.verdict.forms and not self.verdict.spread:
                raise
            # what repeats for every example at one number of them may not at another
            log.info("nothing is repeated in this batch: %s", (str(error).splitlines() or [type(error).__name__])[0])
            value, residual, trace, leaves = self._forward(batch, of, n, {}, ())
            late = {*self.verdict.forms, *(n for key in self.verdict.spread for n in self.sites[key].slots.values())}
        end = trace.end if self.task.is_named else None
        graph = graphs.read(value, self._constants, end, self._leaves(leaves))
        late |= graphs.unexplained(graph, self._names, trace.windows)
        form = hash((graph.form, tuple(t.shape for t in batches.tensors(batch)), tuple(c.shape for c in trace.calls)))
        known = graph.form is not None and form in self.verdict.proven and self._batch % _AGAIN
        # what has no place among the rules here, or whose rows must add up
        summed = sorted(self.fallback | self._watched | late)
        parameters = [self.params[name] for name in summed]
        ahead: list[Any] = [call.edge for call in trace.calls] + list(leaves.values())
        plain: list[Tensor | None] = [None] * (len(ahead) + len(summed))
        weighted: list[Tensor | None] = [None] * len(ahead)
        weights: Weights | None = None
        if value.requires_grad and plain:
            if n > 1 and ahead and not known:
                weights = Weights(n, value, self._batch)
            plain = _gradients(value.sum(), [*ahead, *parameters], weights is not None)
            if weights is not None:
                weighted = _gradients((value * weights.values).sum(), ahead, False)
        totals = Totals(
            {
                name: self._like(name).new_zeros(self.params[name].shape) if g is None else wide(_dense(g))
                for name, g in zip(summed, plain[len(ahead) :], strict=True)
            },
            float(value.detach().abs().sum()),
            self.verdict.coarse or trace.half or any(t.dtype in HALF for t in [value, *parameters]),
        )
        reached = []
        for call, g, h in zip(trace.calls, plain, weighted, strict=False):
            if g is None:
                continue
            layout = self._layout(call)
            per = 0 if layout is None else layout.per(g, n)
            if layout is None or not per or layout.per(call.x, n) != per:
                late |= set(call.site.slots.values())
                continue
            g = layout.rows(g, n)
            if weights is not None and (h is None or not weights.apart(g, layout.rows(h, n))):
                late |= set(call.site.slots.values())
                continue
            reached.append((call, layout.rows(call.x, n), g, per))
        rows: dict[str, Tensor] = {}
        start = len(trace.calls)
        for name, g, h in zip(leaves, plain[start:], weighted[start:], strict=False):
            if g is not None and weights is not None and (h is None or not weights.apart(g, h)):
                late.add(name)
            elif g is not None:
                rows[name] = g
        if weights is not None and not late and graph.form is not None:
            told = all(weights.tells(g) for g in [*(g for _, _, g, _ in reached), *rows.values()])
            if told and self._apart(graph, batch, of, end):
                self.verdict.proven.add(form)
        return value.detach(), residual, reached, rows, late, totals

    def _leaves(self, copies: Mapping[str, Tensor]) -> dict[int, object]:
        """What stands for a parameter in a graph's form: the same for a copy in its place."""
        own = {id(parameter): id(parameter) for parameter in self.model.parameters()}
        return {**own, **{id(copy): id(self.params[name]) for name, copy in copies.items()}}

    def _apart(self, graph: graphs.Graph, batch: Batch, of: str, end: int | None) -> bool:
        """Whether the shapes of a graph and of the same one of fewer examples show that it keeps them apart."""
        n = batches.size(batch)
        size = n // self.copies
        if size < 3 or len(self.verdict.apart) >= _WIRINGS:
            # one example broadcasts, and says nothing of a dimension
            return False
        wiring = graphs.wiring(graph)
        if wiring not in self.verdict.apart:
            few = batches.pick(batch, [place for place in range(n) if (place + 1) % size])
            try:
                value, _, _, leaves = self._forward(few, of, n - self.copies, self.verdict.forms, self.verdict.spread)
                other = graphs.read(value, leaves=self._leaves(leaves))
                self.verdict.apart[wiring] = graphs.wiring(other) == wiring and graphs.keeps_apart(
                    graph, other, n, n - self.copies, end
                )
            except Exception as error:
                log.info("not known to keep examples apart: %s", (str(error).splitlines() or [type(error).__name__])[0])
                self.verdict.apart[wiring] = False
        return self.verdict.apart[wiring]

    def _forward(
        self, batch: Batch, of: str, n: int, forms: Mapping[str, int], spread: Collection[str]
    ) -> tuple[Tensor, Tensor, Trace, dict[str, Tensor]]:
        with (
            torch.enable_grad(),
            repeated(self.model, forms, self.params, n) as leaves,
            traced(self.model, self._sites.modules(), self._functional, spread, n) as trace,
        ):
            value, residual = self.task.differentiate(self.model, batch, of)
        return value, residual, trace, leaves

    def _layout(self, call: Call) -> Layout | None:
        known = self.verdict.layouts.get(call.site.key, ())
        if len(known) == 1:
            return known[0]
        return known[call.index] if call.index < len(known) else None

    def _collect(self, found: dict[tuple[str, ...], list[Block]], site: Site, x: Tensor, g: Tensor, per: int) -> bool:
        """Add the blocks of one call; False where its rule does not cover it."""
        names = site.slots
        with torch.no_grad():
            try:
                # sums over positions and products of factors in float32, whatever the weights
                blocks = site.rule(site.module, wide(x), wide(g), set(names), site.joined)
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
                log.info("the rule for %s does not hold: %s", site.key, str(error).splitlines()[0])
                return False
            for attributes, block in blocks.items():
                block.params = tuple(names[a] for a in attributes)
                found.setdefault(block.params, []).append(folded(block, per))
        return bool(blocks)

    def _fill(self, blocks: dict[str, Block], examples: int, rows: dict[str, Tensor]) -> None:
        """Blocks, in the form their rule gives, for parameters that this batch reached otherwise or not at all."""
        seen = {name for block in blocks.values() for name in block.params}
        for site in self.sites.values():
            if seen.issuperset(site.slots.values()):
                continue
            for attributes in groups_of(site.rule, set(site.slots), site.joined):
                params = tuple(site.slots[a] for a in attributes)
                if params[0] not in seen:
                    own = [rows.get(name) for name in params]
                    # of a weight that layers of several kinds share, the form that their sum has
                    users = [s for s in self.sites.values() if params[0] in s.slots.values()]
                    of = next((s for s in users if not isinstance(s.module, nn.Embedding)), site)
                    as_is = next(a for a, name in of.slots.items() if name == params[0])
                    form = attributes if len(attributes) > 1 else (as_is,)
                    groups = (
                        int(getattr(of.module, "groups", 1)) if isinstance(of.module, nn.modules.conv._ConvNd) else 1
                    )
                    like = self._like(params[0])
                    blocks[params[0]] = block_of(of.rule, groups, form, params, own, like, examples)
                    seen |= set(params)
        for name in set(self.params) - seen:
            blocks[name] = Flat(
                (name,), rows.get(name, self._like(name).new_zeros(examples, self.params[name].numel()))
            )

    def _like(self, name: str) -> Tensor:
        """A tensor of a parameter's shape and of its gradient's dtype; its numbers mean nothing."""
        parameter = self.params[name]
        return torch.empty_like(parameter, dtype=torch.float32) if parameter.dtype in HALF else parameter.detach()

    def _by_autograd(
        self, batch: Batch, of: str, wanted: Collection[str], value: Tensor, totals: Totals
    ) -> dict[str, Tensor]:
        """(B, numel) rows of these parameters by per-example autograd, held against the batch's gradient."""
        names = [name for name in self.params if name in wanted]
        if not names:
            return {}
        rows, alone = self._rows(batch, of, names)
        if self._autograd.vectorised and totals.odd(rows):
            log.info("per-example autograd runs one example at a time: under vmap it gives other gradients")
            self._autograd.vectorised = False
            rows, alone = self._rows(batch, of, names)
        if batches.size(batch) > self.copies:
            refuse_company(value, alone, self.verdict.coarse)
        return rows

    def _rows(self, batch: Batch, of: str, names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        if self.copies == 1:
            return self._autograd.rows(batch, of, names)
        size = batches.size(batch) // self.copies
        parts: list[tuple[dict[str, Tensor], Tensor]] = []
        for copy in range(self.copies):
            with self.only(copy):
                parts.append(self._autograd.rows(batches.take(batch, copy * size, (copy + 1) * size), of, names))
        return {name: torch.cat([rows[name] for rows, _ in parts]) for name in names}, torch.cat([v for _, v in parts])


def refuse_company(together: Tensor, alone: Tensor, coarse: bool, scale: float | None = None) -> None:
    """Refuse a batch in which an example's output is another than alone.

    Args:
        together: (B,) outputs in the batch.
        alone: (B,) the same alone.
        coarse: whether half precisions take part.
        scale: how large outputs are, to tell a difference from rounding; from those given by default.

    Raises:
        ExampleError: names the example that is furthest off.
    """
    loose = 5e-2 if coarse or together.dtype in HALF or alone.dtype in HALF else 1e-3
    a, b = together.double(), alone.double()
    scale = float(b.abs().nanmean()) if scale is None else scale
    # half precisions round whatever is added up to an output, which may itself be near zero
    off = (a - b).abs() - loose * (b.abs() + max(scale, 1.0 if loose > 1e-2 else 1e-6))
    if bool((off > 0).any()):
        place = int(off.nan_to_num(-torch.inf).argmax())
        raise ExampleError(
            place,
            f"an example's output depends on the other examples in its batch: {float(a[place]):.5g} in a batch of "
            f"{len(a)}, {float(b[place]):.5g} alone (padding that the model does not mask, batch statistics, "
            "sorting?); attribution needs one output per example",
        )


def _gradients(value: Tensor, inputs: Iterable[Any], keep: bool) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(inputs), retain_graph=keep, allow_unused=True))


def _dense(t: Tensor) -> Tensor:
    return t.to_dense() if t.is_sparse else t


def _merged(found: dict[tuple[str, ...], list[Block]], late: set[str]) -> dict[str, Block]:
    """One block per parameter, but for those that autograd takes; those that share a block go there together."""
    while True:
        more = {name for names in found if not late.isdisjoint(names) for name in names} - late
        if not more:
            break
        late |= more
    kept = [merge(blocks) for names, blocks in found.items() if late.isdisjoint(names)]
    return {block.params[0]: block for block in kept}


def attributed(task: Task, model: nn.Module, selects: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """The parameters that count: trainable, and chosen by the task or brought by the member.

    Raises:
        ValueError: none is left.
    """
    params = chosen(model, selects)
    if not params:
        raise ValueError("no parameter is attributed: none is trainable and chosen by params=")
    return params
