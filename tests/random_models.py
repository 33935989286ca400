"""A grammar of small models, and the scores that plain autograd gives them one example at a time.

A model is written as a `Spec`: what goes in, a tuple of pieces (``"linear:nobias"``, ``"gru:packed"``), what comes out,
and every size. Its repr is Python, so that a failure is reproduced with ``check(Spec(...))``. Nothing here looks at how
byline computes anything: the reference runs a batch of one example, asks autograd, and takes the documented equations.

By hand, as many as there is time for; every failure is made smaller and printed::

    PYTHONPATH=src:tests python tests/random_models.py --examples 5000 --seed 1
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, default_collate

import byline

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Spec:
    """A model, its data and how it is asked; small enough to be read, enough to make it again."""

    inputs: str
    pieces: tuple[str, ...]
    output: str = "classification"
    d: int = 3
    t: int = 3
    classes: int = 2
    vocab: int = 5
    side: int = 4
    n: int = 9
    batch: int = 4
    dtype: str = "float64"
    members: str = "one"
    features: str = "exact"
    seed: int = 0


class Finding(AssertionError):
    """What should not have happened: "wrong", "crash" or "refused", and the sentence that goes with it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


# ----------------------------------------------------------------------------------------------------------- the pieces


@dataclass(frozen=True)
class State:
    """What flows between pieces: "vec" (B, d), "seq" (B, T, d), "img" (B, C, H, W) or "tok" (B, T)."""

    kind: str
    shape: tuple[int, ...]
    spec: Spec
    ragged: bool = False  # as long as the longest of the batch: positions must not look at the padding
    tokens: nn.Module | None = None  # the embedding that a head may be tied to

    @property
    def d(self) -> int:
        return self.shape[0] if self.kind == "img" else self.shape[-1]

    def to(self, kind: str, *shape: int) -> State:
        return replace(self, kind=kind, shape=shape)


class Fn(nn.Module):
    """A piece: a function of itself, the stream and the context, with whatever holds its parameters."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, c: SimpleNamespace) -> Tensor:
        return self.function(self, x, c)


Built = tuple[nn.Module, State]
PIECES: dict[str, tuple[str, Callable[[State, str], Built], Callable[[State], bool]]] = {}


def piece(
    kinds: str, name: str, options: str = "", when: Callable[[State], bool] = lambda s: True
) -> Callable[[Callable[[State, str], Built]], Callable[[State, str], Built]]:
    """Register a piece for streams of these kinds; each option is a spelling of its own, ``name:option``."""

    def register(build: Callable[[State, str], Built]) -> Callable[[State, str], Built]:
        for option in options.split() or [""]:
            PIECES[f"{name}:{option}" if option not in ("", "-") else name] = (kinds, build, when)
        return build

    return register


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.7)


def fixed(s: State) -> bool:
    return not s.ragged


def even(s: State) -> bool:
    return s.d % 2 == 0


@piece("vec seq", "linear", "- nobias wide narrow")
def _linear(s: State, option: str) -> Built:
    out = {"wide": s.d + 1, "narrow": max(s.d - 1, 1)}.get(option, s.d)
    layer = nn.Linear(s.d, out, bias=option != "nobias")
    return Fn(lambda m, x, c: m.layer(x), layer=layer), s.to(s.kind, *s.shape[:-1], out)


@piece("vec seq img", "act", "relu tanh gelu relu_ silu")
def _act(s: State, option: str) -> Built:
    made = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "gelu": nn.GELU(), "relu_": nn.ReLU(inplace=True), "silu": nn.SiLU()}
    # a clone: an input may be what the caller still holds
    return Fn(lambda m, x, c: m.act(x.clone()), act=made[option]), s


class HandRMS(nn.Module):
    def __init__(self, d: int, plus: bool) -> None:
        super().__init__()
        self.weight, self.plus = nn.Parameter(torch.ones(d)), plus

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        return x * (1 + self.weight) if self.plus else self.weight * x


class HandLayerNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, keepdim=True, unbiased=False) + 1e-3).sqrt() * self.gain + self.shift


class ChannelFirst(nn.LayerNorm):
    """As ConvNeXt has it: channels are moved last, normalised, and moved back."""

    def forward(self, x: Tensor) -> Tensor:
        order = (0, *range(2, x.dim()), 1)
        back = (0, x.dim() - 1, *range(1, x.dim() - 1))
        return super().forward(x.permute(order)).permute(back)


@piece("vec seq", "norm", "layer layer_nobias layer_plain rms hand hand_plus hand_layer", lambda s: s.d > 1)
def _norm(s: State, option: str) -> Built:
    made = {
        "layer": lambda: nn.LayerNorm(s.d, eps=1e-3),
        "layer_nobias": lambda: nn.LayerNorm(s.d, eps=1e-3, bias=False),
        "layer_plain": lambda: nn.LayerNorm(s.d, eps=1e-3, elementwise_affine=False),
        "rms": lambda: nn.RMSNorm(s.d, eps=1e-3),
        "hand": lambda: HandRMS(s.d, False),
        "hand_plus": lambda: HandRMS(s.d, True),
        "hand_layer": lambda: HandLayerNorm(s.d),
    }
    return Fn(lambda m, x, c: m.norm(x), norm=made[option]()), s


@piece("vec seq", "bare", "scale bias matrix temperature list dict product einsum unused_half frozen_scale prior")
def _bare(s: State, option: str) -> Built:
    d = s.d
    if option == "scale":
        return Fn(lambda m, x, c: x * m.w, w=param(d)), s
    if option == "bias":
        return Fn(lambda m, x, c: x + m.w, w=param(d)), s
    if option == "matrix":
        return Fn(lambda m, x, c: x @ m.w, w=param(d, d)), s
    if option == "temperature":
        return Fn(lambda m, x, c: x / (m.w.exp() + 0.1), w=nn.Parameter(torch.tensor(0.3))), s
    if option == "list":
        parts = nn.ParameterList([param(d), param(d, d)])
        return Fn(lambda m, x, c: (x * m.w[0]) @ m.w[1], w=parts), s
    if option == "dict":
        return Fn(lambda m, x, c: x @ m.w["a"] + m.w["b"], w=nn.ParameterDict({"a": param(d, d), "b": param(d)})), s
    if option == "product":
        return Fn(lambda m, x, c: x + x @ (m.a @ m.b), a=param(d, 2), b=param(2, d)), s
    if option == "einsum":
        return Fn(lambda m, x, c: torch.einsum("...d,de->...e", x, m.w), w=param(d, d)), s
    if option == "unused_half":
        return Fn(lambda m, x, c: x * m.w[: x.shape[-1]], w=param(2 * d), never=param(3)), s
    if option == "frozen_scale":
        return Fn(lambda m, x, c: x * m.w * m.v, w=nn.Parameter(param(d).data, requires_grad=False), v=param(d)), s
    return Fn(lambda m, x, c: x + m.w.pow(2).sum(), w=param(d, 2)), s


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.clamp(-0.4, 0.4), self.bias)


class Unit(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return super().forward(x) * 0 + F.linear(x, weight, self.bias)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + x


class Rescaled(nn.Linear):
    """An equalised learning rate: the parent's forward sees another weight's scale."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5) - 0.5 * (self.bias if self.bias is not None else 0)


@piece("vec seq", "subclass", "clamped unit standardised doubled rescaled")
def _subclass(s: State, option: str) -> Built:
    made = {"clamped": Clamped, "unit": Unit, "standardised": Standardised, "doubled": Doubled, "rescaled": Rescaled}
    return Fn(lambda m, x, c: m.layer(x), layer=made[option](s.d, s.d)), s


@piece(
    "vec seq", "weights", "outside outside_too sum bias_too transposed weight_norm spectral orthogonal cosine buffer"
)
def _weights(s: State, option: str) -> Built:
    layer = nn.Linear(s.d, s.d)
    if option == "outside":
        return Fn(lambda m, x, c: F.linear(x, m.layer.weight, m.layer.bias), layer=layer), s
    if option == "outside_too":
        return Fn(lambda m, x, c: m.layer(x).tanh() + F.linear(x, m.layer.weight), layer=layer), s
    if option == "sum":
        return Fn(lambda m, x, c: m.layer(x) * m.layer.weight.pow(2).sum(), layer=layer), s
    if option == "bias_too":
        return Fn(lambda m, x, c: m.layer(x + m.layer.bias), layer=layer), s
    if option == "transposed":
        return Fn(lambda m, x, c: F.linear(m.layer(x).tanh(), m.layer.weight.t()), layer=layer), s
    if option == "weight_norm":
        return Fn(lambda m, x, c: m.layer(x), layer=parametrizations.weight_norm(layer)), s
    if option == "spectral":
        return Fn(lambda m, x, c: m.layer(x), layer=parametrizations.spectral_norm(layer)), s
    if option == "orthogonal":
        return Fn(lambda m, x, c: m.layer(x), layer=parametrizations.orthogonal(layer)), s
    if option == "cosine":
        return Fn(lambda m, x, c: F.normalize(x, dim=-1) @ F.normalize(m.layer.weight, dim=-1).t(), layer=layer), s
    made = Fn(lambda m, x, c: m.layer(x) @ m.mix, layer=layer)
    made.register_buffer("mix", torch.randn(s.d, s.d))
    return made, s


