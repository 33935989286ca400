"""The frontier: LDS against training cost, serving cost and space, for every strategy, residual and Hessian.

    python bench/frontier.py                                    # digits-mlp, three seeds
    python bench/frontier.py --setting fashion-mlp --seeds 3

Each strategy and seed is a JSON file under ``<out>/records``; what is there is not made again, so the script may be
killed at any time. Trained models and the bank lie beside them. ``--table`` reads the records alone.

Defaults are CHOSEN on digits-mlp, and on cancer-mlp and diabetes-mlp of ``bench/damping.py``, which ``--setting`` takes
too; all other settings JUDGE them, and nothing of the library is to be set after a look at those. ``--other-bank``
holds the same scores against a second ground truth too: subsets of a quarter instead of a half, other seeds.
``--other-class`` asks about another output instead, the margin of a class that is not the label, with a ground truth
of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

import byline
from byline import settings
from byline.evaluate.lds import noise_ceiling
from byline.ledger import Cost, Ledger, human_bytes, human_flops
from byline.methods import residuals
from byline.methods.mean import RunningMean
from byline.recommend import epochs_of
from byline.report.plots import pareto_front
from byline.settings.base import Setting
from byline.settings.bench import plain
from byline.settings.workshop import Workshop, save_json
from byline.training.data import derive
from byline.training.ensembles import spaced
from common import ROOT, environment, spread, table

FORMAT = 1
CHOSEN_ON = ("digits-mlp", "cancer-mlp", "diabetes-mlp")
PUBLISHED = ROOT / "src" / "byline" / "settings" / "measured"
WIDE: dict[str, Any] = {"columns": 20_000, "dtype": "int8"}
"""2048 columns keep little of a transformer's gradients."""
ADAM: dict[str, Any] = {**WIDE, "preconditioned": True}
WHOLE: dict[str, Any] = {"exact": True, "dtype": "int8", "preconditioned": True}
NARROW: dict[str, Any] = {**ADAM, "columns": 4000}
SMALL: dict[str, Any] = {"rank": 32, "columns": 800, "dtype": "int8"}
LAST = ("head.*", "norm.*", "blocks.1.network.*")
"""What a backward pass reaches first."""
ENDS = ("tokens.*", "head.*")
AT_ENDS: dict[str, Any] = {**WHOLE, "params": ENDS}
LATE = ("6.*", "8.*", "12.*")
"""Of the ResNet, the layers after its first pooling: with these a backward pass is short."""
ADAPTERS = {"rank": 8, "epochs": 3, "lr": 1e-3}


LATER = {"rank", "dtype", "preconditioned", "components", "params", "exact", "width", "simplest", "beside"}
"""What a strategy has that records of before do not name."""


@dataclass(frozen=True)
class Strategy:
    """An ensemble, and features where they are not the setting's own.

    Attributes:
        name: In tables.
        runs: Training runs; of a crossfit a multiple of ``parts``.
        length: Of each run: "full" as the setting says, "short" or "brief" (see `byline.recommend.epochs_of`).
        checkpoints: Along each run, evenly spaced; 0 for the last weights alone.
        parts: Folds of a crossfit; 0 for none.
        cycles: Of a snapshot ensemble; 0 for none.
        change: "dropout", "forward-only", "weight noise" or "lora" on each trained model.
        each: How many of them.
        options: Theirs.
        columns: Of a basis of principal components; 0 for the setting's own features.
        rank: Of `byline.LowRank` features instead, and then of ``columns`` of their products; 0 for others.
        dtype: What the rows are kept as.
        preconditioned: Whether the features are those of gradients in Adam's metric, `byline.Preconditioned`.
        components: How many principal components of them are kept, `byline.Principal`; 0 for all columns.
        params: Whose gradients are taken: patterns of names; all if empty.
        exact: Whether the features are exact where the setting's own are not.
        width: Of the models, over the setting's own: narrower models answer in place of those that are asked about.
        simplest: Whether the setting's simplest model answers: a linear one, a table of bigrams.
        beside: The name of a strategy whose scores are blended with these, `byline.blend`.
        validation: The share that is held out to stop each run.
        paper: Whether it is in arXiv 2405.17293.
    """

    name: str
    runs: int = 1
    length: str = "full"
    checkpoints: int = 0
    parts: int = 0
    cycles: int = 0
    change: str = ""
    each: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    columns: int = 0
    validation: float = 0.0
    paper: bool = False
    rank: int = 0
    dtype: str = "float32"
    preconditioned: bool = False
    components: int = 0
    params: tuple[str, ...] = ()
    exact: bool = False
    width: float = 1.0
    simplest: bool = False
    beside: str = ""

    def on(self, setting: Setting) -> Setting:
        """The setting at the strategy's width, or with its simplest model, or itself.

        Raises:
            ValueError: If its model has one width, or there is no simpler one.
        """
        if self.simplest:
            if setting.simplest is None:
                raise ValueError(f"{setting.name} has no simpler model")
            own = replace(setting, build=setting.simplest, width=0, at_width=None, shortened=None)
        elif self.width == 1:
            return setting
        elif setting.width:
            own = setting.variant(width=round(self.width * setting.width))
        else:
            raise ValueError(f"the model of {setting.name} has one width")
        return replace(own, load=lambda: (setting.train_set, setting.test_set))  # read once

    def task(self, setting: Any) -> Any:
        """The setting's, on its parameters."""
        return setting.task().choosing(self.params) if self.params else setting.task()

    def features(self, setting: Any) -> Any:
        """Its own, or the setting's."""
        found = self._plain(setting)
        if self.preconditioned:
            found = byline.Preconditioned(found)
        return byline.Principal(found, self.components, dtype=self.dtype) if self.components else found

    def _plain(self, setting: Any) -> Any:
        if self.rank:
            return byline.LowRank(self.rank, self.columns or None, dtype=self.dtype)
        if self.columns:
            return byline.Factorized(self.columns, basis="pca", dtype=self.dtype)
        found = byline.Exact() if self.exact else setting.features()
        found.dtype = self.dtype
        return found

    def key(self) -> dict[str, Any]:
        """What a record of it is found by; fields that came later count where they are used."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in LATER or value != getattr(type(self), name)
        }

    @property
    def slug(self) -> str:
        """As the name of a file."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower()).strip("-")

    @property
    def kind(self) -> str:
        """What the plots colour by."""
        found = [self.change] if self.change else []
        found += ["crossfit"] if self.parts else ["snapshot"] if self.cycles else []
        found += ["trajectory"] if self.checkpoints else []
        return " of ".join(found) or "independent"

    def members(self) -> int:
        """How many vote."""
        return self.runs * max(1, self.checkpoints, self.cycles) * self.each


