"""Training many small models, or one model on many subsets, at once.

The members' parameters lie stacked in tensors with one leading dimension, `torch.func.vmap` runs all of them
in one pass, and one elementwise optimizer steps them together: for small models a step of 25 members costs
little more than a step of one. Models that cannot be stacked (BatchNorm's running statistics change as a side
effect) are trained one after the other by the same loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_map

from byline import batches
from byline.batches import Batch
from byline.engines.base import Engine, Work, as_engine
from byline.guards import kept_random
from byline.ledger import Cost, count_flops
from byline.progress import Advance, bar
from byline.training.data import derive, fetch, order, take
from byline.training.recipe import Recipe

Build = Callable[[], nn.Module]
Loss = Callable[[Any, Batch], Tensor]
StateDict = dict[str, Tensor]

_WATCHED = 256  # held-out examples of each member at a time
_DROPOUT = 2  # names a random stream, see `derive`; `order` is 1


@dataclass(frozen=True)
class Run:
    """One trained model.

    Attributes:
        seed: The seed of its initial weights, example order and dropout.
        state_dict: Final weights, plain tensors on the CPU that share no memory; ``build()`` loads them.
        checkpoints: The kept epochs, counted from 1 (0 is the untrained model) -> weights after that epoch.
        learning_rates: Epoch -> mean learning rate of the steps since the previous kept epoch (or the start):
            the step size by which TracIn weights that checkpoint.
        losses: Mean training loss of each epoch, as met while training.
        cost: FLOPs, CPU seconds, wall seconds and bytes of this one model. FLOPs are those of a plain step
            times the steps, whatever else was trained beside it; seconds are its share of its group's.
        batched: Whether it was trained stacked with others.
        held_out: Mean loss of the examples held out, after each epoch; empty without any.
        epoch: The epoch whose weights are the final ones: the one of lowest held-out loss, or the last.
    """

    seed: int
    state_dict: StateDict = field(repr=False)
    checkpoints: dict[int, StateDict] = field(repr=False)
    learning_rates: dict[int, float]
    losses: tuple[float, ...] = field(repr=False)
    cost: Cost
    batched: bool
    held_out: tuple[float, ...] = field(default=(), repr=False)
    epoch: int = 0

    @property
    def flops(self) -> float:
        """Floating-point operations of this training."""
        return self.cost.flops

    @property
    def seconds(self) -> float:
        """CPU seconds of this training."""
        return self.cost.seconds


def train_many(
    build: Build,
    train_set: Any,
    recipe: Recipe,
    *,
    task_loss: Loss,
    subsets: Sequence[Any] | None = None,
    seeds: Sequence[int] = (0,),
    checkpoints: Sequence[int] | None = None,
    held_out: Sequence[Any] | None = None,
    validation_set: Any = None,
    patience: int = 3,
    group: int = 25,
    batched: bool | None = None,
    collate: Callable[[list[Any]], Batch] | None = None,
    device: str | torch.device = "cpu",
    progress: bool | Callable[[float], None] = False,
    engine: str | Engine | None = None,
) -> list[Run]:
    """Trains one model per seed, in groups of stacked models.

    A member's initial weights come from `torch.manual_seed(seed)`, its example order from its seed and the
    epoch. The dropout of a group is drawn together, so it depends on all seeds in the group: groups are
    consecutive members, `group` at a time, and the same call gives the same bits.

    Args:
        build: Makes a fresh model, taking its random numbers from torch's global generator.
        train_set: Map-style dataset, read once (see `fetch`).
        recipe: How to train.
        task_loss: ``loss(model, batch) -> (B,)``, per example and differentiable, such as ``task.loss``; what
            it gets as ``model`` is called like the model and shows its attributes.
        subsets: For each member the positions of its training examples; all examples when left out. In a
            group, members with subsets of different sizes are trained apart.
        seeds: One per member, at least 0.
        checkpoints: Epochs whose weights to keep, from 0 (untrained) to ``recipe.epochs``.
        held_out: For each member the positions of examples that tell when to stop: its final weights are those of the
            epoch after which their mean loss was lowest, and no epoch after that one is kept.
        validation_set: Examples outside the training set that tell every member when to stop instead.
        patience: How many epochs without a lower held-out loss end a member's training. A group goes on until it has
            ended for all of its members; what that costs counts for each of them.
        group: How many models to train at once.
        batched: Stack models (True), never (False), or wherever ``group`` is above 1 and a trial shows that it gives
            what the model alone gives.
        collate: Makes a batch of a list of items; torch's default when left out.
        device: Where to train; what comes back is on the CPU.
        progress: A transient bar, or a function that is told each advance in models.
        engine: Where groups are trained: in this process, ``"ray"`` or `byline.engines.Ray`.

    Returns:
        A `Run` per seed, in order.

    Raises:
        ValueError: If the arguments do not fit together, ``task_loss`` does not give (B,), ``batched=True``
            is asked of a model that cannot be stacked, or training diverges; the message names the seed and
            epoch.
    """
    seeds = [int(seed) for seed in seeds]
    where = as_engine(engine)
    data = fetch(train_set, "train_set", collate)
    members = _members(seeds, subsets, batches.size(data))
    other = None if validation_set is None else fetch(validation_set, "validation_set", collate)
    if held_out is not None or other is not None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience={patience!r}: expected a whole number of at least 1")
        members = _watched(members, held_out, data, other)
    kept = _kept(checkpoints, recipe.epochs)
    if group < 1:
        raise ValueError(f"group={group!r}: expected a whole number of at least 1")
    data = batches.to(data, torch.device(device))
    other = None if other is None else batches.to(other, torch.device(device))

    obstacle = _obstacle(build, task_loss, data, device)
    if batched and obstacle:
        raise ValueError(f"batched=True, but this model cannot be trained stacked: {obstacle}")
    stacked = (not obstacle and group > 1) if batched is None else batched

    flops = {size: _flops(build, task_loss, recipe, data, size, device) for size in {len(m.examples) for m in members}}
    groups = list(_chunks(members, group if stacked else 1))
    work = _Training(build, task_loss, recipe, data, kept, device, stacked, data if other is None else other, patience)
    trained: list[_Trained] = [None] * len(groups)  # type: ignore[list-item]
    with _advance(progress, len(members)) as advance:

        def told(steps: float = 1, doing: str | None = None) -> None:
            advance(steps)

        where.run(work, [groups], trained.__setitem__, told)
    runs: list[Run] = []
    for chunk, done in zip(groups, trained, strict=True):
        first = chunk[0]
        watched = 0 if first.held is None else len(first.held)
        # of the whole run, and a forward pass is a third of a step
        share = done.epochs / recipe.epochs * (1 + watched / len(first.examples) / 3)
        cost = Cost(flops[len(first.examples)] * share, done.seconds / len(chunk), done.wall / len(chunk))
        runs += [done.run(i, member.seed, recipe, kept, cost, stacked) for i, member in enumerate(chunk)]
    # chunks keep members in order except where subset sizes differ inside a group
    place = {id(member): i for i, member in enumerate(members)}
    order_of = [place[id(member)] for chunk in groups for member in chunk]
    return [runs[i] for i in np.argsort(order_of)]


def train_one(build: Build, train_set: Any, recipe: Recipe, *, task_loss: Loss, seed: int = 0, **options: Any) -> Run:
    """Trains one model: `train_many` with one seed and ``batched=False``; `options` are its own."""
    return train_many(build, train_set, recipe, task_loss=task_loss, seeds=[seed], **{"batched": False, **options})[0]


@dataclass(frozen=True)
class Trainer:
    """A training function for `byline.retrain`: called with (dataset, seed) it trains one model.

    `byline.retrain` notices `many` and lets it train many subsets at once.

    Attributes:
        build: Makes a fresh model.
        recipe: How to train.
        task_loss: ``loss(model, batch) -> (B,)``.
        group: How many models to train at once.
        collate: Makes a batch of a list of items; torch's default when left out.
    """

    build: Build
    recipe: Recipe
    task_loss: Loss
    group: int = 25
    collate: Callable[[list[Any]], Batch] | None = None

    def __call__(self, train_set: Any, seed: int) -> nn.Module:
        """One trained model, in eval mode."""
        model = self.build()
        model.load_state_dict(self.many(train_set, None, [seed])[0].state_dict)
        return model.eval()

    def many(self, train_set: Any, subsets: Sequence[Any] | None, seeds: Sequence[int], **options: Any) -> list[Run]:
        """A `Run` per seed, each on its subset; `options` are those of `train_many`."""
        options = {"group": self.group, "collate": self.collate, **options}
        return train_many(
            self.build,
            train_set,
            self.recipe,
            task_loss=self.task_loss,
            subsets=subsets,
            seeds=seeds,
            **options,
        )

    def describe(self) -> dict[str, Any]:
        """What decides the result, as JSON-able data: the recipe, the group and the parameters' shapes."""
        with _seeded(0, "cpu"):
            shapes = {name: list(tensor.shape) for name, tensor in self.build().named_parameters()}
        return {"recipe": self.recipe.to_dict(), "group": self.group, "parameters": shapes}


