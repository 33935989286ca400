"""Who votes: a member is one configuration of the model whose gradients count, an ensemble an ordered list of them."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from byline import batches
from byline.ledger import Cost

StateDict = dict[str, Tensor]


class Change(ABC):
    """What turns a trained model into a member: a mask, noise on the weights, an adapter."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON that identifies the change: equal specs give equal bits."""

    @abstractmethod
    def apply(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The model under this change, for as long as the context lasts."""

    def selects(self, name: str) -> bool:
        """Whether a parameter of the changed model is attributed."""
        return True

    def structure(self) -> str:
        """What kind of change it is: changes of one structure give models whose layers are the same."""
        return type(self).__name__


class Weights:
    """The weights of one trained model: a state dict, a module, or a file, read when they are needed."""

    def __init__(self, source: Any, name: str):
        if isinstance(source, str | Path):
            path = Path(source)
            if not path.is_file():
                raise FileNotFoundError(f"{name}: no checkpoint file at {path}")
            if path.suffix not in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
                raise ValueError(f"{name} is {path.name}; expected a .safetensors or a .pt file")
        elif isinstance(source, nn.Module):
            source = {key: value.detach().clone() for key, value in source.state_dict().items()}
        elif hasattr(source, "items"):
            source = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in source.items()}
        else:
            raise TypeError(f"{name} is a {type(source).__name__}; expected a state_dict, a module or a path")
        self.source = source
        self.name = name
        self._digest: str | None = None
        self._seen: tuple[int, ...] | None = None
        """What the file system says of the file whose digest that is."""

    def load(self) -> StateDict:
        """The state dict; files are read without unpickling anything but tensors."""
        if not isinstance(self.source, str | Path):
            return dict(self.source)
        path = Path(self.source)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"{self.name}: {path} cannot be read with weights_only=True; expected a file of tensors alone, "
                "best a .safetensors"
            ) from error
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{self.name}: {path} holds no state_dict; expected a mapping from names to tensors")
        return state

    def into(self, model: nn.Module, base: nn.Module | None = None) -> None:
        """Load into a model of the same structure.

        Args:
            model: whose weights are replaced.
            base: gives the frozen parameters that a checkpoint leaves out; those that ``model`` has by default.
        """
        state = self.load()
        if base is not None and not state.keys() >= model.state_dict().keys():
            model.load_state_dict(base.state_dict())
        # a tied weight may stand under one of its names alone; `check` has seen that nothing is missing
        model.load_state_dict(state, strict=False)

    def check(self, model: nn.Module) -> None:
        """Refuse weights that do not fit a model. Frozen parameters may be left out: they are the model's own.

        Raises:
            ValueError: names the keys that are missing, unexpected or of another shape.
        """
        state = self.load()
        own = model.state_dict(keep_vars=True)
        given = {id(own[key]) for key in own if key in state}
        frozen = {key for key, value in own.items() if isinstance(value, nn.Parameter) and not value.requires_grad}
        missing = sorted(key for key in own if key not in state and id(own[key]) not in given and key not in frozen)
        unexpected = sorted(set(state) - set(own))
        shapes = [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and hasattr(own[key], "shape") and state[key].shape != own[key].shape
        ]
        problems = []
        for label, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
            if found:
                shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
                problems.append(f"{label}: {shown}")
        if problems:
            raise ValueError(f"{self.name} does not fit the task's model; keys {'; '.join(problems)}")

    def digest(self) -> str:
        """SHA-256 of the names and values; of a file, of what is in it now."""
        seen = self._stamp()
        if self._digest is None or seen != self._seen:
            self._digest, self._seen = batches.digest_of(sorted(self.load().items())), seen
        return self._digest

    def _stamp(self) -> tuple[int, ...] | None:
        if not isinstance(self.source, str | Path):
            return None
        try:
            found = os.stat(self.source)
        except OSError:
            # gone since: what was read of it is known still
            return self._seen
        return found.st_mtime_ns, found.st_size, found.st_ino


@dataclass(frozen=True)
class Member:
    """One configuration whose gradients vote."""

    name: str
    """Where it stands in the ensemble, for people: ``model 0, mask 3``."""
    weights: Weights
    model_index: int
    """Which trained model of the ensemble it comes from: masks and noise are drawn from it."""
    changes: tuple[Change, ...] = ()
    gradient_changes: tuple[Change, ...] | None = None
    """What the gradients come from, where that is not what Q comes from (forward-only)."""
    weight: float = 1.0
    """Its share in a weighted mean; the step size of a checkpoint for TracIn."""
    weighted: bool = False
    run: int = 0
    trained_on: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Sorted positions in the training set that its weights were trained on; None for all of them."""
    _ids: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def identity(self, of: str) -> str:
        """A short hash of everything that determines the member's numbers; ``of`` is "gradient" or "residual"."""
        if of not in self._ids:
            chain = self.changes if of == "residual" or self.gradient_changes is None else self.gradient_changes
            text = json.dumps([self.weights.digest(), *(change.spec() for change in chain)], sort_keys=True)
            self._ids[of] = hashlib.sha256(text.encode()).hexdigest()[:20]
        return self._ids[of]

    def chain(self, of: str) -> tuple[Change, ...]:
        """The changes under which gradients, or residuals, are taken."""
        if of == "gradient" and self.gradient_changes is not None:
            return self.gradient_changes
        return self.changes

    def check_positions(self, length: int) -> None:
        """Refuse a training set that lacks an example which the member was trained on.

        Raises:
            ValueError: says which.
        """
        last = -1 if self.trained_on is None else int(self.trained_on[-1])
        if last >= length:
            raise ValueError(
                f"{self.name} was trained on the example at {last}, and the training set has {length}; expected "
                "positions in the training set that is given here"
            )

    def unseen(self, length: int) -> Tensor:
        """(length,) bool: the training examples that it was not trained on."""
        out = torch.full((length,), self.trained_on is not None)
        if self.trained_on is not None:
            out[torch.from_numpy(self.trained_on)] = False
        return out

    @contextmanager
    def applied(self, model: nn.Module, of: str) -> Iterator[nn.Module]:
        """The model, which already holds the member's weights, under the member's changes."""
        with ExitStack() as stack:
            for change in self.chain(of):
                model = stack.enter_context(change.apply(model))
            yield model

    def selects(self, name: str) -> bool:
        """Whether a parameter of the changed model is attributed under this member's changes."""
        return all(change.selects(name) for change in self.chain("gradient"))

    def under(self, change: Change, label: str, forward_only: bool = False) -> Member:
        """This member under one more change; forward-only keeps the gradients as they were."""
        gradient = self.chain("gradient") if forward_only else (*self.chain("gradient"), change)
        split = forward_only or self.gradient_changes is not None
        return replace(
            self,
            name=f"{self.name}, {label}",
            changes=(*self.changes, change),
            gradient_changes=gradient if split else None,
            _ids={},
        )


class Ensemble(ABC):
    """An ordered list of members. ``a + b`` joins two; every kind takes another as its base."""

    kind: str = "ensemble"
    """What the literature calls it, in results and in the reports."""
    cost: Cost | None = None
    """What training its models cost, where `byline.train_ensemble` made it."""

    @abstractmethod
    def members(self) -> list[Member]:
        """The members, in order."""

    def validate(self, model: nn.Module) -> None:  # noqa: B027 - most ensembles fit every model
        """Refuse, before any work, what cannot be applied to the task's model."""

    def __len__(self) -> int:
        return len(self.members())

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members())

    def __add__(self, other: Ensemble) -> Ensemble:
        return Joined([self, as_ensemble(other, "the right-hand side of +")])

    def trained_models(self) -> int:
        """How many different trained models the members come from."""
        return len({member.model_index for member in self.members()})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} members from {self.trained_models()} trained models)"


