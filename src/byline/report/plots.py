"""The three Pareto plots: LDS against what it costs, as plain plotly figures.

Colours are left to the page's script, which takes them from the style sheet and so follows light and dark;
here each trace only says which kind of ensemble it is.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from byline.ledger import human_bytes, human_flops, human_seconds
from byline.report.words import as_good_as, percent

KINDS: dict[str, str] = {
    "independent": "circle",
    "dropout": "square",
    "forward-only": "diamond",
    "lora": "triangle-up",
    "weight noise": "cross",
    "trajectory": "star",
}
"""Every kind of ensemble and its marker, told apart without colour too."""

GLYPHS: dict[str, str] = {
    "circle": "M8 2.5a5.5 5.5 0 1 1 0 11a5.5 5.5 0 1 1 0-11z",
    "square": "M3 3h10v10H3z",
    "diamond": "M8 1.5L14.5 8L8 14.5L1.5 8z",
    "triangle-up": "M8 2L14.5 13.5H1.5z",
    "cross": "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z",
    "star": "M8 1l2 4.9 5.2.4-4 3.4 1.3 5.1L8 12l-4.5 2.8 1.3-5.1-4-3.4L6 5.9z",
    "hexagon": "M8 1.5l5.6 3.2v6.6L8 14.5l-5.6-3.2V4.7z",
}
"""The same markers as paths in a 16 × 16 box, for the table and the legend."""


KIND_NAMES: dict[str, str] = {"lora": "LoRA"}
"""Kinds whose name for people is not their own."""


def marker(kind: str) -> str:
    """The marker of a kind; kinds the report does not know share one."""
    return KINDS.get(kind, "hexagon")


def style(kind: str) -> str:
    """The kind as a class name that the style sheet knows; never text from outside."""
    return kind.replace(" ", "-") if kind in KINDS else "other"


def legend(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Every kind of ensemble among the rows, with its marker."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return [{"name": KIND_NAMES.get(k, k), "style": style(k), "glyph": GLYPHS[marker(k)]} for k in kinds]


AXES: tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], float], Callable[[float], str]], ...] = (
    ("training", "Training", "training cost, FLOPs", lambda row: row["training"]["flops"], human_flops),
    ("serving", "Serving", "serving cost per query, FLOPs", lambda row: row["serving"]["flops"], human_flops),
    ("space", "Space", "space kept, bytes", lambda row: row["space"], human_bytes),
)
"""Key, heading, axis title, value of a row, value for people."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, LDS) points that no other beats on both, by rising cost."""
    front: list[int] = []
    best = -math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


def figures(rows: Sequence[Mapping[str, Any]], measure: str = "LDS", dense: bool = False) -> list[dict[str, Any]]:
    """One figure an axis: `{"key", "title", "alt", "figure"}`, the last being plotly's data and layout.

    Args:
        rows: with the measure under "lds".
        measure: its name.
        dense: there are many points: only those on the front get a label, and no line joins the naive ensembles.
    """
    return [_figure(rows, measure, dense, *axis) for axis in AXES]


def _figure(
    rows: Sequence[Mapping[str, Any]],
    measure: str,
    dense: bool,
    key: str,
    title: str,
    axis: str,
    value: Callable[[Mapping[str, Any]], float],
    human: Callable[[float], str],
) -> dict[str, Any]:
    shown = [row for row in rows if value(row) > 0]  # a logarithm has no zero
    points = [(float(value(row)), float(row["lds"])) for row in shown]
    front = pareto_front(points)
    data: list[dict[str, Any]] = []
    if front:
        # From the last point the front goes on: paying more buys nothing that was measured.
        right = max(cost for cost, _ in points)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "Pareto front",
                "x": [points[i][0] for i in front] + [right],
                "y": [points[i][1] for i in front] + [points[front[-1]][1]],
                "line": {"shape": "hv", "width": 1.5, "dash": "dot"},
                "hoverinfo": "skip",
                "meta": "front",
            }
        )
    labels = [("" if dense and i not in front else row.get("label") or _short(row)) for i, row in enumerate(shown)]
    positions = _label_positions(points, labels)
    for kind in dict.fromkeys(row["kind"] for row in shown):
        mine = [i for i, row in enumerate(shown) if row["kind"] == kind]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers+text" if kind == "independent" and not dense else "markers+text",
                "name": html.escape(str(kind)),
                "x": [points[i][0] for i in mine],
                "y": [points[i][1] for i in mine],
                "text": [html.escape(labels[i]) for i in mine],
                "textposition": [positions[i] for i in mine],
                "textfont": {"size": 11},
                "line": {"width": 1},
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [max(shown[i]["interval"][1] - points[i][1], 0.0) for i in mine],
                    "arrayminus": [max(points[i][1] - shown[i]["interval"][0], 0.0) for i in mine],
                    "thickness": 1,
                    "width": 3,
                },
                "marker": {"symbol": marker(kind), "size": 10},
                "hovertext": [_hover(shown[i], measure) for i in mine],
                "hovertemplate": "%{hovertext}<extra></extra>",
                "meta": style(kind),
            }
        )
    layout = {
        "xaxis": {"type": "log", "title": {"text": axis}, **_log_axis(points, human)},
        "yaxis": {"title": {"text": measure}, "nticks": 7},
        "showlegend": False,
        "margin": {"l": 52, "r": 14, "t": 10, "b": 48},
        "hovermode": "closest",
        "dragmode": False,
    }
    best = [f"{shown[i]['name']} ({measure} {shown[i]['lds']:.3f}, {human(points[i][0])})" for i in front]
    alt = f"{measure} against {axis}. On the Pareto front, by rising cost: {'; '.join(best) or 'nothing'}."
    return {"key": key, "title": title, "alt": alt, "figure": {"data": data, "layout": layout}}


