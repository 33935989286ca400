"""A member's features in a store, read in slices."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from byline.store.chunks import Spec, read_rows
from byline.store.files import Files
from byline.store.quantize import SCALE, decode


class StoredRows(dict[str, Tensor]):
    """Rows that know the content they hold: equal ``keys_of`` means equal numbers."""

    keys_of: dict[str, str]


class Stored:
    """The features of one complete member.

    Args:
        files: of the store.
        entry: what the manifest says of the member.

    Attributes:
        digests: names the content of each array; members that share an array share its name here.
        chunk: examples per chunk: reading whole chunks costs least.
    """

    def __init__(self, files: Files, entry: dict[str, Any]):
        self.files = files
        self.chunk: int = entry["chunk"]
        self._length: int = entry["examples"]
        self._specs = {name: Spec.of(content) for name, content in entry["arrays"].items()}
        self.digests: dict[str, str] = {
            name: hashlib.blake2b(spec.path.encode(), digest_size=10).hexdigest()
            for name, spec in self._specs.items()
            if not name.endswith(SCALE)
        }

    def __len__(self) -> int:
        return self._length

    @property
    def columns(self) -> int:
        """Numbers per example."""
        return sum(spec.columns for name, spec in self._specs.items() if not name.endswith(SCALE))

    @property
    def forms(self) -> dict[str, tuple[int, ...]]:
        """The shape of one example's part of each array, as it is read."""
        return {name: spec.shape[1:] for name, spec in self._specs.items() if not name.endswith(SCALE)}

    def spans(self, size: int = 1024) -> list[tuple[int, int]]:
        """(start, stop) of whole chunks, about ``size`` examples at a time."""
        step = self.chunk * max(1, size // self.chunk)
        return [(start, min(start + step, self._length)) for start in range(0, self._length, step)]

    def read(self, start: int, stop: int) -> StoredRows:
        """Rows ``start`` to ``stop``, decoded, with names for the content that they are slices of.

        Raises:
            DamagedError: a chunk is missing, truncated or changed; says which.
        """
        rows = StoredRows(decode(self._arrays(start, stop)))
        rows.keys_of = {name: f"{digest}/{start}/{stop}" for name, digest in self.digests.items()}
        return rows

    def read_raw(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows ``start`` to ``stop`` of features that are vectors, as they are kept.

        Returns:
            (B, k) float32, float16 or int8, and (B,) the scale that each row is to be multiplied by; None for float32.

        Raises:
            ValueError: the features are factors, not vectors.
        """
        if "rows" not in self._specs:
            raise ValueError("these features are kept as factors; expected rows, as of Factorized, Nystrom or Dense")
        found = self._arrays(start, stop)
        return found["rows"], found.get(f"rows{SCALE}")

    def _arrays(self, start: int, stop: int) -> dict[str, Tensor]:
        return {name: torch.from_numpy(read_rows(self.files, s, start, stop)) for name, s in self._specs.items()}
