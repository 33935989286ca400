"""CROSSFIT: members that each left out a known part of the training set, so that every example has some that never
saw it (cross-fitting: Schick 1986; Chernozhukov et al. 2018, "Double/debiased machine learning").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from byline.ensembles.base import Ensemble, Member, check_count, check_seed
from byline.ensembles.independent import Independent
from byline.ensembles.trajectory import Trajectory


class CrossFit(Ensemble):
    """Members of an ensemble, and which training examples each of them was trained on.

    Gradients and kernels are those of all training examples, as for every ensemble. What it adds is the residual Q: a
    model that has learnt an example by heart says nothing of what the example taught it, one that never saw it does.
    See ``residual=`` of the methods (`byline.methods.base.Attributor`).

    Args:
        base: the trained models: an ensemble such as `Trajectory`, a list of checkpoints (as of `Independent`), or a
            list of runs, each a list of checkpoints.
        trained_on: per run of ``base``, the positions in the training set that it was trained on, (k,) ints; as
            `folds` gives them. All checkpoints of a run, and all masks on it, have trained on the same.

    Raises:
        TypeError: ``base`` is none of these.
        ValueError: another number of runs, or positions that are not whole numbers of at least 0, each once.
            ``fit`` refuses positions beyond its training set.

    It nests: ``Dropout(CrossFit(...))``, ``CrossFit(Trajectory(...), trained_on)``. An ensemble added with ``+`` counts
    as trained on everything.
    """

    kind = "crossfit"

    def __init__(self, base: Any, trained_on: Sequence[Any]):
        if not isinstance(base, Ensemble):
            nested = isinstance(base, list | tuple) and base and all(isinstance(run, list | tuple) for run in base)
            base = Trajectory(base) if nested else Independent(base)
        self.base = base
        runs = list(dict.fromkeys(member.run for member in base.members()))
        if isinstance(trained_on, str) or not hasattr(trained_on, "__len__"):
            raise TypeError(f"trained_on is a {type(trained_on).__name__}; expected a list of positions for each run")
        if len(trained_on) != len(runs):
            raise ValueError(f"trained_on has {len(trained_on)} lists of positions; expected one per run, {len(runs)}")
        self.trained_on = [_positions(own, i) for i, own in enumerate(trained_on)]
        self._place = {run: place for place, run in enumerate(runs)}

    def members(self) -> list[Member]:
        """The members of the base, in its order."""
        return [replace(m, trained_on=self.trained_on[self._place[m.run]], _ids={}) for m in self.base.members()]

    def validate(self, model: nn.Module) -> None:
        """Validate the base."""
        self.base.validate(model)


def folds(length: int, parts: int = 2, repeats: int = 1, seed: int = 0) -> list[np.ndarray]:
    """Which training examples each model of a `CrossFit` is trained on: all but one fold.

    Args:
        length: of the training set.
        parts: folds per repeat, at least 2: each model leaves out one, so that 2 gives complementary halves.
        repeats: how often the training set is split anew.
        seed: of the splits.

    Returns:
        ``parts · repeats`` sorted arrays of positions. In each repeat every example is left out by one model.

    Raises:
        ValueError: an argument out of range.
    """
    for value, name in ((length, "length"), (parts, "parts"), (repeats, "repeats")):
        check_count(value, name)
    if not 2 <= parts <= length:
        raise ValueError(f"parts is {parts}; expected 2 to the number of training examples, {length}")
    generator = np.random.default_rng([check_seed(seed), 2])
    found = []
    for _ in range(repeats):
        cut = np.array_split(generator.permutation(length), parts)
        found += [np.sort(np.concatenate(cut[:i] + cut[i + 1 :])) for i in range(parts)]
    return found


def _positions(given: Any, run: int) -> np.ndarray:
    found = np.asarray(given)
    if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
        raise ValueError(
            f"trained_on[{run}] has shape {found.shape} and dtype {found.dtype}; expected positions, (k,) whole numbers"
        )
    found = np.sort(found.astype(np.int64))
    if found[0] < 0 or len(np.unique(found)) < len(found):
        raise ValueError(f"trained_on[{run}] has a position below 0 or twice; expected each once, from 0")
    return found
