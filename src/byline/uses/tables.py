"""Tables as people keep them: CSV files of any country and program as numbers, and a word about all that changes.

A file is text cells first: which of them are numbers is decided for a column, never by what one cell looks like.
"""

from __future__ import annotations

import csv
import io
import math
import re
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

SEPARATORS = (",", ";", "\t", "|")
WORDS = 50
_ODD = 0.1  # of a column's cells: so many that are no number leave it one of numbers, if
_DISTINCT = 10  # it has more different numbers than that; below, each may be a name
_MARKS = frozenset(
    {
        *("na", "n/a", "n.a.", "#n/a", "#n/a n/a", "#na", "nan", "-nan", "<na>", "null", "none", "nil"),
        *("?", "-", "--", "---", "–", "—", ".", "..", "…", "inf", "-inf", "+inf", "infinity", "-infinity", "+infinity"),
        *("1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan", "#value!", "#div/0!", "#ref!", "#num!", "#name?"),
    }
)
_SIGN = r"[$€£¥₹₽₩₺₪₫₴₦¢฿%‰°]|(?:EUR|USD|GBP|CHF|JPY|CNY|INR|SEK|NOK|DKK|PLN|CZK|AUD|CAD|BRL)\b"
_SHAPE = re.compile(
    rf"(?P<minus>[-+]?)\s*(?P<before>{_SIGN})?\s*(?P<inner>[-+]?)"
    r"(?P<core>(?:[0-9]|[.,](?=[0-9]))(?:[0-9.,'’ \u00a0\u2009\u202f]*[0-9.,])?(?:[eE][-+]?[0-9]+)?)"
    rf"\s*(?P<after>{_SIGN})?"
)
_SPACES = " \u00a0\u2009\u202f"
_DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}(\D.*)?|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2})(\D.*)?|\d{1,2}:\d{2}.*")
_PARSING = threading.Lock()
_END = "\x00end"  # no cell: files with NUL are refused before


class Said:
    """What was left out or taken for something else, by kind, in the order in which it was found."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[str]] = {}

    def __call__(self, kind: str, item: str = "") -> None:
        """Note an item of a kind."""
        self.kinds.setdefault(kind, []).append(item)

    def lines(self) -> list[str]:
        """A sentence a kind."""
        return [kind if items == [""] else f"{kind}: {some(items)}" for kind, items in self.kinds.items()]


def some(items: Iterable[object], most: int = 20) -> str:
    """The first of them, and how many more there are."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def quoted(text: object, most: int = 50) -> str:
    """A cell or a name as it can be shown in a sentence: in quotes, in one line, not too long."""
    text = str(text)
    return repr(text if len(text) <= most else text[:most] + "…").encode("utf-8", "replace").decode()


def read_cells(data: bytes, where: str, wanted: Collection[str], said: Said) -> pd.DataFrame:
    """The cells of a CSV file with a header, as text as they are.

    Args:
        data: The file's bytes: UTF-8, UTF-16 with its mark, else Windows-1252.
        where: What the file is called in a refusal.
        wanted: Columns that it should have: of the separators, one that makes them is taken.
        said: Told what was skipped, renamed or guessed.

    Returns:
        A column of str for each of the file's; in its ``attrs`` the "separator", and as "renamed" pairs of the header's
        names and the columns'.

    Raises:
        ValueError: It is no table: empty, binary, a quote that is never closed, or rows of other lengths.
    """
    import pandas as pd

    text = _text(data, where, said)
    if not text.strip():
        raise ValueError(f"{where} is no CSV file that can be read: it is empty")
    given = re.match(r"\s*sep=([,;\t|])[ \t]*(?:\r\n|\r|\n)", text)
    if given:
        text, separator = text[given.end() :], given[1]
    else:
        separator = _separator(text, wanted)
    lines = _records(text, separator, where)
    # in a line of nothing but spaces of a file of several columns there is no row
    several = any(len(row) > 1 for row in lines[:50])
    blank = [not row or (several and len(row) == 1 and row[0] != "" and not row[0].strip()) for row in lines]
    filled = [row for row, nothing in zip(lines, blank, strict=True) if not nothing]
    if not filled:
        raise ValueError(f"{where} is no CSV file that can be read: it is empty")
    header, rows = filled[0], filled[1:]
    first = blank.index(False)
    between = sum(blank[first : len(blank) - blank[::-1].index(False)])
    if between:
        said("blank lines between rows, which are not counted as rows", str(between))
    unequal = [i for i, row in enumerate(rows) if len(row) != len(header)]
    if unequal:
        i = unequal[0]
        raise ValueError(
            f"{where}: row {i} (the first below the header is row 0) has {len(rows[i])} cells and the header "
            f"{len(header)}; rows of another length: {len(unequal)}. Expected as many cells in each row"
        )
    names = _names(header, said)
    frame = pd.DataFrame(rows, columns=pd.Index(names, dtype=object), dtype=object)
    frame.attrs = {"separator": separator, "renamed": list(zip(header, names, strict=True))}
    return frame


