"""The network of the small settings, at any width."""

from __future__ import annotations

from torch import nn

from byline.settings.base import Setting, widened


def mlp(inputs: int, width: int, classes: int) -> nn.Module:
    """Two hidden layers of ReLUs, the second half as wide, dropout 0.1 after each."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(width, width // 2),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(width // 2, classes),
    )


def linear(inputs: int, classes: int) -> nn.Module:
    """Logits that are linear in the input."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))


def at_width(setting: Setting, width: int) -> Setting:
    """The setting with another number of units in the first hidden layer; an even one.

    Raises:
        ValueError: If it is odd.
    """
    if width % 2:
        raise ValueError(f"width is {width}; expected an even number, for the second layer has half as many units")
    said = f"{setting.description} Here with {width} and {width // 2} hidden units."
    return widened(setting, width, description=said)
