"""What attribution takes, from shapes alone: FLOPs and bytes of TRAK with `byline.Factorized`, at any size.

`byline.engines.estimate` computes a few batches of a model that is there. This is for one that is not: a thousand times
as many examples, or another model. Its FLOPs are those that the ledger counts (matrix products, a multiply-add being
two), its bytes those of the store's chunks; docs/scale.md derives both and holds them against measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from byline.ensembles.base import check_count
from byline.features.directions import projection_work
from byline.features.factorized import rectangle, shares_of
from byline.store.chunks import CHECKSUM

_BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Layer:
    """A linear layer whose weight and bias are attributed.

    Args:
        name: as in the model; decides which layer gets a remaining column.
        outputs: o, rows of the weight.
        inputs: i, columns of the weight.
        positions: T, how often it is applied per example: the tokens of a sequence, the pixels of a convolution.
        bias: whether there is one; it counts as one more input.
        first: whether nothing before it needs a gradient, so that the backward pass ends here.
    """

    name: str
    outputs: int
    inputs: int
    positions: int = 1
    bias: bool = True
    first: bool = False

    @property
    def parameters(self) -> int:
        """Weight and bias."""
        return self.outputs * (self.inputs + self.bias)


@dataclass(frozen=True)
class Workload:
    """A training set, a model, an ensemble and the columns that are kept.

    Args:
        layers: of the model, those that are attributed.
        examples: N, of the training set.
        columns: k, numbers per example and member; fewer where the layers have fewer parameters.
        members: M, sets of gradients; forward-only members of one model count once.
        forward_only: further members that keep Q alone.
        dtype: what rows are kept as: "float32", "float16" or "int8" (the latter two with a scale per row).
        batch_size: examples per batch, and per chunk.
        other_flops: of a forward pass per example, beside the layers: attention, layers that are not attributed.

    Raises:
        ValueError: a size is out of range, there is no layer, or the dtype is another.
    """

    layers: tuple[Layer, ...]
    examples: int
    columns: int
    members: int = 1
    forward_only: int = 0
    dtype: str = "float32"
    batch_size: int = 256
    other_flops: float = 0.0

    def __post_init__(self) -> None:
        for name in ("examples", "columns", "members", "batch_size"):
            check_count(getattr(self, name), name)
        if not isinstance(self.forward_only, int) or self.forward_only < 0:
            raise ValueError(f"forward_only is {self.forward_only!r}; expected an int of at least 0")
        if not self.layers:
            raise ValueError("layers is empty; expected at least one Layer")
        if self.dtype not in _BYTES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(_BYTES)}")

    @property
    def parameters(self) -> int:
        """P, of the layers."""
        return sum(layer.parameters for layer in self.layers)

    @cached_property
    def sides(self) -> list[tuple[int, int]]:
        """(o', i') per layer: what its two factors are projected to."""
        shares = shares_of({layer.name: layer.parameters for layer in self.layers}, self.columns)
        return [
            rectangle(shares[layer.name], layer.outputs, layer.inputs + layer.bias) if shares[layer.name] else (0, 0)
            for layer in self.layers
        ]

    @property
    def kept(self) -> int:
        """Columns that there are: k, or a few fewer, a rectangle o'·i' of every layer."""
        return sum(o * i for o, i in self.sides)

    # per example and member

    @property
    def capture_flops(self) -> float:
        """Forward, and backward to the layers' outputs: 2·o·i·T each, and no weight gradient.

        A second backward pass, in one batch of sixteen or, for models that route or sort, in each, is not counted.
        """
        forward = sum(2.0 * one.outputs * one.inputs * one.positions for one in self.layers)
        backward = sum(2.0 * one.outputs * one.inputs * one.positions for one in self.layers if not one.first)
        return forward + backward + 3 * self.other_flops

    @property
    def project_flops(self) -> float:
        """Both factors onto their bases, and their product: 2·T·(o·o' + i·i' + o'·i') of every layer.

        Or less, where one of them is better projected after the sum over positions. At one position the product is
        element by element, which is not counted.
        """
        return sum(
            2.0 * min(projection_work(one.positions, (one.outputs, o), (one.inputs + one.bias, i)).values())
            for one, (o, i) in zip(self.layers, self.sides, strict=True)
            if o
        )

    # of the whole

    @property
    def fit_flops(self) -> float:
        """Rows of all members; Q of the forward-only ones by a forward pass each."""
        forward = sum(2.0 * one.outputs * one.inputs * one.positions for one in self.layers) + self.other_flops
        rows = self.members * (self.capture_flops + self.project_flops)
        return self.examples * (rows + self.forward_only * forward)

    @property
    def solve_flops(self) -> float:
        """The second moment of the rows, N·k² multiply-adds, and its factor, k³/6 of them: once per member."""
        return self.members * (2.0 * self.examples * self.kept**2 + self.kept**3 / 3)

    @property
    def query_flops(self) -> float:
        """A test example: its row, two triangular solves, and its product with every training row."""
        k = self.kept
        return self.members * (self.capture_flops + self.project_flops + 2.0 * k * k + 2.0 * self.examples * k)

    @property
    def row_bytes(self) -> int:
        """A training example's row as one member keeps it."""
        return self.kept * _BYTES[self.dtype] + (0 if self.dtype == "float32" else 4)

    @property
    def scan_bytes(self) -> int:
        """What a query, or a batch of them, reads: every row of every member once."""
        return self.members * self.examples * self.row_bytes

    @property
    def chunks(self) -> int:
        """Chunks of each array of a member."""
        return -(-self.examples // min(self.batch_size, self.examples))

    @property
    def files(self) -> int:
        """Chunks of all arrays along the examples: rows, their scales, outputs and residuals."""
        arrays = (3 if self.dtype == "float32" else 4) * self.members + self.forward_only
        return arrays * self.chunks

    @property
    def store_bytes(self) -> int:
        """All chunks: rows, two numbers per example, projections; the last of a batch are filled up with zeros."""
        chunk = min(self.batch_size, self.examples)
        row = chunk * self.kept * _BYTES[self.dtype] + CHECKSUM
        scale = 0 if self.dtype == "float32" else 4 * chunk + CHECKSUM
        vector = self.chunks * (4 * chunk + CHECKSUM)
        state = sum(
            4 * (one.outputs * o + (one.inputs + one.bias) * i) + 2 * CHECKSUM
            for one, (o, i) in zip(self.layers, self.sides, strict=True)
            if o
        )
        return self.members * (self.chunks * (row + scale) + 2 * vector + state) + self.forward_only * vector