def _text(data: bytes, where: str, said: Said) -> str:
    for start, what in (
        (b"PK\x03\x04", "a zip file, as those of Excel and LibreOffice are"),
        (b"\xd0\xcf\x11\xe0", "an old Excel file"),
        (b"PAR1", "a Parquet file"),
        (b"\x1f\x8b", "packed by gzip"),
    ):
        if data.startswith(start):
            raise ValueError(f"{where} is no CSV file that can be read: it is {what}; expected a CSV file, as text")
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        if marked:
            raise ValueError(f"{where} is no CSV file that can be read: UTF-16 that ends in the middle") from None
        try:
            text, encoding = data.decode("cp1252"), "Windows-1252"
        except UnicodeDecodeError:
            text, encoding = data.decode("latin-1"), "Latin-1"
        said(f"no UTF-8 (byte {error.start} is {data[error.start]:#04x}), so it is read as {encoding}")
    if "\x00" in text:
        place = text.index("\x00")
        line = len(re.findall(r"\r\n|\r|\n", text[:place])) + 1
        raise ValueError(
            f"{where} is no CSV file that can be read: {text.count(chr(0))} NUL bytes, the first in line {line}; "
            "expected text in UTF-8"
        )
    return text


def _separator(text: str, wanted: Collection[str]) -> str:
    """The separator that makes the most of the wanted columns, rows as long as the header, and the most columns.

    A comma comes before the others.
    """

    def worth(separator: str) -> tuple[int, bool, int, int]:
        rows = [row for row in _rows(_lines(text), separator, 50) if any(cell.strip() for cell in row)]
        header = rows[0] if rows else []
        found = {cell.strip() for cell in header} & {name.strip() for name in wanted}
        return len(found), len(header) > 1, sum(len(row) == len(header) for row in rows), len(header)

    return max(SEPARATORS, key=worth)


def _lines(text: str) -> io.StringIO:
    # line ends of all kinds end a line, and stay as they are inside quotes
    return io.StringIO(text, newline="")


def _rows(lines: Iterable[str], separator: str, most: int | None = None, strict: bool = False) -> list[list[str]]:
    with _PARSING:  # the limit is the process's
        limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            reader = csv.reader(lines, delimiter=separator, strict=strict)
            return [row for _, row in zip(range(most), reader, strict=False)] if most is not None else list(reader)
        finally:
            csv.field_size_limit(limit)


def _records(text: str, separator: str, where: str) -> list[list[str]]:
    lines = [*_lines(text if text.endswith(("\n", "\r")) else text + "\n"), _END + "\n"]
    loose = False
    try:
        found = _rows(lines, separator, strict=True)
    except csv.Error:
        loose, found = True, _rows(lines, separator)
    written = [row for row in found if row]
    if found[-1] != [_END]:
        # what was swallowed begins in the last row
        place = f"in row {len(written) - 2}" if len(written) > 1 else "in the header"
        raise ValueError(f"{where} is no CSV file that can be read: a quote that opens {place} is never closed")
    if loose:
        for i, row in enumerate(written):
            if any("\n" in cell or "\r" in cell for cell in row):
                raise ValueError(
                    f"{where} is no CSV file that can be read: quotes open or close inside of cells, and "
                    f"{f'row {i - 1}' if i else 'the header'} may be several rows: {quoted(row, 100)}"
                )
    return found[:-1]


def _names(header: Sequence[str], said: Said) -> list[str]:
    """Distinct names of columns, made as pandas makes them."""
    plain = [name if name.strip() else f"Unnamed: {i}" for i, name in enumerate(header)]
    taken, names = set(plain), []
    seen: Counter[str] = Counter()
    for name, given in zip(plain, header, strict=True):
        new = name
        while seen[name] and new in taken:
            new = f"{name}.{seen[name]}"
            seen[name] += new in taken
        seen[name] += 1
        taken.add(new)
        names.append(new)
        if not given.strip():
            said("columns without a name, and what they are called here", quoted(new))
        elif new != given:
            said("columns of the same name, and what the later ones are called here", f"{quoted(given)}: {quoted(new)}")
    return names


