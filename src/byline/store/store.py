"""What is kept: Zarr v3 arrays and a manifest, in a folder, in memory or behind any fsspec URL.

Layout of a store::

    manifest.json                     what it was made for and what is complete (see `Manifest`)
    progress/<key>.json               what a member that is not complete yet consists of
    arrays/features/<key>/<name>      one row per training example, one chunk per batch, each with its crc32c
    arrays/state/<key>/<name>         what features learnt for a member
    arrays/residual/<id>              (N,) Q of each training example, a chunk per batch
    arrays/output/<id>                (N,) the output of each; arrays/loss/<id> where the loss is differentiated
    lock                              who is writing

``<id>`` is a hash of a member's weights and changes, ``<key>`` says whose gradient it is too. Factors that several
members share (raw inputs, units before a mask) are kept by the first and referred to by the others. So the order of an
ensemble does not matter, and new members find the old ones' work.

The chunk of ``output/<id>`` (or ``loss/<id>``) is the last that is written of a batch: where it is, the batch is done.
Several processes may therefore write different chunks of one store at once, each through a `Store` opened with
``worker=True``; the manifest is written by one, which has the lock.
"""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from byline.store import manifest as manifests
from byline.store.background import Background
from byline.store.chunks import (
    GROUP,
    ROOT,
    DamagedError,
    Spec,
    checksum,
    fill,
    read_rows,
)
from byline.store.files import Files, Local, Memory, open_files
from byline.store.lock import Lock
from byline.store.manifest import Manifest, seal, unseal
from byline.store.quantize import plain
from byline.store.stored import Stored

log = logging.getLogger("byline")


