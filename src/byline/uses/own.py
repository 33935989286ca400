"""Your own data, from files: a folder of pictures sorted by class, or a table, and a small model to look at it with.

For who has data and no model yet. Whoever has a model gives it to `byline.uses.find_mislabels` instead.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from byline.batches import fingerprint
from byline.engines.base import installed
from byline.ensembles import Independent
from byline.ensembles.base import check_count
from byline.evaluate.bank import read as read_arrays
from byline.evaluate.bank import write
from byline.features import Exact, Factorized
from byline.methods import TRAK
from byline.task import Task
from byline.training import Recipe, train_many
from byline.uses.mislabels import Mislabels, find_mislabels

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
CHECKPOINTS = 5
_LEAST = 2  # examples of a class
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_PIXELS = 12_000_000


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
        encode: Makes the input (...) of a further example of the bytes of its file: a picture, or a CSV file of one
            row with the table's header. Raises ValueError for what it refuses.
    """

    inputs: Tensor
    labels: Tensor
    class_names: list[str]
    names: list[str]
    what: str
    pictures: np.ndarray | None = field(default=None, repr=False)
    rows: Any = field(default=None, repr=False)
    encode: Callable[[bytes], Tensor] | None = field(default=None, repr=False)

    def dataset(self) -> TensorDataset:
        """Inputs and labels."""
        return TensorDataset(self.inputs, self.labels)

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


def read(data: str | Path, label: str | None = None, size: int = 32) -> OwnData:
    """A folder of pictures by `read_images`, or a CSV file by `read_table`.

    Args:
        data: The folder, or the file.
        label: The column of labels; for a file alone.
        size: Of pictures.

    Raises:
        ValueError: A label with a folder, or none with a file.
    """
    if Path(data).is_dir():
        if label is not None:
            raise ValueError("--label is for CSV files; the classes of a folder are the folders in it")
        return read_images(data, size)
    if label is None:
        raise ValueError(f"{data} is no folder; for a CSV file, name the column of labels with --label")
    return read_table(data, label)


def picture(data: bytes, height: int, width: int, mode: str = "RGB") -> np.ndarray:
    """A picture of the bytes of its file, (H, W, 3) or (H, W) uint8.

    Args:
        data: PNG, JPEG, WebP, GIF or BMP.
        height: That it is brought to.
        width: Likewise.
        mode: "RGB", or "L" for grey.

    Raises:
        ValueError: No picture, another format, or one of more than 12 million pixels.
        ModuleNotFoundError: Pillow is not installed.
    """
    installed("PIL", "images", "reading pictures")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            if opened.width * opened.height > _PIXELS:
                raise ValueError(f"the picture has {opened.width} × {opened.height} pixels; expected at most {_PIXELS}")
            return np.array(opened.convert(mode).resize((width, height), Image.Resampling.BILINEAR))
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise ValueError("the file is no picture that can be read; expected PNG, JPEG, WebP, GIF or BMP") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the picture is damaged: {error}") from None


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
    spread, middle = inputs.std((0, 2, 3), keepdim=True).clamp_min(1), inputs.mean((0, 2, 3), keepdim=True)

    def encode(data: bytes) -> Tensor:
        values = torch.from_numpy(picture(data, size, size)).permute(2, 0, 1).float()
        return ((values - middle) / spread)[0]

    return OwnData(
        (inputs - middle) / spread,
        labels,
        classes,
        [str(path.relative_to(root)) for _, path in files],
        f"{len(files)} pictures in {len(classes)} folders of {root}",
        pictures=pictures,
        encode=encode,
    )


