"""The one copy of the model that members take turns on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from byline import batches
from byline.engines.company import Company, naming
from byline.ensembles.base import Change, Member
from byline.ensembles.copies import copied
from byline.ensembles.dropout import MaskChange, Sites, locate, located, only, refuse_without_sites
from byline.features.autograd import HALF
from byline.features.calibrate import calibrate
from byline.features.capture import Capture, attributed
from byline.features.verdict import Verdict, agreed
from byline.swaps import uncheckpointed
from byline.task import Task

Collate = Callable[[list[Any]], Any]


@dataclass
class Active:
    """A member ready to be run."""

    model: nn.Module
    device: torch.device
    sites: Sites | None
    _captured: Callable[[str], Capture]
    _held: Callable[[], bool]

    def capture(self, of: str) -> Capture:
        """Its per-example gradients of "output" or "loss"."""
        return self._captured(of)

    def held(self) -> bool:
        """Refuse residuals that depend on an example's company; returns whether half precisions take part in them."""
        return self._held()

    @property
    def tiles(self) -> bool:
        """Whether several masks can run side by side: every site has the examples in one dimension."""
        return self.sites is not None and all(place is not None for place in self.sites.batch_dims)


class Workbench:
    """Puts members on copies of the task's model, and remembers what was learnt of its structure.

    A copy is taken away while a member is on it and comes back only after a clean end: whatever happens in between, a
    signal too, the next member finds the task's model as it is.

    Args:
        task: whose model is copied; the original is never changed.
        dataset: a few of whose examples serve to locate dropout, to hold the rules against autograd, and to see
            whether an example's output depends on its company.
        collate: makes a batch of items.
        device: where to work; the model's own device by default.
    """

    def __init__(self, task: Task, dataset: Any, collate: Collate = default_collate, device: Any = None):
        self.task = task
        own = next((p.device for p in task.model.parameters()), torch.device("cpu"))
        self.device = own if device is None else torch.device(device)
        # spread over the dataset, which may be sorted; never fewer than three, or a dimension of one could be anything
        last = len(dataset) - 1
        self.places = [0, last // 2, last]
        self.examples = len(self.places)
        self.probe = self._batch(dataset, self.places, collate)
        self.company = Company(dataset, collate, self.device)
        self._free: list[_Copy] = []
        self._sites: dict[tuple[str, ...], Sites] = {}
        self._verdicts: dict[tuple[Any, ...], Verdict] = {}
        self._checked: set[tuple[Any, ...]] = set()
        self._coarse = False

    def _batch(self, dataset: Any, indices: list[int], collate: Collate) -> Any:
        return batches.to(batches.gather(dataset, indices, collate), self.device)

    @property
    def model(self) -> nn.Module:
        """A copy of the task's model, to look at."""
        with self._copy() as lent:
            return lent.model

    @contextmanager
    def _copy(self) -> Iterator[_Copy]:
        try:
            lent = self._free.pop()
        except IndexError:
            lent = _Copy(copied(self.task.model).to(self.device).eval())
        try:
            with eager(lent.model), uncheckpointed(reentrant=True):
                yield lent
        except GeneratorExit:
            # whoever asked has seen enough, and everything was undone on the way here
            self._free.append(lent)
            raise
        else:
            self._free.append(lent)

    @contextmanager
    def active(self, member: Member, chain: str, beside: Sequence[Member] = ()) -> Iterator[Active]:
        """The member's model, under the changes of its "gradient" or "residual" chain.

        Args:
            member: who.
            chain: which changes.
            beside: members that differ from it in the mask alone, to run on further copies of the batch.

        Raises:
            ValueError: what its model says of an example depends on the others in the batch.
        """
        with self._copy() as lent:
            if lent.loaded != member.weights.digest():
                lent.loaded = None
                member.weights.into(lent.model, self.task.model)
                lent.loaded = member.weights.digest()
            yield from self._under(lent.model, member, chain, beside)

    def _under(self, model: nn.Module, member: Member, chain: str, beside: Sequence[Member]) -> Iterator[Active]:
        changes = list(member.chain(chain))
        masks = [change for change in changes if isinstance(change, MaskChange)]
        if beside:
            others = [other.chain(chain)[-1] for other in beside]
            assert all(isinstance(change, MaskChange) for change in [changes[-1], *others])
            changes[-1] = changes[-1].beside(others)  # type: ignore[attr-defined]
        sites = self._located(model, changes) if masks else None
        if sites is not None:
            refuse_without_sites(sites, masks)
        kinds = tuple(change.structure() for change in changes)
        with ExitStack() as stack:
            stack.enter_context(located(sites))
            for change in changes:
                model = stack.enter_context(change.apply(model))

            def held() -> bool:
                if kinds not in self._checked:
                    with naming("train_set", self.places):
                        one = batches.take(self.probe, 0, 1)
                        self._coarse |= _is_coarse(model, lambda: self.task.residual(model, one))
                    self.company.check(lambda batch: self.task.residual(model, batch), self._coarse)
                    self._checked.add(kinds)
                return self._coarse

            def captured(of: str) -> Capture:
                params = attributed(self.task, model, counting(member, self.task))
                key = (kinds, tuple(params))
                if key not in self._verdicts:
                    self._verdicts[key] = self._calibrated(model, params, of)
                return Capture(self.task, model, params, self._verdicts[key], 1 + len(beside), only)

            yield Active(model, self.device, sites, captured, held)

    def _calibrated(self, model: nn.Module, params: dict[str, nn.Parameter], of: str) -> Verdict:
        """What holds of the output and of the loss, so that rows of the one meet rows of the other in one form."""
        with naming("train_set", self.places):
            found = calibrate(self.task, model, params, self.probe, of)
            if not self.task.loss_follows_output:
                other = "loss" if of == "output" else "output"
                found = agreed(found, calibrate(self.task, model, params, self.probe, other))
        self.company.check(lambda batch: self.task.differentiate(model, batch, of), found.coarse)
        return found

    def _located(self, model: nn.Module, changes: Sequence[Change]) -> Sites:
        kinds = tuple(change.structure() for change in changes if not isinstance(change, MaskChange))
        if kinds not in self._sites:
            with ExitStack() as stack, naming("train_set", self.places):
                for change in changes:
                    if not isinstance(change, MaskChange):
                        model = stack.enter_context(change.apply(model))
                self._sites[kinds] = locate(
                    model,
                    lambda n: self.task.differentiate(model, batches.take(self.probe, 0, n), "output"),
                    self.examples,
                )
        return self._sites[kinds]


def counting(member: Member, task: Task) -> Callable[[str], bool]:
    """Which trainable parameters of a member count, by name: the task's choice, or all that an adapter brings."""
    return lambda name: member.selects(name) and (member.brings or task.selects(name))


@dataclass
class _Copy:
    """A copy of the model, and whose weights it holds."""

    model: nn.Module
    loaded: str | None = None


def _is_coarse(model: nn.Module, run: Callable[[], Any]) -> bool:
    """Whether layers give half precision, as under autocast, whatever the weights and the output are."""
    seen: list[bool] = []

    def look(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(isinstance(out, torch.Tensor) and out.dtype in HALF)

    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(look).remove)
        run()
    return any(seen)


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run whatever of a model is compiled as it was written: compiled code calls no hooks."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
