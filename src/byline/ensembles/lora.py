"""LORA ENSEMBLE: L low-rank fine-tunes of each trained model (arXiv 2405.17293, section 3.2), by PEFT.

A member's features are the gradients of its adapter's weights alone (rank · (inputs + outputs) per layer), so they are
as small as the adapter; the trained model's weights are kept once.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byline import batches
from byline.ensembles.base import Change, Ensemble, Member, Weights, as_ensemble, check_count, check_seed

if TYPE_CHECKING:
    from byline.task import Task

_SUPPORTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: its configuration (as PEFT writes it) and its tensors."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read a folder as PEFT writes it: ``adapter_config.json`` and ``adapter_model.safetensors``.

        Raises:
            FileNotFoundError: one of the two is missing (an ``adapter_model.bin`` would have to be unpickled).
        """
        from safetensors.torch import load_file

        folder = Path(path)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"adapter {folder} has no {name}; expected a folder as PEFT saves it")
        config = json.loads((folder / "adapter_config.json").read_text())
        return cls(config, load_file(folder / "adapter_model.safetensors"))

    @classmethod
    def of(cls, value: Any) -> Adapter:
        """An adapter as it comes: an `Adapter`, a folder as PEFT saves it, or a PEFT model with one adapter.

        Raises:
            TypeError: anything else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str | Path):
            return cls.load(value)
        if isinstance(value, nn.Module) and len(getattr(value, "peft_config", {})) == 1:
            from peft import get_peft_model_state_dict

            configs: Any = value.peft_config
            config, tensors = next(iter(configs.values())), get_peft_model_state_dict(value)
            plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
            return cls(json.loads(json.dumps(plain, default=str)), {k: v.detach().clone() for k, v in tensors.items()})
        raise TypeError(f"an adapter is a {type(value).__name__}; expected a folder as PEFT saves it or a PEFT model")

    def save(self, path: str | Path) -> None:
        """Write a folder that PEFT reads."""
        from safetensors.torch import save_file

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.tensors.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True))

    def digest(self) -> str:
        """SHA-256 of configuration and tensors."""
        return batches.digest_of([json.dumps(self.config, sort_keys=True, default=str), sorted(self.tensors.items())])


class AdapterChange(Change):
    """One adapter on the trained model."""

    def __init__(self, adapter: Adapter, name: str):
        self.adapter, self.name = adapter, name

    def spec(self) -> dict[str, Any]:
        """The adapter's content."""
        return {"adapter": self.adapter.digest()}

    def structure(self) -> str:
        """The layers that are adapted, and how."""
        return f"adapter {json.dumps(self.adapter.config, sort_keys=True, default=str)}"

    def selects(self, name: str) -> bool:
        """Only the adapter's weights are attributed."""
        return "lora_" in name

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """A copy of the model with the adapter injected."""
        changed = inject(model, self.adapter.config)
        own = {key for key, _ in changed.named_parameters() if self.selects(key)}
        given = {_inside(key): value for key, value in self.adapter.tensors.items()}
        if own != set(given):
            odd = sorted(own ^ set(given))[:4]
            raise ValueError(f"{self.name} does not fit the task's model; keys that differ: {', '.join(odd)}")
        state = dict(changed.named_parameters())
        with torch.no_grad():
            for key, value in given.items():
                if state[key].shape != value.shape:
                    raise ValueError(
                        f"{self.name} does not fit the task's model; {key} has shape {tuple(value.shape)} instead of "
                        f"{tuple(state[key].shape)}"
                    )
                state[key].copy_(value)
        yield changed


def _inside(key: str) -> str:
    """A name in PEFT's file as the name of the injected parameter."""
    key = key.removeprefix("base_model.model.")
    return re.sub(r"(lora_\w+?)(\.weight|\.bias)?$", lambda m: f"{m[1]}.default{m[2] or ''}", key)


def _outside(key: str) -> str:
    """The name of an injected parameter as PEFT writes it."""
    return "base_model.model." + key.replace(".default", "")


