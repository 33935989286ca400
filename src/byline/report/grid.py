"""The page of a grid: a heat map a measure, the Pareto fronts, and what was refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from byline.ledger import human_flops, human_seconds
from byline.report.plots import GLYPHS, figures, legend, marker, style

_WARMEST = 62  # per cent of the accent in the best cell: text stays legible on it in either theme


def grid_content(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the template of a grid needs beyond what every report has."""
    cells = {(cell["method"], cell["ensemble"]): cell for cell in result["cells"]}
    maps = []
    for measure in result["measures"]:
        name = measure["name"]
        found = (cell["measures"].get(name) or {} for cell in result["cells"])
        # the bank's is that of the LDS; a measure with one of its own has it in its figures
        ceiling = (
            result["bank"].get("ceiling")
            if name == "lds"
            else next(filter(None, (f.get("ceiling") for f in found)), None)
        )
        heat = _map(result, cells, name, measure.get("chance", 0.0))
        maps.append({**heat, **measure, "ceiling": None if ceiling is None else f"{ceiling:.2f}"})
    maps.append(_costs(result, cells))
    points = _points(result)
    return {
        "verdict": grid_verdict(result),
        "maps": maps,
        "ensembles": [
            {**e, "style": style(e["kind"]), "glyph": GLYPHS[marker(e["kind"])]} for e in result["ensembles"]
        ],
        "plots": figures(points, _title(result, "lds"), dense=True) if points else [],
        "legend": legend(points),
        "refusals": _refusals(result),
        "methods": result["methods"],
    }


def _map(
    result: Mapping[str, Any], cells: Mapping[tuple[str, str], Any], name: str, chance: float = 0.0
) -> dict[str, Any]:
    lines = [line for line in result["baselines"] if line["measure"] == name and line["mean"] is not None]
    found = [c["measures"].get(name) for c in cells.values()]
    means = [f["mean"] for f in [*found, *lines] if f and f["mean"] is not None]
    low, high = min([*means, chance]), max([*means, chance + 1e-9])
    best = max(means, default=None)

    def heat(value: float) -> float:
        return round(_WARMEST * max(0.0, value - low) / (high - low), 1)

    rows = []
    for method in result["methods"]:
        row = []
        for ensemble in result["ensembles"]:
            cell = cells[method["name"], ensemble["name"]]
            figure = cell["measures"].get(name) or {}
            mean = figure.get("mean")
            row.append(
                {
                    "ensemble": ensemble["name"],
                    "value": None if mean is None else f"{mean:.3f}",
                    "interval": None if mean is None else interval(figure),
                    "gain": gain(figure.get("gain")),
                    "heat": 0 if mean is None else heat(mean),
                    "best": mean is not None and mean == best,
                    "why": cell["refused"] or "not measured",
                }
            )
        rows.append({"title": method["title"], "cells": row})
    baselines = [
        {
            "title": line["title"],
            "value": f"{line['mean']:.3f}",
            "interval": interval(line),
            "heat": heat(line["mean"]),
            "note": line.get("note") or f"no attribution, training {human_flops(line['flops'])}",
        }
        for line in lines
    ]
    return {"rows": rows, "baselines": baselines}


def interval(figure: Mapping[str, Any]) -> str:
    """`0.41 to 0.47`, or nothing."""
    return "" if figure.get("low") is None else f"{figure['low']:.2f} to {figure['high']:.2f}"


def gain(figure: Mapping[str, Any] | None) -> str:
    """`+0.04 (+0.02 to +0.06) against one model`, or nothing."""
    if not figure:
        return ""
    return f"{figure['mean']:+.3f} ({figure['low']:+.3f} to {figure['high']:+.3f}) against one model"


def _costs(result: Mapping[str, Any], cells: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """CPU seconds of fitting and of serving every query, and no heat: what is dear is not good."""
    queries = result["setting"]["n_test"]
    rows = []
    for method in result["methods"]:
        row = []
        for ensemble in result["ensembles"]:
            cell = cells[method["name"], ensemble["name"]]
            done = cell["refused"] is None
            row.append(
                {
                    "ensemble": ensemble["name"],
                    "value": human_seconds(cell["fitting"]["seconds"]) if done else None,
                    "interval": f"+ {human_seconds(cell['serving']['seconds'] * queries)}" if done else None,
                    "gain": "",
                    "heat": 0,
                    "best": False,
                    "why": cell["refused"],
                }
            )
        rows.append({"title": method["title"], "cells": row})
    return {
        "name": "cost",
        "title": "What it costs",
        "says": f"CPU seconds to fit, and to serve all {queries} test examples; training the models is not in it.",
        "ceiling": None,
        "rows": rows,
        "baselines": [],
    }


def _points(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    titles = {method["name"]: method["title"] for method in result["methods"]}
    points = []
    for cell in result["cells"]:
        figure = cell["measures"].get("lds") or {}
        if cell["refused"] is None and figure.get("mean") is not None and cell["training"]["flops"] > 0:
            points.append(
                {
                    **cell,
                    "name": f"{titles[cell['method']]}, {cell['ensemble']}",
                    "label": titles[cell["method"]],
                    "lds": figure["mean"],
                    "interval": [figure["low"], figure["high"]],
                }
            )
    return points


def _title(result: Mapping[str, Any], name: str) -> str:
    return next((measure["title"] for measure in result["measures"] if measure["name"] == name), name)


def _refusals(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Refusals with one reason together."""
    titles = {method["name"]: method["title"] for method in result["methods"]}
    grouped: dict[str, list[str]] = {}
    for cell in result["cells"]:
        if cell["refused"] is not None:
            grouped.setdefault(cell["refused"], []).append(f"{titles[cell['method']]} under {cell['ensemble']}")
    return [{"where": "; ".join(where), "why": why} for why, where in grouped.items()]


def helped(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per method: the LDS of one model, and of its best cheap ensemble, for methods that have both."""
    out = []
    for method in result["methods"]:
        found = [
            (cell, cell["measures"]["lds"])
            for cell in result["cells"]
            if cell["method"] == method["name"] and (cell["measures"].get("lds") or {}).get("mean") is not None
        ]
        one = next((f for c, f in found if c["kind"] == "independent" and c["models"] == 1), None)
        cheap = [(c, f) for c, f in found if c["kind"] != "independent" and c["models"] == 1]
        if one and cheap:
            cell, best = max(cheap, key=lambda pair: pair[1]["mean"])
            out.append({"title": method["title"], "one": one, "cheap": best, "ensemble": cell["ensemble"]})
    return out


def grid_verdict(result: Mapping[str, Any]) -> str:
    """How many methods gained from a cheap ensemble, beyond their intervals."""
    found: Sequence[Mapping[str, Any]] = helped(result)
    where = result["setting"]["name"]
    if not found:
        return f"{len(result['cells'])} cells on {where}."
    gained = [line for line in found if line["cheap"]["low"] > line["one"]["high"]]
    top = max(found, key=lambda line: line["cheap"]["mean"])
    return (
        f"On {where}, {len(gained)} of {len(found)} methods gain LDS beyond their intervals from a cheap ensemble of "
        f"one model or run; the best is {top['title']} under {top['ensemble']}, {top['cheap']['mean']:.3f} against "
        f"{top['one']['mean']:.3f} from one model."
    )
