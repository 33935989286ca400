"""The run folder of a comparison: what was made is kept, and made only once.

Everything lies in a file that is named after a hash of all that decides its content, and appears whole or not
at all. So an interrupted comparison goes on where it stopped, and one with another configuration never takes
what was made for this one: it makes its own, beside it.

    models/<key>.safetensors      trained models, one call of the trainer, with what each cost
    adapters/<key>/<i>-<l>/       LoRA adapters as PEFT writes them, and cost.json
    bank-<key>.safetensors        the ground truth
    rows/<key>.json               a finished row
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import byline
from byline.batches import fingerprint
from byline.engines.base import Engine, InProcess, as_engine
from byline.ensembles import Independent
from byline.ensembles.lora import Adapter, inject, train_lora
from byline.evaluate.bank import Bank, read, write
from byline.evaluate.retraining import retrain
from byline.ledger import Cost, Ledger, count_flops
from byline.methods import Attributor
from byline.settings.base import BankRecipe, Setting
from byline.training.batched import learning_rates
from byline.training.data import fetch, take

StateDict = dict[str, Tensor]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """A trained model or run: weights by epoch (the last is the model), and what all of it cost."""

    weights: tuple[StateDict, ...]
    cost: Cost

    @property
    def state(self) -> StateDict:
        """The final weights."""
        return self.weights[-1]


class Workshop:
    """Makes, keeps and hands out the parts of a comparison.

    Args:
        setting: What is compared.
        folder: Where parts are kept.
        tell: Gets a sentence about each part that was made or found.
        progress: Whether to show bars.
        engine: Where work is done.
    """

    def __init__(
        self,
        setting: Setting,
        folder: str | os.PathLike[str],
        tell: Tell,
        progress: bool,
        engine: str | Engine | None = None,
    ) -> None:
        self.engine = as_engine(engine)
        self.setting, self.folder, self.tell, self.progress = setting, Path(folder), tell, progress
        self.identity = {
            "byline": byline.__version__,
            "setting": setting.name,
            "trainer": setting.trainer().describe(),
            "train": fingerprint(setting.train_set),
            "test": fingerprint(setting.test_set),
        }

    def key(self, **what: Any) -> str:
        """The name of a part: a hash of the setting and of `what` it is."""
        text = json.dumps({**self.identity, **what}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def models(self, count: int) -> list[Trained]:
        """Fully trained models."""
        return self._train(count, self.setting.recipe.epochs, None)

    def runs(self, count: int, checkpoints: int) -> list[Trained]:
        """Runs of as many epochs as checkpoints, one kept after each."""
        return self._train(count, checkpoints, tuple(range(1, checkpoints + 1)))

    def step_sizes(self, checkpoints: int) -> list[float]:
        """What an example moves the weights by per unit of its gradient, between each checkpoint of a run and the last.

        The learning rate over the batch size, for every epoch visits every example once.
        """
        recipe = replace(self.setting.recipe, epochs=checkpoints)
        kept = list(range(1, checkpoints + 1))
        rates = learning_rates(recipe, kept, recipe.batches(len(self.setting.train_set)))
        return [rates[epoch] / recipe.batch_size for epoch in kept]

    def _train(self, count: int, epochs: int, kept: tuple[int, ...] | None) -> list[Trained]:
        # Small seeds; the bank derives large ones, so no model that votes is part of the ground truth.
        if self.setting.group > 1:
            what = f"{count} model{'s' if count > 1 else ''} of {epochs} epochs"
            return self._trained(list(range(count)), epochs, kept, what, count=count)
        # models that are trained one at a time are kept one at a time: an interruption costs one of them at most
        return [
            one
            for seed in range(count)
            for one in self._trained([seed], epochs, kept, f"model {seed + 1} of {count}, {epochs} epochs", seed=seed)
        ]

    def has_run(self, checkpoints: int) -> bool:
        """Whether one run of as many epochs as checkpoints is there."""
        which = {"count": 1} if self.setting.group > 1 else {"seed": 0}
        return self._models_file(checkpoints, tuple(range(1, checkpoints + 1)), **which).exists()

    def _models_file(self, epochs: int, kept: tuple[int, ...] | None, **which: int) -> Path:
        recipe = replace(self.setting.recipe, epochs=epochs)
        key = self.key(part="models", recipe=recipe.to_dict(), kept=kept, **which)
        return self.folder / "models" / f"{key}.safetensors"

    def _trained(
        self, seeds: list[int], epochs: int, kept: tuple[int, ...] | None, what: str, **which: int
    ) -> list[Trained]:
        recipe = replace(self.setting.recipe, epochs=epochs)
        path = self._models_file(epochs, kept, **which)
        if path.exists():
            self.tell(f"{what}: found")
            return _load(path)
        trainer = replace(self.setting.trainer(), recipe=recipe)
        done = trainer.many(
            self.setting.train_set, None, seeds, checkpoints=kept, progress=self.progress, engine=self.engine
        )
        trained = [
            Trained(tuple(run.checkpoints[epoch] for epoch in kept) if kept else (run.state_dict,), run.cost)
            for run in done
        ]
        _save(path, trained)
        self.tell(f"{what}: trained in {sum(one.cost.wall for one in trained):.0f} s")
        return trained

    def bank(self, recipe: BankRecipe) -> Bank:
        """The ground truth."""
        path = self.folder / f"bank-{self.key(part='bank', recipe=asdict(recipe))}.safetensors"
        found = path.exists()
        bank = retrain(
            self.setting.trainer(),
            self.setting.train_set,
            test_set=self.setting.test_set,
            task=self.setting.task(),
            path=path,
            progress=self.progress,
            engine=self.engine,
            **asdict(recipe),
        )
        how = "found" if found else "retrained"
        self.tell(f"bank of {recipe.subsets} subsets × {recipe.seeds} seeds: {how}")
        return bank

    @contextmanager
    def desk(self) -> Iterator[dict[str, Any]]:
        """Options of an attributor: its engine, and where its features are.

        In this process that is memory. Other processes need a folder; it is deleted when the context ends.
        """
        if isinstance(self.engine, InProcess):
            yield {}
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".store-") as place:
            yield {"engine": self.engine, "store": place}

    def adapters(
        self, models: Sequence[Trained], each: int, options: Mapping[str, Any]
    ) -> tuple[list[list[Adapter]], Cost]:
        """LoRA adapters of each model, and what training them cost beyond the models."""
        key = self.key(part="adapters", models=len(models), each=each, options=dict(options))
        folder = self.folder / "adapters" / key
        places = [[folder / f"{i}-{number}" for number in range(each)] for i in range(len(models))]
        what = f"{each} adapters of {len(models)} model{'s' if len(models) > 1 else ''}"
        if folder.exists():
            self.tell(f"{what}: found")
            cost = Cost(**json.loads((folder / "cost.json").read_text()))
            return [[Adapter.load(place) for place in row] for row in places], cost
        task, ledger = self.setting.task(), Ledger()
        with ledger.phase("training"):
            ensemble = train_lora(
                task,
                Independent([model.state for model in models]),
                self.setting.train_set,
                adapters=each,
                progress=self.progress,
                **options,
            )
        cost = ledger.training
        cost.flops = self._adapter_flops(ensemble.adapters[0][0], options["epochs"]) * len(models) * each
        partial = folder.with_name(f".{key}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for i, row in enumerate(ensemble.adapters):
            for number, adapter in enumerate(row):
                adapter.save(partial / f"{i}-{number}")
        (partial / "cost.json").write_text(json.dumps(asdict(cost)))
        partial.rename(folder)
        self.tell(f"{what}: trained in {cost.wall:.0f} s")
        return ensemble.adapters, cost

    def _adapter_flops(self, adapter: Adapter, epochs: int) -> float:
        """Of one adapter's training: those of a step on one batch, times the examples it sees."""
        task = self.setting.task()
        data = fetch(self.setting.train_set, "train_set")
        size = min(64, len(self.setting.train_set))
        batch = take(data, torch.arange(size))
        model = inject(task.model, adapter.config)
        step = count_flops(lambda: task.loss(model, batch).mean().backward())
        return step / size * len(self.setting.train_set) * epochs

    def row(self, make: Callable[[], dict[str, Any]], method: type[Attributor], **what: Any) -> dict[str, Any]:
        """A finished row: found, or made and kept.

        Its name depends on the attribution's own code too: rows are quick to make beside models and bank, and a
        figure that today's code would not give must not be shown as its result.
        """
        path = self.folder / "rows" / f"{self.key(part='row', code=code_of(method), **what)}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        made = make()
        save_json(path, made)
        return made