@dataclass(frozen=True)
class _Column:
    """How a column of a table becomes numbers: standardised, or one column a value."""

    name: str
    median: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    values: tuple[str, ...] | None = None
    commas: bool = False  # of decimals

    def encode(self, column: Any) -> np.ndarray:
        """(n, ...) float64 of a column of n values.

        Raises:
            ValueError: A number so large that none of 32 bits stands for it.
        """
        if self.values is not None:
            text = column.astype(object).where(column.notna(), "missing").astype(str).to_numpy()
            return (text[:, None] == np.array(self.values, dtype=object)).astype(np.float64)
        numbers = np.array(column.to_numpy(np.float64, na_value=np.nan))
        numbers[~np.isfinite(numbers)] = np.nan
        with np.errstate(over="ignore", invalid="ignore"):
            made = (np.where(np.isnan(numbers), self.median, numbers) - self.mean) / self.std
            if not np.isfinite(made.astype(np.float32)).all() or not np.isfinite(self.std):
                raise ValueError(f"column {self.name!r} has a number that is too large to be learnt from")
        return made[:, None]

    def one(self, given: str) -> np.ndarray:
        """(1, ...) of one value as text; nothing is a missing one.

        Raises:
            ValueError: No number, or a value that no row of the table has.
        """
        import pandas as pd

        if self.values is None:
            try:
                text = given.replace(",", ".", 1) if self.commas else given
                number = float(text) if text.strip() else np.nan
            except ValueError:
                raise ValueError(f"column {self.name!r} has {given[:50]!r}; expected a number") from None
            return self.encode(pd.Series([number]))
        value = given if given.strip() else "missing"
        if given.strip() and value not in self.values:
            there = f"which no row of the table has; there are {', '.join(self.values[:10])}"
            raise ValueError(f"column {self.name!r} has {given[:50]!r}, {there}")
        return self.encode(pd.Series([value]))


def _column_of(column: Any, name: str, commas: bool = False) -> _Column | None:
    """How a column is encoded; None for one that cannot be learnt from."""
    import pandas as pd

    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        if column.nunique() > 50:
            return None
        text = column.astype(object).where(column.notna(), "missing").astype(str)
        return _Column(name, values=tuple(sorted(set(text))))
    numbers = np.array(column.to_numpy(np.float64, na_value=np.nan))
    numbers[~np.isfinite(numbers)] = np.nan
    if np.isnan(numbers).all():
        return None
    median = float(np.nanmedian(numbers))
    filled = np.where(np.isnan(numbers), median, numbers)
    with np.errstate(over="ignore", invalid="ignore"):
        return _Column(name, median, float(filled.mean()), float(filled.std()) or 1.0, commas=commas)


def _frame(source: Callable[[], Any], where: str, **options: Any) -> Any:
    """What `pandas.read_csv` makes of a file, by the separator that it has; a fresh handle for each reading.

    Raises:
        ValueError: It is no CSV file.
    """
    import pandas as pd

    try:
        return pd.read_csv(source(), sep=_separator(source()), **options)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is no CSV file that can be read: {error}") from None


def _separator(source: Any) -> str:
    """What separates the columns: a comma, or where the header has none between two of them a semicolon or a tab."""
    with open(source, "rb") if isinstance(source, Path) else source as file:
        header = file.readline().decode("utf-8-sig", "replace")
    for separator in (",", ";", "\t"):
        if len(next(csv.reader([header], delimiter=separator), [])) > 1:
            return separator
    return ","


def _with_points(column: Any) -> Any | None:
    """A column of words that are numbers with decimal commas as numbers; None for any other.

    Commas before groups of three digits alone may stand for thousands, and stay words.
    """
    text = column.dropna().astype(str).str.strip()
    numbers = len(text) and text.str.fullmatch(r"[+-]?\d+(,\d+)?").all()
    if not numbers or not text.str.contains(r",(?!\d{3}$)").any():
        return None
    return text.str.replace(",", ".").astype(float).reindex(column.index)


