"""Image data sets in the IDX format of MNIST: found on this machine, or fetched when asked, checked by hash.

The format is the one described at http://yann.lecun.com/exdb/mnist/: a magic number that names the element
type and the number of dimensions, the dimensions, then the elements, all big-endian.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

PARTS = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}

# sha256 of each file's content once unpacked, taken from the files of the Debian package
# dataset-fashion-mnist. The content and not the .gz is what gets checked: Debian repacks the official files
# without the name in the gzip header, so the two differ by those bytes and nothing else.
FASHION_CONTENT = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

# sha256 of the official .gz files, as TensorFlow Datasets lists them (url_checksums/fashion_mnist.txt).
FASHION_ARCHIVES = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True)
class Images:
    """A data set of grey images.

    Attributes:
        train_images: (n, height, width) uint8.
        train_labels: (n,) int64.
        test_images: (m, height, width) uint8.
        test_labels: (m,) int64.
        source: The folder they were read from.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: Path

    def __repr__(self) -> str:
        height, width = self.train_images.shape[1:]
        counts = f"{len(self.train_images)} train, {len(self.test_images)} test"
        return f"Images({counts}, {height}×{width}, from {self.source})"


def read_idx(path: str | Path, *, sha256: str | None = None) -> np.ndarray:
    """Reads an IDX file, plain or gzipped, as an array of the shape and type it declares.

    Args:
        path: The file.
        sha256: Expected hash of the unpacked content.

    Raises:
        ValueError: If the file is damaged, is not IDX, or has another hash; the message names the file.
    """
    path = Path(path)
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    if sha256 is not None and (found := hashlib.sha256(raw).hexdigest()) != sha256:
        raise ValueError(f"{path} is not the known file: its content has sha256 {found}, expected {sha256}")
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _TYPES or not raw[3]:
        raise ValueError(f"{path} is not an IDX file: it begins with {raw[:4].hex(' ') or 'nothing'}")
    dtype, start = np.dtype(_TYPES[raw[2]]), 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"{path} is cut short: it ends within its header")
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], ">u4"))
    if len(raw) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{path} is cut short or too long: it declares shape {shape}, and holds {len(raw) - start} bytes"
        )
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def read_folder(folder: str | Path, *, sha256: dict[str, str] | None = None) -> Images:
    """Reads the four files of a data set laid out like MNIST, each plain or gzipped.

    Args:
        folder: Holds train-images-idx3-ubyte and the other three, with or without ``.gz``.
        sha256: File name without ``.gz`` -> expected hash of the unpacked content.

    Raises:
        FileNotFoundError: If a file is missing; all missing ones are named.
        ValueError: If a file is damaged, or images and labels do not fit together.
    """
    folder = Path(folder)
    found = {key: _file(folder, name) for key, name in PARTS.items()}
    missing = [PARTS[key] for key, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} (plain or with .gz)")
    arrays = {
        key: read_idx(path, sha256=(sha256 or {}).get(PARTS[key])) for key, path in found.items() if path is not None
    }
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"{folder}: {part} images are {images.shape} and labels {labels.shape}; "
                "expected (n, height, width) and (n,)"
            )
        arrays[f"{part}_labels"] = labels.astype(np.int64)
    return Images(**arrays, source=folder)


def mnist(root: str | Path) -> Images:
    """MNIST, or any data set laid out like it, from a folder of IDX files; see `read_folder`."""
    return read_folder(root)


def fashion_mnist(root: str | Path | None = None, *, fetch: bool = False) -> Images:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747): 60000 + 10000 images, 28×28, ten classes.

    Looked for in ``root`` alone if given; else in ``$BYLINE_DATA``, ``$BYLINE_DATA/fashion-mnist``, the
    Debian package's /usr/share/datasets/fashion-mnist and, without BYLINE_DATA, pooch's cache folder of
    byline. What is found is checked by hash.

    Args:
        root: Folder of the four files.
        fetch: Download the official files (30 MB) if they are nowhere; without it the network is never used.

    Raises:
        FileNotFoundError: If the files are nowhere, with the two commands that bring them.
        ValueError: If a file is not the known one.
    """
    places = [Path(root)] if root is not None else _places()
    for place in places:
        if any(_file(place, name) for name in PARTS.values()):
            return read_folder(place, sha256=FASHION_CONTENT)
    if fetch:
        target = next(place for place in places[::-1] if place != DEBIAN_FASHION)
        _download(target)
        return read_folder(target, sha256=FASHION_CONTENT)
    raise FileNotFoundError(
        f"Fashion-MNIST is not in {', '.join(map(str, places))}: run `byline data fetch fashion-mnist` or "
        "`apt-get install dataset-fashion-mnist`, or set BYLINE_DATA to a folder that holds it"
    )


def _places() -> list[Path]:
    """Where to look."""
    import pooch

    environment = os.environ.get("BYLINE_DATA")
    if environment:
        named = Path(environment)
        return [named, named / "fashion-mnist", DEBIAN_FASHION]
    return [DEBIAN_FASHION, Path(pooch.os_cache("byline")) / "fashion-mnist"]


def _file(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _download(folder: Path) -> None:
    import pooch

    for name, sha256 in FASHION_ARCHIVES.items():
        pooch.retrieve(FASHION_URL + name, known_hash=f"sha256:{sha256}", fname=name, path=folder)
