"""How a model is trained, as plain data that can be stored, compared and repeated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = (None, "linear", "cosine", "cyclic")


@dataclass(frozen=True)
class Recipe:
    """A training recipe: everything but the model, the data and the seed.

    The loss of a step is the mean over the batch. Every epoch visits every example once in a new random
    order; the last batch of an epoch may be smaller, never dropped.

    Attributes:
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"`` (torch's own, with their default betas).
        lr: Learning rate of the first step, per step.
        momentum: Momentum of SGD; must be 0 for the others.
        weight_decay: As torch's optimizer of that name understands it (decoupled for ``"adamw"``).
        batch_size: Examples a step.
        epochs: Passes over the training data.
        schedule: ``None`` keeps the rate; ``"linear"`` and ``"cosine"`` take it down to zero over the whole
            run, step by step. ``"cyclic"`` takes it down to zero along a cosine ``cycles`` times, starting anew from
            ``lr`` each time (Huang et al. 2017, "Snapshot Ensembles", equation 2).
        cycles: Of a cyclic schedule; a divisor of ``epochs``, so that every cycle ends with an epoch.

    Raises:
        ValueError: If a field is out of range; the message names it, what came and what was expected.
    """

    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 64
    epochs: int = 10
    schedule: str | None = None
    cycles: int = 1

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: expected None, 'linear', 'cosine' or 'cyclic'")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr={self.lr!r}: expected a positive number")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum!r}: expected a number in [0, 1)")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum={self.momentum!r}: only sgd takes it, not {self.optimizer}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay={self.weight_decay!r}: expected a number of at least 0")
        for name in ("batch_size", "epochs", "cycles"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
        if self.cycles > 1 and self.schedule != "cyclic":
            raise ValueError(f"cycles={self.cycles!r}: only schedule='cyclic' has them, not {self.schedule!r}")
        if self.epochs % self.cycles:
            raise ValueError(f"cycles={self.cycles!r}: expected a divisor of epochs, {self.epochs}")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-able plain data, the inverse of `from_dict`."""
        plain = asdict(self)
        # recipes that were kept before there were cycles are the same recipes
        return plain if self.cycles > 1 else {name: value for name, value in plain.items() if name != "cycles"}

    @property
    def cycle_ends(self) -> list[int]:
        """The epochs, counted from 1, at whose end a cycle ends."""
        return [self.epochs // self.cycles * (i + 1) for i in range(self.cycles)]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: If there is a key this version does not know.
        """
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"recipe has unknown fields: {', '.join(unknown)}")
        return cls(**data)

    def batches(self, examples: int) -> int:
        """Steps in one epoch over this many examples."""
        return math.ceil(examples / self.batch_size)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of a run of this many steps."""
        done = step / steps
        if self.schedule == "linear":
            return self.lr * (1 - done)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "cyclic":
            # whole numbers, for a cycle's first step must not be taken for the last one of the cycle before
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step * self.cycles % steps) / steps))
        return self.lr

    def make_optimizer(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        """The optimizer over these parameters: torch's fused kernel where it exists, the usual one elsewhere.

        All three work element by element, which is why parameters of many models may lie stacked in one
        tensor.
        """
        parameters = list(parameters)
        kinds: dict[str, Any] = {
            "sgd": torch.optim.SGD,
            "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW,
        }
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            options["momentum"] = self.momentum
        try:
            return kinds[self.optimizer](parameters, fused=True, **options)
        except RuntimeError:  # fused kernels exist for some devices and dtypes only
            return kinds[self.optimizer](parameters, **options)
