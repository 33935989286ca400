"""What ``byline serve RUN`` serves where no ``--task`` is named: the run of a setting, or a user's own files."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from byline.ensembles import Trajectory
from byline.features import Exact, Factorized
from byline.methods import TRAK
from byline.report.scores import Shown
from byline.serve.contract import Served
from byline.settings import get, names
from byline.settings.base import Setting
from byline.settings.bench import form
from byline.settings.workshop import Workshop
from byline.uses import own

_log = logging.getLogger("byline.serve")

COLUMNS = 2048
CHECKPOINTS = (10, 5, 3)
"""Of a short run, the first of these that a run's folder holds."""
STORE = "explorer"


def of_run(folder: str | os.PathLike[str]) -> Served:
    """The run of a named benchmark: its data, and TRAK on the checkpoints of the short run that it made.

    Args:
        folder: what ``byline bench`` or ``byline demo`` wrote.

    Raises:
        ValueError: the folder is no run of a setting.
    """
    setting = setting_of(Path(folder))
    shop = Workshop(setting, folder, _log.info, False)
    each = next((number for number in CHECKPOINTS if shop.has_run(number)), CHECKPOINTS[0])
    weights = shop.runs(1, each)[0].weights
    features = Factorized(COLUMNS) if setting.features is Exact else setting.features()
    attributor = TRAK(
        setting.task(), Trajectory([list(weights)]), features=features, batch_size=setting.batch_size, progress=False
    )
    model = setting.build().eval()
    model.load_state_dict(weights[-1])
    train, test = shown(setting, None), shown(setting, model)
    return Served(
        attributor,
        setting.train_set,
        title=setting.name,
        test_set=setting.test_set,
        train=train,
        test=test,
        classes=setting.class_names,
        metadata=None if setting.owners is None else setting.owners()[0],
        **_upload(setting),
    )


def setting_of(folder: Path) -> Setting:
    """The setting that a run's folder belongs to, on the data and at the width of its command.

    Raises:
        ValueError: there are no results of a setting in it.
    """
    for file in ("results.json", "grid.json"):
        path = folder / file
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            name, command = str(found["setting"]["name"]), shlex.split(str(found.get("command", "")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no result of a setting: {error}") from None
        if name not in names():
            raise ValueError(f"{path} is of the setting {name!r}; there are {', '.join(names())}")
        options = dict(pairwise(command))
        width = options.get("--width", "")
        data = Path(options["--data"]) if "--data" in options else None
        setting = get(name).variant(data, int(width) if width.isdigit() else None)
        return form(setting, bool(found.get("quick")), None)[0]
    raise ValueError(
        f"{folder} holds neither results.json nor grid.json, so it is no run of a setting; name what is served with "
        "--task module:object, or your own files with --data"
    )


def of_files(data: str | os.PathLike[str], label: str | None, folder: str | os.PathLike[str]) -> Served:
    """A folder of pictures sorted by class, or a CSV file: a small model is trained on four fifths, the rest explained.

    Args:
        data: the folder, or the file.
        label: the column of labels of a CSV file.
        folder: where the model is kept.

    Raises:
        ValueError: what `byline.uses.read_images` and `read_table` refuse.
    """
    found = own.read(Path(data), label)
    assert found.encode is not None, "what is read from files can be brought as a file"
    encode = found.encode
    for note in found.notes:
        _log.info("of the files: %s", note)
    order = np.random.default_rng(0).permutation(len(found.labels))
    held = max(1, len(order) // 5)
    test, train = np.sort(order[:held]), np.sort(order[held:])
    whole = found.dataset()
    train_set, test_set = Subset(whole, train.tolist()), Subset(whole, test.tolist())
    task, members = own.train_small(found, train_set, kept=Path(folder) / "model.safetensors")
    attributor = TRAK(task, members, features=Factorized(COLUMNS), progress=False)
    said = _predicted(task.model, test_set)
    return Served(
        attributor,
        train_set,
        title=found.what,
        test_set=test_set,
        train=_shown_of_files(found, train),
        test=_shown_of_files(found, test, [found.class_names[label] for label in said]),
        classes=found.class_names,
        upload=lambda data: (encode(data), torch.tensor(0)),
        takes="image" if found.pictures is not None else "row",
    )


def _shown_of_files(found: own.OwnData, places: np.ndarray, predicted: Sequence[str] | None = None) -> Shown:
    return Shown(
        pictures=None if found.pictures is None else found.pictures[places],
        rows=None if found.rows is None else found.rows.iloc[places],
        labels=[found.class_names[label] for label in found.labels[places].tolist()],
        names=[found.names[place] for place in places],
        predicted=predicted,
    )


@dataclass(frozen=True)
class Pictures:
    """A dataset's inputs as uint8 pictures, each made when it is asked for."""

    dataset: Any
    shape: tuple[int, ...]
    black: float
    white: float

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray:
        values = np.asarray(self.dataset[index][0], np.float64).reshape(self.shape)
        return np.round(255 * np.clip((values - self.black) / (self.white - self.black), 0, 1)).astype(np.uint8)


def shown(setting: Setting, model: torch.nn.Module | None) -> Shown:
    """How the training examples of a setting are shown, or with a model its test examples."""
    dataset = setting.train_set if model is None else setting.test_set
    if setting.image_shape is not None:
        labels = [int(dataset[i][1]) for i in range(len(dataset))]
        said = None if model is None else [_name(setting, one) for one in _predicted(model, dataset)]
        return Shown(
            pictures=Pictures(dataset, setting.image_shape, *setting.pixel_range),
            labels=[_name(setting, label) for label in labels],
            predicted=said,
        )
    if setting.owners is None:
        return Shown(names=[f"no. {i}" for i in range(len(dataset))])
    known = setting.owners()[0 if model is None else 1]
    first = next((key for key in ("title", "function", "name") if key in known[0]), None)
    whose = next((key for key in ("collection", "module", "owner") if key in known[0]), None)
    texts = None if setting.texts is None else setting.texts()[0 if model is None else 1]
    return Shown(
        texts=texts,
        rows=None if texts is not None else known,
        names=None if first is None else [str(one[first]) for one in known],
        owners=None if whose is None else [str(one[whose]) for one in known],
    )


def _name(setting: Setting, label: int) -> str:
    return setting.class_names[label] if label < len(setting.class_names) else str(label)


def _predicted(model: torch.nn.Module, dataset: Any) -> list[int]:
    inputs = torch.stack([dataset[i][0] for i in range(len(dataset))])
    with torch.no_grad():
        return [int(label) for part in inputs.split(256) for label in model(part).argmax(1)]


def _upload(setting: Setting) -> dict[str, Any]:
    if setting.read_text is not None:
        read = setting.read_text
        return {"upload": lambda data: read(_utf8(data)), "takes": "text"}
    if setting.image_shape is None:
        return {}
    black, white = setting.pixel_range
    shape, form_of = setting.image_shape, setting.train_set[0][0]
    colour = len(shape) == 3

    def upload(data: bytes) -> Any:
        pixels = own.picture(data, shape[-2], shape[-1], "RGB" if colour else "L").astype(np.float32) / 255
        values = torch.from_numpy(pixels.transpose(2, 0, 1) if colour else pixels) * (white - black) + black
        return values.reshape(form_of.shape).to(form_of.dtype), torch.tensor(0)

    return {"upload": upload, "takes": "image"}


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is no text in UTF-8: {error.reason} at byte {error.start}") from None
