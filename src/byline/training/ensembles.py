"""Any ensemble, trained from scratch by one recipe."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from byline import batches
from byline.engines.base import Engine
from byline.ensembles import CrossFit, Ensemble, Independent, Trajectory, folds
from byline.ensembles.base import StateDict, check_count, check_seed
from byline.ensembles.copies import copied, remade
from byline.ledger import Cost, Ledger
from byline.store.files import Local
from byline.task import Task, source_of
from byline.training.batched import Build, Run, train_many
from byline.training.data import derive
from byline.training.recipe import Recipe

KINDS = ("independent", "trajectory", "crossfit", "snapshot")

_SEED, _SHARE = 4, 5  # name random streams, see `derive`


def train_ensemble(
    task: Task,
    train_set: Any,
    recipe: Recipe,
    kind: str = "independent",
    *,
    models: int | None = None,
    checkpoints: int | Sequence[int] | None = None,
    parts: int = 2,
    validation: Any = None,
    patience: int = 3,
    seed: int = 0,
    build: Build | None = None,
    folder: str | os.PathLike[str] | None = None,
    ledger: Ledger | None = None,
    group: int = 25,
    batched: bool | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
    engine: str | Engine | None = None,
) -> Ensemble:
    """Trains the models of an ensemble, many at a time where they are small.

    Args:
        task: its loss is minimised; its model says how models are built. The model's own weights are not used.
        train_set: map-style dataset, read once; the one that is attributed later.
        recipe: how each run is trained.
        kind: which ensemble:

            - "independent": ``models`` runs, the last weights of each.
            - "trajectory": ``checkpoints`` along each of ``models`` runs.
            - "crossfit": ``models`` runs, each on all but one of ``parts`` folds, so that every example has members
              that never saw it (`byline.CrossFit`); with ``checkpoints``, several along each.
            - "snapshot": ``models`` runs of a cyclic learning rate, the weights at the end of each of ``checkpoints``
              cycles (Huang et al. 2017). A recipe that is cyclic itself says how many.
        models: 1 by default, ``parts`` for "crossfit", where it is a multiple of them: each multiple splits anew.
        checkpoints: how many of each run, evenly spaced over its epochs (5 by default for "trajectory" and
            "snapshot"), or their epochs, counted from 1.
        parts: folds of "crossfit".
        validation: when training stops, by the loss of examples that are not trained on:

            - None: after ``recipe.epochs``.
            - "fold": of the fold that a run leaves out; for "crossfit" alone.
            - a number between 0 and 1: of that share of the training set, another for each run. What comes back is a
              `CrossFit`, whose members know it.
            - a dataset.

            A run's last weights are those of the epoch with the lowest loss, and its checkpoints are spaced over the
            epochs up to there.
        patience: epochs without a lower loss that end a run.
        seed: of all of it.
        build: makes a fresh model, taking its random numbers from torch's global generator; by default a copy of the
            task's model, whose layers are reset (``reset_parameters``), which is what they were when they were made
            unless the model initialises them in a way of its own.
        folder: where weights are kept as ``.safetensors``; a second call with the same arguments finds them, and goes
            on where the first was interrupted. None keeps them in memory.
        ledger: is told what training cost.
        group: how many models are trained at once.
        batched: as of `byline.train_many`, and so are the arguments that follow.
        collate: makes a batch of a list of items.
        device: where to train.
        progress: show a bar.
        engine: where models are trained.

    Returns:
        the ensemble; its ``cost`` is that of training it.

    Raises:
        ValueError: arguments that do not fit together, a folder of another ensemble, or training that diverges.
        TypeError: ``task`` or ``recipe`` is something else.
    """
    if not isinstance(task, Task):
        raise TypeError(f"task is a {type(task).__name__}; expected a byline.Task")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe is a {type(recipe).__name__}; expected a byline.Recipe")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(map(repr, KINDS))}")
    data = batches.as_dataset(train_set, "train_set")
    length, runs = len(data), _runs(kind, models, parts)
    recipe, epochs = _epochs(kind, recipe, checkpoints, validation is not None)
    check_seed(seed)
    check_count(group, "group")
    # a mended function makes other models, and its old ones must not be taken for them
    made_by = {"build": None if build is None else source_of(build)}
    made_by["collate"] = None if collate is None else source_of(collate)
    build = fresh(task.model) if build is None else build
    subsets, held, other = _splits(kind, length, runs, parts, validation, seed)

    stopping = validation is not None
    # with early stopping, which epochs are wanted is known afterwards
    kept = range(1, recipe.epochs + 1) if stopping and epochs is not None else epochs
    options: dict[str, Any] = {
        "checkpoints": kept,
        "validation_set": other,
        "patience": patience,
        "group": group,
        "batched": batched,
        "collate": collate,
        "device": device,
        "progress": progress,
        "engine": engine,
    }
    config = {
        "task": task.fingerprint(),
        "train_set": batches.fingerprint(data),
        "validation_set": None if other is None else batches.fingerprint(batches.as_dataset(other, "validation")),
        "recipe": recipe.to_dict(),
        "kind": kind,
        "runs": runs,
        "epochs": epochs if epochs is None else list(epochs),
        "subsets": None if subsets is None else [one.tolist() for one in subsets],
        "held": None if held is None else [one.tolist() for one in held],
        "patience": patience if stopping else None,
        "seed": seed,
        "group": group,
        "batched": batched,
        **{name: made for name, made in made_by.items() if made is not None},
    }
    shelf = _Shelf(folder, config)
    seeds = [derive(seed, i, _SEED) for i in range(runs)]
    done: list[tuple[list[Any], Cost]] = []
    for start in range(0, runs, group):
        span = slice(start, min(runs, start + group))
        found = shelf.find(span)
        if found is None:
            made = train_many(
                build,
                data,
                recipe,
                task_loss=task.loss,
                seeds=seeds[span],
                subsets=None if subsets is None else subsets[span],
                held_out=None if held is None else held[span],
                **options,
            )
            found = shelf.keep(start, [_chosen(run, epochs, stopping) for run in made])
        done += found
    cost = sum((one for _, one in done), Cost())
    if ledger is not None:
        ledger.add("training", cost)
    weights = [states for states, _ in done]
    ensemble: Ensemble = Independent([states[-1] for states in weights]) if epochs is None else Trajectory(weights)
    if subsets is not None:
        ensemble = CrossFit(ensemble, subsets)
    ensemble.cost = cost
    return ensemble


def fresh(model: nn.Module) -> Build:
    """What builds a model like this one, with new weights.

    Raises:
        ValueError: a module that has parameters of its own and no ``reset_parameters``.
    """
    odd = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None and (_reset(module) is None or remade(module))
    ]
    if odd:
        raise ValueError(
            f"the model's {', '.join(odd[:3])} cannot be initialised anew, for it has no reset_parameters of its own "
            "weights; expected build=, a function that makes a fresh model"
        )
    template = copied(model)

    def build() -> nn.Module:
        made = copied(template)
        for module in _inside_first(made, set()):
            reset = _reset(module)
            if reset is not None:
                reset()
        return made.train()

    return build


def _inside_first(module: nn.Module, known: set[nn.Module]) -> Iterator[nn.Module]:
    """Modules as constructors initialise them: an attention zeroes the bias of the layer inside it, afterwards."""
    known.add(module)
    for child in module.children():
        if child not in known:
            yield from _inside_first(child, known)
    yield module


def _reset(module: nn.Module) -> Callable[[], None] | None:
    # nn.MultiheadAttention's has an underscore
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _runs(kind: str, models: int | None, parts: int) -> int:
    if kind != "crossfit":
        return 1 if models is None else check_count(models, "models")
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 2:
        raise ValueError(f"parts is {parts!r}; expected a whole number of at least 2")
    runs = parts if models is None else check_count(models, "models")
    if runs % parts:
        raise ValueError(f"models is {runs}; expected a multiple of parts, {parts}, so that each example is left out")
    return runs


def _epochs(
    kind: str, recipe: Recipe, checkpoints: int | Sequence[int] | None, stopping: bool
) -> tuple[Recipe, list[int] | None]:
    """The recipe, and the epochs that are kept; None for the last weights alone."""
    if kind == "independent":
        if checkpoints is not None:
            raise ValueError(f"checkpoints is {checkpoints!r}; an independent ensemble has the last weights alone")
        return recipe, None
    if kind == "snapshot":
        if stopping:
            raise ValueError(
                "validation is given, and a snapshot's checkpoints are the ends of its cycles; expected None"
            )
        if checkpoints is not None and not isinstance(checkpoints, int):
            raise ValueError(f"checkpoints is {checkpoints!r}; expected the number of cycles")
        if recipe.schedule != "cyclic":
            cycles = check_count(5 if checkpoints is None else checkpoints, "checkpoints")
            recipe = replace(recipe, schedule="cyclic", cycles=cycles)
        elif checkpoints is not None and checkpoints != recipe.cycles:
            raise ValueError(f"checkpoints is {checkpoints}, and the recipe has {recipe.cycles} cycles")
        return recipe, recipe.cycle_ends
    if checkpoints is None:
        if kind == "crossfit":
            return recipe, None
        checkpoints = min(5, recipe.epochs)
    if not isinstance(checkpoints, int | list | tuple | range) or not all(
        isinstance(epoch, int) for epoch in (checkpoints if not isinstance(checkpoints, int) else ())
    ):
        raise ValueError(f"checkpoints is {checkpoints!r}; expected a whole number, or a list of epochs")
    if isinstance(checkpoints, int):
        if check_count(checkpoints, "checkpoints") > recipe.epochs:
            raise ValueError(f"checkpoints is {checkpoints}; expected at most the {recipe.epochs} epochs of the recipe")
        return recipe, spaced(checkpoints, recipe.epochs)
    if stopping:
        raise ValueError(f"checkpoints is {checkpoints!r}; with validation expected their number, or None")
    found = sorted(set(checkpoints))
    if not found or not 1 <= found[0] <= found[-1] <= recipe.epochs:
        raise ValueError(f"checkpoints is {checkpoints!r}; expected epochs from 1 to {recipe.epochs}")
    return recipe, found


def spaced(count: int, epochs: int) -> list[int]:
    """At most so many epochs, evenly spaced, the last one among them."""
    return sorted({max(1, round(epochs * (i + 1) / count)) for i in range(count)})


def _splits(
    kind: str, length: int, runs: int, parts: int, validation: Any, seed: int
) -> tuple[list[np.ndarray] | None, list[np.ndarray] | None, Any]:
    """For each run what it is trained on and what tells it when to stop; or a dataset that tells all."""
    subsets = folds(length, parts, runs // parts, seed) if kind == "crossfit" else None
    if validation is None:
        return subsets, None, None
    every = np.arange(length)
    if isinstance(validation, str):
        if validation != "fold" or subsets is None:
            raise ValueError(f"validation is {validation!r}; expected 'fold' (for a crossfit), a share or a dataset")
        return subsets, [np.setdiff1d(every, own) for own in subsets], None
    if isinstance(validation, bool | int | float):
        if isinstance(validation, bool) or not 0 < validation < 1:
            raise ValueError(f"validation is {validation!r}; expected a share between 0 and 1")
        whole = [every] * runs if subsets is None else subsets
        held = []
        for i, own in enumerate(whole):
            count = max(1, round(validation * len(own)))
            if count >= len(own):
                raise ValueError(f"validation is {validation!r} of {len(own)} examples, which leaves none to train on")
            held.append(np.sort(np.random.default_rng([seed, i, _SHARE]).choice(own, count, replace=False)))
        return [np.setdiff1d(own, out) for own, out in zip(whole, held, strict=True)], held, None
    return subsets, None, validation


def _chosen(run: Run, epochs: list[int] | None, stopping: bool) -> tuple[list[StateDict], Cost]:
    """The weights of a run that are kept, and what the run cost."""
    wanted = epochs if epochs is None or not stopping else spaced(len(epochs), run.epoch)
    states = [run.state_dict] if wanted is None else [run.checkpoints[epoch] for epoch in wanted]
    size = sum(tensor.numel() * tensor.element_size() for state in states for tensor in state.values())
    return states, replace(run.cost, bytes=size)


class _Shelf:
    """Runs in a folder, or nothing at all."""

    def __init__(self, folder: str | os.PathLike[str] | None, config: dict[str, Any]):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        text = json.dumps(config, sort_keys=True)
        digest, record = hashlib.sha256(text.encode()).hexdigest(), self.folder / "ensemble.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"folder is {self.folder}, which is a file; expected a folder, or a new name")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            _write(record, {"sha256": digest, "config": config})
        elif _digest_in(record) != digest:
            raise ValueError(
                f"folder {self.folder} holds an ensemble of another task, training set, recipe or arguments; expected "
                "an empty folder, or the arguments it was made with"
            )

    def find(self, span: slice) -> list[tuple[list[Any], Cost]] | None:
        """The runs at these places, if all of them are there."""
        if self.folder is None:
            return None
        records = [self.folder / f"run-{i}" / "run.json" for i in range(span.start, span.stop)]
        if not all(record.is_file() for record in records):
            return None
        found = []
        for record in records:
            kept = json.loads(record.read_text(encoding="utf-8"))
            found.append(([record.parent / name for name in kept["files"]], Cost(**kept["cost"])))
        return found

    def keep(self, start: int, runs: list[tuple[list[StateDict], Cost]]) -> list[tuple[list[Any], Cost]]:
        """Runs from a place on: as files, where there is a folder."""
        if self.folder is None:
            return list(runs)
        from safetensors.torch import save_file

        for i, (states, cost) in enumerate(runs, start):
            place = self.folder / f"run-{i}"
            place.mkdir(exist_ok=True)
            files = [f"checkpoint-{c}.safetensors" for c in range(len(states))]
            for name, state in zip(files, states, strict=True):
                # tied weights are two keys with one content
                save_file({key: value.clone() for key, value in state.items()}, place / name)
            # written last: a run counts when all of it is there
            _write(place / "run.json", {"files": files, "cost": asdict(cost)})
        found = self.find(slice(start, start + len(runs)))
        assert found is not None
        return found


def _digest_in(record: Path) -> str:
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{record} is damaged; delete it with the runs beside it, or take another folder") from None


def _write(path: Path, content: dict[str, Any]) -> None:
    Local(path.parent).write(path.name, json.dumps(content).encode())


__all__ = ["fresh", "spaced", "train_ensemble"]
