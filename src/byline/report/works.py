"""The page of works that a model made up: each beside what taught it, the bars and tokens that matter marked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byline.report.engraving import engraved, sheet_uri
from byline.report.page import write
from byline.report.scores import owners_table
from byline.settings.notation import is_bar, is_heading, to_abc
from byline.settings.works import Source, Work, Works

_MANY = {"tune": "tunes", "code": "functions", "text": "answers"}
_UNSAID = ("<start>", "<end>", "<pad>", "<|im_start|>", "<|im_end|>")
_FAINT = 0.04  # of the strongest: below it a token is left as it is


def works_page(works: Works, path: str | os.PathLike[str], *, title: str, command: str = "") -> Path:
    """Writes the works and their sources as one HTML file that asks the network for nothing.

    Args:
        works: what `byline.settings.works.make_up` found.
        path: where to write; the folder is made if there is none.
        title: of the data.
        command: what makes the page again.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: tunes are drawn by verovio, which is not installed.
    """
    tune = works.kind == "tune"
    many = _MANY[works.kind]
    content = {
        "setting": {"name": title, "description": ""},
        "verdict": f"{len(works.works)} {many} that a model made up, and what taught it.",
        "facts": [("works", str(len(works.works))), ("members", str(works.info.get("members", "not known")))],
        "tune": tune,
        "one": many.removesuffix("s"),
        "many": many,
        "works": [_work(number, work, works) for number, work in enumerate(works.works)],
        "owners": owners_table(works.owners),
        "owned_by": works.owned_by,
        "scheme": works.owners.scheme,
        "notes": [f"{name}: {value}" for name, value in works.info.items() if isinstance(value, str | int | float)],
        "command": command,
        "environment": {},
        "numbers": "works.json",
        "plots": [],
    }
    return write("works.html.j2", content, path)


def _work(number: int, work: Work, works: Works) -> dict[str, Any]:
    shown = _tune if works.kind == "tune" else _text
    lead = work.sources[0]
    frame = works.owners.to_dataframe(number)
    return {
        "number": number + 1,
        "seed": work.seed,
        "shown": shown(work.tokens, lead.taught, f"the work made up with seed {work.seed}"),
        "lead": lead.title,
        "sources": [
            {
                "title": source.title,
                "where": _where(source),
                "index": source.index,
                "score": f"{source.score:+.3g}",
                "stderr": f" ± {source.stderr:.2g}" if np.isfinite(source.stderr) else "",
                "unsure": bool(np.isfinite(source.stderr) and abs(source.score) < 2 * source.stderr),
                "shown": shown(source.tokens, source.parts, source.title),
            }
            for source in work.sources
        ],
        "shares": [
            f"{row.owner} {row.share * 100:.0f} %" for row in frame.head(3).itertuples() if float(row.share) > 0.005
        ],
    }


def _where(source: Source) -> str:
    about = source.about
    if "collection" in about:
        return ", ".join(str(part) for part in (about["collection"], about.get("family")) if part)
    return f"{about.get('file', '')}, lines {about.get('first')} to {about.get('last')}"


def bar_sums(tokens: Sequence[str], parts: Sequence[float]) -> list[float]:
    """What the tokens of each bar add up to; headings belong to none, and a bar line to the bar that it ends."""
    sums, own, filled = [], 0.0, False
    for token, part in zip(tokens, parts, strict=True):
        if is_heading(token) or not token or token[0] == "<":
            continue
        own += float(part) if np.isfinite(part) else 0.0
        if is_bar(token):
            if filled:
                sums.append(own)
            own, filled = 0.0, False
        else:
            filled = True
    return [*sums, own] if filled else sums


def _tune(tokens: list[str], parts: np.ndarray, name: str) -> dict[str, Any]:
    kept = [place for place, token in enumerate(tokens) if token and token[0] != "<"]
    said = [tokens[place] for place in kept]
    sums = bar_sums(said, parts[kept].tolist())
    abc = to_abc(said)
    strongest = 1 + int(np.argmax(sums)) if sums and max(sums) > 0 else None
    told = f"; bar {strongest} matters most" if strongest is not None else ""
    return {"src": sheet_uri(engraved(abc, sums)), "alt": f"{name}, {len(sums)} bars of music{told}", "abc": abc}


def _text(tokens: list[str], parts: np.ndarray, name: str) -> dict[str, Any]:
    largest = float(np.nanmax(np.abs(parts))) if len(parts) and np.isfinite(parts).any() else 0.0
    spans = []
    for token, part in zip(tokens, parts.tolist(), strict=True):
        weight = abs(part) / largest if largest and np.isfinite(part) else 0.0
        if token in _UNSAID:
            continue
        spans.append(
            {
                "text": token,
                "weight": round(weight, 2) if weight >= _FAINT else None,
                "against": part < 0,
                "title": f"{part:+.2g}",
            }
        )
    return {"spans": spans, "alt": name}
