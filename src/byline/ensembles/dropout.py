"""DROPOUT ENSEMBLE: D fixed dropout masks on each trained model (arXiv 2405.17293, section 3.1).

A mask belongs to the member. Whether a unit is kept depends on (seed, trained model, mask number, site, coordinate)
alone, through an integer hash: the same for every example, for training and test examples, in the gradient and in Q,
for every batch size, sequence length and device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from byline.ensembles.base import Change, Ensemble, Member, as_ensemble, check_count, check_seed
from byline.swaps import swapped, uncheckpointed
from byline.task import before_forward

# which dimensions (counted after the batch) share one decision: none, or all but the channel
_MODULES: dict[type[nn.Module], str] = {
    nn.Dropout: "unit",
    nn.Dropout1d: "channel",
    nn.Dropout2d: "channel",
    nn.Dropout3d: "channel",
    nn.AlphaDropout: "alpha",
    nn.FeatureAlphaDropout: "alpha-channel",
}
_FUNCTIONS: dict[Any, str] = {
    F.dropout: "unit",
    torch.dropout: "unit",
    torch.dropout_: "unit",
    F.dropout1d: "channel",
    F.dropout2d: "channel",
    F.dropout3d: "channel",
    torch.feature_dropout: "channel",
    F.alpha_dropout: "alpha",
    torch.alpha_dropout: "alpha",
    F.feature_alpha_dropout: "alpha-channel",
    torch.feature_alpha_dropout: "alpha-channel",
}
_NEVER = (nn.modules.batchnorm._NormBase, nn.RNNBase)
"""What is never put in train mode: statistics must not move, and dropout between layers runs in a fused kernel."""
_attention = F.scaled_dot_product_attention  # the original, while F's is swapped
_ALPHA = -1.7580993408473766  # SELU's negative saturation, to which AlphaDropout sends dropped units


@dataclass
class Sites:
    """Where dropout happens in a model's forward pass, in the order in which it is reached."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    batch_dims: list[tuple[int, int] | None] = field(default_factory=list)
    """Per site: the dimension that holds the examples and how many rows each has there; None without one."""
    functional: bool = False
    training: frozenset[str] | None = None
    """Names of the modules that must be in train mode for their functional dropout to run; None for all."""


_SITES: ContextVar[Sites | None] = ContextVar("byline_dropout_sites", default=None)
_ONLY: ContextVar[int | None] = ContextVar("byline_dropout_only", default=None)


@contextmanager
def located(sites: Sites | None) -> Iterator[None]:
    """Apply masks at these sites for as long as the context lasts."""
    token = _SITES.set(sites)
    try:
        yield
    finally:
        _SITES.reset(token)


@contextmanager
def only(copy: int) -> Iterator[None]:
    """Of several masks side by side, apply this one alone, to a batch that is not repeated."""
    token = _ONLY.set(copy)
    try:
        yield
    finally:
        _ONLY.reset(token)


def locate(model: nn.Module, forward: Callable[[int], Any], examples: int) -> Sites:
    """Find the dropout sites of a model by running it on ``examples`` and on one fewer.

    Functional dropout runs in train mode alone. Only those modules are put there which have some, and only if nothing
    else about the model changes: held against eval mode, with every dropout left out.

    Args:
        model: the model.
        forward: runs the model on this many examples, and gives tensors.
        examples: how many there are to run on (3 is enough, 1 leaves the batch dimension to be assumed first).

    Raises:
        ValueError: another number of sites for another number of examples, randomness outside of dropout, or a module
            that has functional dropout and does something else in train mode as well.
    """
    sites = _recorded(model, forward, examples, None)
    plain = _recorded(model, forward, examples, frozenset())
    same = _unchanged(model, forward, examples, None)
    if not same or len(sites.shapes) == len(plain.shapes):
        # whatever else modules do in train mode, those without functional dropout need not be there
        sites.training = _needed(model, forward, examples, len(plain.shapes), len(sites.shapes))
        again = _recorded(model, forward, examples, sites.training)
        again.training = sites.training
        sites = again
        if not same and not _unchanged(model, forward, examples, sites.training):
            raise ValueError(
                f"{_shown(sites.training or ())} drops functionally and does something else in train mode too (its own "
                "statistics, a temperature, noise?), so that a mask would change more than dropout; use nn.Dropout "
                "modules, or byline.WeightNoise"
            )
    if examples == 1:
        sites.batch_dims = [(0, shape[0]) if shape else None for shape in sites.shapes]
        return sites
    fewer = _recorded(model, forward, examples - 1, sites.training).shapes
    if len(fewer) != len(sites.shapes):
        raise ValueError(
            f"the model reaches {len(sites.shapes)} dropout layers with {examples} examples and {len(fewer)} with "
            f"{examples - 1}; a mask shared by all examples needs the same layers for every batch"
        )
    sites.batch_dims = [_batch_dim(a, b, examples) for a, b in zip(sites.shapes, fewer, strict=True)]
    return sites


