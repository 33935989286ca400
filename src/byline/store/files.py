"""Where a store's files are: a folder, memory, or any fsspec URL. A write is atomic: all of a file, or none."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

TEMPORARY = ".tmp"
"""How the names of unfinished files end."""
_counter = itertools.count()


class Files(ABC):
    """Keys, such as ``arrays/output/<id>/c.0``, and their bytes."""

    where: str
    """What to call the place in messages."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """All of a file.

        Raises:
            FileNotFoundError: it is not there.
        """

    @abstractmethod
    def write(self, key: str, *parts: Any) -> None:
        """Write buffers one after the other; readers see the old file or the new one."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write a file unless it is there already; whether it was written."""

    @abstractmethod
    def children(self, key: str) -> list[str]:
        """Names in a folder; none where there is no folder."""

    @abstractmethod
    def walk(self, key: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) of every file in a folder and below it."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing where there is none."""

    def read_into(self, key: str, out: np.ndarray, tail: int) -> bytes | None:
        """Read a file into a contiguous array; returns the ``tail`` bytes that follow, None if the size is another.

        Raises:
            FileNotFoundError: it is not there.
        """
        content = self.read(key)
        if len(content) != out.nbytes + tail:
            return None
        memoryview(out.data).cast("B")[:] = content[: out.nbytes]
        return content[out.nbytes :]

    def tail(self, key: str, count: int) -> bytes:
        """The last bytes of a file."""
        return self.read(key)[-count:]

    def link(self, source: str, target: str) -> bool:
        """Give a file a second name without copying it, where that is possible; whether it was done."""
        return False

    def same(self, a: str, b: str) -> bool:
        """Whether two keys hold equal bytes."""
        return self.read(a) == self.read(b)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes of this machine out for a moment, where the place has a way to."""
        yield


class Memory(Files):
    """In this process."""

    where = "in memory"

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def read(self, key: str) -> bytes:
        """The bytes."""
        try:
            return self.content[key]
        except KeyError:
            raise FileNotFoundError(key) from None

    def write(self, key: str, *parts: Any) -> None:
        """Keep a copy."""
        self.content[key] = b"".join(parts)

    def create(self, key: str, data: bytes) -> bool:
        """Keep it, if it is new."""
        return self.content.setdefault(key, data) is data

    def children(self, key: str) -> list[str]:
        """First parts of the keys below."""
        start = f"{key}/" if key else ""
        return sorted({k[len(start) :].partition("/")[0] for k in self.content if k.startswith(start)})

    def walk(self, key: str = "") -> Iterator[tuple[str, int]]:
        """Every key."""
        start = f"{key}/" if key else ""
        yield from [(k, len(v)) for k, v in self.content.items() if k.startswith(start)]

    def delete(self, key: str) -> None:
        """Forget it."""
        for name in [k for k in self.content if k == key or k.startswith(f"{key}/")]:
            del self.content[name]

    def link(self, source: str, target: str) -> bool:
        """Bytes cannot change, so both names may share them."""
        self.content[target] = self.content[source]
        return True


class Local(Files):
    """A folder. A file is written under another name, and then renamed: a kill leaves the old one, or the new one."""

    def __init__(self, root: Path):
        self.root = root
        self.where = str(root)
        self._prefix = os.path.join(root, "")

    def read(self, key: str) -> bytes:
        """Read the file."""
        with open(self._prefix + key, "rb") as file:
            return file.read()

    def read_into(self, key: str, out: np.ndarray, tail: int) -> bytes | None:
        """Straight into the array."""
        descriptor = os.open(self._prefix + key, os.O_RDONLY)
        try:
            size = out.nbytes + tail
            if os.fstat(descriptor).st_size != size:
                return None
            end, view, done = bytearray(tail), memoryview(out.data).cast("B"), 0
            while done < size:
                buffers: list[Any] = [view[done:], end] if done < out.nbytes else [memoryview(end)[done - out.nbytes :]]
                got = os.preadv(descriptor, buffers, done)
                if got == 0:
                    return None
                done += got
            return bytes(end)
        finally:
            os.close(descriptor)

    def tail(self, key: str, count: int) -> bytes:
        """Without reading the rest."""
        with open(self._prefix + key, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - count))
            return file.read(count)

    def write(self, key: str, *parts: Any, sync: bool = False) -> None:
        """Write beside it and rename; ``sync`` waits for the disk, so that a power cut leaves one of the two too."""
        target = self._prefix + key
        temporary = f"{target}.{os.getpid()}-{next(_counter)}{TEMPORARY}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                views = [memoryview(part).cast("B") for part in parts]
                while views:
                    done = os.writev(descriptor, views)
                    while views and done >= len(views[0]):
                        done -= len(views.pop(0))
                    views[:1] = [view[done:] for view in views[:1]]
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def create(self, key: str, data: bytes) -> bool:
        """Exclusive create."""
        os.makedirs(self.root, exist_ok=True)
        try:
            with open(self._prefix + key, "xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def children(self, key: str) -> list[str]:
        """Names in the folder."""
        try:
            return sorted(os.listdir(self._prefix + key))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, key: str = "") -> Iterator[tuple[str, int]]:
        """Every file."""
        for folder, _, names in os.walk(self._prefix + key):
            for name in sorted(names):
                path = os.path.join(folder, name)
                try:
                    yield os.path.relpath(path, self.root).replace(os.sep, "/"), os.lstat(path).st_size
                except FileNotFoundError:
                    continue

    def delete(self, key: str) -> None:
        """Unlink, or remove the tree."""
        path = self._prefix + key
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):
            if not os.path.isdir(path):
                raise
            shutil.rmtree(path)

    def link(self, source: str, target: str) -> bool:
        """A hard link."""
        path = self._prefix + target
        try:
            try:
                os.link(self._prefix + source, path)
            except FileExistsError:
                os.unlink(path)
                os.link(self._prefix + source, path)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.link(self._prefix + source, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            return False
        return True

    def same(self, a: str, b: str) -> bool:
        """By the file itself, else by its bytes."""
        try:
            if os.path.samefile(self._prefix + a, self._prefix + b):
                return True
        except OSError:
            return False
        return super().same(a, b)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The kernel's lock on the folder, which ends with the process."""
        os.makedirs(self.root, exist_ok=True)
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class Remote(Files):
    """What fsspec reaches. A put of an object is atomic in memory and in object stores (S3, GCS, Azure)."""

    def __init__(self, url: str):
        import fsspec

        self.where = url
        try:
            self.fs, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            kind = url.partition(":")[0]
            raise ValueError(
                f"store is {url!r}, and there is no fsspec implementation of {kind}:// here ({error}); expected a "
                f"folder or a URL that fsspec knows, and the package that it needs"
            ) from None
        self.root = root.rstrip("/")

    def _at(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def read(self, key: str) -> bytes:
        """Get the object."""
        return self.fs.cat_file(self._at(key))

    def write(self, key: str, *parts: Any) -> None:
        """Put the object."""
        path = self._at(key)
        self._parents(path)
        self.fs.pipe_file(path, b"".join(parts))

    def create(self, key: str, data: bytes) -> bool:
        """Put it, if it is new; as exclusive as the implementation is."""
        path = self._at(key)
        self._parents(path)
        try:
            self.fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError):
            if self.fs.exists(path):
                return False
            self.fs.pipe_file(path, data)
        return True

    def children(self, key: str) -> list[str]:
        """List the prefix."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self._at(key), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def walk(self, key: str = "") -> Iterator[tuple[str, int]]:
        """Find below the prefix."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(self._at(key), detail=True)
        except FileNotFoundError:
            return
        cut = len(self._at("")) + 1
        for name, about in sorted(found.items()):
            yield name[cut:], int(about.get("size") or 0)

    def delete(self, key: str) -> None:
        """Remove it and what is below."""
        self.fs.invalidate_cache()
        with suppress(FileNotFoundError):
            self.fs.rm(self._at(key), recursive=True)

    def _parents(self, path: str) -> None:
        # object stores have no folders; those that have do not always make them on writing
        parent = path.rpartition("/")[0]
        if parent not in self._made:
            self.fs.makedirs(parent, exist_ok=True)
            self._made.add(parent)

    @property
    def _made(self) -> set[str]:
        return self.__dict__.setdefault("_parents_made", set())


def open_files(place: str | Path | None) -> Files:
    """The files of a store.

    Args:
        place: a folder, a URL, or None for memory.

    Raises:
        ValueError: a file, a chained URL, or a URL that fsspec has no implementation for.
    """
    if place is None:
        return Memory()
    text = os.fspath(place)
    if "::" in text and "://" in text:
        raise ValueError(f"store is {text!r}; expected a folder or one plain URL such as s3://bucket/prefix")
    scheme, found, rest = text.partition("://")
    if found and scheme in ("file", "local"):
        text = rest
    elif found:
        return Remote(text)
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise ValueError(f"store is {path}, a file; expected a folder")
    return Local(path)
