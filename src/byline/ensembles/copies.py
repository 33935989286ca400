"""Copies of models, also of those that torch itself does not copy.

``copy.deepcopy`` refuses tensors that are the result of a computation, and such tensors stand in modules: the weight
that ``weight_norm``, ``spectral_norm`` and ``prune`` compute anew before every forward pass, or what a forward pass
left behind. A copy may hold their numbers, but must never use them: no gradient flows through them, and they belong to
the weights that were there before.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

_LOOKS = ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "grad_fn", "layout")


class _Stale(Tensor):
    """A tensor that a forward pass left behind, or that the model computed once: may be replaced, not be read."""

    _where: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _LOOKS or func in (Tensor.size, Tensor.dim, Tensor.numel):
            return super().__torch_function__(func, types, args, kwargs or {})
        stale = next((a for a in _tensors((args, kwargs)) if isinstance(a, _Stale)), None)
        where = "a tensor" if stale is None else stale._where
        raise ValueError(
            f"the model reads {where}, which it computed from its parameters before it was copied, so that no gradient "
            "flows through it; expected it to be computed in every forward pass, or under torch.no_grad()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return stale(self, self._where)


def stale(value: Tensor, where: str) -> Tensor:
    """A tensor that refuses to be read, in one sentence."""
    out = value.detach().as_subclass(_Stale)
    out._where = where
    return out


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for one in value for t in _tensors(one)] if isinstance(value, list | tuple) else []


class _Detaching(TorchFunctionMode):
    """Copies tensors with a graph behind them without it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.places: dict[int, tuple[str, bool]] = {}
        for path, module in model.named_modules():
            computed = remade(module)
            for name, value in [*vars(module).items(), *module._buffers.items()]:
                if isinstance(value, Tensor) and not value.is_leaf:
                    # a buffer is part of the state, and so is its value; whence it came is no matter
                    kept = name in computed or name in module._buffers
                    self.places[id(value)] = f"{path}.{name}" if path else name, kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        value, memo = args[0], args[1]
        if id(value) not in memo:
            where, kept = self.places.get(id(value), ("", False))
            copied = value.detach().clone()
            memo[id(value)] = copied if kept else stale(copied, repr(where) if where else "a tensor that it keeps")
        return memo[id(value)]


def remade(module: nn.Module) -> set[str]:
    """The attributes that torch computes before every pass: ``weight_norm``, ``spectral_norm`` and ``prune``."""
    hooks = module._forward_pre_hooks.values()
    return {hook._tensor_name for hook in hooks if isinstance(hook, BasePruningMethod)} | {
        hook.name for hook in hooks if isinstance(hook, SpectralNorm | WeightNorm)
    }


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a model that shares nothing with it, in the same mode, with the same hooks.

    Args:
        model: any module.
        memo: of ``copy.deepcopy``: what stands for what, for copies that do share something.

    Raises:
        ValueError: the model cannot be copied, or its copy has other weights.
    """
    try:
        with _Detaching(model):
            made = copy.deepcopy(model, {} if memo is None else memo)
    except Exception as error:
        where = _culprit(model)
        raise ValueError(
            f"the model cannot be copied{f' ({where})' if where else ''}: {str(error).splitlines()[0]}; expected a "
            "module that copy.deepcopy copies, because members take turns on a copy"
        ) from error
    for parameter in made.parameters():
        if not parameter.is_leaf:
            # torch copies a ScriptModule's as the result of a computation on the model's own
            parameter.detach_().requires_grad_()
    own, new = model.state_dict(), made.state_dict()
    odd = [name for name in {**own, **new} if not _same(own.get(name), new.get(name))]
    shared = {p.data_ptr() for p in own.values() if isinstance(p, Tensor) and p.numel() and p.device.type != "meta"}
    if memo is None:
        odd += [n for n, p in new.items() if isinstance(p, Tensor) and p.numel() and p.data_ptr() in shared]
    if odd:
        raise ValueError(
            f"a copy of the model has other weights than the model, or the very same ones ({', '.join(odd[:4])}); "
            "expected copy.deepcopy(model) to be a model of its own with equal weights"
        )
    return made


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other)
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.device.type == "meta" or bool(((one == other) | ((one != one) & (other != other))).all())


def _culprit(model: nn.Module) -> str:
    """The attribute that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters"):
                continue
            try:
                with _Detaching(module):
                    copy.deepcopy(value)
            except Exception:
                return f"its {path}.{name}" if path else f"its {name}"
    return ""
