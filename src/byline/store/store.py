"""What is kept: a folder of Zarr v3 arrays and a manifest, or the same in memory.

Layout of a store::

    manifest.json                 what it was made for and what is complete (see `Manifest`)
    arrays/features/<id>/<name>   one row per training example; chunks of whole batches, with crc32c
    arrays/state/<id>/<name>      what features learnt for a member
    arrays/residual/<id>          (N,) Q of each training example
    arrays/output/<id>            (N,) the output of each training example

``<id>`` is a hash of a member's weights and changes; factors that several members share (raw inputs, units before a
mask) are kept by the first and referred to by the others. So the order of an ensemble does not matter, and new
members find the old ones' work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore, MemoryStore

FORMAT = 1
_ROWS = 1024  # examples per chunk, as near as whole batches come


@dataclass
class Manifest:
    """The contents of ``manifest.json``."""

    format: int = FORMAT
    byline: str = ""
    """Version of the package that wrote it."""
    made_for: dict[str, Any] = field(default_factory=dict)
    """Fingerprints of the task and the dataset, and the features."""
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Complete members: ``{id: {"arrays": {name: path}, "digests": {name: sha256}, "member": name}}``."""
    state: dict[str, list[str]] = field(default_factory=dict)
    """Names of the state tensors of a member."""
    vectors: dict[str, str] = field(default_factory=dict)
    """``{"residual/<id>": member name}`` and the like."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What was chosen or measured on the way, such as the damping of a member."""


class Store:
    """One store. ``Store(None)`` lives in memory.

    Args:
        path: the folder, or None.

    Raises:
        ValueError: the manifest is of a newer format, or no JSON.
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self.manifest = Manifest(byline=version("byline"))
        self._memory = MemoryStore()
        if self.path is not None:
            if self.path.exists() and not self.path.is_dir():
                raise ValueError(f"store is {self.path}, a file; expected a folder")
            file = self.path / "manifest.json"
            if file.exists():
                self.manifest = self._read(file)
        self._group: zarr.Group | None = None

    @staticmethod
    def _read(file: Path) -> Manifest:
        try:
            content = json.loads(file.read_text())
            found = int(content["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"store {file.parent} has an unreadable manifest.json: {error}") from error
        if found > FORMAT:
            raise ValueError(f"store {file.parent} has format {found}; this byline reads up to {FORMAT}: upgrade it")
        return Manifest(**{k: v for k, v in content.items() if k in Manifest.__dataclass_fields__})

    @property
    def group(self) -> zarr.Group:
        """The Zarr group that holds the arrays."""
        if self._group is None:
            where = self._memory if self.path is None else LocalStore(self.path / "arrays")
            self._group = zarr.open_group(where, mode="a", zarr_format=3)
        return self._group

    def claim(self, made_for: dict[str, Any]) -> None:
        """Tie the store to a task, a dataset and a configuration; refuse another one's.

        Raises:
            ValueError: it was made for something else; says what differs.
        """
        made_for = json.loads(json.dumps(made_for))
        if not self.manifest.made_for:
            self.manifest.made_for = made_for
            self.flush()
            return
        differing = _differences(self.manifest.made_for, made_for)
        if differing:
            raise ValueError(
                f"store {self.path or 'in memory'} was made for another configuration: {'; '.join(differing)}. "
                "Use another folder, or delete this one"
            )

    def flush(self) -> None:
        """Write the manifest in one atomic step."""
        if self.path is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f"manifest.json.{os.getpid()}.tmp"
        with temporary.open("w") as file:
            json.dump(asdict(self.manifest), file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / "manifest.json")

    @contextmanager
    def writing(self, identity: str, member: str, length: int, chunk: int) -> Iterator[Writer]:
        """Write a member's features; they count only once the context has ended without an error."""
        writer = Writer(self, f"features/{identity}", length, chunk)
        yield writer
        arrays, digests = writer.close()
        self.manifest.features[identity] = {"arrays": arrays, "digests": digests, "member": member}
        self.flush()

    def put_vector(self, kind: str, identity: str, values: Tensor, member: str, flush: bool = True) -> None:
        """Keep one number per training example."""
        self._put(f"{kind}/{identity}", values)
        self.manifest.vectors[f"{kind}/{identity}"] = member
        if flush:
            self.flush()

    def vector(self, kind: str, identity: str) -> Tensor | None:
        """One number per training example, if it is there."""
        name = f"{kind}/{identity}"
        return self._get(name) if name in self.manifest.vectors else None

    def put_state(self, identity: str, state: dict[str, Tensor]) -> None:
        """Keep what features learnt for a member."""
        for name, value in state.items():
            self._put(f"state/{identity}/{_safe(name)}", value)
        self.manifest.state[identity] = sorted(state)
        self.flush()

    def state(self, identity: str) -> dict[str, Tensor] | None:
        """What features learnt for a member, if it is there."""
        names = self.manifest.state.get(identity)
        return None if names is None else {name: self._get(f"state/{identity}/{_safe(name)}") for name in names}

    def features(self, identity: str) -> Stored | None:
        """A member's features, if they are complete."""
        entry = self.manifest.features.get(identity)
        return None if entry is None else Stored(self, entry)

    def nbytes(self) -> int:
        """Bytes kept: of the folder's files, or of the arrays in memory."""
        if self.path is not None:
            return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        return sum(len(buffer) for buffer in self._memory._store_dict.values())

    def _put(self, name: str, value: Tensor) -> None:
        array = _plain(value).numpy()
        shape = array.shape or (1,)
        made = self.group.create_array(
            name,
            shape=shape,
            dtype=array.dtype,
            chunks=tuple(max(1, s) for s in shape),
            overwrite=True,
            compressors=[Crc32cCodec()],
            attributes={"scalar": not array.shape},
        )
        made[:] = array.reshape(shape)

    def _get(self, name: str) -> Tensor:
        array = self.group[name]
        value = torch.from_numpy(np.array(array[:]))  # type: ignore[index]
        return value.reshape(()) if array.attrs.get("scalar") else value

    def _drop(self, name: str) -> None:
        if self.path is not None:
            shutil.rmtree(self.path / "arrays" / name, ignore_errors=True)
        else:
            del self.group[name]


