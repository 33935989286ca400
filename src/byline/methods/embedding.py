"""What the methods without gradients share, and the embeddings of those that take them: forward passes alone.

An embedding is the input of the model's last linear layer. A member's mask, noise or adapter is on while it is taken,
and a mask is the same for training and test examples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from byline import arrivals, batches
from byline.batches import Batch
from byline.engines.local import Job
from byline.engines.workbench import naming
from byline.ensembles import Ensemble
from byline.ensembles.base import Member
from byline.features.base import sampled
from byline.ledger import count_flops
from byline.methods.base import Attributor, Voter
from byline.progress import bar
from byline.task import Task

EmbeddingScorer = Callable[[Tensor, Tensor | None], Tensor]
"""Embeddings (B, d) and targets (B,) of a test batch -> (B, n_train) what one member says."""

_VERIFIED = (2, 5)  # members, and examples of each


class Tap:
    """Notes what goes into a model's layer while it runs.

    Args:
        layer: the name of a module; None for the last ``nn.Linear`` that is called (adapters' own layers aside).
    """

    def __init__(self, layer: str | None):
        self.layer = layer
        self.seen: Tensor | None = None

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Watch the model for as long as the context lasts."""
        found = [module for name, module in model.named_modules() if self._watches(name, module)]
        if not found:
            wanted = "no nn.Linear" if self.layer is None else f"no module named {self.layer!r}"
            raise ValueError(f"the model has {wanted}; expected layer= to name a module whose input is the embedding")
        handles = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in found]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, task: Task, model: nn.Module, batch: Batch) -> Tensor:
        """What went into the layer, as it went in."""
        self.seen = None
        arrivals.tried(task, model, batch, lambda given: task.output(model, given), "the batch")
        if self.seen is None:
            what = "an nn.Linear" if self.layer is None else f"the module {self.layer!r}"
            raise ValueError(
                f"the model ran without giving {what} a floating-point tensor; expected layer= to name a module that "
                "gets one"
            )
        return self.seen

    def _watches(self, name: str, module: nn.Module) -> bool:
        if self.layer is not None:
            return name == self.layer
        return isinstance(module, nn.Linear) and "lora_" not in name

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        if inputs:
            # a copy, because the layer or what follows may work in place
            self.seen = inputs[0].detach().clone()


def examples_dim(whole: Tensor, fewer: Tensor, count: int) -> int:
    """Which dimension of a layer's input holds the examples: 0, or 1 where positions come first.

    Args:
        whole: the input with ``count`` examples.
        fewer: the input with one example less.
        count: of examples.

    Raises:
        ValueError: neither of the two, as where positions and examples share a dimension.
    """
    for dim in (0, 1):
        if whole.ndim > max(1, 2 * dim) and whole.shape[dim] == count and fewer.shape[dim] == count - 1:
            return dim
    raise ValueError(
        f"the layer that embeds gets a tensor of shape {tuple(whole.shape)} for {count} examples; expected layer= to "
        "name a module whose input has one row per example: (batch, d), (batch, positions, d) or (positions, batch, d)"
    )


def pooled(found: Tensor, batch: Batch, dim: int) -> Tensor:
    """(B, d) of a layer's input: the mean over positions where it has three dimensions, else all of it, flat."""
    found = found.movedim(dim, 0)
    # the store has no half precisions
    found = found.float() if found.dtype in (torch.bfloat16, torch.float16) else found
    if found.ndim != 3:
        return found.flatten(1)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != found.shape[:2]:
        return found.mean(1)
    kept = mask.to(found.dtype).unsqueeze(-1)
    return (found * kept).sum(1) / kept.sum(1).clamp_min(1)


class WithoutGradients(Attributor):
    """A method that differentiates nothing: no features are computed or stored.

    Args:
        task: what is explained.
        ensemble: who votes.
        **options: the other arguments of every method (`Attributor`), but ``features``, ``damping`` and ``params``.

    Raises:
        ValueError: one of those three is given.
    """

    _differentiates = False

    def __init__(self, task: Task, ensemble: Ensemble, **options: Any):
        for name in ("features", "damping", "params"):
            if options.pop(name, None) is not None:
                raise ValueError(f"{name} is given; {type(self).__name__} expects none, because it takes no gradients")
        super().__init__(task, ensemble, **options)

    def _gather(self) -> list[Voter]:
        """Equal members are one voter, with their weights together."""
        groups: dict[str, list[Member]] = {}
        for member in self.ensemble.members():
            groups.setdefault(member.identity("residual"), []).append(member)
        zeros = torch.zeros(self.n_train_)
        return [Voter(members[0], sum(m.weight for m in members), zeros, None) for members in groups.values()]

    def _shared(self) -> set[str]:
        return set()

    def info(self) -> dict[str, Any]:
        """How scores come about, without features."""
        return {name: value for name, value in super().info().items() if name != "features"}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.task!r}, {self.ensemble!r})"


