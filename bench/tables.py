"""Put the figures of a run into a Markdown page, between its markers.

    python bench/tables.py runs/fashion-mlp/results.json README.md

Replaces what stands between `<!-- table:begin -->` and `<!-- table:end -->`, and between the `savings` markers.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from byline.ledger import human_bytes, human_flops
from byline.report.words import as_good_as, percent

TARGETS = {"training": 0.8, "serving": 0.6, "space": 0.8}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| ensemble | LDS | interval | same, 2-seed truth | as good as | training | serving a query | space |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        saved = row["saved"] or {}
        cells = []
        for part in TARGETS:
            cost = human_bytes(row["space"]) if part == "space" else human_flops(row[part]["flops"])
            words = percent(saved[part], saved["bound"]) if saved.get(part) is not None else ""
            cells.append(f"{cost}, {words}" if words else cost)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    result = json.loads(options.results.read_text())
    text = options.page.read_text()
    for name, content in (("table", table(result)), ("savings", savings(result))):
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text = re.sub(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.DOTALL)
    options.page.write_text(text)


if __name__ == "__main__":
    main()
