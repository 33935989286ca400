"""What a model's structure is: looked at on a few examples, at two numbers of them, and held against autograd."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from byline import batches
from byline.batches import Batch
from byline.features.autograd import HALF, PerExample, wide
from byline.features.capture import Capture
from byline.features.layers import ALTERNATIVES, is_scale
from byline.features.layouts import Layout, of_shapes, orders
from byline.features.tracing import Call, Trace, traced
from byline.features.verdict import Sites, Verdict
from byline.task import Task

log = logging.getLogger("byline")

_FORMS = (0, 1, 2, 3, 4)
"""Dimensions of length 1 that are tried between the examples and a parameter's own."""


def calibrate(task: Task, model: nn.Module, params: dict[str, nn.Parameter], batch: Batch, of: str) -> Verdict:
    """Find out how each parameter's per-example gradients are to be had.

    Rules first; then, for what they do not cover: calls on a weight without its module, a scale's other layouts,
    outputs and parameters that are the same for all examples, repeated for each; then per-example autograd. Each way
    is taken only where it gives autograd's gradients, for the examples in their order and in the opposite one, and for
    fewer of them.

    Args:
        task: what is differentiated.
        model: the member's model.
        params: the attributed parameters by name.
        batch: a few examples, three at least.
        of: "output" or "loss".

    Raises:
        ValueError: the model is not deterministic, an example's output depends on the others in its batch, or no
            attributed parameter has an influence on it.
    """
    search = _Search(task, model, params, batch, of)
    _check_separable(task, model, batch, of, search.coarse)
    return search.run()


def sketched(task: Task, model: nn.Module, params: dict[str, nn.Parameter], batch: Batch, of: str) -> Verdict:
    """What shapes alone say of a model, without a gradient: enough to tell how large rows are, not to trust them."""
    return _Search(task, model, params, batch, of).sketch()