def _recorded(model: nn.Module, forward: Callable[[int], Any], examples: int, training: frozenset[str] | None) -> Sites:
    before = torch.get_rng_state()
    try:
        with _kept(model), torch.enable_grad(), _Session(model, _Recorder(None), True, training) as session:
            forward(examples)
        drawn = not torch.equal(before, torch.get_rng_state())
    finally:
        torch.set_rng_state(before)
    if drawn:
        raise ValueError(
            "with dropout on, the model draws random numbers outside its dropout layers (stochastic depth, noise?); a "
            "fixed mask cannot hold those still: use byline.WeightNoise"
        )
    return session.handler.sites


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Put buffers back that a forward pass in train mode moves."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _unchanged(model: nn.Module, forward: Callable[[int], Any], examples: int, training: frozenset[str] | None) -> bool:
    """Whether the model says in train mode, with no unit dropped, what it says in eval mode, and keeps its buffers."""
    with torch.enable_grad():
        plain = _flat(forward(examples))
    before = [buffer.clone() for buffer in model.buffers()]
    with _kept(model), _Session(model, _Recorder(None), True, training):
        with torch.enable_grad():
            found = _flat(forward(examples))
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    loose = 1e-5 if plain.dtype in (torch.float32, torch.float64) else 5e-2
    size = float(plain.abs().max()) if plain.numel() else 0.0
    return not moved and torch.allclose(found, plain, rtol=loose, atol=loose * size, equal_nan=True)


def _flat(found: Any) -> Tensor:
    parts = found if isinstance(found, tuple | list) else [found]
    return torch.cat([part.detach().flatten() for part in parts if isinstance(part, Tensor)] or [torch.zeros(0)])


def _needed(model: nn.Module, forward: Callable[[int], Any], examples: int, plain: int, wanted: int) -> frozenset[str]:
    """The modules without which fewer dropout sites are reached in train mode."""
    if plain == wanted:
        return frozenset()
    names = [name for name, module in model.named_modules() if not isinstance(module, _NEVER)]
    return frozenset(n for n in names if len(_recorded(model, forward, examples, frozenset({n})).shapes) > plain)


def _shown(names: Collection[str]) -> str:
    found = sorted(names)
    return (found[0] or "the model") + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def _batch_dim(shape: tuple[int, ...], fewer: tuple[int, ...], examples: int) -> tuple[int, int] | None:
    for dim, (a, b) in enumerate(zip(shape, fewer, strict=False)):
        if a % examples == 0 and b == a // examples * (examples - 1):
            return dim, a // examples
    return None


def _keep(shape: tuple[int, ...], key: str, rate: float, device: torch.device) -> Tensor:
    """A boolean mask whose every entry depends on the key and its own coordinates alone."""
    low = 0xFFFFFFFF
    base = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    h = torch.tensor(base, dtype=torch.int64, device=device)
    for size in shape:
        h = (h.unsqueeze(-1) * 0x9E3779B1 + torch.arange(1, size + 1, device=device)) & low
        h = h ^ (h >> 16)
        h = (h * 0x85EBCA6B) & low
        h = h ^ (h >> 13)
        h = (h * 0xC2B2AE35) & low
        h = h ^ (h >> 16)
    return h >= int(rate * 2**32)


class _Handler:
    """What happens at a dropout site."""

    def __init__(self, rate: float | None):
        self.rate = rate

    def __call__(self, x: Tensor, rate: float, kind: str, site: int, is_module: bool) -> Tensor:
        raise NotImplementedError


class _Recorder(_Handler):
    """Notes each site and leaves the activations alone."""

    def __init__(self, rate: float | None):
        super().__init__(rate)
        self.sites = Sites()

    def __call__(self, x: Tensor, rate: float, kind: str, site: int, is_module: bool) -> Tensor:
        self.sites.shapes.append(tuple(x.shape))
        self.sites.rates.append(rate)
        self.sites.functional |= not is_module
        return x


