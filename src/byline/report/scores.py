"""The page of any scores: for each test example who made the model say that, and all that is known beside.

One file without a script: it opens anywhere, prints, and reads in dark mode, by keyboard and aloud.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byline.ledger import Ledger, human_bytes, human_flops, human_seconds
from byline.report.page import example_of, picture_of, write
from byline.scores import Ranked, Scores
from byline.uses.mislabels import Mislabels
from byline.uses.shares import Shares

_SIDE = 64  # pixels of a picture's longer side, at most
_TEXT = 600  # characters of a text
_BARS = 41
_LISTED = 12


@dataclass(frozen=True, eq=False)
class Shown:
    """How the examples of a dataset are shown; all of it optional.

    Attributes:
        pictures: (n, H, W), (n, H, W, 3) or (n, 3, H, W).
        texts: (n,) str.
        labels: (n,) what each is labelled.
        names: (n,) what each is called.
        predicted: (n,) what the model says of each.
        owners: (n,) whose each is.
        rows: A table of n rows: a DataFrame, or a mapping for each example.
    """

    pictures: Any = None
    texts: Sequence[str] | None = None
    labels: Any = None
    names: Sequence[str] | None = None
    predicted: Any = None
    owners: Any = None
    rows: Any = None

    def check(self, n: int, name: str) -> None:
        """Refuse what has another length.

        Raises:
            ValueError: names what came and what was expected.
        """
        for field in ("pictures", "texts", "labels", "names", "predicted", "owners", "rows"):
            value = getattr(self, field)
            if value is not None and len(value) != n:
                raise ValueError(f"{name}.{field} has {len(value)} entries; the scores have {n}")

    def cells(self, index: int) -> list[tuple[str, str]]:
        """An example's row as names and values; none where there is no table."""
        if self.rows is None:
            return []
        row = self.rows.iloc[index] if hasattr(self.rows, "iloc") else self.rows[index]
        return [(str(name), str(value)) for name, value in row.items()]

    def one(self, index: int) -> dict[str, Any]:
        """What the template shows of an example."""

        def of(values: Any) -> str | None:
            return None if values is None else str(values[index])

        text = of(self.texts)
        if text is None and self.rows is not None:
            text = "\n".join(f"{name}: {value}" for name, value in self.cells(index))
        label, name = of(self.labels), of(self.names)
        return {
            "index": index,
            "label": label if label is not None else (name or ""),
            "name": name,
            "predicted": of(self.predicted),
            "image": None if self.pictures is None else thumbnail(self.pictures[index]),
            "text": None if text is None else text[:_TEXT] + ("…" if len(text) > _TEXT else ""),
        }


