"""Pictures as people keep them: Pillow, told what a file is, says what is read of it when nobody tells."""

from __future__ import annotations

import importlib.util
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from byline.cli import app
from byline.uses import read_images
from byline.uses.own import picture

if importlib.util.find_spec("PIL") is None and os.environ.get("BYLINE_CI") != "1":
    pytest.skip("needs Pillow", allow_module_level=True)

from PIL import Image, ImageOps, features

EXAMPLES = int(os.environ.get("BYLINE_EXAMPLES", "50"))
many = settings(max_examples=EXAMPLES, derandomize=EXAMPLES == 50, deadline=None, print_blob=True)
SIZE = 16


def folder(root: Path, save: Callable[[Path, int], None], ending: str = "png", each: int = 2) -> Path:
    for i in range(2 * each):
        path = root / "ab"[i % 2] / f"{i}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, i)
    return root


def noise(i: int = 0, mode: str = "RGB", height: int = 20, width: int = 28) -> Image.Image:
    channels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(channels).convert(mode)


def small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)


def drawing(grey: int, side: int = 40) -> Image.Image:
    """A square on nothing."""
    values = np.full((side, side, 4), grey, np.uint8)
    values[..., 3] = 0
    values[side // 4 : -side // 4, side // 4 : -side // 4, 3] = 255
    return Image.fromarray(values)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette"])
@pytest.mark.parametrize("greys", [[0], [255], [128], [0, 255], [0, 128, 255], list(range(0, 256, 15))])
def test_no_drawing_on_nothing_disappears(tmp_path, mode, greys):
    def save(path: Path, i: int) -> None:
        image = drawing(greys[i % len(greys)])
        if mode == "palette":
            flat = Image.new("P", image.size, 0)
            flat.putpalette([greys[i % len(greys)]] * 6)
            flat.paste(1, (10, 10, 30, 30))
            flat.save(path, transparency=0)
        else:
            image.convert(mode).save(path)

    data = read_images(folder(tmp_path, save, each=max(2, len(greys))), SIZE)
    middle, corner = data.pictures[:, 8, 8].astype(int), data.pictures[:, 0, 0].astype(int)
    assert (np.abs(middle - corner).max(-1) >= 47).all()
    # the drawings keep their colour, and all lie on the same ground
    assert (
        np.abs(middle - np.array([greys[int(Path(name).stem) % len(greys)] for name in data.names])[:, None]).max() <= 1
    )
    assert len(np.unique(corner, axis=0)) == 1
    if greys == [0]:
        assert corner[0].tolist() == [255, 255, 255]
    assert any(note.startswith("transparent pictures, laid on ") for note in data.notes)
    # and so does one that is brought later
    content = (tmp_path / data.names[0]).read_bytes()
    np.testing.assert_allclose(data.encode(content), data.inputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("top", "white"), [(65_000, 65_535), (4000, 4095), (700, 1023), (200, 255)])
@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_more_than_8_bits_are_brought_to_8(tmp_path, top, white, ending):
    ramp = np.linspace(0, top, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
    root = folder(tmp_path, lambda path, i: Image.fromarray(ramp // (1 + i)).save(path), ending)
    data = read_images(root, SIZE)
    for name, made in zip(data.names, data.pictures, strict=True):
        want = 255.0 * (ramp // (1 + int(Path(name).stem))) / white
        assert np.abs(made - want[..., None]).max() <= 1
    if (ending, top) != ("pgm", 200):
        assert any(f"where 0 is black and {white} is white" in note for note in data.notes)
    content = (tmp_path / data.names[1]).read_bytes()
    if ending == "png":
        np.testing.assert_allclose(data.encode(content), data.inputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1e-6), (0, 255), (-3, 5), (-9, -1)])
def test_floats_are_brought_to_8_bits(tmp_path, low, high):
    ramp = np.linspace(low, high, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.float32)
    folder(tmp_path, lambda path, i: Image.fromarray(ramp).save(path), "tiff")
    ramp = (ramp - min(low, 0)) / (high - min(low, 0))
    for made in read_images(tmp_path, SIZE).pictures:
        assert np.abs(made - 255 * ramp[..., None]).max() <= 1


def test_floats_that_are_no_number(tmp_path):
    values = np.ones((SIZE, SIZE), np.float32)
    values[0, 0], values[1, 1] = np.nan, np.inf
    data = read_images(folder(tmp_path, lambda path, i: Image.fromarray(values).save(path), "tif"), SIZE)
    assert data.pictures[0, 0, 0].tolist() == data.pictures[0, 1, 1].tolist() == [0, 0, 0]
    assert data.pictures[0, 2, 2].tolist() == [255, 255, 255]
    assert any("values that are no number, which are 0: 4 (" in note for note in data.notes)


@pytest.mark.parametrize("ending", ["gif", "png", "tiff", "webp"])
def test_of_several_pictures_the_first_is_taken(tmp_path, ending):
    def save(path: Path, i: int) -> None:
        lossless = {"lossless": True} if ending == "webp" else {}
        noise(i).save(path, save_all=i > 0, **({"append_images": [noise(9), noise(8)]} if i else {}), **lossless)

    data = read_images(folder(tmp_path, save, ending), SIZE)
    for name, made in zip(data.names, data.pictures, strict=True):
        with Image.open(tmp_path / name) as opened:
            assert np.abs(small(opened) - made).max() <= 1
    assert any("files of several pictures, of which the first is taken: 3 (" in note for note in data.notes)


@pytest.mark.parametrize(
    "ending",
    ["PNG", "jpg", "JPEG", "jfif", "bmp", "gif", "webp", "ppm", "pgm", "pbm", "tif", "TIFF", "apng", "jp2", "avif"],
)
def test_endings(tmp_path, ending):
    if not features.check({"jp2": "jpg_2000"}.get(ending, ending if ending == "avif" else "zlib")):
        pytest.skip(f"this Pillow writes no {ending}")
    data = read_images(folder(tmp_path, lambda path, i: noise(i).save(path), ending), SIZE)
    assert (len(data.names), data.notes) == (4, [])
    for name, made in zip(data.names, data.pictures, strict=True):
        with Image.open(tmp_path / name) as opened:
            assert np.abs(small(opened) - made).max() <= 1


def test_what_is_left_out_is_said(tmp_path):
    folder(tmp_path, lambda path, i: noise(i).save(path))
    hidden = [".DS_Store", "a/Thumbs.db", "a/._0.png", "a/.x/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/a/1.png"]
    deeper = ["a/2020/1.png", "a/2020/may/1.JPG"]
    unread = ["a/1.heic", "b/2.HEIC", "c/3.svg", "b/notes"]
    outside = ["top.png"]
    for name in hidden + deeper + unread + outside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(0).save(tmp_path / name, "PNG")
    (tmp_path / "empty").mkdir()
    data = read_images(tmp_path, SIZE)
    assert data.class_names == ["a", "b"]
    assert data.names == ["a/0.png", "a/2.png", "b/1.png", "b/3.png"]
    assert data.what.endswith("(13 files left out)")
    said = "\n".join(data.notes)
    for part in (
        "hidden files, or of the system: 6 ('.DS_Store'",
        "files that lie deeper than in a folder of a class: 2 ('a/2020/1.png', 'a/2020/may/1.JPG')",
        "files of an ending that is not read (.heic): 2 ('a/1.heic', 'b/2.HEIC')",
        "files of an ending that is not read (.svg): 1 ('c/3.svg')",
        "files of an ending that is not read (none): 1 ('b/notes')",
        "files in no folder of a class (.png): 1 ('top.png')",
        "folders without a picture that is read, which are no class: 'c', 'empty'",
    ):
        assert part in said
    done = CliRunner().invoke(app, ["mislabels", str(tmp_path), "--out", str(tmp_path / "out"), "--epochs", "1"])
    assert done.exit_code == 0, done.output
    assert all(note in done.output for note in data.notes)
    assert "files that lie deeper" in (tmp_path / "out" / "mislabels.html").read_text()


def test_where_the_pictures_are_instead(tmp_path):
    folder(tmp_path / "train", lambda path, i: noise(i).save(path))
    with pytest.raises(ValueError, match=r"such as 'train/a/0\.png': name the folder that holds the classes"):
        read_images(tmp_path)
    (tmp_path / "other" / "a").mkdir(parents=True)
    (tmp_path / "other" / "a" / "1.heic").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"there are 1 files of an ending that is not read \(\.heic\)"):
        read_images(tmp_path / "other")


def test_damaged_files_are_all_named(tmp_path):
    folder(tmp_path, lambda path, i: noise(i).save(path), each=4)
    whole = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "2.png").write_bytes(b"")
    (tmp_path / "b" / "1.png").write_bytes(b"no picture")
    (tmp_path / "b" / "3.png").write_bytes(whole[:60] + bytes(20) + whole[80:])
    with pytest.raises(
        ValueError, match=r"a/0\.png is no picture that can be read: .*a/2\.png, .*b/1\.png, .*b/3\.png$"
    ):
        read_images(tmp_path)


def test_damaged_exif_data_lose_no_picture(tmp_path):
    def save(path: Path, i: int) -> None:
        noise(i).save(path, exif=b"Exif\x00\x00no TIFF at all", lossless=True)

    data = read_images(folder(tmp_path, save, "webp"), SIZE)
    with Image.open(tmp_path / "a" / "0.webp") as opened:
        assert (small(opened) == data.pictures[0]).all()
    assert any("EXIF data are damaged, taken as they lie: 4 (" in note for note in data.notes)


def test_pictures_that_show_nothing_are_named(tmp_path):
    folder(tmp_path, lambda path, i: (Image.new("RGB", (9, 9), (7, 8, 9)) if i == 3 else noise(i)).save(path))
    assert "pictures of one colour all over, which show nothing: 1 ('b/3.png')" in read_images(tmp_path, SIZE).notes


MODES = ["1", "L", "P", "RGB", "CMYK", "LA", "RGBA", "I;16", "F"]
FORMATS = {
    "png": ["1", "L", "P", "RGB", "LA", "RGBA", "I;16"],
    "jpeg": ["L", "RGB", "CMYK"],
    "tiff": MODES,
    "webp": ["RGB", "RGBA"],
    "bmp": ["1", "L", "P", "RGB"],
    "gif": ["1", "L", "P"],
}


@st.composite
def saved(draw: st.DrawFn) -> tuple[bytes, str]:
    """The bytes of a picture, and the ending of its file."""
    ending = draw(st.sampled_from(sorted(FORMATS)))
    mode = draw(st.sampled_from(FORMATS[ending]))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if mode == "F":
        image = Image.fromarray(rng.normal(size=(height, width)).astype(np.float32) * 10.0 ** draw(st.integers(-6, 6)))
    elif mode == "I;16":
        image = Image.fromarray(rng.integers(0, 2 ** draw(st.integers(1, 16)), (height, width), dtype=np.uint16))
    elif mode in ("LA", "RGBA"):
        values = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
        if draw(st.booleans()):
            values[..., -1] = 255
        image = Image.fromarray(values)
    else:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    options: dict[str, object] = {}
    if ending in ("png", "jpeg", "webp", "tiff"):
        options["exif"] = Image.Exif()
        if (turned := draw(st.integers(0, 9))) != 0:
            options["exif"][274] = turned
    if ending == "webp":
        options["lossless"] = True
    if mode == "P" and ending in ("png", "gif") and draw(st.booleans()):
        options["transparency"] = int(np.asarray(image).flat[0])
    out = io.BytesIO()
    image.save(out, ending, **options)
    return out.getvalue(), ending


def by_pillow(content: bytes, ground: np.ndarray, white: tuple[float, float]) -> np.ndarray:
    """Of a file whose ground and whose black and white are known: upright, then at its size, then on the ground."""
    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode in ("F", "I;16", "I", "I;16B"):
        black, top = white
        values = np.asarray(image.convert("F").resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(float)
        return np.repeat(np.clip(255 * (values - black) / max(top - black, 1e-300), 0, 255)[..., None], 3, -1)
    if image.mode not in ("LA", "RGBA") and "transparency" not in image.info:
        return small(image)
    clear = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    under = Image.new("RGBA", clear.size, (*(int(value) for value in ground), 255))
    return np.asarray(Image.alpha_composite(under, clear).convert("RGB")).astype(int)


@many
@given(st.lists(saved(), min_size=4, max_size=6))
def test_pictures_are_those_that_pillow_reads(files):
    with tempfile.TemporaryDirectory() as root:
        for i, (content, ending) in enumerate(files):
            path = Path(root) / "ab"[i % 2] / f"{i}.{ending}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        data = read_images(root, SIZE)
    called = [note for note in data.notes if note.startswith("transparent")]
    word = called[0].split(" laid on ")[1].split(":")[0] if called else "white"
    fixed = {"white": (255, 255, 255), "black": (0, 0, 0)}
    ground = np.array(fixed[word] if word in fixed else [int(part) for part in word[4:-1].split(",")])
    deep: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for content, _ in files:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.mode in ("F", "I;16", "I", "I;16B"):
                deep[opened.mode == "F"].append(np.asarray(opened))
    whole = max((int(values.max()) for values in deep[False]), default=255)
    ranges = {
        False: (0.0, 2.0 ** max(8, whole.bit_length()) - 1),
        True: (
            min((float(values.min()) for values in deep[True]), default=0.0),
            max((float(values.max()) for values in deep[True]), default=1.0),
        ),
    }
    ranges[True] = (min(0.0, ranges[True][0]), ranges[True][1])
    for name, made in zip(data.names, data.pictures, strict=True):
        content, ending = files[int(Path(name).stem)]
        with Image.open(io.BytesIO(content)) as opened:
            want = by_pillow(content, ground, ranges[opened.mode == "F"])
        assert np.abs(made - want).max() <= 2, name
        if ending not in ("tiff",):
            place = data.names.index(name)
            np.testing.assert_allclose(data.encode(content), data.inputs[place], rtol=1e-5, atol=1e-5)
            assert picture(content, 5, 7).shape == (5, 7, 3)
            assert picture(content, 5, 7, "L").shape == (5, 7)


@many
@given(saved(), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4), st.floats(0, 1))
def test_damaged_pictures_are_read_or_refused(file, changes, kept):
    content = bytearray(file[0])
    for place, value in changes:
        content[int(place * len(content))] = value
    content = content[: int(np.ceil(kept * len(content)))]
    try:
        made, said = picture(bytes(content), 6, 6), ""
    except ValueError as error:
        made, said = np.empty((6, 6, 3)), str(error)
    assert made.shape == (6, 6, 3)
    assert not said or any(
        part in said for part in ("no picture that can be read", "is damaged", "pixels; expected at most")
    )
