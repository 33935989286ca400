"""The comparison behind `byline bench SETTING --methods … --ensembles …`: every method under every ensemble.

Each cell is fitted on the setting's training set, attributes its test set, and is judged by every measure that was
asked for. What a method refuses stays in the grid with its sentence. The scores themselves are kept in the run folder,
so a further measure costs no attribution.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byline.engines.base import Engine
from byline.evaluate.bank import Bank, read, write
from byline.evaluate.lds import noise_ceiling
from byline.ledger import Ledger
from byline.methods import Influence
from byline.methods.registry import MethodInfo, make, methods
from byline.scores import Scores
from byline.settings.base import BankRecipe, Setting
from byline.settings.bench import LEVEL, environment, finite, form, made_with, plain, sources
from byline.settings.judges import JUDGES, Judge, relabelled
from byline.settings.members import ensemble_of, models_needed
from byline.settings.rows import GRID, Row, parse
from byline.settings.workshop import Tell, Trained, Workshop, code_of, save_json

STEPPED = ("tracin", "dvemb")
"""Methods whose definition weighs checkpoints by the step sizes that led to them."""

QUICK_QUERIES = 50


@dataclass
class Cell:
    """A method under an ensemble, ready to be judged."""

    shop: Workshop
    info: MethodInfo
    row: Row
    models: Sequence[Trained]
    queries: int
    progress: bool = False

    @property
    def key(self) -> str:
        """What decides its scores."""
        return self.shop.key(
            part="scores",
            code=code_of(self.info.cls),
            method=self.info.name,
            row=self.row.to_dict(),
            models=len(self.models),
            queries=self.queries,
            **(made_with(self.shop.setting) if self.chooses_features else {}),
        )

    @property
    def chooses_features(self) -> bool:
        """Whether the method reads gradients in whatever form the setting keeps them."""
        given = "gradients" not in self.info.needs or "features" in self.info.options
        return not given and not issubclass(self.info.cls, Influence)

    def _attributor(self, ledger: Ledger, where: dict[str, Any]) -> tuple[Any, Any, int]:
        ensemble, training, weights = ensemble_of(self.shop, self.row, self.models, self.info.name in STEPPED)
        setting = self.shop.setting
        task = setting.task()
        options = {"ledger": ledger, "progress": self.progress, "batch_size": setting.batch_size, **where}
        if self.chooses_features:
            options["features"] = setting.features()
        return make(self.info.name, task, ensemble, **options), training, weights

    def scores(self) -> tuple[Scores, dict[str, Any]]:
        """(queries, n_train) scores and what they cost: found, or made and kept.

        Raises:
            ValueError: the method refuses the ensemble, or fails on it.
        """
        path = self.shop.folder / "scores" / f"{self.key}.safetensors"
        if path.exists():
            found = Scores.load(path)
            return found, found.info["cost"]
        ledger = Ledger()
        with self.shop.desk() as where:
            attributor, training, weights = self._attributor(ledger, where)
            attributor.fit(self.shop.setting.train_set)
            scores = attributor.attribute(first(self.shop.setting.test_set, self.queries))
            features = attributor.store.nbytes()
        cost = {
            "training": plain(training),
            "fitting": plain(ledger.fitting),
            "serving": plain(ledger.serving.scaled(1 / self.queries)),
            "space": weights + features,
        }
        scores.info["cost"] = cost
        scores.save(path)
        return scores, cost

    def suspicion(self) -> np.ndarray:
        """(n_train,) self-influence: found, or made and kept."""
        path = self.shop.folder / "suspicion" / f"{self.key}.safetensors"
        if path.exists():
            return read(path)[0]["suspicion"]
        with self.shop.desk() as where:
            attributor, _, _ = self._attributor(Ledger(), where)
            values = attributor.fit(self.shop.setting.train_set).self_influence()
        write(path, {"suspicion": values}, {"method": self.info.name, "row": self.row.to_dict()})
        return values


def first(dataset: Any, count: int) -> Any:
    """The first examples of a dataset."""
    return dataset if count == len(dataset) else torch.utils.data.Subset(dataset, range(count))


def run(
    setting: Setting,
    folder: str | os.PathLike[str],
    *,
    method_names: Sequence[str] | None = None,
    ensembles: Sequence[str] | None = None,
    measures: Sequence[str] | None = None,
    queries: int | None = None,
    quick: bool = False,
    bank_recipe: BankRecipe | None = None,
    command: str = "",
    tell: Tell = lambda sentence: None,
    progress: bool = False,
    engine: str | Engine | None = None,
) -> dict[str, Any]:
    """Judges every method under every ensemble and writes `grid.json`.

    Args:
        setting: Which benchmark.
        folder: Where everything that was made is kept; a second run takes from it what has the same configuration.
        method_names: Names of the registry; all but the dear ones (`MethodInfo.dear`) when left out.
        ensembles: Names as `byline.settings.rows.parse` reads them.
        measures: Names of `byline.settings.judges.JUDGES`; those that are not dear when left out.
        queries: Number of test examples, from the first; all when left out.
        quick: A small bank and few test examples: to see that all works, not to quote.
        bank_recipe: The ground truth of the LDS; the setting's when left out.
        command: What makes this result again, for the report.
        tell: Gets a sentence about each step.
        progress: Whether to show bars on the terminal.
        engine: Where models are trained, features computed and scores made.

    Returns:
        The result, plain data: what `byline.report.build` takes.

    Raises:
        ValueError: An unknown name, or queries out of range.
    """
    infos = _chosen(method_names)
    rows = [parse(text) for text in ensembles or GRID]
    setting, recipe = form(setting, quick, bank_recipe)
    judges = _judges(measures, setting)
    total = len(setting.test_set)
    count = min(QUICK_QUERIES, total) if queries is None and quick else total if queries is None else queries
    if not 1 <= count <= total:
        raise ValueError(f"queries is {queries}; expected 1 to the {total} test examples")
    shop = Workshop(setting, folder, tell, progress, engine)
    other = Workshop(relabelled(setting), folder, tell, progress, engine) if "mislabel" in judges else None
    models = shop.models(models_needed(rows)) if models_needed(rows) else []
    flipped_models = other.models(models_needed(rows)) if other and models else []
    bank = _restricted(shop.bank(recipe), count) if any(judge.banks for judge in judges.values()) else None

    cells: list[dict[str, Any]] = []
    for row in rows:
        for info in infos:
            cell = Cell(shop, info, row, models, count, progress)
            flipped = Cell(other, info, row, flipped_models, count, progress) if other else None
            tell(f"{len(cells) + 1} of {len(rows) * len(infos)}: {info.title}, {row.name}")
            cells.append(_judged(cell, flipped, judges, bank))
    for judge in judges.values():
        judge.across(cells)
    split_half, ceiling = noise_ceiling(bank) if bank is not None else (float("nan"), float("nan"))
    result = {
        "format": 1,
        "kind": "grid",
        "setting": {
            "name": setting.name,
            "description": setting.description,
            "n_train": len(setting.train_set),
            "n_test": count,
        },
        "quick": quick,
        "bank": {**asdict(recipe), "ceiling": finite(ceiling), "split_half": finite(split_half), "level": LEVEL},
        "methods": [{key: getattr(info, key) for key in ("name", "title", "citation")} for info in infos],
        "ensembles": [{"name": row.name, "kind": row.kind, "detail": row.detail} for row in rows],
        "measures": [judge.describe() for judge in judges.values()],
        "cells": [{key: value for key, value in cell.items() if not key.startswith("_")} for cell in cells],
        "baselines": [
            line for judge in judges.values() for line in judge.baselines(shop, other) if line["measure"] in judges
        ],
        "notes": _notes(setting, recipe, quick, method_names is None),
        "environment": environment(),
        "command": command,
    }
    save_json(Path(folder) / "grid.json", result)
    return result


def _judged(cell: Cell, flipped: Cell | None, judges: dict[str, Judge], bank: Bank | None) -> dict[str, Any]:
    """One cell of the result; a refusal keeps its sentence, and costs the others nothing."""
    done: dict[str, Any] = {
        "method": cell.info.name,
        "ensemble": cell.row.name,
        "kind": cell.row.kind,
        "detail": cell.row.detail,
        "models": cell.row.models,
        "members": cell.row.models * cell.row.each,
        "refused": None,
        "measures": {},
    }
    try:
        scores, cost = cell.scores()
    except (ValueError, TypeError) as error:
        return {**done, "refused": str(error)}
    done.update(cost)
    done["_scores"] = scores
    for name, judge in judges.items():
        done["measures"][name] = judge(cell, flipped, scores, bank)
    return done


def _chosen(names: Sequence[str] | None) -> list[MethodInfo]:
    known = {info.name: info for info in methods()}
    if names is None:
        return [info for info in known.values() if not info.dear]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"methods: no method {', '.join(unknown) or 'named'}; there are {', '.join(known)}")
    return [known[name] for name in names]


def _judges(names: Sequence[str] | None, setting: Setting) -> dict[str, Judge]:
    unknown = [name for name in names or () if name not in JUDGES]
    if unknown:
        raise ValueError(f"measures: no measure {', '.join(unknown)}; there are {', '.join(JUDGES)}")
    can = [name for name, judge in JUDGES.items() if setting.output == "classification" or not judge.labels]
    odd = [name for name in names or () if name not in can]
    if odd:
        raise ValueError(
            f"measures: {', '.join(odd)} needs one label per example, and {setting.name} has none; it can be judged by "
            f"{', '.join(can)}"
        )
    chosen = names if names is not None else [name for name in can if not JUDGES[name].asked]
    return {name: JUDGES[name]() for name in chosen}


def _restricted(bank: Bank, queries: int) -> Bank:
    return Bank(bank.subsets, bank.outputs[:, :, :queries], bank.metadata)


def _notes(setting: Setting, bank: BankRecipe, quick: bool, all_methods: bool) -> list[str]:
    recipe = setting.recipe
    said = [
        *sources(setting),
        f"Training: {recipe.optimizer}, learning rate {recipe.lr:g}, momentum {recipe.momentum:g}, batch "
        f"{recipe.batch_size}, {recipe.epochs} epochs; a short run has as many epochs as checkpoints.",
        f"Ground truth of the LDS: {bank.subsets} random subsets of {bank.fraction * 100:g} % of the training set, "
        f"{bank.seeds} models on each. What it cost is part of no cell.",
        "All cells share models, bank and test examples, and every method runs with its defaults: none was tuned here.",
        "Intervals are bootstrapped, each cell by itself; two cells whose intervals overlap may still differ, and a "
        "grid this size has some that differ by chance.",
        "Seconds are CPU seconds of this machine while it ran.",
    ]
    if all_methods:
        dear: dict[str, list[str]] = {}
        for info in methods():
            if info.dear:
                dear.setdefault(info.dear, []).append(info.name)
        reasons = "; ".join(f"{', '.join(names)} ({why})" for why, names in dear.items())
        said.append(f"Left out, unless they are named with --methods: {reasons}.")
    if quick:
        said.insert(0, "Short form (--quick): a small bank and few test examples. Do not quote it.")
    return said
