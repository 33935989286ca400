"""Scores: which training examples pushed which test outputs up, and how sure that is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray


@dataclass(frozen=True)
class Ranked:
    """Training examples in order, the strongest first.

    Attributes:
        indices: (..., k) places in the training set.
        scores: (..., k) their scores.
        stderr: (..., k) the standard errors of the scores.
    """

    indices: Array
    scores: Array
    stderr: Array

    def __getitem__(self, test: int) -> Ranked:
        return Ranked(self.indices[test], self.scores[test], self.stderr[test])

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class TopRow:
    """The strongest training examples for one test example."""

    test: int
    proponents: Ranked
    opponents: Ranked


class Top(Sequence[TopRow]):
    """The strongest training examples for every test example: ``top[z].proponents.indices``.

    Attributes:
        proponents: `Ranked` arrays (n_test, k), the highest scores first.
        opponents: `Ranked` arrays (n_test, k), the lowest scores first.
    """

    def __init__(self, proponents: Ranked, opponents: Ranked):
        self.proponents, self.opponents = proponents, opponents

    @property
    def indices(self) -> Array:
        """(n_test, k) of the proponents."""
        return self.proponents.indices

    @property
    def scores(self) -> Array:
        """(n_test, k) of the proponents."""
        return self.proponents.scores

    @property
    def stderr(self) -> Array:
        """(n_test, k) of the proponents."""
        return self.proponents.stderr

    def __len__(self) -> int:
        return len(self.proponents)

    @overload
    def __getitem__(self, test: int) -> TopRow: ...
    @overload
    def __getitem__(self, test: slice) -> Sequence[TopRow]: ...
    def __getitem__(self, test: int | slice) -> TopRow | Sequence[TopRow]:
        if isinstance(test, slice):
            return [self[i] for i in range(*test.indices(len(self)))]
        if not -len(self) <= test < len(self):
            raise IndexError(f"test example {test} of {len(self)}")
        test %= len(self)
        return TopRow(test, self.proponents[test], self.opponents[test])

    def __repr__(self) -> str:
        lines = [f"Top({len(self)} test examples × {self.indices.shape[1]})"]
        for row in list(self)[:3]:
            for label, ranked in (("+", row.proponents), ("-", row.opponents)):
                shown = ", ".join(
                    f"{i}: {s:.3g}" + ("" if np.isnan(e) else f" ± {e:.2g}")
                    for i, s, e in zip(ranked.indices[:4], ranked.scores[:4], ranked.stderr[:4], strict=True)
                )
                lines.append(f"  test {row.test} {label} {shown}")
        return "\n".join(lines)


class Ranking(Top):
    """A `Top` that was found without a matrix of scores, and how it came about.

    Attributes:
        info: as that of `Scores`.
        n_train: number of training examples.
    """

    def __init__(self, proponents: Ranked, opponents: Ranked, info: dict[str, Any], n_train: int):
        super().__init__(proponents, opponents)
        self.info, self.n_train = dict(info), n_train

    def to_dataframe(self) -> pd.DataFrame:
        """Long form: test, train, score, stderr; the proponents of a test example, then its opponents."""
        return _dataframe(self)


class Scores:
    """A matrix of scores with its standard errors. Positive: training on it pushes the test output up.

    Args:
        values: (n_test, n_train) float32.
        stderr: (n_test, n_train) float32, the standard error over members; NaN where there is a single one.
        info: how they came about (method, ensemble, features, damping); JSON.

    Large results live in a memory-mapped file; ``values`` and ``stderr`` are NumPy arrays either way.
    """

    def __init__(self, values: Any, stderr: Any = None, info: dict[str, Any] | None = None):
        self.values: Array = _matrix(values, "values")
        self.stderr: Array = np.full_like(self.values, np.nan) if stderr is None else _matrix(stderr, "stderr")
        if self.stderr.shape != self.values.shape:
            raise ValueError(f"stderr has shape {self.stderr.shape}; expected that of values, {self.values.shape}")
        self.info = dict(info or {})

    @property
    def shape(self) -> tuple[int, int]:
        """(n_test, n_train)."""
        return self.values.shape

    def top(self, k: int = 5) -> Top:
        """The ``k`` strongest proponents and opponents of every test example, ties in the training set's order.

        Raises:
            ValueError: ``k`` is no int from 1 to n_train.
        """
        k = check_k(k, self.shape[1])
        return Top(self._ranked(k, -1), self._ranked(k, 1))

    def _ranked(self, k: int, sign: int) -> Ranked:
        n_test, n_train = self.shape
        indices = np.empty((n_test, k), dtype=np.int64)
        for row in range(n_test):
            key = sign * self.values[row]
            if k < n_train:
                # everything up to the k-th value, so that ties at the border are settled by the order too
                border = np.partition(key, k - 1)[k - 1]
                candidates = np.flatnonzero(key <= border)
            else:
                candidates = np.arange(n_train)
            indices[row] = candidates[np.argsort(key[candidates], kind="stable")[:k]]
        return Ranked(
            indices,
            np.take_along_axis(self.values, indices, 1),
            np.take_along_axis(self.stderr, indices, 1),
        )

    def to_dataframe(self, k: int | None = None) -> pd.DataFrame:
        """Long form: test, train, score, stderr; only the ``k`` strongest of either sign if given."""
        import pandas as pd

        n_test, n_train = self.shape
        if k is None:
            test, train = np.divmod(np.arange(n_test * n_train), n_train)
            values, stderr = self.values.ravel(), self.stderr.ravel()
        else:
            return _dataframe(self.top(k))
        return pd.DataFrame({"test": test, "train": train, "score": values, "stderr": stderr})

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file, in one atomic step."""
        from safetensors.numpy import save_file

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        arrays = {"values": np.ascontiguousarray(self.values), "stderr": np.ascontiguousarray(self.stderr)}
        save_file(arrays, temporary, metadata={"byline": "scores", "info": json.dumps(self.info)})
        temporary.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote; the arrays are memory-mapped.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: no file of scores.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no scores at {path}")
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("byline") != "scores":
                    raise ValueError(f"{path} holds no byline scores")
                return cls(file.get_tensor("values"), file.get_tensor("stderr"), json.loads(metadata["info"]))
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error

    def __repr__(self) -> str:
        how = ", ".join(f"{k}={v}" for k, v in self.info.items() if k in ("method", "members", "ensemble"))
        error = np.nanmedian(self.stderr[: min(64, len(self.stderr))]) if self.info.get("members", 1) > 1 else np.nan
        sure = "" if np.isnan(error) else f", median stderr {error:.3g}"
        return f"Scores({self.shape[0]} test × {self.shape[1]} train{sure}{'; ' + how if how else ''})"


