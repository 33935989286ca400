"""LORA ENSEMBLE: L low-rank fine-tunes of each trained model (arXiv 2405.17293, section 3.2), by PEFT.

A member's features are the gradients of what its adapter brings and nothing else (of LoRA, rank · (inputs + outputs)
per layer), so they are as small as the adapter; the trained model's weights are kept once. PEFT puts adapters in and
fills them, whatever their kind; what it makes trainable is what counts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

from byline import batches
from byline.ensembles.base import (
    Change,
    Ensemble,
    Member,
    Weights,
    as_ensemble,
    check_count,
    check_seed,
    check_unmerged,
)
from byline.ensembles.copies import copied
from byline.guards import kept_random

if TYPE_CHECKING:
    from byline.task import Task

_SUPPORTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)

KINDS = (
    "ADALORA",
    "BOFT",
    "C3A",
    "FOURIERFT",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "LORA",
    "OFT",
    "TRAINABLE_TOKENS",
)
"""PEFT's adapters that live in the model's layers; each is held against PEFT's own model in the tests."""
_PREFIX = "base_model.model."
# what `init_lora_weights` may say for the base's weights to stay as they are
_HARMLESS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: its configuration (as PEFT writes it) and its tensors."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    base: str | None = None
    """Digest of the weights that it was trained on; None where that is not known."""

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read a folder as PEFT writes it: ``adapter_config.json`` and ``adapter_model.safetensors``.

        Raises:
            FileNotFoundError: one of the two is missing (an ``adapter_model.bin`` would have to be unpickled).
        """
        from safetensors import safe_open

        folder = Path(path)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"adapter {folder} has no {name}; expected a folder as PEFT saves it")
        config = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            _check_kind(config)
            return cls(config, tensors, (file.metadata() or {}).get("byline_base"))

    @classmethod
    def of(cls, value: Any, name: str | None = None) -> Adapter:
        """An adapter as it comes: an `Adapter`, a folder as PEFT saves it, or a PEFT model.

        Args:
            value: one of these.
            name: of the adapter in a PEFT model that holds several.

        Raises:
            TypeError: anything else.
            ValueError: a PEFT model with several adapters and no name, with a merged one, or none of that name.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str | Path):
            return cls.load(value)
        configs: Any = getattr(value, "peft_config", None)
        if not isinstance(value, nn.Module) or not configs:
            merged = " (merge_and_unload() leaves none)" if isinstance(value, nn.Module) else ""
            raise TypeError(
                f"an adapter is a {type(value).__name__}; expected a folder as PEFT saves it, or a PEFT model{merged}"
            )
        if name is None and len(configs) > 1:
            raise ValueError(
                f"a PEFT model holds the adapters {', '.join(map(repr, configs))}; expected one: take "
                f"byline.ensembles.lora.Adapter.of(model, {next(iter(configs))!r}), for each that is to be a member"
            )
        name = next(iter(configs)) if name is None else name
        if name not in configs:
            raise ValueError(f"no adapter {name!r} in the PEFT model; there are {', '.join(map(repr, configs))}")
        check_unmerged(value, "a PEFT model")
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in configs[name].to_dict().items()}
        config = json.loads(json.dumps(plain, default=str))
        _check_kind(config)
        return cls(config, _tensors(value, name))

    def save(self, path: str | Path) -> None:
        """Write a folder that PEFT reads."""
        from safetensors.torch import save_file

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"format": "pt", **({} if self.base is None else {"byline_base": self.base})}
        save_file({k: v.contiguous() for k, v in self.tensors.items()}, folder / "adapter_model.safetensors", about)
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

    brings = True

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the adapter injected; the base's weights are shared where nothing writes to them."""
        try:
            # PEFT draws first weights, which are overwritten
            with kept_random():
                changed = inject(model, self.adapter.config, self.adapter.tensors)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{self.name} does not fit the task's model: {said}") from error
        yield changed


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under the names that PEFT's files give them."""
    from peft import get_peft_model_state_dict

    # what PEFT would look up elsewhere is whether the embedding was resized, and then the base is another
    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {
        key if key.startswith(_PREFIX) else f"{_PREFIX}{key}": value.detach().clone() for key, value in found.items()
    }


def _check_kind(config: Mapping[str, Any]) -> None:
    """Refuse adapters that are not layers of the model, or that PEFT does not give back as they were."""
    kind, start = str(config.get("peft_type", "LORA")).rpartition(".")[2], config.get("init_lora_weights")
    if kind not in KINDS:
        raise ValueError(
            f"an adapter's peft_type is {kind!r}, which byline.LoRA cannot put into a model's layers; expected one "
            f"of {', '.join(KINDS)}, or the PEFT model itself as byline.Task(peft_model)"
        )
    if isinstance(start, str) and start not in _HARMLESS and start.lower() not in ("olora", "pissa"):
        raise ValueError(
            f"an adapter was trained on a base that init_lora_weights={start!r} had changed in a way that cannot be "
            "repeated; save it with save_pretrained(folder, path_initial_model_for_weight_conversion=...), which makes "
            "it an adapter of the unchanged base"
        )
    if config.get("alora_invocation_tokens"):
        raise ValueError(
            "an adapter has alora_invocation_tokens, which only PEFT's own model looks at; expected a plain LoRA, or "
            "the PEFT model itself as byline.Task(peft_model)"
        )