@dataclass(frozen=True)
class Numbers:
    """How the numbers of a column are written.

    Attributes:
        decimal: What stands before decimals.
        groups: What stands between thousands, if anything.
    """

    decimal: str = "."
    groups: str = ""

    def pattern(self) -> re.Pattern[str]:
        """What a number without its sign looks like."""
        point = re.escape(self.decimal)
        plain = rf"(?:[0-9]+(?:{point}[0-9]*)?|{point}[0-9]+)(?:[eE][-+]?[0-9]+)?"
        if not self.groups:
            return re.compile(plain)
        group = f"[{re.escape(self.groups)}]"
        return re.compile(rf"{plain}|[1-9][0-9]{{0,2}}(?:{group}[0-9]{{3}})+(?:{point}[0-9]+)?")

    def value(self, core: str) -> float:
        """The number that a core stands for."""
        for mark in self.groups:
            core = core.replace(mark, "")
        return float(core.replace(self.decimal, "."))


PLAIN = Numbers()
_THOUSANDS, _COMMAS = Numbers(".", ","), Numbers(",", ".")
_WAYS = (
    PLAIN,
    _THOUSANDS,
    _COMMAS,
    Numbers(".", _SPACES),
    Numbers(",", _SPACES),
    Numbers(".", "'’"),
    Numbers(",", "'’"),
)
_PATTERNS = {way: way.pattern() for way in _WAYS}
_KEY = re.compile(r"(?i:(?:^|[^a-z])(?:ids?|key|index|uuid|guid|nr|no|number))$|[a-z](?:Id|ID|Key|No|Nr|Number)$")
_BARE = re.compile(rf"\s*[-+]?(?:{_PATTERNS[PLAIN].pattern})\s*")
_POINTED = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3}")


def _shape(cell: str) -> tuple[float, str, str] | None:
    """Sign, digits and unit of a cell that may be a number."""
    text = cell.strip().replace("−", "-")
    debit = len(text) > 2 and text[0] == "(" and text[-1] == ")"  # as accountants write what is below zero
    found = _SHAPE.fullmatch(text[1:-1] if debit else text)
    if found is None or (found["minus"] and found["inner"]) or (found["before"] and found["after"]):
        return None
    if debit and (found["minus"] or found["inner"]):
        return None
    negative = debit or "-" in (found["minus"], found["inner"])
    return -1.0 if negative else 1.0, found["core"], found["before"] or found["after"] or ""


def is_missing(cell: str) -> bool:
    """Whether a cell of a column of numbers stands for none."""
    text = cell.strip().casefold()
    return not text or text in _MARKS


