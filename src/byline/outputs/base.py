"""What outputs have in common: how a batch is taken apart, and what one forward pass says of each example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from byline import batches
from byline.batches import Batch
from byline.outputs.prediction import chosen

PerExample = Callable[[nn.Module, Batch], Tensor]

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


class ExampleError(ValueError):
    """Something is wrong with one example; ``position`` is its place in the batch."""

    def __init__(self, position: int, problem: str):
        super().__init__(f"example {position} of the batch: {problem}")
        self.position = position
        self.problem = problem


class Evaluation(NamedTuple):
    """What one forward pass says of each example."""

    output: Tensor
    """(B,) the attributed output f."""
    loss: Tensor
    """(B,) the training loss ℓ."""
    residual: Tensor
    """(B,) how far the training loss still pushes the output up: TRAK's Q."""


class Output:
    """One kind of output: subclasses say how a prediction and its target become f, ℓ and Q."""

    name: ClassVar[str]
    loss_follows_output: ClassVar[bool] = False
    """Whether -∇ℓ = Q ∇f holds exactly."""
    likelihood: ClassVar[bool] = True
    """Whether the loss is a negative log-likelihood whose natural parameters are known."""
    residual_varies: ClassVar[bool] = True
    """Whether Q depends on f: as that of a margin does, or of a squared error."""
    expects: ClassVar[str] = "one tensor"
    """What the model is to give, in words."""

    def check(self, model: nn.Module) -> None:
        """Refuse a model that was plainly trained on something else.

        Raises:
            ValueError: says what the model is, and which output is its own.
        """

    def split(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Inputs to the model (positional, by name) and the target."""
        if isinstance(batch, Mapping):
            key = next((k for k in _TARGET_KEYS if k in batch), None)
            inputs = {k: v for k, v in batch.items() if k != key}
            return (), inputs, None if key is None else batch[key]
        if isinstance(batch, tuple | list) and len(batch) >= 2:
            return tuple(batch[:-1]), {}, batch[-1]
        if isinstance(batch, tuple | list):
            return tuple(batch), {}, None
        return (batch,), {}, None

    def fits(self, prediction: Tensor, target: Any, batch: Batch) -> bool:
        """Whether a tensor has the form of the prediction; asked where a model gives several."""
        return True

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any, Batch]:
        """What the model says of the batch, the target, and the batch itself."""
        args, named, target = self.split(batch)
        returned = model(*args, **self.prepared(model, args, named, target))
        return chosen(returned, lambda t: self.fits(t, target, batch), self.name, self.expects), target, batch

    def prepared(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any], target: Any) -> dict[str, Any]:
        """What the model is given by name, after a look at whether it can take the batch."""
        return named

    def numbers(self, batch: Batch) -> int:
        """Numbers per example that the model's prediction takes, where that may be many; 0 otherwise."""
        return 0

    def evaluate(self, prediction: Tensor, target: Any, batch: Batch) -> Evaluation:
        """What the prediction says of each example."""
        raise NotImplementedError

    def evaluation(self, model: nn.Module, batch: Batch) -> Evaluation:
        """What `evaluate` says of the model's own prediction."""
        return self.evaluate(*self.predict(model, batch))

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        """F of each example."""
        return self.evaluation(model, batch).output

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """ℓ of each example."""
        return self.evaluation(model, batch).loss

    def residual(self, model: nn.Module, batch: Batch) -> Tensor:
        """Q of each example."""
        return self.evaluation(model, batch).residual

    def both(self, model: nn.Module, batch: Batch, of: str) -> tuple[Tensor, Tensor]:
        """f, or -ℓ where ``of`` is "loss", and Q."""
        evaluation = self.evaluation(model, batch)
        return (evaluation.output if of == "output" else -evaluation.loss), evaluation.residual

    def natural(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Natural parameters (B, T, C) of the likelihood, and weights (B, T) with ``ℓ = Σ_t w_t nll_t``."""
        raise NotImplementedError

    def relabelled(self, batch: Batch, labels: Tensor) -> Batch:
        """The batch with labels (B, T) that are aligned with `natural` in place of its own."""
        raise NotImplementedError

    def describe(self) -> str:
        """What identifies the output in a store."""
        return self.name


def column(value: Any, batch: Batch, name: str) -> Tensor:
    """One number per example, (B,).

    Raises:
        ValueError: it is anything else.
    """
    expected = batches.size(batch)
    if not isinstance(value, Tensor):
        raise ValueError(f"the task's {name} gave a {type(value).__name__}; expected a tensor of shape ({expected},)")
    if value.shape == (expected, 1):
        value = value.squeeze(1)
    if value.shape != (expected,):
        raise ValueError(
            f"the task's {name} has shape {tuple(value.shape)}; expected one number per example, ({expected},)"
        )
    return value


def is_column(value: Tensor, batch: Batch) -> bool:
    """Whether there is one number per example."""
    size = batches.size(batch)
    return value.shape in ((size,), (size, 1))


def with_target(batch: Batch, target: Tensor) -> Batch:
    """The batch with another target."""
    if isinstance(batch, Mapping):
        key = next((k for k in _TARGET_KEYS if k in batch), "labels")
        return {**batch, key: target}
    return (*batch[:-1], target)


def kind(value: Any) -> str:
    """What something is, for messages."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return "missing" if value is None else f"a {type(value).__name__}"