def inject(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy with an adapter's layers in it, in eval mode; what the adapter brings is trainable, and nothing else.

    Args:
        model: the base, which stays as it is. Its weights are shared unless the adapter writes to them.
        config: of the adapter, as PEFT writes it.
        tensors: of the adapter; without them it is as PEFT initialises it.

    Raises:
        ValueError: PEFT cannot put the adapter into this model, or the tensors are not those of such an adapter.
    """
    from peft import PeftType, inject_adapter_in_model, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    _check_kind(config)
    if getattr(model, "peft_config", None):
        raise ValueError(
            "it holds PEFT's layers already (get_peft_model changes the model it is given); expected the base without "
            "them, such as a copy.deepcopy from before, or what unload() gives"
        )
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    made_of = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    known = {k: v for k, v in config.items() if k in made_of.__dataclass_fields__ and v is not None}
    known.pop("peft_type", None)
    known["inference_mode"] = False
    given = dict(tensors or {})
    start = config.get("init_lora_weights")
    # PEFT writes to the base where it starts from its singular vectors, or where a file holds weights of its layers
    shares = kind == "LORA" and start in _HARMLESS and all("lora_" in key for key in given)
    changed = inject_adapter_in_model(made_of(**known), copied(model, _sharing(model) if shares else None))
    if tensors is not None:
        _fill(changed, given, set_peft_model_state_dict)
    return changed.eval()


def _fill(changed: nn.Module, given: dict[str, Tensor], load: Callable[..., Any]) -> None:
    """Have PEFT load an adapter's tensors, and see that all came to their places and no place is left."""
    names = {key.removeprefix(_PREFIX) for key in given}
    own = {key.removeprefix(_PREFIX): value for key, value in _tensors(changed, "default").items()}
    # a file may hold the base's embedding beside the adapter's
    odd = sorted((set(own) - names) | {name for name in names - set(own) if "base_layer" not in name})
    if odd:
        raise ValueError(f"keys that differ: {', '.join(odd[:4])}")
    # AdaLoRA's layers take the ranks that it ended with
    ranks = any("lora_E" in name for name in own)
    for key, value in given.items():
        name = key.removeprefix(_PREFIX)
        if name in own and not ranks and own[name].shape != value.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)} instead of {tuple(own[name].shape)}")
    found = load(changed, {key.removeprefix(_PREFIX): value for key, value in given.items()})
    if found.unexpected_keys:
        raise ValueError(f"keys that differ: {', '.join(sorted(found.unexpected_keys)[:4])}")


def _sharing(model: nn.Module) -> dict[int, Any]:
    """A memo for ``deepcopy`` under which a copy has parameters of its own that hold the model's numbers."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    # deepcopy keeps alive what it has made under this key, and what is only in values would be lost to reused ids
    memo[id(memo)] = list(memo.values())
    return memo


def base_digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters, each once, by which an adapter knows the model that it was trained on."""
    return batches.digest_of(sorted((name, p.detach()) for name, p in model.named_parameters()))


