"""Task: a model, the output whose value is explained, and the loss it was trained with."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byline import batches, sequences
from byline.batches import Batch
from byline.fingerprints import model_of, source_of

PerExample = Callable[[nn.Module, Batch], Tensor]
ParamFilter = Callable[[str], bool] | Iterable[str]

FINGERPRINTS = 2
"""How much fingerprints see; raised when they see more."""

before_forward: ContextVar[Callable[[], None]] = ContextVar("byline_before_forward", default=lambda: None)
"""Called before the task runs the model: what counts along a forward pass starts anew."""

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


class Task:
    """What is explained.

    Args:
        model: the module, in eval mode. Its trainable parameters (``requires_grad``) are the attributed ones.
        output: ``"classification"``, ``"regression"``, ``"language-modeling"`` or ``f(model, batch) -> (B,)``.
            A named output brings its usual loss:

            - classification: the margin ``log p/(1-p)`` of the label; cross-entropy. Batch ``(*inputs, labels)`` or
              a dict with ``labels``; the model gives logits (B, C).
            - regression: the prediction, (B,) or (B, 1); squared error / 2.
            - language-modeling: the mean over the target tokens of the token margins; the mean token negative
              log-likelihood. A dict batch follows Hugging Face (``labels`` are shifted here, -100 is left out, and
              without ``labels`` the ``input_ids`` under ``attention_mask`` are the targets; ``position_ids`` count
              from the first token that is kept); a tuple ``(ids, targets)`` has its targets already aligned with the
              logits; a lone tensor of ids is shifted. Padding, on either side, changes nothing. Half-precision logits
              are read as float32.
        loss: ``f(model, batch) -> (B,)``, the loss per example that training minimised. Without one, a callable
            output has the loss ``-output``.
        residual: ``f(model, batch) -> (B,)``, TRAK's Q for a callable output. Without one the output is read as a
            margin: ``1 - sigmoid(output)``.
        params: which parameters count: ``f(name) -> bool`` or glob patterns of names. All trainable ones by default.

    The residual of classification is ``1 - p``, of regression ``y - f``, of language modelling the mean over target
    tokens of ``1 - p``: each is ``-∂ℓ/∂f`` (Park et al. 2023, TRAK, section 3).
    """

    def __init__(
        self,
        model: nn.Module,
        output: str | PerExample = "classification",
        loss: PerExample | None = None,
        *,
        residual: PerExample | None = None,
        params: ParamFilter | None = None,
    ):
        _check_model(model)
        if isinstance(output, str) and output not in _NAMED:
            raise ValueError(f"output is {output!r}; expected one of {sorted(_NAMED)} or a callable f(model, batch)")
        if not isinstance(output, str) and not callable(output):
            raise TypeError(f"output is a {type(output).__name__}; expected a name or a callable f(model, batch)")
        for name, value in (("loss", loss), ("residual", residual)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} is a {type(value).__name__}; expected a callable f(model, batch) -> (B,)")
        self.model = model
        self.name = output if isinstance(output, str) else "callable"
        self._output = _NAMED[output]() if isinstance(output, str) else _Called(output, loss, residual)
        self._loss = loss
        self._residual = residual
        self._params = params if params is None or callable(params) or isinstance(params, str) else list(params)

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        """The attributed output of each example, (B,)."""
        before_forward.get()()
        return _column(self._output.output(model, batch), batch, "output")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of each example, (B,)."""
        before_forward.get()()
        if self._loss is not None:
            return _column(self._loss(model, batch), batch, "loss")
        return _column(self._output.loss(model, batch), batch, "loss")

    def residual(self, model: nn.Module, batch: Batch) -> Tensor:
        """TRAK's Q of each example, (B,), without a gradient."""
        before_forward.get()()
        with torch.no_grad():
            if self._residual is not None:
                return _column(self._residual(model, batch), batch, "residual")
            return _column(self._output.residual(model, batch), batch, "residual")

    def differentiate(self, model: nn.Module, batch: Batch, of: str) -> tuple[Tensor, Tensor]:
        """What is differentiated, (B,), and the residual, (B,), from one forward pass where possible.

        Args:
            model: the member's model.
            batch: the examples.
            of: ``"output"`` for f, ``"loss"`` for -ℓ.
        """
        before_forward.get()()
        value, residual = self._output.both(model, batch, of)
        if of == "loss" and self._loss is not None:
            before_forward.get()()
            value = -_column(self._loss(model, batch), batch, "loss")
        value = _column(value, batch, of)
        if self._residual is not None:
            residual = self.residual(model, batch)
        return value, _column(residual, batch, "residual").detach()

    def with_model(self, model: nn.Module) -> Task:
        """The same task of another model, say a narrower one that is trained on the same examples.

        Args:
            model: the module, in eval mode.

        Raises:
            TypeError: if it is no module.
        """
        _check_model(model)
        other = copy.copy(self)
        other.model = model
        return other

    def choosing(self, params: ParamFilter) -> Task:
        """The same task on other parameters."""
        chosen = copy.copy(self)
        chosen._params = params if callable(params) or isinstance(params, str) else list(params)
        return chosen

    def natural(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the named loss is a negative log-likelihood of: its natural parameters, and how much each one weighs.

        Args:
            model: the member's model.
            batch: the examples.

        Returns:
            logits (B, T, C), or predictions (B, 1, 1) for regression; weights (B, T) with ``ℓ = Σ_t w_t nll_t``.
        """
        before_forward.get()()
        return self._output.natural(*self._output.predict(model, batch))

    def targets(self, batch: Batch) -> Any:
        """What the batch gives as the target: labels (B,), values, or None where it has none."""
        return self._output.split(batch)[2]

    def relabelled(self, batch: Batch, labels: Tensor) -> Batch:
        """The batch with the labels (B, T) in place of its own, aligned with the logits of `natural`."""
        return self._output.relabelled(batch, labels)

    def numbers(self, batch: Batch) -> int:
        """Numbers per example that one prediction takes where that may be many (tokens × vocabulary); else 0."""
        return self._output.numbers(batch)

    @property
    def has_likelihood(self) -> bool:
        """Whether the loss is that of a named output, so that its generalised Gauss-Newton matrix is known."""
        return self._loss is None and not isinstance(self._output, _Called)

    @property
    def own_residual(self) -> bool:
        """Whether the residual is the caller's callable."""
        return self._residual is not None

    @property
    def loss_follows_output(self) -> bool:
        """Whether -∇ℓ = Q ∇f holds exactly, so that one stored gradient serves both sides of every method."""
        return self._loss is None and self._residual is None and self._output.loss_follows_output

    def selects(self, name: str) -> bool:
        """Whether a parameter of this name is attributed."""
        if self._params is None:
            return True
        if callable(self._params):
            return bool(self._params(name))
        patterns = [self._params] if isinstance(self._params, str) else self._params
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    def fingerprint(self) -> dict[str, str]:
        """What identifies the task in a store: its model's structure and its output, loss and residual."""
        named = (getattr(self._output, "function", None), self._loss, self._residual)
        called = [function for function in named if function is not None]
        structure = [model_of(self.model, called)] + [
            f"{name}{tuple(p.shape)}{p.dtype}{p.requires_grad and self.selects(name)}"
            for name, p in self.model.named_parameters()
        ]
        parts = {
            "model": hashlib.sha256("\n".join(structure).encode()).hexdigest(),
            "output": self._output.describe(),
            # of numbers that a model makes as it runs
            "default dtype": str(torch.get_default_dtype()),
        }
        for key, function in (("loss", self._loss), ("residual", self._residual)):
            parts[key] = "default" if function is None else source_of(function)
        return parts

    def __repr__(self) -> str:
        count = sum(p.numel() for n, p in self.model.named_parameters() if p.requires_grad and self.selects(n))
        return f"Task({type(self.model).__name__}, output={self.name!r}, {count:,} attributed parameters)"


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")


def _column(value: Any, batch: Batch, name: str) -> Tensor:
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


class _Output:
    """One kind of output: subclasses say how a prediction and its target become f, ℓ and Q."""

    loss_follows_output = False

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

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any, Batch]:
        args, kwargs, target = self.split(batch)
        prediction = model(*args, **self.prepared(model, args, kwargs))
        if hasattr(prediction, "logits"):
            prediction = prediction.logits
        elif isinstance(prediction, Mapping) and "logits" in prediction:
            prediction = prediction["logits"]
        elif isinstance(prediction, tuple | list) and prediction:
            prediction = prediction[0]
        if not isinstance(prediction, Tensor):
            raise ValueError(
                f"the model gave a {type(prediction).__name__}; expected a tensor or an object with .logits"
            )
        return prediction, target, batch

    def prepared(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """What the model is given by name, after a look at whether it can take the batch."""
        return named

    def numbers(self, batch: Batch) -> int:
        """Numbers per example that the model's prediction takes, where that may be many; 0 otherwise."""
        return 0

    def evaluate(self, prediction: Tensor, target: Any, batch: Batch) -> Evaluation:
        raise NotImplementedError

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.evaluate(*self.predict(model, batch)).output

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.evaluate(*self.predict(model, batch)).loss

    def residual(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.evaluate(*self.predict(model, batch)).residual

    def both(self, model: nn.Module, batch: Batch, of: str) -> tuple[Tensor, Tensor]:
        evaluation = self.evaluate(*self.predict(model, batch))
        return (evaluation.output if of == "output" else -evaluation.loss), evaluation.residual

    def natural(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def relabelled(self, batch: Batch, labels: Tensor) -> Batch:
        raise NotImplementedError

    def describe(self) -> str:
        return next(name for name, kind in _NAMED.items() if isinstance(self, kind))


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``log p/(1-p)`` of the labels: their logit less the log-sum-exp of all others, over the last dimension."""
    index = labels.unsqueeze(-1)
    own = logits.gather(-1, index).squeeze(-1)
    others = logits.scatter(-1, index, float("-inf")).logsumexp(-1)
    return own - others


def _check_labels(labels: Tensor, classes: int, ignored: Tensor | None = None) -> None:
    if torch._C._functorch.is_batchedtensor(labels):
        return
    bad = (labels < 0) | (labels >= classes)
    if ignored is not None:
        bad &= ~ignored
    if bad.any():
        position = int(bad.nonzero()[0, 0])
        label = int(labels[tuple(bad.nonzero()[0])])
        raise ExampleError(position, f"label {label} is out of range; expected 0 to {classes - 1}")


class _Classification(_Output):
    loss_follows_output = True

    def evaluate(self, prediction: Tensor, target: Any, batch: Batch) -> Evaluation:
        if prediction.ndim != 2 or prediction.shape[1] < 2:
            raise ValueError(
                f"the model's logits have shape {tuple(prediction.shape)}; classification expects (batch, classes) "
                "with two classes or more"
            )
        if not isinstance(target, Tensor) or target.is_floating_point():
            raise ValueError(f"the labels are {_kind(target)}; classification expects a tensor of integer labels")
        labels = target.long()
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        if labels.shape != prediction.shape[:1]:
            raise ValueError(f"the labels have shape {tuple(target.shape)}; expected ({prediction.shape[0]},)")
        _check_labels(labels, prediction.shape[1])
        f = margin(prediction, labels)
        return Evaluation(f, F.softplus(-f), torch.sigmoid(-f.detach()))

    def natural(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return prediction.unsqueeze(1), prediction.new_ones(len(prediction), 1)

    def relabelled(self, batch: Batch, labels: Tensor) -> Batch:
        return _with_target(batch, labels[:, 0])


class _Regression(_Output):
    loss_follows_output = True

    def evaluate(self, prediction: Tensor, target: Any, batch: Batch) -> Evaluation:
        f = _column(prediction, batch, "prediction")
        if not isinstance(target, Tensor) or target.numel() != f.numel():
            raise ValueError(f"the targets are {_kind(target)}; regression expects one number per example")
        difference = f - target.reshape(f.shape).to(f.dtype)
        return Evaluation(f, difference.square() / 2, -difference.detach())

    def natural(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        f = _column(prediction, batch, "prediction")
        return f[:, None, None], torch.ones_like(f).unsqueeze(1)


class _LanguageModeling(_Output):
    def __init__(self) -> None:
        self._vocabulary = 0

    def prepared(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        found = sequences.problem(model, *sequences.inputs(args, named))
        if found is not None:
            raise ExampleError(*found)
        return sequences.placed(model, named)

    def numbers(self, batch: Batch) -> int:
        longest = max((t.shape[1] for t in batches.tensors(batch) if t.ndim > 1), default=1)
        return longest * self._vocabulary

    def _aligned(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the labels they predict, and the weight of each token in the mean."""
        if prediction.ndim != 3:
            raise ValueError(
                f"the model's logits have shape {tuple(prediction.shape)}; language-modeling expects "
                "(batch, tokens, vocabulary)"
            )
        self._vocabulary = prediction.shape[-1]
        if prediction.dtype in (torch.bfloat16, torch.float16):
            # the log-sum-exp of a vocabulary and a mean over tokens need more digits than these have
            prediction = prediction.float()
        logits, labels = prediction, target
        if isinstance(batch, Mapping) or target is None:
            labels = self._own_labels(batch) if target is None else target
            logits, labels = prediction[:, :-1], labels[:, 1:]
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if isinstance(mask, Tensor) and mask.shape == prediction.shape[:2]:
                # with padding on the left, it is a padding position that stands before the first token
                labels = labels.masked_fill(mask[:, :-1] == 0, -100)
        if labels.shape != logits.shape[:2]:
            raise ValueError(f"the labels have shape {tuple(labels.shape)}; expected {tuple(logits.shape[:2])}")
        labels = labels.long()
        ignored = labels == -100
        _check_labels(labels, logits.shape[-1], ignored)
        count = (~ignored).sum(1)
        if not torch._C._functorch.is_batchedtensor(count) and (count == 0).any():
            position = int((count == 0).nonzero()[0, 0])
            raise ExampleError(position, "has no target token (all are padding or -100); expected at least one")
        return logits, labels.masked_fill(ignored, 0), (~ignored).to(logits.dtype) / count.unsqueeze(1)

    def evaluate(self, prediction: Tensor, target: Any, batch: Batch) -> Evaluation:
        logits, labels, weight = self._aligned(prediction, target, batch)
        f = margin(logits, labels)
        return Evaluation(
            (f * weight).sum(1),
            (F.softplus(-f) * weight).sum(1),
            (torch.sigmoid(-f.detach()) * weight).sum(1),
        )

    def natural(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, _, weight = self._aligned(prediction, target, batch)
        return logits, weight

    def relabelled(self, batch: Batch, labels: Tensor) -> Batch:
        _, _, target = self.split(batch)
        if not isinstance(batch, Mapping) and target is not None:
            return _with_target(batch, labels.masked_fill(target == -100, -100))
        own = self._own_labels(batch) if target is None else target
        # the label of a token stands one place to its right, and the first token is never predicted
        shifted = torch.cat([labels.new_full((len(labels), 1), -100), labels], 1).masked_fill(own == -100, -100)
        if isinstance(batch, Mapping):
            return _with_target(batch, shifted)
        ids = batch if isinstance(batch, Tensor) else batch[0]
        return ids, torch.cat([shifted[:, 1:], shifted.new_full((len(ids), 1), -100)], 1)

    @staticmethod
    def _own_labels(batch: Batch) -> Tensor:
        if isinstance(batch, Mapping):
            ids = batch["input_ids"]
            mask = batch.get("attention_mask")
            return ids if mask is None else ids.masked_fill(mask == 0, -100)
        return batch[0] if isinstance(batch, tuple | list) else batch


class _Called(_Output):
    """An output given as ``f(model, batch)``; read as a margin where a probability is needed."""

    def __init__(self, output: PerExample, loss: PerExample | None, residual: PerExample | None):
        self.function = output

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.function(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return -self.function(model, batch)

    def residual(self, model: nn.Module, batch: Batch) -> Tensor:
        return torch.sigmoid(-self.function(model, batch))

    def both(self, model: nn.Module, batch: Batch, of: str) -> tuple[Tensor, Tensor]:
        value = self.function(model, batch)
        if not isinstance(value, Tensor):
            return value, value
        return value, torch.sigmoid(-value.detach())

    def describe(self) -> str:
        return source_of(self.function)


def _with_target(batch: Batch, target: Tensor) -> Batch:
    if isinstance(batch, Mapping):
        key = next((k for k in _TARGET_KEYS if k in batch), "labels")
        return {**batch, key: target}
    return (*batch[:-1], target)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return "missing" if value is None else f"a {type(value).__name__}"


_NAMED: dict[str, type[_Output]] = {
    "classification": _Classification,
    "regression": _Regression,
    "language-modeling": _LanguageModeling,
}