ONE, MANY = {"p": 0.5}, {"p": 0.3}
STRATEGIES = (
    Strategy("independent 1", paper=True),
    Strategy("independent 2", 2, paper=True),
    Strategy("independent 5", 5, paper=True),
    Strategy("independent 10", 10, paper=True),
    Strategy("independent 25", 25, paper=True),
    Strategy("10 full runs, int8", 10, dtype="int8"),
    Strategy("25 full runs, int8", 25, dtype="int8"),
    Strategy("dropout 1×10", change="dropout", each=10, options=ONE, paper=True),
    Strategy("dropout 5×5", 5, change="dropout", each=5, options=MANY, paper=True),
    Strategy("forward-only 1×10", change="forward-only", each=10, options=ONE, paper=True),
    Strategy("forward-only 5×10", 5, change="forward-only", each=10, options=MANY, paper=True),
    Strategy("LoRA 1×4", change="lora", each=4, options=ADAPTERS, paper=True),
    Strategy("LoRA 5×4", 5, change="lora", each=4, options=ADAPTERS, paper=True),
    Strategy("weight noise 1×10", change="weight noise", each=10, options={"scale": 0.6}),
    Strategy("1 short run", 1, "short"),
    Strategy("5 short runs", 5, "short"),
    Strategy("3 checkpoints of a short run", 1, "short", 3),
    Strategy("5 checkpoints of a short run", 1, "short", 5),
    Strategy("10 checkpoints of a short run", 1, "short", 10),
    Strategy("10 checkpoints of a full run", 1, "full", 10),
    Strategy("5 checkpoints, stopped by a held-out tenth", 1, "full", 5, validation=0.1),
    Strategy("3 checkpoints each of 3 short runs", 3, "short", 3),
    Strategy("5 checkpoints each of 5 short runs", 5, "short", 5),
    Strategy("5 checkpoints × 3 masks, short run", 1, "short", 5, change="dropout", each=3, options=MANY),
    Strategy("halves 2", 2, parts=2),
    Strategy("halves 10", 10, parts=2),
    Strategy("short halves 2", 2, "short", parts=2),
    Strategy("short halves 6", 6, "short", parts=2),
    Strategy("short thirds 3", 3, "short", parts=3),
    Strategy("short halves 2, 5 checkpoints each", 2, "short", 5, parts=2),
    Strategy("short halves 6, 3 checkpoints each", 6, "short", 3, parts=2),
    Strategy("5 brief runs", 5, "brief"),
    Strategy("3 checkpoints each of 3 brief runs", 3, "brief", 3),
    Strategy("3 checkpoints each of 5 brief runs", 5, "brief", 3),
    Strategy("brief halves 6", 6, "brief", parts=2),
    Strategy("brief halves 6, 3 checkpoints each", 6, "brief", 3, parts=2),
    Strategy("snapshots, 5 cycles of a full run", 1, cycles=5),
    Strategy("1 short run, 128 columns", 1, "short", columns=128),
    Strategy("1 short run, 256 columns", 1, "short", columns=256),
    Strategy("5 checkpoints of a short run, 128 columns", 1, "short", 5, columns=128),
    Strategy("5 checkpoints of a short run, 512 columns", 1, "short", 5, columns=512),
    Strategy("5 checkpoints of a short run, 1024 columns", 1, "short", 5, columns=1024),
    Strategy("1 short run, int8", 1, "short", dtype="int8"),
    Strategy("3 checkpoints of a short run, int8", 1, "short", 3, dtype="int8"),
    Strategy("5 checkpoints of a short run, int8", 1, "short", 5, dtype="int8"),
    Strategy("3 checkpoints each of 2 short runs, int8", 2, "short", 3, dtype="int8"),
    Strategy("5 checkpoints each of 2 short runs, int8", 2, "short", 5, dtype="int8"),
    Strategy("short halves 4, 3 checkpoints each, int8", 4, "short", 3, parts=2, dtype="int8"),
    Strategy("1 full run, 20000 columns, int8", **WIDE),
    Strategy("5 full runs, 20000 columns, int8", 5, **WIDE),
    Strategy("25 full runs, 20000 columns, int8", 25, **WIDE),
    Strategy("5 checkpoints of a short run, 20000 columns, int8", 1, "short", 5, **WIDE),
    Strategy("1 full run, Adam's metric", **ADAM),
    Strategy("5 full runs, Adam's metric", 5, **ADAM),
    Strategy("4 checkpoints of a full run, Adam's metric", 1, "full", 4, **ADAM),
    Strategy("5 checkpoints of a short run, Adam's metric", 1, "short", 5, **ADAM),
    Strategy("1 full run, 512 components in Adam's metric", components=512, **ADAM),
    Strategy("5 checkpoints of a short run, 512 components in Adam's metric", 1, "short", 5, components=512, **ADAM),
    Strategy("short halves 2, Adam's metric", 2, "short", parts=2, **ADAM),
    Strategy("10 checkpoints of a full run, Adam's metric", 1, "full", 10, **ADAM),
    Strategy("5 checkpoints each of 2 short runs, Adam's metric", 2, "short", 5, **ADAM),
    Strategy("short halves 2, 5 checkpoints each, Adam's metric", 2, "short", 5, parts=2, **ADAM),
    Strategy("1 full run, exact in Adam's metric", **WHOLE),
    Strategy("short halves 2, exact in Adam's metric", 2, "short", parts=2, **WHOLE),
    Strategy("5 checkpoints of a short run, exact in Adam's metric", 1, "short", 5, **WHOLE),
    Strategy("1 full run, embedding and head exact in Adam's metric", **AT_ENDS),
    Strategy("5 checkpoints of a short run, embedding and head exact in Adam's metric", 1, "short", 5, **AT_ENDS),
    Strategy("1 full run, head alone in Adam's metric", params=("head.*",), **NARROW),
    Strategy("1 full run, exact head in Adam's metric", params=("head.*",), **WHOLE),
    Strategy("1 full run, head and last network in Adam's metric", params=LAST, **NARROW),
    Strategy("1 full run, 2000 columns of the head in Adam's metric", params=("head.*",), **{**ADAM, "columns": 2000}),
    Strategy("1 full run, 1500 columns of the head in Adam's metric", params=("head.*",), **{**ADAM, "columns": 1500}),
    Strategy("1 full run, 1000 columns of the head in Adam's metric", params=("head.*",), **{**ADAM, "columns": 1000}),
    Strategy(
        "1 full run, rank 32, 800 columns of the head in Adam's metric",
        params=("head.*",),
        rank=32,
        **{**ADAM, "columns": 800},
    ),
    Strategy("1 short run, 1024 columns, int8", 1, "short", columns=1024, dtype="int8"),
    Strategy("1 short run, rank 32, int8", 1, "short", rank=32, dtype="int8"),
    Strategy("1 short run, rank 128, int8", 1, "short", rank=128, dtype="int8"),
    Strategy("1 short run, rank 12, int8", 1, "short", rank=12, dtype="int8"),
    Strategy("1 short run, rank 24, int8", 1, "short", rank=24, dtype="int8"),
    Strategy("3 checkpoints of a short run, rank 32, int8", 1, "short", 3, rank=32, dtype="int8"),
    Strategy("3 checkpoints, rank 32, 800 columns, int8", 1, "short", 3, columns=800, rank=32, dtype="int8"),
    Strategy("3 short runs, rank 32, 800 columns, int8", 3, "short", columns=800, rank=32, dtype="int8"),
    Strategy("1 short run, last layers, int8", 1, "short", params=LATE, dtype="int8"),
    Strategy("5 short runs, last layers, int8", 5, "short", params=LATE, dtype="int8"),
    Strategy("5 short runs, last layers, rank 32, 800 columns, int8", 5, "short", params=LATE, **SMALL),
    Strategy("short halves 4, last layers, rank 32, 800 columns, int8", 4, "short", parts=2, params=LATE, **SMALL),
    Strategy(
        "3 short runs, last layers, 512 of 4000 columns, int8",
        3,
        "short",
        params=LATE,
        components=512,
        columns=4000,
        dtype="int8",
    ),
    Strategy(
        "5 short runs, last layers, 300 of 1500 columns, int8",
        5,
        "short",
        params=LATE,
        components=300,
        columns=1500,
        dtype="int8",
    ),
    Strategy("1 short run of the simplest model, int8", 1, "short", simplest=True, dtype="int8"),
    Strategy("1 short run of the simplest model, exact in Adam's metric", 1, "short", simplest=True, **WHOLE),
    Strategy(
        "5 checkpoints of a short run, and the simplest model, int8",
        1,
        "short",
        5,
        dtype="int8",
        beside="1 short run of the simplest model, int8",
    ),
    Strategy(
        "3 checkpoints each of 3 short runs of half the width, and the simplest model, int8",
        3,
        "short",
        3,
        width=0.5,
        dtype="int8",
        beside="1 short run of the simplest model, int8",
    ),
    Strategy(
        "1 short run of the simplest model, 3000 columns in Adam's metric",
        1,
        "short",
        simplest=True,
        **{**ADAM, "columns": 3000},
    ),
    Strategy(
        "1 full run of a quarter of the width, 1000 columns of the head, and the simplest model, in Adam's metric",
        1,
        width=0.25,
        params=("head.*",),
        beside="1 short run of the simplest model, 3000 columns in Adam's metric",
        **{**ADAM, "columns": 1000},
    ),
    Strategy(
        "3 full runs of half the width, embedding and head exact, and the simplest model, in Adam's metric",
        3,
        width=0.5,
        beside="1 short run of the simplest model, exact in Adam's metric",
        **AT_ENDS,
    ),
    Strategy("5 full runs of half the width, int8", 5, width=0.5, dtype="int8"),
    Strategy("5 short runs of half the width, int8", 5, "short", width=0.5, dtype="int8"),
    Strategy("5 short runs of a quarter of the width, int8", 5, "short", width=0.25, dtype="int8"),
    Strategy("3 checkpoints each of 3 short runs of half the width, int8", 3, "short", 3, width=0.5, dtype="int8"),
    Strategy(
        "short halves 8 of half the width, 3 checkpoints each, int8", 8, "short", 3, parts=2, width=0.5, dtype="int8"
    ),
    Strategy("1 full run of half the width, embedding and head exact in Adam's metric", 1, width=0.5, **AT_ENDS),
    Strategy("3 full runs of half the width, embedding and head exact in Adam's metric", 3, width=0.5, **AT_ENDS),
    Strategy(
        "5 checkpoints of a short run of half the width, embedding and head exact in Adam's metric",
        1,
        "short",
        5,
        width=0.5,
        **AT_ENDS,
    ),
    Strategy(
        "5 full runs of a quarter of the width, embedding and head exact in Adam's metric", 5, width=0.25, **AT_ENDS
    ),
    Strategy(
        "1 full run of a quarter of the width, embedding and head exact in Adam's metric", 1, width=0.25, **AT_ENDS
    ),
    Strategy(
        "2 full runs of a quarter of the width, 2000 columns of embedding and head in Adam's metric",
        2,
        width=0.25,
        params=ENDS,
        **{**ADAM, "columns": 2000},
    ),
    Strategy(
        "3 full runs of a quarter of the width, 1000 columns of embedding and head in Adam's metric",
        3,
        width=0.25,
        params=ENDS,
        **{**ADAM, "columns": 1000},
    ),
    Strategy("5 checkpoints of a short run, rank 14, int8", 1, "short", 5, rank=14, dtype="int8"),
    Strategy("5 checkpoints of a short run, rank 64", 1, "short", 5, rank=64),
    Strategy("5 checkpoints of a short run, rank 64, int8", 1, "short", 5, rank=64, dtype="int8"),
)