class LoRA(Ensemble):
    """L adapters on each trained model.

    Args:
        base: the trained models.
        adapters: per trained model, a list of adapters: folders as PEFT saves them, PEFT models, or `Adapter` objects.

    Raises:
        ValueError: when fitted, an adapter whose layers the model does not have, or one that `train_lora` trained on
            other weights.
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

    def save(self, folder: str | Path) -> list[list[Path]]:
        """Write every adapter as PEFT does, into ``folder/model-0/adapter-0`` and so on.

        Returns:
            the folders, per trained model: what ``LoRA(base, adapters=...)`` takes.
        """
        places = [
            [Path(folder) / f"model-{i}" / f"adapter-{number}" for number in range(len(row))]
            for i, row in enumerate(self.adapters)
        ]
        for row, own in zip(self.adapters, places, strict=True):
            for adapter, place in zip(row, own, strict=True):
                adapter.save(place)
        return places

    def validate(self, model: nn.Module) -> None:
        """Validate the base, and hold the adapters against it."""
        self.base.validate(model)
        seen: set[tuple[Any, ...]] = set()
        for member in self.members():
            change = member.changes[-1]
            assert isinstance(change, AdapterChange)
            form = change.structure(), *sorted((k, tuple(v.shape)) for k, v in change.adapter.tensors.items())
            if form not in seen and not any(one.brings for one in member.changes[:-1]):
                seen.add(form)
                with change.apply(model):
                    pass
        known = [
            (m, row) for m, row in zip(self.base.members(), self.adapters, strict=True) if any(a.base for a in row)
        ]
        if not known:
            return
        scratch = copied(model)
        for member, row in known:
            member.weights.check(model)
            member.weights.into(scratch, model)
            own = base_digest(scratch)
            for number, adapter in enumerate(row):
                if adapter.base not in (None, own):
                    raise ValueError(
                        f"adapter {number} of {member.name} was trained on another base: its weights are "
                        f"{str(adapter.base)[:12]}…, those of {member.name} {own[:12]}…"
                    )


def lora_targets(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Names of the layers that get an adapter: those given, or all that PEFT supports.

    Without ``targets``, embeddings are left out, and so is the head of a language model: an adapter on it is as wide as
    the vocabulary.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    names = [
        name
        for name, module in model.named_modules()
        if name
        and not (module is head and targets is None)
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
    seed: int | Sequence[int] = 0,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | str | None = None,
    epochs: int = 3,
    lr: float = 1e-3,
    batch_size: int = 64,
    collate: Callable[[list[Any]], Any] | None = None,
    progress: bool = True,
) -> LoRA:
    """Fine-tune L low-rank adapters of each trained model and return them as an ensemble.

    Args:
        task: its loss is minimised; the model's own weights stay as they are.
        base: the trained models.
        train_set: map-style dataset of the training examples; each model's adapters are trained on those that the model
            was trained on (`byline.CrossFit`).
        adapters: L, per trained model; they differ in initialisation and in the order of the examples.
        rank: of the adapters.
        seed: of all of it; a list gives each of the L adapters its own.
        alpha: LoRA's scale (the update is ``alpha/rank · B A``); twice the rank by default.
        dropout: on the adapters' inputs while they are trained.
        targets: names of the adapted layers, or their last parts (``["c_attn"]``, ``"q_proj"``); every linear and
            convolutional layer by default, but for a language model's head.
        epochs: over the training set.
        lr: of AdamW.
        batch_size: examples per step.
        collate: makes a batch of a list of items; the dataset's own ``collate_fn``, or torch's default.
        progress: show a progress bar.

    Returns:
        the ensemble; ``ensemble.save(folder)`` writes PEFT's format.

    Raises:
        ValueError: an argument out of its range, layers that the model does not have, or training that diverges.
    """
    from byline.progress import track

    as_ensemble(base, "base")
    check_count(adapters, "adapters")
    check_count(rank, "rank")
    check_count(epochs, "epochs")
    check_count(batch_size, "batch_size")
    if isinstance(seed, list | tuple):
        if len(seed) != adapters or len(set(seed)) != adapters:
            raise ValueError(f"seed is {list(seed)}; expected {adapters} different ones, one per adapter")
        keys = [(check_seed(one), 0) for one in seed]
    else:
        keys = [(check_seed(seed), number) for number in range(adapters)]
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; expected a number from 0 to below 1")
    for name, value in (("lr", lr), ("alpha", 1 if alpha is None else alpha)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value!r}; expected a finite number above 0")
    targets = [targets] if isinstance(targets, str) else targets
    data = batches.as_dataset(train_set, "train_set")
    for member in base.members():
        member.check_positions(len(data))
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
        key = (keys[number][0], index, keys[number][1])
        make = default_collate if collate is None else collate
        # an adapter must not see what its model was kept from
        own = data if member.trained_on is None else Subset(data, member.trained_on.tolist())
        rows[index].append(_train_one(task, member.weights, own, config, key, epochs, lr, batch_size, make))
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
    collate: Callable[[list[Any]], Any],
) -> Adapter:
    number = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "little")
    with kept_random(None):
        torch.manual_seed(number)
        model = copied(task.model)
        weights.into(model)
        base = base_digest(model)
        model = inject(model, config)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # LoRA starts as the identity; only its own layers are in train mode, so that statistics stay put
        for module in model.modules():
            if "lora" in type(module).__module__ or isinstance(module, nn.Dropout):
                module.train()
        optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
        device = next(iter(trained.values())).device
        n = len(data)
        steps = epochs * -(-n // batch_size)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=max(1, steps))
        for _ in range(epochs):
            order = torch.randperm(n).tolist()
            for start in range(0, n, batch_size):
                batch = batches.to(batches.gather(data, order[start : start + batch_size], collate), device)
                optimizer.zero_grad(set_to_none=True)
                task.loss(model, batch).mean().backward()
                optimizer.step()
                schedule.step()
    tensors = _tensors(model, "default")
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise ValueError(f"training the adapters diverged at lr={lr}; expected finite weights, try a smaller lr")
    return Adapter(config, tensors, base)


__all__ = ["Adapter", "LoRA", "train_lora"]