@dataclass
class _Training(Work):
    """Groups of members as pieces of work."""

    build: Build
    loss: Loss
    recipe: Recipe
    data: Batch
    kept: list[int]
    device: Any
    stacked: bool
    watched: Batch
    patience: int
    what = "build, task_loss and train_set"

    def do(self, piece: Sequence[Member], advance: Advance) -> _Trained:
        """Train a group."""
        with _seeded(derive(*(member.seed for member in piece), _DROPOUT), self.device):
            kind = _Stacked if self.stacked else _Single
            models = kind(self.build, self.loss, piece, self.device)
            return _fit(models, piece, self.data, self.recipe, self.kept, advance, self.watched, self.patience)

    def steps(self, piece: Sequence[Member]) -> float:
        """Models."""
        return len(piece)


# --- a group of models --------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A model to be trained."""

    seed: int
    examples: Tensor
    """The positions of its training examples."""
    held: Tensor | None = None
    """The positions of the examples that tell when to stop."""


class _Group(Protocol):
    """Models that take their steps together."""

    def parameters(self) -> list[Tensor]: ...
    def losses(self, batch: Batch) -> Tensor: ...
    def evaluating(self, on: bool) -> None: ...
    def states(self) -> list[StateDict]: ...


class _Stacked:
    """Models whose parameters are stacked, (members, ...) each."""

    def __init__(self, build: Build, loss: Loss, members: Sequence[Member], device: Any) -> None:
        models = [_fresh(build, member.seed, device) for member in members]
        self.template = models[0]
        tensors, self.buffers = stack_module_state(models)
        # Matrices lie here as their transposes, which is how vmap's gradients of Linear weights come: nothing
        # then has to be copied to bring gradient and weight into one layout, and a step takes half the time.
        self.turned = {name for name, tensor in tensors.items() if tensor.ndim == 3}
        self.tensors = {
            name: t.detach().mT.contiguous().requires_grad_(t.requires_grad) if name in self.turned else t
            for name, t in tensors.items()
        }
        named = (*self.template.named_parameters(), *self.template.named_buffers())
        stored_as = {id(tensor): name for name, tensor in named}
        # a tied weight has two keys in the state dict, and one stacked tensor
        self.keys = {k: stored_as[id(t)] for k, t in self.template.state_dict(keep_vars=True).items()}

        def one(tensors: StateDict, buffers: StateDict, batch: Batch) -> Tensor:
            weights = {name: t.mT if name in self.turned else t for name, t in tensors.items()}
            return loss(_Functional(self.template, {**weights, **buffers}), batch).mean()

        self.losses_of = vmap(one, randomness="different")

    def parameters(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors.values() if tensor.requires_grad]

    def losses(self, batch: Batch) -> Tensor:
        return self.losses_of(self.tensors, self.buffers, batch)

    def evaluating(self, on: bool) -> None:
        self.template.train(not on)

    def states(self) -> list[StateDict]:
        tensors = {name: t.mT if name in self.turned else t for name, t in self.tensors.items()}
        every = {**tensors, **self.buffers}
        count = len(next(iter(every.values())))
        return [{k: _plain(every[name][i]) for k, name in self.keys.items()} for i in range(count)]


