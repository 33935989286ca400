"""The margin of a label, and what is not a logit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from byline import batches
from byline.outputs.base import ExampleError

# what passes numbers on without a change of them, by autograd's names
_MOVES = ("View", "Reshape", "Squeeze", "Unsqueeze", "Select", "Slice", "Transpose", "Permute", "T0", "TBackward",
          "Clone", "ToCopy", "Alias", "Expand", "Index", "Cat", "Stack", "Flatten", "Unbind", "Split")  # fmt: skip
_SQUASHES = {"Sigmoid": "a sigmoid", "Hardsigmoid": "a hard sigmoid", "Softmax": "a softmax"}


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``log p/(1-p)`` of the labels: their logit less the log-sum-exp of all others, over the last dimension."""
    index = labels.unsqueeze(-1)
    own = logits.gather(-1, index).squeeze(-1)
    others = logits.scatter(-1, index, float("-inf")).logsumexp(-1)
    return own - others


def check_labels(labels: Tensor, classes: int, ignored: Tensor | None = None) -> None:
    """Refuse labels that are no class, with the example's place.

    Raises:
        ExampleError: a label is out of range.
    """
    if batches.transformed():
        return
    bad = (labels < 0) | (labels >= classes)
    if ignored is not None:
        bad &= ~ignored
    if bad.any():
        position = int(bad.nonzero()[0, 0])
        label = int(labels[tuple(bad.nonzero()[0])])
        raise ExampleError(position, f"label {label} is out of range; expected 0 to {classes - 1}")


def signs(target: Tensor, like: Tensor) -> Tensor:
    """2y - 1 of targets 0 and 1, in the dtype and shape of the logits.

    Raises:
        ExampleError: a target is neither 0 nor 1.
    """
    if not batches.transformed():
        bad = (target != 0) & (target != 1)
        if bad.any():
            place = bad.nonzero()[0]
            found = target[tuple(place)].item()
            raise ExampleError(int(place[0]), f"target {found:g} is neither 0 nor 1, which is all that is expected")
    return 2 * target.reshape(like.shape).to(like.dtype) - 1


def refuse_probabilities(logits: Tensor, name: str) -> None:
    """Refuse the probabilities of a softmax; their logs are logits.

    Rows of real logits are never all of them non-negative with a sum of 1, once there are two or more.

    Raises:
        ValueError: says what to return in their place.
    """
    rows = logits.detach().flatten(0, -2) if not batches.transformed() else logits
    if batches.transformed() or len(rows) < 2 or not _sums_to_one(rows[:1]) or not _sums_to_one(rows):
        return
    if torch.equal(rows, rows[:1].expand_as(rows)):
        # a model that says the same of all may have logits such as 0 and 1
        return
    raise ValueError(
        f"the model gives probabilities (each row is non-negative and sums to 1), and {name} expects logits: return "
        "what goes into the softmax, or log-probabilities (log_softmax), whose margin is the same"
    )


def _sums_to_one(rows: Tensor) -> bool:
    tolerance = max(1e-4, 2 * torch.finfo(rows.dtype).eps)
    return bool((rows >= 0).all()) and bool(((rows.sum(-1, dtype=torch.float64) - 1).abs() <= tolerance).all())


def refuse_squashed(logits: Tensor, name: str) -> None:
    """Refuse probabilities of single labels: numbers within 0 and 1 that the model's last step was to squash there.

    Numbers alone do not tell: logits may all lie between 0 and 1.

    Raises:
        ValueError: says what to return in their place.
    """
    if batches.transformed():
        return
    last = _last_step(logits)
    what = next((words for key, words in _SQUASHES.items() if last.startswith(key)), None)
    if what is None or not bool(((logits >= 0) & (logits <= 1)).all()):
        return
    raise ValueError(
        f"the model ends in {what}, and {name} expects logits, the loss being binary cross-entropy with logits: return "
        "what goes into it (torch.logit undoes a sigmoid)"
    )


def _last_step(value: Tensor) -> str:
    """The name that autograd has for the last operation that made the numbers of a tensor."""
    node: Any = value.grad_fn
    while node is not None and node.name().startswith(_MOVES) and node.next_functions:
        node = node.next_functions[0][0]
    return "" if node is None else str(node.name())
