"""What the methods on embeddings share: the input of the model's last linear layer, by forward passes alone.

A member's mask, noise or adapter is on while its embeddings are taken, of training and test examples alike.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from byline.batches import Batch
from byline.engines.local import Job
from byline.engines.workbench import Active, naming
from byline.ensembles import Ensemble
from byline.ensembles.base import Member
from byline.ledger import count_flops
from byline.methods.base import Attributor, Voter
from byline.progress import bar
from byline.task import Task


class Tap:
    """Notes what goes into a model's layer while it runs.

    Args:
        layer: the name of a module; None for the last ``nn.Linear`` that is reached (adapters' own layers aside).
    """

    def __init__(self, layer: str | None):
        self.layer = layer
        self.seen: Tensor | None = None
        self.module: nn.Module | None = None

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Watch the model for as long as the context lasts."""
        found = [(name, module) for name, module in model.named_modules() if self._watched(name, module)]
        if not found:
            wanted = "an nn.Linear" if self.layer is None else f"a module named {self.layer!r}"
            raise ValueError(f"the model has not {wanted}; expected layer= to name the module whose input embeds")
        handles = [module.register_forward_pre_hook(self._note, with_kwargs=True) for _, module in found]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watched(self, name: str, module: nn.Module) -> bool:
        if self.layer is not None:
            return name == self.layer
        return isinstance(module, nn.Linear) and "lora_" not in name

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if inputs:
            self.seen, self.module = inputs[0].detach(), module

    def embedding(self, batch: Batch) -> Tensor:
        """(B, d) of the batch that was run: the mean over positions where there are several."""
        if self.seen is None:
            raise ValueError(
                "the model ran without reaching the layer that embeds; expected layer= to name one it calls"
            )
        found = self.seen
        if found.ndim == 3:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if isinstance(mask, Tensor) and mask.shape == found.shape[:2]:
                weights = mask.to(found.dtype).unsqueeze(-1)
                return (found * weights).sum(1) / weights.sum(1).clamp_min(1)
            return found.mean(1)
        return found.flatten(1)


class EmbeddingMethod(Attributor):
    """A method on embeddings.

    Args:
        task: what is explained.
        ensemble: who votes.
        layer: the name of the module whose input is the embedding; the last ``nn.Linear`` that the model reaches when
            left out. Of several positions the mean is taken, over those that ``attention_mask`` keeps.
        **options: the other arguments of every method (`Attributor`), but ``features``, ``damping`` and ``params``:
            there are no gradients.
    """

    def __init__(self, task: Task, ensemble: Ensemble, *, layer: str | None = None, **options: Any):
        for name in ("features", "damping", "params"):
            if options.get(name) is not None:
                raise ValueError(f"{name} is {options[name]!r}; {type(self).__name__} takes none: it has no gradients")
            options.pop(name, None)
        self.layer = layer
        super().__init__(task, ensemble, **options)

    def _check_members(self, members: list[Member]) -> None:
        if any(member.gradient_changes is not None for member in members):
            raise ValueError(
                f"forward_only=True masks TRAK's Q alone, and {type(self).__name__} has no Q: embeddings are forward "
                "passes already; use forward_only=False"
            )

    def _kept(self) -> dict[str, Any]:
        return {"kind": "embedding", "layer": self.layer}

    def _write(self) -> None:
        distinct = {m.identity("gradient"): m for m in reversed(self.ensemble.members())}
        missing = [m for i, m in reversed(distinct.items()) if self.store.state(self._key(m)) is None]
        job = self._job(self._train_set, "train_set", "output")
        with bar(len(missing) * len(job.spans()), "embeddings", self.progress) as advance:
            for member in missing:
                parts = []
                for _, _, found, _ in self._embedded(job, member, "fitting"):
                    parts.append(found)
                    advance(1, f"embeddings of {member.name}")
                self.store.put_state(self._key(member), {"embedding": torch.cat(parts).cpu()})
        if self.store.state("targets") is None:
            targets = [self.task.targets(job.batch(a, b, self._bench.device)) for a, b in job.spans()]
            if all(isinstance(target, Tensor) for target in targets) and not self._ragged(targets):
                self.store.put_state("targets", {"targets": torch.cat(targets).cpu()})

    @staticmethod
    def _ragged(targets: list[Tensor]) -> bool:
        return len({target.shape[1:] for target in targets}) > 1

    def _shared(self) -> set[str]:
        return set()

    @staticmethod
    def _key(member: Member) -> str:
        return f"embedding-{member.identity('gradient')}"

    def _gather(self) -> list[Voter]:
        """Equal members are one voter, with their weights together."""
        groups: dict[str, list[Member]] = {}
        for member in self.ensemble.members():
            groups.setdefault(member.identity("gradient"), []).append(member)
        zeros = torch.zeros(self.n_train_)
        return [Voter(members[0], sum(m.weight for m in members), zeros, None) for members in groups.values()]

    def _embedded(
        self, job: Job, member: Member, phase: str, active: Active | None = None
    ) -> Iterator[tuple[int, int, Tensor, Batch]]:
        """(start, stop, embeddings, batch) of a dataset under a member."""
        tap = Tap(self.layer)
        with self._bench.active(member, "gradient") as active, tap.on(active.model), torch.no_grad():
            for start, stop in job.spans():
                batch = job.batch(start, stop, self._bench.device)

                def run(batch: Batch = batch, model: nn.Module = active.model) -> None:
                    self.task.output(model, batch)

                with naming(job.name, range(start, stop)):
                    if start == 0 and self.ledger is not None:
                        self.ledger.add_flops(phase, count_flops(run) * len(job.dataset) / (stop - start))
                    else:
                        run()
                found = tap.embedding(batch)
                if not found.isfinite().all():
                    bad = start + int((~found.isfinite()).any(1).nonzero()[0, 0])
                    raise ValueError(f"{job.name}[{bad}] has a NaN or infinite embedding; expected finite numbers")
                yield start, stop, found, batch

    def _train(self, voter: Voter) -> Tensor:
        """(n_train, d) a member's embeddings of the training set."""
        state = self.store.state(self._key(voter.member))
        assert state is not None, "fit keeps the embeddings of every member"
        return state["embedding"]

    def _targets(self) -> Tensor:
        """(n_train, ...) the targets of the training set."""
        state = self.store.state("targets")
        if state is None:
            raise ValueError(f"train_set has no targets that stack into one tensor; {type(self).__name__} needs them")
        return state["targets"]

    def _votes(self, voter: Voter, job: Job, shared: set[str]) -> Iterator[tuple[int, int, Tensor]]:
        scorer = self._embedding_scorer(voter)
        for start, stop, found, batch in self._embedded(job, voter.member, "serving"):
            yield start, stop, scorer(found.cpu(), batch)

    def _self(self, voter: Voter) -> Tensor:
        job, scorer = self._job(self._train_set, "train_set", "output"), self._embedding_scorer(voter)
        parts = [
            scorer(found.cpu(), batch)[:, start:stop].diagonal()
            for start, stop, found, batch in self._embedded(job, voter.member, "serving")
        ]
        return torch.cat(parts)

    @abstractmethod
    def _embedding_scorer(self, voter: Voter) -> Any:
        """``f(embeddings (B, d), batch) -> (B, n_train)``, what one member says."""

    def info(self) -> dict[str, Any]:
        """Says what embeds in place of features."""
        return {**super().info(), "features": f"embedding(layer={self.layer!r})"}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.task!r}, {self.ensemble!r})"


def labels_of(targets: Any, name: str) -> Tensor:
    """(n,) int64 labels.

    Raises:
        ValueError: anything that is no whole number per example.
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.numel() != len(targets):
        got = f"a {targets.dtype} tensor of shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else "none"
        raise ValueError(f"{name} has the labels {got}; expected one whole number per example")
    return targets.reshape(-1).long().cpu()
