"""What people hand over, in a few words: examples, batches, and what is none of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

# indexing one of these with a number gives a column, or fails
_TABLES = ("pandas", "polars", "pyarrow", "modin", "cudf", "dask")
_SHOWN = 6


def describe(value: Any, depth: int = 3) -> str:
    """A value's structure with dtypes and shapes: ``(float32 (6,), int, str 'a.png')``."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"array of {value.dtype} {value.shape}"
    if isinstance(value, str):
        return f"str {value[:20] + '…' if len(value) > 20 else value!r}"
    if value is None:
        return "None"
    if isinstance(value, Mapping) and depth:
        inside = [f"{key!r}: {describe(item, depth - 1)}" for key, item in list(value.items())[:_SHOWN]]
        return f"{{{', '.join(inside)}{', …' if len(value) > _SHOWN else ''}}}"
    if isinstance(value, tuple | list) and depth:
        inside = [describe(item, depth - 1) for item in value[:_SHOWN]]
        if len(inside) > 2 and len({type(item) for item in value}) == 1 and not isinstance(value[0], Tensor | Mapping):
            return f"{type(value).__name__} of {len(value)} × {type(value[0]).__name__}"
        shown = ", ".join(inside) + (", …" if len(value) > _SHOWN else "")
        return f"[{shown}]" if isinstance(value, list) else f"({shown})"
    return type(value).__name__


def odd_kind(value: Any) -> str | None:
    """What in an example torch's default collate cannot take, and what to do; None where there is nothing."""
    if value is None:
        return "no None in an example (leave it out, or put a number)"
    if isinstance(value, Tensor | str | bytes | int | float | complex | np.number | np.bool_):
        return None
    if isinstance(value, np.ndarray):
        return None if value.dtype.kind in "biufc" else f"numbers where an array has {value.dtype}"
    if isinstance(value, Mapping):
        return next((found for item in value.values() if (found := odd_kind(item))), None)
    if isinstance(value, tuple | list):
        return next((found for item in value if (found := odd_kind(item))), None)
    module, kind = type(value).__module__.split(".")[0], type(value).__name__
    if module == "PIL":
        return "a tensor of the picture (a transform that ends in ToTensor), or collate= that makes one"
    return f"tensors, numbers, and tuples or dicts of them instead of a {kind}, or collate= that makes some of it"


def lists_of_numbers(value: Any) -> bool:
    """Whether an example has plain lists of numbers, which the default collate turns on their side."""
    if isinstance(value, Mapping):
        return any(lists_of_numbers(item) for item in value.values())
    if isinstance(value, list) and value and all(isinstance(item, int | float | list) for item in value):
        return True
    return isinstance(value, tuple | list) and any(lists_of_numbers(item) for item in value)


def not_items(data: Any) -> str | None:
    """What data is, and what was expected, where indexing gives something else than examples; None for the rest."""
    kind = type(data).__name__
    if isinstance(data, str | bytes):
        return f"a {kind}, {data[:40]!r}; expected a map-style dataset of examples"
    if is_table(data):
        return (
            f"a {type(data).__module__.split('.')[0]} {kind}, which is indexed by column; expected a dataset of rows: "
            "TensorDataset(torch.as_tensor(X.to_numpy(), dtype=torch.float32), torch.as_tensor(y.to_numpy())), X the "
            "columns of numbers and y that of labels"
        )
    if isinstance(data, Mapping) and 0 not in data:
        keys = ", ".join(repr(key) for key in list(data)[:5])
        return (
            f"a {kind} with the keys {keys}; expected examples in a row: a TensorDataset of its columns, a list of "
            "dicts, or the one split of it that is meant"
        )
    if isinstance(data, tuple | list) and _are_columns(data):
        form = ", ".join(_shape(part) for part in data)
        return (
            f"a {kind} of {len(data)} columns ({form}), which has all examples in each; expected a dataset of examples:"
            " TensorDataset(torch.as_tensor(X, dtype=torch.float32), torch.as_tensor(y))"
        )
    return None


def is_table(value: Any) -> bool:
    """Whether something is a table or a column of one."""
    return type(value).__module__.split(".")[0] in _TABLES and hasattr(value, "__len__")


def _are_columns(parts: Any) -> bool:
    """Whether a list is X and y rather than examples, which are alike: as many rows, and of different kinds."""
    if not 2 <= len(parts) <= 8:
        return False
    if any(is_table(part) for part in parts):
        return True
    if not all(isinstance(part, list) or (isinstance(part, Tensor | np.ndarray) and part.ndim) for part in parts):
        return False
    if len({len(part) for part in parts}) > 1:
        return False
    if all(isinstance(part, list) for part in parts):
        # a list of [x, y] is a list of examples
        return isinstance(parts, tuple) and len(parts[0]) > 2
    kinds = {(type(part), getattr(part, "ndim", 1), getattr(part, "dtype", None)) for part in parts}
    # two tables of one kind in a tuple are inputs and targets; two rows of tokens are examples
    return len(kinds) > 1 or (isinstance(parts, tuple) and len(parts) == 2 and parts[0].ndim > 1)


def _shape(value: Any) -> str:
    shape = tuple(value.shape) if hasattr(value, "shape") else f"of {len(value)}"
    return f"{type(value).__name__} {shape}"


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    # TorchScript puts where it was before what it was
    return lines[-1 if lines[0].startswith("The following operation failed in the TorchScript") else 0][:300].rstrip(
        "."
    )