class _Masker(_Handler):
    """Multiplies by the members' masks; several masks stand for so many copies of the batch, one after the other."""

    def __init__(self, keys: list[str], rate: float | None):
        super().__init__(rate)
        self.keys = keys
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, x: Tensor, rate: float, kind: str, site: int, is_module: bool) -> Tensor:
        # a functional dropout of rate 0 is no dropout layer; a module is one, whatever its rate
        if self.rate is not None and (is_module or rate > 0):
            rate = self.rate
        if rate == 0:
            return x
        sites = _SITES.get()
        place: tuple[int, int] | None = (0, 1)
        if sites is not None:
            if site >= len(sites.batch_dims):
                raise ValueError(
                    f"the model reached dropout layer {site} of {len(sites.batch_dims)} known; a mask shared by all "
                    "examples needs the same layers for every batch"
                )
            place = sites.batch_dims[site]
        chosen = _ONLY.get()
        copies = len(self.keys) if chosen is None else 1
        if place is None:
            if copies > 1:
                raise RuntimeError("a dropout layer without a batch dimension cannot hold several masks at once")
            own = tuple(x.shape)
            return self._drop(x, self._stack(own, rate, kind, site, x)[chosen or 0], rate, kind)
        dim, rows = place
        own = (*x.shape[:dim], rows, *x.shape[dim + 1 :])
        masks = self._stack(own, rate, kind, site, x)
        masks = (masks if chosen is None else masks[chosen : chosen + 1]).movedim(0, dim)  # (.., copies, rows, ..)
        split = x.unflatten(dim, (copies, -1, rows))
        return self._drop(split, masks.unsqueeze(dim + 1), rate, kind).flatten(dim, dim + 2)

    def _stack(self, shape: tuple[int, ...], rate: float, kind: str, site: int, x: Tensor) -> Tensor:
        where = (site, shape, rate, kind, x.device)
        if where not in self._masks:
            if kind.endswith("channel"):
                # (rows, channels, 1, ..): one decision per example row and channel
                shape = (*shape[:2], *[1] * (len(shape) - 2))
            self._masks[where] = torch.stack([_keep(shape, f"{key}/{site}", rate, x.device) for key in self.keys])
        return self._masks[where]

    @staticmethod
    def _drop(x: Tensor, keep: Tensor, rate: float, kind: str) -> Tensor:
        keep = keep.to(x.dtype)
        if kind.startswith("alpha"):
            a = (1 / ((1 - rate) * (1 + rate * _ALPHA**2))) ** 0.5
            return a * (x * keep + _ALPHA * (1 - keep)) - a * rate * _ALPHA
        return x * keep / (1 - rate)


