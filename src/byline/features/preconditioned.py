"""PRECONDITIONED features: gradients in the metric that an adaptive optimizer moves in.

Adam steps along ``P ∇ℓ`` with ``P = v^-½``, v the second moment of every entry of the gradient. To first order an
example i therefore moves the output of z in proportion to ``∇f(z)ᵀ P ∇f(i)``, the tangent kernel of Adam, and not to
the plain inner product, which is that of SGD. Features are made of ``P^½ ∇f``, with v factored as Adafactor has it
(Shazeer & Stern 2018, arXiv 1804.04235, section 3), so that the factors of a layer's gradient stay factors:

    v_oi ≈ r_o c_i / Σ r,   r_o = Σ_i E[g_oi²],   c_i = Σ_o E[g_oi²],   g = Σ_t left_t ⊗ right_t

    row of (∇W): features of Σ_t (left_t r^(-power/2)) ⊗ (right_t (c/Σr)^(-power/2))

TrackStar (Chang et al. 2024, arXiv 2410.17413, section 3) divides by second moments too, those of the optimizer's
state. A checkpoint seldom keeps them: here they are those of the examples' own gradients, at the member's weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from byline import batches
from byline.features.base import Features, Passes, Products, Rows, State, sampled
from byline.features.blocks import Block, Flat, Lookup, Outer

_SAMPLE = 2048  # training examples whose gradients are squared
_LEAST = 1e-4  # of the mean entry: what never moved, such as a token that no example has, would be divided by 0
_NUMBERS = 2**24  # of a gradient or of inner products of positions that are formed at a time


class Preconditioned(Features):
    """Other features, of gradients that are divided by a power of their second moment, entry by entry.

    For models trained with Adam, AdamW, Adafactor or RMSprop. Of a model trained with SGD the plain features are the
    right ones.

    Args:
        features: what is made of the divided gradients: `Exact`, `Factorized`, `LowRank`, `Nystrom` or `Dense`.
        power: P is v to minus this: ½ is Adam's, 1 the inverse of the Fisher information's diagonal, 0 changes nothing.
        seed: of the sample of training examples, 2048 at most, from which second moments are learnt.

    Raises:
        TypeError: ``features`` is not made by one of byline's classes of features.
        ValueError: ``power`` is not from 0 to 1, or ``features`` is preconditioned already.
    """

    def __init__(self, features: Features, power: float = 0.5, seed: int = 0):
        if not isinstance(features, Features):
            raise TypeError(
                f"features is a {type(features).__name__}; expected byline's, such as byline.Factorized(2048)"
            )
        if isinstance(features, Preconditioned):
            raise ValueError(f"features is {features!r}, which is preconditioned already; expected others")
        if isinstance(power, bool) or not isinstance(power, int | float) or not 0 <= power <= 1:
            raise ValueError(f"power is {power!r}; expected a number from 0 to 1")
        self.features, self.power, self.seed = features, float(power), seed
        self.linear = features.linear

    @property
    def dtype(self) -> str:
        """What rows are kept as: that of the features."""
        return self.features.dtype

    @dtype.setter
    def dtype(self, value: str) -> None:
        self.features.dtype = value

    def describe(self) -> dict[str, Any]:
        """Kind, power, seed, and what the features say of themselves."""
        return {
            "kind": "preconditioned",
            "features": self.features.describe(),
            "power": self.power,
            "seed": self.seed,
        }

    def __repr__(self) -> str:
        given = {"power": (self.power, 0.5), "seed": (self.seed, 0)}
        some = "".join(f", {name}={value!r}" for name, (value, usual) in given.items() if value != usual)
        return f"Preconditioned({self.features!r}{some})"

    def learn(self, passes: Passes, length: int) -> State:
        """The scales of every block's factors, and what the features learn from scaled ones."""
        count = min(length, _SAMPLE)
        chosen = sampled(length, count, self.seed, "sample")
        moments: dict[str, list[Tensor]] = {}
        for blocks in passes(chosen):
            for name, block in blocks.items():
                found = _second_moments(block)
                known = moments.get(name)
                moments[name] = found if known is None else [a + b for a, b in zip(known, found, strict=True)]
        scales = self._scales(moments)

        def scaled(indices: list[int] | None) -> Iterator[dict[str, Block]]:
            return (_scaled(blocks, scales) for blocks in passes(indices))

        return {**self.features.learn(scaled, length), **scales}

    def row_bytes(self, blocks: dict[str, Block]) -> dict[str, int] | None:
        """As the features have them."""
        return self.features.row_bytes(blocks)

    def learnt_bytes(self, blocks: dict[str, Block]) -> int:
        """As the features have them."""
        return self.features.learnt_bytes(blocks)

    def rows(self, blocks: dict[str, Block], state: State) -> Rows:
        """Those of the features."""
        return self.features.rows(_scaled(blocks, state), state)

    def kernel(self, a: Rows, b: Rows, products: Products | None = None) -> Tensor:
        """(A, B) inner products ``∇f(a)ᵀ P ∇f(b)``, as the features have them."""
        return self.features.kernel(a, b, products)

    def vectors(self, rows: Rows, state: State) -> Tensor:
        """(B, k) those of the features."""
        return self.features.vectors(rows, state)

    def width(self, forms: Mapping[str, tuple[int, ...]], state: State) -> int | None:
        """That of the features."""
        return self.features.width(forms, state)

    def least_width(self, forms: Iterable[tuple[int, ...]]) -> int | None:
        """That of the features."""
        return self.features.least_width(forms)

    def diagonal(self, a: Rows, b: Rows) -> Tensor:
        """(B,) inner products of pairs of rows."""
        return self.features.diagonal(a, b)

    def _scales(self, moments: Mapping[str, list[Tensor]]) -> State:
        """What factors are multiplied by; on the whole, gradients keep their mean squared length."""
        state: State = {}
        before = after = 0.0
        for name, (first, *second) in moments.items():
            left = _power(first, -self.power / 2)
            kept = (first * left.square()).sum(-1)
            for across in second:
                shares = across / across.sum(-1, keepdim=True).clamp_min(1e-300)
                right = _power(shares, -self.power / 2)
                kept = kept * (shares * right.square()).sum(-1)
                state[f"scale/{name}/right"] = right.float()
            state[f"scale/{name}/left"] = left
            before, after = before + float(first.sum()), after + float(kept.sum())
        unit = (before / after) ** 0.5 if after > 0 else 1.0
        return {key: (value * unit).float() if key.endswith("/left") else value for key, value in state.items()}