class _Single:
    """A group of one, trained as it is."""

    def __init__(self, build: Build, loss: Loss, members: Sequence[Member], device: Any) -> None:
        (member,) = members
        self.model = _fresh(build, member.seed, device)
        self.loss = loss

    def parameters(self) -> list[Tensor]:
        return [tensor for tensor in self.model.parameters() if tensor.requires_grad]

    def losses(self, batch: Batch) -> Tensor:
        return self.loss(self.model, tree_map(lambda tensor: tensor[0], batch)).mean()[None]

    def evaluating(self, on: bool) -> None:
        self.model.train(not on)

    def states(self) -> list[StateDict]:
        return [{key: _plain(tensor) for key, tensor in self.model.state_dict().items()}]


class _Functional:
    """Stands in for a model under other weights: called like it, and with its attributes."""

    def __init__(self, model: nn.Module, tensors: StateDict) -> None:
        self._model, self._tensors = model, tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._model, self._tensors, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass
class _Trained:
    states: list[StateDict]
    checkpoints: dict[int, list[StateDict]]
    losses: Tensor  # (epochs that were trained, members)
    per_epoch: int
    seconds: float
    wall: float
    held_out: Tensor | None  # likewise
    best: list[int]  # epoch of each member's final weights

    @property
    def epochs(self) -> int:
        return len(self.losses)

    def run(self, i: int, seed: int, recipe: Recipe, kept: list[int], cost: Cost, batched: bool) -> Run:
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.states[i].values())
        kept = [epoch for epoch in kept if epoch <= self.best[i]]
        checkpoints = {epoch: self.checkpoints[epoch][i] for epoch in kept}
        watched = () if self.held_out is None else tuple(self.held_out[:, i].tolist())
        cost = Cost(cost.flops, cost.seconds, cost.wall, size * max(1, len(checkpoints)))
        losses = tuple(self.losses[:, i].tolist())
        rates = learning_rates(recipe, kept, self.per_epoch)
        return Run(seed, self.states[i], checkpoints, rates, losses, cost, batched, watched, self.best[i])


