"""Retraining on random subsets: the one way to know what training on an example really did."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from byline import batches
from byline.batches import Batch
from byline.engines.base import Engine, Work, as_engine
from byline.ensembles.copies import copied
from byline.evaluate.bank import Bank, read, write
from byline.evaluate.measure import is_whole
from byline.ledger import Cost, Ledger
from byline.progress import Advance, bar
from byline.training import Run, Trainer
from byline.training.data import derive, fetch

TrainFn = Callable[[Any, int], "nn.Module | Mapping[str, Tensor] | Run"]

_PART = 25  # models in a part when the training function does not say how many it trains at once


class HasOutput(Protocol):
    """What is needed of a `byline.Task`."""

    model: nn.Module

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        """The output of each example, (B,)."""
        ...


def retrain(
    train_fn: TrainFn,
    train_set: Any,
    *,
    test_set: Any,
    task: HasOutput,
    subsets: int | np.ndarray = 50,
    fraction: float = 0.5,
    seeds: int = 2,
    seed: int = 0,
    path: str | Path | None = None,
    batch_size: int = 256,
    progress: bool = True,
    engine: str | Engine | None = None,
) -> Bank:
    """Trains models on random subsets and records what they say of each test example.

    The subsets are drawn from `seed` alone, all of size ``round(fraction * n_train)``. Every model has a seed
    of its own, so two subsets share no initial weights; that noise is what the noise ceiling of `byline.lds`
    measures.

    Args:
        train_fn: ``train_fn(subset_dataset, seed)``, giving a module, or a state_dict for ``task.model``. If
            it has ``many(train_set, list of index arrays, list of seeds)``, as `byline.training.Trainer`
            does, that is called with a part of the models at a time and gives a list.
        train_set: Map-style dataset the subsets are drawn from.
        test_set: Map-style dataset whose outputs are recorded.
        task: The task; its output is what is recorded, in eval mode.
        subsets: Number of random subsets, S; or the subsets themselves, a NumPy array (S, n_train) bool, of any
            sizes but 0.
        fraction: Size of a random subset as a share of the training set, between 0 and 1; unused where the subsets
            are given.
        seeds: Models a subset, R.
        seed: What subsets and models are drawn from.
        path: File of the finished bank (``….safetensors``). While it is made, finished parts lie beside it in
            the folder ``<path>.parts``; a second call trains only what is missing, and gives the same outputs
            bit for bit.
        batch_size: Test examples at a time.
        progress: Whether to show a bar.
        engine: Where parts are trained: in this process, ``"ray"`` or `byline.engines.Ray`. The outputs are the same
            bit for bit where a process has as many threads as this one.

    Returns:
        The bank.

    Raises:
        ValueError: If an argument is out of range, an output is not finite, or `path` holds a bank (or parts
            of one) made otherwise; the message names the first difference.
    """
    train_set, where = batches.as_dataset(train_set, "train_set"), as_engine(engine)
    n_train = len(train_set)
    if not is_whole(seeds, 1):
        raise ValueError(f"seeds={seeds!r}: expected a whole number of at least 1")
    masks = _subsets(subsets, n_train, fraction, seed)
    given = isinstance(subsets, np.ndarray)
    seeds = int(seeds)
    test = fetch(test_set, "test_set", getattr(train_fn, "collate", None))
    made = {
        "subsets": hashlib.sha256(np.packbits(masks).tobytes()).hexdigest()[:16] if given else len(masks),
        "fraction": None if given else fraction,
        "seeds": seeds,
        "seed": seed,
        "n_train": n_train,
        "n_test": len(test_set),
        "train_fn": _describe(train_fn),
        "task": _task(task),
        "train_set": batches.fingerprint(train_set),
        "test_set": batches.fingerprint(test_set),
    }
    if path is not None and Path(path).exists():
        bank = Bank.load(path)
        _same(made, bank.metadata, path)
        return bank

    models = [(s, r) for s in range(len(masks)) for r in range(seeds)]
    step = getattr(train_fn, "group", _PART)
    parts = [models[start : start + step] for start in range(0, len(models), step)]
    folder = None if path is None else Path(f"{path}.parts")
    files = [folder and folder / f"{number:05d}.safetensors" for number in range(len(parts))]
    done: dict[int, tuple[np.ndarray, Cost]] = {}
    with bar(len(models), f"retraining {len(models)} models", progress) as advance:
        for number, file in enumerate(files):
            if file and file.exists():
                arrays, metadata = read(file)
                _same(made, metadata, folder)
                done[number] = arrays["outputs"], Cost(**metadata["cost"])
                advance(len(parts[number]))
        missing = [number for number in range(len(parts)) if number not in done]

        def take(place: int, result: tuple[np.ndarray, Cost]) -> None:
            number, (outputs, cost) = missing[place], result
            for (s, r), row in zip(parts[number], outputs, strict=True):
                if not np.isfinite(row).all():
                    bad = int(np.flatnonzero(~np.isfinite(row))[0])
                    raise ValueError(f"the model of subset {s}, seed {r} gives {row[bad]} for test example {bad}")
            file = files[number]
            if file:
                write(file, {"outputs": outputs}, {**made, "cost": asdict(cost)})
            done[number] = outputs, cost

        work = _Retraining(train_fn, train_set, task, test, masks, seed, batch_size)
        where.run(work, [[parts[number] for number in missing]], take, advance)
    total = sum((done[number][1] for number in range(len(parts))), Cost())
    outputs = np.concatenate([done[number][0] for number in range(len(parts))]).reshape(len(masks), seeds, -1)
    bank = Bank(masks, outputs, {**made, "cost": asdict(total)})
    if path is not None and folder is not None:
        bank.save(path)
        shutil.rmtree(folder)
    return bank


def _subsets(subsets: int | np.ndarray, n_train: int, fraction: float, seed: int) -> np.ndarray:
    """(S, n_train) bool: drawn, or as given."""
    if isinstance(subsets, np.ndarray):
        if subsets.ndim != 2 or subsets.dtype != bool or subsets.shape[1] != n_train or not len(subsets):
            raise ValueError(f"subsets: got {subsets.dtype} {subsets.shape}; expected bool (subsets, {n_train})")
        if not subsets.any(1).all():
            empty = int((~subsets.any(1)).argmax())
            raise ValueError(f"subsets: number {empty} is empty; expected at least one example in each")
        return subsets.copy()
    if not is_whole(subsets, 1):
        got = repr(subsets) if isinstance(subsets, int | float | str) else type(subsets).__name__
        raise ValueError(
            f"subsets: got {got}; expected a whole number of at least 1, or a bool array (subsets, {n_train})"
        )
    size = round(fraction * n_train)
    if not 0 < size < n_train:
        raise ValueError(
            f"fraction={fraction!r}: gives subsets of {size} of {n_train} examples; expected some, not all"
        )
    return draw_subsets(n_train, int(subsets), size, seed)


def draw_subsets(n_train: int, subsets: int, size: int, seed: int) -> np.ndarray:
    """Random subsets, (subsets, n_train) bool, `size` True in each row; row s depends on (seed, s) alone."""
    masks = np.zeros((subsets, n_train), dtype=bool)
    for s in range(subsets):
        masks[s, np.random.default_rng([seed, s]).choice(n_train, size, replace=False)] = True
    return masks


@dataclass
class _Retraining(Work):
    """Parts of a bank as pieces of work."""

    train_fn: Any
    train_set: Any
    task: HasOutput
    test: Batch
    masks: np.ndarray
    seed: int
    batch_size: int
    what = "train_fn, task, train_set and test_set"

    def do(self, piece: list[tuple[int, int]], advance: Advance) -> tuple[np.ndarray, Cost]:
        """Train the models of a part: their outputs, and what they cost."""
        members = [(np.flatnonzero(self.masks[s]), derive(self.seed, s, r)) for s, r in piece]
        return _train_part(self.train_fn, self.train_set, self.task, self.test, members, self.batch_size, advance)

    def steps(self, piece: list[tuple[int, int]]) -> float:
        """Models."""
        return len(piece)


def _train_part(
    train_fn: Any,
    train_set: Any,
    task: HasOutput,
    test: Batch,
    members: list[tuple[np.ndarray, int]],
    batch_size: int,
    advance: Callable[[float], None],
) -> tuple[np.ndarray, Cost]:
    """Trains these models: their outputs, (members, n_test), and what the training cost."""
    ledger = Ledger()
    with ledger.phase("training"):
        results = train_each(train_fn, train_set, members, advance)
    cost = ledger.training
    cost.flops = sum(result.flops for result in results if isinstance(result, Run))
    outputs = np.stack([_outputs(task, result, test, batch_size) for result in results])
    return outputs, cost


def train_each(
    train_fn: Any, train_set: Any, members: list[tuple[np.ndarray, int]], advance: Callable[[float], None]
) -> list[Any]:
    """What a training function gives for each (places in the training set, seed)."""
    if hasattr(train_fn, "many"):
        options = {"progress": advance} if isinstance(train_fn, Trainer) else {}
        results = train_fn.many(train_set, [index for index, _ in members], [seed for _, seed in members], **options)
        if not options:
            advance(len(members))
    else:
        results = []
        for index, seed in members:
            results.append(train_fn(Subset(train_set, index.tolist()), seed))
            advance(1)
    if len(results) != len(members):
        raise ValueError(f"train_fn.many: got {len(results)} models for {len(members)} seeds; expected one for each")
    return results


def _outputs(task: HasOutput, trained: Any, test: Batch, batch_size: int) -> np.ndarray:
    """A trained model's outputs, (n_test,) float32."""
    model = model_of(task, trained)
    with torch.no_grad():
        spans = batches.spans(batches.size(test), batch_size)
        parts = [task.output(model, batches.take(test, *span)).cpu().float() for span in spans]
    return torch.cat(parts).numpy()


