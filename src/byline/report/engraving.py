"""Melodies as sheet music, drawn by verovio, with the bars that matter marked."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence

_PAGE = 1800  # verovio's units; four bars of eighths go into a line
_MEASURE = re.compile(r'<g id="[^"]*" class="measure">')
_STAFF = re.compile(r'(class="staff bounding-box">\s*<rect [^>]*?)fill="transparent"')
# verovio draws an empty box around every note, rest and clef too: half of the bytes
_EMPTY = re.compile(
    r'<g id="[^"]*" class="(?!staff)[^"]*bounding-box">\s*(?:<rect [^>]*/>\s*)*</g>|<g [^>]*bounding-box" />'
)
_MARK = "#e8590c"
_FAINTEST, _STRONGEST = 0.06, 0.6


def engraved(abc: str, marks: Sequence[float] | None = None) -> str:
    """A melody as an SVG picture of sheet music.

    Args:
        abc: ABC text of one melody.
        marks: one number per bar, in their order; bars are shaded in proportion to it, from the largest down. Numbers
            that are not above 0 leave a bar as it is, and so do bars beyond the list.

    Returns:
        SVG text without scripts and references to other files; the same bits for the same melody.

    Raises:
        ModuleNotFoundError: verovio is not installed.
        ValueError: it is no ABC of a melody, or none that verovio can draw.
    """
    try:
        import verovio
    except ImportError:
        raise ModuleNotFoundError(
            "sheet music is drawn by verovio, which is not installed: pip install 'byline[music]'"
        ) from None

    # verovio dies of text that is no ABC
    if not re.search(r"^X:.*^K:[^\n]*\n.*[A-Ga-gz]", abc, re.MULTILINE | re.DOTALL):
        raise ValueError(f"abc is {abc[:60]!r}; expected the ABC text of a melody, with its X: and K: and a note")
    verovio.enableLog(verovio.LOG_OFF)
    toolkit = verovio.toolkit()
    toolkit.setOptions(
        {
            "inputFrom": "abc",
            "pageWidth": _PAGE,
            "adjustPageHeight": True,
            "header": "none",
            "footer": "none",
            "svgViewBox": True,
            "svgBoundingBoxes": True,
            "svgHtml5": False,
            "pageMarginTop": 20,
            "pageMarginBottom": 20,
            # ids are drawn at random otherwise
            "xmlIdSeed": int.from_bytes(hashlib.sha256(abc.encode()).digest()[:3], "big") + 1,
        }
    )
    if not toolkit.loadData(_readable(abc)) or toolkit.getPageCount() < 1:
        raise ValueError(f"abc is {abc[:60]!r}; expected a melody that verovio can read")
    return _marked(toolkit.renderToSVG(1), [] if marks is None else list(marks))


def bars(svg: str) -> int:
    """How many bars a picture of `engraved` has."""
    return len(_MEASURE.findall(svg))


def sheet_uri(svg: str) -> str:
    """The picture as a `data:image/svg+xml;base64,…` address: as an image, it can neither run nor load anything."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")


def _readable(abc: str) -> str:
    """ABC that verovio reads whole: it takes ``::`` for no bar, and drops a last bar that is not closed."""
    abc = abc.rstrip().replace("::", ":|:").replace(":|:", ":| |:")
    return f"{abc}\n" if abc.endswith(("|", "]")) else f"{abc} |\n"


def _marked(svg: str, marks: list[float]) -> str:
    """Bars shaded by their marks, and what verovio draws for other tools left out."""
    svg = _EMPTY.sub("", svg)
    pieces = _MEASURE.split(svg)
    opens = _MEASURE.findall(svg)
    largest = max((mark for mark in marks if math.isfinite(mark)), default=0.0)
    out = [pieces[0]]
    for number, (start, piece) in enumerate(zip(opens, pieces[1:], strict=True)):
        mark = marks[number] if number < len(marks) else 0.0
        if largest > 0 and math.isfinite(mark) and mark > 0:
            strength = _FAINTEST + (_STRONGEST - _FAINTEST) * mark / largest
            piece = _STAFF.sub(rf'\1fill="{_MARK}" fill-opacity="{strength:.2f}"', piece, count=1)
        out += [start, piece]
    return re.sub(r"\n\s*", "\n", "".join(out))
