"""The page: the result of a comparison, made ready for the template.

The template only places things; every number is turned into words here. Nothing in the page is fetched: the
style, plotly's script (from the installed package) and the pictures are inside the file, and a content
security policy forbids the browser to load anything else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from byline.ledger import human_bytes, human_flops, human_seconds
from byline.report.grid import grid_content
from byline.report.picture import data_uri
from byline.report.plots import GLYPHS, figures, legend, marker, style
from byline.report.words import as_good_as, percent, verdict


def build(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes the report of a comparison as one HTML file and returns its path.

    Args:
        result: what `byline.settings.bench.run` or `byline.settings.grid.run` returns and writes as JSON.
        path: where to write; the folder is made if there is none.
    """
    return _placed(render(result), path)


def write(template: str, content: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes a page without plots as one HTML file and returns its path.

    Args:
        template: Its name among the assets; it extends the base.
        content: What it places.
        path: Where to write; the folder is made if there is none.
    """
    return _placed(_rendered(template, content, ""), path)


def _placed(text: str, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved into place: a reader never sees half a report.
    partial = target.with_name(target.name + ".partial")
    # A file name may hold bytes that are no text, which Python reads as lone surrogates.
    partial.write_text(text, encoding="utf-8", errors="replace")
    os.replace(partial, target)
    return target


def render(result: Mapping[str, Any]) -> str:
    """The report as a string of HTML."""
    from plotly.offline import get_plotlyjs

    grid = result.get("kind") == "grid"
    content = {
        "setting": result["setting"],
        "facts": _facts(result),
        "level": f"{result.get('bank', {}).get('level', 0.95) * 100:g} %",
        "notes": result.get("notes", []),
        "environment": result.get("environment", {}),
        "command": result.get("command", ""),
        "numbers": "grid.json" if grid else "results.json",
        **(grid_content(result) if grid else _content(result)),
    }
    return _rendered("grid.html.j2" if grid else "report.html.j2", content, get_plotlyjs())


def _rendered(template: str, content: Mapping[str, Any], plotly: str) -> str:
    environment = Environment(
        loader=PackageLoader("byline.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assets = Path(__file__).parent / "assets"
    return environment.get_template(template).render(
        # These three are our own files and plotly's, not data: they go in as they are.
        css=Markup((assets / "report.css").read_text(encoding="utf-8")),
        script=Markup((assets / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(plotly.replace("</script", "<\\/script")),
        **content,
    )


def _content(result: Mapping[str, Any]) -> dict[str, Any]:
    rows, bank = result["rows"], result.get("bank", {})
    return {
        "verdict": verdict(result),
        "rows": _rows(rows, bank.get("ceiling")),
        "plots": figures(rows),
        "legend": legend(rows),
        "examples": [example_of(example) for example in result.get("examples", [])],
        "has_bounds": {(row.get("saved") or {}).get("bound") for row in rows},
        "ceiling": bank.get("ceiling"),
    }


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    setting, bank = result["setting"], result.get("bank", {})
    facts = [
        ("training examples", f"{setting['n_train']:,}".replace(",", "\u202f")),
        ("test examples", f"{setting['n_test']:,}".replace(",", "\u202f")),
    ]
    if bank:
        facts.append(("retrained subsets", f"{bank['subsets']} × {bank['seeds']} seeds"))
        facts.append(("size of a subset", f"{bank['fraction'] * 100:g} %"))
        if bank.get("ceiling") is not None:
            facts.append(("noise ceiling of LDS", f"{bank['ceiling']:.2f}"))
    return facts


def _rows(rows: Sequence[Mapping[str, Any]], ceiling: float | None) -> list[dict[str, Any]]:
    if not rows:
        return []
    # One scale for all bars, with room for the ceiling: how far there is to go belongs to the picture.
    top = max([row["interval"][1] for row in rows] + [row["lds"] for row in rows] + [ceiling or 0.0, 1e-9])
    low = min([row["interval"][0] for row in rows] + [0.0])

    def place(value: float) -> float:
        return round(2 + 96 * (value - low) / (top - low), 2)

    shown = []
    for row in rows:
        shown.append(
            {
                "name": row["name"],
                "style": style(row["kind"]),
                "kind": row["kind"],
                "glyph": GLYPHS[marker(row["kind"])],
                "members": row["members"],
                "detail": row.get("detail", ""),
                "models": row["models"],
                "lds": f"{row['lds']:.3f}",
                "low": f"{row['interval'][0]:.3f}",
                "high": f"{row['interval'][1]:.3f}",
                "bar": {
                    "zero": place(0.0),
                    "value": place(row["lds"]),
                    "low": place(row["interval"][0]),
                    "high": place(row["interval"][1]),
                    "ceiling": None if ceiling is None else place(ceiling),
                },
                "equal": as_good_as(row),
                "costs": [
                    ("Training", _cost(row, "training")),
                    ("Fitting", _cost(row, "fitting")),
                    ("Serving, per query", _cost(row, "serving")),
                    ("Space", _cost(row, "space")),
                ],
            }
        )
    return shown


def _cost(row: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A cell: the cost in words, and the share saved where there is one."""
    saved = row.get("saved") or {}
    share, bound = saved.get(part), saved.get("bound", "equal")
    return {
        "amount": human_bytes(row["space"]) if part == "space" else human_flops(row[part]["flops"]),
        "seconds": "" if part == "space" else human_seconds(row[part]["seconds"]),
        "saved": "" if share is None else percent(share, bound),
        "better": share is not None and share > 0 and bound != "below",
    }


def example_of(example: Mapping[str, Any]) -> dict[str, Any]:
    """A test example and its strongest training examples, as the templates place them."""
    found = [*example["proponents"], *example["opponents"]]
    reach = max((abs(item["score"]) + (item["stderr"] or 0.0) for item in found), default=1.0) or 1.0

    def item(one: Mapping[str, Any], side: str) -> dict[str, Any]:
        error = one["stderr"] or 0.0
        middle = 50 + 46 * one["score"] / reach
        return {
            **picture_of(one, f"{side}: training example {one['index']}, label {one['label']}"),
            "index": one["index"],
            "label": one["label"],
            "name": one.get("name"),
            "unsure": one["stderr"] is not None and abs(one["score"]) <= 2 * one["stderr"],
            "score": f"{one['score']:+.3g}",
            "stderr": f"± {one['stderr']:.1g}" if one["stderr"] is not None else "one member: no error",
            "dot": round(middle, 2),
            "low": round(middle - 46 * error / reach, 2),
            "high": round(middle + 46 * error / reach, 2),
        }

    return {
        **picture_of(example, f"test example {example['index']}, label {example['label']}"),
        "index": example["index"],
        "label": example["label"],
        "predicted": example.get("predicted"),
        "ensemble": example.get("ensemble", ""),
        "sides": [
            {
                "name": "Proponents",
                "words": "training on these pushed the output up",
                "found": [item(one, "proponent") for one in example["proponents"]],
            },
            {
                "name": "Opponents",
                "words": "training on these pushed it down",
                "found": [item(one, "opponent") for one in example["opponents"]],
            },
        ],
    }


def picture_of(example: Mapping[str, Any], alt: str) -> dict[str, Any]:
    """An example's picture or text, and what is read aloud in its place."""
    image = example.get("image")
    return {
        "src": None if image is None else data_uri(image),
        "text": example.get("text"),
        "alt": alt,
    }
