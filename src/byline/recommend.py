"""Which ensemble to use for a budget, from what was measured.

The measurements are those of ``bench/frontier.py``, kept in the package as data: LDS, training, serving and space of
every strategy on every setting that was run. Nothing here knows more than they do; the advice says which they were.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from statistics import fmean
from typing import Any

from torch import nn

from byline.ensembles.base import check_count
from byline.task import Task

BUDGETS = ("trainings", "serving", "space")
NAIVE = "independent 5"
SHORTER = {"short": (3, 5), "brief": (5, 3)}
"""Of the runs that are shorter than a full one: which part of its epochs they have, and how many at least."""
WIDE = 20
"""Strategies of a setting that counts beside others."""


def epochs_of(length: str, epochs: int) -> int:
    """The epochs of a run: "full"; "short", a third but five where there are as many; "brief", a fifth but three."""
    part, least = SHORTER.get(length, (1, 1))
    return max(epochs // part, min(least, epochs))


@dataclass(frozen=True)
class Advice:
    """A strategy, and what to expect of it.

    Attributes:
        strategy: Its name in the measurements.
        hessian: Of `byline.TRAK`.
        residual: Likewise.
        trainings: What training it costs, in full trainings of one model.
        serving: What a query costs, over what it costs with five independent models.
        space: What is kept, over what five independent models keep.
        share: Its LDS over the noise ceiling, the mean over the settings.
        low: The lowest LDS of a seed, on any of the settings.
        high: The highest.
        settings: What it was measured on.
        code: How it is made.
        reason: Why it is named.
    """

    strategy: str
    hessian: str
    residual: str
    trainings: float
    serving: float
    space: float
    share: float
    low: float
    high: float
    settings: tuple[str, ...]
    code: str
    reason: str = ""


def measured() -> dict[str, dict[str, Any]]:
    """What was measured, by setting."""
    folder = files("byline") / "settings" / "measured"
    found = [json.loads(f.read_text(encoding="utf-8")) for f in folder.iterdir() if f.name.endswith(".json")]
    return {one["setting"]: one for one in sorted(found, key=lambda one: one["setting"])}


def budget(text: str) -> dict[str, float]:
    """Limits as they are written on the command line: ``trainings=1,serving=0.1``.

    Raises:
        ValueError: another name, or no number above 0.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in BUDGETS or not number > 0:
            raise ValueError(
                f"budget is {text!r}; expected numbers above 0 such as trainings=1 (full trainings of one model), "
                "serving=0.1 or space=0.1 (of what five independent models take)"
            )
        found[name] = number
    return found


