"""PRINCIPAL features: the principal components of other features' rows over the training set.

With R (n, k) the rows of n training examples and R = U S Vᵀ, ``row(x) = Vᵀ_d r(x)`` for the d largest singular values:
of all linear maps to d columns the one that keeps most of the kernel of those n (Eckart & Young 1936), as kernel PCA
has it (Schölkopf et al. 1998). A damped solve looks at as many directions as it leaves free (`byline.methods.damping`),
some N/13.5, and what the wide rows say beside these it does not use.

`Factorized` with its pca basis orders directions too, but of every layer by itself, before products are formed and
examples are summed over positions: it needs many times as many.
"""

from __future__ import annotations

from typing import Any

import torch

from byline.features.base import Features, Passes, Rows, State, bytes_of, check_dim, check_dtype, sampled
from byline.features.blocks import Block

_HALF = torch.float16


class Principal(Features):
    """The ``dim`` principal components of wider features: few columns a training example, nearly the wide kernel.

    A query is made wide first, and the basis (k × dim numbers of a half precision, k the wide columns) is kept for each
    member: it pays where there are more training examples than wide columns, or where queries are scored against very
    many. What of a query lies outside the components is gone: cosines are those of what remains, and `Influence`, whose
    damping counts in mean eigenvalues of the columns, damps more with fewer of them.

    Args:
        features: wide ones that are vectors: `Factorized`, `Nystrom`, `Dense`, or `Preconditioned` around them.
        dim: columns per member, at most; no more than the sample has examples.
        sample: training examples whose rows the components are those of.
        seed: which ones.
        dtype: what rows are kept as: ``"float32"`` (as computed), or ``"float16"`` or ``"int8"`` with a scale per row.

    Raises:
        TypeError: ``features`` is not made by one of byline's classes of features.
        ValueError: they are no vectors, or principal components already; ``dim`` or ``sample`` is no int of at least 1;
            the dtype is another.
    """

    def __init__(self, features: Features, dim: int = 512, sample: int = 2048, seed: int = 0, dtype: str = "float32"):
        if not isinstance(features, Features):
            raise TypeError(
                f"features is a {type(features).__name__}; expected byline's, such as byline.Factorized(20000)"
            )
        if isinstance(features, Principal):
            raise ValueError(f"features is {features!r}, which has principal components already; expected others")
        if not features.linear:
            raise ValueError(f"features is {features!r}, whose rows are no vectors; expected such as byline.Factorized")
        self.features = features
        self.dim = check_dim(dim)
        self.sample = check_dim(sample, "sample")
        self.seed = seed
        self.dtype = check_dtype(dtype)

    def describe(self) -> dict[str, Any]:
        """Kind, columns, sample, seed, dtype, and what the features say of themselves."""
        own = {"dim": self.dim, "sample": self.sample, "seed": self.seed, "dtype": self.dtype}
        return {"kind": "principal", "features": self.features.describe(), **own}

    def __repr__(self) -> str:
        given = {"sample": (self.sample, 2048), "seed": (self.seed, 0), "dtype": (self.dtype, "float32")}
        some = "".join(f", {name}={value!r}" for name, (value, usual) in given.items() if value != usual)
        return f"Principal({self.features!r}, {self.dim}{some})"

    def learn(self, passes: Passes, length: int) -> State:
        """What the features learn, and the basis (k, dim)."""
        state = self.features.learn(passes, length)
        count = min(length, self.sample)
        chosen = sampled(length, count, self.seed, "sample")
        rows = torch.cat([self.features.rows(blocks, state)["rows"] for blocks in passes(chosen)])
        if rows.shape[1] <= len(rows):
            values, vectors = torch.linalg.eigh((rows.T @ rows).double())
            basis = vectors.flip(1)[:, : self.dim].to(rows)
        else:
            values, vectors = torch.linalg.eigh((rows @ rows.T).double())
            # directions below the rounding of the rows' own dtype are noise, and whitening would blow them up
            kept = values > values[-1].clamp_min(0) * 1e-6
            unit = vectors * torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)
            left = unit.flip(1)[:, : max(1, min(self.dim, int(kept.sum())))].to(rows)
            basis = rows.T @ left
        return {**state, "basis": basis.to(_HALF)}

    def row_bytes(self, blocks: dict[str, Block]) -> dict[str, int]:
        """Of the columns."""
        return bytes_of({"rows": (self.dim,)}, self.dtype)

    def rows(self, blocks: dict[str, Block], state: State) -> Rows:
        """(B, dim) or fewer."""
        wide = self.features.rows(blocks, state)["rows"]
        return {"rows": wide @ state["basis"].to(wide)}
