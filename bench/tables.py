"""Put the figures of a run into a Markdown page, between its markers.

    python bench/tables.py runs/fashion-mlp/results.json README.md
    python bench/tables.py runs/fashion-mlp/grid.json docs/grid.md --marker fashion-mlp
    python bench/tables.py runs/influence-mlp.json docs/figures.md --marker influence-mlp
    python bench/tables.py runs/frontier/fashion-mlp/frontier.json docs/frontier.md --marker fashion-frontier
    python bench/shares.py > shares.txt; python bench/tables.py shares.txt docs/uses.md --marker shares

Replaces what stands between `<!-- table:begin -->` and `<!-- table:end -->`, and between the `savings` markers; of
other figures, what stands between those of `--marker`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from byline.ledger import human_bytes, human_flops
from byline.report.words import as_good_as, percent

TARGETS = {"training": 0.8, "serving": 0.6, "space": 0.8}


def costs(row: dict[str, Any]) -> list[str]:
    """Training, serving and space of a row, and how much less that is than of a naive ensemble of equal LDS."""
    saved, cells = row["saved"] or {}, []
    for part in TARGETS:
        cost = human_bytes(row["space"]) if part == "space" else human_flops(row[part]["flops"])
        words = percent(saved[part], saved["bound"]) if saved.get(part) is not None else ""
        cells.append(f"{cost}, {words}" if words else cost)
    return cells


def table(result: dict[str, Any]) -> str:
    lines = [
        "| ensemble | LDS | interval | same, 2-seed truth | as good as | training | serving a query | space |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = costs(row)
        low, high = row["interval"]
        name = row["name"] + (f", {row['detail']}" if row["detail"] and row["kind"] != "lora" else "")
        equal = as_good_as(row)
        lines.append(
            f"| {name} | **{row['lds']:.3f}** | {low:.2f} to {high:.2f} | {row['lds_two_seeds']:.3f} | {equal} "
            f"| {' | '.join(cells)} |"
        )
    bank = result["bank"]
    lines.append(
        f"\nGround truth: {bank['subsets']} random halves × {bank['seeds']} models each; noise ceiling "
        f"{bank['ceiling']:.2f}. The fourth column gives the same scores judged by two models a half, a noisier truth."
    )
    return "\n".join(lines)


def savings(result: dict[str, Any]) -> str:
    """Which rows save the paper's shares at equal LDS."""
    kept = []
    for row in result["rows"]:
        saved = row["saved"] or {}
        if row["kind"] == "independent" or saved.get("bound") == "below":
            continue
        if all((saved.get(part) or 0) >= share for part, share in TARGETS.items()):
            shares = ", ".join(f"{part} {percent(saved[part], saved['bound'])}" for part in TARGETS)
            kept.append(f"- **{row['name']}** (LDS {row['lds']:.3f}): {shares}")
    failed = [
        row["name"]
        for row in result["rows"]
        if row["kind"] != "independent" and not any(f"**{row['name']}**" in line for line in kept)
    ]
    return "\n".join(
        [
            "The paper's savings (training ≥ 80 %, serving ≥ 60 %, space ≥ 80 %) all hold, at equal LDS, for",
            "",
            *(kept or ["- none of the rows"]),
            "",
            f"and not all three for {', '.join(failed)}.",
        ]
    )


