"""Your own data, from files: a folder of pictures sorted by class, or a table, and a small model to look at it with.

For who has data and no model yet. Whoever has a model gives it to `byline.uses.find_mislabels` instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from byline.engines.base import installed
from byline.ensembles import Independent
from byline.ensembles.base import check_count
from byline.features import Exact, Factorized
from byline.methods import TRAK
from byline.task import Task
from byline.training import Recipe, train_many
from byline.uses.mislabels import Mislabels, find_mislabels

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
CHECKPOINTS = 5
_LEAST = 2  # examples of a class


@dataclass(frozen=True, eq=False)
class OwnData:
    """Labelled examples as tensors, with what to call them.

    Attributes:
        inputs: (n, ...) float32.
        labels: (n,) int64.
        class_names: What the labels stand for.
        names: (n,) what each example is called: a path below the folder, or a row of the table.
        pictures: (n, H, W, 3) uint8, where the examples are pictures.
        rows: The table's columns but the label, as text, where the examples are rows.
        what: In words.
    """

    inputs: Tensor
    labels: Tensor
    class_names: list[str]
    names: list[str]
    what: str
    pictures: np.ndarray | None = field(default=None, repr=False)
    rows: Any = field(default=None, repr=False)

    def build(self) -> nn.Module:
        """A small network for such examples: convolutions for pictures, two layers for rows."""
        classes = len(self.class_names)
        if self.pictures is None:
            return nn.Sequential(nn.Linear(self.inputs.shape[1], 64), nn.ReLU(), nn.Linear(64, classes))
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, classes),
        )


def read_images(folder: str | Path, size: int = 32) -> OwnData:
    """Pictures sorted into a folder for each class, at one size.

    Args:
        folder: Holds a folder a class, and in each its pictures.
        size: Height and width that they are brought to.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: Fewer than two classes, or a file that is no picture; names it.
        ModuleNotFoundError: Pillow is not installed.
    """
    installed("PIL", "images", "reading pictures")
    from PIL import Image, UnidentifiedImageError

    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}")
    if not isinstance(size, int) or isinstance(size, bool) or not 8 <= size <= 256:
        raise ValueError(f"size is {size!r}; expected an int from 8 to 256")
    files = [(path.parent.name, path) for path in sorted(root.glob("*/*")) if path.suffix.lower() in SUFFIXES]
    if not files:
        raise ValueError(f"{root} has no pictures in folders below it; expected {root}/CLASS/PICTURE.png and the like")
    pictures = np.empty((len(files), size, size, 3), np.uint8)
    for place, (_, path) in enumerate(files):
        try:
            with Image.open(path) as opened:
                pictures[place] = np.asarray(opened.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is no picture that can be read: {error}") from None
    given = np.array([name for name, _ in files])
    labels, classes = _classes(given, str(root))
    inputs = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    spread = inputs.std((0, 2, 3), keepdim=True).clamp_min(1)
    return OwnData(
        (inputs - inputs.mean((0, 2, 3), keepdim=True)) / spread,
        labels,
        classes,
        [str(path.relative_to(root)) for _, path in files],
        f"{len(files)} pictures in {len(classes)} folders of {root}",
        pictures=pictures,
    )


def read_table(path: str | Path, label: str) -> OwnData:
    """Rows of a CSV file with a header, separated by commas, semicolons or tabs.

    Numbers are standardised, missing ones take the median; other columns become one column per value, up to 50 values.

    Args:
        path: The file.
        label: Name of the column that holds the labels.

    Returns:
        The rows, called ``row 0`` (the first below the header) and so on.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No such column, missing labels, fewer than two classes, or no columns to learn from.
    """
    import pandas as pd

    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no file at {source}")
    try:
        frame = pd.read_csv(source)
        for separator in (";", "\t"):
            # spreadsheets of many countries write no commas: what was read is one column with a long name
            if len(frame.columns) == 1 and separator in str(frame.columns[0]):
                frame = pd.read_csv(source, sep=separator)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is no CSV file that can be read: {error}") from None
    if label not in frame.columns:
        raise ValueError(f"{source} has no column {label!r}; there are {', '.join(map(str, frame.columns))}")
    missing = frame[label].isna()
    if missing.any():
        raise ValueError(
            f"{source}: row {int(missing.to_numpy().argmax())} has no {label} ({int(missing.sum())} in all)"
        )
    labels, classes = _classes(frame[label].astype(str).to_numpy(), str(source))
    others = frame.drop(columns=[label])
    parts = []
    for name in others.columns:
        column = others[name]
        if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
            if column.nunique() <= 50:
                text = column.astype(object).where(column.notna(), "missing").astype(str)
                parts.append(pd.get_dummies(text, prefix=str(name)).to_numpy(np.float64))
            continue
        values = np.array(column.to_numpy(np.float64, na_value=np.nan))
        values[~np.isfinite(values)] = np.nan
        if np.isnan(values).all():
            continue
        values = np.where(np.isnan(values), np.nanmedian(values), values)
        parts.append(((values - values.mean()) / (values.std() or 1.0))[:, None])
    if not parts:
        raise ValueError(
            f"{source} has no column to learn {label!r} from: neither numbers nor up to 50 different values"
        )
    return OwnData(
        torch.from_numpy(np.concatenate(parts, 1).astype(np.float32)),
        labels,
        classes,
        [f"row {i}" for i in range(len(frame))],
        f"{len(frame)} rows of {source}, column {label!r}",
        rows=others.astype(str),
    )


def look_for_mislabels(
    data: OwnData, *, rows: int = 50, evidence: int = 5, epochs: int = 10, seed: int = 0, progress: bool = True
) -> Mislabels:
    """Train a small model once, and rank the examples by the checkpoints of that one run.

    Args:
        data: From `read_images` or `read_table`.
        rows: How many suspicious examples to return.
        evidence: Opponents of each.
        epochs: Of the run; the checkpoints are spread over it.
        seed: Of the run.
        progress: Show progress bars where stderr is a terminal.

    Returns:
        What `find_mislabels` returns, with the classes' names as labels.
    """
    check_count(epochs, "epochs")
    train_set = TensorDataset(data.inputs, data.labels)
    task = Task(data.build().eval())
    batch = int(min(64, max(8, len(data.labels) // 16)))
    recipe = Recipe(lr=0.02, momentum=0.9, batch_size=batch, epochs=epochs)
    kept = sorted({max(1, round(epochs * (i + 1) / CHECKPOINTS)) for i in range(CHECKPOINTS)})
    run = train_many(data.build, train_set, recipe, task_loss=task.loss, seeds=[seed], checkpoints=kept)[0]
    members = Independent([run.checkpoints[epoch] for epoch in kept])
    # N × N kernels of exact features up to a few thousand examples, fewer columns beyond
    features = Exact() if len(train_set) <= 5000 else Factorized(2048)
    attributor = TRAK(task, members, features=features, progress=progress).fit(train_set)
    # by loss: at early checkpoints nothing ranks better (docs/uses.md); the attributor tells whom to look at
    return find_mislabels(attributor, data.labels, rows=rows, evidence=evidence, by="loss", names=data.class_names)


def _classes(given: np.ndarray, where: str) -> tuple[Tensor, list[str]]:
    names, labels, counts = np.unique(given, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise ValueError(f"{where} has one class, {names[0]!r}; expected two or more")
    few = [str(name) for name, count in zip(names, counts, strict=True) if count < _LEAST]
    if few:
        raise ValueError(f"{where}: of class {few[0]!r} there is one example; expected at least {_LEAST} of each")
    return torch.from_numpy(labels.astype(np.int64)), [str(name) for name in names]
