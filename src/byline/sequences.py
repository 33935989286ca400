"""What sequence models expect of a batch: lengths, padding, vocabulary, positions.

Written for Hugging Face's decoder models, and recognised by what a model offers (``config``, ``get_input_embeddings``,
a ``position_ids`` argument), so that it costs other models nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100
"""The label of a token that is no target."""


def padded(items: Sequence[Mapping[str, Tensor]], pad: int = 0) -> dict[str, Tensor]:
    """Items of ``input_ids``, and ``labels`` where they have some, as a batch that is filled up on the right.

    Args:
        items: each (T,), T its own.
        pad: the token that fills up; the mask leaves it out.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, (B, T) each.
    """

    def filled(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value)

    ids = [item["input_ids"] for item in items]
    batch = {"input_ids": filled(ids, pad), "attention_mask": filled([torch.ones_like(row) for row in ids], 0)}
    if "labels" in items[0]:
        batch["labels"] = filled([item["labels"] for item in items], IGNORED)
    return batch


def context(model: nn.Module) -> int | None:
    """How many positions a model has room for; None where it does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def vocabulary(model: nn.Module) -> int | None:
    """How many tokens a model knows; None where it does not say."""
    try:
        found = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, int) else None


def problem(model: nn.Module, ids: Any, mask: Any) -> tuple[int, str] | None:
    """The place in the batch of an example that the model cannot take, and why; None where all is well.

    Args:
        model: the model.
        ids: (B, T) tokens.
        mask: (B, T), 0 on padding; None where nothing is padded.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or _is_mapped(ids):
        return None
    kept = mask if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids)
    lengths = (kept != 0).sum(1)
    if len(lengths) and not bool(lengths.all()):
        return int((lengths == 0).nonzero()[0, 0]), "is all padding (its attention_mask is 0 everywhere)"
    room = context(model)
    if room is not None and ids.shape[1] > room:
        return int(lengths.argmax()), (
            f"is {ids.shape[1]} tokens long with its padding, and the model's context is {room}; expected it to be "
            f"cut, as by byline.hf.dataset(..., max_length={room})"
        )
    known = vocabulary(model)
    odd = (ids < 0) | (ids >= known) if known is not None else None
    if odd is not None and bool(odd.any()):
        place = odd.nonzero()[0]
        return int(place[0]), (
            f"token {int(ids[tuple(place)])} is outside the model's vocabulary; expected 0 to {(known or 0) - 1} (does "
            "the tokenizer belong to the model?)"
        )
    return None


def placed(model: nn.Module, named: dict[str, Any]) -> dict[str, Any]:
    """A dict batch with ``position_ids`` (B, T) where the model takes them: counted from the first token that is kept.

    Left alone, models count from the left edge, padding included, and look up the positions once for the whole batch:
    an example's output would depend on how far its batch is padded on the left, and a position embedding's gradient
    would be summed over examples before it could be seen.
    """
    ids = named.get("input_ids")
    if "position_ids" in named or not isinstance(ids, Tensor) or ids.ndim != 2 or not _takes_positions(model):
        return named
    places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        before = ((mask != 0).cumsum(1) == 0).sum(1, keepdim=True)
        places = (places - before).clamp_min(0)
    return {**named, "position_ids": places}


def _takes_positions(model: nn.Module) -> bool:
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return hasattr(inner, "config") and _names_positions(inner.__class__)


@cache
def _names_positions(kind: Any) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


def _is_mapped(value: Tensor) -> bool:
    """Whether vmap runs, which cannot look at numbers."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def inputs(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, Any]:
    """Tokens and mask of a batch, taken apart."""
    return named.get("input_ids", args[0] if args else None), named.get("attention_mask")
