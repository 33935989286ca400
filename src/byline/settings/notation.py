"""Melodies as tokens of ABC notation: read from ABC files and MusicXML, and written as ABC again.

A melody is one voice: its metre, its key, its unit of length, and then pitches, lengths and bars. Grace notes,
ornaments, slurs, chord names, words and directions are left out, and of a chord its first note is kept. The unit is
the melody's commonest note, so that the same music reads the same whoever wrote it down.

    M:6/8  K:G  L:1/8  |:  G  2  B  d  ...      G for two eighths, B and d for one each
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

UNITS = (Fraction(1, 4), Fraction(1, 8), Fraction(1, 16))
MODES = {"": "", "maj": "", "ion": "", "m": "m", "min": "m", "aeo": "m", "dor": "dor", "mix": "mix", "phr": "phr",
         "lyd": "lyd", "loc": "loc"}  # fmt: skip
SHARPS, FLATS = "FCGDAEB", "BEADGCF"
_BELOW_MAJOR = {"": 0, "m": 3, "dor": 2, "mix": 1, "phr": 4, "lyd": -1, "loc": 5}
_MAJOR = {"C": 0, "G": 1, "D": 2, "A": 3, "E": 4, "B": 5, "F#": 6, "C#": 7, "F": -1, "Bb": -2, "Eb": -3, "Ab": -4,
          "Db": -5, "Gb": -6, "Cb": -7, "G#": 8, "D#": 9, "A#": 10, "Fb": -8}  # fmt: skip
_HEADER = re.compile(r"([A-Za-z]):\s*(.*)")
# what is left out, then what is kept; the first that fits counts
_PARTS = re.compile(
    r"""(?P<pitch>(?:\^\^|__|[\^_=])?[A-Ga-g][',]*)(?P<length>\d*/*\d*)
      | (?P<skip>\s+ | \{[^}]*\} | "[^"]*" | ![^!\s]*! | \+[a-z]+\+ | [~.uvHLMOPRSTJK`\\*&$'] | \((?!\d) | \)
                 | [xX]\d* | ,(?!,) | \^")
      | (?P<field>\[[A-Za-z]:[^\]]*\])
      | (?P<chord>\[(?=[\^_=A-Ga-g"])[^\]]*\])(?P<chord_length>\d*/*\d*)
      | (?P<ending>\|?\s*\[\s*[12](?:[.,-]\d)* | (?<=[|:])\s*[12](?=\D))
      | (?P<bar>::|:\|+:?|\|+:+|:+\|*\]?|\[\||\|\]|\|+)
      | (?P<tuplet>\(\d(?::\d*){0,2})
      | (?P<rest>[zZ])(?P<rest_length>\d*/*\d*)
      | (?P<tie>-)
      | (?P<broken><+|>+)
    """,
    re.VERBOSE,
)


class NotationError(ValueError):
    """Music that cannot be read as one melody."""


@dataclass
class Melody:
    """One voice, as tokens, and what its file says of it."""

    tokens: list[str]
    title: str = ""
    number: str = ""
    rhythm: str = ""
    """The kind of dance, as the collection names it: reel, jig, hornpipe ..."""
    file: str = ""


Item = str | Fraction
"""A token; or, after each note and rest, its length as a part of a whole note."""


def read_abc(text: str, file: str = "") -> Iterator[Melody]:
    """The melodies of an ABC file; those that cannot be read as one voice are left out.

    Args:
        text: content of the file.
        file: its name, for the melodies.
    """
    for part in re.split(r"(?m)^(?=X:)", text.replace("\r", "")):
        if part.startswith("X:"):
            try:
                yield read_tune(part, file)
            except NotationError:
                continue


def read_tune(text: str, file: str = "") -> Melody:
    """One tune of an ABC file.

    Raises:
        NotationError: it is not one voice, or something in it is neither music nor known to be left out.
    """
    fields: dict[str, str] = {}
    lines: list[str] = []
    for line in text.splitlines():
        line = line.split("%")[0].rstrip()
        found = _HEADER.match(line)
        if found and not (found[1] in "wWNPs" and lines):
            if lines and found[1] in "KML" and found[2].strip() != fields.get(found[1]):
                break  # the music goes on in another key or metre: what came before is the melody
            fields.setdefault(found[1], found[2].strip())
        elif line and not found and "K" in fields:
            lines.append(line)
    if "V" in fields:
        raise NotationError("several voices")
    metre = read_metre(fields.get("M", ""))
    items = read_body(" ".join(lines), _unit(fields.get("L", ""), metre))
    tokens = spelled(metre, read_key(fields.get("K", "")), items)
    rhythm = re.sub(r"[^a-z ]", "", fields.get("R", "").lower()).strip()
    return Melody(tokens, fields.get("T", "").strip(), fields["X"], rhythm, file)


def read_metre(text: str) -> str:
    """A metre as a fraction: ``4/4``, ``6/8`` …

    Raises:
        NotationError: there is none.
    """
    text = {"C": "4/4", "C|": "2/2"}.get(text.strip(), text.strip())
    if not re.fullmatch(r"\d{1,2}/(1|2|4|8|16)", text):
        raise NotationError(f"metre {text!r}")
    return text


def _unit(text: str, metre: str) -> Fraction:
    if re.fullmatch(r"1/\d+", text.strip()):
        return Fraction(text.strip())
    # the standard's default: a sixteenth where a bar is shorter than three quarters of a whole note
    return Fraction(1, 16) if Fraction(metre) < Fraction(3, 4) else Fraction(1, 8)


def read_key(text: str) -> str:
    """A key: tonic and mode, as ``D``, ``Em``, ``Ador``.

    Raises:
        NotationError: it is none of these.
    """
    found = re.match(r"([A-G])([#b]?)\s*([A-Za-z]*)", text.strip())
    mode = MODES.get(found[3][:3].lower() if len(found[3]) > 1 else found[3]) if found else None
    if found is None or mode is None or found[1] + found[2] not in _MAJOR:
        raise NotationError(f"key {text!r}")
    return found[1] + found[2] + mode


def signature(key: str) -> dict[str, int]:
    """Letter -> how many semitones the key raises it; letters it leaves alone are not in it."""
    found = re.fullmatch(r"([A-G][#b]?)(\w*)", key)
    if found is None:
        raise NotationError(f"key {key!r}")
    fifths = _MAJOR[found[1]] - _BELOW_MAJOR[found[2]]
    letters = SHARPS[:fifths] if fifths > 0 else FLATS[: max(0, -fifths)]
    return dict.fromkeys(letters, 1 if fifths > 0 else -1)


def read_body(text: str, unit: Fraction) -> Iterator[Item]:
    """The music below an ABC header.

    Args:
        text: the music.
        unit: what a note without a length lasts, as a part of a whole note.

    Raises:
        NotationError: something that is neither music nor known to be left out.
    """
    place = 0
    while place < len(text):
        found = _PARTS.match(text, place)
        if found is None or found.end() == place:
            raise NotationError(f"{text[place : place + 8]!r}")
        place = found.end()
        kind, value = found.lastgroup, found[0]
        if kind == "length":
            yield found["pitch"]
            yield _fraction(found["length"]) * unit
        elif kind == "skip":
            continue
        elif kind == "rest_length":
            yield "z"
            yield _fraction(found["rest_length"]) * unit
        elif kind == "chord_length":
            first = _FIRST.search(value)
            if first is None:
                raise NotationError(f"chord {value!r}")
            yield first[1]
            yield _fraction(first[2]) * _fraction(found["chord_length"]) * unit
        elif kind == "ending":
            if "|" in value:
                yield "|"
            yield f"[{value.translate(_NO_BARS).strip()[0]}"
        elif kind == "bar":
            yield _bar(value)
        elif kind == "tuplet":
            yield value[:2]
        elif kind == "field":
            raise NotationError(f"field {value!r} in the music")
        elif kind == "tie":
            yield "-"
        else:
            yield value[0]


_FIRST = re.compile(r"((?:\^\^|__|[\^_=])?[A-Ga-g][',]*)(\d*/*\d*)")
_NO_BARS = str.maketrans("", "", "[|:")


def _bar(text: str) -> str:
    """Whatever a bar line looks like, as one of ``|``, ``||``, ``|:``, ``:|`` and ``::``."""
    left, right = text[0] == ":", text[-1] == ":"
    if left and right:
        return "::"
    if left or right:
        return ":|" if left else "|:"
    return "|" if text == "|" else "||"


@cache
def _fraction(text: str) -> Fraction:
    """An ABC length: ``3``, ``/``, ``//``, ``/4``, ``3/2``."""
    found = re.fullmatch(r"(\d*)(/*)(\d*)", text)
    assert found is not None
    above, slashes, below = found.groups()
    under = int(below) if below else 2 ** len(slashes)
    if not under:
        raise NotationError(f"length {text!r}")
    return Fraction(int(above or 1), under)


def spelled(metre: str, key: str, items: Iterable[Item]) -> list[str]:
    """The tokens of a melody.

    Args:
        metre: as `read_metre` gives it.
        key: as `read_key` gives it.
        items: the music.

    Raises:
        NotationError: there are no notes, or one is absurdly long or short.
    """
    items = list(items)
    if not any(isinstance(item, str) and is_pitch(item) for item in items):
        raise NotationError("no notes")
    counts = Counter(item for item in items if item in UNITS)
    unit = max(UNITS, key=lambda u: (counts[u], u == Fraction(1, 8)))
    tokens = [f"M:{metre}", f"K:{key}", f"L:{unit}"]
    for item in items:
        if isinstance(item, str):
            joined = _JOINED.get((tokens[-1], item))
            tokens[-1:] = [joined] if joined else [tokens[-1], item]
        elif item != unit:
            length = item / unit
            if not 0 < length <= 32 or length.denominator > 8:
                raise NotationError(f"a length of {item}")
            tokens.append(str(length))
    return tokens


_JOINED = {("|", "|"): "|", ("|", "||"): "||", ("||", "|"): "||", ("||", "||"): "||", (":|", "|:"): "::",
           ("|", "|:"): "|:", ("||", "|:"): "|:", (":|", "|"): ":|", (":|", "||"): ":|", ("|:", "|"): "|:"}  # fmt: skip
"""Bar lines that stand twice, at the end of a line and at the beginning of the next."""


def is_pitch(token: str) -> bool:
    """Whether a token is a sounding note."""
    return token.lstrip("^_=")[:1] in tuple("ABCDEFGabcdefg")


def is_bar(token: str) -> bool:
    """Whether a token is a bar line."""
    return token in ("|", "||", "|:", ":|", "::")


def to_abc(tokens: Sequence[str], title: str = "", number: int = 1, per_line: int = 4) -> str:
    """A melody as ABC text, which players and engravers read.

    Args:
        tokens: the melody, its metre, key and unit among them (the first of each counts); 4/4, C and 1/8 without.
        title: of the tune; a line break in it becomes a space.
        number: its reference number.
        per_line: bars in a line.
    """
    head: dict[str, str] = {}
    lines, line, bars = [], "", 0
    for token in tokens:
        if is_heading(token):
            head.setdefault(token[0], token[2:])
            continue
        line += f" {token} " if is_bar(token) or token[0] == "[" else f" {token}" if token[0] == "(" else token
        bars += is_bar(token)
        if is_bar(token) and bars == per_line:
            lines.append(line)
            line, bars = "", 0
    music = "\n".join(" ".join(line.split()) for line in (*lines, line) if line.strip())
    head = {"M": "4/4", "L": "1/8", "K": "C", **head}
    return "\n".join(
        [f"X:{number}", f"T:{' '.join(title.split())}", *(f"{name}:{head[name]}" for name in "MLK"), music, ""]
    )


def is_heading(token: str) -> bool:
    """Whether a token is a metre, key or unit."""
    return token[:2] in ("M:", "L:", "K:")


def read_musicxml(path: Path, part: str = "soprano") -> Melody:
    """The melody of one part of a MusicXML file (``.mxl`` or ``.xml``), its first voice.

    Args:
        path: the file.
        part: name of the part, whatever its case.

    Raises:
        NotationError: there is no such part, or it is not one melody in one key and metre.
    """
    root = ElementTree.fromstring(_xml(path))
    names = {p.get("id"): (p.findtext("part-name") or "").strip() for p in root.iter("score-part")}
    own = next((p for p in root.iter("part") if names.get(p.get("id"), "").lower().startswith(part)), None)
    if own is None:
        raise NotationError(f"{path.name} has no part {part!r}")
    writer = _Writer()
    for measure in own.iter("measure"):
        writer.measure(measure)
    tokens = spelled(writer.metre, writer.key, writer.items)
    number = path.stem.removeprefix("bwv")
    return Melody(tokens, f"BWV {number}", number, "chorale", path.name)


def _xml(path: Path) -> bytes:
    if path.suffix != ".mxl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
        name = next(e.get("full-path") or "" for e in container.iter() if e.tag.endswith("rootfile"))
        return archive.read(name)


def _is_melody(note: ElementTree.Element) -> bool:
    """Whether a note is neither a chord's second, nor a grace note, nor of another voice."""
    return note.find("chord") is None and note.find("grace") is None and (note.findtext("voice") or "1").strip() == "1"


class _Writer:
    """Writes measures of MusicXML as tokens."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.metre = self.key = ""
        self.divisions = 1

    def measure(self, measure: ElementTree.Element) -> None:
        """One bar and its line; an accidental lasts until the end of it."""
        raised: dict[tuple[str, int], int] = {}
        for element in measure:
            if element.tag == "attributes":
                self._attributes(element)
            elif element.tag == "note" and _is_melody(element):
                self._note(element, raised)
        style = measure.find("barline[@location='right']")
        repeat = style.find("repeat") if style is not None else None
        final = style is not None and style.findtext("bar-style") == "light-heavy"
        self.items.append(":|" if repeat is not None else "||" if final else "|")

    def _attributes(self, element: ElementTree.Element) -> None:
        self.divisions = int(element.findtext("divisions") or self.divisions)
        time = element.find("time")
        if time is not None and not self.metre:
            self.metre = read_metre(f"{time.findtext('beats')}/{time.findtext('beat-type')}")
        key = element.find("key")
        if key is not None and not self.key:
            fifths, minor = int(key.findtext("fifths") or 0), key.findtext("mode") == "minor"
            tonic = next(name for name, place in _MAJOR.items() if place == fifths + 3 * minor)
            self.key = tonic + "m" * minor

    def _note(self, note: ElementTree.Element, raised: dict[tuple[str, int], int]) -> None:
        if note.find("rest") is not None:
            self.items.append("z")
        else:
            letter, octave = str(note.findtext("pitch/step")), int(note.findtext("pitch/octave") or 4)
            alter = int(float(note.findtext("pitch/alter") or 0))
            sign = ""
            if alter != raised.get((letter, octave), signature(self.key).get(letter, 0)):
                sign = {-2: "__", -1: "_", 0: "=", 1: "^", 2: "^^"}[alter]
                raised[letter, octave] = alter
            name = letter.lower() + "'" * (octave - 5) if octave > 4 else letter + "," * (4 - octave)
            self.items.append(sign + name)
        self.items.append(Fraction(int(note.findtext("duration") or 0), 4 * self.divisions))
        if any(tie.get("type") == "start" for tie in note.findall("tie")):
            self.items.append("-")