def _fit(
    models: _Group,
    members: Sequence[Member],
    data: Batch,
    recipe: Recipe,
    kept: list[int],
    advance: Callable[[float], None],
    watched: Batch,
    patience: int,
) -> _Trained:
    """The training loop, the same for stacked and single models."""
    cpu, wall = time.process_time(), time.perf_counter()
    parameters = models.parameters()
    optimizer = recipe.make_optimizer(parameters)
    size = len(members[0].examples)
    per_epoch, device = recipe.batches(size), parameters[0].device
    checkpoints = {0: models.states()} if 0 in kept else {}
    history = torch.zeros(recipe.epochs, len(members))
    held = None if members[0].held is None else torch.stack([m.held for m in members if m.held is not None]).to(device)
    seen = torch.full((recipe.epochs, len(members)), torch.inf)
    best, states = [recipe.epochs] * len(members), None
    for epoch in range(recipe.epochs):
        visits = torch.stack([m.examples[order(m.seed, epoch, size)] for m in members]).to(device)
        total = torch.zeros(len(members), device=device)
        for step, index in enumerate(visits.split(recipe.batch_size, dim=1)):
            optimizer.param_groups[0]["lr"] = recipe.rate(epoch * per_epoch + step, recipe.epochs * per_epoch)
            optimizer.zero_grad()
            losses = models.losses(take(data, index))
            losses.sum().backward()  # members share nothing, so this is each one's own gradient
            optimizer.step()
            total += losses.detach() * index.shape[1]
        history[epoch] = (total / size).cpu()
        for member, value in zip(members, history[epoch].tolist(), strict=True):
            if not np.isfinite(value):
                raise ValueError(f"training diverged: seed {member.seed}, epoch {epoch + 1}, mean loss {value}")
        if epoch + 1 in kept:
            checkpoints[epoch + 1] = models.states()
        advance(len(members) / recipe.epochs)
        if held is None:
            continue
        seen[epoch] = _held_out(models, watched, held)
        for member, value in zip(members, seen[epoch].tolist(), strict=True):
            if not np.isfinite(value):
                raise ValueError(
                    f"validation: seed {member.seed}, epoch {epoch + 1}, the mean loss of the held-out examples is "
                    f"{value}; expected a finite number"
                )
        lowest = (seen[: epoch + 1].argmin(0) + 1).tolist()
        now = models.states()
        # of members whose time is over, what comes later does not count
        over = [b + patience <= epoch for b in best] if states else [False] * len(members)
        best = [old if done else new for old, new, done in zip(best, lowest, over, strict=True)]
        states = [now[i] if b == epoch + 1 else states[i] for i, b in enumerate(best)] if states else now
        if all(b + patience <= epoch + 1 for b in best):
            advance(len(members) * (1 - (epoch + 1) / recipe.epochs))
            break
    done = epoch + 1
    return _Trained(
        states or models.states(),
        checkpoints,
        history[:done],
        per_epoch,
        time.process_time() - cpu,
        time.perf_counter() - wall,
        None if held is None else seen[:done],
        best,
    )


