"""RANDOM scores, the baseline that every comparison needs.

score(z, i) ~ N(0, 1), drawn from (seed, member, z), the mean over members
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from byline.engines.local import Job
from byline.ensembles import Ensemble
from byline.ensembles.base import Member, check_seed
from byline.features.base import seeded
from byline.methods.base import Voter
from byline.methods.embedding import EmbeddingMethod
from byline.task import Task


class Random(EmbeddingMethod):
    """Seeded noise: what a measure says of it is what it says of nothing.

    Args:
        task: what is not explained.
        ensemble: who votes, on nothing.
        seed: of the scores.
        **options: the other arguments of every method (`Attributor`), but those of gradients.
    """

    def __init__(self, task: Task, ensemble: Ensemble, *, seed: int = 0, **options: Any):
        self.seed = check_seed(seed)
        super().__init__(task, ensemble, **options)

    def _check_members(self, members: list[Member]) -> None:
        """Any ensemble will do."""

    def _kept(self) -> dict[str, Any]:
        return {"kind": "random"}

    def _write(self) -> None:
        """There is nothing to compute."""

    def _votes(self, voter: Voter, job: Job, shared: set[str]) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop in job.spans():
            yield start, stop, torch.stack([self._drawn(voter, z) for z in range(start, stop)])

    def _drawn(self, voter: Voter, example: int | str) -> Tensor:
        generator = seeded(self.seed, "random", voter.member.identity("residual"), example)
        return torch.randn(self.n_train_, generator=generator)

    def _self(self, voter: Voter) -> Tensor:
        return self._drawn(voter, "self")

    def _embedding_scorer(self, voter: Voter) -> Any:
        raise NotImplementedError