@dataclass(frozen=True)
class Column:
    """How a column of a table becomes numbers: standardised, or one column a value ("" where a cell is blank)."""

    name: str
    median: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    values: tuple[str, ...] | None = None
    way: Numbers = PLAIN
    unit: str = ""

    def encode(self, cells: Any) -> np.ndarray:
        """(n, ...) float64 of n cells: of text, or for a column of numbers of float64 with NaN where there is none.

        Raises:
            ValueError: A number so large that none of 32 bits stands for it.
        """
        if self.values is not None:
            text = np.array([cell if cell.strip() else "" for cell in cells], dtype=object)
            return (text[:, None] == np.array(self.values, dtype=object)).astype(np.float64)
        numbers = np.asarray(cells, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            made = (np.where(np.isnan(numbers), self.median, numbers) - self.mean) / self.std
            if not np.isfinite(made.astype(np.float32)).all() or not np.isfinite(self.std):
                raise ValueError(f"column {quoted(self.name)} has a number that is too large to be learnt from")
        return made[:, None]

    def one(self, given: str) -> np.ndarray:
        """(1, ...) of one cell; nothing is a missing one.

        Raises:
            ValueError: No number, or a value that no row of the table has.
        """
        if self.values is None:
            number = np.nan if is_missing(given) else self._number(given)
            return self.encode([number])
        value = given if given.strip() else ""
        if value not in self.values and is_missing(value):
            value = ""
        if value and value not in self.values:
            there = (
                f"which no row of the table has; there are {some((quoted(one, 20) for one in self.values if one), 10)}"
            )
            raise ValueError(f"column {quoted(self.name)} has {quoted(given)}, {there}")
        return self.encode([value])

    def _number(self, given: str) -> float:
        shape = _shape(given)
        if shape is not None and shape[2] in ("", self.unit):
            for way in (self.way, PLAIN):
                if _PATTERNS[way].fullmatch(shape[1]):
                    return shape[0] * way.value(shape[1])
        raise ValueError(f"column {quoted(self.name)} has {quoted(given)}; expected a number")


def column_of(name: str, cells: Sequence[str], comma: bool, said: Said) -> tuple[Column, np.ndarray] | None:
    """How a column is encoded, and its encoded cells; None for one that cannot be learnt from.

    Args:
        name: What it is called.
        cells: Its cells.
        comma: Whether commas separate the file's columns, so that one inside a cell is no decimal comma by itself.
        said: Told whatever is left out, filled or guessed.

    Raises:
        ValueError: A number so large that none of 32 bits stands for it.
    """
    shown, times = quoted(name), Counter(cells)
    if not any(cell.strip() for cell in times):
        said("columns left out, as they have no cell filled", shown)
        return None
    numbers = _numbers(shown, times, comma, said)
    if numbers is None:
        return _words(name, cells, said)
    value_of, way, unit = numbers
    values = np.array([value_of.get(cell, math.nan) for cell in cells], np.float64)
    if np.isinf(values).any():
        raise ValueError(f"column {shown} has a number that is too large to be learnt from")
    gaps = np.isnan(values)
    if gaps.any():
        unusual = [f"{quoted(cell, 20)} in row {i}" for i, cell in enumerate(cells) if gaps[i] and cell.strip()]
        which = some(unusual, 3) if unusual else f"blank, the first in row {gaps.argmax()}"
        said("cells that are missing or no number, which take the column's median", f"{shown} ({gaps.sum()}: {which})")
    median = float(np.nanmedian(values))
    filled = np.where(gaps, median, values)
    constant = bool((filled == filled[0]).all())
    with np.errstate(over="ignore", invalid="ignore"):
        # rounding of a mean would be a constant's spread
        mean, std = (filled[0], 1.0) if constant else (filled.mean(), filled.std() or 1.0)
    column = Column(name, median, float(mean), float(std), way=way, unit=unit)
    if constant:
        said("columns of one value, which tell nothing", shown)
    whole = len(filled) > 2 and len(times) == len(filled) and not gaps.any() and (filled == np.round(filled)).all()
    if whole and ((np.diff(filled) == 1).all() or _KEY.search(name.strip())):
        said("columns that count or name the rows, learnt from as numbers (take them out if they say nothing)", shown)
    return column, column.encode(values)


def _numbers(shown: str, times: Counter[str], comma: bool, said: Said) -> tuple[dict[str, float], Numbers, str] | None:
    """What a column's cells are as numbers, how they are written, and their unit; None for a column of words.

    Args:
        shown: The column's name.
        times: How often each cell is there.
        comma: Whether commas separate the file's columns.
        said: Told.
    """
    present = {cell: count for cell, count in times.items() if not is_missing(cell)}
    if not present:
        return None
    if all(map(_BARE.fullmatch, present)):
        _say_numbers(shown, [cell.strip().lstrip("+-") for cell in present], PLAIN, "", comma, said)
        return {cell: float(cell) for cell in present}, PLAIN, ""
    shapes = {cell: _shape(cell) for cell in present}
    units = Counter[str]()
    for cell, shape in shapes.items():
        if shape is not None:
            units[shape[2]] += present[cell]
    if not units:
        return None
    unit = max(units, key=lambda one: (units[one], one))
    money = [one for one in units if one not in ("", "%", "‰", "°")]
    # an amount with its currency and one without are the same amount; 7 and 7 % are not
    allowed = {"", money[0]} if len(money) == 1 and unit in ("", money[0]) else {unit}
    unit = money[0] if len(allowed) == 2 else unit
    cores = {cell: shape for cell, shape in shapes.items() if shape is not None and shape[2] in allowed}
    fits = {way: {c for c, shape in cores.items() if _PATTERNS[way].fullmatch(shape[1])} for way in _WAYS}
    counts = {way: sum(present[cell] for cell in fitting) for way, fitting in fits.items()}
    way = max(_WAYS, key=lambda one: counts[one])
    good = fits[way]
    if way is _THOUSANDS and counts[way] == counts[_COMMAS] and not comma:
        example = min(cell for cell in good if "," in cell)
        said("columns of words, as commas may be decimal or stand between thousands", f"{shown} ({quoted(example)})")
        return None
    value_of = {cell: cores[cell][0] * way.value(cores[cell][1]) for cell in good}
    share = counts[way] / sum(present.values())
    if share < 1 and (share < 1 - _ODD or len(set(value_of.values())) <= _DISTINCT):
        odd = next(cell for cell in present if cell not in good)
        if len(units) > 1 and shapes[odd] is not None:
            beside = some(map(repr, units), 3)
            said("columns of words, as what stands beside their numbers differs", f"{shown} ({beside})")
        elif share >= 0.5:
            said("columns of words, though most cells are numbers", f"{shown} (for cells such as {quoted(odd)})")
        return None
    _say_numbers(shown, [cores[cell][1] for cell in present if cell in good], way, unit, comma, said)
    return value_of, way, unit


def _say_numbers(shown: str, cores: Sequence[str], way: Numbers, unit: str, comma: bool, said: Said) -> None:
    if unit:
        said("signs beside numbers that are taken off", f"{quoted(unit)} in {shown}")
    if marks := {mark for mark in way.groups if any(mark in core for core in cores)}:
        said("columns in which a sign stands between thousands", f"{some(map(quoted, sorted(marks)))} in {shown}")
    if way.decimal == "," and any("," in core for core in cores):
        said("columns of decimal commas", shown)
    pointed = [core for core in cores if "." in core]
    if way is PLAIN and not comma and pointed and all(map(_POINTED.fullmatch, pointed)):
        said("columns whose points are read as decimal, not as between thousands", f"{shown} ({quoted(pointed[0])})")
    zeros = next((core for core in cores if core[0] == "0" and core[1:2].isdigit()), None)
    if zeros is not None:
        said("columns of digits with leading zeros, which are read as numbers", f"{shown} ({quoted(zeros)})")


def _words(name: str, cells: Sequence[str], said: Said) -> tuple[Column, np.ndarray] | None:
    shown, text = quoted(name), [cell if cell.strip() else "" for cell in cells]
    values = tuple(sorted(set(text)))
    words = [value for value in values if value]
    dates = np.mean([_DATE.fullmatch(value.strip()) is not None for value in words]) > 0.9
    if len(values) > WORDS:
        kind = f"columns left out, as they have more than {WORDS} different {'dates or times' if dates else 'words'}"
        said(kind, f"{shown} ({len(words)}, such as {quoted(words[0], 20)})")
        return None
    if dates:
        said("columns of dates or times, taken as words", f"{shown} ({len(words)}, such as {quoted(words[0], 20)})")
    marks = [value for value in words if is_missing(value)]
    if marks:
        said("cells that may stand for nothing, taken as words", f"{some(map(quoted, marks), 3)} in {shown}")
    if "" in values:
        said("blank cells of columns of words, a value of its own", f"{shown} ({text.count('')})")
    if len(values) == 1:
        said("columns of one value, which tell nothing", shown)
    if len(values) == len(text):
        said("columns of words that are others in every row, a value each", shown)
    _say_alike(words, f" in {shown}", "words", said)
    column = Column(name, values=values)
    return column, column.encode(text)


def say_labels(cells: Sequence[str], said: Said) -> None:
    """Say which labels are taken as they are though they may be meant otherwise."""
    words = sorted(set(cells))
    marks = [f"{quoted(word)} ({list(cells).count(word)})" for word in words if is_missing(word)]
    if marks:
        said("labels that may stand for none, taken as words", some(marks, 5))
    _say_alike(words, "", "labels", said)


def _say_alike(words: Sequence[str], where: str, what: str, said: Said) -> None:
    alike: dict[object, list[str]] = {}
    for word in words:
        shape = _shape(word)
        key: object = " ".join(word.split()).casefold()
        if shape is not None and not shape[2] and _PATTERNS[PLAIN].fullmatch(shape[1]):
            key = shape[0] * PLAIN.value(shape[1])
        alike.setdefault(key, []).append(word)
    for same in alike.values():
        if len(same) > 1:
            said(f"{what} that are nearly the same, and are kept apart", " and ".join(map(quoted, same)) + where)
