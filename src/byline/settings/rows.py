"""The ensembles a comparison measures, as data.

A row is a kind, a number of trained models and what is drawn from each. The rates and scales below were
chosen once, on fashion-mlp, with the ground truth at hand; they are the same for every setting, so elsewhere
they are a default and not a choice made after looking.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = ("independent", "dropout", "forward-only", "lora", "weight noise", "trajectory")


@dataclass(frozen=True)
class Row:
    """One ensemble of a comparison.

    Attributes:
        kind: One of `KINDS`.
        models: I, how many trained models (or runs) it needs.
        each: Masks, adapters, draws or checkpoints of each of them; 1 for the naive ensemble.
        options: Of the kind: `p`; `scale`; `rank`, `epochs`, `lr` and `targets` of adapters.
    """

    kind: str
    models: int = 1
    each: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.models < 1 or self.each < 1:
            raise ValueError(f"a row needs at least one model and one member of each, got {self}")

    @property
    def name(self) -> str:
        """Its name in the table."""
        if self.kind == "independent":
            return f"independent {self.models}"
        if self.kind == "trajectory":
            runs = "one short run" if self.models == 1 else f"each of {self.models} short runs"
            return f"{self.each} checkpoints of {runs}"
        return f"{'LoRA' if self.kind == 'lora' else self.kind} {self.models}×{self.each}"

    @property
    def detail(self) -> str:
        """Its options in words: `p 0.5`."""
        return ", ".join(
            f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {'+'.join(value)}"
            for name, value in self.options.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


# One model alone wants stronger masks than five, whose differences already say part of what masks would.
ONE, MANY = {"p": 0.5}, {"p": 0.3}
ADAPTERS = {"rank": 8, "epochs": 3, "lr": 1e-3}

FULL: tuple[Row, ...] = (
    Row("independent", 1),
    Row("independent", 2),
    Row("independent", 5),
    Row("independent", 10),
    Row("independent", 25),
    Row("dropout", 1, 10, ONE),
    Row("dropout", 1, 30, ONE),
    Row("dropout", 5, 10, MANY),
    Row("forward-only", 1, 10, ONE),
    Row("forward-only", 5, 10, MANY),
    Row("lora", 1, 4, ADAPTERS),
    Row("lora", 5, 4, ADAPTERS),
    Row("weight noise", 1, 10, {"scale": 0.6}),
    Row("trajectory", 1, 3),
    Row("trajectory", 1, 5),
    Row("trajectory", 1, 10),
)

QUICK: tuple[Row, ...] = (
    Row("independent", 1),
    Row("independent", 5),
    Row("dropout", 1, 10, ONE),
    Row("forward-only", 1, 10, ONE),
    Row("lora", 1, 2, ADAPTERS),
    Row("weight noise", 1, 10, {"scale": 0.6}),
    Row("trajectory", 1, 10),
)

# A transformer has dropout on attention, between blocks and on its input, twice in every block: the rate of training
# (0.1) stands beside the stronger ones that were chosen on a network with two such layers.
SEQUENCES: tuple[Row, ...] = (
    Row("independent", 1),
    Row("independent", 2),
    Row("independent", 5),
    Row("independent", 10),
    Row("dropout", 1, 10, {"p": 0.1}),
    Row("dropout", 1, 10, ONE),
    Row("forward-only", 1, 10, {"p": 0.1}),
    Row("forward-only", 1, 10, ONE),
    Row("forward-only", 5, 5, MANY),
    Row("lora", 1, 4, ADAPTERS),
    Row("lora", 3, 4, ADAPTERS),
    Row("trajectory", 1, 5),
    Row("trajectory", 1, 10),
)

SEQUENCES_QUICK: tuple[Row, ...] = (
    Row("independent", 1),
    Row("independent", 2),
    Row("dropout", 1, 3, {"p": 0.1}),
    Row("forward-only", 1, 3, {"p": 0.1}),
    Row("lora", 1, 2, {"rank": 4, "epochs": 1, "lr": 1e-3}),
    Row("trajectory", 1, 3),
)

ROWS: dict[str, tuple[tuple[Row, ...], tuple[Row, ...]]] = {
    "tunes-transformer": (SEQUENCES, SEQUENCES_QUICK),
    "stdlib-gpt": (SEQUENCES, SEQUENCES_QUICK),
}
"""The rows of a setting, and those of its short form; a setting that is not listed takes FULL and QUICK."""


def rows_of(name: str, quick: bool = False) -> tuple[Row, ...]:
    """The rows a setting is compared on."""
    return ROWS.get(name, (FULL, QUICK))[quick]


_OPTIONS: dict[str, Mapping[str, Any]] = {"lora": ADAPTERS, "weight noise": {"scale": 0.6}}
_SHORT = {"noise": "weight noise"}


def parse(text: str) -> Row:
    """A row by its name on the command line.

    Args:
        text: the kind (independent, dropout, forward-only, lora, noise, trajectory), the models, and what is
            drawn from each: ``independent-5``, ``dropout-1x10``, ``trajectory-1x5``. Options follow after a colon:
            ``dropout-5x10:p=0.3``.

    Raises:
        ValueError: It is none of these.
    """
    found = re.fullmatch(r"([a-z -]+?)-(\d+)(?:x(\d+))?(?::(.+))?", text.strip().lower())
    kind = _SHORT.get(found[1], found[1]) if found else None
    if found is None or kind not in KINDS:
        raise ValueError(f"ensemble {text!r}: expected one such as independent-5, dropout-1x10, lora-1x4, noise-1x10")
    models, each = int(found[2]), int(found[3] or 1)
    options = dict(_OPTIONS.get(kind, {}))
    if kind in ("dropout", "forward-only"):
        options.update(ONE if models == 1 else MANY)
    for item in (found[4] or "").split(","):
        name, _, value = item.partition("=")
        if not item:
            continue
        if name not in options:
            raise ValueError(f"ensemble {text!r} has the option {name!r}; {kind} takes {sorted(options) or 'none'}")
        try:
            options[name] = type(options[name])(value)
        except ValueError:
            raise ValueError(f"ensemble {text!r}: {name} is {value!r}; expected a number") from None
    return Row(kind, models, each, options)


GRID: tuple[str, ...] = (
    "independent-1",
    "independent-5",
    "dropout-1x10",
    "forward-only-1x10",
    "lora-1x4",
    "noise-1x10",
    "trajectory-1x5",
)
"""The ensembles of a grid of methods, when none are named."""
