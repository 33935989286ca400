"""Scores that never saw trained weights of a setting's model: what an LDS owes to the data and the architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from byline.ensembles import Independent
from byline.features import Exact, Preconditioned
from byline.methods import TRAK
from byline.recommend import epochs_of
from byline.settings.base import Setting
from byline.training.ensembles import train_ensemble

NEAR = {
    "near": "Distance of inputs",
    "nearer": "Distance of inputs, half the width",
    "kernel ridge": "Kernel ridge regression on inputs",
}
"""Titles of what `nearness` finds."""
SEEDS = 10**6
"""Seeds of untrained models begin here: none of them grew into a model that votes."""


def untrained(setting: Setting, models: int = 5, seed: int = 0, test_set: Any = None) -> np.ndarray:
    """(n_test, n_train) TRAK's scores under models as they are before training.

    Args:
        setting: Whose models, features and data.
        models: How many vote.
        seed: Of their weights.
        test_set: Whose outputs are explained; the setting's when left out.
    """
    with torch.random.fork_rng(devices=[]):
        states = []
        for number in range(models):
            torch.manual_seed(SEEDS + 1000 * seed + number)
            states.append(setting.build().state_dict())
        task = setting.task()
    attributor = TRAK(
        task, Independent(states), features=setting.features(), progress=False, batch_size=setting.batch_size
    )
    return attributor.fit(setting.train_set).attribute(setting.test_set if test_set is None else test_set).values


def simplest(setting: Setting, seed: int = 0, test_set: Any = None) -> np.ndarray:
    """(n_test, n_train) TRAK's scores under the setting's simplest model, trained once for a third of the epochs.

    Its features are exact, of tokens in Adam's metric.

    Args:
        setting: Whose simplest model, recipe and data.
        seed: Of the training.
        test_set: Whose outputs are explained; the setting's when left out.

    Raises:
        ValueError: If the setting has no simpler model.
    """
    if setting.simplest is None:
        raise ValueError(f"{setting.name} has no simpler model")
    task = setting.task().with_model(setting.simplest().eval())
    recipe = replace(setting.recipe, epochs=epochs_of("short", setting.recipe.epochs))
    ensemble = train_ensemble(
        task, setting.train_set, recipe, models=1, build=setting.simplest, seed=seed, progress=False
    )
    exact = Exact(dtype="int8")
    features = exact if setting.output == "classification" else Preconditioned(exact)
    attributor = TRAK(task, ensemble, features=features, progress=False, batch_size=setting.batch_size)
    return attributor.fit(setting.train_set).attribute(setting.test_set if test_set is None else test_set).values


def nearness(setting: Setting) -> dict[str, np.ndarray]:
    """(n_test, n_train) scores from the distances of inputs alone, of a classification whose inputs are arrays.

    "near" and "nearer" are exp(-d² / h), with h the median d² and a quarter of it, where the labels are equal, and a
    share of its negative where they differ, in balance. "kernel ridge" is what each training example contributes to
    the prediction of a ridge regression on the labels with the kernel of "near", times how far it is from being
    fitted: H(z, i) (1 - f(i)), or -H(z, i) f(i) where the labels differ, with H = K(z, ·) (K + λ)⁻¹ and λ = 0.1.

    Args:
        setting: Whose data.
    """
    (x, y), (asked, labels) = (_arrays(data) for data in (setting.train_set, setting.test_set))
    distance, among = (torch.cdist(a.flatten(1), x.flatten(1)).square() for a in (asked, x))
    same = labels[:, None] == y[None]
    width = distance.median()
    found = {
        name: (torch.exp(-distance / h) * torch.where(same, 1.0, -1 / int(y.max()))).numpy()
        for name, h in (("near", width), ("nearer", width / 4))
    }
    kernel = torch.exp(-among / width)
    damped = kernel + 0.1 * torch.eye(len(kernel))
    hat = torch.linalg.solve(damped, torch.exp(-distance / width).T).T  # (n_test, n_train)
    target = torch.nn.functional.one_hot(y).to(kernel.dtype)
    error = target - kernel @ torch.linalg.solve(damped, target)  # (n_train, classes)
    return {**found, "kernel ridge": (hat * error[:, labels].T).numpy()}


def every(setting: Setting, test_set: Any = None) -> dict[str, Callable[[], np.ndarray]]:
    """What makes each kind of scores that a setting has, by its title.

    Args:
        setting: Whose.
        test_set: The first of its test examples, whose outputs are explained; all when left out.
    """
    count = len(setting.test_set if test_set is None else test_set)
    found = {"TRAK on 5 untrained models": lambda: untrained(setting, test_set=test_set)}
    if setting.simplest is not None:
        found["TRAK on the simplest model"] = lambda: simplest(setting, test_set=test_set)
    if setting.output == "classification":
        near = cache(partial(nearness, setting))  # all of them from the same distances
        found |= {title: partial(lambda name: near()[name][:count], name) for name, title in NEAR.items()}
    return found


def _arrays(data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of a dataset."""
    x, y = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(x).double(), torch.as_tensor(y)