@cache
def code_of(method: type[Attributor]) -> str:
    """A hash of the source that decides the scores, costs and LDS of a method."""
    package = Path(byline.__file__).parent
    rooms = ("task.py", "batches.py", "ledger.py", "ensembles", "features", "store", "engines", "evaluate/lds.py")
    files = {file for room in rooms for file in (package / room, *(package / room).glob("**/*.py"))}
    files |= {package / "methods" / f"{name}.py" for name in ("mean", "kernels", "damping", "voting")}
    files |= {Path(inspect.getfile(cls)) for cls in method.__mro__ if cls.__module__.startswith("byline.")}
    if issubclass(method, byline.Influence):
        files |= set((package / "methods" / "curvature").glob("*.py"))
    digest = hashlib.sha256()
    for file in sorted(files):
        if file.is_file():
            digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def save_json(path: Path, data: Any) -> None:
    """Writes JSON that appears whole or not at all; lists of numbers stay on one line."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    # Only what indentation broke is joined again: a raw line break never stands inside a string.
    text = re.sub(r"\[\n[-+\d.eE,\s]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def _save(path: Path, trained: Sequence[Trained]) -> None:
    arrays = {
        f"{i}/{e}/{name}": tensor.numpy()
        for i, one in enumerate(trained)
        for e, state in enumerate(one.weights)
        for name, tensor in state.items()
    }
    costs = [asdict(one.cost) for one in trained]
    write(path, arrays, {"costs": costs, "weights": [len(one.weights) for one in trained]})


def _load(path: Path) -> list[Trained]:
    arrays, metadata = read(path)
    states: dict[tuple[int, int], StateDict] = {}
    for name, array in arrays.items():
        i, e, parameter = name.split("/", 2)
        states.setdefault((int(i), int(e)), {})[parameter] = torch.from_numpy(array)
    return [
        Trained(tuple(states[i, e] for e in range(count)), Cost(**cost))
        for i, (count, cost) in enumerate(zip(metadata["weights"], metadata["costs"], strict=True))
    ]