def recommend(
    what: str | Task,
    limits: Mapping[str, float],
    count: int = 3,
    data: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Advice]:
    """The strategies within a budget, the best first.

    Args:
        what: the name of a measured setting, which is then the only one to count; or a task, for which all settings
            count that have its output, or all where none has (of few strategies only where there are no others), and
            whose model rules out what it cannot do.
        limits: of "trainings", "serving" and "space", as `budget` reads them; what is left out has none.
        count: how many.
        data: the measurements; those of the package by default.

    Raises:
        TypeError: ``what`` is neither.
        ValueError: a setting that was not measured, limits of something else, or nothing is within the budget.
    """
    if not isinstance(what, str | Task):
        raise TypeError(f"what is a {type(what).__name__}; expected the name of a setting or a byline.Task")
    check_count(count, "count")
    odd = set(limits) - {"trainings", "serving", "space"}
    if odd:
        raise ValueError(f"limits has {sorted(odd)}; expected some of trainings, serving and space")
    data = measured() if data is None else data
    if isinstance(what, str) and what not in data:
        raise ValueError(
            f"{what} was not measured; expected one of {', '.join(data)}, or module:object of a byline.Task"
        )
    some = [data[what]] if isinstance(what, str) else _like(what, list(data.values()))
    found: dict[tuple[str, str], list[tuple[str, float, list[float], dict[str, Any]]]] = {}
    for one in some:
        by_name = {row["name"]: row for row in one["rows"]}
        for row in one["rows"]:
            if row.get("refused") is None and not (isinstance(what, Task) and _refuses(what.model, row["strategy"])):
                for variant, values in row["lds"].items():
                    if isinstance(what, Task) and what.own_residual and _needs_residual(variant):
                        continue
                    costs = {**_costs(row, by_name), "features": one.get("features", "Exact()"), "by name": by_name}
                    share = fmean(values) / (one["ceiling"] or 1.0)
                    found.setdefault((row["name"], variant), []).append((one["setting"], share, values, costs | row))
    advice = [_advice(key, own) for key, own in found.items() if len(own) == len(some)]
    within = [a for a in advice if all(getattr(a, name) <= most * 1.005 for name, most in limits.items())]
    if not within:
        least = {name: min(getattr(a, name) for a in advice) for name in limits} if advice else {}
        raise ValueError(f"budget is {dict(limits)}, and nothing measured is within it; the least there is: {least}")
    # of one strategy its best variant alone
    best = {a.strategy: a for a in sorted(within, key=lambda a: a.share)}
    ranked = sorted(best.values(), key=lambda a: -a.share)
    # the paper's baseline as the paper has it
    plain = [a.share for a in within if a.strategy.startswith("independent") and a.code.count('"') == 0]
    beside = f"independent models alone reach {max(plain):.0%}" if plain else "independent models are beyond it"
    return [
        replace(a, reason=f"number {place} of {len(ranked)} strategies within the budget; {beside}")
        for place, a in enumerate(ranked[:count], 1)
    ]


