"""Arrays as PNG data URIs, so that a report carries its own pictures.

A greyscale or RGB PNG without filters is a header and one zlib stream: too little to ask for an imaging
library.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np


def png(pixels: Any) -> bytes:
    """Encodes an array as PNG.

    Args:
        pixels: (H, W), (H, W, 1), (H, W, 3) or (1 or 3, H, W); uint8 as it is, anything else stretched from
            its own minimum and maximum to black and white, so that any normalisation of the data can be seen.
    """
    array = np.asarray(pixels)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not array.size:
        raise ValueError(f"a picture is (H, W) or (H, W, 3), got {array.shape}")
    if array.dtype != np.uint8:
        values = array.astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("a picture must not hold NaN or infinite values")
        low, high = values.min(), values.max()
        array = np.round((values - low) / (high - low or 1.0) * 255).astype(np.uint8)
    height, width = array.shape[:2]
    # Each line is preceded by its filter type: 0, none.
    lines = np.concatenate([np.zeros((height, 1), np.uint8), array.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if array.ndim == 2 else 2, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def data_uri(pixels: Any) -> str:
    """The array as a `data:image/png;base64,…` address."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
