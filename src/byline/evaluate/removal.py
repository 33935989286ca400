"""Removal, addition, brittleness: retrain without the examples that scores call decisive, and see.

    removal(z, k) = f(z; all) - f(z; all but the k strongest of z)

beside the same for k random examples: scores are worth what they take beyond chance (Hooker et al. 2019's removal and
retraining, by example; Ilyas et al. 2022, "Datamodels", section 4.1). Addition is the mirror image: a random base set,
and the k strongest of z that are not in it. Brittleness is the share of test examples that were right and whose
prediction the removal turns (Ilyas et al. 2022; Park et al. 2023, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from byline import batches
from byline.batches import Batch
from byline.evaluate.measure import Measure, check_bootstrap, matrix_of, mean_interval
from byline.evaluate.retraining import HasOutput, TrainFn, retrain
from byline.scores import Scores
from byline.task import Task

_SOURCE = "Ilyas et al. 2022, Datamodels, section 4.1"


def removal_curve(
    scores: Any,
    train_fn: TrainFn,
    train_set: Any,
    *,
    test_set: Any,
    task: HasOutput,
    sizes: Sequence[int],
    examples: int | Sequence[int] = 10,
    seeds: int = 2,
    direction: str = "remove",
    side: str = "proponents",
    base: float = 0.5,
    path: str | Path | None = None,
    seed: int = 0,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    progress: bool = True,
) -> Measure:
    """How far the test output moves when its strongest training examples are taken out, or put in.

    Args:
        scores: `byline.Scores` or (n_test, n_train).
        train_fn: As `byline.retrain` takes it.
        train_set: Map-style dataset.
        test_set: Map-style dataset, in the order of the scores' rows.
        task: Its output is what moves.
        sizes: Numbers k of training examples.
        examples: Which test examples; the first so many.
        seeds: Models per set.
        direction: "remove" from the whole training set, or "add" to a random base set.
        side: "proponents", whose loss should lower the output, or "opponents".
        base: Size of the base set for "add", as a share of the training set.
        path: Where the retrained models' outputs are kept, and found again after a stop (see `byline.retrain`).
        seed: Of the models, the control and the resamples.
        bootstrap: Resamples of test examples; 0 for none.
        confidence: Of the interval.
        progress: Whether to show a bar.

    Returns:
        ``mean``, ``interval`` and ``per_example`` (n_examples,) are of the largest k: the move of the output in the
        direction the scores foretell, less the move for as many random examples. ``details``: ``sizes``, and per size
        ``moved`` and ``control`` (sizes, n_examples), ``means``, ``intervals``; ``examples``.

    Raises:
        ValueError: An argument out of range, or shapes that do not match.
    """
    values = matrix_of(scores)
    check_bootstrap(bootstrap, confidence)
    chosen, ks = _chosen(examples, values, test_set), _sizes(sizes, values.shape[1], direction, base)
    if direction not in ("remove", "add"):
        raise ValueError(f"direction is {direction!r}; expected 'remove' or 'add'")
    if side not in ("proponents", "opponents"):
        raise ValueError(f"side is {side!r}; expected 'proponents' or 'opponents'")
    masks = _masks(values[chosen], ks, direction, side, base, seed)
    bank = retrain(
        train_fn,
        train_set,
        test_set=torch.utils.data.Subset(test_set, chosen),
        task=task,
        subsets=masks,
        seeds=seeds,
        seed=seed,
        path=path,
        progress=progress,
    )
    outputs = bank.outputs.astype(np.float64).mean(1)
    own, random = _under(outputs, len(ks), len(chosen))
    moved, control = own - outputs[0], random - outputs[0]
    # taking proponents away, or putting opponents in, is foretold to lower the output
    sign = -1 if (direction == "remove") == (side == "proponents") else 1
    moved, control = sign * moved, sign * control
    gains = moved - control
    found = [mean_interval(gain, bootstrap, confidence, seed) for gain in gains]
    verb = "out of the training set" if direction == "remove" else f"into a random {base * 100:g} % of it"
    return Measure(
        name=f"{direction} {ks[-1]} {side}",
        mean=found[-1][0],
        interval=found[-1][1],
        per_example=gains[-1],
        protocol=f"Move of the test output, as foretold, with the {ks[-1]} strongest {side} taken {verb}, less the "
        f"move with as many random examples; {seeds} models each.",
        source=_SOURCE,
        details={
            "sizes": ks,
            "moved": moved,
            "control": control,
            "means": [mean for mean, _ in found],
            "intervals": [interval for _, interval in found],
            "examples": chosen,
        },
        confidence=confidence,
    )


def brittleness(
    scores: Any,
    train_fn: TrainFn,
    train_set: Any,
    *,
    test_set: Any,
    task: Task,
    sizes: Sequence[int],
    examples: int | Sequence[int] = 10,
    seeds: int = 2,
    path: str | Path | None = None,
    seed: int = 0,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    progress: bool = True,
) -> Measure:
    """Share of right predictions that turn when few training examples are removed.

    A prediction is right when the label's logit exceeds every other's, on the mean over seeds of that difference.

    Args:
        scores: `byline.Scores` or (n_test, n_train).
        train_fn: As `byline.retrain` takes it.
        train_set: Map-style dataset.
        test_set: Map-style dataset, in the order of the scores' rows.
        task: A classification task.
        sizes: Numbers k of the strongest proponents that are removed.
        examples: Which test examples; the first so many. Those that models of the whole training set get wrong are
            left out.
        seeds: Models per set.
        path: Where the retrained models' outputs are kept, and found again after a stop (see `byline.retrain`).
        seed: Of the models, the control and the resamples.
        bootstrap: Resamples of test examples; 0 for none.
        confidence: Of the interval.
        progress: Whether to show a bar.

    Returns:
        ``mean``: the share that turns at the largest k; ``per_example``: the smallest k tried that turns it, ``inf``
        where none does, NaN where the prediction was wrong to begin with. ``details``: ``sizes``, ``turned`` and
        ``control`` (shares per size, the control removing random examples), ``intervals``, ``examples``.

    Raises:
        ValueError: An argument out of range, shapes that do not match, or a task that is no classification.
    """
    if getattr(task, "name", None) != "classification":
        raise ValueError(f"task has the output {getattr(task, 'name', '?')!r}; brittleness needs 'classification'")
    values = matrix_of(scores)
    check_bootstrap(bootstrap, confidence)
    chosen, ks = _chosen(examples, values, test_set), _sizes(sizes, values.shape[1], "remove", 1.0)
    masks = _masks(values[chosen], ks, "remove", "proponents", 1.0, seed)
    bank = retrain(
        train_fn,
        train_set,
        test_set=torch.utils.data.Subset(test_set, chosen),
        task=_Lead(task),
        subsets=masks,
        seeds=seeds,
        seed=seed,
        path=path,
        progress=progress,
    )
    lead = bank.outputs.astype(np.float64).mean(1)
    right = lead[0] > 0
    own, random = _under(lead, len(ks), len(chosen))
    turned, control = own <= 0, random <= 0
    each = np.full(len(chosen), np.nan)
    for z in np.flatnonzero(right):
        hit = np.flatnonzero(turned[:, z])
        each[z] = ks[hit[0]] if len(hit) else np.inf
    shares = [mean_interval(np.where(right, t, np.nan).astype(float), bootstrap, confidence, seed) for t in turned]
    return Measure(
        name=f"brittleness at {ks[-1]}",
        mean=shares[-1][0],
        interval=shares[-1][1],
        per_example=each,
        protocol=f"Share of {int(right.sum())} right predictions that turn with the {ks[-1]} strongest proponents "
        f"removed; {seeds} models each.",
        source=f"{_SOURCE}; Park et al. 2023",
        details={
            "sizes": ks,
            "turned": [mean for mean, _ in shares],
            "intervals": [interval for _, interval in shares],
            "control": [float(c[right].mean()) if right.any() else float("nan") for c in control],
            "examples": chosen,
        },
        confidence=confidence,
    )


class _Lead:
    """The label's logit less the best other's, in place of a classification task's margin."""

    def __init__(self, task: Task) -> None:
        self.task, self.model = task, task.model

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self.task.natural(model, batch)[0][:, 0]
        label = self.task.targets(batch).reshape(-1, 1)
        own = logits.gather(1, label)[:, 0]
        return own - logits.scatter(1, label, float("-inf")).amax(1)

    def fingerprint(self) -> dict[str, str]:
        return {**self.task.fingerprint(), "output": "lead"}


