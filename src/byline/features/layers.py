"""One rule per layer type: from a layer's input and its output's gradient to the gradients of its parameters.

A rule gets ``x`` (the input, B first) and ``g`` (the gradient of the output) of one call and returns a block per
parameter. `capture.Capture` checks every rule against autograd on a few examples before it is trusted with a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from byline.features.blocks import Block, Flat, Lookup, Outer

Rule = Callable[[Any, Tensor, Tensor, set[str], bool], dict[tuple[str, ...], Block]]
"""(module, x, g, attributed parameters, bias may join the weight) -> a block per parameter or pair of them.

An empty dict: the rule does not cover this call.
"""


def _sum_positions(g: Tensor, keep: int = 1) -> Tensor:
    """(B, .., *last keep) summed over everything between."""
    between = tuple(range(1, g.ndim - keep))
    return g.sum(between) if between else g


def _weight_and_bias(left: Tensor, right: Tensor, slots: set[str], join: bool) -> dict[tuple[str, ...], Block]:
    """Blocks of ``W`` and ``b`` in ``y = W x + b`` from left = g (B, G, T, o) and right = x (B, G, T, i)."""
    if join and slots == {"weight", "bias"}:
        ones = right.new_ones(*right.shape[:-1], 1)
        names = ("weight", "bias")
        return {names: Outer(names, left, torch.cat([right, ones], -1))}
    out: dict[tuple[str, ...], Block] = {}
    if "weight" in slots:
        out["weight",] = Outer(("weight",), left, right)
    if "bias" in slots:
        out["bias",] = Flat(("bias",), left.sum(2).flatten(1))
    return out


def linear(module: nn.Linear, x: Tensor, g: Tensor, slots: set[str], join: bool) -> dict[tuple[str, ...], Block]:
    """``y = x Wᵀ + b``: ∇W = Σ_t g_t ⊗ x_t, ∇b = Σ_t g_t."""
    b = x.shape[0]
    left = g.reshape(b, 1, -1, g.shape[-1])
    right = x.reshape(b, 1, -1, x.shape[-1])
    return _weight_and_bias(left, right, slots, join)


def conv1d_of_transformers(
    module: Any, x: Tensor, g: Tensor, slots: set[str], join: bool
) -> dict[tuple[str, ...], Block]:
    """``y = x W + b`` with W (in, out), as in GPT-2."""
    b = x.shape[0]
    out: dict[tuple[str, ...], Block] = {}
    if "weight" in slots:
        out["weight",] = Outer(("weight",), x.reshape(b, 1, -1, x.shape[-1]), g.reshape(b, 1, -1, g.shape[-1]))
    if "bias" in slots:
        out["bias",] = Flat(("bias",), _sum_positions(g))
    return out


def conv(module: Any, x: Tensor, g: Tensor, slots: set[str], join: bool) -> dict[tuple[str, ...], Block]:
    """Convolution in one or two dimensions: a linear layer on patches, group by group."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0,) * len(kernel)
    else:
        padding = module.padding
    if len(kernel) == 1:
        x = x.unsqueeze(2)
        kernel, stride, dilation, padding = (
            (1, *kernel), (1, *stride), (1, *dilation), (0, *padding)
        )  # fmt: skip
    patches = _patches(x, kernel, stride, padding, dilation)
    b, groups = x.shape[0], module.groups
    right = patches.reshape(b, groups, -1, patches.shape[-1]).transpose(2, 3)
    left = g.reshape(b, groups, module.out_channels // groups, -1).transpose(2, 3)
    return _weight_and_bias(left, right, slots, join)


def _patches(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """(B, C·k, T), what ``F.unfold`` gives: one copy of overlapping windows, in a third of its time on a CPU."""
    if any(padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    size = [(x.shape[2 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in (0, 1)]
    b, c, *strides = x.stride()
    steps = [strides[d] * dilation[d] for d in (0, 1)] + [strides[d] * stride[d] for d in (0, 1)]
    windows = x.as_strided((*x.shape[:2], *kernel, *size), (b, c, *steps))
    return windows.reshape(len(x), -1, size[0] * size[1])


def embedding(module: nn.Embedding, x: Tensor, g: Tensor, slots: set[str], join: bool) -> dict[tuple[str, ...], Block]:
    """``y_t = s W[id_t]``: ∇W[id_t] += s g_t; the padding row gets none."""
    b = x.shape[0]
    ids, right = x.reshape(b, -1), g.reshape(b, -1, g.shape[-1])
    if type(module) is not nn.Embedding and ids.numel():
        # a subclass may scale what it looks up (Gemma by √d): what it makes of ones tells
        ones = g.new_ones(()).expand(module.weight.shape)
        right = right * functional_call(module, {"weight": ones}, (x.reshape(-1)[:1],)).reshape(-1)
    if module.padding_idx is not None:
        right = right * (ids != module.padding_idx).unsqueeze(-1)
    return {("weight",): Lookup(("weight",), ids, right, module.num_embeddings)}


def _scale_and_shift(
    normal: Tensor, g: Tensor, slots: set[str], reduce: Callable[[Tensor], Tensor]
) -> dict[tuple[str, ...], Block]:
    """``y = n ∘ w + b`` with n the normalised input."""
    out: dict[tuple[str, ...], Block] = {}
    if "weight" in slots:
        out["weight",] = Flat(("weight",), reduce(g * normal).flatten(1))
    if "bias" in slots:
        out["bias",] = Flat(("bias",), reduce(g).flatten(1))
    return out


def _over_channels(t: Tensor) -> Tensor:
    """(B, C, *) summed to (B, C)."""
    return t.flatten(2).sum(2) if t.ndim > 2 else t


def layer_norm(module: nn.LayerNorm, x: Tensor, g: Tensor, slots: set[str], join: bool) -> dict[tuple[str, ...], Block]:
    """LayerNorm over the last dimensions."""
    shape = module.normalized_shape
    normal = F.layer_norm(x, shape, None, None, module.eps)
    return _scale_and_shift(normal, g, slots, lambda t: _sum_positions(t, len(shape)))


def rms_norm(module: nn.RMSNorm, x: Tensor, g: Tensor, slots: set[str], join: bool) -> dict[tuple[str, ...], Block]:
    """RMSNorm over the last dimensions."""
    shape = list(module.normalized_shape)
    normal = F.rms_norm(x, shape, None, module.eps)
    return _scale_and_shift(normal, g, slots, lambda t: _sum_positions(t, len(shape)))


def elementwise(module: nn.Module, x: Tensor, g: Tensor, slots: set[str], join: bool) -> dict[tuple[str, ...], Block]:
    """``y = n(x) ∘ (w + c) + b`` over the last dimension, whatever n: the many RMSNorms that are no torch class.

    n is what the module's own forward makes of w = 1 less what it makes of w = 0 (c is 1 in Gemma's).
    """
    normal = _normal(module, x, g, -1)
    return {} if normal is None else _scale_and_shift(normal, g, slots, _sum_positions)


def channelwise(module: nn.Module, x: Tensor, g: Tensor, slots: set[str], join: bool) -> dict[tuple[str, ...], Block]:
    """The same over the second dimension: layer norms of pictures that turn the channels to the end and back."""
    normal = _normal(module, x, g, 1)
    return {} if normal is None else _scale_and_shift(normal, g, slots, _over_channels)


def _normal(module: nn.Module, x: Tensor, g: Tensor, dim: int) -> Tensor | None:
    """What stands beside the weight, over this dimension; None where the module is not of that kind."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if g.shape != x.shape or x.ndim < 2 or x.shape[dim] != weight.numel() or weight.ndim != 1:
        return None

    def at(value: float) -> Tensor:
        return functional_call(module, {"weight": torch.full_like(weight, value, dtype=x.dtype)}, (x,))

    try:
        normal = at(1.0) - at(0.0)
    except (TypeError, ValueError, RuntimeError):
        # a module that wants more than one tensor
        return None
    return normal if normal.shape == g.shape else None


def group_norm(module: nn.GroupNorm, x: Tensor, g: Tensor, slots: set[str], join: bool) -> dict[tuple[str, ...], Block]:
    """GroupNorm, and InstanceNorm's affine part through the same channels."""
    normal = F.group_norm(x, module.num_groups, None, None, module.eps)
    return _scale_and_shift(normal, g, slots, _over_channels)


def batch_norm(module: Any, x: Tensor, g: Tensor, slots: set[str], join: bool) -> dict[tuple[str, ...], Block]:
    """BatchNorm in eval mode: a fixed affine map per channel."""
    mean, variance = module.running_mean.to(x), module.running_var.to(x)
    normal = F.batch_norm(x, mean, variance, None, None, False, 0.0, module.eps)
    return _scale_and_shift(normal, g, slots, _over_channels)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: conv,
    nn.Conv2d: conv,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
}

SPATIAL: tuple[Rule, ...] = (conv, group_norm, batch_norm, channelwise)
"""Rules of layers whose second dimension is the channel, not the position."""

PLAIN: frozenset[type[nn.Module]] = frozenset(RULES)
"""The classes whose forward the rules are theorems of; what inherits from them is watched in every batch."""

ALTERNATIVES: dict[str, Rule] = {"elementwise": elementwise, "channelwise": channelwise}
"""What is tried for a module that holds a scale, and perhaps a shift, where its own rule is wrong."""


def groups_of(rule: Rule, slots: set[str], join: bool) -> list[tuple[str, ...]]:
    """Which parameters of a call share a block."""
    if join and slots == {"weight", "bias"} and rule in (linear, conv):
        return [("weight", "bias")]
    return [(slot,) for slot in sorted(slots, reverse=True)]


def block_of(
    rule: Rule,
    groups: int,
    attributes: tuple[str, ...],
    params: tuple[str, ...],
    rows: list[Tensor | None],
    like: Tensor,
    examples: int,
) -> Block:
    """A block in the form that a rule gives, from (B, numel) rows, or of zeros without rows.

    Args:
        rule: which.
        groups: of a convolution; 1 otherwise.
        attributes: what the rule calls the parameters.
        params: their names.
        rows: of each; None for zeros.
        like: has the first parameter's shape and its gradient's dtype.
        examples: B.
    """
    if attributes == ("weight",) and rule is embedding:
        right = (like.new_zeros(examples, like.numel()) if rows[0] is None else rows[0]).view(examples, *like.shape)
        return Lookup(params, torch.arange(len(like), device=like.device).expand(examples, -1), right, len(like))
    if "weight" not in attributes or rule not in (linear, conv, conv1d_of_transformers):
        return Flat(params, like.new_zeros(examples, like.numel()) if rows[0] is None else rows[0])
    outputs, inputs = len(like) // groups, like[0].numel() + len(params) - 1
    if rows[0] is None:
        return Outer(params, like.new_zeros(examples, groups, 1, outputs), like.new_zeros(examples, groups, 1, inputs))
    parts = [row.view(examples, groups, outputs, -1) for row in rows if row is not None]
    # the gradient's own rows as its right factor, and the identity as its left
    identity = torch.eye(outputs, dtype=like.dtype, device=like.device).expand(examples, groups, -1, -1)
    return Outer(params, identity, torch.cat(parts, -1))


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module's type, if there is one."""
    for kind in type(module).__mro__:
        if kind in RULES:
            return RULES[kind]
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers"):
        return conv1d_of_transformers
    return elementwise if is_scale(module) else None


def is_plain(module: nn.Module, rule: Rule) -> bool:
    """Whether the rule is a theorem of the module's forward, for any weights and inputs."""
    if "forward" in vars(module) or len(module._forward_hooks) or isinstance(module, torch.jit.ScriptModule):
        return False
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return False
    if rule is conv1d_of_transformers:
        return type(module).__name__ == "Conv1D"
    return type(module) in PLAIN and RULES.get(type(module)) is rule


def is_scale(module: nn.Module) -> bool:
    """Whether a module holds a vector ``weight``, perhaps a ``bias`` like it, and nothing else."""
    if isinstance(module, torch.jit.ScriptModule):
        # it takes no hooks
        return False
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    shapes = {tuple(parameter.shape) for parameter in own.values()}
    return (
        "weight" in own
        and set(own) <= {"weight", "bias"}
        and len(shapes) == 1
        and not module._modules
        and (len(next(iter(shapes))) == 1)
    )


def register(kinds: Iterable[type[nn.Module]], rule: Rule) -> None:
    """Add a rule for layer types of your own; it is checked against autograd like the others."""
    for kind in kinds:
        RULES[kind] = rule


def is_finite(block: Block) -> Tensor:
    """(B,) whether every number of an example's block is finite."""
    parts = [block.grad] if isinstance(block, Flat) else [block.right]
    if isinstance(block, Outer):
        parts.append(block.left)
    return torch.stack([part.flatten(1).isfinite().all(1) for part in parts]).all(0)
