"""Class and subclass detection: do the strongest proponents share the test example's class?

A minimal requirement of an explanation by examples: those that support a prediction should be of its class, and, for a
model that was trained on merged classes, of its own subclass among them (Hanawa et al. 2021, "Evaluation of
Similarity-based Explanations": the identical class test and the identical subclass test, which look at the one
strongest; here at the k strongest).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from byline.evaluate.measure import Measure, check_bootstrap, is_whole, labels_of, matrix_of, mean_interval
from byline.scores import Scores

_TOP = 10
_SOURCE = "Hanawa et al. 2021"


def class_detection(
    scores: Any,
    train_labels: Any,
    test_labels: Any,
    k: int | None = None,
    *,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Measure:
    """The identical-class test.

    Args:
        scores: `byline.Scores` or (n_test, n_train).
        train_labels: (n_train,).
        test_labels: (n_test,), the labels whose outputs were attributed.
        k: How many of the strongest proponents are looked at; 10 when left out, 1 is the paper's test.
        bootstrap: Resamples of test examples; 0 for none.
        confidence: Of the interval.
        seed: Of the resamples.

    Returns:
        Mean share of the k strongest proponents with the test example's label; ``details``: the mean
        ``average_precision`` and ``roc_auc`` of the whole ranking, and ``chance``, the share a random ranking has.

    Raises:
        ValueError: Shapes that do not match, or k out of range.
    """
    values = matrix_of(scores)
    train = labels_of(train_labels, values.shape[1], "train_labels")
    test = labels_of(test_labels, values.shape[0], "test_labels")
    everyone = np.ones(values.shape, dtype=bool)
    return _detect("class detection", values, train, test, everyone, k, bootstrap, confidence, seed)


def subclass_detection(
    scores: Any,
    train_subclasses: Any,
    test_subclasses: Any,
    train_classes: Any = None,
    test_classes: Any = None,
    k: int | None = None,
    *,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Measure:
    """The identical-subclass test, for a model that was trained on merged classes and never saw the subclasses.

    Args:
        scores: `byline.Scores` or (n_test, n_train).
        train_subclasses: (n_train,).
        test_subclasses: (n_test,).
        train_classes: (n_train,) merged classes. With both classes given, only training examples of the test
            example's own class compete, so that finding the class alone counts for nothing.
        test_classes: (n_test,) merged classes.
        k: How many of the strongest proponents are looked at; 10 when left out, 1 is the paper's test.
        bootstrap: Resamples of test examples; 0 for none.
        confidence: Of the interval.
        seed: Of the resamples.

    Returns:
        As `class_detection`.

    Raises:
        ValueError: Shapes that do not match, k out of range, or one of the two classes alone.
    """
    values = matrix_of(scores)
    train = labels_of(train_subclasses, values.shape[1], "train_subclasses")
    test = labels_of(test_subclasses, values.shape[0], "test_subclasses")
    allowed = np.ones(values.shape, dtype=bool)
    if (train_classes is None) != (test_classes is None):
        raise ValueError("train_classes and test_classes: got one of them; expected both or none")
    if train_classes is not None:
        merged = labels_of(train_classes, values.shape[1], "train_classes")
        allowed = labels_of(test_classes, values.shape[0], "test_classes")[:, None] == merged[None]
    return _detect("subclass detection", values, train, test, allowed, k, bootstrap, confidence, seed)


def _detect(
    name: str,
    values: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    allowed: np.ndarray,
    k: int | None,
    bootstrap: int,
    confidence: float,
    seed: int,
) -> Measure:
    check_bootstrap(bootstrap, confidence)
    if k is None:
        k = _TOP
    if not is_whole(k, 1, values.shape[1]):
        raise ValueError(f"k is {k!r}; expected a whole number from 1 to the {values.shape[1]} training examples")
    each = np.full(len(values), np.nan)
    precision, auc, chance = (np.full(len(values), np.nan) for _ in range(3))
    for z, row in enumerate(values):
        places = np.flatnonzero(allowed[z])
        same = train[places] == test[z]
        if len(places) < k or not same.any():
            continue
        top = Scores(row[None, places]).top(k).proponents.indices[0]
        each[z], chance[z] = same[top].mean(), same.mean()
        if not same.all():
            precision[z] = average_precision_score(same, row[places])
            auc[z] = roc_auc_score(same, row[places])
    mean, interval = mean_interval(each, bootstrap, confidence, seed)
    kind = name.split()[0]
    among = "" if allowed.all() else " among the training examples of its merged class"
    return Measure(
        name=name,
        mean=mean,
        interval=interval,
        per_example=each,
        protocol=f"Share of the {k} strongest proponents{among} that have the test example's {kind}; test examples "
        f"with fewer than {k} candidates or none of their {kind} are left out.",
        source=_SOURCE,
        details={"average_precision": _mean(precision), "roc_auc": _mean(auc), "chance": _mean(chance)},
        confidence=confidence,
    )


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
