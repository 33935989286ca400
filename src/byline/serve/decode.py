"""JSON to an item of a dataset, by the form of the training set's own items.

A tuple or list is an array of its parts, a dict an object of its keys, a tensor nested arrays of numbers of its shape,
or ``{"base64": ..., "dtype": ..., "shape": [...]}`` with the bytes in little-endian order. Nothing else is read, so
nothing that a request holds is ever unpickled or executed.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SAMPLE = 16  # items whose shapes are looked at
_DTYPES = {
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool",
}  # fmt: skip


class Template:
    """The form of a dataset's items.

    Args:
        dataset: map-style; a few items are looked at. A dimension that differs among them may have any size up to
            sixteen times the largest seen.

    Raises:
        TypeError: items hold something that JSON cannot give back; pass ``decode=`` then.
    """

    def __init__(self, dataset: Any):
        n = len(dataset)
        places = sorted({round(i * (n - 1) / (_SAMPLE - 1)) for i in range(_SAMPLE)})
        self.root = _node([dataset[i] for i in places], "example")

    def __call__(self, value: Any) -> Any:
        """The item.

        Raises:
            ValueError: says what does not fit, and where.
        """
        return self.root.read(value, "example")

    def schema(self) -> dict[str, Any]:
        """JSON schema of an example."""
        return self.root.schema()

    def describe(self) -> Any:
        """The form in short, for people."""
        return self.root.describe()

    def row(self) -> Callable[[bytes], Any] | None:
        """Reads one row of a CSV file, where items are a vector of numbers, alone or with a part that takes 0."""
        parts = list(self.root.parts.values()) if isinstance(self.root, _Parts) else [self.root]
        vector = parts[0]
        if not isinstance(vector, _Tensor) or len(vector.shape) != 1 or not vector.shape[0] or vector.name == "bool":
            return None
        rest = parts[1:]
        if len(rest) > 1:
            return None
        try:
            # the label that a row does not have, which is filled in below
            for node in rest:
                node.read(0, "")
        except (ValueError, TypeError):
            return None
        length, whole_numbers = vector.shape[0], "int" in vector.name

        def read(data: bytes) -> Any:
            values = _numbers(data, length, whole_numbers)
            if not isinstance(self.root, _Parts):
                return self(values)
            # the label of what is brought is what the model makes of it, or what is chosen on the page
            whole = [values, 0][: len(parts)]
            return self(dict(zip(self.root.parts, whole, strict=True)) if self.root.made is dict else whole)

        return read


def _numbers(data: bytes, length: int, whole: bool) -> list[float] | list[int]:
    """The numbers of the last line of a CSV file of one row, with or without a header."""
    try:
        read = csv.reader(io.StringIO(data.decode("utf-8-sig")))
        lines = [line for line in read if any(part.strip() for part in line)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"the file is no CSV that can be read: {error}") from None
    if not 1 <= len(lines) <= 2:
        raise ValueError(f"the file has {len(lines)} lines; expected one row of {length} numbers")
    if len(lines[-1]) != length:
        raise ValueError(f"the row has {len(lines[-1])} values; expected {length} numbers")
    try:
        return [int(part) for part in lines[-1]] if whole else [float(part) for part in lines[-1]]
    except ValueError:
        kind = "whole numbers" if whole else "numbers"
        raise ValueError(f"the row holds something else than {kind}; expected {length} of them") from None


class _Node:
    def read(self, value: Any, path: str) -> Any:
        raise NotImplementedError

    def schema(self) -> dict[str, Any]:
        raise NotImplementedError

    def describe(self) -> Any:
        raise NotImplementedError


class _Parts(_Node):
    """A tuple, a list, or a dict."""

    def __init__(self, parts: dict[Any, _Node], made: type):
        self.parts, self.made = parts, made

    def read(self, value: Any, path: str) -> Any:
        if self.made is dict:
            if not isinstance(value, dict) or set(value) != set(self.parts):
                raise ValueError(f"{path} is {_kind(value)}; expected an object with the keys {list(self.parts)}")
            return {key: node.read(value[key], f"{path}.{key}") for key, node in self.parts.items()}
        if not isinstance(value, list) or len(value) != len(self.parts):
            raise ValueError(f"{path} is {_kind(value)}; expected an array of {len(self.parts)} parts")
        return self.made(node.read(value[i], f"{path}[{i}]") for i, node in self.parts.items())

    def schema(self) -> dict[str, Any]:
        each = [node.schema() for node in self.parts.values()]
        if self.made is dict:
            keys = [str(key) for key in self.parts]
            return {
                "type": "object",
                "properties": dict(zip(keys, each, strict=True)),
                "required": keys,
                "additionalProperties": False,
            }
        return {"type": "array", "prefixItems": each, "minItems": len(each), "maxItems": len(each)}

    def describe(self) -> Any:
        if self.made is dict:
            return {str(key): node.describe() for key, node in self.parts.items()}
        return [node.describe() for node in self.parts.values()]


class _Tensor(_Node):
    """A tensor or a NumPy array; a dimension of None varies, up to ``limits``."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int | None, ...], limits: tuple[int, ...], array: bool):
        self.dtype, self.shape, self.limits, self.array = dtype, shape, limits, array
        self.name = str(dtype).removeprefix("torch.")

    def read(self, value: Any, path: str) -> Any:
        array = self._binary(value, path) if isinstance(value, dict) else self._nested(value, path)
        if len(array.shape) != len(self.shape) or any(
            (got != want) if want is not None else not 0 < got <= most
            for got, want, most in zip(array.shape, self.shape, self.limits, strict=True)
        ):
            raise ValueError(f"{path} has shape {list(array.shape)}; expected {self._shape()}")
        return torch.from_numpy(self._cast(array, path)).to(self.dtype) if not self.array else self._cast(array, path)

    def _nested(self, value: Any, path: str) -> np.ndarray:
        if isinstance(value, str) or value is None:
            raise ValueError(f"{path} is {_kind(value)}; expected numbers of shape {self._shape()}")
        try:
            array = np.asarray(value)
        except (ValueError, OverflowError):
            raise ValueError(f"{path} is no regular array of numbers; expected shape {self._shape()}") from None
        if array.dtype.kind not in "iufb" and array.size:
            raise ValueError(f"{path} holds something else than numbers; expected {self.name}")
        return array

    def _binary(self, value: dict[str, Any], path: str) -> np.ndarray:
        dtype, shape, text = value.get("dtype"), value.get("shape"), value.get("base64")
        if (
            set(value) != {"base64", "dtype", "shape"}
            or not isinstance(text, str)
            or not isinstance(dtype, str)
            or dtype not in _DTYPES
            or not isinstance(shape, list)
            or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in shape)
        ):
            raise ValueError(f"{path} is an object; expected base64, dtype (such as 'float32') and shape")
        try:
            raw = base64.b64decode(text.encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError, ValueError):
            raise ValueError(f"{path}.base64 is no base64") from None
        kind = np.dtype(dtype).newbyteorder("<")
        if len(raw) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"{path}.base64 holds {len(raw)} bytes; expected those of {dtype} of shape {shape}")
        if dtype == "bool":
            return np.frombuffer(raw, np.uint8).reshape(shape) != 0
        return np.frombuffer(raw, kind).reshape(shape).astype(kind.newbyteorder("="))

    def _cast(self, array: np.ndarray, path: str) -> np.ndarray:
        wanted = np.dtype("float32" if self.name == "bfloat16" else self.name)
        if wanted.kind == "f":
            with np.errstate(over="ignore"):
                out = array.astype(wanted)
            if array.dtype.kind == "b" or not np.isfinite(out).all():
                raise ValueError(f"{path} has a value that is no finite {self.name}")
            return out
        if wanted.kind == "b":
            if array.dtype.kind != "b":
                raise ValueError(f"{path} has numbers; expected true or false")
            return array
        if array.dtype.kind not in "iu" and array.size:
            raise ValueError(f"{path} has something else than whole numbers; expected {self.name}")
        range_ = np.iinfo(wanted)
        if array.size and (int(array.min()) < range_.min or int(array.max()) > range_.max):
            raise ValueError(f"{path} has a number that is outside {self.name}")
        return array.astype(wanted)

    def _shape(self) -> str:
        return "[" + ", ".join("any" if n is None else str(n) for n in self.shape) + "]"

    def schema(self) -> dict[str, Any]:
        kind = {"f": "number", "b": "boolean"}.get(np.dtype("float32" if self.name == "bfloat16" else self.name).kind)
        inner: dict[str, Any] = {"type": kind or "integer"}
        for size, most in zip(reversed(self.shape), reversed(self.limits), strict=True):
            least = size if size is not None else 1
            inner = {"type": "array", "items": inner, "minItems": least, "maxItems": most if size is None else size}
        return {"anyOf": [inner, {"$ref": "#/components/schemas/Binary"}]}

    def describe(self) -> Any:
        return {"dtype": self.name, "shape": list(self.shape)}


