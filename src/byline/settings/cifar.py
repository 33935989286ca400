"""CIFAR-10's binary release (Krizhevsky 2009), read from a folder.

Every file is a sequence of records: one byte of label, then 3072 bytes of a 32 × 32 picture, the red plane first, then
green and blue, each row by row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from byline.settings.data import Images

TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CATS_AND_DOGS = (3, 5)
_PICTURE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32


def is_there(folder: str | Path) -> bool:
    """Whether a folder holds any of the files."""
    return any((Path(folder) / name).is_file() for name in (*TRAIN_FILES, TEST_FILE))


def cifar10(folder: str | Path) -> Images:
    """The data set, pictures (n, 3, 32, 32) uint8.

    Args:
        folder: Holds ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``.

    Raises:
        FileNotFoundError: If a file is missing; all missing ones are named.
        ValueError: If a file is damaged.
    """
    folder = Path(folder)
    missing = [name for name in (*TRAIN_FILES, TEST_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} of CIFAR-10's binary release")
    train = [_read(folder / name) for name in TRAIN_FILES]
    test_images, test_labels = _read(folder / TEST_FILE)
    train_images, train_labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return Images(train_images, train_labels, test_images, test_labels, folder)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % _RECORD:
        raise ValueError(f"{path} is cut short or is no CIFAR-10 file: {len(raw)} bytes, no multiple of {_RECORD}")
    records = raw.reshape(-1, _RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(CLASSES):
        raise ValueError(f"{path} is no CIFAR-10 file: it has the label {labels.max()}; expected 0 to 9")
    return records[:, 1:].reshape(-1, *_PICTURE), labels
