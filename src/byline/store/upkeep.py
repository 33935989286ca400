"""Looking after a store: what is in it, whether it is whole, mending it, and clearing out what nothing refers to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from byline.store import lock
from byline.store.chunks import GROUP, ROOT, DamagedError, Spec, cell_name, read_cell
from byline.store.files import TEMPORARY
from byline.store.manifest import unseal
from byline.store.store import Store


@dataclass(frozen=True)
class Problem:
    """A file that is damaged or missing."""

    file: str
    problem: str
    """``is missing``, ``is truncated, or not of its size``, ``fails its checksum (crc32c)``, …"""
    member: str = ""
    """Whose it is; of shared factors, the first that refers to them."""
    array: str = ""
    """Its path below ``arrays/``."""
    chunk: str = ""
    examples: tuple[int, int] | None = None
    """First training example in the chunk, and the one after the last."""

    def __str__(self) -> str:
        where = f" (examples {self.examples[0]} to {self.examples[1] - 1} of {self.member})" if self.examples else ""
        return f"{self.file}{where} {self.problem}"


@dataclass
class Report:
    """What `verify` found."""

    store: str
    chunks: int = 0
    """Chunks that were read."""
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    """Members and vectors that a later `fit` goes on with."""

    @property
    def whole(self) -> bool:
        """Whether nothing is damaged or missing."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {**asdict(self), "whole": self.whole}


@dataclass(frozen=True)
class _Array:
    """An array of a store, and what is known of it."""

    spec: Spec
    kind: str
    """"rows", "vector" or "state"."""
    member: str
    attributes: dict[str, Any]
    complete: bool


def info(place: str | Path) -> dict[str, Any]:
    """What is in a store.

    Args:
        place: a folder or a URL.

    Returns:
        JSON: format, what it was made for, members with their chunks and bytes, all bytes, and who is writing.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: its manifest is damaged, or of another format.
    """
    store = _open(place)
    entries = {**_begun(store), **store.manifest.features}
    members = []
    for key, entry in entries.items():
        if "arrays" not in entry:
            continue
        count = Spec.of(entry["vectors"][entry["of"]]).count()
        lacking = store.missing(key) or []
        members.append(
            {
                "member": entry["member"],
                "key": key,
                "of": entry["of"],
                "dtype": entry["dtype"],
                "complete": entry["complete"],
                "chunks": [count - len(lacking), count],
                "bytes": sum(Spec.of(a).nbytes for a in entry["arrays"].values() if key in a["path"]),
            }
        )
    owner = lock.Lock(store.files)._owner()
    return {
        "store": store.files.where,
        "format": store.manifest.format,
        "byline": store.manifest.byline,
        "made_for": store.manifest.made_for,
        "members": members,
        "vectors": len(store.manifest.vectors),
        "states": len(store.manifest.state),
        "bytes": store.nbytes(),
        "writer": None if owner is None else {k: owner.get(k) for k in ("pid", "host", "heartbeat")},
    }


def verify(place: str | Path, progress: Callable[[int], Any] | None = None) -> Report:
    """Read every chunk of a store, and hold it against its checksum.

    Args:
        place: a folder or a URL.
        progress: is told of the chunks that have been read.

    Returns:
        what is damaged or missing.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: its manifest is damaged, or of another format.
    """
    store = _open(place)
    report = Report(store.files.where)
    for key, entry in _begun(store).items():
        if not entry:
            report.problems.append(Problem(f"progress/{key}.json", "is damaged"))
    folders: set[str] = set()
    for array in _arrays(store):
        spec = array.spec
        folders |= set(_folders(spec))
        if not array.complete:
            report.unfinished.append(spec.path)
        found = store._cells(spec)
        _check_metadata(store, array, report)
        buffer = np.empty(spec.chunks, np.dtype(spec.dtype))
        for index in range(spec.grid()[0] if spec.count() else 0):
            for cell in spec.cells(index):
                # of what is unfinished, what is not there is not missed
                if not array.complete and cell not in found:
                    continue
                try:
                    read_cell(store.files, spec, cell, buffer)
                except DamagedError as error:
                    low = index * spec.chunks[0]
                    span = (low, min(low + spec.chunks[0], spec.shape[0])) if array.kind != "state" else None
                    report.problems.append(
                        Problem(spec.key(cell), str(error), array.member, spec.path, cell_name(cell), span)
                    )
                report.chunks += 1
                report.bytes += buffer.nbytes + 4
                if progress is not None:
                    progress(report.chunks)
    for folder in sorted(folders):
        try:
            if store.files.read(f"{folder}/zarr.json") != GROUP:
                report.problems.append(Problem(f"{folder}/zarr.json", "is not that of a group"))
        except FileNotFoundError:
            report.problems.append(Problem(f"{folder}/zarr.json", "is missing"))
    return report


def repair(place: str | Path) -> Report:
    """Drop what is damaged, so that the next `fit` computes it again, and nothing else.

    A damaged chunk costs its batch, of the members that refer to it; a damaged tensor that features learnt costs the
    member.

    Args:
        place: a folder or a URL.

    Returns:
        what `verify` found.

    Raises:
        BlockingIOError: another process is writing.
    """
    store = _open(place)
    with store.session(), store.writing():
        report = verify(place)
        for problem in report.problems:
            _mend(store, problem)
        if report.problems:
            store.flush()
    return report