def check_k(k: Any, n_train: int) -> int:
    """How many of the strongest: an int from 1 to n_train."""
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or not 1 <= k <= n_train:
        raise ValueError(f"k is {k!r}; expected an int from 1 to the {n_train} training examples")
    return int(k)


def _dataframe(top: Top) -> pd.DataFrame:
    import pandas as pd

    parts = [top.proponents, top.opponents]
    columns = {
        name: np.concatenate([getattr(part, field) for part in parts], 1).ravel()
        for name, field in (("train", "indices"), ("score", "scores"), ("stderr", "stderr"))
    }
    return pd.DataFrame({"test": np.repeat(np.arange(len(top)), 2 * top.indices.shape[1]), **columns})


def _matrix(values: Any, name: str) -> Array:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = values if isinstance(values, np.ndarray) else np.asarray(values)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}; expected a matrix (n_test, n_train)")
    return array if array.dtype == np.float32 else array.astype(np.float32)


def matrix(shape: tuple[int, int], limit: int, folder: Path | None = None) -> Array:
    """Zeros, in memory up to ``limit`` bytes and in a memory-mapped file beyond.

    The file is deleted with the last reference to it, unless a folder is named for it.
    """
    if shape[0] * shape[1] * 4 <= limit:
        return np.zeros(shape, np.float32)
    if folder is None:
        with tempfile.NamedTemporaryFile(prefix="byline-") as file:
            return np.memmap(file, np.float32, "w+", shape=shape)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix="scores-", dir=folder) as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
