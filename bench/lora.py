"""What makes adapters good voters on a transformer: rank, epochs, number, targets, and the columns kept of each.

    python bench/lora.py --json runs/lora.json

Every row is TRAK with `Factorized(columns, "pca")` on the models and the ground truth of ``byline bench
tunes-transformer``, which it makes where they are not there. Percentages compare with independently trained models of
equal LDS, interpolated, and of the same columns. Rows are kept in the run folder: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import byline
from byline import settings
from byline.evaluate.savings import add_savings
from byline.features import Factorized
from byline.methods import TRAK
from byline.settings.bench import measured_row
from byline.settings.rows import ADAPTERS, Row
from byline.settings.workshop import Workshop
from common import environment, save, table
from tables import costs


def lora(models: int = 1, each: int = 4, **options: Any) -> Row:
    return Row("lora", models, each, {**ADAPTERS, **options})


def rows_of(wide: int, narrow: tuple[int, ...], targets: dict[str, list[str]]) -> Iterator[tuple[str, int, Row]]:
    """(what is asked, columns, row): the study at the first of the narrow widths, the ends at all of them."""
    first = narrow[0]
    for columns in (wide, *narrow):
        for models in (1, 2, 5, 10):
            yield "naive", columns, Row("independent", models)
    for rank in (2, 8, 32):
        yield "rank", first, lora(rank=rank)
    for epochs in (1, 3, 6):
        yield "epochs", first, lora(epochs=epochs)
    for each in (1, 2, 4, 8):
        yield "adapters", first, lora(each=each)
    for names in targets.values():
        yield "targets", first, lora(targets=names)
    for columns in (wide, *narrow):
        yield "columns", columns, lora()
        yield "columns", columns, lora(3, 4)
        for kind, models, each, options in (
            ("forward-only", 1, 10, {"p": 0.1}),
            ("forward-only", 5, 5, {"p": 0.3}),
            ("trajectory", 1, 5, {}),
            ("trajectory", 1, 10, {}),
        ):
            yield "others", columns, Row(kind, models, each, options)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    base = settings.get(options.setting)
    if options.quick:
        base = base.shortened(base)
    folder = options.out or Path("runs") / options.setting
    shop = Workshop(base, folder, lambda sentence: print(f"  {sentence}", file=sys.stderr), options.progress)
    models, recipe = shop.models(10), base.bank_recipe
    bank = shop.bank(recipe)
    named = [name for name, module in base.build().named_modules() if type(module).__name__ == "Linear"]
    targets = {
        "attention": [name for name in named if name.endswith((".qkv", ".out"))],
        "the rest": [name for name in named if not name.endswith((".qkv", ".out", "distance")) and name != "head"],
    }
    wide, *narrow = options.columns
    found: dict[int, list[dict[str, Any]]] = {}
    done = set()
    for asked, columns, row in rows_of(wide, tuple(narrow), targets):
        if (columns, str(row)) in done or (options.only and asked not in options.only):
            continue
        done.add((columns, str(row)))
        print(f"{asked}: {row.name} {row.detail}, {columns} columns", file=sys.stderr, flush=True)
        shop.setting = replace(base, features=partial(Factorized, columns, "pca"))
        made = shop.row(
            lambda row=row: measured_row(shop, row, models, bank, [], options.progress),  # type: ignore[misc]
            TRAK,
            row=row.to_dict(),
            columns=columns,
            bank=asdict(recipe),
        )
        found.setdefault(columns, []).append({**made, "asked": asked, "columns": columns})
    rows = [row for own in found.values() for row in add_savings(own)]
    kept = [{name: value for name, value in row.items() if name != "strongest"} for row in rows]
    return {"setting": options.setting, "byline": byline.__version__, "rows": kept}


def show(rows: list[dict[str, Any]]) -> str:
    header = ["columns", "ensemble", "adapters", "LDS", "interval", "training", "serving a query", "space"]
    lines = []
    for row in rows:
        low, high = row["interval"]
        name = row["name"] if row["kind"] in ("independent", "lora") else f"{row['name']} {row['detail']}".strip()
        detail = row["detail"].replace(", lr 0.001", "") if row["kind"] == "lora" else ""
        if "targets" in detail:
            detail = "attention alone" if "qkv" in detail else "all but attention"
        lines.append([str(row["columns"]), name, detail, f"{row['lds']:.3f}", f"{low:.2f} to {high:.2f}", *costs(row)])
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/lora.py --json runs/lora.json",
    )
    parser.add_argument("--setting", default="tunes-transformer", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="run folder (runs/SETTING)")
    parser.add_argument(
        "--columns",
        type=int,
        nargs="+",
        default=[2048, 512, 128],
        help="the widest first (2048 512 128)",
    )
    parser.add_argument(
        "--only", nargs="+", help="parts of the study: naive, rank, epochs, adapters, targets, columns, others"
    )
    parser.add_argument("--quick", action="store_true", help="a small model of few tunes: to see that it runs")
    parser.add_argument("--progress", action="store_true", help="show bars")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    found = {**measure(options), "environment": environment()}
    print(show(found["rows"]))
    save(options.json, found)


if __name__ == "__main__":
    main()