def inject(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """A copy of the model with LoRA layers in it, in eval mode; only they are trainable."""
    from peft import LoraConfig, inject_adapter_in_model

    known = {k: v for k, v in config.items() if k in LoraConfig.__dataclass_fields__ and v is not None}
    known.pop("peft_type", None)
    known["inference_mode"] = False
    changed = inject_adapter_in_model(LoraConfig(**known), copy.deepcopy(model))
    for name, parameter in changed.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return changed.eval()


class LoRA(Ensemble):
    """L adapters on each trained model.

    Args:
        base: the trained models.
        adapters: per trained model, a list of adapters: folders as PEFT saves them, PEFT models, or `Adapter` objects.
    """

    kind = "lora"

    def __init__(self, base: Ensemble, adapters: Sequence[Sequence[Any]]):
        self.base = as_ensemble(base, "base")
        if not isinstance(adapters, list | tuple) or not all(isinstance(a, list | tuple) for a in adapters):
            raise TypeError(
                "adapters must be a list of adapters per trained model, as in LoRA(base, adapters=[[a, b]])"
            )
        if len(adapters) != len(self.base):
            raise ValueError(f"adapters has {len(adapters)} lists; expected one per trained model, {len(self.base)}")
        if not all(len(a) for a in adapters):
            raise ValueError("adapters has an empty list; expected at least one adapter per trained model")
        self.adapters = [[Adapter.of(a) for a in row] for row in adapters]

    def members(self) -> list[Member]:
        """Adapter by adapter within each base member."""
        return [
            member.under(AdapterChange(adapter, f"adapter {number} of {member.name}"), f"adapter {number}")
            for member, row in zip(self.base.members(), self.adapters, strict=True)
            for number, adapter in enumerate(row)
        ]

    def validate(self, model: nn.Module) -> None:
        """Validate the base."""
        self.base.validate(model)


def lora_targets(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Names of the layers that get an adapter: those given, or all that PEFT supports and that are trainable."""
    names = [
        name
        for name, module in model.named_modules()
        if name
        and (isinstance(module, _SUPPORTED) or type(module).__name__ == "Conv1D")
        and getattr(module, "groups", 1) == 1
        and not (isinstance(module, nn.Embedding) and targets is None)
    ]
    if targets is not None:
        unknown = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
        if unknown:
            raise ValueError(f"targets names {unknown}; expected layers of the model among {names[:8]}")
        names = [n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)]
    if not names:
        raise ValueError("the model has no linear or convolutional layer inside it that LoRA could adapt")
    return names


def train_lora(
    task: Task,
    base: Ensemble,
    train_set: Any,
    adapters: int = 4,
    rank: int = 8,
    seed: int = 0,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    epochs: int = 3,
    lr: float = 1e-3,
    batch_size: int = 64,
    progress: bool = True,
) -> LoRA:
    """Fine-tune L low-rank adapters of each trained model and return them as an ensemble.

    Args:
        task: its loss is minimised; the model's own weights stay as they are.
        base: the trained models.
        train_set: map-style dataset of the training examples.
        adapters: L, per trained model; they differ in initialisation and in the order of the examples.
        rank: of the adapters.
        seed: of all of it.
        alpha: LoRA's scale (the update is ``alpha/rank · B A``); twice the rank by default.
        dropout: on the adapters' inputs while they are trained.
        targets: names of the adapted layers; every linear and convolutional layer by default.
        epochs: over the training set.
        lr: of AdamW.
        batch_size: examples per step.
        progress: show a progress bar.

    Returns:
        the ensemble; ``ensemble.adapters[i][l].save(folder)`` writes PEFT's format.
    """
    from byline.progress import track

    as_ensemble(base, "base")
    check_count(adapters, "adapters")
    check_count(rank, "rank")
    check_count(epochs, "epochs")
    check_seed(seed)
    data = batches.as_dataset(train_set, "train_set")
    names = lora_targets(task.model, targets)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "lora_dropout": dropout,
        # a regular expression, because a list would also match names that only end alike
        "target_modules": "|".join(re.escape(name) for name in names),
    }
    jobs = [(index, member, number) for index, member in enumerate(base.members()) for number in range(adapters)]
    rows: list[list[Adapter]] = [[] for _ in range(len(base))]
    for index, member, number in track(jobs, "training adapters", progress):
        if member.changes:
            raise ValueError(f"{member.name} is not a plain trained model; train adapters on Independent or Trajectory")
        rows[index].append(
            _train_one(task, member.weights, data, config, (seed, index, number), epochs, lr, batch_size)
        )
    return LoRA(base, rows)


def _train_one(
    task: Task,
    weights: Weights,
    data: Any,
    config: dict[str, Any],
    key: tuple[int, int, int],
    epochs: int,
    lr: float,
    batch_size: int,
) -> Adapter:
    number = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "little")
    with torch.random.fork_rng():
        torch.manual_seed(number)
        model = copy.deepcopy(task.model)
        weights.into(model)
        model = inject(model, config)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # LoRA starts as the identity; only its own layers are in train mode, so that statistics stay put
        for module in model.modules():
            if "lora" in type(module).__module__ or isinstance(module, nn.Dropout):
                module.train()
        optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
        n = len(data)
        steps = epochs * -(-n // batch_size)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=max(1, steps))
        for _ in range(epochs):
            order = torch.randperm(n).tolist()
            for start in range(0, n, batch_size):
                batch = batches.gather(data, order[start : start + batch_size])
                optimizer.zero_grad(set_to_none=True)
                task.loss(model, batch).mean().backward()
                optimizer.step()
                schedule.step()
    tensors = {_outside(name): p.detach().clone() for name, p in trained.items()}
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise ValueError(f"training the adapters diverged at lr={lr}; expected finite weights, try a smaller lr")
    return Adapter(config, tensors)


__all__ = ["Adapter", "LoRA", "train_lora"]