def _power(moment: Tensor, power: float) -> Tensor:
    mean = float(moment.mean())
    return moment.clamp_min(_LEAST * mean).pow(power) if mean > 0 else torch.ones_like(moment)


def _scaled(blocks: Mapping[str, Block], state: State) -> dict[str, Block]:
    out: dict[str, Block] = {}
    for name, block in blocks.items():
        left = state[f"scale/{name}/left"]
        if isinstance(block, Flat):
            out[name] = Flat(block.params, block.grad * left.to(block.grad))
            continue
        right = block.right * state[f"scale/{name}/right"].to(block.right).unsqueeze(-2)
        if isinstance(block, Lookup):
            out[name] = Lookup(block.params, block.ids, right * left.to(right)[block.ids].unsqueeze(-1), block.n)
        else:
            out[name] = Outer(block.params, block.left * left.to(block.left).unsqueeze(1), right)
    return out


def _second_moments(block: Block) -> list[Tensor]:
    """Of a batch: (n,) Σ g², or per output and per input, (G, o) and (G, i), of an embedding (n,) and (d,); float64."""
    if isinstance(block, Flat):
        return [block.grad.double().square().sum(0)]
    if isinstance(block, Lookup):
        return _of_lookup(block)
    groups, positions, o = block.left.shape[1:]
    i, shared = block.right.shape[3], block.right.shape[1] < groups
    whole = o * i <= positions**2
    rows, columns = block.left.new_zeros(groups, o).double(), block.left.new_zeros(block.right.shape[1], i).double()
    step = max(1, _NUMBERS // max(1, groups * min(o * i, positions**2)))
    for start, stop in batches.spans(len(block.left), step):
        left, right = block.left[start:stop].float(), block.right[start:stop].float()
        if whole:
            square = torch.einsum("bgto,bgti->bgoi", left, right.expand(-1, groups, -1, -1)).square().double()
            each, across = square.sum((0, 3)), square.sum((0, 2))
        else:
            # Σ_i (Σ_t l_to r_ti)² = Σ_ts l_to l_so (r_t · r_s)
            each = ((right @ right.mT @ left) * left).double().sum((0, 2))
            across = ((left @ left.mT @ right) * right).double().sum((0, 2))
        rows += each
        columns += across.sum(0, keepdim=True) if shared else across
    return [rows, columns]


def _of_lookup(block: Lookup) -> list[Tensor]:
    each, across = block.right.new_zeros(block.n).double(), block.right.new_zeros(block.right.shape[2]).double()
    # the rows of a gradient are the sums over all positions of an example with the same id
    keys = torch.arange(len(block.ids), device=block.ids.device).unsqueeze(1) * block.n + block.ids
    found, place = torch.unique(keys, return_inverse=True)
    rows = block.right.new_zeros(len(found), block.right.shape[2]).float()
    square = rows.index_add_(0, place.flatten(), block.right.flatten(0, 1).float()).double().square()
    each.scatter_add_(0, found % block.n, square.sum(1))
    return [each, across + square.sum(0)]
