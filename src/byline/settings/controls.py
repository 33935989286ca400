"""Scores that never saw a trained model of a setting: what an LDS owes to the data alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from byline.ensembles import Independent
from byline.features import Exact
from byline.methods import TRAK
from byline.recommend import SHORTER
from byline.settings.base import Setting
from byline.training.ensembles import train_ensemble


def untrained(setting: Setting, models: int = 5, seed: int = 0) -> np.ndarray:
    """(n_test, n_train) TRAK's scores under models as they are before training.

    Args:
        setting: Whose models, features and data.
        models: How many vote.
        seed: Of their weights.
    """
    states = []
    with torch.random.fork_rng(devices=[]):
        for number in range(models):
            torch.manual_seed(1000 * seed + number)
            states.append(setting.build().state_dict())
    attributor = TRAK(
        setting.task(), Independent(states), features=setting.features(), progress=False, batch_size=setting.batch_size
    )
    return attributor.fit(setting.train_set).attribute(setting.test_set).values


def simplest(setting: Setting, seed: int = 0) -> np.ndarray:
    """(n_test, n_train) TRAK's scores under the setting's simplest model, trained once for a third of the epochs.

    Args:
        setting: Whose simplest model, recipe and data.
        seed: Of the training.

    Raises:
        ValueError: If the setting has no simpler model.
    """
    if setting.simplest is None:
        raise ValueError(f"{setting.name} has no simpler model")
    task = setting.task().with_model(setting.simplest().eval())
    part, least = SHORTER["short"]
    epochs = setting.recipe.epochs
    recipe = replace(setting.recipe, epochs=max(epochs // part, min(least, epochs)))
    ensemble = train_ensemble(
        task, setting.train_set, recipe, models=1, build=setting.simplest, seed=seed, progress=False
    )
    attributor = TRAK(task, ensemble, features=Exact(), progress=False, batch_size=setting.batch_size)
    return attributor.fit(setting.train_set).attribute(setting.test_set).values
