"""Your own data, from files: a folder of pictures sorted by class, or a table, and a small model to look at it with.

For who has data and no model yet. Whoever has a model gives it to `byline.uses.find_mislabels` instead.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
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
from byline.uses.pictures import Form, Raw, find, formats, raw, say
from byline.uses.tables import WORDS, Column, Said, column_of, quoted, read_cells, say_labels, some

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
        notes: What was left out of the files, or taken for something else than it looks like, a sentence each.
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
    notes: list[str] = field(default_factory=list, repr=False)
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
        problem = f"{data} is no folder; for a CSV file, name the column of labels with --label"
        if not Path(data).is_file():
            raise ValueError(f"{problem} (there is no such file either)")
        columns = read_cells(Path(data).read_bytes(), str(data), (), Said()).columns
        raise ValueError(f"{problem}; there are {some(map(quoted, columns))}")
    return read_table(data, label)


def picture(data: bytes, height: int, width: int, mode: str = "RGB", form: Form | None = None) -> np.ndarray:
    """A picture of the bytes of its file, (H, W, 3) or (H, W) uint8: the first in it, upright.

    Args:
        data: PNG, JPEG, WebP, GIF or BMP.
        height: That it is brought to.
        width: Likewise.
        mode: "RGB", or "L" for grey.
        form: How more than 8 bits and transparency become colours; chosen for this picture when left out.

    Raises:
        ValueError: No picture, another format, or one of more than 12 million pixels.
        ModuleNotFoundError: Pillow is not installed.
    """
    installed("PIL", "images", "reading pictures")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            pixels = opened.width * opened.height
            if pixels <= _PIXELS:
                found = raw(opened, width, height)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise ValueError("the file is no picture that can be read; expected PNG, JPEG, WebP, GIF or BMP") from None
    except Exception as error:  # of damaged files Pillow raises whatever its formats happen to
        raise ValueError(f"the picture is damaged: {error or type(error).__name__}") from None
    if pixels > _PIXELS:
        raise ValueError(f"the picture has {opened.width} × {opened.height} pixels; expected at most {_PIXELS}")
    made = (form or Form()).eight(found)
    return made if mode == "RGB" else np.array(Image.fromarray(made).convert(mode))


def read_images(folder: str | Path, size: int = 32) -> OwnData:
    """Pictures sorted into a folder for each class, at one size.

    Photos are turned as their EXIF data say, of files of several pictures the first is taken, transparent ones are laid
    on a ground that all of them stand out from, and more than 8 bits become 8 in one way for the whole folder.
    Hidden files, other endings and pictures that lie deeper are left out; `OwnData.notes` says which.

    Args:
        folder: Holds a folder a class, and in each its pictures.
        size: Height and width that they are brought to.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: Fewer than two classes, or files that are no pictures; names them.
        ModuleNotFoundError: Pillow is not installed.
    """
    installed("PIL", "images", "reading pictures")
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}")
    if not isinstance(size, int) or isinstance(size, bool) or not 8 <= size <= 256:
        raise ValueError(f"size is {size!r}; expected an int from 8 to 256")
    said = Said()
    files, left = find(root, said)
    raws = _raws([path for _, path in files], size)
    form = Form.of(raws)
    pictures = np.stack([form.eight(one) for one in raws])
    names = [str(path.relative_to(root)) for _, path in files]
    say(names, raws, pictures, form, said)
    labels, classes = _classes(np.array([name for name, _ in files]), str(root))
    inputs = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    spread, middle = inputs.std((0, 2, 3), keepdim=True).clamp_min(1), inputs.mean((0, 2, 3), keepdim=True)

    def encode(data: bytes) -> Tensor:
        values = torch.from_numpy(picture(data, size, size, form=form)).permute(2, 0, 1).float()
        return ((values - middle) / spread)[0]

    return OwnData(
        (inputs - middle) / spread,
        labels,
        classes,
        names,
        f"{len(files)} pictures in {len(classes)} folders of {root}" + (f" ({left} files left out)" if left else ""),
        pictures=pictures,
        notes=said.lines(),
        encode=encode,
    )


def _raws(paths: list[Path], size: int) -> list[Raw]:
    """Raises ValueError that names the files that cannot be read."""
    from PIL import Image, UnidentifiedImageError

    raws, wrong, known = [], [], formats()
    for path in paths:
        try:
            # as bytes: of a TIFF file that Pillow maps into memory it loses which side is up
            content = io.BytesIO(path.read_bytes())
            # a damaged comment or an unusual palette is no news; what is lost is an error
            with warnings.catch_warnings(), Image.open(content, formats=known) as opened:
                warnings.simplefilter("ignore")
                raws.append(raw(opened, size, size))
        except UnidentifiedImageError:
            wrong.append((path, "no format that is known" if content.getbuffer().nbytes else "the file is empty"))
        except Exception as error:  # of damaged files Pillow raises whatever its formats happen to
            wrong.append((path, str(error) or type(error).__name__))
    if wrong:
        path, why = wrong[0]
        others = f"; nor are {some((other for other, _ in wrong[1:]), 5)}" if len(wrong) > 1 else ""
        raise ValueError(f"{path} is no picture that can be read: {why}{others}")
    return raws


def _row_encoder(columns: list[Column], others: list[str]) -> Callable[[bytes], Tensor]:
    """Reads a CSV file of one row with the table's header; columns that are not learnt from may be left out."""

    def encode(data: bytes) -> Tensor:
        frame = read_cells(data, "the file", [column.name for column in columns], Said())
        if len(frame) != 1:
            raise ValueError(f"the file has {len(frame)} rows below its header; expected one")
        missing = [column.name for column in columns if column.name not in frame.columns]
        if missing:
            expected = some(map(quoted, others))
            raise ValueError(f"the file has no column {quoted(missing[0])}; expected a header with {expected}")
        parts = [column.one(str(frame[column.name].iloc[0])) for column in columns]
        return torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))[0]

    return encode


