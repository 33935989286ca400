"""The one copy of the model that members take turns on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from byline import batches
from byline.ensembles.base import Change, Member
from byline.ensembles.copies import copied
from byline.ensembles.dropout import MaskChange, Sites, locate, located, refuse_without_sites
from byline.features.capture import Capture, Verdict, attributed, calibrate
from byline.task import ExampleError, Task

Collate = Callable[[list[Any]], Any]


@dataclass
class Active:
    """A member ready to be run."""

    model: nn.Module
    sites: Sites | None
    _captured: Callable[[str], Capture]

    def capture(self, of: str) -> Capture:
        """Its per-example gradients of "output" or "loss"."""
        return self._captured(of)

    @property
    def tiles(self) -> bool:
        """Whether several masks can run side by side: every site has the examples in one dimension."""
        return self.sites is not None and all(place is not None for place in self.sites.batch_dims)


class Workbench:
    """Puts members on one copy of the task's model, and remembers what was learnt of its structure.

    Args:
        task: whose model is copied; the original is never changed.
        dataset: three of whose examples serve to locate dropout and to hold the rules against autograd.
        collate: makes a batch of items.
        device: where to work; the model's own device by default.
    """

    def __init__(self, task: Task, dataset: Any, collate: Collate = default_collate, device: Any = None):
        self.task = task
        own = next((p.device for p in task.model.parameters()), torch.device("cpu"))
        self.device = own if device is None else torch.device(device)
        self.model = copied(task.model).to(self.device).eval()
        # spread over the dataset, which may be sorted; never fewer than three, or a dimension of one could be anything
        last = len(dataset) - 1
        self.places = [0, last // 2, last]
        self.examples = len(self.places)
        self.probe = batches.to(batches.gather(dataset, self.places, collate), self.device)
        self._loaded: str | None = None
        self._sites: dict[tuple[str, ...], Sites] = {}
        self._verdicts: dict[tuple[Any, ...], Verdict] = {}

    @contextmanager
    def active(self, member: Member, chain: str, beside: Sequence[Member] = ()) -> Iterator[Active]:
        """The member's model, under the changes of its "gradient" or "residual" chain.

        Args:
            member: who.
            chain: which changes.
            beside: members that differ from it in the mask alone, to run on further copies of the batch.
        """
        if self._loaded != member.weights.digest():
            member.weights.into(self.model, self.task.model)
            self._loaded = member.weights.digest()
        changes = list(member.chain(chain))
        masks = [change for change in changes if isinstance(change, MaskChange)]
        if beside:
            others = [other.chain(chain)[-1] for other in beside]
            assert all(isinstance(change, MaskChange) for change in [changes[-1], *others])
            changes[-1] = changes[-1].beside(others)  # type: ignore[attr-defined]
        sites = self._located(changes) if masks else None
        if sites is not None:
            refuse_without_sites(sites, masks)
        kinds = tuple(change.structure() for change in changes)
        with ExitStack() as stack:
            stack.enter_context(located(sites))
            model = self.model
            for change in changes:
                model = stack.enter_context(change.apply(model))

            def captured(of: str) -> Capture:
                params = attributed(self.task, model, counting(member, self.task))
                key = (kinds, of, tuple(params))
                if key not in self._verdicts:
                    with naming("train_set", self.places):
                        self._verdicts[key] = calibrate(self.task, model, params, self.probe, of)
                return Capture(self.task, model, params, self._verdicts[key])

            yield Active(model, sites, captured)

    def _located(self, changes: Sequence[Change]) -> Sites:
        kinds = tuple(change.structure() for change in changes if not isinstance(change, MaskChange))
        if kinds not in self._sites:
            with ExitStack() as stack, naming("train_set", self.places):
                model = self.model
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


@contextmanager
def naming(dataset_name: str, indices: Sequence[int]) -> Iterator[None]:
    """Say which example of the dataset a problem in a batch belongs to."""
    try:
        yield
    except ExampleError as error:
        raise ValueError(f"{dataset_name}[{indices[error.position % len(indices)]}]: {error.problem}") from None
