"""What a result depends on that is code or plain data, as digests that are the same in every process.

A function counts by its code, its constants and defaults, and by whatever it reads: what it closes over, globals, and
functions and classes that it calls, as far as they are the user's own. Packages that are installed count by name.
What code writes itself (counters, caches) is left out: running it is no change of it. Nothing counts by an address, an
order of sets, or a place in memory.
"""

from __future__ import annotations

import collections
import dis
import enum
import functools
import hashlib
import inspect
import os
import re
import site
import sys
import sysconfig
import types
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from byline import batches

_DEPTH = 12
_MOST = 100_000  # values looked into; what comes later counts by its type
_PLAIN = (bool, int, float, complex, str, bytes)
_MUTATORS = frozenset(
    [
        *("append", "appendleft", "extend", "insert", "add", "update", "setdefault"),
        *("pop", "popleft", "popitem", "remove", "discard", "clear", "sort", "reverse"),
    ]
)
_CONTAINERS = (list, dict, set, bytearray, collections.deque)
_NONE: frozenset[str] = frozenset()
_OF_MODULES = frozenset(vars(nn.Module()))
_ENTRY = frozenset({"__init__", "__call__", "__getitem__", "__len__", "forward"})


def source_of(value: Any, depth: int = _DEPTH) -> str:
    """A digest of a callable that changes when its code does, or what it reads."""
    name = getattr(value, "__qualname__", type(value).__name__)
    return f"{name}:{_digest(_Reader().content(value, depth))[:16]}"


def model_of(model: nn.Module, used_by: Iterable[Any] = ()) -> str:
    """A digest of a model but for its state: structure, code, and the attributes that its code reads.

    Args:
        model: the model.
        used_by: callables that are given it, and may read its attributes too.
    """
    reader = _Reader()
    names = frozenset().union(*(reader.attributes(value) for value in used_by))
    return _digest(reader.module(model, names, _DEPTH))


@dataclass(frozen=True)
class _Reads:
    """Names in a piece of code, nested functions included."""

    globals: frozenset[str]
    attributes: frozenset[str]
    modules: frozenset[str]
    """Imported inside."""
    written: frozenset[str]
    """Globals, attributes and variables of enclosing functions that it assigns."""
    filled: frozenset[str]
    """What it puts items into, as far as a line shows it."""


@cache
def _reads(code: types.CodeType) -> _Reads:
    globals_, attributes, modules, written = set[str](), set[str](), set[str](), set[str]()
    on_line: dict[int | None, set[str]] = {}
    filling: set[int | None] = set()
    lines = {offset: line for start, stop, line in code.co_lines() for offset in range(start, stop, 2)}
    for step in dis.get_instructions(code):
        name, op, line = step.argval, step.opname, lines.get(step.offset)
        if op in ("LOAD_GLOBAL", "LOAD_NAME"):
            globals_.add(name)
        elif op.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER", "IMPORT_FROM")):
            attributes.add(name)
            if name in _MUTATORS:
                filling.add(line)
        elif op in ("STORE_GLOBAL", "STORE_ATTR", "STORE_DEREF", "DELETE_GLOBAL", "DELETE_ATTR"):
            written.add(name)
        elif op in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            filling.add(line)
        elif op == "IMPORT_NAME":
            modules.add(name)
        if isinstance(name, str) and op.startswith(("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_DEREF", "LOAD_METHOD")):
            on_line.setdefault(line, set()).add(name)
    filled = set[str]().union(*(on_line.get(line, set()) for line in filling))
    for inner in filter(inspect.iscode, code.co_consts):
        own = _reads(inner)
        globals_ |= own.globals
        attributes |= own.attributes
        modules |= own.modules
        written |= own.written
        filled |= own.filled
    return _Reads(*map(frozenset, (globals_, attributes, modules, written, filled)))


