"""Pictures as people keep them, as 8 bits of three colours: upright, and so that nothing in them disappears.

How deep or transparent pictures are brought to 8 bits is decided once for a whole folder, so that what differs between
two of its pictures is never the conversion.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byline.uses.tables import Said, quoted, some

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "PPM", "TIFF", "AVIF", "JPEG2000")
_SYSTEM = frozenset({"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "icon\r"})
_DEEPER = "files that lie deeper than in a folder of a class"
_CONTRAST = 48  # of 255
# white as long as everything can be seen on it; no grey is near the last two
_GROUNDS = np.array(
    [(255, 255, 255), (0, 0, 0), *((g, g, g) for g in (128, 192, 64)), (255, 0, 255), (0, 255, 0)], np.float64
)


def formats() -> list[str]:
    """Of the files that are read: none that another program would have to draw, and what this Pillow has."""
    from PIL import Image

    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def endings() -> frozenset[str]:
    """Of the files that are read, with their point, in lower case."""
    from PIL import Image

    read = formats()
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in read)


@dataclass(frozen=True, eq=False)
class Raw:
    """A picture upright and at its size, before it has 8 bits.

    Attributes:
        kind: "colour" with (H, W, 3) uint8; "clear" with (H, W, 4) uint8; "whole" or "real", (H, W) float32.
        values: The pixels.
        low: The least value of the file, of the last two.
        high: The greatest.
        frames: Pictures in the file, of which this is the first.
        broken: Values that are no number, which are 0 here.
        lying: Whether its EXIF data are damaged, so that nobody knows which side is up.
    """

    kind: str
    values: np.ndarray
    low: float = 0.0
    high: float = 0.0
    frames: int = 1
    broken: int = 0
    lying: bool = False


def raw(opened: Any, width: int, height: int) -> Raw:
    """The first picture of an open file, turned as its EXIF data say.

    Args:
        opened: A Pillow image.
        width: That it is brought to.
        height: Likewise.
    """
    from PIL import Image, ImageOps

    def sized(image: Any) -> np.ndarray:
        return np.array(image.resize((width, height), Image.Resampling.BILINEAR))

    frames = int(getattr(opened, "n_frames", 1))
    opened.load()
    try:
        upright, lying = ImageOps.exif_transpose(opened), False
    except Exception:  # viewers show such pictures too, as they lie
        upright, lying = opened, True
    if upright.mode == "F" or upright.mode.startswith("I"):
        kind = "real" if upright.mode == "F" else "whole"
        values = np.array(upright.convert("F"))
        finite = np.isfinite(values)
        values[~finite] = 0
        made = sized(Image.fromarray(values))
        return Raw(kind, made, float(values.min()), float(values.max()), frames, int((~finite).sum()), lying)
    if upright.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        if np.asarray(rgba)[..., 3].min() < 255:
            return Raw("clear", sized(rgba), frames=frames, lying=lying)
        upright = rgba
    return Raw("colour", sized(upright.convert("RGB")), frames=frames, lying=lying)


@dataclass(frozen=True)
class Form:
    """How the pictures of a folder are brought to 8 bits of three colours.

    Attributes:
        whole: What is black and what is white, of whole numbers of more than 8 bits.
        real: Of floating-point numbers.
        ground: Behind what is transparent.
    """

    whole: tuple[float, float] | None = None
    real: tuple[float, float] | None = None
    ground: tuple[int, ...] | None = None

    @staticmethod
    def of(raws: Sequence[Raw]) -> Form:
        """One for all these pictures.

        Of whole numbers 0 is black, and white is the most that a camera of as many bits as are used gives (255, 511, …,
        4095, 65535). Of floats the greatest is white, and 0 or the least is black.
        """
        whole, real = ([one for one in raws if one.kind == kind] for kind in ("whole", "real"))
        clear = [one.values for one in raws if one.kind == "clear"]
        bits = max([8, *(int(max(one.high, 0)).bit_length() for one in whole)])
        return Form(
            (min([0.0, *(one.low for one in whole)]), 2.0**bits - 1) if whole else None,
            (min([0.0, *(one.low for one in real)]), max(one.high for one in real)) if real else None,
            _ground(clear) if clear else None,
        )

    def eight(self, given: Raw) -> np.ndarray:
        """(H, W, 3) uint8."""
        if given.kind == "colour":
            return given.values
        if given.kind == "clear":
            ground = self.ground if self.ground is not None else _ground([given.values])
            colour, alpha = given.values[..., :3].astype(np.float64), given.values[..., 3:] / 255
            return np.round(colour * alpha + np.array(ground) * (1 - alpha)).astype(np.uint8)
        own = Form.of([given])
        black, white = (self.whole or own.whole if given.kind == "whole" else self.real or own.real) or (0.0, 255.0)
        reach = white - black if white > black else 1.0
        part = np.clip((given.values.astype(np.float64) - black) / reach, 0, 1)
        return np.repeat(np.round(255 * part).astype(np.uint8)[..., None], 3, -1)


def _ground(clear: Sequence[np.ndarray]) -> tuple[int, ...]:
    """The first ground that the least visible of transparent pictures stands out from, else the best there is."""
    least = np.full(len(_GROUNDS), np.inf)
    for values in clear:
        alpha = values[..., 3] / 255
        if alpha.any():
            apart = np.abs(values[..., None, :3] - _GROUNDS).max(-1)
            least = np.minimum(least, (apart * alpha[..., None]).sum((0, 1)) / alpha.sum())
    seen = least >= _CONTRAST
    return tuple(int(one) for one in _GROUNDS[int(seen.argmax() if seen.any() else least.argmax())])


def find(root: Path, said: Said) -> tuple[list[tuple[str, Path]], int]:
    """The pictures in the folders of a folder, with their folder's name, and how many files are left out.

    Raises:
        ValueError: There are none; says where pictures are instead.
    """
    known = endings()
    files: list[tuple[str, Path]] = []
    left: dict[str, list[str]] = {}

    def leave(why: str, *paths: Path) -> None:
        left.setdefault(why, []).extend(str(path.relative_to(root)) for path in paths)

    for folder in sorted(root.iterdir()):
        if _hidden(folder.name):
            leave("hidden files, or of the system", *(_below(folder) if folder.is_dir() else [folder]))
            continue
        if not folder.is_dir():
            leave(f"files in no folder of a class ({_ending(folder)})", folder)
            continue
        before = len(files)
        for path in sorted(folder.iterdir()):
            if _hidden(path.name):
                leave("hidden files, or of the system", *(_below(path) if path.is_dir() else [path]))
            elif path.is_dir():
                for one in _below(path):
                    hidden = any(map(_hidden, one.relative_to(path).parts))
                    leave("hidden files, or of the system" if hidden else _DEEPER, one)
            elif path.suffix.lower() in known:
                files.append((folder.name, path))
            else:
                leave(f"files of an ending that is not read ({_ending(path)})", path)
        if len(files) == before:
            said("folders without a picture that is read, which are no class", quoted(folder.name))
    for why, paths in left.items():
        if paths:
            said(f"left out, {why}", f"{len(paths)} ({some(map(quoted, paths), 3)})")
    if not files:
        deep = [path for path in left.get(_DEEPER, []) if Path(path).suffix.lower() in known]
        instead = some((f"{len(paths)} {why}" for why, paths in left.items() if paths), 5)
        if deep:
            instead = f"pictures that lie deeper, such as {quoted(deep[0])}: name the folder that holds the classes"
        instead = f"; there are {instead}" if instead else ""
        raise ValueError(
            f"{root} has no pictures in folders below it; expected {root}/CLASS/PICTURE.png and the like{instead}"
        )
    return files, sum(map(len, left.values()))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _ending(path: Path) -> str:
    return path.suffix.lower() or "none"


def _below(folder: Path) -> list[Path]:
    return sorted(Path(at) / name for at, _, names in os.walk(folder) for name in names)


def say(names: Sequence[str], raws: Sequence[Raw], pictures: np.ndarray, form: Form, said: Said) -> None:
    """Say what was chosen for these pictures, and which show nothing.

    Args:
        names: What they are called.
        raws: Before they had 8 bits.
        pictures: (n, H, W, 3), after.
        form: How they came to it.
        said: Told.
    """

    def those(chosen: Sequence[bool]) -> str:
        found = [name for name, one in zip(names, chosen, strict=True) if one]
        return f"{len(found)} ({some(map(quoted, found), 3)})" if found else ""

    for what, chosen in (
        ("files of several pictures, of which the first is taken", [one.frames > 1 for one in raws]),
        ("pictures whose EXIF data are damaged, taken as they lie", [one.lying for one in raws]),
        ("pictures with values that are no number, which are 0", [one.broken > 0 for one in raws]),
    ):
        if found := those(chosen):
            said(what, found)
    for kind, bits in (("whole", form.whole), ("real", form.real)):
        if bits is not None:
            count = "more than 8 bits" if kind == "whole" else "floating-point numbers"
            found = those([one.kind == kind for one in raws])
            said(f"pictures of {count}, where {bits[0]:g} is black and {bits[1]:g} is white", found)
    if form.ground is not None:
        red, green, blue = form.ground
        called = {"255 255 255": "white", "0 0 0": "black"}.get(f"{red} {green} {blue}", f"rgb({red}, {green}, {blue})")
        said(f"transparent pictures, laid on {called}", those([one.kind == "clear" for one in raws]))
    flat = (pictures == pictures[:, :1, :1]).all((1, 2, 3))
    if found := those(flat.tolist()):
        said("pictures of one colour all over, which show nothing", found)