class Store:
    """One store. ``Store(None)`` lives in memory.

    Args:
        place: a folder, any URL that fsspec knows, or None.
        worker: write chunks for a writer that has the lock already, and never the manifest.

    Raises:
        ValueError: the manifest is of another format or damaged, or there is no fsspec implementation of the URL.
    """

    def __init__(self, place: str | Path | None, worker: bool = False):
        self.files: Files = open_files(place)
        self.path: Path | None = self.files.root if isinstance(self.files, Local) else None
        """The folder, where it is one."""
        self.place: str | None = None if isinstance(self.files, Memory) else self.files.where
        """What opens the same store in another process; None in memory."""
        self.worker = worker
        self.manifest = manifests.load(self.files) or Manifest()
        self._lock = Lock(self.files)
        self._depth = 0
        self._background = Background()
        self._fresh: dict[str, dict[str, Tensor]] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._groups: set[str] = set()
        self._seen: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def __getstate__(self) -> dict[str, Any]:
        self.drain()
        if isinstance(self.files, Memory):
            return {"files": self.files, "manifest": self.manifest.copy()}
        # the same folder, wherever the copy is opened
        return {"place": self.place if self.path is None else os.path.abspath(self.path), "worker": self.worker}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.get("place"), state.get("worker", False))  # type: ignore[misc]
        if "files" in state:
            self.files, self.manifest = state["files"], state["manifest"]
            self._lock = Lock(self.files)

    # what it is for, and who writes

    def claim(self, made_for: dict[str, Any]) -> None:
        """Tie the store to a task, a dataset and a configuration; refuse another one's.

        Raises:
            ValueError: it was made for something else; says what differs.
        """
        made_for = json.loads(json.dumps(made_for))
        if not self.manifest.made_for:
            with self.writing():
                # another writer may have been first
                if not self.manifest.made_for:
                    claimed = self.manifest.copy()
                    claimed.made_for = made_for
                    self._replace(claimed, sync=False)
        if "fingerprints" in made_for and "fingerprints" not in self.manifest.made_for:
            raise ValueError(
                f"store {self.files.where} was made by an earlier byline, which did not notice every change of a "
                "model, a function or a collate; use another folder, or delete this one and fit again"
            )
        differing = _differences(self.manifest.made_for, made_for)
        if differing:
            raise ValueError(
                f"store {self.files.where} was made for another configuration: {'; '.join(differing)}. "
                "Use another folder, or delete this one"
            )

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep the lock, once something has been written, until the context ends."""
        outer = self._depth
        # twice, because an interrupt may come while the first is at it; the second finds what that left
        with self._ending(outer), self._ending(outer):
            self._depth = outer + 1
            yield

    @contextmanager
    def _ending(self, outer: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # the first problem is the one to tell
            with suppress(Exception):
                self._background.drain()
            # what was to be written may not have been: only what is there counts
            self._forget()
            raise
        finally:
            self._depth = outer
            if outer == 0:
                try:
                    self.drain()
                finally:
                    try:
                        self._background.close()
                    finally:
                        self._lock.release()

    def _forget(self) -> None:
        """Keep nothing in memory of what is in files."""
        for known in (self._records, self._fresh, self._groups, self._seen):
            known.clear()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Have the right to write, for as long as the context or the session around it lasts.

        Raises:
            BlockingIOError: another process has it.
            OSError: the place is full or read-only; in one sentence.
        """
        with self.session(), self._said():
            if not (self.worker or self._lock.held or isinstance(self.files, Memory)):
                self._lock.acquire()
                found = manifests.load(self.files)
                if found is not None:
                    differing = _differences(self.manifest.made_for, found.made_for) if self.manifest.made_for else []
                    if differing:
                        raise ValueError(
                            f"store {self.files.where} was made for another configuration meanwhile: "
                            f"{'; '.join(differing)}. Use another folder"
                        )
                    self.manifest = found
                    self._records.clear()
            yield

    def flush(self, sync: bool = True) -> None:
        """Write the manifest in one atomic step; ``sync`` waits for the disk, where there is one."""
        with self.writing():
            self._replace(self.manifest, sync)

    def _replace(self, manifest: Manifest, sync: bool = True) -> None:
        """Another manifest instead of the one there is, once it is written."""
        assert not self.worker, "only the writer with the lock writes the manifest"
        if not isinstance(self.files, Memory):
            manifests.dump(self.files, manifest, sync)
        self.manifest = manifest

    def drain(self) -> None:
        """Wait until all that was given to be written is written.

        Raises:
            OSError: the place is full or read-only; in one sentence.
        """
        with self._said():
            self._background.drain()

    def _later(self, work: Callable[..., None], *arguments: Any) -> None:
        """Write while something else is computed; in memory there is nothing to wait for."""
        if isinstance(self.files, Memory):
            work(*arguments)
        else:
            self._background.do(work, *arguments)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What the disk says, in one sentence."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                sentence = (
                    f"store {self.files.where}: no space left on the device; what is complete is kept, and the next "
                    "fit goes on from there when there is room"
                )
            elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                sentence = (
                    f"store {self.files.where} cannot be written ({error.strerror}), and does not hold all that is "
                    "asked for; expected a complete store, or a place that can be written"
                )
            else:
                raise
            said = type(error)(sentence)
            said.errno = error.errno
            raise said from error

    # members, chunk by chunk

    def record(self, key: str) -> dict[str, Any] | None:
        """What a member consists of, complete or not; None where nothing has begun."""
        entry = self.manifest.features.get(key)
        if entry is not None:
            return entry
        if key not in self._records:
            try:
                self._records[key] = unseal(self.files.read(_progress(key)))
            except FileNotFoundError:
                return None
            except DamagedError as error:
                log.warning("store %s: %s %s; the member is computed again", self.files.where, _progress(key), error)
                return None
        return self._records[key]

    def complete(self, key: str) -> bool:
        """Whether all of a member is there."""
        entry = self.manifest.features.get(key)
        return entry is not None and entry["complete"]

    def chunk(self, key: str) -> int | None:
        """Examples per chunk of a member that has begun."""
        entry = self.record(key)
        return None if entry is None else entry["chunk"]

    def begin(
        self,
        key: str,
        about: dict[str, Any],
        chunk: int,
        state: dict[str, Tensor],
        example: dict[str, np.ndarray],
    ) -> None:
        """Declare a member, before its first chunk.

        Args:
            key: of the member.
            about: ``member``, ``identity``, ``of``, ``examples`` and whatever else says what it is.
            chunk: examples per chunk.
            state: what the features learnt for it.
            example: some rows as they are kept, which show the form of its arrays.
        """
        length, identity, of = about["examples"], about["identity"], about["of"]
        rows = min(chunk, length)

        def spec(path: str, dtype: str, *form: int) -> dict[str, Any]:
            made = Spec(path, (length, *form), (rows, *(max(1, s) for s in form)), dtype)
            self._later(self._declare, made)
            return made.to_json()

        stale = [f"features/{key}", f"state/{key}", f"{of}/{identity}", f"residual/{identity}"]
        with self.writing():
            self._later(self._clear, [_progress(key), *(f"{ROOT}/{path}" for path in stale if not self._whole(path))])
            entry = {
                **about,
                "chunk": rows,
                "arrays": {
                    name: spec(f"features/{key}/{_safe(name)}", value.dtype.name, *value.shape[1:])
                    for name, value in example.items()
                },
                "vectors": {kind: spec(f"{kind}/{identity}", "float32") for kind in (of, "residual")},
                "state": self._put_tensors(key, state),
                "complete": False,
            }
            self._later(self.files.write, _progress(key), seal(entry))
        self._records[key] = entry
        # contiguous as when read back: strides change the last bits of products
        self._fresh[key] = {name: plain(value).contiguous() for name, value in state.items()}

    def missing(self, key: str) -> list[int] | None:
        """Which chunks a member lacks; None where nothing has begun."""
        self.drain()
        entry = self.record(key)
        if entry is None:
            return None
        if entry["complete"]:
            return []
        return self._lacking(Spec.of(entry["vectors"][entry["of"]]))

    def write(self, key: str, index: int, rows: dict[str, np.ndarray], value: Tensor, residual: Tensor) -> None:
        """Write a batch of a member: its rows, then its residuals, then its outputs, which say that it is done."""
        with self._said():
            self._later(self._write, key, index, rows, value, residual)

    def _write(self, key: str, index: int, rows: dict[str, np.ndarray], value: Tensor, residual: Tensor) -> None:
        entry = self.record(key)
        assert entry is not None, "a member is declared before it is written"
        for name, data in rows.items():
            self._put_chunk(Spec.of(entry["arrays"][name]), index, data, name)
        vectors = entry["vectors"]
        if not self._whole(vectors["residual"]["path"]):
            self._put_chunk(Spec.of(vectors["residual"]), index, plain(residual).float().numpy())
        self._put_chunk(Spec.of(vectors[entry["of"]]), index, plain(value).float().numpy())

    def finish(self, keys: Sequence[str], vectors: Sequence[tuple[str, str]] = ()) -> None:
        """Count members and vectors as complete, whose chunks are all there.

        Factors that an earlier member has too are dropped, and referred to.

        Raises:
            DamagedError: a chunk is not there.
        """
        with self.writing():
            self._background.drain()
            known, dropped, made = self._known(), [], self.manifest.copy()
            taken = {
                (content["path"], key) for key, entry in made.features.items() for content in entry["arrays"].values()
            }
            for key in keys:
                entry = copy.deepcopy(self.record(key))
                assert entry is not None
                for name, content in entry["arrays"].items():
                    spec = self._closed(Spec.of(content))
                    if not any(path == spec.path and other != key for path, other in taken):
                        own, spec = spec, self._shared(name, spec, known)
                        dropped += [own.path] if own.path != spec.path else []
                    entry["arrays"][name] = spec.to_json()
                for content in entry["vectors"].values():
                    self._finish_vector(made, {**content, "member": entry["member"]})
                made.state[key] = entry.pop("state", None) or made.state.get(key, {})
                made.features[key] = {**entry, "complete": True}
            for kind, identity in vectors:
                self._finish_vector(made, self._vector(kind, identity) or {})
            self._replace(made)
            # only now that nothing refers to them: a kill before would have left members without their factors
            self._clear([f"{ROOT}/{path}" for path in dropped])
            for name in [*keys, *("-".join(names) for names in vectors)]:
                self._records.pop(name, None)
                self._fresh.pop(name, None)
                self.files.delete(_progress(name))

    def _finish_vector(self, made: Manifest, content: dict[str, Any]) -> None:
        if content["path"] not in made.vectors or not made.vectors[content["path"]]["complete"]:
            self._closed(Spec.of(content))
            made.vectors[content["path"]] = {**content, "complete": True}

    def _whole(self, path: str) -> bool:
        entry = self.manifest.vectors.get(path)
        return entry is not None and entry["complete"]

    def features(self, key: str) -> Stored | None:
        """A member's features, if they are complete."""
        entry = self.manifest.features.get(key)
        return Stored(self.files, entry) if entry is not None and entry["complete"] else None

    # vectors

    def begin_vector(self, kind: str, identity: str, member: str, length: int, chunk: int) -> None:
        """Declare one number per training example."""
        spec, key = Spec(f"{kind}/{identity}", (length,), (min(chunk, length),), "float32"), f"{kind}-{identity}"
        with self.writing():
            self._clear([_progress(key), f"{ROOT}/{spec.path}"])
            self._declare(spec)
            content = {**spec.to_json(), "member": member}
            self.files.write(_progress(key), seal(content))
        self._records[key] = content

    def missing_vector(self, kind: str, identity: str) -> list[int] | None:
        """Which chunks a vector lacks; None where nothing has begun."""
        entry = self._vector(kind, identity)
        return None if entry is None else self._lacking(Spec.of(entry))

    def vector_chunk(self, kind: str, identity: str) -> int | None:
        """Examples per chunk of a vector that has begun."""
        entry = self._vector(kind, identity)
        return None if entry is None else entry["chunks"][0]

    def write_vector(self, kind: str, identity: str, index: int, values: Tensor) -> None:
        """Write a batch of a vector."""
        entry = self._vector(kind, identity)
        assert entry is not None, "a vector is declared before it is written"
        with self._said():
            self._later(self._put_chunk, Spec.of(entry), index, plain(values).float().numpy())

    def has_vector(self, kind: str, identity: str) -> bool:
        """Whether all of a vector is there."""
        return self._whole(f"{kind}/{identity}")

    def vector(self, kind: str, identity: str) -> Tensor | None:
        """One number per training example, if it is there."""
        if not self.has_vector(kind, identity):
            return None
        spec = Spec.of(self.manifest.vectors[f"{kind}/{identity}"])
        return torch.from_numpy(read_rows(self.files, spec, 0, spec.shape[0]))

    def present(self, key: str) -> tuple[int, list[int]]:
        """Examples per chunk of a member, complete or not, and the chunks that are there; (0, []) without any."""
        entry = self.record(key)
        if entry is None:
            return 0, []
        lacking = set(self.missing(key) or ())
        count = Spec.of(entry["vectors"][entry["of"]]).grid()[0]
        return entry["chunk"], [index for index in range(count) if index not in lacking]

    def example(self, key: str, index: int) -> tuple[float, float, dict[str, Tensor] | None]:
        """What is kept of one example of a member whose chunk is there: its output, its residual and its rows.

        Returns:
            the two numbers, and the rows, (1, …) each; None where the member is not complete: the longest sequence, and
            with it the form of the rows, is not known yet.

        Raises:
            DamagedError: a chunk is missing or damaged; says which.
        """
        entry = self.record(key)
        assert entry is not None, "only members that have begun have examples"
        value, residual = (
            float(read_rows(self.files, Spec.of(entry["vectors"][kind]), index, index + 1)[0])
            for kind in (entry["of"], "residual")
        )
        stored = self.features(key)
        return value, residual, None if stored is None else stored.read(index, index + 1)

    def number(self, kind: str, identity: str, index: int) -> float:
        """One example's number of a vector that is there."""
        spec = Spec.of(self.manifest.vectors[f"{kind}/{identity}"])
        return float(read_rows(self.files, spec, index, index + 1)[0])

    def _vector(self, kind: str, identity: str) -> dict[str, Any] | None:
        return self.manifest.vectors.get(f"{kind}/{identity}") or self.record(f"{kind}-{identity}")

    # learnt tensors

    def put_state(self, key: str, state: dict[str, Tensor]) -> None:
        """Keep what was learnt for a member."""
        with self.writing():
            specs = self._put_tensors(key, state)
            self._background.drain()
            made = self.manifest.copy()
            made.state[key] = specs
            self._replace(made)

    def state(self, key: str) -> dict[str, Tensor] | None:
        """What was learnt for a member, if it is there."""
        if key in self._fresh:
            return dict(self._fresh[key])
        self.drain()
        specs = self.manifest.state.get(key)
        if specs is None:
            specs = (self.record(key) or {}).get("state")
        return None if specs is None else {name: self._get_tensor(content) for name, content in specs.items()}

    # the whole

    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(size for _, size in self.files.walk())

    def __repr__(self) -> str:
        return f"Store({self.files.where})"

    # pieces

    def _clear(self, keys: list[str]) -> None:
        for key in keys:
            self.files.delete(key)

    def _declare(self, spec: Spec, attributes: dict[str, Any] | None = None) -> None:
        if isinstance(self.files, Memory):
            return
        parts = spec.path.split("/")[:-1]
        for depth in range(len(parts) + 1):
            folder = "/".join([ROOT, *parts[:depth]])
            if folder not in self._groups:
                self.files.write(f"{folder}/zarr.json", GROUP)
                self._groups.add(folder)
        self.files.write(f"{ROOT}/{spec.path}/zarr.json", spec.metadata(attributes))

    def _put_tensors(self, key: str, state: dict[str, Tensor]) -> dict[str, Any]:
        out = {}
        for name, value in state.items():
            # a half precision that was chosen for its size stays
            kept = value.detach().cpu() if value.dtype == torch.float16 else plain(value)
            array = kept.contiguous().numpy()
            form = array.shape or (1,)
            spec = Spec(f"state/{key}/{_safe(name)}", form, tuple(max(1, s) for s in form), array.dtype.name)
            self._later(self._declare, spec, {"scalar": not array.shape})
            if array.size:
                self._later(self._put_chunk, spec, 0, array.reshape(form))
            out[name] = {**spec.to_json(), "scalar": not array.shape}
        return out

    def _get_tensor(self, content: dict[str, Any]) -> Tensor:
        spec = Spec.of(content)
        value = torch.from_numpy(read_rows(self.files, spec, 0, spec.shape[0]))
        return value.reshape(()) if content["scalar"] else value

    def _put_chunk(self, spec: Spec, index: int, data: np.ndarray, share: str | None = None) -> None:
        """Write a batch of an array; one whose later dimensions are longer than a chunk takes several."""
        first = (index, *(0 for _ in spec.chunks[1:]))
        if data.shape[1:] == spec.chunks[1:]:
            self._put_cell(spec, first, fill(data, spec.chunks), share)
            return
        if 0 in data.shape and 0 not in spec.shape:
            # a batch of empty sequences is there too: as zeros, like the end of any shorter one
            self._put_cell(spec, first, np.zeros(spec.chunks, data.dtype), share)
            return
        here = Spec(spec.path, (spec.shape[0], *data.shape[1:]), spec.chunks, spec.dtype)
        for cell in here.cells(index):
            inside = tuple(slice(c * n, (c + 1) * n) for c, n in zip(cell[1:], spec.chunks[1:], strict=True))
            self._put_cell(spec, cell, fill(data[(slice(None), *inside)], spec.chunks), share)

    def _put_cell(self, spec: Spec, cell: tuple[int, ...], data: np.ndarray, share: str | None) -> None:
        key, crc = spec.key(cell), checksum(data)
        if share is not None:
            earlier = self._seen.setdefault((share, cell, crc), key)
            if earlier != key and self._holds(earlier, data, crc) and self.files.link(earlier, key):
                return
        self.files.write(key, data.reshape(-1).view(np.uint8), crc)

    def _holds(self, key: str, data: np.ndarray, crc: bytes) -> bool:
        """Whether a file has these very numbers: equal checksums alone do not prove it."""
        there = np.empty_like(data)
        try:
            return self.files.read_into(key, there, len(crc)) == crc and bytes_equal(there, data)
        except OSError:
            return False

    def _lacking(self, spec: Spec) -> list[int]:
        found = self._cells(spec)
        return [index for index in range(spec.grid()[0]) if (index,) not in found]

    def _cells(self, spec: Spec) -> set[tuple[int, ...]]:
        """The chunks that are there."""
        found = set()
        for name in self.files.children(f"{ROOT}/{spec.path}"):
            start, _, numbers = name.partition(".")
            if start == "c" and all(part.isdigit() for part in numbers.split(".")):
                found.add(tuple(map(int, numbers.split("."))))
        return found

    def _closed(self, spec: Spec) -> Spec:
        """An array all of whose chunks are there, in its final shape."""
        found, nothing = self._cells(spec), 0 in spec.shape
        if nothing and not found:
            return spec
        widest = [max((cell[d] for cell in found), default=0) + 1 for d in range(1, len(spec.shape))]
        if nothing or any(n > 1 for n in widest):
            # longer sequences came: as many whole chunks as the longest took, zeros where a batch had fewer
            form = (n * c if n > 1 else s or c for n, c, s in zip(widest, spec.chunks[1:], spec.shape[1:], strict=True))
            spec = Spec(spec.path, (spec.shape[0], *form), spec.chunks, spec.dtype)
            self._declare(spec)
            first = (0,) * len(widest)
            empty = np.zeros(spec.chunks, np.dtype(spec.dtype))
            for index in range(spec.grid()[0]):
                for cell in spec.cells(index):
                    # where the first batch was empty, nothing is written of another empty one
                    if cell not in found and (nothing or (index, *first) in found):
                        self._put_cell(spec, cell, empty, None)
                        found.add(cell)
        for index in range(spec.grid()[0]):
            for cell in spec.cells(index):
                if cell not in found:
                    raise DamagedError(
                        f"store {self.files.where}: chunk {'.'.join(map(str, cell))} of {spec.path} is missing; run "
                        f"`byline store repair {self.files.where}`, then fit again"
                    )
        return spec

    def _known(self) -> dict[tuple[Any, ...], list[Spec]]:
        """Arrays of complete members by name, form and first checksum."""
        known: dict[tuple[Any, ...], list[Spec]] = {}
        for entry in self.manifest.features.values():
            for name, content in entry["arrays"].items() if entry["complete"] else ():
                spec = Spec.of(content)
                same = known.setdefault(self._like(name, spec), [])
                if spec not in same:
                    same.append(spec)
        return known

    def _like(self, name: str, spec: Spec) -> tuple[Any, ...]:
        tail = b""
        if spec.count():
            with suppress(FileNotFoundError):
                tail = self.files.tail(spec.key((0,) * len(spec.shape)), 4)
        return name, spec.shape, spec.chunks, spec.dtype, tail

    def _shared(self, name: str, spec: Spec, known: dict[tuple[Any, ...], list[Spec]]) -> Spec:
        """The array, or an earlier one of equal content, in favour of which it is to be dropped."""
        like = self._like(name, spec)
        for other in known.get(like, ()):
            if other.path == spec.path:
                return spec
            cells = [cell for index in range(spec.grid()[0]) for cell in spec.cells(index)]
            if all(self.files.same(spec.key(cell), other.key(cell)) for cell in cells):
                return other
        known.setdefault(like, []).append(spec)
        return spec


def bytes_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have equal bytes: -0.0 is not 0.0, and NaN is NaN."""
    return bool(np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)))


def _progress(key: str) -> str:
    return f"progress/{key}.json"


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
