"""What scores must be, written from design.md alone: one example at a time, torch.autograd.grad, float64, numpy.

Nothing here uses byline's formulas, rules or kernels, so that agreement means something.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate


def double(item: Any) -> Any:
    """Floating tensors as float64; everything else as it is."""
    if isinstance(item, Tensor):
        return item.double() if item.is_floating_point() else item
    if isinstance(item, Mapping):
        return {k: double(v) for k, v in item.items()}
    if isinstance(item, tuple | list):
        return type(item)(double(v) for v in item)
    return item


def _logits(model: nn.Module, inputs: tuple, named: dict) -> Tensor:
    out = model(*inputs, **named)
    if hasattr(out, "logits"):
        out = out.logits
    return out[0] if isinstance(out, tuple) else out


def _pieces(batch: Any) -> tuple[tuple, dict, Any]:
    if isinstance(batch, Mapping):
        named = dict(batch)
        return (), named, named.pop("labels", None)
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    return tuple(batch[:-1]), {}, batch[-1]


def classification(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, named, y = _pieces(batch)
    p = _logits(model, inputs, named).softmax(-1)[0, int(y)]
    return (p / (1 - p)).log(), -p.log(), 1 - p


def regression(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, named, y = _pieces(batch)
    f = _logits(model, inputs, named).reshape(())
    y = y.reshape(()).to(f.dtype)
    return f, (f - y) ** 2 / 2, y - f


def language_modeling(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, named, labels = _pieces(batch)
    logits = _logits(model, inputs, named)[0]
    if isinstance(batch, Mapping) or labels is None:
        if labels is None:
            ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
            keep = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            labels = ids if keep is None else torch.where(keep.bool(), ids, torch.tensor(-100))
        pairs = [(t, int(labels[0, t + 1])) for t in range(len(logits) - 1)]
    else:
        pairs = [(t, int(labels[0, t])) for t in range(len(logits))]
    p = torch.stack([logits[t].softmax(-1)[y] for t, y in pairs if y != -100])
    return (p / (1 - p)).log().mean(), -p.log().mean(), (1 - p).mean()


def called(output, loss=None, residual=None):
    def values(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        f = output(model, batch).reshape(())
        q = 1 / (1 + f.detach().exp()) if residual is None else residual(model, batch).reshape(())
        return f, (-f if loss is None else loss(model, batch).reshape(())), q

    return values


NAMED = {"classification": classification, "regression": regression, "language-modeling": language_modeling}


@dataclass
class Side:
    """Gradients of one dataset under one member, (N, P), and Q (N,)."""

    output: np.ndarray
    loss: np.ndarray
    q: np.ndarray
    f: np.ndarray


def side(
    model: nn.Module, dataset: Any, values: Any, selects=lambda name: True, collate=default_collate, own=False
) -> Side:
    """Per-example gradients in float64, or with ``own=True`` of the model as it is; it is left alone."""
    model = model if own else copy.deepcopy(model).double()
    chosen = [p for n, p in model.named_parameters() if p.requires_grad and selects(n)]
    rows: dict[str, list] = {"f": [], "l": [], "q": [], "v": []}
    for index in range(len(dataset)):
        batch = collate([dataset[index]])
        batch = batch if own else double(batch)
        with torch.enable_grad():
            f, loss, q = values(model, batch)
        for key, value in (("f", f), ("l", loss)):
            grads = torch.autograd.grad(value, chosen, allow_unused=True, retain_graph=True)
            row = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, grads, strict=True)]
            rows[key].append(torch.cat([g.flatten().double() for g in row]).numpy())
        rows["q"].append(float(q.detach()))
        rows["v"].append(float(f.detach()))
    return Side(np.stack(rows["f"]), np.stack(rows["l"]), np.array(rows["q"]), np.array(rows["v"]))


def graddot(test: Side, train: Side) -> np.ndarray:
    return test.output @ -train.loss.T


def gradcos(test: Side, train: Side) -> np.ndarray:
    a, b = np.linalg.norm(test.output, axis=1), np.linalg.norm(train.loss, axis=1)
    return graddot(test, train) / np.outer(a, b)


def trak_kernel(test: Side, train: Side, damping: float) -> np.ndarray:
    """φ(z)ᵀ (ΦᵀΦ + λI)⁻¹ φ(i), λ = damping · mean ‖φ(i)‖², through the SVD of Φ."""
    phi = train.output
    lam = damping * (phi**2).sum(1).mean()
    _, s, vt = np.linalg.svd(phi, full_matrices=False)
    return ((test.output @ vt.T) / (s**2 + lam)) @ (phi @ vt.T).T


def trak(tests: list[Side], trains: list[Side], damping: float) -> np.ndarray:
    kernel = np.mean([trak_kernel(a, b, damping) for a, b in zip(tests, trains, strict=True)], axis=0)
    return kernel * np.mean([b.q for b in trains], axis=0)


def mean(method, tests: list[Side], trains: list[Side]) -> np.ndarray:
    return np.mean([method(a, b) for a, b in zip(tests, trains, strict=True)], axis=0)


def assert_close(found: Any, expected: Any, rel: float = 1e-4) -> None:
    """Largest difference relative to the largest expected number; the expected must not be all zero."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape, f"{found.shape} instead of {expected.shape}"
    scale = np.abs(expected).max()
    assert 0 < scale < np.inf, "the reference says nothing"
    error = np.abs(found - expected).max() / scale
    assert error <= rel, f"relative error {error:.2e} is over {rel:.0e}"
