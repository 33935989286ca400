"""Results on a terminal: a table, or a few lines a row where the terminal is too narrow for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from byline.ledger import human_bytes, human_flops, human_seconds
from byline.report.grid import grid_verdict
from byline.report.words import as_good_as, percent, verdict

TABLE_WIDTH = 108
"""Narrower terminals get lines instead of a table: columns must not be folded into unreadable strips."""


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints the rows and the verdict: a table, or a few lines a row where the terminal is too narrow for one."""
    rows = [_cells(row) for row in result["rows"]]
    console.print()
    if console.width >= TABLE_WIDTH:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("ensemble", overflow="fold")
        for heading in ("LDS", "as good as"):
            table.add_column(heading)
        for heading in ("training", "serving a query", "space"):
            table.add_column(heading, justify="right")
        for name, lds, equal, *costs in rows:
            table.add_row(f"[bold]{name}[/bold]", lds, equal, *("\n".join(cost) for cost in costs))
        console.print(table)
    else:
        for name, lds, equal, *costs in rows:
            console.print(f"[bold]{name}[/bold]  LDS {lds}", highlight=False)
            for what, cost in zip(("training", "serving", "space"), costs, strict=True):
                console.print(f"  [dim]{what}[/dim] {'  '.join(cost)}", highlight=False)
            if equal != "–":
                console.print(f"  [dim]as good as[/dim] {equal} [dim]trained independently[/dim]")
    bank = result["bank"]
    console.print(
        f"\n[dim]Truth: {bank['subsets']} subsets × {bank['seeds']} seeds. Percentages compare with independently "
        "trained models of equal LDS; ≥ where no such ensemble that was run is as good, then with the largest."
        "[/dim]",
        highlight=False,
    )
    console.print(f"\n{escape(verdict(result))}", highlight=False)


def _cells(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Name, LDS, the naive ensemble of equal LDS, and (cost, share saved) of training, serving and space."""
    saved = row["saved"] or {}
    low, high = row["interval"]

    def cost(part: str) -> tuple[str, ...]:
        if part == "space":
            words = human_bytes(row["space"])
        else:
            words = f"{human_flops(row[part]['flops'])}, {human_seconds(row[part]['seconds'])}"
        if saved.get(part) is None:
            return (words,)
        colour = "green" if saved[part] > 0 and saved["bound"] != "below" else "yellow"
        return words, f"[{colour}]{percent(saved[part], saved['bound'])}[/{colour}]"

    lds = f"[bold]{row['lds']:.3f}[/bold] [dim]{low:.2f} to {high:.2f}[/dim]"
    return escape(row["name"]), lds, as_good_as(row), cost("training"), cost("serving"), cost("space")


def show_grid(result: Mapping[str, Any], console: Console) -> None:
    """Prints a table a measure, methods down and ensembles across, and the verdict."""
    ensembles = [ensemble["name"] for ensemble in result["ensembles"]]
    cells = {(cell["method"], cell["ensemble"]): cell for cell in result["cells"]}
    for measure in result["measures"]:
        table = Table(title=measure["title"], title_justify="left", box=None, pad_edge=False, header_style="dim")
        table.add_column("method", no_wrap=True)
        for name in ensembles:
            table.add_column(escape(name), justify="right")
        for method in result["methods"]:
            figures = [cells[method["name"], name]["measures"].get(measure["name"]) for name in ensembles]
            said = ["–" if not f or f["mean"] is None else f"{f['mean']:.3f}" for f in figures]
            table.add_row(escape(method["title"]), *said)
        for line in result["baselines"]:
            if line["measure"] == measure["name"] and line["mean"] is not None:
                table.add_row(f"[dim]{escape(line['title'])}[/dim]", f"{line['mean']:.3f}")
        console.print()
        console.print(table)
    refused = [cell for cell in result["cells"] if cell["refused"]]
    if refused:
        console.print(
            f"\n[dim]–: no meaning, not measured, or failed ({len(refused)} cells); the report says why.[/dim]"
        )
    console.print(f"\n{escape(grid_verdict(result))}", highlight=False)