class EmbeddingMethod(WithoutGradients):
    """A method on embeddings, the mean over members.

    All methods on the embeddings of one layer find each other's in a store.

    Args:
        task: what is explained; its output runs the model.
        ensemble: who votes; ``forward_only`` members are refused, for there is no Q to mask.
        layer: the name of the module whose first input is the embedding; the last ``nn.Linear`` that the model calls
            when left out. Of (batch, positions, d) or (positions, batch, d) the mean over positions is taken, over
            those alone that a dict batch's ``attention_mask`` keeps; more dimensions, as of images, are made flat.
        **options: the other arguments of every method (`Attributor`), but ``features``, ``damping`` and ``params``.

    Raises:
        ValueError: there is no such layer, or the ensemble is forward-only; while fitting, a layer that the model does
            not call, or whose input does not have one row per example.
    """

    with_targets: ClassVar[bool] = False
    """Whether scores depend on the examples' labels or values."""

    def __init__(self, task: Task, ensemble: Ensemble, *, layer: str | None = None, **options: Any):
        super().__init__(task, ensemble, **options)
        names = [name for name, _ in task.model.named_modules() if name]
        if layer is not None and layer not in names:
            raise ValueError(f"layer is {layer!r}; expected the name of a module of the model, such as {names[-3:]}")
        self.layer = layer

    def _check_members(self, members: list[Member]) -> None:
        if any(member.gradient_changes is not None for member in members):
            raise ValueError(
                f"forward_only=True masks TRAK's Q alone, and {type(self).__name__} has no Q: embeddings are forward "
                "passes already; use forward_only=False"
            )

    # fitting

    def _kept(self) -> dict[str, Any]:
        return {"kind": "embedding", "layer": self.layer}

    def _write(self) -> None:
        job = self._job(self._train_set, "train_set", "output")
        if self.with_targets:
            self._write_targets(job)
        distinct = {m.identity("residual"): m for m in reversed(self.ensemble.members())}
        members = list(reversed(distinct.values()))
        missing = [member for member in members if self.store.state(_key(member)) is None]
        self._dim = self._examples_dim(members[0])
        found = [member for member in members if member not in missing]
        for place in sampled(len(found), _VERIFIED[0], 0, "verify"):
            self._verify(job, found[place])
        with bar(len(missing) * len(job.spans()), "embeddings", self.progress) as advance:
            for member in missing:
                parts = []
                for _, _, embedded, _ in self._embedded(job, member, "fitting"):
                    parts.append(embedded)
                    advance(1, f"embeddings of {member.name}")
                self.store.put_state(_key(member), {"embedding": torch.cat(parts)})

    def _write_targets(self, job: Job) -> None:
        if self.store.state("targets") is None:
            found = [self.task.targets(job.batch(start, stop, torch.device("cpu"))) for start, stop in job.spans()]
            if not all(isinstance(t, Tensor) for t in found) or len({t.shape[1:] for t in found}) > 1:
                raise ValueError(
                    f"train_set gives targets that are no tensor of one shape; {type(self).__name__} needs one label "
                    "or value per example, last in a tuple or under 'labels' in a dict"
                )
            kept = torch.cat(found)
            self._target(kept, "train_set")
            self.store.put_state("targets", {"targets": kept})
        self._target(self._stored_targets(), "train_set")

    def _examples_dim(self, member: Member) -> int:
        tap, bench, count = Tap(self.layer), self._bench, self._bench.examples
        with bench.active(member, "residual") as active, tap.on(active.model), naming("train_set", bench.places):
            inputs = [
                tap.run(self.task, active.model, batches.take(bench.probe, 0, size)) for size in (count, count - 1)
            ]
        return examples_dim(inputs[0], inputs[1], count)

    def _verify(self, job: Job, member: Member) -> None:
        """Refuse a store whose numbers the model no longer gives: its code can change without a trace."""
        tap, where = Tap(self.layer), sampled(len(job.dataset), _VERIFIED[1], 0, f"verify/{_key(member)}")
        batch = batches.to(batches.gather(job.dataset, where, job.collate), self._bench.device)
        with (
            self._bench.active(member, "residual") as active,
            tap.on(active.model),
            naming(job.name, where),
        ):
            here = pooled(tap.run(self.task, active.model, batch), batch, self._dim).cpu()
        kept = self._embeddings(member)[where]
        loose = 5e-2 if here.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if here.shape != kept.shape or not torch.allclose(here, kept.to(here.dtype), rtol=loose, atol=loose):
            raise ValueError(
                f"store {self.store.path or 'in memory'} was made by another model or collate: the embeddings of "
                f"{job.name} at {where} under {member.name} are others here. Use another folder, or delete this one"
            )

    # serving

    def _embedded(self, job: Job, member: Member, phase: str) -> Iterator[tuple[int, int, Tensor, Batch]]:
        """(start, stop, embeddings on the CPU, batch) of a dataset under a member."""
        tap, width = Tap(self.layer), None
        with self._bench.active(member, "residual") as active, tap.on(active.model):
            for start, stop in job.spans():
                batch = job.batch(start, stop, self._bench.device)

                def run(batch: Batch = batch, model: nn.Module = active.model) -> Tensor:
                    return tap.run(self.task, model, batch)

                with naming(job.name, range(start, stop)):
                    if start == 0 and self.ledger is not None:
                        self.ledger.add_flops(phase, count_flops(run) * len(job.dataset) / (stop - start))
                        assert tap.seen is not None
                        inputs = tap.seen
                    else:
                        inputs = run()
                found = pooled(inputs, batch, self._dim).cpu()
                width = found.shape[1] if width is None else width
                if found.shape != (stop - start, width):
                    raise ValueError(
                        f"{job.name}[{start}:{stop}] has embeddings of shape {tuple(found.shape)}; expected "
                        f"{(stop - start, width)}, as of the first batch"
                    )
                if not found.isfinite().all():
                    bad = start + int((~found.isfinite()).any(1).nonzero()[0, 0])
                    raise ValueError(f"{job.name}[{bad}] has a NaN or infinite embedding; expected finite numbers")
                yield start, stop, found, batch

    def _votes(self, voter: Voter, job: Job, shared: set[str]) -> Iterator[tuple[int, int, Tensor]]:
        scorer = self._embedding_scorer(voter)
        width = self._embeddings(voter.member).shape[1]
        for start, stop, found, batch in self._embedded(job, voter.member, "serving"):
            if found.shape[1] != width:
                raise ValueError(
                    f"{job.name}[{start}:{stop}] has embeddings of {found.shape[1]} numbers; expected {width}, as of "
                    "the training set"
                )
            if self.ledger is not None:
                self.ledger.add_flops("serving", 2.0 * found.numel() * self.n_train_)
            targets = self._target(self.task.targets(batch), job.name) if self.with_targets else None
            yield start, stop, scorer(found, targets)

    @abstractmethod
    def _embedding_scorer(self, voter: Voter) -> EmbeddingScorer:
        """What one member says."""

    # pieces for the methods

    def _embeddings(self, member: Member) -> Tensor:
        """(n_train, d) a member's embeddings of the training set."""
        state = self.store.state(_key(member))
        assert state is not None, "fit keeps the embeddings of every member"
        return state["embedding"]

    def _target(self, targets: Any, name: str) -> Tensor:
        """(B,) a batch's targets as the method takes them; refuses others in one sentence."""
        return labels_of(targets, name)

    def _targets(self) -> Tensor:
        """(n_train,) the training set's."""
        return self._target(self._stored_targets(), "train_set")

    def _stored_targets(self) -> Tensor:
        state = self.store.state("targets")
        assert state is not None, "fit keeps the targets"
        return state["targets"]

    def info(self) -> dict[str, Any]:
        """Says what embeds."""
        return {**super().info(), "layer": self.layer}


def _key(member: Member) -> str:
    return f"embedding-{member.identity('residual')}"


def labels_of(targets: Any, name: str) -> Tensor:
    """(n,) int64 labels.

    Args:
        targets: as the batch has them, (n,) or (n, 1).
        name: of the dataset, for messages.

    Raises:
        ValueError: anything that is no whole number per example.
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.numel() != len(targets):
        got = f"a {targets.dtype} tensor of shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else "none"
        raise ValueError(f"{name} has as labels {got}; expected one whole number per example")
    return targets.reshape(-1).long().cpu()