def thumbnail(picture: Any) -> np.ndarray:
    """A picture of at most 64 pixels a side, each the mean of those that it stands for."""
    array = np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture)
    first = array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3)
    array = array.transpose(1, 2, 0) if first else array
    step = -(-max(array.shape[:2]) // _SIDE)
    if step < 2:
        return array
    height, width = (side // step * step for side in array.shape[:2])
    blocks = array[:height, :width].reshape(height // step, step, width // step, step, *array.shape[2:])
    return blocks.mean((1, 3)).astype(array.dtype)


def scores_page(
    scores: Scores,
    path: str | os.PathLike[str],
    *,
    train: Shown | None = None,
    test: Shown | None = None,
    k: int = 5,
    examples: int = 50,
    self_influence: Any = None,
    suspects: Mislabels | None = None,
    shares: Shares | None = None,
    ledger: Ledger | None = None,
    title: str = "scores",
    command: str = "",
) -> Path:
    """Writes the report of scores as one HTML file that asks the network for nothing.

    Args:
        scores: What is reported.
        path: Where to write; the folder is made if there is none.
        train: How training examples are shown; their places when left out.
        test: How test examples are shown.
        k: Proponents and opponents of each test example.
        examples: At most so many test examples.
        self_influence: (n_train,) of which the largest are listed.
        suspects: What `byline.uses.find_mislabels` found.
        shares: What `byline.uses.shares` found.
        ledger: What it cost.
        title: Of the data.
        command: What makes the report again.

    Returns:
        The path.

    Raises:
        ValueError: Something has another length than the scores.
    """
    n_test, n_train = scores.shape
    train, test = train or Shown(), test or Shown()
    train.check(n_train, "train")
    test.check(n_test, "test")
    if self_influence is not None and len(self_influence) != n_train:
        raise ValueError(f"self_influence has {len(self_influence)} entries; the scores have {n_train}")
    k, shown = min(k, n_train), min(examples, n_test)
    top = Scores(scores.values[:shown], scores.stderr[:shown]).top(k)
    error = scores.stderr[np.isfinite(scores.stderr)]
    told = np.abs(scores.values) > 2 * scores.stderr
    known = bool(len(error))
    verdict = (
        f"Which of {n_train} training examples made the model say what it said, for {shown} of {n_test} test examples."
    )
    content = {
        "setting": {"name": title, "description": ""},
        "verdict": verdict,
        "facts": [
            ("training examples", f"{n_train:,}".replace(",", "\u202f")),
            ("test examples", f"{n_test:,}".replace(",", "\u202f")),
            ("members", str(scores.info.get("members", "not known"))),
            ("scores told from zero", f"{told.mean() * 100:.0f} %" if known else "one member: not known"),
        ],
        "examples": [_example(row, top, train, test) for row in range(shown)],
        "histogram": histogram(scores.values),
        "largest": _largest(self_influence, train),
        "suspects": _suspects(suspects, train),
        "owners": owners_table(shares),
        "scheme": shares.scheme if shares is not None else "",
        "costs": _costs(ledger),
        "notes": [f"{name}: {value}" for name, value in scores.info.items() if isinstance(value, str | int | float)],
        "command": command,
        "environment": {},
        "numbers": "the scores' own file",
        "plots": [],
    }
    return write("scores.html.j2", content, path)


def _example(row: int, top: Any, train: Shown, test: Shown) -> dict[str, Any]:
    def side(found: Ranked, sign: int) -> list[dict[str, Any]]:
        out = []
        for index, score, error in zip(found.indices[row], found.scores[row], found.stderr[row], strict=True):
            if sign * score <= 0:
                continue
            known = float(error) if np.isfinite(error) else None
            out.append({**train.one(int(index)), "score": float(score), "stderr": known})
        return out

    return example_of(
        {**test.one(row), "proponents": side(top.proponents, 1), "opponents": side(top.opponents, -1), "ensemble": ""}
    )


def histogram(values: np.ndarray) -> list[dict[str, Any]]:
    """Bars of the scores' distribution, to the 99.5th percentile of their size, on a scale of roots."""
    sample = np.asarray(values).ravel()
    sample = sample[:: max(1, len(sample) // 1_000_000)]
    reach = float(np.quantile(np.abs(sample), 0.995)) or 1.0
    counts, edges = np.histogram(np.clip(sample, -reach, reach), bins=_BARS, range=(-reach, reach))
    # thousands of scores near zero would leave the rest invisible
    heights = np.sqrt(counts / max(1, counts.max()))
    return [
        {
            "x": round(100 * i / _BARS, 2),
            "width": round(92 / _BARS, 2),
            "height": round(100 * float(height), 2),
            "title": f"{a:.2g} to {b:.2g}: {count / len(sample) * 100:.2g} %",
            "sign": "positive" if a + b > 1e-12 else "negative" if a + b < -1e-12 else "zero",
        }
        for i, (height, count, a, b) in enumerate(zip(heights, counts, edges[:-1], edges[1:], strict=True))
    ]


def _largest(values: Any, train: Shown) -> list[dict[str, Any]]:
    if values is None:
        return []
    array = np.asarray(values, np.float64)
    order = np.argsort(-array, kind="stable")[:_LISTED]
    return [{**_seen(train, int(i)), "value": f"{array[i]:.3g}"} for i in order]


def _suspects(found: Mislabels | None, train: Shown) -> list[dict[str, Any]]:
    if found is None:
        return []
    return [
        {
            **_seen(train, int(found.index[row])),
            "given": str(found.given[row]),
            "suggested": str(found.suggested[row]),
            "suspicion": f"{found.suspicion[row] * 100:.1f} %",
        }
        for row in range(min(_LISTED, len(found)))
    ]


def _seen(train: Shown, index: int) -> dict[str, Any]:
    one = train.one(index)
    return {**one, **picture_of(one, f"training example {index}, {one['label']}")}


def owners_table(found: Shares | None) -> list[dict[str, Any]]:
    """What a table of owners shows: name, share, interval, size and the length of its bar."""
    if found is None:
        return []
    rows = []
    for row in found.to_dataframe().head(50).itertuples():
        width = "" if np.isnan(row.low) else f"{row.low * 100:.1f} to {row.high * 100:.1f} %"
        rows.append(
            {"owner": str(row.owner), "share": f"{row.share * 100:.1f} %", "interval": width, "size": row.examples}
        )
        rows[-1]["bar"] = round(float(row.share) * 100, 2)
    return rows


def _costs(ledger: Ledger | None) -> list[tuple[str, str]]:
    if ledger is None:
        return []
    lines = []
    for name, cost in ledger.costs.items():
        parts = [human_flops(cost.flops), f"{human_seconds(cost.seconds)} of the CPU"]
        parts += [human_bytes(cost.bytes)] if cost.bytes else []
        lines.append((str(name), ", ".join(parts)))
    return lines
