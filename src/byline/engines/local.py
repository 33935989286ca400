"""Features and residuals of members, batch by batch, into a store.

The work is cut into units: `plan` says which chunks the store lacks, `do` computes the chunks of one unit and writes
them, and `finish` counts as complete what all chunks of are there. `do` touches no manifest, so that units may be done
anywhere and in any order, those that learn or declare before the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from byline import batches
from byline.engines.base import HERE, Engine, Work
from byline.engines.room import check_rows
from byline.engines.workbench import Active, Collate, Workbench, naming
from byline.ensembles.base import Member
from byline.ensembles.dropout import MaskChange
from byline.features.base import Features, Rows, State, sampled
from byline.features.blocks import Block, Flat, Lookup, Outer
from byline.features.capture import Capture, refuse_company
from byline.features.layers import is_finite
from byline.ledger import Ledger, count_flops
from byline.progress import Advance, bar
from byline.store import Store
from byline.store.chunks import DamagedError
from byline.store.quantize import decode, encode
from byline.task import Task

# side by side, masks share the overhead of each operation; beyond this many rows there is none left to share
_TILED_ROWS = 1024
_PIECES = 16  # per process
_WATCHED = 32  # from so many examples on, every chunk is watched
_CHECKED = (2, 8)  # members and examples of each that a store is held against
_CAPTURED = Capture.__call__  # taken once: whoever counts what is fitted does not count what is checked
_LOGITS = 2**25  # numbers of a prediction at once: a language model's are tokens × vocabulary per example


@dataclass
class Job:
    """What is needed to turn examples into rows."""

    task: Task
    features: Features
    dataset: Any
    name: str
    """What the dataset is called in messages."""
    batch_size: int
    of: str
    """"output" or "loss"."""
    collate: Collate = default_collate
    ledger: Ledger | None = None
    progress: bool = True
    first: int = 0
    """A part of the dataset begins here."""
    last: int | None = None
    """It ends here; None for the end of the dataset."""

    def batch(self, start: int, stop: int, device: torch.device) -> Any:
        """Examples on the device."""
        if stop > len(self.dataset):
            raise IndexError(stop)
        if self.collate is default_collate:
            found = batches.fetch(self.dataset, start, stop, self.name)
        else:
            found = batches.gather(self.dataset, list(range(start, stop)), self.collate, self.name)
        return batches.to(found, device)

    def pieces(self, batch: Any, copies: int = 1) -> Iterator[tuple[int, int, Any]]:
        """(start, stop, examples) of a batch, as many at a time as their predictions leave room for.

        Args:
            batch: the examples.
            copies: how often each is going to be repeated.
        """
        size, numbers = batches.size(batch), self.task.numbers(batch) * copies
        step = max(1, min(size, _LOGITS // numbers)) if numbers else size
        for start, stop in batches.spans(size, step):
            yield start, stop, batch if step == size else batches.take(batch, start, stop)

    def spans(self) -> list[tuple[int, int]]:
        """The batches of the dataset, or of the part of it."""
        last = len(self.dataset) if self.last is None else self.last
        return [(self.first + a, self.first + b) for a, b in batches.spans(last - self.first, self.batch_size)]

    def key(self, member: Member) -> str:
        """The store's name for a member's gradients."""
        return member_key(member.identity("gradient"), self.of)


@dataclass(frozen=True)
class Unit:
    """A piece of work on one member, or on several whose masks run side by side.

    Kinds: ``"learn"`` what a member's rows depend on, ``"rows"`` of the members, and for members whose gradients are
    another's (forward-only) ``"declare"`` and ``"residual"``.
    """

    kind: str
    members: tuple[Member, ...]
    chunk: int
    """Examples per chunk."""
    missing: tuple[tuple[int, ...], ...] = ()
    """The chunks that each member lacks."""
    share: float = 1.0
    """What its FLOPs are multiplied by: of a unit that was split, the first part stands for all."""

    @property
    def chunks(self) -> list[int]:
        """The chunks that at least one member lacks."""
        return sorted(set().union(*self.missing))

    @property
    def steps(self) -> int:
        """Chunks times members."""
        return len(self.chunks) * len(self.members)

    def split(self, most: int, length: int) -> list[Unit]:
        """The same work on a dataset of this length, in units of at most ``most`` chunks, in order."""
        chunks = self.chunks
        parts = [chunks[i : i + most] for i in range(0, len(chunks), most)]
        if len(parts) < 2:
            return [self]
        rows = [sum(min((c + 1) * self.chunk, length) - c * self.chunk for c in part) for part in parts]
        shares = [sum(rows) / rows[0], *(0.0 for _ in rows[1:])]
        return [self.narrowed(part, share) for part, share in zip(map(set, parts), shares, strict=True)]

    def narrowed(self, chunks: set[int], share: float = 1.0) -> Unit:
        """The same work on these chunks alone."""
        return replace(self, missing=tuple(tuple(c for c in m if c in chunks) for m in self.missing), share=share)


@dataclass
class Plan:
    """What a store lacks, in an order in which it can be done."""

    units: list[Unit] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Members that `finish` counts as complete."""
    vectors: list[tuple[str, str]] = field(default_factory=list)
    """Residuals of members without gradients of their own, likewise."""

    def __bool__(self) -> bool:
        return bool(self.units or self.keys or self.vectors)

    def stages(self, length: int, processes: int) -> list[list[Unit]]:
        """The units in an order in which they can be done, those of a stage in any order.

        Args:
            length: examples in the dataset.
            processes: how many other processes share the work; 0 for none.
        """
        if not processes:
            return [self.units]
        first = [unit for unit in self.units if unit.kind in ("learn", "declare")]
        others = [unit for unit in self.units if unit.kind not in ("learn", "declare")]
        # small enough for all to end at about the same time, large enough for a member's model to pay
        most = max(1, -(-sum(len(unit.chunks) for unit in others) // (_PIECES * processes)))
        return [first, [part for unit in others for part in unit.split(most, length)]]


class Writing(Work):
    """The units of a plan as pieces of work.

    Args:
        job: what is computed.
        members: of all the units.
        store: where to.
        bench: of this process; others make their own.
    """

    what = "the task, the ensemble and the training set"

    def __init__(self, job: Job, members: Sequence[Member], store: Store, bench: Workbench):
        self.job, self.members, self.store, self.bench = job, list(members), store, bench
        self._places = {id(member): place for place, member in enumerate(self.members)}

    def do(self, piece: Unit, advance: Advance) -> float:
        """`do` a unit; returns its FLOPs."""
        job = self.job if piece.share else replace(self.job, ledger=None)
        return do(job, piece, self.store, self.bench, advance) * piece.share

    def steps(self, piece: Unit) -> float:
        """Chunks times members."""
        return piece.steps

    def left(self, piece: Unit) -> Unit | None:
        """The chunks that the store still lacks."""
        if piece.kind in ("learn", "declare"):
            return piece
        if piece.kind == "residual":
            lacking = [self.store.missing_vector("residual", piece.members[0].identity("residual"))]
        else:
            lacking = [self.store.missing(self.job.key(member)) for member in piece.members]
        missing = tuple(
            own if lack is None else tuple(c for c in own if c in lack)
            for own, lack in zip(piece.missing, lacking, strict=True)
        )
        rest = replace(piece, missing=missing)
        return rest if rest.chunks else None

    def pack(self, piece: Unit) -> tuple[Unit, list[int]]:
        """Members by their places: their weights are sent once."""
        return replace(piece, members=()), [self._places[id(member)] for member in piece.members]

    def unpack(self, packed: tuple[Unit, list[int]]) -> Unit:
        """Members from their places."""
        unit, places = packed
        return replace(unit, members=tuple(self.members[place] for place in places))

    def credit(self, seconds: float) -> None:
        """For the ledger."""
        if self.job.ledger is not None:
            self.job.ledger.add_seconds("fitting", seconds, wall=0)

    def __getstate__(self) -> dict[str, Any]:
        ledger = None if self.job.ledger is None else Ledger()
        return {
            "job": replace(self.job, ledger=ledger, progress=False),
            "members": self.members,
            "place": shared_place(self.store),
            "device": shared_device(self.bench.device),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        job = state["job"]
        bench = Workbench(job.task, job.dataset, job.collate, state["device"])
        self.__init__(job, state["members"], Store(state["place"], worker=True), bench)  # type: ignore[misc]


def shared_place(store: Store) -> str | None:
    """What opens a store in a process that may run in another folder."""
    return store.place if store.path is None else os.path.abspath(store.path)


def shared_device(device: torch.device) -> str:
    """The kind of a device: each process sees those that are its own."""
    return device.type


def write_features(
    job: Job, members: Sequence[Member], store: Store, bench: Workbench, engine: Engine = HERE, beside: int = 0
) -> None:
    """Compute what the store lacks: features, outputs and residuals of every member, each distinct one once.

    ``beside`` is what the method needs in memory beside the rows, in bytes.
    """
    verify(job, members, store, bench)
    if not plan(job, members, store):
        return
    with store.writing():
        # with the lock the manifest has been read again
        found = plan(job, members, store)
        check_rows(job, found, store, bench, beside)
        stages = found.stages(len(job.dataset), engine.processes())
        with bar(sum(unit.steps for unit in found.units), "features", job.progress) as advance:
            work = Writing(job, members, store, bench)
            engine.run(work, stages, lambda place, flops: charge(job, flops or 0.0), advance)
        finish(found, store)


def plan(job: Job, members: Sequence[Member], store: Store) -> Plan:
    """What the store lacks of these members."""
    n, found = len(job.dataset), Plan()
    distinct = {m.identity("gradient"): m for m in reversed(members)}
    pending = [m for m in reversed(distinct.values()) if not store.complete(job.key(m))]
    found.keys = [job.key(m) for m in pending]
    for group in _groups(pending, job, store):
        chunk = store.chunk(job.key(group[0])) or min(job.batch_size, n)
        lacking = [store.missing(job.key(m)) for m in group]
        found.units += [Unit("learn", (m,), chunk) for m, lack in zip(group, lacking, strict=True) if lack is None]
        every = tuple(range(-(-n // chunk)))
        unit = Unit("rows", tuple(group), chunk, tuple(every if lack is None else tuple(lack) for lack in lacking))
        found.units += [unit] if unit.chunks else []
    own = {m.identity("gradient") for m in pending}
    rest = {m.identity("residual"): m for m in reversed(members)}
    for identity, member in reversed(rest.items()):
        if identity in own or store.has_vector("residual", identity):
            continue
        found.vectors.append(("residual", identity))
        chunk = store.vector_chunk("residual", identity) or min(job.batch_size, n)
        lack = store.missing_vector("residual", identity)
        if lack is None:
            found.units.append(Unit("declare", (member,), chunk))
            lack = list(range(-(-n // chunk)))
        found.units += [Unit("residual", (member,), chunk, (tuple(lack),))] if lack else []
    return found


def do(job: Job, unit: Unit, store: Store, bench: Workbench, advance: Advance | None = None) -> float:
    """Compute a unit and write its chunks.

    Args:
        job: what is computed.
        unit: of a plan for this job.
        store: where to; one opened with ``worker=True`` where another process has the lock.
        bench: a model of the job's task, of this process.
        advance: is told of each chunk.

    Returns:
        the FLOPs it took, as far as they are counted; 0 without a ledger.
    """
    with store.session():
        return _do(job, unit, store, bench, advance or (lambda steps=1, doing=None: None))


def _do(job: Job, unit: Unit, store: Store, bench: Workbench, advance: Advance) -> float:
    member = unit.members[0]
    if unit.kind == "learn":
        _learn(job, member, unit.chunk, store, bench)
        return 0.0
    if unit.kind == "declare":
        store.begin_vector("residual", member.identity("residual"), member.name, len(job.dataset), unit.chunk)
        return 0.0
    if unit.kind == "residual":
        return _write_residuals(job, unit, store, bench, advance)
    with bench.active(member, "gradient") as alone:
        if len(unit.members) == 1:
            return _write(job, unit, alone, store, bench, advance)
        tiled = alone.tiles and alone.capture(job.of).fast
    if tiled:
        with bench.active(member, "gradient", beside=unit.members[1:]) as active:
            return _write(job, unit, active, store, bench, advance)
    flops = 0.0
    for one, missing in zip(unit.members, unit.missing, strict=True):
        with bench.active(one, "gradient") as active:
            part = replace(unit, members=(one,), missing=(missing,))
            flops += _write(job, part, active, store, bench, advance)
    return flops


def finish(found: Plan, store: Store) -> None:
    """Count as complete what a plan was for, once all its units are done."""
    with store.writing():
        store.finish(found.keys, found.vectors)


def charge(job: Job, flops: float) -> None:
    """Tell the ledger what a unit took."""
    if job.ledger is not None and flops:
        job.ledger.add_flops("fitting", flops)


def verify(job: Job, members: Sequence[Member], store: Store, bench: Workbench) -> None:
    """Refuse a store whose numbers the model no longer gives: not all that they depend on leaves a trace elsewhere.

    A few examples, spread over the training set, are computed again under two of the members that the store has.

    Raises:
        ValueError: an output, a residual or a row is another one here; names the example and both numbers.
    """
    begun = {job.key(member): member for member in reversed(members) if store.present(job.key(member))[1]}
    for key in _drawn(sorted(begun), _CHECKED[0], "members"):
        member = begun[key]
        where = _spread(store, key, len(job.dataset))
        if where:
            _verify_rows(job, member, key, where, store, bench)
    apart = {m.identity("residual"): m for m in members if m.gradient_changes is not None}
    kept = sorted(identity for identity in apart if store.has_vector("residual", identity))
    for identity in _drawn(kept, 1, "residuals"):
        member, where = apart[identity], _drawn(range(len(job.dataset)), _CHECKED[1], identity)
        try:
            old = [store.number("residual", identity, i) for i in where]
        except DamagedError:
            continue
        batch = _gathered(job, where, bench)
        with bench.active(member, "residual") as active, naming(job.name, where):
            new = job.task.residual(active.model, batch).cpu().float()
        _compare(job, member, store, "residual", where, torch.tensor(old), new, _tolerance(active.model)[1])


def _verify_rows(job: Job, member: Member, key: str, where: list[int], store: Store, bench: Workbench) -> None:
    kept, read = [], []
    for index in where:
        # damage is for whoever needs the numbers to tell
        with suppress(DamagedError):
            kept.append(store.example(key, index))
            read.append(index)
    try:
        state = store.state(key) or {}
    except DamagedError:
        return
    if not read:
        return
    where = read
    values, residuals = (torch.tensor([one[i] for one in kept]) for i in range(2))
    with bench.active(member, "gradient") as active:
        capture, loose = active.capture(job.of), _tolerance(active.model)

        def again(places: list[int]) -> tuple[Tensor, Tensor, Rows]:
            with naming(job.name, places):
                value, residual, blocks = _CAPTURED(capture, _gathered(job, places, bench), job.of)
            arrays = encode(job.features.rows(blocks, state), job.features.dtype)
            rows = decode({name: torch.from_numpy(array) for name, array in arrays.items()})
            return value.cpu().float(), residual.cpu().float(), rows

        value, residual, rows = again(where)
        _compare(job, member, store, job.of, where, values, value, loose[1])
        _compare(job, member, store, "residual", where, residuals, residual, loose[1])
        for place, (index, (_, _, old)) in enumerate(zip(where, kept, strict=True)):
            if old is None:
                continue
            new = {name: part[place : place + 1] for name, part in rows.items()}
            length, gap = _apart(job.features, old, new)
            if gap <= loose[0] * length + loose[2]:
                continue
            # rounding may be large where terms cancel: then it is another one in a batch of one
            alone = again([index])[2]
            noise = _apart(job.features, new, alone)[1]
            if min(gap, _apart(job.features, old, alone)[1]) > loose[0] * length + loose[2] + 10 * noise:
                raise ValueError(
                    f"store {store.place or 'in memory'} was made by another model or collate: the features of "
                    f"{job.name}[{index}] under {member.name} differ by {gap / max(length, 1e-30):.2g} of their "
                    "length from those in the store. Use another folder, or delete this one"
                )


def _apart(features: Features, old: Rows, new: Rows) -> tuple[float, float]:
    """The length of one example's row, the longer one's, and that of the difference."""
    a, b = (
        {name: value.double() if value.is_floating_point() else value for name, value in r.items()} for r in (old, new)
    )
    own, other, both = (float(features.diagonal(x, y)) for x, y in ((a, a), (b, b), (a, b)))
    return max(own, other, 0.0) ** 0.5, max(own + other - 2 * both, 0.0) ** 0.5


def _compare(
    job: Job, member: Member, store: Store, what: str, where: list[int], old: Tensor, new: Tensor, loose: float
) -> None:
    odd = (~torch.isclose(new, old, rtol=loose, atol=loose, equal_nan=True)).nonzero()
    if len(odd):
        i = int(odd[0, 0])
        raise ValueError(
            f"store {store.place or 'in memory'} was made by another model or collate: the {what} of "
            f"{job.name}[{where[i]}] under {member.name} is {float(new[i]):.6g} here and {float(old[i]):.6g} in the "
            "store. Use another folder, or delete this one"
        )


def _tolerance(model: nn.Module) -> tuple[float, float, float]:
    """What may be rounding: of a row, relative to its length; of an output or a residual; of a row of no length."""
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return (0.2, 5e-2, 1e-2) if half else (1e-2, 1e-3, 1e-5)


def _spread(store: Store, key: str, n: int) -> list[int]:
    """A few examples of a member's chunks that are there, no two of one chunk while there are others."""
    size, chunks = store.present(key)
    found: list[int] = []
    for chunk in _drawn(chunks, _CHECKED[1], key):
        examples = range(chunk * size, min((chunk + 1) * size, n))
        found += _drawn(examples, -(-_CHECKED[1] // min(len(chunks), _CHECKED[1])), f"{key}/{chunk}")
    return sorted(found)[: _CHECKED[1]]


def _drawn(values: Sequence[Any], count: int, name: str) -> list[Any]:
    return [values[i] for i in sampled(len(values), count, 0, f"verify/{name}")]


def _gathered(job: Job, places: list[int], bench: Workbench) -> Any:
    return batches.to(batches.gather(job.dataset, places, job.collate), bench.device)


def member_key(identity: str, of: str) -> str:
    """The store's name for the gradients of a member: of its output, or of its loss."""
    return f"{identity}-{of}"


def _groups(members: Sequence[Member], job: Job, store: Store) -> list[list[Member]]:
    """Members that differ in the mask alone run side by side, where a batch is small enough for that to pay."""
    room = max(1, _TILED_ROWS // min(job.batch_size, len(job.dataset)))
    groups: list[list[Member]] = []
    previous: tuple[Any, ...] | None = None
    for member in members:
        chain = member.chain("gradient")
        signature: tuple[Any, ...] | None = None
        if chain and isinstance(chain[-1], MaskChange) and not any(isinstance(c, MaskChange) for c in chain[:-1]):
            mask = chain[-1]
            before = [str(change.spec()) for change in chain[:-1]]
            own = store.chunk(job.key(member)) or min(job.batch_size, len(job.dataset))
            signature = (member.weights.digest(), *before, mask.seed, mask.model_index, mask.p, own)
        if signature is not None and signature == previous and len(groups[-1]) < room:
            groups[-1].append(member)
        else:
            groups.append([member])
        previous = signature
    return groups


def _learn(job: Job, member: Member, chunk: int, store: Store, bench: Workbench) -> None:
    """What the features learn from the training set for a member, and the form of its rows."""
    n = len(job.dataset)
    seen: list[dict[str, Block]] = []

    def passes(indices: list[int] | None) -> Iterator[dict[str, Block]]:
        with bench.active(member, "gradient") as active:
            capture = active.capture(job.of)
            chosen = list(range(n)) if indices is None else indices
            for start, stop in batches.spans(len(chosen), job.batch_size):
                part = chosen[start:stop]
                whole = batches.to(batches.gather(job.dataset, part, job.collate), bench.device)
                for a, b, batch in job.pieces(whole):
                    blocks = _checked(job, capture, batch, part[a:b])[2]
                    if not seen:
                        seen.append({name: _cut(block, 0, 1) for name, block in blocks.items()})
                    yield blocks

    state = job.features.learn(passes, n)
    if not seen:
        next(iter(passes([0])))
    about = {
        "member": member.name,
        "identity": member.identity("gradient"),
        "of": job.of,
        "weights": member.weights.digest(),
        "changes": [change.spec() for change in member.chain("gradient")],
        "dtype": job.features.dtype,
        "examples": n,
    }
    store.begin(job.key(member), about, chunk, state, encode(job.features.rows(seen[0], state), job.features.dtype))


def _write(job: Job, unit: Unit, active: Active, store: Store, bench: Workbench, advance: Advance) -> float:
    """The rows of a unit's members, which are on the workbench side by side."""
    copies = len(unit.members)
    keys = [job.key(member) for member in unit.members]
    states = [store.state(key) or {} for key in keys]
    capture, flops = active.capture(job.of), 0.0
    doing = f"features of {unit.members[0].name}" + (f" and {copies - 1} more" if copies > 1 else "")
    chunks = unit.chunks
    for index in chunks:
        low, high = _range(job, unit, index)
        parts: list[list[dict[str, np.ndarray]]] = [[] for _ in unit.members]
        values, residuals = torch.empty(copies, high - low), torch.empty(copies, high - low)
        for start, stop, batch in _batches(job, low, high, bench, copies):
            size = stop - start
            if copies > 1:
                batch = batches.tile(batch, copies)
            value, residual, blocks = _checked(job, capture, batch, range(low + start, low + stop))
            if job.ledger is not None and not flops:
                rows = sum(high - low for low, high in (_range(job, unit, i) for i in chunks))
                flops = _row_flops(job, capture, batch, states[0]) * rows / size
            if start == 0:
                _watch(job, active, index, low, high, value.view(copies, size), job.of, capture.verdict.coarse)
            values[:, start:stop] = value.view(copies, size)
            residuals[:, start:stop] = residual.view(copies, size)
            for copy, state in enumerate(states):
                if index not in unit.missing[copy]:
                    continue
                own = blocks if copies == 1 else {k: _cut(b, copy * size, size) for k, b in blocks.items()}
                parts[copy].append(encode(job.features.rows(own, state), job.features.dtype))
        for copy, key in enumerate(keys):
            if parts[copy]:
                store.write(key, index, _joined(parts[copy]), values[copy], residuals[copy])
        advance(copies, doing)
    return flops


def _watch(job: Job, active: Active, index: int, low: int, high: int, values: Tensor, of: str, coarse: bool) -> None:
    """Hold one example of a chunk's first batch, collated alone, to what the batch says of it.

    Args:
        job: what is computed.
        active: the member.
        index: of the chunk; of small ones only some are looked at.
        low: where the chunk begins.
        high: where it ends.
        values: (copies, B) what the batch says.
        of: "output", "loss" or "residual".
        coarse: whether half precisions take part.

    Raises:
        ValueError: names the example.
    """
    copies, size = values.shape
    if size < 2 or (high - low < _WATCHED and index & (index - 1)):
        return
    place = (index * 7919 + 13) % size
    batch = job.batch(low + place, low + place + 1, active.device)
    scale = float(values.abs().mean())
    with naming(job.name, [low + place]), torch.enable_grad():
        batch = batches.tile(batch, copies) if copies > 1 else batch
        task = job.task
        alone = (
            task.residual(active.model, batch) if of == "residual" else task.differentiate(active.model, batch, of)[0]
        )
        for copy in range(copies):
            refuse_company(values[copy, place : place + 1], alone.detach()[copy : copy + 1].cpu(), coarse, scale)


def _batches(job: Job, low: int, high: int, bench: Workbench, copies: int = 1) -> Iterator[tuple[int, int, Any]]:
    """(start, stop, examples) of a chunk, counted from its beginning: one batch where there is room for it."""
    for start, stop in batches.spans(high - low, job.batch_size):
        whole = job.batch(low + start, low + stop, bench.device)
        for a, b, batch in job.pieces(whole, copies):
            yield start + a, start + b, batch


def _range(job: Job, unit: Unit, index: int) -> tuple[int, int]:
    return index * unit.chunk, min((index + 1) * unit.chunk, len(job.dataset))


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The rows of a chunk that took several batches; positions are filled up with zeros to the longest."""
    if len(parts) == 1:
        return parts[0]
    out = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        form = tuple(map(max, zip(*(a.shape[1:] for a in arrays), strict=True)))
        pads = [[(0, 0), *((0, f - s) for f, s in zip(form, a.shape[1:], strict=True))] for a in arrays]
        out[name] = np.concatenate([np.pad(a, pad) for a, pad in zip(arrays, pads, strict=True)])
    return out


def _checked(job: Job, capture: Capture, batch: Any, indices: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Block]]:
    with naming(job.name, indices):
        value, residual, blocks = capture(batch, job.of)
    total = sum(float(b.grad.sum() if isinstance(b, Flat) else b.right.sum()) for b in blocks.values())
    total += sum(float(b.left.sum()) for b in blocks.values() if isinstance(b, Outer))
    total += float(value.sum()) + float(residual.sum())
    if total != total or total in (float("inf"), float("-inf")):
        finite = torch.stack([is_finite(b) for b in blocks.values()] + [value.isfinite(), residual.isfinite()]).all(0)
        if not finite.all():
            position = indices[int((~finite).nonzero()[0, 0]) % len(indices)]
            raise ValueError(
                f"{job.name}[{position}] has a NaN or infinite gradient or output; expected finite numbers "
                "(check that example, and the checkpoint's weights)"
            )
    return value, residual, blocks


def _row_flops(job: Job, capture: Capture, batch: Any, state: State) -> int:
    """What turning a batch into rows takes."""
    return count_flops(lambda: job.features.rows(capture(batch, job.of)[2], state))


def _cut(block: Block, start: int, size: int) -> Block:
    """One member's part of a batch that held several."""
    place = slice(start, start + size)
    if isinstance(block, Flat):
        return Flat(block.params, block.grad[place])
    if isinstance(block, Lookup):
        return Lookup(block.params, block.ids[place], block.right[place], block.n)
    return Outer(block.params, block.left[place], block.right[place])


def _write_residuals(job: Job, unit: Unit, store: Store, bench: Workbench, advance: Advance) -> float:
    """Q of a member whose gradients come from another configuration (forward-only): forward passes alone."""
    (member,), flops = unit.members, 0.0
    identity, chunks = member.identity("residual"), unit.chunks
    with bench.active(member, "residual") as active:
        coarse = active.held()
        for index in chunks:
            low, high = _range(job, unit, index)
            residuals = torch.empty(high - low)
            for start, stop, batch in _batches(job, low, high, bench):
                with naming(job.name, range(low + start, low + stop)):
                    residuals[start:stop] = job.task.residual(active.model, batch)
                if start == 0:
                    _watch(job, active, index, low, high, residuals[None, start:stop], "residual", coarse)
                if job.ledger is not None and not flops:
                    rows = sum(high - low for low, high in (_range(job, unit, i) for i in chunks))
                    flops = count_flops(partial(job.task.residual, active.model, batch)) * rows / (stop - start)
            bad = (~residuals.isfinite()).nonzero()
            if len(bad):
                raise ValueError(
                    f"{job.name}[{low + int(bad[0, 0])}] has a NaN or infinite output; expected finite numbers"
                )
            store.write_vector("residual", identity, index, residuals)
            advance(1, f"residuals of {member.name}")
    return flops


def stream_rows(
    job: Job, member: Member, state: State, bench: Workbench, active: Active | None = None
) -> Iterator[tuple[int, int, Rows]]:
    """(start, stop, rows) of a dataset that is not kept: test examples, or training examples from their other side.

    Pass ``active`` where the member is on the workbench already: its changes must not be applied twice.
    """
    with bench.active(member, "gradient") if active is None else nullcontext(active) as active:
        capture = active.capture(job.of)
        for first, last in job.spans():
            for a, b, batch in job.pieces(job.batch(first, last, bench.device)):
                start, stop = first + a, first + b
                _, _, blocks = _checked(job, capture, batch, range(start, stop))
                if start == 0 and job.ledger is not None:
                    job.ledger.add_flops(
                        "serving", _row_flops(job, capture, batch, state) * len(job.dataset) / (stop - start)
                    )
                yield start, stop, job.features.rows(blocks, state)