def _row_encoder(columns: list[_Column], others: list[str]) -> Callable[[bytes], Tensor]:
    """Reads a CSV file of one row with the table's header; columns that are not learnt from may be left out."""

    def encode(data: bytes) -> Tensor:
        # what pandas takes for missing in the table ("NA", "null", …) is missing here too
        frame = _frame(lambda: io.BytesIO(data), "the file", dtype=str).fillna("")
        if len(frame) != 1:
            raise ValueError(f"the file has {len(frame)} rows below its header; expected one")
        missing = [column.name for column in columns if column.name not in frame.columns]
        if missing:
            raise ValueError(f"the file has no column {missing[0]!r}; expected a header with {', '.join(others)}")
        parts = [column.one(str(frame[column.name].iloc[0])) for column in columns]
        return torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))[0]

    return encode


def read_table(path: str | Path, label: str) -> OwnData:
    """Rows of a CSV file with a header, separated by commas, semicolons or tabs.

    Numbers are standardised, missing ones take the median; a decimal comma is one where semicolons or tabs separate.
    Other columns become one column per value, up to 50 values.

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
    frame = _frame(lambda: source, str(source))
    if label not in frame.columns:
        raise ValueError(f"{source} has no column {label!r}; there are {', '.join(map(str, frame.columns))}")
    missing = frame[label].isna()
    if missing.any():
        raise ValueError(
            f"{source}: row {int(missing.to_numpy().argmax())} has no {label} ({int(missing.sum())} in all)"
        )
    labels, classes = _classes(frame[label].astype(str).to_numpy(), str(source))
    others = frame.drop(columns=[label])
    decimal = set()
    if _separator(source) != ",":
        for name in others.columns:
            if not pd.api.types.is_numeric_dtype(others[name]) and (found := _with_points(others[name])) is not None:
                others[name] = found
                decimal.add(name)
    columns = [m for name in others.columns if (m := _column_of(others[name], str(name), name in decimal)) is not None]
    parts = [column.encode(others[column.name]) for column in columns]
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
        encode=_row_encoder(columns, [str(name) for name in others.columns]),
    )


def train_small(
    data: OwnData, train_set: Any, *, epochs: int = 10, seed: int = 0, kept: Path | None = None
) -> tuple[Task, Independent]:
    """Train the small network once.

    Args:
        data: Whose network it is.
        train_set: All of its examples, or some.
        epochs: Of the run; the checkpoints are spread over it.
        seed: Of the run.
        kept: A file in which the checkpoints are kept, and found again where it was made of the same examples.

    Returns:
        The task of the trained network, and its checkpoints as members.
    """
    check_count(epochs, "epochs")
    batch = int(min(64, max(8, len(train_set) // 16)))
    recipe = Recipe(lr=0.02, momentum=0.9, batch_size=batch, epochs=epochs)
    places = sorted({max(1, round(epochs * (i + 1) / CHECKPOINTS)) for i in range(CHECKPOINTS)})
    made_of = {"recipe": recipe.to_dict(), "seed": seed, "places": places, "data": fingerprint(train_set)}
    model = data.build().eval()
    states = None if kept is None else _kept_states(kept, made_of)
    if states is None:
        task = Task(model)
        run = train_many(data.build, train_set, recipe, task_loss=task.loss, seeds=[seed], checkpoints=places)[0]
        states = [run.checkpoints[epoch] for epoch in places]
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            arrays = {f"{i}/{name}": value.numpy() for i, state in enumerate(states) for name, value in state.items()}
            write(kept, arrays, {"made_of": made_of})
    model.load_state_dict(states[-1])
    return Task(model), Independent(states)


def _kept_states(path: Path, made_of: dict[str, Any]) -> list[dict[str, Tensor]] | None:
    if not path.is_file():
        return None
    arrays, metadata = read_arrays(path)
    if metadata.get("made_of") != made_of:
        return None
    states: dict[int, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        place, _, parameter = name.partition("/")
        states.setdefault(int(place), {})[parameter] = torch.from_numpy(array)
    return [states[place] for place in sorted(states)]


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
    train_set = data.dataset()
    task, members = train_small(data, train_set, epochs=epochs, seed=seed)
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
