"""The named benchmarks and their data."""

from byline.settings.base import BankRecipe, Setting
from byline.settings.digits import digits_mlp
from byline.settings.fashion import fashion_mlp
from byline.settings.resnet import fashion2_resnet9
from byline.settings.stdlib import stdlib_gpt
from byline.settings.tunes import tunes_transformer

_SETTINGS = {
    setting.name: setting for setting in (digits_mlp, fashion_mlp, fashion2_resnet9, tunes_transformer, stdlib_gpt)
}

__all__ = ["BankRecipe", "Setting", "get", "names"]


def names() -> list[str]:
    """The names of all settings, the quickest first."""
    return list(_SETTINGS)


def get(name: str) -> Setting:
    """The setting of this name.

    Raises:
        KeyError: If there is none; the message lists those there are.
    """
    if name not in _SETTINGS:
        raise KeyError(f"no setting {name!r}; there are {', '.join(names())}")
    return _SETTINGS[name]