def read_table(path: str | Path, label: str) -> OwnData:
    """Rows of a CSV file with a header, separated by commas, semicolons, tabs or bars.

    Numbers are standardised, missing ones take the median; decimal commas, signs between thousands, percent signs and
    currencies are read. Other columns become one column per value, up to 50 values. Labels are words as they are in the
    file: "1" and "01" are two. `OwnData.notes` says which columns were left out, and what was filled or guessed.

    Args:
        path: The file.
        label: Name of the column that holds the labels.

    Returns:
        The rows, called ``row 0`` (the first below the header) and so on.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No table, no such column, missing labels, fewer than two classes, or no columns to learn from.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no file at {source}")
    said = Said()
    frame = read_cells(source.read_bytes(), str(source), [label], said)
    label = _label_column(frame, label, str(source))
    end = len(frame)
    while end and not any(cell.strip() for cell in frame.iloc[end - 1]):
        end -= 1
    if end < len(frame):
        said("rows at the end that have no cell filled, left out", str(len(frame) - end))
        frame = frame.iloc[:end]
    if not len(frame):
        raise ValueError(f"{source} has a header and no rows below it; expected rows with a {quoted(label)}")
    given = frame[label].tolist()
    missing = [i for i, cell in enumerate(given) if not cell.strip()]
    if missing:
        raise ValueError(f"{source}: row {missing[0]} has no {label} ({len(missing)} in all)")
    say_labels(given, said)
    labels, classes = _classes(np.array(given, dtype=object), str(source))
    others = frame.drop(columns=[label])
    comma = frame.attrs["separator"] == ","
    found = [column_of(str(name), others[name].tolist(), comma, said) for name in others.columns]
    made = [one for one in found if one is not None]
    notes = said.lines()
    if not made:
        why = "".join(f"; {note}" for note in notes if note.startswith("columns left out"))
        raise ValueError(
            f"{source} has no column to learn {label!r} from: neither numbers nor up to {WORDS} different values{why}"
        )
    left = len(found) - len(made)
    return OwnData(
        torch.from_numpy(np.concatenate([part for _, part in made], 1).astype(np.float32)),
        labels,
        classes,
        [f"row {i}" for i in range(len(frame))],
        f"{len(frame)} rows of {source}, column {label!r}" + (f" ({left} other columns left out)" if left else ""),
        rows=others,
        notes=notes,
        encode=_row_encoder([column for column, _ in made], [str(name) for name in others.columns]),
    )


def _label_column(frame: Any, label: str, where: str) -> str:
    """The name as the header has it, where spaces around it are no difference."""
    names = [str(name) for name in frame.columns]
    same = [label] if label in names else [name for name in names if name.strip() == label.strip()]
    again = [new for name, new in frame.attrs["renamed"] if name.strip() == label.strip() and new != name]
    if len(same) + len(again) > 1:
        raise ValueError(f"{where} has {len(same) + len(again)} columns {quoted(label)}; expected one")
    if same:
        return same[0]
    close = [name for name in names if name.strip().casefold() == label.strip().casefold()]
    hint = f" (is it {quoted(close[0])}?)" if close else ""
    raise ValueError(f"{where} has no column {label!r}{hint}; there are {some(_short(names))}")


def _short(names: list[str]) -> list[str]:
    return [name if len(name) <= 50 and name.isprintable() else quoted(name) for name in names]


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
    counts = Counter(given.tolist())
    names = sorted(counts)
    if len(names) < 2:
        raise ValueError(f"{where} has one class, {quoted(names[0])}; expected two or more")
    few = [name for name in names if counts[name] < _LEAST]
    if few:
        many = f" ({len(few)} of {len(names)} classes: are they numbers or names?)" if len(few) > 1 else ""
        raise ValueError(
            f"{where}: of class {quoted(few[0])} there is one example; expected at least {_LEAST} of each{many}"
        )
    places = {name: place for place, name in enumerate(names)}
    return torch.tensor([places[name] for name in given.tolist()]), names