def _chosen(examples: int | Sequence[int], values: np.ndarray, test_set: Any) -> list[int]:
    size = len(batches.as_dataset(test_set, "test_set"))
    if len(values) > size:
        raise ValueError(f"scores: has {len(values)} rows; test_set has {size} examples")
    found = list(range(min(examples, len(values)))) if isinstance(examples, int) else [int(i) for i in examples]
    if not found or not all(0 <= i < len(values) for i in found):
        raise ValueError(f"examples is {examples!r}; expected some from 0 to {len(values) - 1}")
    return found


def _sizes(sizes: Sequence[int], n_train: int, direction: str, base: float) -> list[int]:
    if not 0 < base <= 1 or (direction == "add" and not 0 < round(base * n_train) < n_train):
        raise ValueError(f"base is {base!r}; expected a share between 0 and 1 that leaves some examples to add")
    room = n_train - (round(base * n_train) if direction == "add" else 1)
    ks = sorted({int(k) for k in sizes})
    if not ks or ks[0] < 1 or ks[-1] > room:
        raise ValueError(f"sizes is {list(sizes)!r}; expected whole numbers from 1 to {room}")
    return ks


def _masks(values: np.ndarray, ks: list[int], direction: str, side: str, base: float, seed: int) -> np.ndarray:
    """The start, then for each k one set a test example, then for each k one random set."""
    n = values.shape[1]
    rng = np.random.default_rng([seed, 1])
    whole = np.ones(n, dtype=bool)
    if direction == "add":
        whole[:] = False
        whole[rng.choice(n, round(base * n), replace=False)] = True
    open_ = np.flatnonzero(whole if direction == "remove" else ~whole)
    ranked = open_[getattr(Scores(values[:, open_]).top(ks[-1]), side).indices]
    shuffled = rng.permutation(open_)
    masks = [whole]
    for k in ks:
        for top in ranked:
            masks.append(_with(whole, top[:k], direction))
    masks += [_with(whole, shuffled[:k], direction) for k in ks]
    return np.stack(masks)


def _with(whole: np.ndarray, places: np.ndarray, direction: str) -> np.ndarray:
    mask = whole.copy()
    mask[places] = direction == "add"
    return mask


def _under(outputs: np.ndarray, sizes: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """(sizes, examples) outputs of each test example under its own sets, and under the random ones."""
    here = np.arange(examples)
    own = np.stack([outputs[1 + i * examples + here, here] for i in range(sizes)])
    return own, outputs[1 + sizes * examples :]
