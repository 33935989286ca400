"""One forward pass watched: what the layers are given, where their outputs stand in autograd's graph, and who else
uses their weights.

A hook that does not fire (a compiled or scripted part, a functional call on a module's weight, hooks that the model
took off) leaves no gap without a word: every use of an attributed parameter that the graph shows and no watched call
explains is named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from byline.features.layers import Rule, conv1d_of_transformers, linear
from byline.swaps import swapped


@dataclass(frozen=True)
class Site:
    """Somewhere that parameters are used by a rule: a module, or a functional call on a weight."""

    key: str
    slots: Mapping[str, str]
    """What the rule calls them -> the parameters' names."""
    rule: Rule
    module: nn.Module | None = None
    joined: bool = False
    """Whether weight and bias may share a block."""


@dataclass
class Call:
    """One use of a site in a forward pass."""

    site: Site
    index: int
    """Which call of the site it is."""
    x: Tensor
    edge: Any
    shape: torch.Size
    """Of the output."""


@dataclass
class Trace:
    """What a forward pass showed."""

    calls: list[Call] = field(default_factory=list)
    windows: dict[str, list[tuple[int, int, Any]]] = field(default_factory=dict)
    """Per parameter: the spans of autograd's counter in which a watched call used it, and its output's node."""
    counts: dict[str, int] = field(default_factory=dict)
    half: bool = False
    """Whether a watched call gave half precision."""
    end: int | None = None
    """Where the model's own forward pass ended in autograd's counter; None where that is not seen."""

    def add(self, site: Site, x: Tensor, out: Tensor, start: int, stop: int) -> None:
        """Note a call."""
        self.half |= out.dtype in (torch.float16, torch.bfloat16)
        index = self.counts.get(site.key, 0)
        self.counts[site.key] = index + 1
        # the edge stays that of this output even if an in-place operation changes the tensor later
        edge = get_gradient_edge(out)
        self.calls.append(Call(site, index, x.detach(), edge, out.shape))
        for name in site.slots.values():
            self.windows.setdefault(name, []).append((start, stop, edge.node))


@contextmanager
def traced(
    model: nn.Module,
    sites: Sequence[Site],
    functional: Mapping[int, str] | None,
    spread: Collection[str],
    examples: int,
) -> Iterator[Trace]:
    """Watch the calls of these sites for as long as the context lasts.

    Args:
        model: the whole.
        sites: modules.
        functional: names by ``id`` of the parameters whose use by ``F.linear`` and ``matmul`` is watched too; None
            where there are none.
        spread: keys of modules whose output does not depend on the batch: it is repeated for every example, so that
            each has a gradient of its own.
        examples: how many rows the batch has.
    """
    trace = Trace()
    active: list[Site] = []
    began: list[int] = []

    def before(site: Site) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            active.append(site)
            began.append(_counter())

        return enter

    def after(site: Site) -> Callable[..., Tensor | None]:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor | None:
            active.pop()
            start = began.pop()
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(out, Tensor) or not out.requires_grad or not isinstance(x, Tensor):
                return None
            stop = _counter()
            if site.key not in spread:
                trace.add(site, x, out, start, stop)
                return None
            own, repeated = _repeated(x, examples), _repeated(out, examples)
            trace.add(site, own, repeated, start, stop)
            return repeated

        return leave

    def ended(*_: Any) -> None:
        trace.end = _counter()

    with ExitStack() as stack:
        if not isinstance(model, torch.jit.ScriptModule):  # it takes no hooks
            stack.callback(model.register_forward_hook(ended).remove)
        for site in sites:
            assert site.module is not None
            # ours are the last before the forward and the last after it: they see what it is given and what others see
            stack.callback(site.module.register_forward_pre_hook(before(site)).remove)
            stack.callback(site.module.register_forward_hook(after(site), with_kwargs=True).remove)
        if functional:
            stack.enter_context(_Functional(functional, trace, active))
        yield trace


def _repeated(t: Tensor, examples: int) -> Tensor:
    """(examples, ..) of a tensor that is the same for all of them."""
    t = t if t.ndim and t.shape[0] == 1 else t.unsqueeze(0)
    return t.expand(examples, *t.shape[1:]).clone()


def _counter() -> int:
    return int(torch.autograd._get_sequence_nr())


class _Functional(TorchFunctionMode):
    """Watches ``F.linear`` and ``matmul`` with a parameter as the weight, inside multi-head attention too."""

    def __init__(self, names: Mapping[int, str], trace: Trace, active: list[Site]):
        super().__init__()
        self.names, self.trace, self.active = names, trace, active

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            # its body calls linear by its global name, out of this mode's sight
            original = F.linear

            def watched(*a: Any, **k: Any) -> Tensor:
                return self._watched(linear, original, a, k)

            with swapped(F, "linear", watched):
                return func(*args, **kwargs)
        if func is F.linear:
            return self._watched(linear, func, args, kwargs)
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            return self._watched(conv1d_of_transformers, func, args, kwargs)
        return func(*args, **kwargs)

    def _watched(self, rule: Rule, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        weight, bias, x = given.get("weight", given.get("other")), given.get("bias"), given.get("input")
        name = self.names.get(id(weight))
        start = _counter()
        out = func(*args, **kwargs)
        if name is None or not isinstance(x, Tensor) or weight.ndim != 2 or not out.requires_grad:  # type: ignore[union-attr]
            return out
        if any(name in site.slots.values() for site in self.active):
            return out
        slots = {"weight": name}
        if id(bias) in self.names:
            slots["bias"] = self.names[id(bias)]
        self.trace.add(functional_site(slots, rule), x, out, start, _counter())
        return out


def functional_site(slots: Mapping[str, str], rule: Rule) -> Site:
    """The site of a weight that is used without its module."""
    return Site(f"{slots['weight']}()", dict(slots), rule)


@contextmanager
def repeated(
    model: nn.Module, forms: Mapping[str, int], params: Mapping[str, nn.Parameter], examples: int
) -> Iterator[dict[str, Tensor]]:
    """A copy per example in the place of some parameters, so that broadcasting gives each example its own gradient.

    Args:
        model: whose parameters are exchanged.
        forms: per parameter, how many dimensions of length 1 stand between the examples and its own; -1 where its
            first dimension, of length 1, becomes that of the examples.
        params: by name.
        examples: how many.

    Yields:
        the copies by name, leaves of autograd's graph.
    """
    leaves: dict[str, Tensor] = {}
    for name, ones in forms.items():
        parameter = params[name].detach()
        own = parameter if ones < 0 else parameter.reshape(1, *[1] * ones, *parameter.shape)
        # of one example it is the gradient as it is, and shapes of one need not broadcast as those of several
        own = own.expand(examples, *own.shape[1:]) if examples > 1 else parameter
        leaves[name] = own.clone().requires_grad_()
    with exchanged(model, {id(params[name]): leaf for name, leaf in leaves.items()}):
        yield leaves


@contextmanager
def exchanged(model: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters, by their ``id``, under whatever names a model holds them."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules() if tensors else ():
            for attribute, held in module._parameters.items():
                if held is not None and id(held) in tensors:
                    kept.append((module, attribute, held))
                    module._parameters[attribute] = tensors[id(held)]  # type: ignore[assignment]
        yield
    finally:
        for module, attribute, held in kept:
            module._parameters[attribute] = held
