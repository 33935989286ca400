"""`fashion-mlp`: the paper's MNIST-10 + MLP (arXiv 2405.17293), on Fashion-MNIST."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from byline.settings.base import Setting
from byline.settings.data import DEBIAN_FASHION, FASHION_CLASSES, Images, fashion_mnist, mnist
from byline.settings.mlp import at_width, linear, mlp
from byline.training import Recipe

TRAIN, TEST = 5000, 500
WIDTH = 128


# Mean and standard deviation of the pixels of the 60000 training images, in [0, 1]. The networks train
# faster on standardised pixels, and two models of one subset agree better than on pixels in [0, 1]: retraining
# is then reproducible enough to be a ground truth.
MEAN, STD = 0.2860, 0.3530


def flattened(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    """(n, height, width) uint8 images as (n, height·width) float32, standardised, with int64 labels."""
    x = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255)
    return TensorDataset((x - MEAN) / STD, torch.from_numpy(labels.astype(np.int64)))


def first(data: Images) -> tuple[TensorDataset, TensorDataset]:
    """The first 5000 training and the first 500 test images (the files are shuffled already)."""
    train = flattened(data.train_images[:TRAIN], data.train_labels[:TRAIN])
    return train, flattened(data.test_images[:TEST], data.test_labels[:TEST])


def load() -> tuple[TensorDataset, TensorDataset]:
    """The data from this machine; see `fashion_mnist` for where it is looked for."""
    return first(fashion_mnist())


def on_folder(setting: Setting, folder: Path) -> Setting:
    """The setting on the IDX files (the format of MNIST) of a folder."""
    images = mnist(folder)
    return replace(
        setting,
        description=f"{setting.description} Here with the images in {folder}.",
        load=lambda: first(images),
        class_names=FASHION_CLASSES if folder.resolve() == DEBIAN_FASHION else tuple(str(label) for label in range(10)),
    )


def build(width: int = WIDTH) -> nn.Module:
    """A 784-128-64-10 ReLU network with dropout 0.1."""
    return mlp(784, width, 10)


fashion_mlp = Setting(
    name="fashion-mlp",
    description="The paper's MLP (784-128-64-10) at its size, 5000 train and 500 test, on Fashion-MNIST.",
    load=load,
    build=build,
    recipe=Recipe(lr=0.01, momentum=0.9, batch_size=64, epochs=30),
    image_shape=(28, 28),
    pixel_range=(-MEAN / STD, (1 - MEAN) / STD),
    class_names=FASHION_CLASSES,
    on_folder=on_folder,
    width=WIDTH,
    at_width=at_width,
    simplest=partial(linear, 784, 10),
)