class _Reader:
    """Goes through values, and through what they hold and read; `content` gives plain data that stands for a value."""

    def __init__(self) -> None:
        self.left = _MOST
        self._under: list[int] = []
        self._known: dict[tuple[int, int, frozenset[str]], Any] = {}
        self._alive: list[Any] = []

    def content(
        self, value: Any, depth: int, names: frozenset[str] = frozenset(), skip: frozenset[str] = frozenset()
    ) -> Any:
        """Plain data that stands for a value; objects that cannot be looked into count by their type alone.

        Args:
            value: what to look into.
            depth: how deep.
            names: attributes that are read of it.
            skip: attributes of it that are written where it is read.
        """
        if value is None or isinstance(value, _PLAIN):
            return _plain(value)
        self.left -= 1
        if depth <= 0 or self.left <= 0:
            return type(value).__qualname__
        if id(value) in self._under:
            return "what holds this"
        key = (id(value), depth, names | skip)
        if key not in self._known:
            self._under.append(id(value))
            try:
                found = self._content(value, depth, names, skip)
            finally:
                self._under.pop()
            # ids stand for values only as long as these live
            self._alive.append(value)
            self._known[key] = found
        return self._known[key]

    def _content(self, value: Any, depth: int, names: frozenset[str], skip: frozenset[str]) -> Any:
        below = depth - 1
        if isinstance(value, Tensor) or hasattr(value, "tobytes"):
            return self._numbers(value, below)
        if isinstance(value, nn.Module):
            state = sorted(value.state_dict().items())
            return self.module(value, names, below), [(k, self.content(v, below)) for k, v in state]
        if isinstance(value, torch.dtype | torch.device | torch.layout | range | slice | os.PathLike):
            return str(value)
        if isinstance(value, enum.Enum):
            return type(value).__qualname__, value.name
        if isinstance(value, re.Pattern):
            return value.pattern, value.flags
        if isinstance(value, Mapping):
            return type(value).__name__, sorted((_text(k), self.content(v, below)) for k, v in value.items())
        if isinstance(value, set | frozenset):
            return type(value).__name__, sorted(repr(self.content(v, below)) for v in value)
        if isinstance(value, list | tuple | collections.deque):
            return type(value).__name__, [self.content(v, below) for v in value]
        if isinstance(value, functools.partial):
            return "partial", [self.content(v, below) for v in (value.func, value.args, value.keywords)]
        if inspect.ismethod(value):
            return self.content(value.__func__, below), self.content(value.__self__, below)
        if inspect.isfunction(value):
            return self.function(value, depth)
        if inspect.ismodule(value):
            return self._package(value, names, below)
        if inspect.isclass(value):
            return self.of_class(value, names | _ENTRY, below)
        if hasattr(value, "__wrapped__"):
            return type(value).__name__, self.content(value.__wrapped__, below)
        if inspect.isbuiltin(value) or inspect.isroutine(value):
            return getattr(value, "__qualname__", type(value).__qualname__)
        return self._instance(value, names, skip, below)

    def function(self, function: types.FunctionType, depth: int) -> Any:
        """A function's code and what it reads."""
        below, code = depth - 1, function.__code__
        reads = _reads(code)
        cells: dict[str, Any] = {}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name in reads.written:
                continue
            try:
                cells[name] = self._read(cell.cell_contents, name, reads, below)
            except ValueError:
                cells[name] = "empty"
        defaults = self.content((function.__defaults__, function.__kwdefaults__), below)
        if _installed(function.__module__, code.co_filename):
            return _digest((function.__module__, function.__qualname__, cells, defaults))
        known = function.__globals__
        found = {
            name: self._read(known[name], name, reads, below)
            for name in sorted(reads.globals - reads.written)
            if name in known
        }
        imported = {
            name: self._package(sys.modules[name], reads.attributes, below)
            for name in sorted(reads.modules)
            if name in sys.modules
        }
        own = {k: self.content(v, below) for k, v in vars(function).items() if k not in reads.written}
        own.pop("__wrapped__", None)
        return _digest((self._code(code, function.__doc__, below), found, imported, cells, defaults, own))

    def _read(self, value: Any, name: str, reads: _Reads, depth: int) -> Any:
        if _fills(reads, name, value):
            return type(value).__name__
        return self.content(value, depth, reads.attributes, reads.written)

    def _code(self, code: types.CodeType, doc: str | None, depth: int) -> Any:
        constants = list(code.co_consts)
        if doc is not None and constants and constants[0] == doc:
            del constants[0]
        inner = [self._code(c, None, depth) for c in constants if inspect.iscode(c)]
        # names of nested functions hold that of the one around them
        plain = [self.content(c, depth) for c in constants if not inspect.iscode(c) and not _is_name(c)]
        return code.co_code.hex(), plain, list(code.co_names), inner

    def of_class(self, kind: type[Any], names: frozenset[str], depth: int) -> Any:
        """A class, by those of its attributes and methods that are read, and what these read of it."""
        if _installed(kind.__module__, None):
            return f"{kind.__module__}.{kind.__qualname__}"
        return _digest([kind.__qualname__, *self._members(kind, names, depth)[0]])

    def _members(self, kind: type[Any], names: frozenset[str], depth: int) -> tuple[list[Any], _Reads]:
        """What a class's methods of these names are and read of it, and all names in them, with the given ones."""
        own = [base for base in kind.__mro__ if not _installed(base.__module__, None)]
        todo, seen, found = sorted(names), set(names), list[Any]()
        written, filled = set[str](), set[str]()
        while todo:
            name = todo.pop(0)
            for base in own:
                if name not in vars(base) or name in ("__dict__", "__weakref__", "__doc__"):
                    continue
                value = vars(base)[name]
                value = (
                    getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", value)
                )
                found.append((base.__qualname__, name, value))
                reads = self.attributes(value)
                if inspect.isfunction(value) and name != "__init__":
                    written |= _reads(value.__code__).written
                    filled |= _reads(value.__code__).filled
                todo += sorted(reads - seen)
                seen |= reads
        every = _Reads(_NONE, frozenset(seen), _NONE, frozenset(written), frozenset(filled))
        # only now is known what is filled, of the class itself too
        kept = [(place, name, value) for place, name, value in found if not _fills(every, name, value)]
        return [
            (place, name, self.content(v, depth)) for place, name, v in sorted(kept, key=lambda one: one[:2])
        ], every

    def attributes(self, value: Any, seen: set[int] | None = None) -> frozenset[str]:
        """Names of attributes that a callable reads, of whatever, and the user's functions that it calls."""
        seen = set() if seen is None else seen
        if isinstance(value, functools.partial):
            return self.attributes(value.func, seen)
        value = getattr(value, "__wrapped__", value)
        value = getattr(value, "__func__", value)
        if not inspect.isfunction(value):
            call = inspect.getattr_static(type(value), "__call__", None)
            value = call if inspect.isfunction(call) and not isinstance(value, type | nn.Module) else value
        if (
            not inspect.isfunction(value)
            or id(value) in seen
            or _installed(value.__module__, value.__code__.co_filename)
        ):
            return frozenset()
        seen.add(id(value))
        reads, known = _reads(value.__code__), value.__globals__
        others = [known[name] for name in reads.globals if name in known]
        with_cells = [cell for cell in value.__closure__ or () if _filled(cell)]
        others += [cell.cell_contents for cell in with_cells]
        functions = [one for one in others if inspect.isfunction(one) or isinstance(one, functools.partial)]
        return reads.attributes.union(*(self.attributes(one, seen) for one in functions))

    def module(self, model: nn.Module, names: frozenset[str], depth: int) -> Any:
        """A model's structure, code, hooks, and those of its attributes that are no state and that its code reads."""
        out: list[Any] = [_text(model)]
        for path, part in model.named_modules():
            kind = type(part)
            found, own = self._members(kind, names | {"forward"}, depth)
            read, written = own.attributes, own.written
            # of a class whose forward is a package's, its code is not gone through from there
            foreign = next((b for b in kind.__mro__ if "forward" in vars(b)), nn.Module)
            if _installed(foreign.__module__, None):
                theirs = _of_package(cast(Hashable, kind))
                read, written = read | (theirs.attributes & _plain_names(part)), written | theirs.written
            data = {
                name: self.content(value, depth)
                for name, value in sorted(vars(part).items())
                if name in read and name not in _OF_MODULES and name not in written and not _fills(own, name, value)
            }
            hooks = [self.content(h, depth) for h in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())]
            moving = {n: self.content(part._buffers[n], depth) for n in sorted(part._non_persistent_buffers_set)}
            out.append((path, kind.__qualname__, found, data, hooks, moving))
        return _digest(out)

    def _instance(self, value: Any, names: frozenset[str], skip: frozenset[str], depth: int) -> Any:
        kind = type(value)
        known = vars(value) if hasattr(value, "__dict__") else {}
        if not _installed(kind.__module__, None):
            found, own = self._members(kind, names | _ENTRY, depth)
            out = sorted(n for n, v in known.items() if n not in own.written | skip and not _fills(own, n, v))
            return _digest((kind.__qualname__, found, {name: self.content(known[name], depth) for name in out}))
        if isinstance(value, types.SimpleNamespace) or kind.__name__ == "Namespace" or callable(value):
            out = sorted(n for n, v in known.items() if n not in skip and not n.startswith("_") and _is_plain(v))
            inside = {
                n: self.content(v, depth) for n, v in known.items() if isinstance(v, nn.Module | types.FunctionType)
            }
            return kind.__qualname__, {name: _plain_of(known[name]) for name in out}, sorted(inside.items())
        return kind.__qualname__

    def _package(self, module: types.ModuleType, names: frozenset[str], depth: int) -> Any:
        if _installed(module.__name__, getattr(module, "__file__", None)):
            return module.__name__
        known = vars(module)
        return {name: self.content(known[name], depth, names) for name in sorted(names) if name in known}

    def _numbers(self, value: Any, depth: int) -> Any:
        if getattr(getattr(value, "dtype", None), "hasobject", False):
            return self.content(value.tolist(), depth)
        try:
            return batches.digest_of(value)
        except (RuntimeError, NotImplementedError, TypeError):
            # sparse, nested, on no device
            return str(getattr(value, "dtype", "")), str(getattr(value, "shape", ""))