class _Scalar(_Node):
    """A Python number, bool or text."""

    def __init__(self, kind: Any):
        self.kind = kind

    def read(self, value: Any, path: str) -> Any:
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
            value = float(value)
        if type(value) is not self.kind:
            raise ValueError(f"{path} is {_kind(value)}; expected {self._name()}")
        if (self.kind is float and not math.isfinite(value)) or (self.kind is int and not -(2**63) <= value < 2**63):
            raise ValueError(f"{path} is out of range")
        return value

    def _name(self) -> str:
        return {int: "integer", float: "number", bool: "boolean", str: "string"}[self.kind]

    def schema(self) -> dict[str, Any]:
        return {"type": self._name()}

    def describe(self) -> Any:
        return self._name()


BINARY = {
    "type": "object",
    "title": "Binary",
    "properties": {
        "base64": {"type": "string", "description": "the bytes of the array in C order, little-endian"},
        "dtype": {"type": "string", "enum": sorted(_DTYPES)},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    },
    "required": ["base64", "dtype", "shape"],
    "additionalProperties": False,
}
"""JSON schema of a tensor as bytes."""


def _node(values: list[Any], path: str) -> _Node:
    first = values[0]
    if isinstance(first, Mapping):
        return _Parts({key: _node([v[key] for v in values], f"{path}.{key}") for key in first}, dict)
    if isinstance(first, tuple | list) and not hasattr(first, "_fields"):
        parts = {i: _node([v[i] for v in values], f"{path}[{i}]") for i in range(len(first))}
        return _Parts(parts, type(first))
    if isinstance(first, Tensor | np.ndarray | np.generic):
        array = not isinstance(first, Tensor)
        sizes = list(zip(*(tuple(v.shape) for v in values), strict=True))
        shape = tuple(s[0] if len(set(s)) == 1 else None for s in sizes)
        dtype: Any = torch.from_numpy(np.zeros(0, first.dtype)).dtype if array else first.dtype
        return _Tensor(dtype, shape, tuple(16 * max(s) for s in sizes), array)
    for kind in (bool, int, float, str):
        if type(first) is kind:
            return _Scalar(kind)
    raise TypeError(
        f"the training set's {path} is a {type(first).__name__}, which no JSON stands for; expected decode= in Served"
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    if isinstance(value, list):
        return f"an array of {len(value)}"
    return names.get(type(value), "a number")
