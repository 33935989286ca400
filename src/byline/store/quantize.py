"""Fewer bytes per number: half precision or int8, with a scale per row, in the precision that rows are computed in.

A row is a vector along the last dimension; its largest magnitude becomes 1 (float16) or 127 (int8), so that neither
can overflow and small rows lose no more than large ones. A row of zeros has the scale 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SCALE = ":scale"
"""What the name of an array's scales ends with."""
_LARGEST = {"float16": 1.0, "int8": 127.0}


def encode(rows: dict[str, Tensor], dtype: str) -> dict[str, np.ndarray]:
    """The arrays that are kept of rows; ``float32`` keeps them as computed, half precisions widened."""
    out: dict[str, np.ndarray] = {}
    for name, value in rows.items():
        value = plain(value)
        if dtype == "float32" or not value.is_floating_point():
            out[name] = value.numpy()
            continue
        scale = value.abs().amax(-1) / _LARGEST[dtype] if value.shape[-1] else value.new_zeros(value.shape[:-1])
        # the reciprocal of a subnormal scale would be infinite
        parts = value / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
        out[name] = (parts.round_().to(torch.int8) if dtype == "int8" else parts.half()).numpy()
        out[name + SCALE] = scale.numpy()
    return out


def decode(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of the arrays that are kept."""
    return {
        name: value if name + SCALE not in arrays else _scaled(value, arrays[name + SCALE])
        for name, value in arrays.items()
        if not name.endswith(SCALE)
    }


def _scaled(value: Tensor, scale: Tensor) -> Tensor:
    return value.to(scale.dtype).mul_(scale.unsqueeze(-1))


def plain(value: Tensor) -> Tensor:
    """On the CPU; half precisions, which rows come in where the model has them, as float32."""
    value = value.detach().cpu()
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
