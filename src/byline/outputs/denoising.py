"""Denoising diffusion: the noise that was put on an example is predicted.

Of a clean example x, draw j of D has a timestep t_j and a noise ε_j, ``x_j = √ᾱ x + √(1 - ᾱ) ε_j`` with ᾱ at t_j, and
``ℓ = mean_j ‖model(x_j, t_j) - ε_j‖² / d``, the mean over draws and numbers of an example. ``f = -ℓ``, and ``Q = 1``.

Timesteps and noise are a hash of (seed, draw, the example's own numbers): the same whenever the example is met, as
training or as test example, alone or in any batch, and other ones for another example. The timesteps of an example are
stratified: one in each of D equal stretches of the schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byline import batches
from byline.batches import Batch
from byline.outputs.base import Evaluation, Output, kind
from byline.outputs.prediction import chosen

_CLEAN = ("x", "x0", "sample", "pixel_values", "images", "image", "latents")
_TIMES = ("t", "timestep", "timesteps", "time", "time_step", "noise_level")
_PREDICTS = ("noise", "sample", "velocity")
_EXPLAINS = ("loss", "square")
_LOW = 0xFFFFFFFF


class Denoising(Output):
    """The output of diffusion models, ``output="denoising"`` or ``output=byline.Denoising(...)``.

    A batch is the clean examples x alone, a tuple ``(x, *conditions)``, or a dict with x as one of ``x``, ``x0``,
    ``sample``, ``pixel_values``, ``images``, ``image`` or ``latents``. The model is called as ``model(x_j, t_j,
    *conditions)``, or by name; the timesteps t_j are integers (B,). It gives a tensor of the shape of x, or an object
    with ``.sample``.

    Args:
        schedule: ᾱ of every timestep, between 0 and 1 and never rising; a diffusers scheduler has it as
            ``alphas_cumprod``. Left out, that of DDPM: 1000 steps, β from 0.0001 to 0.02 in a line.
        draws: D, timesteps and noises per example; each costs a pass of the model.
        seed: of the draws.
        predicts: what the model does: ``"noise"`` ε, ``"sample"`` x, or ``"velocity"`` ``√ᾱ ε - √(1 - ᾱ) x``.
        explains: f: ``"loss"`` is -ℓ; ``"square"`` is the mean square of what the model says, ``mean_j ‖model(x_j,
            t_j)‖² / d`` (D-TRAK, Zheng et al. 2024): often the better kernel for TRAK, whose scores then have the sign
            of that kernel and no more.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "denoising"
    likelihood = False
    residual_varies = False
    expects = "a tensor of the shape of the clean examples"

    def __init__(
        self,
        schedule: Tensor | Sequence[float] | None = None,
        *,
        draws: int = 8,
        seed: int = 0,
        predicts: str = "noise",
        explains: str = "loss",
    ):
        if schedule is None:
            alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
        else:
            alphas = torch.as_tensor(schedule, dtype=torch.float64).detach().cpu()
        if alphas.ndim != 1 or not len(alphas) or not bool(((alphas >= 0) & (alphas <= 1)).all()):
            raise ValueError(
                f"schedule is {kind(alphas)}; expected one ᾱ between 0 and 1 per timestep (a diffusers scheduler's "
                "alphas_cumprod)"
            )
        if bool((alphas.diff() > 0).any()):
            raise ValueError("schedule rises; expected ᾱ from the least noise to the most, as alphas_cumprod has it")
        for label, count, least in (("draws", draws, 1), ("seed", seed, 0)):
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise ValueError(f"{label} is {count!r}; expected an int of at least {least}")
        for label, choice, known in (("predicts", predicts, _PREDICTS), ("explains", explains, _EXPLAINS)):
            if choice not in known:
                raise ValueError(f"{label} is {choice!r}; expected one of {', '.join(map(repr, known))}")
        self.schedule, self.draws, self.seed = alphas, draws, seed
        self.predicts, self.explains = predicts, explains

    @property
    def loss_follows_output(self) -> bool:  # type: ignore[override]
        """Whether f is -ℓ."""
        return self.explains == "loss"

    def split(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """All of the batch is input."""
        if isinstance(batch, Mapping):
            return (), dict(batch), None
        return tuple(batch) if isinstance(batch, tuple | list) else (batch,), {}, None

    def evaluation(self, model: nn.Module, batch: Batch) -> Evaluation:
        """The means over all draws."""
        args, named, _ = self.split(batch)
        key = next((k for k in _CLEAN if k in named), "")
        clean = args[0] if args else named.get(key)
        if not isinstance(clean, Tensor) or not clean.is_floating_point() or clean.ndim < 2:
            where = "the batch's first part" if not named else f"the batch's {key or ' or '.join(_CLEAN)}"
            raise ValueError(f"{where} is {kind(clean)}; denoising expects the clean examples, floating, (batch, …)")
        time = _time_of(model) if named else ""
        keys = _keys(clean, self.seed)
        losses, squares = [], []
        for draw in range(self.draws):
            t, noise = self._drawn(keys, draw, clean)
            alpha = self.schedule.to(clean.device)[t].reshape(-1, *[1] * (clean.ndim - 1))
            signal, rest = alpha.sqrt().to(clean.dtype), (1 - alpha).sqrt().to(clean.dtype)
            noisy = signal * clean + rest * noise
            returned = model(**{**named, key: noisy, time: t}) if named else model(noisy, t, *args[1:])
            said = self._said(returned, clean)
            target = {"noise": noise, "sample": clean, "velocity": signal * noise - rest * clean}[self.predicts]
            losses.append((said - target).square().flatten(1).mean(1))
            squares.append(said.square().flatten(1).mean(1))
        loss = torch.stack(losses).mean(0)
        f = -loss if self.explains == "loss" else torch.stack(squares).mean(0)
        return Evaluation(f, loss, torch.ones_like(loss).detach())

    def _said(self, returned: Any, clean: Tensor) -> Tensor:
        found = getattr(returned, "sample", None)
        if not isinstance(found, Tensor):
            found = chosen(returned, lambda t: t.shape == clean.shape, self.name, self.expects)
        if found.shape != clean.shape:
            raise ValueError(
                f"the model gave a tensor of shape {tuple(found.shape)} for noisy examples {tuple(clean.shape)}; "
                "denoising expects the same shape (of a model that learns variances too, return the noise alone)"
            )
        return found

    def _drawn(self, keys: Tensor, draw: int, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) and noise in the shape of the examples."""
        own = _mixed(keys + 2 * draw + 1)
        steps = len(self.schedule)
        place = (draw + _unit(_mixed(own + 0x51ED270B))) / self.draws
        t = (place * steps).floor().long().clamp(0, steps - 1)
        at = torch.arange(1, clean[0].numel() + 1, device=clean.device)
        unit = _unit(_mixed(_mixed(own.unsqueeze(1) + at * 0x9E3779B1)))
        noise = torch.erfinv(2 * unit - 1) * 2**0.5
        return t, noise.to(clean.dtype).reshape(clean.shape)

    def describe(self) -> str:
        """All that the numbers depend on."""
        return (
            f"denoising {batches.digest_of(self.schedule)[:16]} draws={self.draws} seed={self.seed} "
            f"predicts={self.predicts} explains={self.explains}"
        )

    def __repr__(self) -> str:
        return (
            f"Denoising({len(self.schedule)} timesteps, draws={self.draws}, seed={self.seed}, "
            f"predicts={self.predicts!r}, explains={self.explains!r})"
        )


def _time_of(model: nn.Module) -> str:
    named = inspect.signature(model.forward).parameters
    found = next((name for name in _TIMES if name in named), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__}.forward takes none of {', '.join(_TIMES)}; denoising expects a model that is told "
            "the timestep, or batches that are tuples (x, *conditions) for model(x, t, *conditions)"
        )
    return found


def _mixed(h: Tensor) -> Tensor:
    """A hash of 32 bits held in int64; integers alone, so that it's the same on every device and under vmap."""
    h = h & _LOW
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _LOW
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _LOW
    return h ^ (h >> 16)


def _unit(h: Tensor) -> Tensor:
    """Within 0 and 1, neither of them reached."""
    return (h.double() + 0.5) / 2**32


def _keys(x: Tensor, seed: int) -> Tensor:
    """(B,) a hash of each example's numbers, which sums of integers give whatever their order."""
    bits = x.detach().float().flatten(1).contiguous().view(torch.int32).long() & _LOW
    at = torch.arange(1, bits.shape[1] + 1, device=x.device)
    return _mixed(_mixed(_mixed(bits) ^ _mixed(at * 0x9E3779B1 + seed)).sum(1))
