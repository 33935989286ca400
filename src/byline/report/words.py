"""What the report and the command line say in words: percentages and the one-sentence verdict.

Two rules. A rounding never flatters: savings are rounded down, extra costs up. And a sentence says only what
was measured: "at least" where no naive ensemble came as far, and whether intervals overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def percent(saved: float | None, bound: str = "equal") -> str:
    """A saved fraction: `93 % less`, `≥ 93 % less`, `8 % more`, `3.2× as much`; `–` where there is none."""
    if saved is None or not math.isfinite(saved):
        return "–"
    at_least = bound == "at least"
    points = math.floor(saved * 1000 + 1e-6) / 10
    if points >= 99:
        return f"{'≥ ' if at_least else ''}{points:.1f} % less"
    points = math.floor(saved * 100 + 1e-6)
    if points > 0:
        return f"{'≥ ' if at_least else ''}{points} % less"
    if points == 0:
        return "≥ 0 % less" if at_least else "the same"
    if points >= -100:
        return f"{'≤ ' if at_least else ''}{-points} % more"
    return f"{'≤ ' if at_least else ''}{math.ceil((1 - saved) * 10 - 1e-6) / 10:g}× as much"


def as_good_as(row: Mapping[str, Any]) -> str:
    """The naive ensemble of equal LDS, in words: `7.3 models`, `more than 25 models`."""
    saved = row.get("saved")
    if not saved:
        return "–"
    models = saved["naive_models"]
    size = f"{models:.1f}".removesuffix(".0")
    noun = "model" if size == "1" else "models"
    prefix = {"at least": "more than ", "below": "less than "}.get(saved["bound"], "")
    return f"{prefix}{size} {noun}"


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence: does a cheap ensemble reach the largest naive one, and at what cost?"""
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    naive = [row for row in rows if row["kind"] == "independent"]
    cheap = [row for row in rows if row["kind"] != "independent"]
    where = result["setting"]["name"]
    if not naive or not cheap:
        best = max(rows, key=lambda row: row["lds"], default=None)
        if best is None:
            return f"Nothing was measured on {where}."
        return (
            f"On {where} the best ensemble is {best['name']}, with an LDS of {best['lds']:.3f}; there is "
            "nothing to compare its cost with."
        )
    largest = max(naive, key=lambda row: row["models"])
    reference = f"{largest['models']} independently trained model{'s' if largest['models'] > 1 else ''}"
    reaching = [row for row in cheap if row["lds"] >= largest["lds"]]
    if not reaching:
        best = max(cheap, key=lambda row: row["lds"])
        return (
            f"On {where} no cheaper ensemble reaches the LDS of {reference} ({largest['lds']:.3f}); "
            f"{best['name']} comes nearest with {best['lds']:.3f}, {_savings(best)}."
        )
    chosen = min(reaching, key=lambda row: (row["training"]["flops"], -row["lds"]))
    apart = chosen["interval"][0] > largest["interval"][1]
    caution = "" if apart else " (the intervals overlap: read it as no worse, not as better)"
    return (
        f"On {where}, {chosen['name']} reaches an LDS of {chosen['lds']:.3f} against {largest['lds']:.3f} "
        f"for {reference}{caution}, {_savings(chosen)}."
    )


def _savings(row: Mapping[str, Any]) -> str:
    saved = row.get("saved")
    if not saved:
        return "with no saving computed"
    parts = [
        f"{_spoken(percent(saved[key], saved['bound']))} {words}"
        for key, words in (("training", "training"), ("serving", "serving per query"), ("space", "space"))
        if saved[key] is not None
    ]
    listed = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else "no saving"
    if saved["bound"] == "below":
        return f"with {listed} than one model, which has a higher LDS"
    return f"with {listed} than the naive ensemble of equal LDS"


def _spoken(share: str) -> str:
    return share.replace("≥", "at least").replace("≤", "at most")