def _like(task: Task, every: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The settings that count: advice is of strategies that all of them measured, so narrow ones step back."""
    like = [one for one in every if one["output"] == task.name] or every
    return [one for one in like if len(one["rows"]) >= WIDE] or like


def _refuses(model: nn.Module, strategy: Mapping[str, Any]) -> bool:
    """Whether a strategy needs dropout layers that the model lacks, or parameters or a model of a setting."""
    if strategy.get("params") or strategy.get("simplest") or strategy.get("beside"):
        # what the simplest model costs goes by a setting's vocabulary and inputs
        return True
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) for m in model.modules())
    return strategy["change"] in ("dropout", "forward-only") and not drops


def _needs_residual(variant: str) -> bool:
    """Whether TRAK refuses it for a task whose residual is the caller's own."""
    hessian, _, residual = variant.partition(" ")
    return hessian == "weighted" or residual == "leave-one-out"


def _costs(row: Mapping[str, Any], by_name: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    naive = by_name[NAIVE]
    return {f"{name} share": row[name] / naive[name] for name in ("serving", "space")}


def _advice(key: tuple[str, str], own: Sequence[tuple[str, float, list[float], dict[str, Any]]]) -> Advice:
    name, variant = key
    hessian, _, residual = variant.partition(" ")
    every = [value for _, _, values, _ in own for value in values]
    return Advice(
        strategy=name,
        hessian=hessian,
        residual=residual,
        # where settings differ, the dearest one counts
        trainings=max(row["trainings"] for *_, row in own),
        serving=max(row["serving share"] for *_, row in own),
        space=max(row["space share"] for *_, row in own),
        share=fmean(share for _, share, _, _ in own),
        low=min(every),
        high=max(every),
        settings=tuple(setting for setting, *_ in own),
        code=_whole(own[0][3]["strategy"], own[0][3], hessian, residual),
    )


def _whole(strategy: Mapping[str, Any], row: Mapping[str, Any], hessian: str, residual: str) -> str:
    """What a user writes; of blended strategies both parts, each from the task and the recipe that are given."""
    own = _code(strategy, row["features"], hessian, residual)
    if not strategy.get("beside"):
        return own
    other = row["by name"][strategy["beside"]]["strategy"]
    return "\n".join(
        [
            "given = task, recipe",
            _code(other, row["features"], hessian, residual),
            "others = attributor.attribute(test_set)",
            "task, recipe = given",
            own,
            "scores = byline.blend(attributor.attribute(test_set), others)",
        ]
    )


def _code(strategy: Mapping[str, Any], features: str, hessian: str, residual: str) -> str:
    """What a user writes, where the setting's own features are these."""
    kind = "crossfit" if strategy["parts"] else "snapshot" if strategy["cycles"] else "independent"
    kind = "trajectory" if strategy["checkpoints"] and kind == "independent" else kind
    options = [f"models={strategy['runs']}"] if strategy["runs"] > 1 else []
    checkpoints = strategy["checkpoints"] or strategy["cycles"]
    options += [f"checkpoints={checkpoints}"] if checkpoints else []
    options += [f"parts={strategy['parts']}"] if strategy["parts"] else []
    options += [f"validation={strategy['validation']}"] if strategy["validation"] else []
    lines = []
    if strategy.get("simplest"):
        lines += ["# simplest: a linear model of the same inputs, of tokens byline.settings.transformer.Bigrams(V)"]
        lines += ["task = task.with_model(simplest)"]
    if (width := strategy.get("width", 1)) != 1:
        lines += [f"# narrow: your architecture, {width:g} times as wide, in eval mode"]
        lines += ["task = task.with_model(narrow)"]
    if strategy["length"] in SHORTER:
        part, least = SHORTER[strategy["length"]]
        epochs = f"max(recipe.epochs // {part}, min({least}, recipe.epochs))"
        lines.append(f"recipe = dataclasses.replace(recipe, epochs={epochs})")
    lines.append(
        f"ensemble = byline.train_ensemble({', '.join(['task', 'train_set', 'recipe', repr(kind), *options])})"
    )
    given = [f"{name}={value!r}" for name, value in strategy["options"].items()]
    change, each = strategy["change"], strategy["each"]
    if change in ("dropout", "forward-only"):
        given += ["forward_only=True"] if change == "forward-only" else []
        lines.append(f"ensemble = byline.Dropout({', '.join(['ensemble', f'masks={each}', *given])})")
    elif change == "weight noise":
        lines.append(f"ensemble = byline.WeightNoise({', '.join(['ensemble', f'draws={each}', *given])})")
    elif change == "lora":
        given = ["task", "ensemble", "train_set", f"adapters={each}", *given]
        lines.append(f"ensemble = byline.train_lora({', '.join(given)})")
    if strategy.get("params"):
        lines.append(f"task = task.choosing({list(strategy['params'])!r})")
    method = ["task", "ensemble"]
    if strategy.get("exact"):
        features = "Exact()"
    # measurements of before there were ranks and dtypes have neither
    kept = f', dtype="{dtype}"' if (dtype := strategy.get("dtype", "float32")) != "float32" else ""
    made = ""
    if strategy.get("rank"):
        some = f", columns={strategy['columns']}" if strategy["columns"] else ""
        made = f"byline.LowRank({strategy['rank']}{some}{kept})"
    elif strategy["columns"]:
        made = f'byline.Factorized({strategy["columns"]}, basis="pca"{kept})'
    elif kept or features != "Exact()" or strategy.get("preconditioned"):
        made = f"byline.{features[:-1]}{kept if features[-2] != '(' else kept.lstrip(', ')})"
    if strategy.get("preconditioned"):
        made = f"byline.Preconditioned({made})"
    if strategy.get("components"):
        made = f"byline.Principal({made}, {strategy['components']}{kept})"
    method += [f"features={made}"] if made else []
    method += [f'hessian="{hessian}"'] if hessian != "unweighted" else []
    method += [f'residual="{residual}"'] if residual != "mean" else []
    lines.append(f"attributor = byline.TRAK({', '.join(method)}).fit(train_set)")
    return "\n".join(lines)