def _held_out(models: _Group, data: Batch, held: Tensor) -> Tensor:
    """(members,) each one's mean loss of the examples that it is not trained on."""
    models.evaluating(True)
    with torch.no_grad():
        parts = [models.losses(take(data, part)).cpu() * part.shape[1] for part in held.split(_WATCHED, dim=1)]
    models.evaluating(False)
    return torch.stack(parts).sum(0) / held.shape[1]


# --- what a run needs to know beforehand --------------------------------------------------------------------


def _members(seeds: list[int], subsets: Sequence[Any] | None, examples: int, name: str = "subsets") -> list[Member]:
    """Seeds and subsets, checked, as members."""
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds={seeds!r}: expected at least one whole number, none below 0")
    if subsets is None:
        return [Member(seed, torch.arange(examples)) for seed in seeds]
    if len(subsets) != len(seeds):
        raise ValueError(f"{name}: got {len(subsets)} subsets for {len(seeds)} seeds; expected one for each seed")
    members = []
    for i, (seed, subset) in enumerate(zip(seeds, subsets, strict=True)):
        index = np.asarray(subset)
        if index.dtype == bool or index.ndim != 1 or not len(index) or index.dtype.kind not in "iu":
            raise ValueError(
                f"{name}: number {i} has shape {index.shape} and dtype {index.dtype}; "
                "expected the positions of its examples, (k,) whole numbers"
            )
        if index.min() < 0 or index.max() >= examples:
            raise ValueError(
                f"{name}: number {i} points outside the train set: {index.min()} to {index.max()}, "
                f"expected 0 to {examples - 1}"
            )
        members.append(Member(seed, torch.from_numpy(index.astype(np.int64))))
    return members


def _watched(members: list[Member], held_out: Sequence[Any] | None, data: Batch, other: Batch | None) -> list[Member]:
    """Members that know which examples tell them when to stop."""
    if other is not None:
        if held_out is not None:
            raise ValueError("held_out and validation_set: expected one of them")
        every = torch.arange(batches.size(other))
        return [member._replace(held=every) for member in members]
    assert held_out is not None
    positions = _members([m.seed for m in members], held_out, batches.size(data), "held_out")
    for i, (member, found) in enumerate(zip(members, positions, strict=True)):
        if len(np.intersect1d(member.examples.numpy(), found.examples.numpy())):
            raise ValueError(f"held_out: number {i} has examples that its member is trained on; expected others")
    return [m._replace(held=found.examples) for m, found in zip(members, positions, strict=True)]


def _kept(checkpoints: Sequence[int] | None, epochs: int) -> list[int]:
    kept = sorted(set(checkpoints or ()))
    if kept and not (kept[0] >= 0 and kept[-1] <= epochs):
        raise ValueError(f"checkpoints={kept}: expected epochs from 0 to {epochs}")
    return kept


