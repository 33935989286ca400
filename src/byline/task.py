"""Task: a model, the output whose value is explained, and the loss it was trained with."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import logging
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from byline import outputs
from byline.batches import Batch
from byline.fingerprints import model_of, source_of
from byline.outputs import Evaluation, ExampleError, Output, PerExample, column, margin

__all__ = ["Evaluation", "ExampleError", "ParamFilter", "PerExample", "Task", "before_forward", "margin", "source_of"]

log = logging.getLogger("byline")

ParamFilter = Callable[[str], bool] | Iterable[str]

FINGERPRINTS = 2
"""How much fingerprints see; raised when they see more."""

before_forward: ContextVar[Callable[[], None]] = ContextVar("byline_before_forward", default=lambda: None)
"""Called before the task runs the model: what counts along a forward pass starts anew."""

_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")


class Task:
    """What is explained.

    Args:
        model: the module, in eval mode. Its trainable parameters (``requires_grad``) are the attributed ones. Of
            ``nn.DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` it is the model inside, whose
            parameters have no prefix.
        output: a name, ``f(model, batch) -> (B,)``, or an output such as `byline.Denoising`. A named output brings its
            usual loss:

            - classification: the margin ``log p/(1-p)`` of the label; cross-entropy. Batch ``(*inputs, labels)`` or
              a dict with ``labels``; the model gives logits (B, C).
            - binary: the margin of the label 0 or 1 by one logit, (B,) or (B, 1); binary cross-entropy with logits.
            - multi-label: the mean margin of labels (B, C), each 0 or 1; the mean binary cross-entropy with logits.
            - regression: the prediction, (B,) or (B, 1); squared error / 2.
            - multi-regression: minus the loss; the mean squared error / 2 over the numbers of targets (B, K).
            - language-modeling: the mean over the target tokens of the token margins; the mean token negative
              log-likelihood. A dict batch follows Hugging Face (``labels`` are shifted here, -100 is left out, and
              without ``labels`` the ``input_ids`` under ``attention_mask`` are the targets; ``position_ids`` count
              from the first token that is kept); a tuple ``(ids, targets)`` has its targets already aligned with the
              logits; a lone tensor of ids is shifted. Padding, on either side, changes nothing. Half-precision logits
              are read as float32.
            - masked-language-modeling, token-classification: the same means over the tokens whose label is not -100;
              nothing is shifted. Batches are dicts with ``labels`` or tuples that end in them.
            - seq2seq: the same over the labels of a decoder, which the model itself shifts for what its decoder reads.
            - denoising: minus the loss; the mean squared error of the predicted noise (`byline.Denoising`).

            What a model returns beside its logits is left alone where only one tensor has their form, and refused where
            more than one has; so are probabilities where logits are expected.
        loss: ``f(model, batch) -> (B,)``, the loss per example that training minimised. Without one, a callable
            output has the loss ``-output``.
        residual: ``f(model, batch) -> (B,)``, TRAK's Q for a callable output. Without one the output is read as a
            margin: ``1 - sigmoid(output)``.
        params: which parameters count: ``f(name) -> bool`` or glob patterns of names. All trainable ones by default. A
            parameter that has several names (a tied weight) counts where any of them is chosen.

    The residual of classification is ``1 - p``, of regression ``y - f``, of means over tokens or labels the mean of
    ``1 - p``, and 1 where the output is minus the loss: each is ``-∂ℓ/∂f`` (Park et al. 2023, TRAK, section 3).
    """

    def __init__(
        self,
        model: nn.Module,
        output: str | PerExample | Output = "classification",
        loss: PerExample | None = None,
        *,
        residual: PerExample | None = None,
        params: ParamFilter | None = None,
    ):
        model = unwrapped(model)
        _check_model(model)
        self._output = outputs.of(output)
        self._output.check(model)
        for name, value in (("loss", loss), ("residual", residual)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} is a {type(value).__name__}; expected a callable f(model, batch) -> (B,)")
        self.model = model
        self.name = self._output.name
        self._loss = loss
        self._residual = residual
        self._params = params if params is None or callable(params) or isinstance(params, str) else list(params)

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        """The attributed output of each example, (B,)."""
        before_forward.get()()
        return column(self._output.output(model, batch), batch, "output")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of each example, (B,)."""
        before_forward.get()()
        if self._loss is not None:
            return column(self._loss(model, batch), batch, "loss")
        return column(self._output.loss(model, batch), batch, "loss")

    def residual(self, model: nn.Module, batch: Batch) -> Tensor:
        """TRAK's Q of each example, (B,), without a gradient."""
        before_forward.get()()
        # with gradients on: without, some of torch's layers take a fused path, which masks and hooks do not reach
        with torch.enable_grad():
            said = self._output.residual if self._residual is None else self._residual
            return column(said(model, batch), batch, "residual").detach()

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
            value = -column(self._loss(model, batch), batch, "loss")
        value = column(value, batch, of)
        if self._residual is not None:
            residual = self.residual(model, batch)
        return value, column(residual, batch, "residual").detach()

    def with_model(self, model: nn.Module) -> Task:
        """The same task of another model, say a narrower one that is trained on the same examples.

        Args:
            model: the module, in eval mode.

        Raises:
            TypeError: if it is no module.
        """
        model = unwrapped(model)
        _check_model(model)
        self._output.check(model)
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
        return self._loss is None and self._output.likelihood

    @property
    def residual_varies(self) -> bool:
        """Whether it is known how the residual depends on the output: as that of a margin, or of a squared error."""
        return self._residual is None and self._output.residual_varies

    @property
    def own_loss(self) -> bool:
        """Whether the loss is the caller's callable."""
        return self._loss is not None

    @property
    def is_named(self) -> bool:
        """Whether both output and loss are byline's own code, which keeps examples apart."""
        return self._loss is None and type(self._output) in outputs.NAMED.values()

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

    def chosen(self) -> dict[str, nn.Parameter]:
        """The attributed parameters of the task's model: trainable, and chosen by one of their names.

        Raises:
            ValueError: none is left, a pattern matches no name, or a parameter has no real gradient.
        """
        if self._params is not None and not callable(self._params) and not isinstance(self._params, str):
            names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
            for pattern in self._params:
                if len(self._params) > 1 and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                    raise ValueError(
                        f"params has {pattern!r}, which matches no parameter of the model; expected patterns of names "
                        f"such as {', '.join(map(repr, names[:6]))}"
                    )
        params = chosen(self.model, self.selects)
        if not params:
            raise ValueError("no parameter is attributed: none is trainable and chosen by params=")
        odd = next((name for name, p in params.items() if p.is_complex()), None)
        if odd is not None:
            raise ValueError(
                f"parameter {odd!r} is {str(params[odd].dtype).removeprefix('torch.')}; expected real ones: keep its "
                "real and imaginary parts apart, or leave it out with params="
            )
        return params

    def fingerprint(self) -> dict[str, str]:
        """What identifies the task in a store: its model's structure and its output, loss and residual."""
        named = self._output
        function = named.function if isinstance(named, outputs.Called) else None
        called = [f for f in (function, self._loss, self._residual) if f is not None]
        counted = chosen(self.model, self.selects)
        structure = [model_of(self.model, called)] + [
            f"{name}{tuple(p.shape)}{p.dtype}{name in counted}" for name, p in self.model.named_parameters()
        ]
        parts = {
            "model": hashlib.sha256("\n".join(structure).encode()).hexdigest(),
            "output": named.describe() if function is None else source_of(function),
            # of numbers that a model makes as it runs
            "default dtype": str(torch.get_default_dtype()),
        }
        for key, function in (("loss", self._loss), ("residual", self._residual)):
            parts[key] = "default" if function is None else source_of(function)
        return parts

    def __repr__(self) -> str:
        count = sum(p.numel() for p in chosen(self.model, self.selects).values())
        return f"Task({type(self.model).__name__}, output={self.name!r}, {count:,} attributed parameters)"


def chosen(model: nn.Module, selects: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """The trainable parameters of which any name is chosen, by their first name; a tied weight has several."""
    names: dict[int, list[str]] = {}
    kept: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
            kept[id(parameter)] = parameter
    return {own[0]: kept[key] for key, own in names.items() if any(selects(name) for name in own)}


def unwrapped(model: Any) -> Any:
    """The model inside of what runs it elsewhere or otherwise, but gives the same: the wrappers of torch."""
    inside = model
    while True:
        dynamo = sys.modules.get("torch._dynamo.eval_frame")  # there if anything was compiled; not imported for this
        if isinstance(inside, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside = inside.module
        elif dynamo is not None and isinstance(inside, dynamo.OptimizedModule):
            inside = inside._orig_mod
        else:
            break
    if inside is not model:
        log.info("of a %s, the model inside (%s) is explained", type(model).__name__, type(inside).__name__)
    return inside


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    lazy = next((n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(f"parameter {lazy!r} has no shape yet; expected a lazy model to have run on a batch once")
    for name, module in model.named_modules():
        where = f"{name!r}" if name else "the model itself"
        if type(module).__module__.startswith(_QUANTISED):
            raise ValueError(
                f"the model has a quantised layer ({where}, {type(module).__name__}), which has no gradient; expected "
                "the model as it was before it was quantised"
            )
        # PEFT's layers: what is merged gets no gradient, and would only count as zeros
        if getattr(module, "merged_adapters", None):
            raise ValueError(
                f"the model has an adapter merged into its weights ({where}), which gets no gradient; call "
                "unmerge_adapter() on it first, or keep it merged with merge_and_unload() and explain its own weights"
            )
