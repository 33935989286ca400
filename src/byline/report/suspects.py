"""The page of suspicious labels: each example beside what speaks against its label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from byline.report.page import write
from byline.report.picture import data_uri
from byline.uses.mislabels import Mislabels

_CELLS = 6  # columns of a table that are shown


def suspects_page(
    found: Mislabels,
    path: Any,
    *,
    title: str,
    names: Any = None,
    pictures: Any = None,
    rows: Any = None,
    notes: Sequence[str] = (),
    command: str = "",
) -> Any:
    """Writes the page as one HTML file and returns its path.

    Args:
        found: What to show.
        path: Where to write.
        title: Of the data.
        names: (n_train,) what examples are called; their places when left out.
        pictures: (n_train, H, W) or (n_train, H, W, 3), where they are pictures.
        rows: A table of text (n_train rows), where they are rows.
        notes: What else is to be known of the data, a sentence each.
        command: What makes the page again.
    """

    def example(index: int) -> dict[str, Any]:
        cells = []
        if rows is not None:
            cells = [(str(name), str(value)[:80]) for name, value in list(rows.iloc[index].items())[:_CELLS]]
        return {
            "name": str(names[index]) if names is not None else f"example {index}",
            "picture": data_uri(pictures[index]) if pictures is not None else None,
            "cells": cells,
        }

    shown = []
    for row in range(len(found)):
        labels = found.evidence_labels[row].tolist()
        evidence = [
            {**example(int(i)), "label": str(label)}
            for i, label in zip(found.evidence.indices[row], labels, strict=True)
        ]
        error = "" if np.isnan(found.stderr[row]) else f" ± {found.stderr[row]:.2g}"
        shown.append(
            {
                **example(int(found.index[row])),
                "rank": row + 1,
                "given": str(found.given[row]),
                "suggested": str(found.suggested[row]),
                "support": f"{found.support[row] * 100:.0f} %",
                "suspicion": f"{found.suspicion[row] * 100:.1f} %",
                "score": f"{found.score[row]:.3g}{error}",
                "evidence": evidence,
            }
        )
    total = len(found.every)
    content = {
        "setting": {"name": title, "description": ""},
        "verdict": f"The {len(found)} labels out of {total} that are most likely to be wrong. Look, and decide.",
        "facts": [("training examples", f"{total:,}".replace(",", "\u202f")), ("shown", str(len(found)))],
        "rows": shown,
        "source": found.source,
        "notes": [
            f"Ranked by {found.source}.",
            "A rank is a hint, not a verdict: rare and hard examples with right labels rank high too.",
            *notes,
        ],
        "command": command,
        "environment": {},
        "numbers": "mislabels.csv",
        "plots": [],
    }
    return write("suspects.html.j2", content, path)