def model_of(task: HasOutput, trained: Any) -> nn.Module:
    """What a training function gave, as a model in eval mode.

    Raises:
        ValueError: It is neither a module nor a state_dict.
    """
    if isinstance(trained, Run):
        trained = trained.state_dict
    if isinstance(trained, Mapping):
        model = copied(task.model)
        model.load_state_dict(dict(trained))
    elif isinstance(trained, nn.Module):
        model = trained
    else:
        raise ValueError(f"train_fn: got {type(trained).__name__}; expected a module or a state_dict")
    return model.eval()


def _same(made: dict[str, Any], found: dict[str, Any], path: str | Path | None) -> None:
    """Refuses what was made otherwise, naming the first difference."""
    for name, value in made.items():
        if found.get(name) != value:
            ours, theirs = _difference(value, found.get(name))
            raise ValueError(f"{path} was made with {name} {theirs}, not {ours}: choose another path or remove it")


def _difference(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """The first values inside two descriptions that differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in (*ours, *theirs):
            if ours.get(key) != theirs.get(key):
                inner = _difference(ours.get(key), theirs.get(key))
                return f"{key} {inner[0]}", f"{key} {inner[1]}"
    return ours, theirs


def _describe(train_fn: Any) -> Any:
    """What can be known of a training function: its own description, else its name."""
    if hasattr(train_fn, "describe"):
        return train_fn.describe()
    named = train_fn if hasattr(train_fn, "__qualname__") else type(train_fn)
    return f"{named.__module__}.{named.__qualname__}"


def _task(task: Any) -> Any:
    return task.fingerprint() if hasattr(task, "fingerprint") else type(task).__qualname__
