"""What a run will take, before it: bytes, memory, FLOPs and time, from a few batches that are really computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset, TensorDataset, default_collate

from byline import batches
from byline.engines.local import Job, Unit, do, plan
from byline.engines.workbench import Collate, Workbench
from byline.ensembles.base import Ensemble, Member, as_ensemble, check_count
from byline.features import Exact, Features
from byline.ledger import Ledger
from byline.store import Store
from byline.store.chunks import Spec
from byline.store.quantize import SCALE
from byline.task import Task

_BATCHES = 3
_LONG = 1.0  # seconds beside which what only the first call takes is small
_TIMED, _MOST = 0.3, 50  # seconds, or batches, of which the mean is taken


@dataclass(frozen=True)
class Estimate:
    """What `fit` will take."""

    examples: int
    members: int
    """Distinct sets of gradients: forward-only members of one trained model count once."""
    columns: int
    """Numbers per example and member."""
    bytes: int
    """Of the store."""
    bytes_per_member: int
    """Of each member after the first, whose shared factors are there already."""
    memory: int
    """Peak bytes of a process that fits, without the dataset: measured, and the kernel of `Exact` TRAK beside it."""
    kernel: int
    """Of it, for an N × N kernel, which TRAK and TrackStar need with `Exact` features, and with `LowRank` where its
    products have as many entries as there are examples; 0 otherwise."""
    flops: float
    seconds: float
    """On this machine, one process."""

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)


def estimate(
    task: Task,
    ensemble: Ensemble,
    train_set: Any,
    *,
    features: Features | None = None,
    batch_size: int = 256,
    collate: Collate = default_collate,
    of: str = "output",
) -> Estimate:
    """Compute a few batches of one or two members, and say what all of them will take.

    Args:
        task: what is explained.
        ensemble: who votes.
        train_set: any map-style torch Dataset.
        features: how gradients become rows; `Exact` by default.
        batch_size: examples per batch.
        collate: makes a batch of a list of items.
        of: whose gradient: "output" or "loss".

    Returns:
        bytes, FLOPs and seconds of `fit`; members are taken to be alike, and batches too. It takes a few seconds, or
        as long as a few batches do where those take longer.
    """
    data = batches.as_dataset(train_set, "train_set")
    features = Exact() if features is None else features
    check_count(batch_size, "batch_size")
    members = as_ensemble(ensemble).members()
    distinct = list({m.identity("gradient"): m for m in reversed(members)}.values())[::-1]
    n = len(data)
    size = min(batch_size, n)
    chunks = range(n // size)[:_BATCHES]
    bench, store = Workbench(task, data, collate), Store(None)
    job = Job(task, features, data, "train_set", batch_size, of, collate, None, False)
    # one, another mask of the same model, and another model: what they have in common is kept once
    like = [m for m in distinct if m.weights.digest() == distinct[0].weights.digest()][:2]
    like += [m for m in distinct if m.weights.digest() != distinct[0].weights.digest()][:1]
    # masks of one model run side by side
    group = next(unit.members for unit in plan(job, distinct, store).units if unit.kind == "rows")
    before = _peak(reset=True)
    part = (
        TensorDataset(*(t[:size] for t in data.tensors)) if type(data) is TensorDataset else Subset(data, range(size))
    )
    reading = _seconds(lambda: batches.fingerprint(part)) * n / size
    calibrating = _seconds(lambda: _calibrate(bench, group[0], of))
    if calibrating < _LONG:
        # the first pass of all makes the machinery warm, which takes longer than a small model does
        with bench.active(group[0], "gradient") as active:
            active.capture(of)(job.batch(0, size, bench.device), of)
        calibrating = _seconds(lambda: _calibrate(Workbench(task, data, collate), group[0], of))
    learning = 0.0
    for member in {id(m): m for m in (*like, *group)}.values():
        first = Unit("learn", (member,), size)
        with bench.active(member, "gradient") as active:
            active.capture(of)
        learning = _seconds(partial(do, job, first, store, bench))
    counted = replace(job, ledger=Ledger())
    flops = do(counted, Unit("rows", (like[0],), size, ((0,),)), store, bench)
    for member in like[1:]:
        do(job, Unit("rows", (member,), size, ((0,),)), store, bench)
    computing = _per_chunk(job, group, size, chunks, store, bench) / len(group)
    residuals = len({m.identity("residual") for m in members} - {m.identity("gradient") for m in distinct})
    entry = store.record(job.key(like[0])) or {}
    arrays = {name: Spec.of(content).nbytes for name, content in entry["arrays"].items()}
    of_model = sum(arrays[name] for name in _shared(store, job, like[:2]))
    everywhere = sum(arrays[name] for name in _shared(store, job, [like[0], like[-1]]))
    state = sum(Spec.of(content).nbytes for content in entry["state"].values())
    vector = Spec.of(entry["vectors"]["residual"]).nbytes
    each = sum(arrays.values()) - max(of_model, everywhere) + state + 2 * vector
    models = len({m.weights.digest() for m in distinct})
    forms = {name: Spec.of(content).shape[1:] for name, content in entry["arrays"].items() if not name.endswith(SCALE)}
    columns = sum(int(np.prod(form)) for form in forms.values())
    width = features.width(forms, store.state(job.key(like[0])) or {})
    kernel = 0 if features.linear or (width is not None and width < n) else 3 * 8 * n * n
    count = len(distinct)
    return Estimate(
        examples=n,
        members=count,
        columns=columns,
        bytes=count * each + models * max(0, of_model - everywhere) + everywhere + residuals * vector,
        bytes_per_member=each,
        memory=max(before, _peak()) + kernel,
        kernel=kernel,
        flops=flops * n / size * count,
        seconds=reading
        + calibrating
        + (learning + computing * n / size) * count
        + computing * n / size / 3 * residuals,
    )


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _calibrate(bench: Workbench, member: Member, of: str) -> None:
    """What fitting does once for all members of one structure: it finds out how layers are to be differentiated."""
    with bench.active(member, "gradient") as active:
        active.capture(of)


def _per_chunk(
    job: Job, group: Sequence[Member], size: int, chunks: Sequence[int], store: Store, bench: Workbench
) -> float:
    """Seconds that members side by side take for a chunk, once everything is warm."""

    def one(chunk: int) -> float:
        return _seconds(lambda: do(job, Unit("rows", tuple(group), size, ((chunk,),) * len(group)), store, bench))

    first = one(chunks[0])
    if first > _TIMED:
        return first
    taken: list[float] = []
    while sum(taken) < _TIMED and len(taken) < _MOST:
        taken.append(one(chunks[len(taken) % len(chunks)]))
    return sum(taken) / len(taken)


def _shared(store: Store, job: Job, members: list[Member]) -> list[str]:
    """The arrays that two members have in common; none of one member."""
    if len({m.identity("gradient") for m in members}) < 2:
        return []
    one, two = ((store.record(job.key(member)) or {})["arrays"] for member in members)
    out = []
    for name, content in one.items():
        a, b = Spec.of(content), Spec.of(two[name])
        first = (0,) * len(a.shape)
        if a.count() and a.shape == b.shape and store.files.same(a.key(first), b.key(first)):
            out.append(name)
    return out


def _peak(reset: bool = False) -> int:
    """Peak bytes of this process, since the last reset where the system can do that."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0