def gc(place: str | Path, unfinished: bool = False) -> dict[str, Any]:
    """Remove what nothing refers to: files of killed writes, members that no manifest entry and no progress names.

    Args:
        place: a folder or a URL.
        unfinished: remove members that are not complete too.

    Returns:
        ``{"files": [...], "bytes": n}`` of what was removed.

    Raises:
        BlockingIOError: another process is writing.
    """
    store = _open(place)
    with store.session(), store.writing():
        begun = {} if unfinished else {k: e for k, e in _begun(store).items() if e}
        specs = [array.spec for array in _arrays(store, begun)]
        kept = {f"{ROOT}/{spec.path}/zarr.json" for spec in specs}
        kept |= {spec.key(cell) for spec in specs for i in range(spec.grid()[0]) for cell in _every(store, spec, i)}
        kept |= {f"{folder}/zarr.json" for spec in specs for folder in _folders(spec)}
        kept |= {"manifest.json", lock.NAME, *(f"progress/{key}.json" for key in begun)}
        removed = [(name, size) for name, size in store.files.walk() if name not in kept]
        for name, _ in removed:
            store.files.delete(name)
    return {"files": [name for name, _ in removed], "bytes": sum(size for _, size in removed)}


def _folders(spec: Spec) -> list[str]:
    """The groups that an array is in."""
    parts = [ROOT, *spec.path.split("/")]
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _every(store: Store, spec: Spec, index: int) -> Iterator[tuple[int, ...]]:
    """The cells of a batch: of an unfinished array, those that longer sequences made too."""
    yield from spec.cells(index)
    if len(spec.shape) > 1:
        yield from (cell for cell in store._cells(spec) if cell[0] == index)


def _open(place: str | Path) -> Store:
    store = Store(place)
    if not store.manifest.made_for and not store.files.children(""):
        raise FileNotFoundError(f"no store at {store.files.where}")
    return store


def _begun(store: Store) -> dict[str, dict[str, Any]]:
    """What is in progress: an empty entry where its record is damaged."""
    found: dict[str, dict[str, Any]] = {}
    for name in store.files.children("progress"):
        if name.endswith(TEMPORARY):
            continue
        key = name.removesuffix(".json")
        try:
            entry = unseal(store.files.read(f"progress/{name}"))
        except DamagedError:
            entry = {}
        if key not in store.manifest.features:
            found[key] = entry
    return found


def _arrays(store: Store, begun: dict[str, dict[str, Any]] | None = None) -> list[_Array]:
    """Every array of a store, once."""
    manifest = store.manifest
    found: dict[str, _Array] = {}
    names = {key: entry["member"] for key, entry in manifest.features.items()}

    def add(content: dict[str, Any], kind: str, member: str, complete: bool) -> None:
        attributes = {"scalar": content["scalar"]} if kind == "state" else {}
        spec = Spec.of(content)
        before = found.get(spec.path)
        if before is None or (complete and not before.complete):
            found[spec.path] = _Array(spec, kind, member, attributes, complete)

    for entry in manifest.features.values():
        for content in entry["arrays"].values():
            add(content, "rows", entry["member"], entry["complete"])
    for content in manifest.vectors.values():
        add(content, "vector", content["member"], content["complete"])
    for key, state in manifest.state.items():
        for content in state.values():
            add(content, "state", names.get(key, key), True)
    for entry in (_begun(store) if begun is None else begun).values():
        if "arrays" in entry:
            for content in entry["arrays"].values():
                add(content, "rows", entry["member"], False)
            for content in entry["vectors"].values():
                add(content, "vector", entry["member"], False)
            for content in entry["state"].values():
                add(content, "state", entry["member"], True)
        elif entry:
            add(entry, "vector", entry["member"], False)
    return list(found.values())


def _check_metadata(store: Store, array: _Array, report: Report) -> None:
    file = f"{ROOT}/{array.spec.path}/zarr.json"
    try:
        if store.files.read(file) == array.spec.metadata(array.attributes):
            return
        problem = "is not what the manifest says"
    except FileNotFoundError:
        problem = "is missing"
    report.problems.append(Problem(file, problem, array.member, array.spec.path))


def _mend(store: Store, problem: Problem) -> None:
    manifest, files = store.manifest, store.files
    kind = problem.array.partition("/")[0]
    if not problem.array:
        if problem.file.endswith("zarr.json"):
            files.write(problem.file, GROUP)
        else:
            files.delete(problem.file)
        return
    if not problem.chunk:
        (array,) = [a for a in _arrays(store) if a.spec.path == problem.array]
        files.write(problem.file, array.spec.metadata(array.attributes))
        return
    files.delete(problem.file)
    if kind == "state":
        key = problem.array.split("/")[1]
        _forget(store, key)
        return
    entries = [*manifest.features.values(), *(e for e in _begun(store).values() if "arrays" in e)]
    for entry in entries:
        own = [*entry["arrays"].values(), *entry["vectors"].values()]
        if any(content["path"] == problem.array for content in own):
            # without the chunk that says so, the batch is not done
            mark = Spec.of(entry["vectors"][entry["of"]])
            files.delete(mark.key((int(problem.chunk.partition(".")[0]),)))
            entry["complete"] = False
            for content in entry["vectors"].values():
                if content["path"] in manifest.vectors:
                    manifest.vectors[content["path"]]["complete"] = False
    if problem.array in manifest.vectors:
        manifest.vectors[problem.array]["complete"] = False


def _forget(store: Store, key: str) -> None:
    """A member whose learnt tensors are damaged, or a state of its own."""
    manifest = store.manifest
    manifest.state.pop(key, None)
    store.files.delete(f"progress/{key}.json")
    entry = manifest.features.pop(key, None)
    if entry is not None:
        for content in entry["vectors"].values():
            manifest.vectors.pop(content["path"], None)
        # it will be begun anew, perhaps in other chunks: whoever refers to its factors must be, too
        referring = [
            other
            for other, theirs in manifest.features.items()
            if any(content["path"].startswith(f"features/{key}/") for content in theirs["arrays"].values())
        ]
        for other in referring:
            _forget(store, other)
