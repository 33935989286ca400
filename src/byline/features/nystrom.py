"""NYSTRÖM features: exact kernels against a sample of training examples, whitened (Williams & Seeger 2000).

``row(x) = k(x, L) (K_LL)^{-1/2}`` for landmarks L, so that ``row(x) · row(y) ≈ k(x, y)``, exactly so between landmarks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from byline.features.base import Features, Passes, Rows, State, bytes_of, check_dim, check_dtype, sampled
from byline.features.blocks import Block
from byline.features.exact import Exact


class Nystrom(Features):
    """Exact kernels against ``landmarks`` training examples, whitened: as many columns as landmarks.

    Args:
        landmarks: how many training examples; all of them give the exact kernel.
        seed: which ones.
        dtype: what rows are kept as: ``"float32"`` (as computed), or ``"float16"`` or ``"int8"`` with a scale per row.
    """

    def __init__(self, landmarks: int = 1024, seed: int = 0, dtype: str = "float32"):
        self.landmarks = check_dim(landmarks, "landmarks")
        self.seed = seed
        self.dtype = check_dtype(dtype)
        self.exact = Exact()

    def describe(self) -> dict[str, Any]:
        """Kind, landmarks and seed."""
        return {"kind": "nystrom", "landmarks": self.landmarks, "seed": self.seed, "dtype": self.dtype}

    def learn(self, passes: Passes, length: int) -> State:
        """The landmarks' factors and the whitening matrix of their kernel."""
        count = min(self.landmarks, length)
        chosen = sampled(length, count, self.seed, "landmarks")
        state = self.exact.learn(passes, length)
        parts = [self.exact.rows(blocks, state) for blocks in passes(chosen)]
        rows = {name: _join([part[name] for part in parts]) for name in parts[0]}
        values, vectors = torch.linalg.eigh(self.exact.kernel(rows, rows).double())
        # directions below the rounding of the kernel's own dtype are noise, and whitening would blow them up
        kept = values > values[-1].clamp_min(0) * 1e-6
        whitening = vectors * torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)
        return {**state, **{f"landmarks/{k}": v for k, v in rows.items()}, "whitening": whitening.float()}

    def row_bytes(self, blocks: dict[str, Block]) -> dict[str, int]:
        """Of the columns."""
        return bytes_of({"rows": (self.landmarks,)}, self.dtype)

    def learnt_bytes(self, blocks: dict[str, Block]) -> int:
        """The landmarks' own gradients, as `Exact` has them."""
        return self.landmarks * sum(self.exact.row_bytes(blocks).values())

    def rows(self, blocks: dict[str, Block], state: State) -> Rows:
        """(B, landmarks)."""
        own = self.exact.rows(blocks, state)
        marks = {name: state[f"landmarks/{name}"] for name in own}
        kernel = self.exact.kernel(own, marks)
        return {"rows": kernel @ state["whitening"].to(kernel.dtype)}


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate along the batch; positions are padded with zeros to the longest."""
    form = tuple(map(max, zip(*(part.shape[1:] for part in parts), strict=True)))

    def filled(part: torch.Tensor) -> torch.Tensor:
        gaps = [full - own for full, own in zip(form, part.shape[1:], strict=True)]
        return F.pad(part, [n for gap in reversed(gaps) for n in (0, gap)])

    return torch.cat([filled(part) for part in parts])
