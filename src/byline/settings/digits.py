"""`digits-mlp`: the first minute. Needs no file and no network."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from byline.settings.base import Setting
from byline.settings.mlp import at_width, linear, mlp
from byline.training import Recipe

TRAIN, TEST = 1000, 200
WIDTH = 64


def load() -> tuple[TensorDataset, TensorDataset]:
    """1000 training and 200 test digits, (64,) float32 in [0, 1], drawn from scikit-learn's 1797."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(images))[: TRAIN + TEST]
    x = torch.from_numpy((images[chosen] / 16).astype(np.float32))
    y = torch.from_numpy(labels[chosen].astype(np.int64))
    return TensorDataset(x[:TRAIN], y[:TRAIN]), TensorDataset(x[TRAIN:], y[TRAIN:])


def build(width: int = WIDTH) -> nn.Module:
    """A 64-64-32-10 ReLU network with dropout 0.1."""
    return mlp(64, width, 10)


digits_mlp = Setting(
    name="digits-mlp",
    description="1000 handwritten digits, 8×8 pixels (scikit-learn), a 64-64-32-10 MLP: the first minute.",
    load=load,
    build=build,
    recipe=Recipe(lr=0.05, momentum=0.9, batch_size=50, epochs=30),
    image_shape=(8, 8),
    class_names=tuple("0123456789"),
    width=WIDTH,
    at_width=at_width,
    simplest=partial(linear, 64, 10),
)
