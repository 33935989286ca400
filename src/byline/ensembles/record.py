"""The record beside the checkpoints of a run: which files, after which steps, and one number for each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from byline.store.files import Local


def write(path: Path, files: Sequence[Path], steps: Sequence[int], numbers: Sequence[float], name: str) -> None:
    """Write it in one step: a kill leaves the old one or the new one."""
    content = {"files": [file.name for file in files], "steps": list(steps), name: list(numbers)}
    Local(path.parent).write(path.name, json.dumps(content).encode())


def read(path: Path, name: str, writer: str) -> tuple[list[Path], list[int], list[float]]:
    """Files in the record's folder, steps and numbers, as many of each.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: it is damaged; says how.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; expected what {writer} wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files, steps, numbers = content["files"], content["steps"], content[name]
        whole = len(files) == len(steps) == len(numbers)
        whole = whole and all(isinstance(file, str) and Path(file).name not in ("", "..") for file in files)
        whole = whole and all(type(step) is int and step >= 0 for step in steps)
        whole = whole and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged; expected files, steps and {name} as {writer} wrote them, as many of each")
    # no name leads out of the folder
    return [path.parent / Path(file).name for file in files], steps, [float(n) for n in numbers]
