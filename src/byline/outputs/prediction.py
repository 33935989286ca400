"""Which of the things that a model returns is its prediction, and which kind of model transformers says that it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def chosen(returned: Any, fits: Callable[[Tensor], bool], name: str, expects: str) -> Tensor:
    """The prediction among what a model returned; nothing is guessed.

    Args:
        returned: a tensor; an object or mapping with ``logits``; or a tuple or list, of which floating tensors
            count that have a dimension (a loss has none).
        fits: whether a tensor has the form of the prediction, asked of several.
        name: the output's.
        expects: what it expects, in words.

    Raises:
        ValueError: there is none, or more than one that might be it.
    """
    if isinstance(returned, Tensor):
        return returned
    if isinstance(returned, Mapping) and "logits" in returned:
        found = returned["logits"]
    else:
        found = getattr(returned, "logits", None)
    if isinstance(found, Tensor):
        return found
    advice = (
        "wrap the model in a module that returns that tensor alone, or pass output=lambda model, batch: … with what is "
        "to be explained"
    )
    if not isinstance(returned, tuple | list):
        inside = f" with {', '.join(map(str, returned))}" if isinstance(returned, Mapping) and returned else ""
        raise ValueError(
            f"the model gave a {type(returned).__name__}{inside}; expected a tensor or an object with .logits "
            f"({name} takes {expects}): {advice}"
        )
    tensors = [t for t in returned if isinstance(t, Tensor) and t.is_floating_point() and t.ndim]
    fitting = tensors if len(tensors) == 1 else [t for t in tensors if fits(t)]
    if len(fitting) == 1:
        return fitting[0]
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    came = f"floating tensors of shapes {shapes}" if tensors else "no floating tensor"
    which = "more than one of them" if fitting else "none of them"
    raise ValueError(
        f"the model gave a {type(returned).__name__} with {came}, and {which} can be what {name} expects, {expects}: "
        f"{advice}"
    )


def heads(model: nn.Module) -> set[str]:
    """Names of the classes of transformers (of what has a ``config``) in a model, itself included."""
    return {type(module).__name__ for module in model.modules() if hasattr(module, "config")}


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether transformers says that a model, or one inside it, is an encoder with a decoder."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return any(getattr(config, "is_encoder_decoder", False) is True for config in configs)


def head_of(model: nn.Module, *kinds: str) -> str | None:
    """The name of a class in the model that contains one of these words; None where there is none."""
    return next((name for name in sorted(heads(model)) if any(kind in name for kind in kinds)), None)