class _Search:
    """The search for a verdict."""

    def __init__(self, task: Task, model: nn.Module, params: dict[str, nn.Parameter], batch: Batch, of: str):
        self.task, self.model, self.params, self.of = task, model, params, of
        self.modules = dict(model.named_modules())
        count = batches.size(batch)
        self.batch, self.examples = batch, count
        self.fewer = batches.take(batch, 0, count - 1)
        backwards = list(reversed(range(count)))
        self.looks = [
            (batch, list(range(count))),
            (batches.pick(batch, backwards), backwards),
            (self.fewer, list(range(count - 1))),
        ]
        self.by_example = PerExample(task, model, params)
        trace, value = self._seen(Verdict(), batch)
        if not value.requires_grad:
            raise ValueError(
                "the output does not depend on any attributed parameter by a gradient; expected a model whose forward "
                "runs with gradients (is it under torch.no_grad or torch.inference_mode, or detached, inside?)"
            )
        self.values = value.detach()
        dtype = next(iter(params.values())).dtype
        self.coarse = trace.half or value.dtype in HALF
        exact = {torch.float64: 1e-9, torch.float32: 2e-4}.get(dtype, 5e-2)
        self.tolerance = 5e-2 if self.coarse else exact
        self.expected: dict[str, Tensor] = {}
        self.total = 0.0

    def sketch(self) -> Verdict:
        """What shapes alone say."""
        return self._layouts(Verdict(frozenset(Sites(self.model, self.params, {}, {}).uncovered), coarse=self.coarse))

    def run(self) -> Verdict:
        self.expected, _ = self.by_example.looped(self.batch, self.of, list(self.params))
        self.total = max(float(rows.norm()) for rows in self.expected.values())
        verdict = self._settled(self.sketch())
        if verdict.fallback:
            for step in (self._alternatives, self._functional, self._spread, self._forms):
                verdict = step(verdict)
                if not verdict.fallback:
                    break
            verdict = self._settled(verdict)
        if verdict.fallback:
            log.info("per-example autograd for %d of %d parameters", len(verdict.fallback), len(self.params))
            names = [name for name in self.params if name in verdict.fallback]
            fast, _ = self.by_example.rows(self.batch, self.of, names)
            same = all(self._agrees(name, fast[name], self.looks[0][1]) for name in fast)
            verdict = replace(verdict, vectorised=self.by_example.vectorised and same)
        return replace(verdict, coarse=self.coarse)

    # what is seen

    def _seen(
        self, verdict: Verdict, batch: Batch, functional: Mapping[int, str] | None = None
    ) -> tuple[Trace, Tensor]:
        sites = Sites(self.model, self.params, verdict.rules, verdict.functional)
        with torch.enable_grad(), traced(self.model, sites.modules(), functional, (), batches.size(batch)) as trace:
            value = self.task.differentiate(self.model, batch, self.of)[0]
        return trace, value

    def _layouts(self, verdict: Verdict, functional: Mapping[int, str] | None = None) -> Verdict:
        """The layouts of all sites that were called alike at both numbers of examples; others go to the fallback."""
        (many, _), (few, _) = (self._seen(verdict, batch, functional) for batch in (self.batch, self.fewer))
        found: dict[str, tuple[Layout, ...]] = dict(verdict.layouts)
        lost: set[str] = set()
        for key, calls in _by_site(many).items():
            if key in found:
                continue
            others = _by_site(few).get(key, [])
            own = [
                of_shapes(a.shape, b.shape, self.examples, self.examples - 1)
                for a, b in zip(calls, others, strict=False)
            ]
            known = [layout for layout in own if layout is not None]
            if len(calls) != len(others) or len(known) != len(calls):
                lost |= set(calls[0].site.slots.values())
            else:
                found[key] = (known[0],) if len(set(known)) == 1 else tuple(known)
        return replace(verdict, layouts=found, fallback=frozenset(verdict.fallback | lost))

    def _wrong(self, verdict: Verdict) -> set[str]:
        """Parameters for which a verdict does not give what autograd does; all of them where it cannot be followed."""
        capture = Capture(self.task, self.model, self.params, verdict)
        found: set[str] = set()
        for batch, order in self.looks:
            try:
                value, _, blocks, late, _ = capture.ruled(batch, self.of)
            except Exception as error:
                # repeated outputs and parameters may not fit a model at all
                log.info("not for this model: %s", (str(error).splitlines() or [type(error).__name__])[0])
                return set(self.params)
            if value.shape != (len(order),) or not self._close(value, self.values[order]):
                return set(self.params)
            rows = {
                name: part for block in blocks.values() for name, part in zip(block.params, block.split(), strict=True)
            }
            checked = set(self.params) - capture.fallback
            found |= {name for name in checked if name in late or not self._agrees(name, rows.get(name), order)}
        return found

    def _agrees(self, name: str, rows: Tensor | None, order: list[int]) -> bool:
        reference = wide(self.expected[name][order])
        if rows is None or rows.shape != reference.shape:
            return rows is None and not reference.any()
        error = float((rows - reference).norm())
        return error <= self.tolerance * (float(reference.norm()) + 1e-2 * self.total)

    def _close(self, value: Tensor, reference: Tensor) -> bool:
        loose = 5e-2 if self.coarse else 1e-4
        size = float(reference.abs().nan_to_num(0, 0, 0).max())
        return torch.allclose(value, reference, rtol=loose, atol=loose * size, equal_nan=True)

    def _settled(self, verdict: Verdict) -> Verdict:
        """Give to autograd whatever is wrong, until nothing is."""
        while True:
            wrong = self._wrong(verdict)
            if not wrong:
                return verdict
            turned = self._other_order(verdict, wrong)
            if turned is not None:
                verdict = turned
                continue
            if wrong == set(self.params) and (verdict.spread or verdict.forms):
                verdict = Verdict(
                    verdict.fallback | set(verdict.forms), verdict.layouts, verdict.rules, verdict.functional
                )
                continue
            if wrong <= verdict.fallback:
                return verdict
            # without them other weights and biases are stored apart, so measure again
            verdict = replace(verdict, fallback=frozenset(verdict.fallback | wrong))

    def _other_order(self, verdict: Verdict, wrong: set[str]) -> Verdict | None:
        """The verdict with flattened rows read the other way round, where some are wrong that were not yet."""
        sites = Sites(self.model, self.params, verdict.rules, verdict.functional).sites
        layouts = dict(verdict.layouts)
        for key, own in verdict.layouts.items():
            of_wrong = key in sites and not wrong.isdisjoint(sites[key].slots.values())
            if of_wrong and any(layout.several and not layout.minor for layout in own):
                layouts[key] = tuple(orders(layout)[-1] for layout in own)
        return None if layouts == dict(verdict.layouts) else replace(verdict, layouts=layouts)

    # what is tried for what is left

    def _better(self, verdict: Verdict, trial: Verdict, names: Iterable[str]) -> Verdict:
        """The trial without those of these names that it gets wrong, or the verdict where it breaks anything else."""
        names = set(names)
        trial = replace(trial, fallback=frozenset(trial.fallback - names))
        wrong = self._wrong(trial)
        turned = self._other_order(trial, wrong) if wrong and wrong <= names else None
        if turned is not None:
            trial, wrong = turned, self._wrong(turned)
        if not wrong <= names or wrong == names:
            return verdict
        return replace(trial, fallback=frozenset(trial.fallback | wrong)) if wrong else trial

    def _alternatives(self, verdict: Verdict) -> Verdict:
        """Scales of one's own: over the last dimension, or over the channels of pictures."""
        for rule in ALTERNATIVES:
            keys = {
                key: slots
                for key, slots in self._held().items()
                if is_scale(self.modules[key]) and set(slots.values()) & verdict.fallback
            }
            if not keys:
                return verdict
            names = {name for slots in keys.values() for name in slots.values()}
            trial = replace(verdict, rules={**verdict.rules, **dict.fromkeys(keys, rule)})
            trial = self._layouts(replace(trial, fallback=frozenset(trial.fallback - names)))
            verdict = self._better(verdict, trial, names)
        return verdict

    def _functional(self, verdict: Verdict) -> Verdict:
        """Weights that ``F.linear`` or ``matmul`` is called on outside their module."""
        candidates = {id(self.params[name]): name for name in verdict.fallback if self.params[name].ndim <= 2}
        if not candidates:
            return verdict
        seen, _ = self._seen(verdict, self.batch, candidates)
        uses = {
            call.site.slots["weight"]: (call.site.rule, call.site.slots.get("bias"))
            for call in seen.calls
            if call.site.module is None
        }
        if not uses:
            return verdict
        names = {name for weight, (_, bias) in uses.items() for name in (weight, bias) if name is not None}
        trial = replace(verdict, functional={**verdict.functional, **uses}, fallback=verdict.fallback - names)
        return self._better(verdict, self._layouts(trial, candidates), names)

    def _spread(self, verdict: Verdict) -> Verdict:
        """Tables looked up once for all examples."""
        (many, _), (few, _) = (self._seen(verdict, batch) for batch in (self.batch, self.fewer))
        same = {
            key: calls
            for key, calls in _by_site(many).items()
            if set(calls[0].site.slots.values()) <= verdict.fallback
            and [call.shape for call in calls] == [call.shape for call in _by_site(few).get(key, [])]
        }
        for key, calls in same.items():
            names = set(calls[0].site.slots.values())
            trial = replace(verdict, spread=verdict.spread | {key}, layouts={**verdict.layouts, key: (Layout(0),)})
            verdict = self._better(verdict, trial, names)
        return verdict

    def _forms(self, verdict: Verdict) -> Verdict:
        """Parameters that broadcasting gives to every example, those of one kind together."""
        kinds: dict[tuple[object, ...], list[str]] = {}
        for key, slots in self._held().items():
            if isinstance(self.modules[key], nn.RNNBase):
                # which kernel runs, and what it makes of its weights' shapes, depends on the batch
                continue
            for attribute, name in slots.items():
                if name in verdict.fallback:
                    kind = (type(self.modules[key]), attribute, self.params[name].ndim)
                    kinds.setdefault(kind, []).append(name)
        for names in kinds.values():
            of_one = all(self.params[n].ndim > 1 and self.params[n].shape[0] == 1 for n in names)
            for form in (*((-1,) if of_one else ()), *_FORMS):
                trial = replace(verdict, forms={**verdict.forms, **dict.fromkeys(names, form)})
                found = self._better(verdict, trial, names)
                if found is not verdict:
                    verdict = replace(found, forms={n: f for n, f in found.forms.items() if n not in found.fallback})
                    break
        return verdict

    def _held(self) -> dict[str, dict[str, str]]:
        """By module, the attributed parameters it holds."""
        names = {id(parameter): name for name, parameter in self.params.items()}
        held = {}
        for key, module in self.model.named_modules():
            slots = {a: names[id(p)] for a, p in module._parameters.items() if p is not None and id(p) in names}
            if slots:
                held[key] = slots
        return held


def _by_site(trace: Trace) -> dict[str, list[Call]]:
    out: dict[str, list[Call]] = {}
    for call in trace.calls:
        out.setdefault(call.site.key, []).append(call)
    return out


def _check_separable(task: Task, model: nn.Module, batch: Batch, of: str, coarse: bool) -> None:
    with torch.enable_grad():
        whole = task.differentiate(model, batch, of)[0].detach()
        again = task.differentiate(model, batch, of)[0].detach()
        alone = [task.differentiate(model, batches.take(batch, i, i + 1), of)[0].detach() for i in range(len(whole))]
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
