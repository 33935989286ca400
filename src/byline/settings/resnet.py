"""`fashion2-resnet9`: the paper's CIFAR-2 with a ResNet-9, on two classes of Fashion-MNIST and narrowed for a CPU.

The network is trained without dropout. Its dropout layers stand there at rate 0, so that attribution can put masks
where training had none. On the files of CIFAR-10 and at width 64 it is the paper's own setting, CIFAR-2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from byline.settings import cifar, data
from byline.settings.base import BankRecipe, Setting, widened
from byline.settings.fashion import MEAN, STD
from byline.settings.mlp import linear
from byline.training import Recipe

WIDTH, FULL_WIDTH = 8, 64
TRAIN, TEST = 2000, 400
CIFAR_TRAIN, CIFAR_TEST = 5000, 500
PAIR = (2, 6)
"""Pullover and shirt: they look alike, and no default of the library was chosen on them."""


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return x + self.inner(x)


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def resnet9(width: int = WIDTH, channels: int = 1, classes: int = 2) -> nn.Sequential:
    """A residual network of eight convolutions and a linear layer (after He et al. 2016).

    Args:
        width: channels of the first convolution; 64 is the full width.
        channels: of the pictures.
        classes: number of logits.
    """
    w = width
    return nn.Sequential(
        convolution(channels, w),
        convolution(w, 2 * w, 5, 2, 2),
        Residual(convolution(2 * w, 2 * w), convolution(2 * w, 2 * w)),
        nn.Dropout(0.0),
        convolution(2 * w, 4 * w),
        nn.MaxPool2d(2),
        Residual(convolution(4 * w, 4 * w), convolution(4 * w, 4 * w)),
        nn.Dropout(0.0),
        convolution(4 * w, 2 * w, padding=0),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(2 * w, classes),
    )


def two_classes(images: np.ndarray, labels: np.ndarray, pair: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """The first pictures of two classes, (count, channels, height, width) float32 in [0, 1], and labels 0 and 1.

    Raises:
        ValueError: If there are fewer.
    """
    chosen = np.flatnonzero(np.isin(labels, pair))[:count]
    if len(chosen) < count:
        raise ValueError(f"the classes {pair} have {len(chosen)} pictures; expected {count}")
    x = torch.from_numpy(images[chosen].astype(np.float32) / 255)
    return x.unsqueeze(1) if x.ndim == 3 else x, torch.from_numpy((labels[chosen] == pair[1]).astype(np.int64))


def fashion2(images: data.Images) -> tuple[TensorDataset, TensorDataset]:
    """2000 training and 400 test pictures of pullovers and shirts."""
    parts = (images.train_images, images.train_labels, TRAIN), (images.test_images, images.test_labels, TEST)
    (x, y), (tx, ty) = (two_classes(i, n, PAIR, count) for i, n, count in parts)
    return TensorDataset((x - MEAN) / STD, y), TensorDataset((tx - MEAN) / STD, ty)


def load() -> tuple[TensorDataset, TensorDataset]:
    """The data from this machine; see `byline.settings.data.fashion_mnist` for where it is looked for."""
    return fashion2(data.fashion_mnist())


def load_cifar(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """5000 training and 500 test pictures of cats and dogs, standardised by channel."""
    read = cifar.cifar10(folder)
    x, y = two_classes(read.train_images, read.train_labels, cifar.CATS_AND_DOGS, CIFAR_TRAIN)
    tx, ty = two_classes(read.test_images, read.test_labels, cifar.CATS_AND_DOGS, CIFAR_TEST)
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return TensorDataset((x - mean) / std, y), TensorDataset((tx - mean) / std, ty)


def on_folder(setting: Setting, folder: Path) -> Setting:
    """The setting on CIFAR-10's binary release, or on IDX files, in a folder."""
    if not cifar.is_there(folder):
        images = data.mnist(folder)
        return replace(
            setting,
            description=f"{setting.description} Here with the pictures in {folder}.",
            load=lambda: fashion2(images),
            class_names=tuple(data.FASHION_CLASSES[label] for label in PAIR)
            if folder.resolve() == data.DEBIAN_FASHION
            else tuple(str(label) for label in PAIR),
        )
    build: Callable[..., nn.Module] = setting.build
    return replace(
        setting,
        description="The paper's CIFAR-2: cats and dogs of CIFAR-10, 5000 train and 500 test, a ResNet-9.",
        load=lambda: load_cifar(folder),
        build=partial(build, channels=3),
        simplest=partial(linear, 3 * 32 * 32, 2),
        image_shape=(3, 32, 32),
        class_names=("cat", "dog"),
    )


def at_width(setting: Setting, width: int) -> Setting:
    """The setting with another number of channels in the first convolution; 64 is the paper's."""
    return widened(setting, width)


fashion2_resnet9 = Setting(
    name="fashion2-resnet9",
    description="A narrow ResNet-9 without dropout in training, 2000 train and 400 test pullovers and shirts.",
    load=load,
    build=resnet9,
    recipe=Recipe(lr=0.05, momentum=0.9, batch_size=64, epochs=10, schedule="linear"),
    bank_recipe=BankRecipe(subsets=50, fraction=0.5, seeds=6),
    image_shape=(28, 28),
    pixel_range=(-MEAN / STD, (1 - MEAN) / STD),
    class_names=tuple(data.FASHION_CLASSES[label] for label in PAIR),
    on_folder=on_folder,
    width=WIDTH,
    at_width=at_width,
    simplest=partial(linear, 28 * 28, 2),
)