def _log_axis(points: Sequence[tuple[float, float]], human: Callable[[float], str]) -> dict[str, Any]:
    """Ticks at powers of ten (few enough to read on a phone), in the units of the table."""
    if not points:
        return {}
    low, high = (math.log10(pick(cost for cost, _ in points)) for pick in (min, max))
    pad = _pad(low, high)
    first, last = math.ceil(low - pad), math.floor(high + pad)
    step = max(1, math.ceil((last - first) / 4))
    ticks = [10.0**power for power in range(first, last + 1, step)]
    if len(ticks) < 2:
        grid = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
        ticks = [tick for tick in grid if low - pad <= math.log10(tick) <= high + pad]
    return {"range": [low - pad, high + pad], "tickvals": ticks, "ticktext": [human(tick) for tick in ticks]}


def _pad(low: float, high: float) -> float:
    """Room beside the outermost points, in powers of ten."""
    return max((high - low) * 0.12, 0.15)


def _short(row: Mapping[str, Any]) -> str:
    """What stands beside a point: `5×10`, or the number of models."""
    models, members = int(row["models"]), int(row["members"])
    return str(models) if row["kind"] == "independent" else f"{models}×{max(members // max(models, 1), 1)}"


def _hover(row: Mapping[str, Any], measure: str) -> str:
    saved = row.get("saved") or {}
    bound = saved.get("bound", "equal")

    def line(words: str, cost: str, key: str) -> str:
        share = percent(saved.get(key), bound)
        return f"{words}: {cost}" + ("" if share == "–" else f" ({share})")

    low, high = row["interval"]
    lines = [
        f"<b>{html.escape(str(row['name']))}</b>",
        f"{measure} {row['lds']:.3f} ({low:.3f} to {high:.3f})",
        line(
            "training",
            f"{human_flops(row['training']['flops'])}, {human_seconds(row['training']['seconds'])}",
            "training",
        ),
        line(
            "serving a query",
            f"{human_flops(row['serving']['flops'])}, {human_seconds(row['serving']['seconds'])}",
            "serving",
        ),
        line("space", human_bytes(row["space"]), "space"),
    ]
    if saved:
        lines.append(f"as good as {as_good_as(row)} trained independently")
    return "<br>".join(lines)


def _label_positions(points: Sequence[tuple[float, float]], labels: Sequence[str]) -> list[str]:
    """A side for each label, so that it covers no other point or label where that can be avoided."""
    if not points:
        return []
    xs, ys = [math.log10(cost) for cost, _ in points], [lds for _, lds in points]
    # In pixels of the narrowest plot there is, about 270 × 270: the labels are as small there as elsewhere.
    pad = _pad(min(xs), max(xs))
    wide = 270 / (max(xs) - min(xs) + 2 * pad)
    tall = 230 / (max(ys) - min(ys) + 0.08)
    places = [((x - min(xs) + pad) * wide, (y - min(ys)) * tall) for x, y in zip(xs, ys, strict=True)]
    offsets = {
        "middle right": (1, 0),
        "middle left": (-1, 0),
        "bottom right": (1, -1),
        "top right": (1, 1),
        "bottom left": (-1, -1),
        "top left": (-1, 1),
    }
    boxes = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    chosen: list[str] = []
    for (x, y), label in zip(places, labels, strict=True):
        width = 7 * len(label)
        best: tuple[float, str, tuple[float, float, float, float]] | None = None
        for name, (side, up) in offsets.items():
            left = x + 8 if side > 0 else x - 8 - width
            box = (left, y + up * 13 - 6, left + width, y + up * 13 + 6)
            # A label that leaves the plot is as bad as one that covers a point.
            crowd = sum(_overlap(box, other) for other in boxes) + 40 * max(0.0, -box[0], box[2] - 270)
            if best is None or crowd < best[0] - 1e-9:
                best = (crowd, name, box)
        assert best is not None
        chosen.append(best[1])
        boxes.append(best[2])
    return chosen


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
