"""Autograd's graph of a forward pass, read: who uses the parameters, and whether its shape alone decides which row
belongs to which example.

Most operations treat their rows the same whatever the numbers are: of two passes with the same operations, wired and
parametrised alike on tensors of the same shapes, either both keep examples apart or neither does. Indexing by tensors,
sorting, masking out and whatever is not known here does not. Neither does anything that brings the examples together on
its way (a sum over them of numbers that may be zeros and ones, all pairs of them): which they are is seen in the shapes
at two numbers of examples (`keeps_apart`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_STATIC = frozenset({
    "AccumulateGrad", "Add", "Addmm", "Addmv", "Addcmul", "Addcdiv", "Addr", "Baddbmm", "Bmm", "Mm", "Mv",
    "Dot", "Mul", "Div", "Sub", "Rsub", "Neg", "Abs", "Pow", "Sqrt", "Rsqrt", "Reciprocal", "Exp", "Expm1",
    "Log", "Log1P", "Log2", "Sin", "Cos", "Tanh", "Sigmoid", "LogSigmoid", "Relu", "Relu6", "Gelu", "Silu",
    "Mish", "Softplus", "Elu", "Celu", "Selu", "LeakyRelu", "PreluKernel", "Hardswish", "Hardsigmoid",
    "Hardtanh", "Threshold", "Erf", "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum", "Sgn", "Softmax",
    "LogSoftmax", "Logsumexp", "Sum", "Mean", "Var", "Std", "VarMean", "LinalgVectorNorm", "Norm", "Cumsum",
    "Lerp", "NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "FusedRmsNorm", "Convolution",
    "ConvolutionOverrideable", "MkldnnConvolution", "MkldnnLinear", "Linear", "AvgPool2D", "AvgPool1D",
    "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AvgPool3D", "MaxPool2DWithIndices", "AdaptiveMaxPool2D",
    "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleBilinear2D", "UpsampleBicubic2D", "PixelShuffle",
    "PixelUnshuffle", "Im2Col", "Col2Im", "ScaledDotProductFlashAttentionForCpu",
    "ScaledDotProductFlashAttention", "ScaledDotProductEfficientAttention", "ScaledDotProductCudnnAttention",
    "Embedding", "MaskedFill", "Where", "Glu", "ConstantPadNd", "ReflectionPad1D", "ReflectionPad2D",
    "ReplicationPad2D", "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Alias", "Clone",
    "Copys", "ToCopy", "SafeSoftmax", "Amax", "Amin", "Expand", "Repeat", "Squeeze", "Unsqueeze", "Select",
    "Slice", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind", "Cat", "Stack", "Roll", "Flip", "Diagonal",
    "Detach",
})  # fmt: skip
_SAVED = (
    "dim", "dims", "dim0", "dim1", "index", "start", "end", "step", "split_size", "split_sizes", "shifts", "repeats",
    "self_sym_sizes", "size", "offset", "dim2",
)  # fmt: skip
_LENGTHS = frozenset(f"_saved_{a}" for a in ("index", "start", "end", "split_size", "split_sizes", "repeats",
    "self_sym_sizes", "size"))  # fmt: skip
"""What may differ between passes of one wiring."""
_PRODUCTS = frozenset(["Mm", "Bmm", "Addmm", "Baddbmm", "Mv", "Addmv", "Dot", "Linear", "MkldnnLinear"])
_ALONG = frozenset(["Roll", "Flip", "Cumsum", "Softmax", "LogSoftmax", "SafeSoftmax"])
"""What mixes or moves numbers along a dimension that is there afterwards."""
_VIEWS = frozenset(
    (
        "T",
        "Transpose",
        "Permute",
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "Expand",
        "Unsqueeze",
        "Squeeze",
        "ToCopy",
        "Clone",
    )
)
_OPERANDS = (
    "_saved_self",
    "_saved_mat1",
    "_saved_mat2",
    "_saved_batch1",
    "_saved_batch2",
    "_saved_vec",
    "_saved_input",
)
_VERSION = re.compile(r"Backward\d*$")

_names: dict[str, tuple[str, bool]] = {}
_saved: dict[str, tuple[str, ...]] = {}


@dataclass
class Graph:
    """What a walk over a graph found."""

    uses: list[tuple[int, int]]
    """(``id`` of a leaf, place of the node that uses it in autograd's count), for every use."""
    nodes: Mapping[Any, object]
    """All of its nodes in the order of the walk, and what stands for each in the form."""
    form: tuple[object, ...] | None
    """The operations, how they are wired and parametrised; None where numbers decide what belongs to whom."""


def read(
    value: Tensor,
    constants: Collection[int] = (),
    until: int | None = None,
    leaves: Mapping[int, object] | None = None,
) -> Graph:
    """Walk the graph behind a value.

    Args:
        value: the root.
        constants: addresses of the model's own storages. A product with any other tensor that has no gradient may sort
            or route examples by numbers.
        until: place in autograd's count from which on operations are byline's own, and keep examples apart.
        leaves: what stands for a leaf in the form, by its ``id``; leaves that a pass makes are numbered like nodes.
    """
    uses: list[tuple[int, int]] = []
    form: list[object] = []
    static = True
    if value.grad_fn is None:
        return Graph(uses, {}, ())
    numbers: dict[Any, object] = {value.grad_fn: 0}
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        kind = node.name()
        known = _names.get(kind)
        if known is None:
            plain = _VERSION.sub("", kind.rpartition("::")[2])
            known = _names[kind] = (plain, plain in _STATIC)
            _saved[kind] = tuple(f"_saved_{a}" for a in _SAVED if hasattr(node, f"_saved_{a}"))
        if static and (until is None or node._sequence_nr() < until):
            static = known[1] and not (known[0] in _PRODUCTS and _by_numbers(node, constants))
            # rows of a parameter are looked up by each example, those of anything else may be the examples
            static = static and (known[0] != "Embedding" or _is_leaf(node.next_functions[0][0]))
        form.append(kind)
        for attribute in _saved[kind]:
            form.append(_plain(getattr(node, attribute)))
        for following, output in node.next_functions:
            if following is None:
                form.append(None)
                continue
            number = numbers.get(following)
            variable = getattr(following, "variable", None)
            if variable is not None:
                uses.append((id(variable), node._sequence_nr()))
                if number is None:
                    number = numbers[following] = (leaves or {}).get(id(variable), len(numbers))
                form.append((number, output))
                continue
            if number is None:
                number = numbers[following] = len(numbers)
                stack.append(following)
            form.append((number, output))
    return Graph(uses, numbers, tuple(form) if static else None)


def wiring(graph: Graph) -> int:
    """A hash of the operations and how they are wired, whatever the sizes."""
    form: list[object] = []
    for node, number in graph.nodes.items():
        if getattr(node, "variable", None) is not None:
            form.append(number)
            continue
        kind = node.name()
        form.append(kind)
        form += [_plain(getattr(node, attribute)) for attribute in _saved[kind] if attribute not in _LENGTHS]
        form += [(graph.nodes.get(following), output) for following, output in node.next_functions]
    return hash(tuple(form))


def keeps_apart(many: Graph, few: Graph, examples: int, fewer: int, until: int | None = None) -> bool:
    """Whether no operation brings examples together, as the shapes of two passes of one wiring tell.

    A sum over the examples whose terms are picked by numbers, however it is written, goes through a tensor that has
    the examples in two dimensions, or loses the dimension that they were in.

    Args:
        many: of so many ``examples``.
        few: of ``fewer``.
        examples: how many.
        fewer: how many.
        until: place in autograd's count from which on operations of ``many`` are byline's own.
    """

    def places(a: Any, b: Any, output: int) -> list[int] | None:
        one, other = (tuple(node._input_metadata[output].shape) for node in (a, b))
        if len(one) != len(other):
            return None
        found = [dim - len(one) for dim, (x, y) in enumerate(zip(one, other, strict=True)) if x != y]
        return found if all(one[dim] * fewer == other[dim] * examples for dim in found) else None

    for a, b in zip(many.nodes, few.nodes, strict=True):
        if getattr(a, "variable", None) is not None or (until is not None and a._sequence_nr() >= until):
            continue
        outs = [places(a, b, output) for output in range(len(a._input_metadata))]
        ins = [
            places(x, y, output)
            for (x, output), (y, _) in zip(a.next_functions, b.next_functions, strict=True)
            if x is not None and y is not None
        ]
        if any(found is None or len(found) > 1 for found in outs + ins) or (any(ins) and not any(outs)):
            return False
        if "ScaledDotProduct" in a.name() and [-2] in outs:
            return False
        if _VERSION.sub("", a.name()) in _ALONG and any(dim in (found or ()) for found in outs for dim in _along(a)):
            return False
    return True


def _along(node: Any) -> list[int]:
    """The dimensions along which an operation works, counted from the end."""
    found = getattr(node, "_saved_dims", None) or (getattr(node, "_saved_dim", None),)
    size = len(node._input_metadata[0].shape)
    # autograd keeps them without a sign
    signed = [dim - 2**64 if dim >= 2**63 else dim for dim in found if dim is not None]
    return [dim - size if dim >= 0 else dim for dim in signed]


def _by_numbers(node: Any, constants: Collection[int]) -> bool:
    """Whether an operand of a product is neither differentiated nor the model's own, and the other one no weight."""
    edges = [following for following, _ in node.next_functions]
    if all(following is not None for following in edges):
        return False
    if all(following is None or _is_leaf(following) for following in edges):
        # data times a weight: a row of the one gives a row of the product
        return False
    try:
        operands = [t for t in (getattr(node, name, None) for name in _OPERANDS) if isinstance(t, Tensor)]
        return any(not t.requires_grad and t.untyped_storage().data_ptr() not in constants for t in operands)
    except RuntimeError:
        return True


def _is_leaf(node: Any) -> bool:
    """Whether a node is a parameter, or one seen another way."""
    while _VERSION.sub("", node.name()) in _VIEWS and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None) is not None


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        # of an operation that is let pass for its place, or not at all
        return None
    return tuple(value) if isinstance(value, list) else value


Windows = Mapping[str, list[tuple[int, int, Any]]]
"""Per parameter, for each watched call that used it: when it began and ended in autograd's count, its output's node."""


def unexplained(graph: Graph, names: Mapping[int, str], windows: Windows) -> set[str]:
    """Parameters with a use that no watched call made, or none whose output the value goes through.

    An output that is changed in place can leave its node behind: what was to be its gradient is then nowhere.

    Args:
        graph: of the value.
        names: of the parameters, by ``id``.
        windows: of the watched calls.
    """
    return {
        name
        for variable, place in graph.uses
        if (name := names.get(variable)) is not None
        and not any(start <= place < stop and node in graph.nodes for start, stop, node in windows.get(name, ()))
    }
