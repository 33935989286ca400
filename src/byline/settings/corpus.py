"""Sequences of tokens as the data of a setting, with what is known of the owner of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.data import TensorDataset

from byline.features import Factorized
from byline.settings.base import BankRecipe
from byline.training import Recipe

IGNORED = -100
SEQUENCES: dict[str, Any] = {
    "recipe": Recipe(optimizer="adamw", lr=3e-3, batch_size=8, epochs=12, schedule="linear", weight_decay=0.01),
    "bank_recipe": BankRecipe(subsets=30, fraction=0.5, seeds=2),
    "output": "language-modeling",
    # exact rows of a transformer would be as wide as the model
    "features": partial(Factorized, 2048, "pca"),
    "batch_size": 64,
    "group": 1,
}
"""What the settings of small transformers have in common, as arguments of `Setting`."""
Owner = Mapping[str, str | int]
"""Whose an example is: plain data, such as a tune's collection and title."""


@dataclass(frozen=True)
class Corpus:
    """Training and test sequences.

    Attributes:
        train: Token ids of each training sequence, from its start token to its end token where it was not cut.
        test: Likewise.
        train_owners: What is known of each training sequence.
        test_owners: Likewise.
        vocabulary: Number of tokens.
        source: In a sentence, where the data were found and in which version.
    """

    train: Sequence[Sequence[int]] = field(repr=False)
    test: Sequence[Sequence[int]] = field(repr=False)
    train_owners: Sequence[Owner] = field(repr=False)
    test_owners: Sequence[Owner] = field(repr=False)
    vocabulary: int
    source: str

    def data(self, length: int) -> tuple[TensorDataset, TensorDataset]:
        """Training and test set; see `packed`."""
        return packed(self.train, length), packed(self.test, length)


def packed(sequences: Sequence[Sequence[int]], length: int) -> TensorDataset:
    """Sequences as (inputs, targets), both (n, length) int64: each token and the one after it.

    What goes beyond is cut. Shorter ones are padded on the right, with token 0 and with targets -100, which no loss
    counts; a causal model's outputs do not depend on what comes later.

    Args:
        sequences: at least two tokens each.
        length: of the inputs.

    Raises:
        ValueError: If a sequence has nothing to predict.
    """
    inputs = torch.zeros(len(sequences), length, dtype=torch.int64)
    targets = torch.full((len(sequences), length), IGNORED)
    for row, sequence in enumerate(sequences):
        if len(sequence) < 2:
            raise ValueError(f"sequence {row} has {len(sequence)} tokens; expected at least 2, the second to predict")
        kept = torch.tensor(sequence[: length + 1])
        inputs[row, : len(kept) - 1], targets[row, : len(kept) - 1] = kept[:-1], kept[1:]
    return TensorDataset(inputs, targets)