@piece("vec seq", "reuse", "twice thrice residual parallel other_shape tied alias nested chunk concat lora detach")
def _reuse(s: State, option: str) -> Built:
    layer, d = nn.Linear(s.d, s.d), s.d
    if option == "twice":
        return Fn(lambda m, x, c: m.layer(m.layer(x).tanh()), layer=layer), s
    if option == "thrice":
        return Fn(lambda m, x, c: m.layer(m.layer(m.layer(x).tanh()) + x), layer=layer), s
    if option == "residual":
        return Fn(lambda m, x, c: x + m.layer(x), layer=layer), s
    if option == "parallel":
        return Fn(lambda m, x, c: m.layer(x) * m.layer(-x).tanh(), layer=layer), s
    if option == "other_shape":
        return Fn(lambda m, x, c: m.layer(x) + m.layer(x.unsqueeze(1)).tanh().squeeze(1), layer=layer), s
    if option == "tied":
        other = nn.Linear(d, d)
        other.weight = layer.weight
        return Fn(lambda m, x, c: m.other(m.layer(x).tanh()), layer=layer, other=other), s
    if option == "alias":
        return Fn(lambda m, x, c: m.second(m.layer(x).tanh()), layer=layer, second=layer), s
    if option == "nested":
        inner = nn.Sequential(layer, nn.Tanh(), nn.Sequential(nn.Linear(d, d), nn.Tanh()), layer)
        return Fn(lambda m, x, c: m.inner(x), inner=inner), s
    if option == "chunk":
        return Fn(lambda m, x, c: m.layer(x).chunk(2, -1)[0].tanh() * m.layer(x).chunk(2, -1)[1].sigmoid(),
                  layer=nn.Linear(d, 2 * d)), s  # fmt: skip
    if option == "concat":
        return Fn(lambda m, x, c: m.layer(torch.cat([x, x.tanh()], -1)), layer=nn.Linear(2 * d, d)), s
    if option == "lora":
        layer.requires_grad_(False)
        return Fn(lambda m, x, c: m.layer(x) + (x @ m.a) @ m.b, layer=layer, a=param(d, 2), b=param(2, d)), s
    return Fn(lambda m, x, c: m.layer(x) + m.layer(x).detach() * x, layer=layer), s


