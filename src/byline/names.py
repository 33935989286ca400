"""Objects that a user names on the command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def named(spec: str, option: str) -> Any:
    """The object that ``module:object`` names, looked for in the working directory too.

    Args:
        spec: What the user gave.
        option: What it is called in messages.

    Raises:
        ValueError: There is no such module or object.
    """
    name, _, attribute = spec.partition(":")
    if not name or not attribute:
        raise ValueError(f"{option} is {spec!r}; expected module:object, such as my_project.models:served")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{option} is {spec!r}, and importing {name} fails: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{option} is {spec!r}, and {name} has no {attribute}")
        found = getattr(found, part)
    return found
