"""RANDOM scores, the baseline that every comparison needs.

    score(z, i) ~ N(0, 1), a function of (seed, member, z, i) alone, the mean over members

z and i are places in the test and the training set. The numbers come from splitmix64 (Steele, Lea & Flood 2014) on a
counter, so that none of them depends on which others are drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from byline.engines.local import Job
from byline.ensembles import Ensemble
from byline.ensembles.base import Member, check_seed
from byline.methods.base import Voter
from byline.methods.embedding import WithoutGradients
from byline.task import Task

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Random(WithoutGradients):
    """Seeded noise: what a measure says of it is what it says of nothing.

    Every member draws its own numbers, so an ensemble of M members has scores of variance 1/M. The model is never run.
    ``self_influence()`` is the diagonal of ``attribute(train_set)``: noise as well.

    Args:
        task: what is not explained.
        ensemble: who votes, on nothing; ``forward_only`` members too.
        seed: of the scores.
        **options: the other arguments of every method (`Attributor`), but ``features``, ``damping`` and ``params``.

    Raises:
        ValueError: a seed that is no int of at least 0, or one of those three.
    """

    def __init__(self, task: Task, ensemble: Ensemble, *, seed: int = 0, **options: Any):
        super().__init__(task, ensemble, **options)
        self.seed = check_seed(seed)

    def _check_members(self, members: list[Member]) -> None:
        """Any ensemble will do."""

    def _kept(self) -> dict[str, Any]:
        return {"kind": "random"}

    def _write(self) -> None:
        """There is nothing to compute."""

    def _votes(self, voter: Voter, job: Job, shared: set[str]) -> Iterator[tuple[int, int, Tensor]]:
        train = np.arange(self.n_train_, dtype=np.uint64)
        for start, stop in job.spans():
            yield start, stop, self._drawn(voter, np.arange(start, stop, dtype=np.uint64)[:, None], train)

    def _self(self, voter: Voter) -> Tensor:
        places = np.arange(self.n_train_, dtype=np.uint64)
        return self._drawn(voter, places, places)

    def _drawn(self, voter: Voter, z: NDArray[np.uint64], i: NDArray[np.uint64]) -> Tensor:
        text = f"{self.seed}/random/{voter.member.identity('residual')}"
        key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint64)[0]
        return torch.from_numpy(_normal(_mixed(_mixed(z + key) + i)).astype(np.float32))

    def info(self) -> dict[str, Any]:
        """Adds the seed."""
        return {**super().info(), "seed": self.seed}


def _mixed(counter: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's output at these counters."""
    with np.errstate(over="ignore"):
        x = (counter + np.uint64(1)) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _normal(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard normal numbers of 53 uniform bits each."""
    return ndtri(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
