"""The bank: what models retrained on known random subsets say, the ground truth of subset-based measures."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

FORMAT = "byline-bank-1"


@dataclass(frozen=True, eq=False)
class Bank:
    """Outputs of models retrained on random subsets of a training set.

    Attributes:
        subsets: (S, n_train) bool, True where the example was trained on.
        outputs: (S, R, n_test) float32, the task's output of each test example, from R models a subset that
            differ by seed alone.
        metadata: Plain data on how it was made: the arguments of `byline.retrain`, the training function,
            fingerprints of the data, and under ``"cost"`` the FLOPs and seconds of all its models together.

    Raises:
        ValueError: If the shapes do not fit together, or an output is not finite.
    """

    subsets: np.ndarray
    outputs: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        subsets, outputs = np.asarray(self.subsets), np.asarray(self.outputs, dtype=np.float32)
        if subsets.ndim != 2 or subsets.dtype != bool:
            raise ValueError(f"subsets: got {subsets.dtype} {subsets.shape}; expected bool (subsets, n_train)")
        if outputs.ndim != 3 or len(outputs) != len(subsets):
            raise ValueError(f"outputs: got {outputs.shape}; expected ({len(subsets)}, seeds, n_test)")
        if not np.isfinite(outputs).all():
            s, r, t = np.argwhere(~np.isfinite(outputs))[0]
            raise ValueError(
                f"outputs: subset {s}, seed {r}, test example {t} is {outputs[s, r, t]}; expected a number"
            )
        object.__setattr__(self, "subsets", subsets)
        object.__setattr__(self, "outputs", outputs)

    @property
    def n_train(self) -> int:
        """Size of the training set the subsets are drawn from."""
        return self.subsets.shape[1]

    def with_seeds(self, seeds: int) -> Bank:
        """The bank as it would be with fewer models a subset: a noisier ground truth."""
        if not 1 <= seeds <= self.outputs.shape[1]:
            raise ValueError(f"seeds is {seeds}; expected 1 to the bank's {self.outputs.shape[1]}")
        return Bank(self.subsets, self.outputs[:, :seeds], {**self.metadata, "seeds": seeds})

    @property
    def n_test(self) -> int:
        """Number of test examples."""
        return self.outputs.shape[2]

    @property
    def seeds(self) -> int:
        """Models trained on each subset."""
        return self.outputs.shape[1]

    def save(self, path: str | Path) -> None:
        """Writes the bank as one safetensors file, whole or not at all."""
        write(path, {"subsets": self.subsets, "outputs": self.outputs}, {"format": FORMAT, **self.metadata})

    @classmethod
    def load(cls, path: str | Path) -> Bank:
        """Reads what `save` wrote. Nothing in the file is ever executed.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a bank.
        """
        arrays, metadata = read(path)
        if metadata.pop("format", None) != FORMAT or set(arrays) != {"subsets", "outputs"}:
            raise ValueError(f"{path} is not a bank that byline wrote ({FORMAT})")
        return cls(arrays["subsets"], arrays["outputs"], metadata)

    def __repr__(self) -> str:
        size = f"{self.subsets.sum(1).mean():.0f} of {self.n_train}"
        trained = f"{len(self.subsets)} subsets of {size} examples × {self.seeds} seeds"
        return f"Bank({trained}, {self.n_test} test examples)"


def write(path: str | Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Arrays and plain data as a safetensors file that appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # not ascontiguousarray, which makes (1,) of a lone number
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(save(contiguous, metadata={"byline": json.dumps(metadata, sort_keys=True)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or was not written by byline.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})["byline"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or was not written by byline ({error})") from error
    return arrays, metadata