def _digest(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _text(value: Any) -> str:
    """A value's text without addresses."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def _plain(value: Any) -> Any:
    """Without the name of a subclass, such as NumPy's of float."""
    if isinstance(value, enum.Enum):
        return type(value).__qualname__, value.name
    if value is None or isinstance(value, bool):
        return value
    kinds: tuple[Callable[[Any], Any], ...] = (int, float, complex, str, bytes)
    return next(kind(value) for kind in kinds if isinstance(value, kind))  # type: ignore[arg-type]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, (*_PLAIN, torch.dtype))


def _plain_of(value: Any) -> str:
    return _text(sorted(value.items()) if isinstance(value, dict) else value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and "<locals>" in value


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _plain_names(part: nn.Module) -> frozenset[str]:
    """Attributes of a package's module that are plain data, or functions, and not private."""
    return frozenset(
        name
        for name, value in vars(part).items()
        if not name.startswith("_") and (_is_plain(value) or callable(value) or isinstance(value, Tensor))
    )


def _fills(reads: _Reads, name: str, value: Any) -> bool:
    return name in reads.filled and isinstance(value, _CONTAINERS)


@cache
def _of_package(kind: Hashable) -> _Reads:
    """Attributes that a class's methods read, and those that they assign beside the constructor.

    The latter say what it has seen, not what it is.
    """
    read, out = set[str](), set[str]()
    for base in inspect.getmro(cast("type[Any]", kind)):
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            if inspect.isfunction(value) and name not in ("__init__", "__setstate__"):
                read |= _reads(value.__code__).attributes
                out |= _reads(value.__code__).written
    return _Reads(_NONE, frozenset(read), _NONE, frozenset(out), _NONE)


@cache
def _roots() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    found = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [*site.getsitepackages(), site.getusersitepackages(), os.path.dirname(os.path.abspath(__file__))]
    return tuple(os.path.join(os.path.realpath(path), "") for path in found)


@cache
def _installed(module: str | None, file: str | None) -> bool:
    """Whether something comes with Python or an installed package, byline among them."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names or top in ("byline", "torch") or top in sys.builtin_module_names:
        return top != "__main__"
    if file is None:
        file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and os.path.realpath(file).startswith(_roots())
