"""Removal, addition, brittleness: retrain without the examples that scores call decisive, and see.

    removal(z, k) = f(z; all) - f(z; all but the k strongest of z)

beside the same for k random examples: scores are worth what they take beyond chance (counterfactual prediction in
Ilyas et al. 2022, "Datamodels: Predicting Predictions from Training Data", section 4.1; Park et al. 2023, "TRAK:
Attributing Model Behavior at Scale"). Addition is the mirror image: a random base set, and the k strongest of z that
are not in it. Brittleness is the share of test examples that were right and whose prediction the removal turns (Ilyas
et al. 2022, section 4.1).
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
from byline.evaluate.measure import Measure, check_bootstrap, is_whole, matrix_of, mean_interval
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
        side: "proponents", without which the output should fall, or "opponents".
        base: Size of the base set for "add", as a share of the training set.
        path: Where the retrained models' outputs are kept, and found again after a stop (see `byline.retrain`).
        seed: Of the models, the control and the resamples.
        bootstrap: Resamples of test examples; 0 for none.
        confidence: Of the interval.
        progress: Whether to show a bar.

    Returns:
        ``mean``, ``interval`` and ``per_example`` (n_examples,) are of the largest k: the move of the output in the
        direction the scores foretell, less the move for as many random examples, the same for all test examples.
        ``details``: ``sizes``; ``moved`` and ``control`` (sizes, n_examples), the moves themselves, positive in the
        direction foretold; for each size ``means`` and ``intervals`` of their difference, ``moved_means``,
        ``moved_intervals``, ``control_means``, ``control_intervals``; ``examples``. The intervals are over test
        examples: noise of training that all of them share (the random sets' models) is not in them.

    Raises:
        ValueError: An argument out of range, or shapes that do not match.
    """
    values = matrix_of(scores)
    check_bootstrap(bootstrap, confidence)
    if direction not in ("remove", "add"):
        raise ValueError(f"direction is {direction!r}; expected 'remove' or 'add'")
    if side not in ("proponents", "opponents"):
        raise ValueError(f"side is {side!r}; expected 'proponents' or 'opponents'")
    chosen = _chosen(examples, values, train_set, test_set)
    ks = _sizes(sizes, values.shape[1], direction, base)
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
    found, of_moved, of_control = (
        [mean_interval(values, bootstrap, confidence, seed) for values in rows] for rows in (gains, moved, control)
    )
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
            "moved_means": [mean for mean, _ in of_moved],
            "moved_intervals": [interval for _, interval in of_moved],
            "control_means": [mean for mean, _ in of_control],
            "control_intervals": [interval for _, interval in of_control],
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

    A prediction is right when the label's logit exceeds every other's, on the mean over seeds of that difference, so
    that is what the retrained models are asked for. The task's own output, log p/(1-p), would not do: with more than
    two classes it is negative for many a right prediction. A tie counts as turned.

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
        ``mean``: the share that turns at the largest k; ``per_example`` (n_examples,): the smallest k tried that turns
        it, NaN where none does or the prediction was wrong to begin with; ``left_out`` counts the latter alone.
        ``details``: ``sizes``; for each size ``turned`` and its ``intervals``, ``control`` (the shares that turn when
        as many random examples are removed) and ``control_intervals``; ``right`` (n_examples,) bool, right to begin
        with; ``lead`` (1 + sizes, n_examples), the logit differences, from the whole training set on; ``examples``.

    Raises:
        ValueError: An argument out of range, shapes that do not match, or a task that is no classification.
    """
    if getattr(task, "name", None) != "classification":
        raise ValueError(f"task has the output {getattr(task, 'name', '?')!r}; brittleness needs 'classification'")
    values = matrix_of(scores)
    check_bootstrap(bootstrap, confidence)
    chosen = _chosen(examples, values, train_set, test_set)
    ks = _sizes(sizes, values.shape[1], "remove", 1.0)
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
        each[z] = ks[hit[0]] if len(hit) else np.nan
    shares, by_chance = (
        [mean_interval(np.where(right, row, np.nan), bootstrap, confidence, seed) for row in rows]
        for rows in (turned.astype(float), control.astype(float))
    )
    return Measure(
        name=f"brittleness at {ks[-1]}",
        mean=shares[-1][0],
        interval=shares[-1][1],
        per_example=each,
        protocol=f"Share of {int(right.sum())} right predictions that turn with the {ks[-1]} strongest proponents "
        f"removed; {seeds} models each.",
        source=_SOURCE,
        details={
            "sizes": ks,
            "turned": [mean for mean, _ in shares],
            "intervals": [interval for _, interval in shares],
            "control": [mean for mean, _ in by_chance],
            "control_intervals": [interval for _, interval in by_chance],
            "right": right,
            "lead": np.concatenate([lead[:1], own]),
            "examples": chosen,
        },
        confidence=confidence,
        left_out=int((~right).sum()),
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


def _chosen(examples: int | Sequence[int], values: np.ndarray, train_set: Any, test_set: Any) -> list[int]:
    rows, columns = values.shape
    n_test, n_train = len(batches.as_dataset(test_set, "test_set")), len(batches.as_dataset(train_set, "train_set"))
    if rows > n_test or columns != n_train:
        raise ValueError(
            f"scores: got {values.shape}; train_set has {n_train} examples and test_set {n_test}, so expected "
            f"({n_test}, {n_train}), or fewer rows"
        )
    found = range(min(int(examples), rows)) if is_whole(examples, 1) else examples
    if (
        not isinstance(found, Sequence | np.ndarray)
        or not len(found)
        or not all(is_whole(i, 0, rows - 1) for i in found)
    ):
        raise ValueError(f"examples is {examples!r}; expected how many, or places from 0 to {rows - 1}")
    return [int(i) for i in found]


def _sizes(sizes: Sequence[int], n_train: int, direction: str, base: float) -> list[int]:
    if not 0 < base <= 1 or (direction == "add" and not 0 < round(base * n_train) < n_train):
        raise ValueError(f"base is {base!r}; expected a share between 0 and 1 that leaves some examples to add")
    room = n_train - (round(base * n_train) if direction == "add" else 1)
    if not isinstance(sizes, Sequence | np.ndarray) or not len(sizes) or not all(is_whole(k, 1, room) for k in sizes):
        raise ValueError(f"sizes is {sizes!r}; expected whole numbers from 1 to {room}")
    return sorted({int(k) for k in sizes})


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
