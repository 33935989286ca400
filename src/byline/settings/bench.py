"""The comparison behind `byline demo` and `byline bench`: efficacy beside cost, a row per ensemble.

Every ensemble of `byline.settings.rows` is fitted on the setting's training set and attributes its test set
with the same method (TRAK, exact features, the automatic damping), its scores are held against the same bank
of retrained models, and its ledger is read. All parts are kept in the run folder, see
`byline.settings.workshop`.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import byline
from byline.engines.base import Engine
from byline.evaluate.bank import Bank
from byline.evaluate.lds import lds, noise_ceiling
from byline.evaluate.savings import add_savings
from byline.features import Exact
from byline.ledger import Cost, Ledger
from byline.methods import TRAK
from byline.scores import Scores
from byline.settings.base import BankRecipe, Setting
from byline.settings.members import ensemble_of, models_needed
from byline.settings.rows import Row, rows_of
from byline.settings.workshop import Tell, Trained, Workshop, save_json

QUICK_BANK = BankRecipe(subsets=16, fraction=0.5, seeds=2)
EXAMPLES, STRONGEST = 4, 5
LEVEL = 0.95


def run(
    setting: Setting,
    folder: str | os.PathLike[str],
    *,
    quick: bool = False,
    rows: Sequence[Row] | None = None,
    bank_recipe: BankRecipe | None = None,
    command: str = "",
    tell: Tell = lambda sentence: None,
    progress: bool = False,
    engine: str | Engine | None = None,
) -> dict[str, Any]:
    """Compares the ensembles of a setting and writes `results.json`.

    Args:
        setting: Which benchmark.
        folder: Where everything that was made is kept; a second run takes from it what has the same
            configuration.
        quick: Fewer rows and a smaller bank: to see that all works, not to quote.
        rows: The ensembles; those of the setting when left out.
        bank_recipe: The ground truth; the setting's when left out.
        command: What makes this result again, for the report.
        tell: Gets a sentence about each step.
        progress: Whether to show bars on the terminal.
        engine: Where models are trained, features computed and scores made.

    Returns:
        The result, plain data: what `byline.report.build` takes.
    """
    rows = rows_of(setting.name, quick) if rows is None else rows
    setting, recipe = form(setting, quick, bank_recipe)
    shop = Workshop(setting, folder, tell, progress, engine)
    needed = models_needed(rows)
    models = shop.models(needed) if needed else []
    bank = shop.bank(recipe)
    chosen, predicted = _queries(setting, models)

    measured = []
    for number, row in enumerate(rows, 1):
        tell(f"{number} of {len(rows)}: {row.name}")
        measured.append(
            shop.row(
                lambda row=row: measured_row(shop, row, models, bank, chosen, progress),  # type: ignore[misc]
                TRAK,
                row=row.to_dict(),
                models=needed,
                bank=asdict(recipe),
                queries=chosen,
                **made_with(setting),
            )
        )
    best = max(measured, key=lambda done: done["lds"], default=None)
    split_half, ceiling = noise_ceiling(bank)
    result = {
        "format": 1,
        "setting": {
            "name": setting.name,
            "description": setting.description,
            "n_train": len(setting.train_set),
            "n_test": len(setting.test_set),
        },
        "quick": quick,
        "bank": {
            **asdict(recipe),
            "ceiling": finite(ceiling),
            "split_half": finite(split_half),
            "level": LEVEL,
            "cost": bank.metadata.get("cost"),
        },
        "rows": [{key: value for key, value in row.items() if key != "strongest"} for row in add_savings(measured)],
        "examples": _examples(setting, best, chosen, predicted) if best and setting.image_shape else [],
        "owners": _owners(setting, best, chosen) if best else [],
        "notes": _notes(setting, recipe, quick),
        "environment": environment(),
        "command": command,
    }
    save_json(Path(folder) / "results.json", result)
    return result


def form(setting: Setting, quick: bool, bank: BankRecipe | None) -> tuple[Setting, BankRecipe]:
    """The setting and the bank of a comparison: as given, or the short form of both."""
    if quick and setting.shortened is not None:
        setting = setting.shortened(setting)
        return setting, bank or setting.bank_recipe
    return setting, bank or (QUICK_BANK if quick else setting.bank_recipe)


def made_with(setting: Setting) -> dict[str, Any]:
    """What decides the scores of a setting beyond its data and models, where it is not what most settings have."""
    return {} if setting.features is Exact else {"features": setting.features().describe()}


def measured_row(
    shop: Workshop, row: Row, models: Sequence[Trained], bank: Bank, chosen: Sequence[int], progress: bool
) -> dict[str, Any]:
    """Fits and attributes one ensemble: LDS, costs, and the strongest examples of the chosen queries."""
    setting = shop.setting
    ensemble, training, weights = ensemble_of(shop, row, models)
    ledger, queries = Ledger(), len(setting.test_set)
    with shop.desk() as options:
        options |= {"ledger": ledger, "progress": progress, "batch_size": setting.batch_size}
        attributor = TRAK(setting.task(), ensemble, features=setting.features(), damping="auto", **options)
        attributor.fit(setting.train_set)
        scores = attributor.attribute(setting.test_set)
        features = attributor.store.nbytes()
    efficacy = lds(scores, bank, confidence=LEVEL)
    return {
        "name": row.name,
        "kind": row.kind,
        "detail": row.detail,
        "models": row.models,
        "members": row.models * row.each,
        "lds": efficacy.mean,
        # what the same scores get from a noisier ground truth of two models a subset
        "lds_two_seeds": lds(scores, bank.with_seeds(min(2, bank.outputs.shape[1])), bootstrap=2).mean,
        "interval": list(efficacy.interval),
        "training": plain(training),
        "fitting": plain(ledger.fitting),
        "serving": plain(ledger.serving.scaled(1 / queries)),
        "space": weights + features,
        "space_parts": {"weights": weights, "features": features},
        "damping": scores.info.get("damping_median"),
        "strongest": {str(query): _strongest(scores, query) for query in chosen},
    }


def _strongest(scores: Scores, query: int) -> dict[str, list[dict[str, Any]]]:
    """The strongest proponents and opponents of a query; what has the other sign is neither."""
    top = scores.top(min(STRONGEST, scores.shape[1]))[query]
    return {
        side: [
            {"index": int(index), "score": float(score), "stderr": finite(error)}
            for index, score, error in zip(ranked.indices, ranked.scores, ranked.stderr, strict=True)
            if sign * score > 0
        ]
        for side, ranked, sign in (("proponents", top.proponents, 1), ("opponents", top.opponents, -1))
    }


def _queries(setting: Setting, models: Sequence[Trained]) -> tuple[list[int], dict[int, int]]:
    """Test examples for the report, by rule: the first the model gets wrong, then the first of other labels.

    Returns their places and what the first model predicts for them. Where examples have owners instead of pictures: the
    first.
    """
    if setting.owners is not None:
        return list(range(min(EXAMPLES, len(setting.test_set)))), {}
    if setting.image_shape is None or not models:
        return [], {}
    model = setting.build().eval()
    model.load_state_dict(models[0].state)
    inputs, labels = (torch.stack(list(column)) for column in zip(*_items(setting.test_set), strict=True))
    with torch.no_grad():
        said = model(inputs).argmax(1)
    wrong = torch.nonzero(said != labels).flatten().tolist()
    chosen, seen = [int(i) for i in wrong[:1]], {int(labels[i]) for i in wrong[:1]}
    for place, label in enumerate(labels.tolist()):
        if len(chosen) == EXAMPLES:
            break
        if label not in seen:
            chosen.append(place)
            seen.add(label)
    return chosen, {place: int(said[place]) for place in chosen}


def _items(dataset: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(dataset[i][0], torch.as_tensor(dataset[i][1])) for i in range(len(dataset))]


def _examples(
    setting: Setting, best: dict[str, Any], chosen: Sequence[int], predicted: dict[int, int]
) -> list[dict[str, Any]]:
    """The chosen queries with pictures and names, as the best row explains them."""

    def name(label: int) -> str:
        return setting.class_names[label] if label < len(setting.class_names) else str(label)

    def shown(dataset: Any, index: int) -> dict[str, Any]:
        picture = np.asarray(dataset[index][0], dtype=np.float64).reshape(setting.image_shape or ())
        low, span = picture.min(), np.ptp(picture) or 1.0
        grey = np.round((picture - low) / span * 255).astype(int)
        return {"index": index, "label": name(int(dataset[index][1])), "image": grey.tolist()}

    return [
        {
            **shown(setting.test_set, query),
            "predicted": name(predicted[query]),
            "ensemble": best["name"],
            **{
                side: [{**item, **shown(setting.train_set, item["index"])} for item in found]
                for side, found in best["strongest"][str(query)].items()
            },
        }
        for query in chosen
    ]


def _owners(setting: Setting, best: dict[str, Any], chosen: Sequence[int]) -> list[dict[str, Any]]:
    """Whose the chosen queries are, and whose the examples that the best row names for them."""
    if setting.owners is None:
        return []
    train, test = setting.owners()
    return [
        {
            **test[query],
            "index": query,
            "ensemble": best["name"],
            **{
                side: [{**item, **train[item["index"]]} for item in found]
                for side, found in best["strongest"][str(query)].items()
            },
        }
        for query in chosen
    ]


def _notes(setting: Setting, bank: BankRecipe, quick: bool) -> list[str]:
    recipe = setting.recipe
    features = "exact features (no projection)" if setting.features is Exact else repr(setting.features())
    said = [
        *sources(setting),
        f"Training: {recipe.optimizer}, learning rate {recipe.lr:g}, momentum {recipe.momentum:g}, weight decay "
        f"{recipe.weight_decay:g}, batch {recipe.batch_size}, {recipe.epochs} epochs; a short run has as many "
        "epochs as checkpoints.",
        f"Ground truth: {bank.subsets} random subsets of {bank.fraction * 100:g} % of the training set, "
        f"{bank.seeds} models on each. What it cost is part of no row.",
        f"Method: TRAK with {features}, the damping chosen automatically and without the "
        "ground truth. All rows share models, bank and test examples.",
        "Seconds are those of this machine while it ran. Models trained side by side share their time, so a model's "
        "seconds depend on how many were; its FLOPs do not.",
        "Intervals are bootstrapped over subsets and test examples, each row by itself.",
        "Fitting: features of the training set, its kernel and the factorisation of that, once. Serving: the whole "
        "test set once, divided by its size.",
        "Space: the weights of trained models, adapters and checkpoints, and the features kept for serving.",
        "Mask rates and noise scales are the library's defaults; they were chosen on fashion-mlp with its "
        "ground truth at hand, so that setting flatters them a little.",
    ]
    if setting.image_shape is not None:
        said.append(
            "Test examples shown: the first that the first model gets wrong, then the first of each other label, "
            f"{EXAMPLES} in all, explained by the row of highest LDS."
        )
    if quick:
        said.insert(0, "Short form (--quick): few rows and a small bank. It shows that all works; do not quote it.")
    return said


def sources(setting: Setting) -> list[str]:
    """Where the data were found, for settings whose data depend on the machine."""
    return [] if setting.source is None else [setting.source()]


def environment() -> dict[str, str]:
    """Where this ran."""
    return {
        "byline": byline.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def plain(cost: Cost) -> dict[str, float]:
    """A cost as JSON."""
    return {"flops": cost.flops, "seconds": cost.seconds, "wall": cost.wall}


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