def named(*names: str) -> list[Strategy]:
    """The strategies of these names; anything else ends the script."""
    known = {strategy.name: strategy for strategy in STRATEGIES}
    if unknown := set(names) - set(known):
        raise SystemExit(f"no strategy {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    return [known[name] for name in names]


def wanted(only: Sequence[str], default: Sequence[str], setting: Any) -> list[Strategy]:
    """The strategies of these names; one without models in this setting ends the script, unless nobody named it."""
    strategies = named(*only)
    if only is default:
        return [strategy for strategy in strategies if not refusal(strategy, setting)]
    if refused := [f"{strategy.name}: {said}" for strategy in strategies if (said := refusal(strategy, setting))]:
        raise SystemExit("; ".join(refused))
    return strategies


def refusal(strategy: Strategy, setting: Any) -> str:
    """Why a setting has no models for a strategy, or nothing."""
    try:
        strategy.on(setting)
    except ValueError as error:
        return str(error)
    return ""


class Studied(byline.TRAK):
    """TRAK that also keeps the mean kernel and each member's leverages: all residuals from one pass."""

    leverages: list[torch.Tensor]
    kernel: np.ndarray
    aside = 0.0
    """CPU seconds that went into leverages alone."""

    def _begin(self, mean: Any, voter: Any, *rest: Any) -> None:
        start = time.process_time()
        self.leverages.append(self._self(voter))
        self.aside += time.process_time() - start
        super()._begin(mean, voter, *rest)

    def _finish(self, mean: RunningMean, place: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        self.kernel = mean.mean()
        # neither scores nor errors are of use here
        return self.kernel, self.kernel

    def study(self, test_set: Any) -> np.ndarray:
        """(n_test, n_train) the mean kernel."""
        self.leverages = []
        self.attribute(test_set)
        return self.kernel

    def residuals_of_each(self) -> dict[str, torch.Tensor]:
        """(n_train,) what each kind of ``residual=`` carries, by the library's own formulas."""
        found: dict[str, list[torch.Tensor]] = {"mean": [], "sqrt": [], "leave-one-out": []}
        unseen = []
        for voter, leverage in zip(self._voters, self.leverages, strict=True):
            each, own = self._residuals_of(voter), voter.member.unseen(self.n_train_)
            scales = self._scales(voter)
            weights = None if scales is None else scales.square()
            moved = residuals.leave_one_out(each, leverage, weights, self.task.name)
            found["mean"].append(each.mean(0))
            found["sqrt"].append(residuals.root(each).mean(0))
            found["leave-one-out"].append(torch.where(own, each, moved).mean(0))
            unseen.append(own)
        out = {name: torch.stack(each).mean(0) for name, each in found.items()}
        counts, q = torch.stack(unseen).float(), torch.stack(found["mean"])
        if bool((counts.sum(0) > 0).all()):
            out["out-of-sample"] = (counts * q).sum(0) / counts.sum(0)
        return out


@dataclass
class Run:
    """A trained run: its weights, what it was trained on, what it cost."""

    states: list[Any]
    trained_on: np.ndarray | None
    cost: Cost


class Trainers:
    """Runs of a setting and seed, kept in a folder and shared by the strategies."""

    def __init__(self, setting: Any, folder: Path, seed: int):
        self.setting, self.folder, self.seed = setting, folder, seed
        self.task = setting.task()
        # five small models train in the time of one; of large ones no more than are asked for
        self.block = 5 if setting.group > 1 else 1

    def runs(self, strategy: Strategy) -> list[Run]:
        """As many as the strategy has: prefixes of one sequence for each way to train."""
        recipe = self.setting.recipe
        recipe = replace(recipe, epochs=epochs_of(strategy.length, recipe.epochs))
        if strategy.checkpoints > recipe.epochs:
            raise ValueError(f"a run of {recipe.epochs} epochs has no {strategy.checkpoints} checkpoints")
        kind, options, block = "trajectory", {}, self.block
        if strategy.cycles:
            kind, options = "snapshot", {"checkpoints": strategy.cycles}
        elif strategy.parts:
            kind, block = "crossfit", strategy.parts
            options = {"parts": strategy.parts, "checkpoints": recipe.epochs}
        elif strategy.validation:
            options = {"checkpoints": strategy.checkpoints, "validation": strategy.validation}
        else:
            # all epochs of one run serve every spacing; the last is the fully trained model
            options = {"checkpoints": recipe.epochs}
        if recipe.epochs > 60:
            raise SystemExit(f"{self.setting.name} has {recipe.epochs} epochs; keeping each would fill the disk")
        found: list[Run] = []
        number = 0
        while len(found) < strategy.runs:
            name = f"{kind}-{strategy.length}-{strategy.parts}-{strategy.cycles}-{strategy.validation:g}-{number}"
            ensemble = byline.train_ensemble(
                self.task, self.setting.train_set, recipe, kind, models=block, build=self.setting.build,
                seed=derive(self.seed, number, 7) % 2**32, folder=self.folder / f"seed-{self.seed}" / name,
                group=self.setting.group, **options,
            )  # fmt: skip
            found += _split(ensemble, block)
            number += 1
        return [self._spaced(run, strategy, recipe.epochs) for run in found[: strategy.runs]]

    def _spaced(self, run: Run, strategy: Strategy, epochs: int) -> Run:
        if strategy.cycles or strategy.validation:
            return run
        wanted = spaced(strategy.checkpoints, epochs) if strategy.checkpoints else [epochs]
        return replace(run, states=[run.states[epoch - 1] for epoch in wanted])

    def ensemble(self, strategy: Strategy) -> tuple[Any, Cost, int]:
        """The ensemble, what training it cost, and the bytes of weights it keeps."""
        runs = self.runs(strategy)
        base: Any = byline.Trajectory([run.states for run in runs])
        cost = sum((run.cost for run in runs), Cost())
        weights = sum(Path(state).stat().st_size for run in runs for state in run.states)
        if all(run.trained_on is not None for run in runs):
            base = byline.CrossFit(base, [run.trained_on for run in runs])
        if strategy.change == "lora":
            return self._adapters(strategy, base, cost, weights)
        if strategy.change == "weight noise":
            base = byline.WeightNoise(base, draws=strategy.each, seed=self.seed, **strategy.options)
        elif strategy.change:
            forward = strategy.change == "forward-only"
            base = byline.Dropout(base, masks=strategy.each, forward_only=forward, seed=self.seed, **strategy.options)
        return base, cost, weights

    def _adapters(self, strategy: Strategy, base: Any, cost: Cost, weights: int) -> tuple[Any, Cost, int]:
        ledger = Ledger()
        with ledger.phase("training"):
            found = byline.train_lora(
                self.task, base, self.setting.train_set, adapters=strategy.each, seed=self.seed, progress=False,
                **strategy.options,
            )  # fmt: skip
        shop = Workshop(self.setting, self.folder, print, False)
        each = shop._adapter_flops(found.adapters[0][0], strategy.options["epochs"])
        extra = replace(ledger.training, flops=each * strategy.runs * strategy.each)
        small = sum(t.numel() * t.element_size() for row in found.adapters for a in row for t in a.tensors.values())
        return found, cost + extra, weights + small


def trainers_of(strategy: Strategy, setting: Any, folder: Path, seed: int) -> Trainers:
    """What trains a strategy's models: the setting with its model, each kind of model in a folder of its own."""
    own = strategy.on(setting)
    name = "simplest" if strategy.simplest else f"width-{own.width}"
    return Trainers(own, folder if own is setting else folder / name, seed)


def _split(ensemble: Any, runs: int) -> list[Run]:
    """The runs of what `byline.train_ensemble` gave."""
    cost = ensemble.cost.scaled(1 / runs)
    out: dict[int, Run] = {}
    for member in ensemble.members():
        out.setdefault(member.run, Run([], member.trained_on, cost)).states.append(member.weights.source)
    return list(out.values())


def measure(
    strategy: Strategy, setting: Any, models: Path, seed: int, truths: Sequence[Any], hessians: Sequence[str]
) -> dict[str, Any]:
    """One strategy, trained with one seed, under every Hessian and residual."""
    record, scores, damping = scored(strategy, trainers_of(strategy, setting, models, seed), hessians)
    if strategy.beside:
        (other,) = named(strategy.beside)
        more, others, _ = scored(other, trainers_of(other, setting, models, seed), hessians)
        scores = {key: byline.blend(*map(byline.Scores, (scores[key], others[key]))).values for key in others}
        for part in ("training", "fitting", "serving"):
            record[part] = {name: value + more[part][name] for name, value in record[part].items()}
        for part in ("models", "space", "members"):
            record[part] += more[part]
    variants = []
    for (hessian, residual), values in scores.items():
        found, *rest = [byline.lds(values, bank, bootstrap=200) for bank in truths]
        variants.append(
            {
                "hessian": hessian,
                "residual": residual,
                "lds": found.mean,
                "interval": list(found.interval),
                "other": rest[0].mean if rest else None,
                "damping": damping[hessian],
            }
        )
    return {**record, "variants": variants}


def scored(
    strategy: Strategy, trainers: Trainers, hessians: Sequence[str]
) -> tuple[dict[str, Any], dict[tuple[str, str], np.ndarray], dict[str, float]]:
    """What a strategy costs; its scores, (n_test, n_train), by Hessian and residual; the damping of each Hessian."""
    setting = trainers.setting
    ensemble, training, weights = trainers.ensemble(strategy)
    features = strategy.features(setting)
    scores: dict[tuple[str, str], np.ndarray] = {}
    damping: dict[str, float] = {}
    record: dict[str, Any] = {"training": plain(training), "models": ensemble.trained_models()}
    store = None
    for hessian in hessians:
        ledger = Ledger()
        attributor = Studied(
            strategy.task(setting), ensemble, features=features, hessian=hessian, ledger=ledger, progress=False,
            batch_size=setting.batch_size,
        )  # fmt: skip
        if store is not None:
            attributor.store = store
        attributor.fit(setting.train_set)
        kernel = attributor.study(setting.test_set)
        for residual, q in attributor.residuals_of_each().items():
            scores[hessian, residual] = kernel * q.numpy()
        damping[hessian] = attributor.info()["damping_median"]
        if store is None:
            store = attributor.store
            serving = replace(ledger.serving, seconds=max(0.0, ledger.serving.seconds - attributor.aside))
            record |= {
                "fitting": plain(ledger.fitting),
                "serving": plain(serving.scaled(1 / len(setting.test_set))),
                "space": weights + store.nbytes(),
            }
    return {**record, "members": len(ensemble)}, scores, damping


def run(options: argparse.Namespace, setting: Any, out: Path) -> None:
    """Make the records that are lacking, the cheapest strategies of each seed first."""

    def tell(sentence: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {sentence}", flush=True)

    shop = Workshop(setting, out, tell, progress=False)
    recipe = setting.bank_recipe
    tell(f"{setting.name}: the bank first, {recipe.subsets * recipe.seeds} models, found or trained; parts are kept")
    truths = [shop.bank(recipe)]
    if options.other_bank:
        truths.append(shop.bank(other_recipe(setting)))
    asked = {"format": FORMAT, "hessians": options.hessians, "banks": len(truths)}
    models = (out.parent if options.other_class else out) / "frontier-models"  # the training set is the same
    work = [(s, seed) for seed in range(options.first_seed, options.seeds) for s in chosen(options, setting)]
    done, spent = 0, 0.0
    for number, (strategy, seed) in enumerate(work, 1):
        path = out / "records" / f"{strategy.slug}-{seed}.json"
        key = shop.key(part="frontier", strategy=strategy.key(), seed=seed, **asked, **others(strategy, setting))
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["key"] == key and not options.again:
            continue
        start = time.perf_counter()
        try:
            made = measure(strategy, setting, models, seed, truths, options.hessians)
        except (ValueError, TypeError) as error:
            # a model without dropout, a task without Q: the table says so
            made = {"refused": str(error)}
        head = {"format": FORMAT, "key": key, "setting": setting.name, "seed": seed, "strategy": asdict(strategy)}
        save_json(path, {**head, **made, "environment": environment()})
        taken = time.perf_counter() - start
        done, spent = done + 1, spent + taken
        said = made.get("refused") or f"LDS {max(v['lds'] for v in made['variants']):.3f} at best"
        left = spent / done * (len(work) - number) / 60
        place = f"{number} of {len(work)}: {strategy.name}, seed {seed}"
        tell(f"{place}: {said} ({taken:.0f} s; about {left:.0f} min left)")


def others(strategy: Strategy, setting: Any) -> dict[str, Any]:
    """What a record depends on beside the setting, where other models than its own vote."""
    own = setting if refusal(strategy, setting) else strategy.on(setting)
    return {} if own is setting else {"trainer": own.trainer().describe()}


def other_class(setting: Setting) -> Setting:
    """The setting asked about a class that is not the label, drawn for each test example; 100 subsets × 2 models."""
    x, y = setting.test_set.tensors
    classes = int(setting.train_set.tensors[1].max()) + 1
    shift = torch.randint(1, classes, (len(y),), generator=torch.Generator().manual_seed(0))
    asked = TensorDataset(x, (y + shift) % classes)
    recipe = replace(setting.bank_recipe, subsets=100, seeds=2, seed=setting.bank_recipe.seed + 2)
    return replace(setting, load=lambda: (setting.train_set, asked), bank_recipe=recipe)


def other_recipe(setting: Any) -> Any:
    """A ground truth of subsets of a quarter."""
    return replace(setting.bank_recipe, fraction=setting.bank_recipe.fraction / 2, seed=setting.bank_recipe.seed + 1)


def chosen(options: argparse.Namespace, setting: Any) -> list[Strategy]:
    """The strategies asked for, by rising number of members; a word that is a whole name stands for that alone."""
    names = {s.name for s in STRATEGIES}

    def asked(name: str) -> bool:
        return not options.only or any(word == name or (word not in names and word in name) for word in options.only)

    found = [s for s in STRATEGIES if asked(s.name)]
    if options.max_members:
        found = [s for s in found if s.members() <= options.max_members]
    if options.max_runs:
        found = [s for s in found if s.runs <= options.max_runs]
    if not found:
        raise SystemExit("no strategy is left; see --only, --max-members and --max-runs")
    return sorted(found, key=lambda s: (s.members(), s.runs))


# --- what came out -------------------------------------------------------------------------------------------


VARIANTS = (
    ("unweighted", "mean", "Q"),
    ("unweighted", "sqrt", "√Q"),
    ("unweighted", "leave-one-out", "leave-one-out"),
    ("unweighted", "out-of-sample", "out-of-sample"),
    ("weighted", "mean", "W, Q"),
    ("weighted", "sqrt", "W, √Q"),
    ("weighted", "leave-one-out", "W, leave-one-out"),
    ("weighted", "out-of-sample", "W, out-of-sample"),
)


def load(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The records by strategy, in the order of the strategies."""
    files = sorted((out / "records").glob("*.json"))
    every = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    found: dict[str, list[dict[str, Any]]] = {}
    for strategy in STRATEGIES:
        own = [r for r in every if r["strategy"]["name"] == strategy.name]
        if own:
            found[strategy.name] = own
    return found


def figures(records: list[dict[str, Any]], hessian: str, residual: str, what: str = "lds") -> list[float]:
    """The LDS of every seed."""
    every = [v for r in records for v in r.get("variants", ())]
    return [v[what] for v in every if (v["hessian"], v["residual"]) == (hessian, residual) and v[what] is not None]


def summary(out: Path, setting_name: str = "") -> dict[str, Any]:
    """Means over seeds: plain data. The unit of training is one model's, of the records or else as published."""
    found = load(out)
    whole = [r["training"]["flops"] for r in found.get("independent 1", ())]
    whole = whole or [row["training"] for row in kept(setting_name) if row["name"] == "independent 1"]
    unit = _mean(whole) if whole else math.nan
    rows = []
    for name, records in found.items():
        strategy = Strategy(**records[0]["strategy"])
        refused = next((r["refused"] for r in records if "refused" in r), None)
        row: dict[str, Any] = {"name": name, "kind": strategy.kind, "paper": strategy.paper, "refused": refused}
        row["strategy"] = asdict(strategy)
        if refused is None:
            row |= {
                "seeds": len(records),
                "seed_list": sorted(r["seed"] for r in records),
                "members": records[0]["members"],
                "trainings": _mean([r["training"]["flops"] for r in records]) / unit,
                "training": _mean([r["training"]["flops"] for r in records]),
                "fitting": _mean([r["fitting"]["seconds"] for r in records]),
                "serving": _mean([r["serving"]["flops"] for r in records]),
                "space": _mean([r["space"] for r in records]),
            }
            for what in ("lds", "other"):
                every = {f"{h} {q}": figures(records, h, q, what) for h, q, _ in VARIANTS}
                row[what] = {variant: values for variant, values in every.items() if values}
        rows.append(row)
    return {"rows": rows}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def kept(setting_name: str) -> list[dict[str, Any]]:
    """The rows that the package has of a setting."""
    path = PUBLISHED / f"{setting_name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def published(setting_name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and what the package has of other strategies or seeds, in the order of the strategies."""
    every = {row["name"]: row for row in kept(setting_name)}
    for row in rows:
        old = every.get(row["name"])
        if old is None or old.get("refused") or row.get("refused"):
            every[row["name"]] = row
        elif not (seeds_of(old) & seeds_of(row)) and defined(old) == defined(row):
            every[row["name"]] = joined(old, row)
        elif row["seeds"] >= old["seeds"]:
            every[row["name"]] = completed(old, row)
        else:
            print(f"{row['name']}: {old['seeds']} seeds are published; those of {row['seeds']} are left out")
            if defined(old) == defined(row):
                # what is known of another truth from fewer seeds is better than nothing
                every[row["name"]] = {**old, "other": {**row["other"], **old["other"]}}
    one = every.get("independent 1")
    for row in every.values():
        if one is not None and row["name"].startswith("independent ") and row.get("refused") is None:
            # a query of whole runs takes as many times what one run takes, whichever of them was measured last
            row["serving"] = row["strategy"]["runs"] * one["serving"]
    return [every[strategy.name] for strategy in STRATEGIES if strategy.name in every]


def seeds_of(row: dict[str, Any]) -> set[int]:
    """Which seeds a row is the mean of; the first ones where it does not say."""
    return set(row.get("seed_list", range(row["seeds"])))


def defined(row: dict[str, Any]) -> dict[str, Any]:
    """What its strategy is, with fields that came later."""
    return Strategy(**{**row["strategy"], "params": tuple(row["strategy"].get("params", ()))}).key()


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A row of some seeds and one of others."""
    seeds = old["seeds"] + new["seeds"]
    means = {
        name: (old[name] * old["seeds"] + new[name] * new["seeds"]) / seeds
        for name in ("trainings", "training", "fitting", "serving", "space")
        if not math.isnan(new[name])
    }
    every = {
        what: {v: old[what].get(v, []) + new[what].get(v, []) for v in {**old[what], **new[what]}}
        for what in ("lds", "other")
    }
    return {**old, **means, **every, "seeds": seeds, "seed_list": sorted(seeds_of(old) | seeds_of(new))}


def completed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A row in place of another, with what it does not say: another Hessian, the other truth, the unit of training."""
    if defined(old) != defined(new):
        return new
    every = {what: {**old[what], **new[what]} for what in ("lds", "other")}
    trainings = old["trainings"] if math.isnan(new["trainings"]) else new["trainings"]
    return {**new, **every, "trainings": trainings}


def report(
    out: Path, setting_name: str, ceiling: float | None, output: str | None = None, earlier: bool = False
) -> None:
    """The table, ``frontier.json`` and the Pareto fronts, ``frontier.html``.

    Args:
        out: Where the records are.
        setting_name: Of what.
        ceiling: The bank's.
        output: The setting's output, to keep the result in the package.
        earlier: Beside the records, the rows that the package has of other strategies or seeds.
    """
    result = summary(out, setting_name)
    if earlier:
        result["rows"] = published(setting_name, result["rows"])
    role = "defaults are CHOSEN on it" if setting_name in CHOSEN_ON else "defaults are JUDGED on it"
    result |= {"format": FORMAT, "setting": setting_name, "role": role, "ceiling": ceiling}
    rows = [row for row in result["rows"] if row["refused"] is None]
    if not rows:
        raise SystemExit(f"no records in {out / 'records'}")
    if any(math.isnan(row["trainings"]) for row in rows):
        raise SystemExit('the unit of training is that of "independent 1": ask for it too')
    print(f"\n{setting_name}: {role}. Noise ceiling {ceiling:.3f}." if ceiling else f"\n{setting_name}: {role}.")
    for what, title in (("lds", "LDS"), ("other", "LDS against the other bank")):
        shown = [v for v in VARIANTS if any(f"{v[0]} {v[1]}" in row[what] for row in rows)]
        if not shown:
            continue
        print(f"\n{title}, mean over seeds ± standard deviation; * is in the paper, W the weighted Hessian\n")
        names = [name for _, _, name in shown]
        body = []
        for row in rows:
            cells = [spread(row[what].get(f"{hessian} {residual}", [])) for hessian, residual, _ in shown]
            costs = [f"{row['trainings']:.2f}", human_flops(row["serving"]), human_bytes(row["space"])]
            body.append([row["name"] + "*" * row["paper"], str(row["members"]), *costs, *cells])
        print(table(["strategy", "members", "trainings", "serving", "space", *names], body))
    for row in result["rows"]:
        if row["refused"] is not None:
            print(f"refused: {row['name']}: {row['refused']}")
    save_json(out / "frontier.json", result)
    if output is not None:
        # what `byline recommend` goes by; a shipped figure has three digits
        own = setting_of(setting_name).features()
        named = "Exact()" if isinstance(own, byline.Exact) else repr(own).replace(", seed=0", "")
        kept = {**result, "output": output, "features": named, "environment": environment()}
        save_json(PUBLISHED / f"{setting_name}.json", json.loads(json.dumps(kept), parse_float=_rounded))
    plot(out / "frontier.html", setting_name, rows, ceiling)
    print(f"\nwritten to {out / 'frontier.json'} and {out / 'frontier.html'}")


def _rounded(text: str) -> float:
    return float(f"{float(text):.4g}")


AXES: tuple[tuple[str, str, Callable[[dict[str, Any]], float]], ...] = (
    ("training, in full trainings", "trainings", lambda row: row["trainings"]),
    ("serving a query, FLOPs", "serving", lambda row: row["serving"]),
    ("space, bytes", "space", lambda row: row["space"]),
)


def plot(path: Path, name: str, rows: list[dict[str, Any]], ceiling: float | None) -> None:
    """Three Pareto fronts: hollow circles are the paper's strategies as it has them, filled ones the others."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=3, cols=1, subplot_titles=[title for title, _, _ in AXES], vertical_spacing=0.08)
    points = []
    for row in rows:
        best = max(row["lds"], key=lambda variant, row=row: _mean(row["lds"][variant]))
        for variant in dict.fromkeys(("unweighted mean", best)):
            if variant in row["lds"]:
                own = row["paper"] and variant == "unweighted mean"
                points.append((row, variant, _mean(row["lds"][variant]), own))
    for place, (_, _, value) in enumerate(AXES, 1):
        for paper in (True, False):
            some, colour = [p for p in points if p[3] == paper], "#888" if paper else "#06c"
            figure.add_scatter(
                x=[value(p[0]) for p in some], y=[p[2] for p in some], mode="markers", row=place, col=1,
                marker={"symbol": "circle-open" if paper else "circle", "size": 9, "color": colour},
                text=[f"{p[0]['name']}<br>{p[1]}<br>LDS {p[2]:.3f}" for p in some], hoverinfo="text",
                name="the paper's strategies" if paper else "others and variants", showlegend=place == 1,
            )  # fmt: skip
            front = [some[i] for i in pareto_front([(value(p[0]), p[2]) for p in some])]
            figure.add_scatter(
                x=[value(p[0]) for p in front], y=[p[2] for p in front], mode="lines", row=place, col=1,
                line={"shape": "hv", "dash": "dot", "color": colour}, showlegend=False,
                hoverinfo="skip",
            )  # fmt: skip
        figure.update_xaxes(type="log", row=place, col=1)
        figure.update_yaxes(title_text="LDS", row=place, col=1)
        if ceiling:
            figure.add_hline(y=ceiling, line_dash="dash", line_color="#bbb", row=place, col=1)
    figure.update_layout(height=1500, width=900, title=f"{name}: the frontier", template="plotly_white")
    figure.write_html(path, include_plotlyjs=True)


def setting_of(name: str) -> Any:
    """A setting of the library, or a case of ``bench/damping.py``."""
    from damping import cases

    if name in settings.names() or name not in cases():
        return settings.get(name)
    load, build, recipe, output = cases()[name]
    return Setting(name, "a case of bench/damping.py", load, build, recipe, output=output)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What this script and those beside it are asked: which setting, in which folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="digits-mlp")
    parser.add_argument("--out", type=Path, help="folder of the frontier; runs/frontier/<setting> by default")
    return parser


def folder_of(options: argparse.Namespace) -> Path:
    """Where the models, the bank and the records are."""
    return options.out or ROOT / "runs" / "frontier" / options.setting


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="leave out the seeds before; see --earlier")
    parser.add_argument("--only", nargs="*", help="strategies of these names, or whose names contain one of these")
    parser.add_argument("--max-members", type=int, default=0, help="leave out strategies of more members")
    parser.add_argument("--max-runs", type=int, default=0, help="leave out strategies of more training runs")
    parser.add_argument("--hessians", nargs="*", default=["unweighted", "weighted"])
    parser.add_argument("--other-bank", action="store_true", help="a second ground truth beside the setting's own")
    parser.add_argument(
        "--other-class", action="store_true", help="explain the margin of a class that is not the label; 100 subsets"
    )
    parser.add_argument("--again", action="store_true", help="make records that are there again")
    parser.add_argument("--publish", action="store_true", help="keep the result in the package, for byline recommend")
    parser.add_argument("--earlier", action="store_true", help="show and keep published rows without records here too")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    options = parser.parse_args()
    out = folder_of(options)
    setting = setting_of(options.setting)
    if options.other_class:
        if options.publish:
            raise SystemExit("--publish keeps the figures of a setting; with --other-class it is another one")
        setting, out = other_class(setting), out / "other-class"
    if not options.table:
        run(options, setting, out)
    shop = Workshop(setting, out, lambda sentence: None, progress=False)
    path = out / f"bank-{shop.key(part='bank', recipe=asdict(setting.bank_recipe))}.safetensors"
    ceiling = noise_ceiling(byline.Bank.load(path))[1] if path.exists() else None
    output = setting.task().name if options.publish else None
    report(out, options.setting, None if ceiling is None or math.isnan(ceiling) else ceiling, output, options.earlier)


if __name__ == "__main__":
    main()