class Writer:
    """Appends batches of rows to the arrays of one member."""

    def __init__(self, store: Store, prefix: str, length: int, chunk: int):
        self.store, self.prefix, self.length, self.chunk = store, prefix, length, chunk
        self._arrays: dict[str, Any] = {}
        self._digests: dict[str, Any] = {}
        # whole chunks are written at once: an array costs about 2 ms per write, however small
        self.chunk *= max(1, _ROWS // chunk)
        self._pending: dict[str, tuple[int, list[np.ndarray]]] = {}

    def append(self, start: int, rows: dict[str, Tensor]) -> None:
        """Write the rows of examples ``start`` onwards; a longer second dimension widens the array with zeros."""
        for name, value in rows.items():
            data = np.ascontiguousarray(_plain(value).numpy())
            if name not in self._arrays:
                self._arrays[name] = self.store.group.create_array(
                    f"{self.prefix}/{_safe(name)}",
                    shape=(self.length, *data.shape[1:]),
                    dtype=data.dtype,
                    chunks=(min(self.chunk, self.length), *(max(1, s) for s in data.shape[1:])),
                    overwrite=True,
                    compressors=[Crc32cCodec()],
                )
                self._digests[name] = hashlib.sha256()
            self._digests[name].update(f"{start}{data.shape}".encode())
            self._digests[name].update(data)
            first, parts = self._pending.setdefault(name, (start, []))
            if parts and (parts[0].shape[1:] != data.shape[1:] or start != first + sum(map(len, parts))):
                self._flush(name)
                first, parts = self._pending.setdefault(name, (start, []))
            parts.append(data)
            if (start + len(data)) % self.chunk == 0:
                self._flush(name)

    def _flush(self, name: str) -> None:
        start, parts = self._pending.pop(name)
        data, array = np.concatenate(parts) if len(parts) > 1 else parts[0], self._arrays[name]
        if any(new > old for new, old in zip(data.shape[1:], array.shape[1:], strict=True)):
            array.resize((self.length, *map(max, zip(data.shape[1:], array.shape[1:], strict=True))))
        array[(slice(start, start + len(data)), *(slice(0, s) for s in data.shape[1:]))] = data

    def close(self) -> tuple[dict[str, str], dict[str, str]]:
        """Where each array is, and its digest; an array that another member has too is kept once."""
        for name in list(self._pending):
            self._flush(name)
        paths: dict[str, str] = {}
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        known = {
            entry["digests"][name]: path
            for entry in self.store.manifest.features.values()
            for name, path in entry["arrays"].items()
        }
        for name, digest in digests.items():
            own = f"{self.prefix}/{_safe(name)}"
            if digest in known and known[digest] != own:
                self.store._drop(own)
                own = known[digest]
            paths[name] = own
        return paths, digests


class Stored:
    """A member's features in a store, read in slices."""

    def __init__(self, store: Store, entry: dict[str, Any]):
        self._arrays: dict[str, Any] = {name: store.group[path] for name, path in entry["arrays"].items()}
        self.digests: dict[str, str] = entry["digests"]

    def __len__(self) -> int:
        return int(next(iter(self._arrays.values())).shape[0])

    @property
    def columns(self) -> int:
        """Numbers per example."""
        return sum(int(np.prod(array.shape[1:])) for array in self._arrays.values())

    def read(self, start: int, stop: int) -> StoredRows:
        """Rows ``start`` to ``stop``, with the digests of what they are slices of."""
        rows = StoredRows({n: torch.from_numpy(np.asarray(a[start:stop])) for n, a in self._arrays.items()})
        rows.keys_of = {name: f"{digest}/{start}/{stop}" for name, digest in self.digests.items()}
        return rows


class StoredRows(dict[str, Tensor]):
    """Rows that know the content they hold: equal ``keys_of`` means equal numbers."""

    keys_of: dict[str, str]


def _plain(value: Tensor) -> Tensor:
    """On the CPU; half precisions, which Zarr does not all know, as float32."""
    value = value.detach().cpu()
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _safe(name: str) -> str:
    """Array names without separators, whatever a parameter is called."""
    return name.replace("/", "|")


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    out: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{path}{key}.")
        elif a != b:
            out.append(f"{path}{key} is {_short(b)} here and {_short(a)} in the store")
    return out


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