def _chunks(members: list[Member], group: int) -> Iterator[list[Member]]:
    """Consecutive members, at most `group` at a time, split where their subsets' sizes differ."""
    for start in range(0, len(members), group):
        chunk = members[start : start + group]
        for sizes in dict.fromkeys(map(_sizes, chunk)):
            yield [member for member in chunk if _sizes(member) == sizes]


def _sizes(member: Member) -> tuple[int, int]:
    return len(member.examples), 0 if member.held is None else len(member.held)


def learning_rates(recipe: Recipe, kept: list[int], per_epoch: int) -> dict[int, float]:
    """Epoch -> mean learning rate of the steps since the kept epoch before it; for 0 that of step one."""
    every = [recipe.rate(step, recipe.epochs * per_epoch) for step in range(recipe.epochs * per_epoch)]
    rates, start = {}, 0
    for epoch in kept:
        rates[epoch] = float(np.mean(every[start * per_epoch : epoch * per_epoch])) if epoch else recipe.lr
        start = epoch
    return rates


def _fresh(build: Build, seed: int, device: Any) -> nn.Module:
    with _seeded(seed, device):
        return build().to(device).train()


@contextmanager
def _seeded(seed: int, device: Any) -> Iterator[None]:
    """A random stream of its own for torch; the caller's goes on as if nothing had happened."""
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with kept_random(cuda):
        torch.manual_seed(seed)
        yield


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _obstacle(build: Build, loss: Loss, data: Batch, device: Any) -> str | None:
    """Why models of this kind cannot be trained stacked, or None: found out on two examples.

    Raises:
        ValueError: If the loss is not (B,).
    """
    some = torch.arange(min(2, batches.size(data)), device=device)
    batch = take(data, some)
    plain = _fresh(build, 0, device)
    buffers = {name: tensor.clone() for name, tensor in plain.named_buffers()}
    with _seeded(0, device), torch.no_grad():
        losses = loss(plain, batch)
        if not isinstance(losses, Tensor) or losses.shape != (len(some),):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"task_loss: got {got} for {len(some)} examples; expected one loss for each, ({len(some)},)"
            )
        changed = [name for name, tensor in plain.named_buffers() if not torch.equal(tensor, buffers[name])]
        if changed:
            return f"a training step changes its buffers ({', '.join(changed[:3])})"
        alone = torch.stack([loss(_fresh(build, seed, device).eval(), batch).mean() for seed in (0, 1)])
        try:
            members = [Member(seed, some) for seed in (0, 1)]
            pair = _Stacked(build, loss, members, device)
            twice = take(data, torch.stack([some, some]))
            pair.losses(twice)  # dropout may fail where eval mode does not
            pair.template.eval()
            together = pair.losses(twice)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            return f"torch.func refuses it ({str(error).strip().splitlines()[0]})"
    if not torch.allclose(alone, together, rtol=1e-3, atol=1e-4, equal_nan=True):
        return "stacked models give other losses than the models alone (state outside parameters and buffers?)"
    return None


def _flops(build: Build, loss: Loss, recipe: Recipe, data: Batch, size: int, device: Any) -> float:
    """FLOPs of training one model on this many examples: a plain step of each batch size, times their number."""
    model = _fresh(build, 0, device)

    def step(examples: int) -> int:
        if not examples:
            return 0
        batch = take(data, torch.arange(examples, device=device) % batches.size(data))
        with _seeded(0, device):
            return count_flops(lambda: loss(model, batch).mean().backward())

    full, rest = divmod(size, recipe.batch_size)
    return float(recipe.epochs * (full * step(recipe.batch_size if full else 0) + step(rest)))


@contextmanager
def _advance(progress: bool | Callable[[float], None], total: int) -> Iterator[Callable[[float], None]]:
    """What to call when some models have advanced."""
    if callable(progress):
        yield progress
        return
    with bar(total, "training", progress) as advance:
        yield advance