class _FunctionalDropout(TorchFunctionMode):
    """Sends functional dropout, also inside attention, to the session's handler."""

    def __init__(self, session: _Session):
        super().__init__()
        self.session = session

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            if func is torch.dropout_:
                kwargs = {**kwargs, "inplace": True}
            return self._dropout(_FUNCTIONS[func], *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # its own body calls dropout and attention by their global names, out of this mode's sight
            with (
                swapped(F, "dropout", self._named("unit")),
                swapped(F, "scaled_dot_product_attention", self.attention),
            ):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _named(self, kind: str) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: self._dropout(kind, *args, **kwargs)

    def _dropout(
        self,
        kind: str,
        input: Tensor,
        p: float = 0.5,
        training: bool | None = None,
        inplace: bool = False,
        train: bool | None = None,
    ) -> Tensor:
        # the session puts modules in train mode, so a flag that is off was meant to be
        asked = train if training is None else training
        if asked is False or (asked is None and kind.startswith("alpha")):
            return input
        out = self.session.reach(input, p, kind, is_module=False)
        return input.copy_(out) if inplace else out

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Scaled dot-product attention written out, so that its dropout can be reached."""
        if dropout_p == 0:
            return _attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        weights = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            causal = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
            weights = weights.masked_fill(~causal, float("-inf"))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                weights = weights.masked_fill(~attn_mask, float("-inf"))
            else:
                weights = weights + attn_mask
        return self.session.reach(weights.softmax(-1), dropout_p, "unit", is_module=False) @ value


class _Session:
    """Dropout of one model under one handler, for as long as the context lasts."""

    def __init__(self, model: nn.Module, handler: Any, functional: bool, training: frozenset[str] | None = None):
        self.model, self.handler, self.functional, self.training = model, handler, functional, training
        self.reached = 0
        self._stack = ExitStack()

    def reach(self, x: Tensor, rate: float, kind: str, is_module: bool) -> Tensor:
        site = self.reached
        self.reached += 1
        return self.handler(x, rate, kind, site, is_module)

    def _restart(self, *_: Any) -> None:
        self.reached = 0

    def __enter__(self) -> _Session:
        modes = [(module, module.training) for module in self.model.modules()]
        self._stack.callback(_restore_modes, modes)
        for name, module in self.model.named_modules():
            kind = next(
                (k for t, k in _MODULES.items() if type(module).forward is t.forward and isinstance(module, t)),
                None,
            )
            if kind is not None:
                # an instance attribute hides the class's forward until it is deleted again
                module.forward = _bound(self, module, kind)
                self._stack.callback(module.__dict__.pop, "forward", None)
            # models ask self.training before they drop functionally
            if name in self.training if self.training is not None else not isinstance(module, _NEVER):
                module.training = True
        token = before_forward.set(self._restart)
        self._stack.callback(before_forward.reset, token)
        handle = self.model.register_forward_pre_hook(self._restart)
        self._stack.callback(handle.remove)
        # what runs again in the backward pass would reach each site another time
        self._stack.enter_context(uncheckpointed(reentrant=False))
        if self.functional:
            self._stack.enter_context(_FunctionalDropout(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _bound(session: _Session, module: Any, kind: str) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        out = session.reach(input, module.p, kind, is_module=True)
        return input.copy_(out) if module.inplace and out is not input else out

    return forward


class MaskChange(Change):
    """One mask, or several side by side on as many copies of the batch."""

    def __init__(self, seed: int, model_index: int, numbers: tuple[int, ...], p: float | None):
        self.seed, self.model_index, self.numbers, self.p = seed, model_index, numbers, p

    def spec(self) -> dict[str, Any]:
        """What the mask depends on."""
        return {"mask": [self.seed, self.model_index, *self.numbers, self.p]}

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """Mask every dropout site of the model."""
        sites = _SITES.get()
        keys = [f"{self.seed}/{self.model_index}/{number}" for number in self.numbers]
        training = None if sites is None else sites.training
        with _Session(model, _Masker(keys, self.p), sites is None or sites.functional, training):
            yield model

    def beside(self, others: list[MaskChange]) -> MaskChange:
        """This mask and others of the same trained model, side by side."""
        numbers = tuple(n for change in (self, *others) for n in change.numbers)
        return MaskChange(self.seed, self.model_index, numbers, self.p)


class Dropout(Ensemble):
    """D masks on each trained model.

    Args:
        base: the trained models (or any ensemble: each of its members counts as a trained model).
        masks: D, the masks per trained model.
        p: the rate of every dropout layer; None keeps each layer's own. It need not be the rate of training. An
            ``nn.Dropout`` of rate 0 is a layer too and takes ``p``; a functional call of rate 0 is none.
        forward_only: masks for TRAK's Q alone; the gradients come from the unmasked models, so that features are
            computed and stored I times rather than I·D times (arXiv 2405.17293, section 3.1).
        seed: of the masks.

    ``fit`` raises ValueError where the model has no dropout layer (`byline.WeightNoise` serves those), or one that
    cannot be reached.
    """

    kind = "dropout"

    def __init__(
        self,
        base: Ensemble,
        masks: int = 10,
        p: float | None = None,
        forward_only: bool = False,
        seed: int = 0,
    ):
        self.base = as_ensemble(base, "base")
        self.masks = check_count(masks, "masks")
        if p is not None and (not isinstance(p, int | float) or isinstance(p, bool) or not 0 <= p < 1):
            raise ValueError(f"p is {p!r}; expected None or a rate of at least 0 and below 1")
        self.p = None if p is None else float(p)
        self.forward_only = bool(forward_only)
        if any(isinstance(c, MaskChange) for member in self.base.members() for c in member.changes):
            raise ValueError("base has dropout masks already; expected one Dropout in a chain of ensembles")
        self.seed = check_seed(seed)
        self.kind = "forward-only" if self.forward_only else "dropout"

    def members(self) -> list[Member]:
        """Mask by mask within each base member."""
        return [
            member.under(
                MaskChange(self.seed, index, (number,), self.p),
                f"mask {number}",
                forward_only=self.forward_only,
            )
            for index, member in enumerate(self.base.members())
            for number in range(self.masks)
        ]

    def validate(self, model: nn.Module) -> None:
        """Refuse dropout that runs inside a fused kernel."""
        self.base.validate(model)
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(
                    f"ensemble is a Dropout ensemble and {name or 'the model'} is scripted or traced, so that its "
                    "dropout cannot be reached; expected the module it was made from, or byline.WeightNoise"
                )
            if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1:
                raise ValueError(
                    f"the dropout between the layers of {name or 'the model'} ({type(module).__name__}) runs inside a "
                    "fused kernel, where a mask cannot be fixed; use one module per layer with nn.Dropout between them"
                )


def refuse_without_sites(sites: Sites, changes: list[MaskChange]) -> None:
    """Refuse a model that has nothing to mask.

    Raises:
        ValueError: no dropout layer, or only layers of rate 0 and no ``p``.
    """
    if not sites.shapes:
        raise ValueError(
            "ensemble is a Dropout ensemble but the model reaches no dropout layer; give it one, or use "
            "byline.WeightNoise, which needs none"
        )
    if any(change.p is None for change in changes) and not any(rate > 0 for rate in sites.rates):
        raise ValueError("every dropout layer of the model has rate 0; give Dropout(..., p=) a rate")