@piece("vec seq", "frozen", "all weight bias no_grad after_no_grad")
def _frozen(s: State, option: str) -> Built:
    layer = nn.Linear(s.d, s.d)

    def shut(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
        with torch.no_grad():
            x = m.layer(x)
        return x

    if option == "all":
        layer.requires_grad_(False)
    elif option in ("weight", "bias"):
        getattr(layer, option).requires_grad_(False)
    else:
        after = nn.Linear(s.d, s.d) if option == "after_no_grad" else nn.Identity()
        return Fn(lambda m, x, c: m.after(shut(m, x, c)), layer=layer, after=after), s
    return Fn(lambda m, x, c: m.layer(x), layer=layer), s


def _double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2 + 0.1


def _inwards(module: nn.Module, inputs: Any) -> tuple[Tensor, ...]:
    return (inputs[0].tanh() * 1.5,)


@piece("vec seq", "hook", "output input both inplace")
def _hook(s: State, option: str) -> Built:
    layer = nn.Linear(s.d, s.d)
    if option in ("output", "both"):
        layer.register_forward_hook(_double)
    if option in ("input", "both"):
        layer.register_forward_pre_hook(_inwards)
    if option == "inplace":
        layer.register_forward_hook(lambda module, inputs, output: output.mul_(3))
    return Fn(lambda m, x, c: m.layer(x), layer=layer), s


def _autocast(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.layer(x)
    return y.to(x.dtype)


@piece("vec seq", "inside", "checkpoint checkpoint_block autocast")
def _inside(s: State, option: str) -> Built:
    layer = nn.Linear(s.d, s.d)
    if option == "autocast":
        return Fn(_autocast, layer=layer), s
    if option == "checkpoint_block":
        layer = nn.Sequential(layer, nn.LayerNorm(s.d, eps=1e-3), nn.Tanh(), nn.Linear(s.d, s.d))
    return Fn(lambda m, x, c: checkpoint(m.layer, x, use_reentrant=False), layer=layer), s


def _set(h: Tensor) -> Tensor:
    h[..., 0] = 0.5
    return h


def _plus(h: Tensor, x: Tensor) -> Tensor:
    h += x
    return h


@piece("vec seq", "inplace", "relu add mul set plus norm_mul")
def _inplace(s: State, option: str) -> Built:
    after: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "relu": lambda h, x: h.relu_(),
        "add": lambda h, x: h.add_(1),
        "mul": lambda h, x: h.mul_(2),
        "set": lambda h, x: _set(h),
        "plus": _plus,
        "norm_mul": lambda h, x: h.mul_(2),
    }
    layer = nn.LayerNorm(s.d, eps=1e-3) if option == "norm_mul" else nn.Linear(s.d, s.d)
    return Fn(lambda m, x, c: after[option](m.layer(x), x), layer=layer), s


@piece("vec seq", "dropout", "module functional zero after_linear")
def _dropout(s: State, option: str) -> Built:
    if option == "functional":
        return Fn(lambda m, x, c: F.dropout(m.layer(x), 0.3, m.training), layer=nn.Linear(s.d, s.d)), s
    if option == "after_linear":
        return Fn(lambda m, x, c: m.layer(x).tanh(), layer=nn.Sequential(nn.Linear(s.d, s.d), nn.Dropout(0.4))), s
    return Fn(lambda m, x, c: m.drop(x), drop=nn.Dropout(0.0 if option == "zero" else 0.3)), s


def _siamese(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    a, b = m.layer(torch.cat([x, x.tanh()], 0)).chunk(2, 0)
    return a * b.sigmoid()


def _copies(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    k = m.shifts.shape[0]
    many = x.repeat_interleave(k, 0)
    many = many + m.shifts.repeat(len(x), *([1] * (x.dim() - 2)), 1).view(len(many), *([1] * (x.dim() - 2)), -1)
    return m.layer(many).tanh().view(len(x), k, *x.shape[1:]).mean(1)


def _tiled(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    return m.layer(x.repeat(3, *([1] * (x.dim() - 1)))).tanh().view(3, len(x), *x.shape[1:]).sum(0)


def _sorted(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    order = x.flatten(1).sum(1).argsort()
    return m.layer(x[order]).tanh()[order.argsort()]


def _halves(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    k = (len(x) + 1) // 2
    return torch.cat([m.layer(part) for part in (x[:k], x[k:]) if len(part)])


@piece("vec seq", "layout",
       "lead examples examples_one siamese copies tiled sorted halves flipped last_first expand stride")  # fmt: skip
def _layout(s: State, option: str) -> Built:
    layer = nn.Linear(s.d, s.d)
    if option == "lead":
        return Fn(lambda m, x, c: m.layer(x[None])[0], layer=layer), s
    if option == "examples":
        return Fn(lambda m, x, c: torch.stack([m.layer(row) for row in x]), layer=layer), s
    if option == "examples_one":
        return Fn(lambda m, x, c: torch.cat([m.layer(row[None]) for row in x]), layer=layer), s
    if option == "siamese":
        return Fn(_siamese, layer=layer), s
    if option == "copies":
        return Fn(_copies, layer=layer, shifts=param(s.spec.t, s.d)), s
    if option == "tiled":
        return Fn(_tiled, layer=layer), s
    if option == "sorted":
        return Fn(_sorted, layer=layer), s
    if option == "halves":
        return Fn(_halves, layer=layer), s
    if option == "flipped":
        return Fn(lambda m, x, c: m.layer(x.flip(0)).flip(0), layer=layer), s
    if option == "last_first":
        return Fn(lambda m, x, c: m.layer(x.movedim(0, -2)).movedim(-2, 0), layer=layer), s
    if option == "expand":  # (K, B, …): a small ensemble inside the model
        return Fn(lambda m, x, c: (m.layer(x.expand(2, *x.shape)) * m.w.view(2, *([1] * x.dim()))).sum(0),
                  layer=layer, w=param(2)), s  # fmt: skip
    return Fn(lambda m, x, c: m.layer(torch.stack([x, -x], 1).flatten(0, 1))[::2], layer=layer), s


def _experts(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    chosen = (flat @ m.router.to(flat)).argmax(-1)
    out = torch.zeros_like(flat)
    for e, expert in enumerate(m.experts):
        rows = (chosen == e).nonzero().squeeze(1)
        if len(rows):
            out[rows] = expert(flat[rows])
    return out.view(x.shape)


def _top_experts(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    weight, chosen = m.gate(flat).softmax(-1).topk(2, -1)
    out = torch.zeros_like(flat)
    for e, expert in enumerate(m.experts):
        row, slot = (chosen == e).nonzero(as_tuple=True)
        out.index_add_(0, row, expert(flat[row]) * weight[row, slot, None])
    return out.view(x.shape)


def _soft_experts(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    return (torch.stack([e(x) for e in m.experts], -1) * m.gate(x).softmax(-1).unsqueeze(-2)).sum(-1)


def _open(m: Any, x: Tensor) -> Tensor:
    """Which examples a gate lets through: by their first position, which is no padding."""
    return x.reshape(len(x), -1)[:, : x.shape[-1]].sum(1) > m.threshold


def _gate(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    """Few examples go through the layer at all; the others pass by."""
    is_open = _open(m, x)
    if is_open.any():
        x = x.clone()
        x[is_open] = m.layer(x[is_open])
    return x


def _gate_add(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    is_open = (_open(m, x)).to(x.dtype).view(-1, *([1] * (x.dim() - 1)))
    return x + is_open * m.layer(x) * m.w


def _gate_examples(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    return torch.stack([m.layer(row) if _open(m, row[None])[0] else row for row in x])


def _gate_norm(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    is_open = _open(m, x)
    y = x.clone()
    y[is_open] = m.layer(x[is_open]) * m.w
    return y


@piece("vec seq", "route", "experts top soft gate gate_add gate_examples gate_norm experts_bare")
def _route(s: State, option: str) -> Built:
    d, count = s.d, 3
    experts = nn.ModuleList(nn.Linear(d, d) for _ in range(count))
    if option == "experts":
        made = Fn(_experts, experts=experts)
        made.register_buffer("router", torch.randn(d, count))
        return made, s
    if option == "experts_bare":
        made = Fn(lambda m, x, c: torch.einsum("...d,...de->...e", x, m.w[(x @ m.router.to(x)).argmax(-1)]),
                  w=param(count, d, d))  # fmt: skip
        made.register_buffer("router", torch.randn(d, count))
        return made, s
    if option in ("top", "soft"):
        function = _top_experts if option == "top" else _soft_experts
        return Fn(function, experts=experts, gate=nn.Linear(d, count)), s
    function = {"gate": _gate, "gate_add": _gate_add, "gate_examples": _gate_examples, "gate_norm": _gate_norm}[option]
    layer = nn.LayerNorm(d, eps=1e-3) if option == "gate_norm" else nn.Linear(d, d)
    return Fn(function, layer=layer, w=param(d), threshold=1.0 * s.d**0.5), s


@piece("vec seq", "more", "bilinear prelu prelu1 highway conv1")
def _more(s: State, option: str) -> Built:
    d = s.d
    if option == "bilinear":
        return Fn(lambda m, x, c: m.layer(x, x.tanh()), layer=nn.Bilinear(d, d, d)), s
    if option == "prelu":
        return Fn(lambda m, x, c: m.layer(x.movedim(-1, 1)).movedim(1, -1), layer=nn.PReLU(d)), s
    if option == "prelu1":
        return Fn(lambda m, x, c: m.layer(x), layer=nn.PReLU()), s
    if option == "highway":
        return Fn(lambda m, x, c: (g := m.gate(x).sigmoid()) * m.layer(x) + (1 - g) * x,
                  gate=nn.Linear(d, d), layer=nn.Linear(d, d)), s  # fmt: skip
    return Fn(lambda m, x, c: m.layer(x.reshape(len(x), -1, d).transpose(1, 2)).transpose(1, 2).reshape(x.shape),
              layer=nn.Conv1d(d, d, 1)), s  # fmt: skip


@piece("vec", "batchnorm")
def _batchnorm(s: State, option: str) -> Built:
    return Fn(lambda m, x, c: m.norm(x), norm=nn.BatchNorm1d(s.d)), s


@piece("vec", "groupnorm", when=even)
def _groupnorm(s: State, option: str) -> Built:
    # groups of a single number would be normalised away
    return Fn(lambda m, x, c: m.norm(x), norm=nn.GroupNorm(2 if s.d > 2 else 1, s.d, eps=1e-3)), s


@piece("vec", "sequence", "copies chunks one slots")
def _sequence(s: State, option: str) -> Built:
    d, t = s.d, s.spec.t
    if option == "copies":
        return Fn(lambda m, x, c: x[:, None] * m.w, w=param(t, d)), s.to("seq", t, d)
    if option == "chunks":
        return Fn(lambda m, x, c: m.layer(x).view(len(x), t, d), layer=nn.Linear(d, t * d)), s.to("seq", t, d)
    if option == "one":
        return Fn(lambda m, x, c: x[:, None]), s.to("seq", 1, d)
    layer = nn.Linear(1, s.spec.d)  # each number a token
    return Fn(lambda m, x, c: m.layer(x[..., None]).tanh(), layer=layer), s.to("seq", d, s.spec.d)


# -------------------------------------------------------------------------------------------------- pieces of sequences


@piece("seq", "conv1d", "- depthwise grouped reflect circular replicate dilated stride same nobias lengthwise", fixed)
def _conv1d(s: State, option: str) -> Built:
    t, d = s.shape
    if option in ("reflect", "circular", "dilated", "stride") and t < 3:
        option = ""
    if option == "grouped" and d % 2:
        option = "depthwise"
    if option == "lengthwise":  # positions are the channels
        return Fn(lambda m, x, c: m.layer(x), layer=nn.Conv1d(t, t, 3, padding=1)), s
    kwargs: dict[str, Any] = {"padding": 1}
    if option == "depthwise":
        kwargs |= {"groups": d}
    if option == "grouped":
        kwargs |= {"groups": 2}
    if option in ("reflect", "circular", "replicate"):
        kwargs |= {"padding_mode": option}
    if option == "dilated":
        kwargs |= {"dilation": 2, "padding": 2}
    if option == "same":
        kwargs |= {"padding": "same"}
    if option == "stride":
        kwargs |= {"stride": 2}
    if option == "nobias":
        kwargs |= {"bias": False}

    def run(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
        if option == "stride":
            c.mask = None
        return m.layer(x.transpose(1, 2)).transpose(1, 2)

    return Fn(run, layer=nn.Conv1d(d, d, 3, **kwargs)), s.to("seq", (t + 1) // 2 if option == "stride" else t, d)


@piece("seq", "norms", "two channel_first instance group batch", lambda s: fixed(s) and min(s.shape) > 1)
def _norms(s: State, option: str) -> Built:
    t, d = s.shape
    if option == "two":
        return Fn(lambda m, x, c: m.norm(x), norm=nn.LayerNorm((t, d), eps=1e-3)), s
    made: dict[str, Callable[[], nn.Module]] = {
        "channel_first": lambda: ChannelFirst(d, eps=1e-3),
        "instance": lambda: nn.InstanceNorm1d(d, affine=True, eps=1e-3),
        "group": lambda: nn.GroupNorm(2 if d % 2 == 0 else 1, d, eps=1e-3),
        "batch": lambda: nn.BatchNorm1d(d),
    }
    return Fn(lambda m, x, c: m.norm(x.transpose(1, 2)).transpose(1, 2), norm=made[option]()), s


def _self_attention(
    m: Any, x: Tensor, c: SimpleNamespace, first: bool = True, weights: bool = False, causal: bool = False
) -> Tensor:
    x = x if first else x.transpose(0, 1)
    length = x.shape[1 if first else 0]
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
    ignore = None if c.mask is None or causal else ~c.mask
    y = m.layer(x, x, x, key_padding_mask=ignore, attn_mask=ahead, need_weights=weights)[0]
    return y if first else y.transpose(0, 1)


@piece("seq", "mha", "- second weights causal nobias query kv", even)
def _mha(s: State, option: str) -> Built:
    d = s.d
    if option == "query":  # learnt queries, as in a pooling or a DETR head
        k = s.spec.t
        layer = nn.MultiheadAttention(d, 2, batch_first=True)

        def ask(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
            y = m.layer(m.q.expand(len(x), -1, -1), x, x, key_padding_mask=None if c.mask is None else ~c.mask)[0]
            c.mask = None
            return y

        return Fn(ask, layer=layer, q=param(1, k, d)), replace(s.to("seq", k, d), ragged=False)
    if option == "kv":
        layer = nn.MultiheadAttention(d, 2, batch_first=True, kdim=d, vdim=d, add_bias_kv=True)
        return Fn(_self_attention, layer=layer), s
    layer = nn.MultiheadAttention(d, 2, batch_first=option != "second", bias=option != "nobias")
    run = partial(_self_attention, first=option != "second", weights=option == "weights", causal=option == "causal")
    return Fn(run, layer=layer), s


@piece("seq", "encoder", "- second norm_first drop stack decoder", even)
def _encoder(s: State, option: str) -> Built:
    made = nn.TransformerDecoderLayer if option == "decoder" else nn.TransformerEncoderLayer
    layer = made(
        s.d, 2, 4, dropout=0.2 if option == "drop" else 0.0, batch_first=option != "second",
        norm_first=option == "norm_first", layer_norm_eps=1e-3,
    )  # fmt: skip
    if option == "stack":
        layer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def run(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
        ignore = None if c.mask is None else ~c.mask
        if option == "decoder":
            return m.layer(x, x, tgt_key_padding_mask=ignore, memory_key_padding_mask=ignore)
        if option == "second":
            return m.layer(x.transpose(0, 1), src_key_padding_mask=ignore).transpose(0, 1)
        return m.layer(x, src_key_padding_mask=ignore)

    return Fn(run, layer=layer), s


def _heads(m: Any, x: Tensor, c: SimpleNamespace, fused: bool, dropped: float = 0.0) -> Tensor:
    b, t, d = x.shape
    q, k, v = m.qkv(x).chunk(3, -1) if fused else (m.q(x), m.k(x), m.v(x))
    q, k, v = (part.view(b, t, 2, d // 2).transpose(1, 2) for part in (q, k, v))
    seen = None if c.mask is None else c.mask[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, seen, dropout_p=dropped if m.training else 0.0)
    return m.out(y.transpose(1, 2).reshape(b, t, d)) + x


@piece("seq", "attention", "- fused drop flat_heads bare", even)
def _attention(s: State, option: str) -> Built:
    d = s.d
    if option == "bare":  # one matrix per head, in a single parameter

        def run(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
            q, k, v = (torch.einsum("btd,hde->bhte", x, w) for w in (m.q, m.k, m.v))
            scores = q @ k.transpose(-1, -2)
            if c.mask is not None:
                scores = scores.masked_fill(~c.mask[:, None, None], -1e4)
            return torch.einsum("bhte,hed->btd", scores.softmax(-1) @ v, m.o)

        parts = {name: param(2, d, d // 2) for name in "qkv"}
        return Fn(run, **parts, o=param(2, d // 2, d)), s
    if option == "flat_heads":  # (B·heads, T, d/heads), as older code has it

        def flat(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
            b, t, _ = x.shape
            q, k, v = (
                part.view(b, t, 2, d // 2).transpose(1, 2).reshape(b * 2, t, d // 2) for part in m.qkv(x).chunk(3, -1)
            )
            scores = torch.bmm(q, k.transpose(1, 2))
            if c.mask is not None:
                scores = scores.masked_fill(~c.mask.repeat_interleave(2, 0)[:, None], -1e4)
            y = m.norm(torch.bmm(scores.softmax(-1), v))
            return m.out(y.view(b, 2, t, d // 2).transpose(1, 2).reshape(b, t, d))

        return Fn(flat, qkv=nn.Linear(d, 3 * d), out=nn.Linear(d, d), norm=HandRMS(d // 2, False)), s
    run_heads = partial(_heads, fused=option == "fused", dropped=0.2 if option == "drop" else 0.0)
    if option == "fused":
        return Fn(run_heads, qkv=nn.Linear(d, 3 * d), out=nn.Linear(d, d)), s
    return Fn(run_heads, q=nn.Linear(d, d), k=nn.Linear(d, d), v=nn.Linear(d, d), out=nn.Linear(d, d)), s


def _packed(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if c.mask is None else c.mask
    packed = pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(m.layer(packed)[0], batch_first=True, total_length=x.shape[1])[0]


@piece("seq", "gru", "- second packed two drop bi")
def _gru(s: State, option: str) -> Built:
    if option in ("bi",) and s.ragged:
        option = "packed"
    layer = nn.GRU(
        s.d, s.d, batch_first=option != "second", num_layers=2 if option in ("two", "drop") else 1,
        dropout=0.2 if option == "drop" else 0.0, bidirectional=option == "bi",
    )  # fmt: skip
    if option == "packed":
        return Fn(_packed, layer=layer), s
    if option == "second":
        return Fn(lambda m, x, c: m.layer(x.transpose(0, 1))[0].transpose(0, 1), layer=layer), s
    return Fn(lambda m, x, c: m.layer(x)[0], layer=layer), s.to("seq", s.shape[0], s.d * (2 if option == "bi" else 1))


@piece("seq", "lstm", "- second proj start")
def _lstm(s: State, option: str) -> Built:
    layer = nn.LSTM(s.d, s.d, batch_first=option != "second", proj_size=s.d - 1 if option == "proj" and s.d > 1 else 0)
    if option == "second":
        return Fn(lambda m, x, c: m.layer(x.transpose(0, 1))[0].transpose(0, 1), layer=layer), s
    if option == "start":  # learnt first states, (layers, B, d)

        def begin(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
            return m.layer(x, (m.h.expand(1, len(x), -1).contiguous(), m.h.new_zeros(1, len(x), s.d)))[0]

        return Fn(begin, layer=layer, h=param(1, 1, s.d)), s
    return Fn(lambda m, x, c: m.layer(x)[0], layer=layer), s.to("seq", s.shape[0], layer.proj_size or s.d)


def _cells(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    h, out = x.new_zeros(len(x), x.shape[-1]), []
    for t in range(x.shape[1]):
        h = m.cell(x[:, t], h)
        out.append(h)
    return torch.stack(out, 1)


def _by_hand(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    h, out = x.new_zeros(len(x), x.shape[-1]), []
    for t in range(x.shape[1]):
        h = torch.tanh(m.wx(x[:, t]) + m.wh(h))
        out.append(h)
    return torch.stack(out, 1)


@piece("seq", "time", "cell by_hand loop unbind")
def _time(s: State, option: str) -> Built:
    d = s.d
    if option == "cell":
        return Fn(_cells, cell=nn.GRUCell(d, d)), s
    if option == "by_hand":
        return Fn(_by_hand, wx=nn.Linear(d, d), wh=nn.Linear(d, d, bias=False)), s
    if option == "loop":
        return Fn(lambda m, x, c: torch.stack([m.layer(x[:, t]) for t in range(x.shape[1])], 1),
                  layer=nn.Linear(d, d)), s  # fmt: skip
    return Fn(lambda m, x, c: torch.stack([m.layer(x[:, t]).tanh() for t in range(x.shape[1])], 0).transpose(0, 1),
              layer=nn.Linear(d, d)), s  # fmt: skip


@piece("seq", "position", "bare3 bare2 once once1 every halves rotated")
def _position(s: State, option: str) -> Built:
    t, d = s.shape
    if option == "bare3":
        return Fn(lambda m, x, c: x + m.w[:, : x.shape[1]], w=param(1, t, d)), s
    if option == "bare2":
        return Fn(lambda m, x, c: x + m.w[: x.shape[1]], w=param(t, d)), s
    if option == "once":
        return Fn(lambda m, x, c: x + m.table(torch.arange(x.shape[1])), table=nn.Embedding(t, d)), s
    if option == "once1":
        return Fn(lambda m, x, c: x + m.table(torch.arange(x.shape[1])[None]), table=nn.Embedding(t, d)), s
    if option == "every":
        return Fn(lambda m, x, c: x + m.table(torch.arange(x.shape[1]).expand(len(x), -1)), table=nn.Embedding(t, d)), s
    if option == "halves":  # a projected table: a layer that sees no example at all
        return Fn(lambda m, x, c: x + m.layer(m.table.weight[: x.shape[1]]), table=nn.Embedding(t, d),
                  layer=nn.Linear(d, d)), s  # fmt: skip
    return Fn(lambda m, x, c: x * m.angle[: x.shape[1]].cos() + x.roll(1, -1) * m.angle[: x.shape[1]].sin(),
              angle=param(t, d)), s  # fmt: skip


def _prepend(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    if c.mask is not None:
        c.mask = torch.cat([torch.ones(len(x), 1, dtype=torch.bool), c.mask], 1)
    return torch.cat([m.w.expand(len(x), -1, -1), x], 1)


def _valid(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    keep = (x.sum(-1) > -1.5) if c.mask is None else c.mask
    out = torch.zeros_like(x)
    out[keep] = m.layer(x[keep])
    return out


def _by_length(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    length = torch.full((len(x),), x.shape[1]) if c.mask is None else c.mask.sum(1)
    order = length.argsort(descending=True, stable=True)
    return m.layer(x[order])[order.argsort()]


@piece("seq", "tokens", "cls flat transposed valid by_length pooled first_half batch_last context contiguous")
def _tokens(s: State, option: str) -> Built:
    t, d = s.shape
    layer = nn.Linear(d, d)
    if option == "cls":
        return Fn(_prepend, w=param(1, 1, d)), s.to("seq", t + 1, d)
    if option == "flat":
        return Fn(lambda m, x, c: m.layer(x.reshape(-1, d)).view(x.shape), layer=layer), s
    if option == "transposed":
        return Fn(lambda m, x, c: m.layer(x.transpose(0, 1)).transpose(0, 1), layer=layer), s
    if option == "valid":
        return Fn(_valid, layer=layer), s
    if option == "by_length":
        return Fn(_by_length, layer=layer), s
    if option == "pooled":  # the same layer on positions and on their mean
        return Fn(lambda m, x, c: m.layer(x) + m.layer(x[:, 0]).tanh()[:, None], layer=layer), s
    if option == "first_half":
        return Fn(lambda m, x, c: torch.cat([m.layer(x[:, :1]), x[:, 1:]], 1), layer=layer), s
    if option == "batch_last":

        def rows(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
            flat = x.transpose(0, 1).reshape(-1, d)
            return m.layer(flat).view(x.shape[1], len(x), d).transpose(0, 1)

        return Fn(rows, layer=layer), s
    if option == "context":
        return Fn(lambda m, x, c: x + m.layer(x[:, 0])[:, None], layer=layer), s
    return Fn(lambda m, x, c: m.norm(m.layer(x.transpose(0, 1).contiguous())).transpose(0, 1), layer=layer,
              norm=nn.LayerNorm(d, eps=1e-3)), s  # fmt: skip


@piece("seq", "mix", "linear bare perposition norm pairs", fixed)
def _mix(s: State, option: str) -> Built:
    t, d = s.shape
    if option == "linear":
        return Fn(lambda m, x, c: m.layer(x.transpose(1, 2)).transpose(1, 2), layer=nn.Linear(t, t)), s
    if option == "bare":
        return Fn(lambda m, x, c: m.w @ x, w=param(t, t)), s
    if option == "perposition":
        return Fn(lambda m, x, c: torch.einsum("btd,tde->bte", x, m.w), w=param(t, d, d)), s
    if option == "norm":
        return Fn(lambda m, x, c: m.layer(x.transpose(1, 2)).transpose(1, 2),
                  layer=nn.LayerNorm(t, eps=1e-3) if t > 1 else nn.Linear(t, t)), s  # fmt: skip

    def pairs(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:  # (B, T, T, 2d), as relations between objects
        both = torch.cat([x[:, :, None].expand(-1, -1, t, -1), x[:, None].expand(-1, t, -1, -1)], -1)
        return m.layer(both).tanh().mean(2)

    return Fn(pairs, layer=nn.Linear(2 * d, d)), s


def _weighted(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    scores = m.q(x).squeeze(-1)
    if c.mask is not None:
        scores = scores.masked_fill(~c.mask, -1e4)
    return (scores.softmax(1)[..., None] * x).sum(1)


def _mean(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    if c.mask is None:
        return x.mean(1)
    keep = c.mask[..., None].to(x.dtype)
    return (x * keep).sum(1) / keep.sum(1)


def _last(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    if c.mask is None:
        return x[:, -1]
    last = (c.mask * torch.arange(c.mask.shape[1])).argmax(1)
    return x[torch.arange(len(x)), last]


def _max(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    return (x if c.mask is None else x.masked_fill(~c.mask[..., None], -1e4)).amax(1)


@piece("seq", "pool", "mean last first max weighted flatten graph")
def _pool(s: State, option: str) -> Built:
    flat = option == "flatten" and not s.ragged
    out = replace(s.to("vec", s.shape[0] * s.d if flat else s.d), ragged=False)
    if flat:

        def flatten(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
            c.mask = None
            return x.flatten(1)

        return Fn(flatten), out
    if option == "graph":  # all valid positions of all examples in one list, as graph libraries have it

        def graph(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
            mask = torch.ones(x.shape[:2], dtype=torch.bool) if c.mask is None else c.mask
            owner = mask.nonzero()[:, 0]
            nodes = m.layer(x[mask]).tanh()
            c.mask = None
            return torch.zeros(len(x), s.d, dtype=nodes.dtype).index_add(0, owner, nodes)

        return Fn(graph, layer=nn.Linear(s.d, s.d)), out
    pools = {"last": _last, "first": lambda m, x, c: x[:, 0], "max": _max, "weighted": _weighted}

    def pool(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
        y = pools.get(option, _mean)(m, x, c)
        c.mask = None
        return y

    return Fn(pool, **({"q": nn.Linear(s.d, 1, bias=False)} if option == "weighted" else {})), out


# --------------------------------------------------------------------------------------------------- pieces of pictures


@piece("img", "conv2d", "- depthwise grouped reflect circular replicate dilated stride same nobias even valid oblong")
def _conv2d(s: State, option: str) -> Built:
    c_in, h, w = s.shape
    if option in ("reflect", "circular", "dilated", "stride", "valid") and min(h, w) < 3:
        option = ""
    if option == "grouped" and c_in % 2:
        option = "depthwise"
    kwargs: dict[str, Any] = {"kernel_size": 3, "padding": 1}
    out = (c_in, h, w)
    if option == "depthwise":
        kwargs |= {"groups": c_in}
    elif option == "grouped":
        kwargs |= {"groups": 2}
    elif option in ("reflect", "circular", "replicate"):
        kwargs |= {"padding_mode": option}
    elif option == "dilated":
        kwargs |= {"dilation": 2, "padding": 2}
    elif option == "same":
        kwargs |= {"padding": "same"}
    elif option == "stride":
        kwargs |= {"stride": 2}
        out = (c_in, (h + 1) // 2, (w + 1) // 2)
    elif option == "nobias":
        kwargs |= {"bias": False}
    elif option == "even":
        kwargs |= {"kernel_size": 2, "padding": 1}
        out = (c_in, h + 1, w + 1)
    elif option == "valid":
        kwargs |= {"padding": 0}
        out = (c_in, h - 2, w - 2)
    elif option == "oblong":
        kwargs |= {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "zeros"}
    return Fn(lambda m, x, c: m.layer(x), layer=nn.Conv2d(c_in, c_in, **kwargs)), s.to("img", *out)


@piece("img", "norm2d", "batch group instance layer channel_first group1", lambda s: s.shape[1] * s.shape[2] > 1)
def _norm2d(s: State, option: str) -> Built:
    channels = s.shape[0]
    made: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: nn.BatchNorm2d(channels),
        "group": lambda: nn.GroupNorm(channels, channels, eps=1e-3),
        "group1": lambda: nn.GroupNorm(1, channels, eps=1e-3),
        "instance": lambda: nn.InstanceNorm2d(channels, affine=True, eps=1e-3),
        "layer": lambda: nn.LayerNorm(s.shape, eps=1e-3),
        "channel_first": lambda: ChannelFirst(channels, eps=1e-3) if channels > 1 else nn.LayerNorm(s.shape, eps=1e-3),
    }
    return Fn(lambda m, x, c: m.norm(x), norm=made[option]()), s


@piece("img", "picture",
       "scale rows max avg up channels_last loop siamese twice transpose_conv squeeze dropout2d weight_norm"
      )  # fmt: skip
def _picture(s: State, option: str) -> Built:
    channels, h, w = s.shape
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    if option == "scale":
        return Fn(lambda m, x, c: x + m.w * m.layer(x), w=param(channels, 1, 1), layer=conv), s
    if option == "rows":
        return Fn(lambda m, x, c: m.layer(x), layer=nn.Linear(w, w)), s
    if option in ("max", "avg") and min(h, w) > 1:
        pool = nn.MaxPool2d(2) if option == "max" else nn.AvgPool2d(2)
        return Fn(lambda m, x, c: m.pool(x), pool=pool), s.to("img", channels, h // 2, w // 2)
    if option == "up" and h * w <= 16:
        return Fn(lambda m, x, c: m.layer(F.interpolate(x, scale_factor=2)), layer=conv), s.to(
            "img", channels, 2 * h, 2 * w
        )
    if option == "channels_last":
        return Fn(lambda m, x, c: m.layer(x.contiguous(memory_format=torch.channels_last)), layer=conv), s
    if option == "loop":
        return Fn(lambda m, x, c: torch.stack([m.layer(one) for one in x]), layer=conv), s
    if option == "siamese":
        return Fn(lambda m, x, c: (lambda y: y[0] * y[1].tanh())(m.layer(torch.cat([x, x.flip(-1)])).chunk(2)),
                  layer=conv), s  # fmt: skip
    if option == "twice":
        return Fn(lambda m, x, c: m.layer(m.layer(x).tanh()), layer=conv), s
    if option == "transpose_conv":
        return Fn(lambda m, x, c: m.layer(x), layer=nn.ConvTranspose2d(channels, channels, 3, padding=1)), s
    if option == "squeeze":  # squeeze and excitation
        return Fn(lambda m, x, c: x * m.b(m.a(x.mean((2, 3))).relu()).sigmoid()[..., None, None],
                  a=nn.Linear(channels, 2), b=nn.Linear(2, channels)), s  # fmt: skip
    if option == "dropout2d":
        return Fn(lambda m, x, c: m.drop(x), drop=nn.Dropout2d(0.3)), s
    if option == "weight_norm":
        return Fn(lambda m, x, c: m.layer(x), layer=parametrizations.weight_norm(conv)), s
    return Fn(lambda m, x, c: m.layer(x), layer=conv), s


@piece("img", "out", "mean flatten patches columns")
def _out(s: State, option: str) -> Built:
    channels, h, w = s.shape
    if option == "mean":
        return Fn(lambda m, x, c: x.mean((2, 3))), s.to("vec", channels)
    if option == "flatten":
        return Fn(lambda m, x, c: x.flatten(1)), s.to("vec", channels * h * w)
    if option == "columns":
        return Fn(lambda m, x, c: x.flatten(1, 2).transpose(1, 2)), s.to("seq", w, channels * h)
    k = 2 if min(h, w) >= 2 else 1
    layer = nn.Conv2d(channels, s.spec.d, k, stride=k)
    t = (h // k) * (w // k)
    return Fn(lambda m, x, c: m.layer(x).flatten(2).transpose(1, 2), layer=layer), s.to("seq", t, s.spec.d)


# ----------------------------------------------------------------------------------------------------- pieces of tokens


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embedding_dim**0.5


@piece("tok", "embed", "- pad scaled bare index onehot sparse max_norm twice projected bag_free by_frequency")
def _embed(s: State, option: str) -> Built:
    v, d, t = s.spec.vocab, s.spec.d, s.shape[0]
    after = s.to("seq", t, d)
    if option == "bare":
        return Fn(lambda m, x, c: F.embedding(x, m.w), w=param(v, d)), after
    if option == "index":
        return Fn(lambda m, x, c: m.w[x], w=param(v, d)), after
    if option == "onehot":
        return Fn(lambda m, x, c: F.one_hot(x, v).to(m.layer.weight.dtype) @ m.layer.weight.t() + m.layer.bias,
                  layer=nn.Linear(v, d)), after  # fmt: skip
    table: nn.Embedding = Scaled(v, d) if option == "scaled" else nn.Embedding(
        v, d, padding_idx=0 if option == "pad" else None, sparse=option == "sparse",
        max_norm=1.0 if option == "max_norm" else None, scale_grad_by_freq=option == "by_frequency",
    )  # fmt: skip
    if option == "twice":
        return Fn(lambda m, x, c: m.table(x) + m.table((x + 1) % v).tanh(), table=table), replace(after, tokens=table)
    if option == "projected":
        return Fn(lambda m, x, c: m.up(m.table(x)), table=nn.Embedding(v, 2), up=nn.Linear(2, d, bias=False)), after
    if option in ("sparse", "max_norm", "by_frequency"):
        return Fn(lambda m, x, c: m.table(x), table=table), after
    return Fn(lambda m, x, c: m.table(x), table=table), replace(after, tokens=table)


def _offsets(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
    mask = torch.ones(x.shape, dtype=torch.bool) if c.mask is None else c.mask
    counts = mask.sum(1)
    c.mask = None
    return m.bag(x[mask], torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]]))


@piece("tok", "bag", "mean sum max offsets", lambda s: True)
def _bag(s: State, option: str) -> Built:
    if s.ragged:
        option = "offsets"
    bag = nn.EmbeddingBag(s.spec.vocab, s.spec.d, mode="mean" if option == "offsets" else option)
    after = replace(s.to("vec", s.spec.d), ragged=False)
    if option == "offsets":
        return Fn(_offsets, bag=bag), after

    def whole(m: Any, x: Tensor, c: SimpleNamespace) -> Tensor:
        c.mask = None
        return m.bag(x)

    return Fn(whole, bag=bag), after


# ------------------------------------------------------------------------------------------------------------ the model

INPUTS = {
    "vector": "vec", "named": "vec", "pair": "vec", "sequence": "seq", "masked": "seq", "tokens": "tok",
    "padded": "tok", "left": "tok", "ragged": "tok", "picture": "img",
}  # fmt: skip
OUTPUTS = ("classification", "regression", "language-modeling", "callable:logit", "callable:head", "callable:margin",
           "callable:loss", "callable:prior")  # fmt: skip
HEADS = ("head", "head:nobias", "head:tied", "head:module", "head:bare", "head:squeeze", "head:scaled")
NAMED = ("named", "padded", "left", "ragged")


def start(spec: Spec) -> State:
    """The stream before any piece."""
    kind = INPUTS[spec.inputs]
    shape = {"vec": (spec.d,), "seq": (spec.t, spec.d), "tok": (spec.t,), "img": (spec.d, spec.side, spec.side)}[kind]
    return State(kind, shape, spec, ragged=spec.inputs == "ragged")


def build_piece(s: State, name: str) -> Built:
    _, build, _ = PIECES[name]
    return build(s, name.partition(":")[2])


def fits(s: State, name: str) -> bool:
    if name not in PIECES:
        return False
    kinds, _, when = PIECES[name]
    return s.kind in kinds.split() and when(s) and (s.d > 0)


class Net(nn.Module):
    """Pieces in a row and a head."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        s = start(spec)
        self.pair = nn.Embedding(spec.vocab, spec.d) if spec.inputs == "pair" else None
        self.pieces = nn.ModuleList()
        self.states = [s.shape]
        for name in spec.pieces[:-1]:
            made, s = build_piece(s, name)
            self.pieces.append(made)
            self.states.append(s.shape)
        head = spec.pieces[-1].partition(":")[2]
        tied = s.tokens is not None and s.tokens.weight.shape[1] == s.d and head in ("tied", "module")
        out = spec.vocab if spec.output == "language-modeling" else 1 if spec.output == "regression" else spec.classes
        if tied and spec.output == "regression":
            tied = False
        if tied:
            out = spec.vocab
        self.kind, self.s, self.out = head if head not in ("tied", "module") or tied else "", s, out
        self.head: nn.Module | nn.Parameter | None
        if self.kind == "tied":
            self.head = None
        elif self.kind == "bare":
            self.head = param(s.d, out)
        else:
            self.head = nn.Linear(s.d, out, bias=self.kind not in ("nobias", "module"))
            if self.kind == "module":
                self.head.weight = s.tokens.weight
        self.temperature = nn.Parameter(torch.tensor(1.3)) if self.kind == "scaled" else None
        self.tokens = [s.tokens]  # in a list, so that it is no child a second time
        self.squeeze = spec.output == "regression" and self.kind == "squeeze"

    def trunk(self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        c = SimpleNamespace(mask=mask)
        if self.pair is not None:
            x = x + self.pair(ids).mean(1)
        for made in self.pieces:
            x = made(x, c)
        return x

    def top(self, x: Tensor) -> Tensor:
        if self.kind == "tied":
            x = F.linear(x, self.embedding().weight)
        elif self.kind == "bare":
            x = x @ self.head
        else:
            x = self.head(x)
        if self.temperature is not None:
            x = x * self.temperature
        return x.squeeze(-1) if self.squeeze else x

    def embedding(self) -> nn.Module:
        return next(m.table for m in self.pieces if hasattr(m, "table"))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.top(self.trunk(*inputs))


class PairNet(Net):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.top(self.trunk(x, None, ids))


class NamedNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.trunk(x))


class TokenNet(Net):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask.bool()
        return self.top(self.trunk(input_ids, mask))


def build(spec: Spec) -> Net:
    """The model, in eval mode, every parameter and statistic moved away from its usual start."""
    torch.manual_seed(spec.seed)
    made = {"pair": PairNet, "named": NamedNet, "padded": TokenNet, "left": TokenNet, "ragged": TokenNet}
    model = made.get(spec.inputs, Net)(spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval().to(DTYPES[spec.dtype])


class Items(Dataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def pad(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """As long as the longest of the batch, on the right."""
    longest = max(len(item["input_ids"]) for item in items)
    out: dict[str, list[Tensor]] = {key: [] for key in items[0]}
    for item in items:
        for key, value in item.items():
            fill = -100 if key == "labels" else 0
            more = (longest - len(value)) if value.dim() else 0
            out[key].append(F.pad(value, (0, more), value=fill) if more else value)
    return {key: torch.stack(values) for key, values in out.items()}


def data(spec: Spec, net: Net, n: int, seed: int) -> Items:
    """Examples of what the spec says."""
    torch.manual_seed(seed)
    dtype, items = DTYPES[spec.dtype], []
    language = spec.output == "language-modeling"
    for _ in range(n):
        label = torch.randn((), dtype=torch.float64).to(dtype) if spec.output == "regression" else (
            torch.randint(net.out, ()))  # fmt: skip
        ids = torch.randint(1, spec.vocab, (spec.t,))
        if spec.inputs in ("tokens", "padded", "left", "ragged"):
            length = int(torch.randint(min(2, spec.t), spec.t + 1, ()))
            if spec.inputs == "tokens":
                targets = torch.randint(spec.vocab, (spec.t,))
                items.append((ids, targets) if language and spec.seed % 3 else ids if language else (ids, label))
                continue
            if spec.inputs == "ragged":
                ids, mask = ids[:length], torch.ones(length, dtype=torch.long)
            else:
                mask = (torch.arange(spec.t) < length).long()
                mask = mask.flip(0) if spec.inputs == "left" else mask
                ids = ids * mask
            targets = torch.where(mask.bool(), ids, -100) if language else label
            items.append({"input_ids": ids, "attention_mask": mask, "labels": targets})
            continue
        shape = {"sequence": (spec.t, spec.d), "masked": (spec.t, spec.d), "picture": (spec.d, spec.side, spec.side)}
        x = torch.randn(shape.get(spec.inputs, (spec.d,)), dtype=torch.float64).to(dtype)
        targets = torch.randint(spec.vocab, (spec.t,))
        if spec.inputs == "named":
            items.append({"x": x, "labels": label})
        elif spec.inputs == "masked":
            mask = torch.arange(spec.t) < int(torch.randint(1, spec.t + 1, ()))
            items.append((x, mask, label))
        elif spec.inputs == "pair":
            items.append((x, ids, label))
        else:
            items.append((x, targets if language else label))
    return Items(items)


# ---------------------------------------------------------------------------------------------------------- the outputs


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    """What a task does with a batch: everything but the labels goes in."""
    if isinstance(batch, dict):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    if isinstance(batch, Tensor):
        return model(batch)
    return model(*batch[:-1])


def labels_of(batch: Any) -> Tensor:
    return batch["labels"] if isinstance(batch, dict) else batch[-1]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """log p / (1 - p) of the label, over the last dimension."""
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    others = logits.scatter(-1, labels.unsqueeze(-1), -torch.inf)
    return chosen - others.logsumexp(-1)


def prior(model: Any) -> Tensor:
    return sum(p.pow(2).sum() for p in model.parameters())  # type: ignore[return-value]


def by_hand(model: Any, batch: Any) -> Tensor:
    """The head's weight, used without its module."""
    inputs = {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else batch[:-1]
    if isinstance(batch, dict):
        inputs = list(inputs.values())
    if isinstance(model, PairNet):
        inputs = [inputs[0], None, inputs[1]]
    elif len(inputs) > 1:
        inputs = [inputs[0], inputs[1].bool()]
    x = model.trunk(*inputs)
    weight = model.head.weight if isinstance(model.head, nn.Linear) else model.top.__self__.embedding().weight
    return x @ weight[0]


CALLABLES: dict[str, Callable[[Any, Any], Tensor]] = {
    "callable:logit": lambda m, b: logits_of(m, b)[:, 0],
    "callable:head": by_hand,
    "callable:margin": lambda m, b: margin(logits_of(m, b), labels_of(b)),
    "callable:loss": lambda m, b: logits_of(m, b)[:, 0].tanh(),
    "callable:prior": lambda m, b: logits_of(m, b)[:, 0] + 0.1 * prior(m),
}


def own_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(logits_of(model, batch), labels_of(batch), label_smoothing=0.1, reduction="none")


def task(spec: Spec, model: nn.Module) -> byline.Task:
    if spec.output in CALLABLES:
        loss = own_loss if spec.output == "callable:loss" else None
        return byline.Task(model, output=CALLABLES[spec.output], loss=loss)
    return byline.Task(model, output=spec.output)


def explained(spec: Spec, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, loss and Q of a batch of one, as documented."""
    if spec.output in CALLABLES:
        f = CALLABLES[spec.output](model, batch)[0]
        loss = own_loss(model, batch)[0] if spec.output == "callable:loss" else -f
        return f, loss, (-f.double()).sigmoid()
    out = logits_of(model, batch)
    wide = out.double() if out.dtype == torch.float64 else out.float()
    if spec.output == "regression":
        f = wide.reshape(())
        residual = labels_of(batch)[0].to(f) - f
        return f, residual.pow(2) / 2, residual
    if spec.output == "classification":
        labels = labels_of(batch)
        return margin(wide, labels)[0], F.cross_entropy(wide, labels), 1 - wide.softmax(-1)[0, labels[0]]
    if isinstance(batch, (dict, Tensor)):
        targets = (batch if isinstance(batch, Tensor) else batch["labels"])[:, 1:]
        wide = wide[:, :-1]
    else:
        targets = batch[-1]
    keep = targets != -100
    if isinstance(batch, dict):  # padding changes nothing: what follows it is the first token, which nothing predicts
        keep = keep & batch["attention_mask"][:, :-1].bool()
    wide, targets = wide[keep], targets[keep]
    p = wide.softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return margin(wide, targets).mean(), F.cross_entropy(wide, targets), (1 - p).mean()


def cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, dict):
        return {key: cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [cast(value, dtype) for value in batch]
    return batch.to(dtype) if batch.is_floating_point() else batch


def gradients(spec: Spec, model: nn.Module, items: Items, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of ∇f and ∇ℓ, Q, and f, one example at a time."""
    model = copy.deepcopy(model).to(dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    collate = pad if spec.inputs == "ragged" else default_collate
    rows: list[list[Tensor]] = [[], [], [], []]
    for i in range(len(items)):
        batch = cast(collate([items[i]]), dtype)
        f, loss, residual = explained(spec, model, batch)
        for target, row in ((f, rows[0]), (loss, rows[1])):
            grads = torch.autograd.grad(target, params, retain_graph=True, allow_unused=True)
            row.append(torch.cat([
                (torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g).flatten().double()
                for p, g in zip(params, grads, strict=True)
            ]))  # fmt: skip
        rows[2].append(residual.detach().double())
        rows[3].append(f.detach().double())
    return torch.stack(rows[0]), torch.stack(rows[1]), torch.stack(rows[2]), torch.stack(rows[3])


DAMPING = 0.1


def reference(spec: Spec, models: list[nn.Module], train: Items, test: Items) -> dict[str, tuple[Tensor, float]]:
    """Scores of both methods by their documented equations, and how large they could be."""
    rounded = spec.dtype == "bfloat16" or any("autocast" in name for name in spec.pieces)
    dtype = DTYPES[spec.dtype] if rounded else torch.float64
    dots, kernels, residuals, sizes, ridges = [], [], [], [], []
    for model in models:
        phi, loss, q, _ = gradients(spec, model, train, dtype)
        z = gradients(spec, model, test, dtype)[0]
        dots.append(-z @ loss.T)
        sizes.append(float(z.norm(dim=1).max() * loss.norm(dim=1).max()))
        kernel = phi @ phi.T
        ridge = DAMPING * kernel.diagonal().mean()
        ridges.append(ridge)
        if float(ridge) > 0:
            kernels.append(torch.linalg.solve(kernel + ridge * torch.eye(len(phi), dtype=kernel.dtype), phi @ z.T).T)
        residuals.append(q)
    q = torch.stack(residuals).mean(0)
    wanted = {"GradDot": (torch.stack(dots).mean(0), max(sizes))}
    if all(float(kernel) > 0 for kernel in ridges):  # without any gradient there is no damping that is relative to it
        wanted["TRAK"] = (q * torch.stack(kernels).mean(0), float(q.abs().max()))
    return wanted


# ------------------------------------------------------------------------------------------------------------ the check

# What may be refused, where the documentation says so or what is asked for has no one answer.
MAY_REFUSE = {
    "embed:max_norm": "a forward pass that writes into its own weights",
    "embed:by_frequency": "a gradient that counts how often a token is in the batch",
}
MAY_REFUSE_MASKS = {"gru:drop": "docs/limits.md: dropout inside a multi-layer GRU"}
TOLERANCES = {
    # rows are kept in float32 whatever the model computes in, and TRAK solves with them
    "float64": {"GradDot": 2e-6, "TRAK": 2e-5},
    "float32": {"GradDot": 2e-4, "TRAK": 1e-3},
    "bfloat16": {"GradDot": 0.1, "TRAK": 0.3},
}


def masked(spec: Spec) -> bool:
    return spec.members.startswith(("masks", "forward"))


def droppable(spec: Spec) -> bool:
    return any("drop" in name for name in spec.pieces)


def scores(spec: Spec, method: str, model: nn.Module, ensemble: Any, train: Items, test: Items, batch: int) -> Tensor:
    kinds = {"exact": byline.Exact, "lowrank": lambda: byline.LowRank(4096)}
    attributor = getattr(byline, method)(
        task(spec, model), ensemble, features=kinds[spec.features](), damping=DAMPING, batch_size=batch, progress=False,
        collate=pad if spec.inputs == "ragged" else None,
    )  # fmt: skip
    return torch.as_tensor(attributor.fit(train).attribute(test).values).double()


def far(found: Tensor, wanted: Tensor, size: float, tolerance: float) -> str | None:
    """What is wrong with scores, if anything: relative to the largest, or to what rounding may leave."""
    if found.shape != wanted.shape:
        return f"shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    if not bool(found.isfinite().all()):
        return "not finite"
    scale = max(float(wanted.abs().max()), 0.01 * size, 1e-12)
    error = float((found - wanted).abs().max()) / scale
    return None if error <= tolerance else f"off by {error:.2g} of the largest score (allowed {tolerance:.2g})"


def grammar_holds(spec: Spec, model: nn.Module, items: Items) -> bool:
    """Whether the model itself treats examples alone and in a batch alike: otherwise the spec asks for nothing."""
    collate = pad if spec.inputs == "ragged" else default_collate
    model, dtype = copy.deepcopy(model).double(), torch.float64
    tokens = spec.output == "language-modeling"
    with torch.no_grad():
        run = CALLABLES.get(spec.output, logits_of)
        together = run(model, cast(collate(list(items.items)), dtype))
        for i in range(len(items)):
            alone = run(model, cast(collate([items[i]]), dtype))[0]
            row = together[i][: alone.shape[0]] if tokens else together[i]
            if tokens and isinstance(items[i], dict):
                keep = items[i]["attention_mask"].bool()
                row, alone = row[keep[: len(row)]] if spec.inputs != "ragged" else row, alone
                alone = alone[keep] if spec.inputs != "ragged" else alone
            if not torch.allclose(row, alone, atol=1e-8):
                return False
    return True


def check(spec: Spec) -> str:
    """Hold byline against the reference; "right" or "refused", where that is allowed.

    Raises:
        Finding: a wrong number, another exception than a refusal, or a refusal of a plain model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check(spec)


def _check(spec: Spec) -> str:
    model = build(spec)
    train, test = data(spec, model, spec.n, spec.seed + 1), data(spec, model, 4, spec.seed + 2)
    if not any(p.requires_grad for p in model.parameters()):
        return "nothing"
    assert grammar_holds(spec, model, train), f"the grammar itself mixes examples: {spec}"
    models: list[nn.Module] = [model]
    if spec.members == "two":
        models.append(copy.deepcopy(model))
        with torch.no_grad():
            for p in models[1].parameters():
                p.mul_(0.8).add_(0.05)
    wanted = reference(spec, models, train, test)
    autocast = any("autocast" in name for name in spec.pieces)
    tolerances = TOLERANCES["bfloat16" if autocast and spec.dtype != "float64" else spec.dtype]
    independent = byline.Independent([models[0], models[1].state_dict()] if len(models) == 2 else [model])
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    sentence = ""
    forward = masked(spec) and droppable(spec) and spec.members.startswith("forward")
    if forward:
        wanted.pop("GradDot")  # masks for Q alone: no other method has one
    elif masked(spec) and droppable(spec) and len(wanted) == 2:
        wanted.pop("TRAK" if spec.seed // 2 % 2 == 0 else "GradDot")  # three fits each
    for method, (values, size) in wanted.items():
        try:
            if masked(spec) and droppable(spec):
                count, rateless = (
                    int(spec.members[-1]),
                    all("drop" not in n or n == "dropout:zero" for n in spec.pieces),
                )
                # at this rate no unit is ever dropped: what masks leave is known
                kept = byline.Dropout(independent, masks=count, p=1e-12, forward_only=forward)
                found = scores(spec, method, model, kept, train, test, spec.batch)
                wrong = far(found, values, size, tolerances[method])
                if wrong:
                    raise Finding("wrong", f"{method} under masks that drop nothing is {wrong}")
                ensemble = byline.Dropout(
                    independent,
                    masks=count,
                    p=0.4 if spec.seed % 2 or rateless else None,
                    forward_only=forward,
                    seed=spec.seed,
                )
                values = scores(spec, method, model, ensemble, train, test, 1)
            else:
                ensemble = independent
            found = scores(spec, method, model, ensemble, train, test, spec.batch)
        except (ValueError, TypeError) as error:
            sentence = " ".join(str(error).split())
            if masked(spec) and "singular" in sentence:  # a mask may drop every unit there is
                continue
            allowed = {**MAY_REFUSE, **(MAY_REFUSE_MASKS if masked(spec) else {})}
            if any(name in allowed for name in spec.pieces):
                continue
            tail = "".join(traceback.format_tb(error.__traceback__)[-1:]).strip().replace("\n", " ")
            raise Finding("refused", f"{method}: {type(error).__name__}: {sentence[:400]} [{tail[-160:]}]") from error
        except Finding:
            raise
        except Exception as error:
            tail = "".join(traceback.format_tb(error.__traceback__)[-1:]).strip().replace("\n", " ")
            message = " ".join(str(error).split())[:300]
            raise Finding("crash", f"{method}: {type(error).__name__}: {message} [{tail[-160:]}]") from error
        wrong = far(found, values, size, tolerances[method])
        if wrong:
            raise Finding("wrong", f"{method} is {wrong}")
        changed = [n for n, p in model.state_dict().items() if not torch.equal(p, before[n])]
        if changed and not any(name in MAY_REFUSE for name in spec.pieces):
            raise Finding("wrong", f"the model was changed: {changed}")
    return f"refused: {sentence}" if sentence else "right"


# ------------------------------------------------------------------------------------------------------- drawing a spec

Choose = Callable[[Sequence[Any]], Any]


def sizes(spec: Spec) -> list[int]:
    """Every size that a batch could be mistaken for: of the data, the parameters, the streams, and their products."""
    model = build(spec)
    found = {1, 2, 3, spec.n, spec.n - 1, 256, spec.classes, spec.vocab, spec.t, spec.d, spec.side}
    for p in model.parameters():
        found.update(p.shape)
    for shape in model.states:
        found.update(shape)
    found.update({2 * spec.d, spec.t * spec.d, spec.t * 2})
    return sorted(size for size in found if size == 256 or 0 < size <= spec.n)


# What takes another branch when a number is rounded otherwise, or is not made for half precision: runs need not agree.
DECIDES = ("route:", "tokens:valid", "pool:max", "picture:max", "layout:sorted", "weights:orthogonal")


def draw(choose: Choose, without: Sequence[str] = ()) -> Spec:
    """A spec out of the grammar; ``choose`` picks one of a sequence, simple ones first."""
    inputs = choose(list(INPUTS))
    kind = INPUTS[inputs]
    possible = [o for o in OUTPUTS if o != "language-modeling" or (kind in ("seq", "tok") and inputs != "masked")]
    output = choose([*[o for o in possible if ":" not in o] * 2, *possible])
    small = [3, 2, 4, 5, 6, 8]
    spec = Spec(
        inputs, (), output, d=choose(small), t=choose([3, 2, 4, 5, 7]), classes=choose([2, 3, 4, 5]),
        vocab=choose([5, 3, 4, 6, 8]), side=choose([4, 3, 5]), n=choose([9, 8, 12, 17, 25, 30]),
        dtype=choose(["float64", "float64", "float64", "float32", "bfloat16"]),
        members=choose(["one", "one", "one", "one", "two", "masks1", "masks2", "masks3", "forward2"]),
        features=choose(["exact", "exact", "exact", "lowrank"]), seed=choose(range(1000)),
    )  # fmt: skip
    s, names = start(spec), []
    wanted = choose([1, 2, 3, 4])
    target = "seq" if output == "language-modeling" else "vec"
    while len(names) < wanted or s.kind != target:
        closing = len(names) >= wanted
        if len(names) > wanted + 6:
            break
        options = [name for name in PIECES if fits(s, name) and name not in without]
        if closing:
            ways = {"tok": ("embed", "bag"), "seq": ("pool",), "img": ("out",), "vec": ("sequence",)}[s.kind]
            options = [name for name in options if name.split(":")[0] in ways]
        if target == "seq":  # the language model keeps its positions
            gone = ("pool:", "bag", "tokens:cls", "conv1d:stride", "mha:query", "mix:", "norms:", "sequence")
            options = [name for name in options if not name.startswith(gone)]
        groups = sorted({name.split(":")[0] for name in options}, key=lambda g: g != "linear")
        group = choose(groups)
        name = choose([name for name in options if name.split(":")[0] == group])
        with torch.random.fork_rng():
            _, after = build_piece(s, name)
        if len(after.shape) and max(after.shape) > 64:
            continue
        s = after
        names.append(name)
    if masked(spec) and not any("drop" in name for name in names) and s.kind in ("vec", "seq"):
        names.append(choose(["dropout:module", "dropout:functional", "dropout:zero"]))
    heads = [h for h in HEADS if h != "head:squeeze" or output == "regression"]
    if output == "callable:head":
        heads = ["head", "head:nobias"]
    spec = replace(spec, pieces=(*names, choose([h for h in heads if h not in without])))
    if "embed:max_norm" in names and output == "callable:prior":  # its weights depend on what was looked up before
        spec = replace(spec, output="callable:logit")
    if spec.dtype == "bfloat16" and any(name.startswith(DECIDES) for name in names):
        spec = replace(spec, dtype="float32")
    return replace(spec, batch=choose(sizes(spec)))


def smaller(spec: Spec, message: str, budget: float = 60.0) -> tuple[Spec, str]:
    """The same kind of failure with fewer pieces and plainer values, greedily."""
    kind, end = message.split(":")[0], time.monotonic() + budget

    def fails(candidate: Spec) -> str | None:
        try:
            check(candidate)
        except Finding as finding:
            return str(finding) if finding.kind == kind else None
        except Exception:
            return None
        return None

    plain = Spec("vector", ())
    moved = True
    while moved and time.monotonic() < end:
        moved = False
        candidates = [replace(spec, pieces=spec.pieces[:i] + spec.pieces[i + 1 :]) for i in range(len(spec.pieces) - 1)]
        if spec.pieces[-1] != "head":
            candidates.append(replace(spec, pieces=(*spec.pieces[:-1], "head")))
        for field in fields(spec):
            value, usual = getattr(spec, field.name), getattr(plain, field.name)
            if field.name != "pieces" and value != usual:
                candidates.append(replace(spec, **{field.name: usual}))
        for candidate in candidates:
            try:
                valid = all(fits_all(candidate))
            except Exception:
                continue
            if valid and (found := fails(candidate)):
                spec, message, moved = candidate, found, True
                break
    return spec, message


def fits_all(spec: Spec) -> list[bool]:
    s, found = start(spec), []
    for name in spec.pieces[:-1]:
        found.append(fits(s, name))
        if not found[-1]:
            return found
        _, s = build_piece(s, name)
    return [*found, s.kind == ("seq" if spec.output == "language-modeling" else "vec")]


def main() -> None:
    """Try many, print what fails."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shrink", type=float, default=20.0, help="seconds per failure")
    parser.add_argument("--without", default="", help="pieces to leave out, with commas between them")
    parser.add_argument("--seconds", type=float, default=1e9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, seen, tally, begun = random.Random(args.seed), Counter[str](), Counter[str](), time.monotonic()
    for number in range(args.examples):
        if time.monotonic() - begun > args.seconds:
            break
        try:
            spec = draw(rng.choice, args.without.split(","))
        except Exception:
            print("DRAW", traceback.format_exc(limit=-3), flush=True)
            tally["draw"] += 1
            continue
        try:
            tally[check(spec).split(":")[0]] += 1
        except Finding as finding:
            tally[finding.kind] += 1
            said = re.sub(r"[\d\W]+", " ", str(finding).split(" [")[0])
            seen[said] += 1
            if finding.kind != "wrong" and seen[said] > 2:
                continue
            small, message = smaller(spec, str(finding), args.shrink)
            key = f"{finding.kind} {' '.join(small.pieces[:-1])}"
            seen[key] += 1
            if seen[key] == 1:
                print(f"{number}: {small}\n    {message}", flush=True)
        except Exception:
            tally["grammar"] += 1
            print(f"{number} GRAMMAR {spec}\n{traceback.format_exc(limit=-2)}", flush=True)
    print(dict(tally), f"{time.monotonic() - begun:.0f} s")
    for key, count in seen.most_common():
        print(f"{count:5d}  {key}")


if __name__ == "__main__":
    main()
