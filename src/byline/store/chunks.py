"""Arrays as Zarr v3 keeps them, one chunk per file, read and written without Zarr's machinery.

A chunk is its numbers in little-endian C order and their crc32c: what Zarr's codecs ``bytes`` and ``crc32c`` give. Zarr
spends about 2 ms on an array access, which is more than most chunks take; any Zarr reader opens the result.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from byline.store.files import Files

ROOT = "arrays"
CHECKSUM = 4  # bytes


class DamagedError(ValueError):
    """A file of a store is missing, has another size, or does not give its checksum."""


@dataclass(frozen=True)
class Spec:
    """Where an array is, and its form."""

    path: str
    """Below ``arrays/``."""
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    """The shape of a chunk; the last ones of a dimension are filled up with zeros."""
    dtype: str
    """NumPy's name of it."""

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"path": self.path, "shape": list(self.shape), "chunks": list(self.chunks), "dtype": self.dtype}

    @classmethod
    def of(cls, content: dict[str, Any]) -> Spec:
        """From the manifest."""
        return cls(content["path"], tuple(content["shape"]), tuple(content["chunks"]), content["dtype"])

    @property
    def columns(self) -> int:
        """Numbers per example."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Of all chunks, checksums included."""
        return self.count() * (int(np.prod(self.chunks)) * np.dtype(self.dtype).itemsize + CHECKSUM)

    def grid(self) -> list[int]:
        """Chunks along each dimension."""
        return [-(-length // chunk) for length, chunk in zip(self.shape, self.chunks, strict=True)]

    def count(self) -> int:
        """How many chunks there are."""
        return int(np.prod(self.grid(), dtype=np.int64))

    def cells(self, first: int) -> list[tuple[int, ...]]:
        """The chunks of the ``first``-th batch of examples: more than one where later dimensions are cut too."""
        return [(first, *rest) for rest in itertools.product(*map(range, self.grid()[1:]))]

    def key(self, cell: tuple[int, ...]) -> str:
        """The file of a chunk."""
        return f"{ROOT}/{self.path}/c.{'.'.join(map(str, cell))}"

    def metadata(self, attributes: dict[str, Any] | None = None) -> bytes:
        """``zarr.json``."""
        content = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": False if self.dtype == "bool" else 0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "attributes": attributes or {},
            "storage_transformers": [],
        }
        return json.dumps(content, indent=1, sort_keys=True).encode()


GROUP = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}, indent=1, sort_keys=True).encode()
"""``zarr.json`` of a group."""


def checksum(data: np.ndarray) -> bytes:
    """The crc32c of an array's bytes."""
    return int(google_crc32c.value(data.reshape(-1).view(np.uint8))).to_bytes(CHECKSUM, "little")


def text_checksum(data: bytes) -> str:
    """The crc32c of a text, in hexadecimal."""
    return f"{google_crc32c.value(data):08x}"


def fill(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array, contiguous, with zeros up to a shape."""
    if data.shape == shape:
        return np.ascontiguousarray(data)
    out = np.zeros(shape, data.dtype)
    out[tuple(map(slice, data.shape))] = data
    return out


def read_cell(files: Files, spec: Spec, cell: tuple[int, ...], out: np.ndarray) -> None:
    """Read a chunk into a contiguous array of its shape.

    Raises:
        DamagedError: the chunk is missing, too short or too long, or fails its checksum.
    """
    key = spec.key(cell)
    try:
        tail = files.read_into(key, out, CHECKSUM)
    except FileNotFoundError:
        raise DamagedError("is missing") from None
    if tail is None:
        raise DamagedError("is truncated, or not of its size")
    if tail != checksum(out):
        raise DamagedError("fails its checksum (crc32c)")


def read_rows(files: Files, spec: Spec, start: int, stop: int) -> np.ndarray:
    """Rows ``start`` to ``stop`` of an array.

    Raises:
        DamagedError: says which chunk of which array is damaged, and which examples it holds.
    """
    out = np.empty((stop - start, *spec.shape[1:]), np.dtype(spec.dtype))
    step = spec.chunks[0]
    for first in range(start // step, -(-stop // step)):
        low, high = first * step, min((first + 1) * step, spec.shape[0])
        for cell in spec.cells(first):
            whole = spec.chunks[1:] == spec.shape[1:] and start <= low and high <= stop and high - low == step
            # whole chunks go straight to their place
            part = out[low - start : high - start] if whole else np.empty(spec.chunks, out.dtype)
            try:
                read_cell(files, spec, cell, part)
            except DamagedError as error:
                raise DamagedError(
                    f"store {files.where}: chunk {cell_name(cell)} of {spec.path} (examples {low} to {high - 1}) "
                    f"{error}; run `byline store repair {files.where}`, then fit again"
                ) from None
            if whole:
                continue
            a, b = max(low, start), min(high, stop)
            places = [slice(c * n, min((c + 1) * n, s)) for c, n, s in zip(cell, spec.chunks, spec.shape, strict=True)]
            inside = tuple(slice(0, p.stop - p.start) for p in places[1:])
            out[(slice(a - start, b - start), *places[1:])] = part[(slice(a - low, b - low), *inside)]
    return out


def cell_name(cell: tuple[int, ...]) -> str:
    """As in the file's name."""
    return ".".join(map(str, cell))