def grid(result: dict[str, Any]) -> str:
    """A table a measure: methods down, ensembles across; what each cost; where ensembles help and where they do not."""
    cells = {(cell["method"], cell["ensemble"]): cell for cell in result["cells"]}
    names = [ensemble["name"] for ensemble in result["ensembles"]]
    head = ["| method | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    parts = []
    for measure in result["measures"]:
        lines = [f"**{measure['title']}.** {measure['says']}", "", *head]
        for method in result["methods"]:
            row = [_judged(cells[method["name"], name], measure["name"]) for name in names]
            lines.append(f"| {method['title']} | {' | '.join(row)} |")
        for line in result["baselines"]:
            if line["measure"] == measure["name"]:
                blank = " |" * (len(names) - 1)
                lines.append(
                    f"| *{line['title']}* ({human_flops(line['flops'])} of training) | {_figure(line)} |{blank}"
                )
        parts.append("\n".join(lines))
    queries = result["setting"]["n_test"]
    lines = [f"**Cost.** CPU seconds to fit + to score {queries} test examples, one thread.", "", *head]
    for method in result["methods"]:
        row = [_seconds(cells[method["name"], name], queries) for name in names]
        lines.append(f"| {method['title']} | {' | '.join(row)} |")
    training = [next(c for c in result["cells"] if c["ensemble"] == name and not c["refused"]) for name in names]
    lines.append(
        "| *training the models* | " + " | ".join(human_flops(c["training"]["flops"]) for c in training) + " |"
    )
    parts.append("\n".join(lines))
    parts.append(_helped(result, cells))
    bank = result["bank"]
    parts.append(
        f"{queries} test examples; ground truth of {bank['subsets']} random halves × {bank['seeds']} models, noise "
        f"ceiling {bank['ceiling']:.2f}. – : the method refuses the ensemble, or is not measured there."
    )
    return "\n\n".join(parts)


def _figure(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:.3f} ({figure['low']:.2f} to {figure['high']:.2f})"


def _judged(cell: dict[str, Any], measure: str) -> str:
    figure = cell["measures"].get(measure)
    return _figure(figure) if figure and figure["mean"] is not None else "–"


def _seconds(cell: dict[str, Any], queries: int) -> str:
    if cell["refused"]:
        return "–"
    return f"{cell['fitting']['seconds']:.2g} + {cell['serving']['seconds'] * queries:.2g}"


def _helped(result: dict[str, Any], cells: dict[tuple[str, str], Any]) -> str:
    """Per ensemble, the methods whose LDS it moves, by the interval of the difference from one model's."""
    lines = []
    for ensemble in result["ensembles"]:
        moved: dict[str, list[str]] = {"more": [], "no different": [], "less": []}
        for method in result["methods"]:
            gain = (cells[method["name"], ensemble["name"]]["measures"].get("lds") or {}).get("gain")
            if not gain or method["name"] == "random":
                continue
            how = "more" if gain["low"] > 0 else "less" if gain["high"] < 0 else "no different"
            moved[how].append(f"{method['title']} {gain['mean']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})")
        said = "; ".join(f"**{how}**: {', '.join(found)}" for how, found in moved.items() if found)
        lines += [f"- {ensemble['name']} – {said}"] if said else []
    head = (
        "LDS minus that of one model, with the interval of the *difference* (both judged on the same resamples of test "
        "examples and subsets, `byline.lds_difference`); **no different** where it holds zero:"
    )
    return head + "\n\n" + "\n".join(lines)


def influence(result: dict[str, Any]) -> str:
    """byline beside kronfluence and dattri: CPU seconds, their ratio, correlations."""
    lines = [
        "| method | library | test × train | fit | of it curvature | score | byline ÷ it, curvature | fit | in all "
        "| memory | Pearson | Spearman |",
        f"|{' --- |' * 12}",
    ]
    for row in result["rows"]:
        peer = row["library"] != "byline"
        ratios = [_ratio(row["fit_ratio"]), _ratio(row["total_ratio"])] if peer else ["", ""]
        alike = [f"{row['pearson']:.4f}", f"{row['spearman']:.4f}"] if peer else ["", ""]
        cells = ["" if peer else row["case"], row["name"], " × ".join(map(str, row["shape"]))]
        cells += [
            f"{row['fit_cpu']:.2f} s",
            f"{row['curvature_cpu']:.2f} s" if row.get("curvature_cpu") else "",
            f"{row['score_cpu']:.2f} s",
            _ratio(row["curvature_ratio"]) if "curvature_ratio" in row else "",
            *ratios,
            f"{row['peak'] / 1e6:.0f} MB",
            *alike,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"- {row['case']}: {row['why']}." for row in result["rows"] if row["why"]]
    parts = ["\n".join(lines)]
    if reasons:
        parts.append("Why scores differ where they do:\n\n" + "\n".join(reasons))
    if result["checks"]:
        checks = ["| what tests the reason | scores of | with those of | Pearson |", "| --- | --- | --- | --- |"]
        checks += [f"| {c['case']} | {c['of']} | {c['with']} | {c['pearson']:.4f} |" for c in result["checks"]]
        parts.append("\n".join(checks))
    return "\n\n".join(parts)


FRONTIER = (
    ("lds", "unweighted mean", "Q"),
    ("lds", "unweighted sqrt", "√Q"),
    ("lds", "unweighted out-of-sample", "out-of-sample"),
    ("lds", "weighted mean", "W, Q"),
    ("lds", "weighted sqrt", "W, √Q"),
    ("other", "unweighted mean", "Q, other truth"),
    ("other", "weighted mean", "W, Q, other truth"),
)


def frontier(result: dict[str, Any]) -> str:
    """Strategies down; costs, also as shares of five independent models', and LDS by residual and Hessian."""
    rows = [row for row in result["rows"] if row["refused"] is None]
    naive = next((row for row in rows if row["name"] == "independent 5"), None)
    shown = [v for v in FRONTIER if any(row[v[0]].get(v[1]) for row in rows)]
    head = ["strategy", "trainings", "serving", "space", *(name for _, _, name in shown)]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    spread = []
    most = max(row["seeds"] for row in rows)
    for row in rows:
        costs = [human_flops(row["serving"]), human_bytes(row["space"])]
        if naive is not None and row is not naive:
            shares = [row[part] / naive[part] for part in ("serving", "space")]
            costs = [f"{cost}, {share:.0%}" for cost, share in zip(costs, shares, strict=True)]
        cells = []
        for what, variant, _ in shown:
            values = row[what].get(variant, [])
            spread += [statistics.stdev(values)] if len(values) > 1 else []
            part = f" ({len(values)} seed{'s' * (len(values) > 1)})" if 0 < len(values) < row["seeds"] else ""
            cells.append(f"{statistics.fmean(values):.3f}{part}" if values else "–")
        few = f" ({row['seeds']} seed{'s' * (row['seeds'] > 1)})" if row["seeds"] < most else ""
        lines.append(
            f"| {row['name']}{'*' * row['paper']}{few} | {row['trainings']:.2f} | {' | '.join([*costs, *cells])} |"
        )
    tail = f"Means over {most} seeds of the ensembles; * is in the paper, W the weighted Hessian; shares are of "
    tail += "five models'."
    if spread:
        tail += f" Standard deviations over seeds: median {statistics.median(spread):.3f}, largest {max(spread):.3f}."
    tail += f" Noise ceiling {result['ceiling']:.2f}." if result["ceiling"] else ""
    return "\n".join(lines) + "\n\n" + tail


def printed(text: str) -> str:
    """The tables that a script printed, as Markdown: columns are where the dashes are."""
    parts, lines = [], text.splitlines()
    for place, line in enumerate(lines):
        if not re.fullmatch(r"-+( +-+)+ *", line) or place == 0:
            continue
        spans = [match.span() for match in re.finditer("-+", line)]
        # a cell may be wider than its dashes only in the last column
        spans[-1] = spans[-1][0], None
        rows = [lines[place - 1]]
        for row in lines[place + 1 :]:
            # text that follows a table is not in its columns
            if not row.strip() or any(row[a - 1 : a].strip() for a, _ in spans[1:]):
                break
            rows.append(row)
        cells = [[row[a:b].strip() for a, b in spans] for row in rows]
        cells.insert(1, ["---"] * len(spans))
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
    return "\n\n".join(parts)


def _ratio(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--marker", help="what the markers in the page are called")
    options = parser.parse_args()
    result = json.loads(options.results.read_text()) if options.results.suffix == ".json" else {}
    text = options.page.read_text()
    if not result:
        parts = {options.marker: printed(options.results.read_text())}
    elif "role" in result:
        parts = {options.marker or f"{result['setting']}-frontier": frontier(result)}
    elif "checks" in result:
        parts = {options.marker or "influence": influence(result)}
    elif result.get("kind") == "grid":
        parts = {options.marker or result["setting"]["name"]: grid(result)}
    else:
        parts = {"table": table(result), "savings": savings(result)}
    for name, content in parts.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text = re.sub(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.DOTALL)
    options.page.write_text(text)


if __name__ == "__main__":
    main()