class Joined(Ensemble):
    """The members of several ensembles, one after the other."""

    kind = "joined"

    def __init__(self, parts: Sequence[Ensemble]):
        self.parts = list(parts)

    def members(self) -> list[Member]:
        """Members with the trained models renumbered, their masks as they were."""
        out: list[Member] = []
        offset = 0
        for part in self.parts:
            members = part.members()
            out += [replace(m, model_index=m.model_index + offset, run=m.run + offset, _ids={}) for m in members]
            offset += max((m.model_index for m in members), default=-1) + 1
        return out

    def validate(self, model: nn.Module) -> None:
        """Validate every part."""
        for part in self.parts:
            part.validate(model)


def save_trained(model: nn.Module, path: str | Path) -> None:
    """Write what training changes as a ``.safetensors`` file: the trainable parameters, each once, and the buffers."""
    from safetensors.torch import save_file

    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state.update({name: value for name, value in model.state_dict().items() if name not in names})
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, path)


def as_ensemble(value: Any, name: str = "ensemble") -> Ensemble:
    """Accept an ensemble; refuse anything else in one sentence."""
    if not isinstance(value, Ensemble):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an ensemble such as byline.Independent([...])")
    if len(value) == 0:
        raise ValueError(f"{name} has no members; expected at least one")
    return value


def check_seed(seed: Any) -> int:
    """A seed is an int of at least 0."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed is {seed!r}; expected an int of at least 0")
    return seed


def check_count(value: Any, name: str) -> int:
    """A count is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected an int of at least 1")
    return value
