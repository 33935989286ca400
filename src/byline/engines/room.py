"""Whether memory and disk have room for what a fit keeps, from one example's gradient, before long work starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from byline import batches
from byline.engines.workbench import Workbench, counting
from byline.ensembles.base import Member
from byline.features import Exact, LowRank
from byline.features.calibrate import sketched
from byline.features.capture import Capture, attributed
from byline.store import Store

if TYPE_CHECKING:
    from byline.engines.local import Job, Plan

_SHARE = 0.9  # of what is free


def available() -> int:
    """Bytes that this process can still take: of the machine, of its control groups, and of its own limits."""
    return max(0, min(_machine(), *_groups(), *_limits()))


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**36


def _limits() -> Iterator[int]:
    """What ``ulimit`` leaves of the address space and of the data segment."""
    try:
        import resource

        pages = [int(number) * os.sysconf("SC_PAGE_SIZE") for number in Path("/proc/self/statm").read_text().split()]
    except (ImportError, OSError):
        return
    for limit, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            yield most - used


def _groups(own_groups: Path = Path("/proc/self/cgroup"), top: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What the control groups of a container or a service leave, in either version."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, own = line.split(":", 2)
        if number == "0":
            root, most, used = top, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, most, used = top / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inside = root / own.lstrip("/")
        for folder in (inside, *inside.parents):
            try:
                limit = int((folder / most).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                # pages of files are given back when memory is short
                files = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
                yield limit - int((folder / used).read_text()) + files
            except (OSError, ValueError):
                pass  # no such file, or "max"
            if folder == root:
                break


def check_rows(job: Job, found: Plan, store: Store, bench: Workbench, beside: int = 0) -> None:
    """Refuse rows that cannot fit into memory, or onto the store's disk.

    Args:
        job: what is computed.
        found: what the store lacks.
        store: where rows go.
        bench: puts members on the model.
        beside: bytes that the method needs in memory beside the rows.

    Raises:
        ValueError: says how much it would take, how much there is, and what takes less.
    """
    units = [unit for unit in found.units if unit.kind == "rows"]
    counts = [
        (member, min(len(lacking) * unit.chunk, len(job.dataset)))
        for unit in units
        for member, lacking in zip(unit.members, unit.missing, strict=True)
        if lacking
    ]
    in_memory = store.place is None
    free = available()
    disk = None if store.path is None else _free(store.path)
    # a row of factors is never larger than a gradient by much: most models need no closer look
    size = 2 * sum(p.numel() * max(4, p.element_size()) for p in bench.model.parameters())
    if job.features.linear:
        size = max(size, sum((job.features.row_bytes({}) or {}).values()))
    rows = sum(count for _, count in counts)
    if not counts or size * rows + beside < _SHARE * min(free, free if disk is None else disk):
        return
    sizes: dict[tuple[str, ...], dict[str, int]] = {}
    total: dict[str, int] = {}
    seen: set[str] = set()
    for member, count in counts:
        kind = tuple(change.structure() for change in member.chain("gradient"))
        if kind not in sizes:
            own = _sizes(job, member, bench)
            if own is None:
                return
            sizes[kind] = own
        for name, number in sizes[kind].items():
            # what went into a layer is kept once for all masks of a model, where it is the same
            shared = name == "inputs" and member.weights.digest() in seen
            total[name] = total.get(name, 0) + (0 if shared else number * count)
        seen.add(member.weights.digest())
    need = total["rows"] + total["inputs"]
    one = max(own["rows"] + own["inputs"] for own in sizes.values())
    held = max(own["learnt"] for own in sizes.values()) + beside
    what = (
        f"features is {job.features!r}, whose rows of {len(job.dataset)} {job.name} examples"
        f"{f' and {len(counts)} members' if len(counts) > 1 else ''} take about {_gb(need)} ({_gb(one)} an example)"
    )
    less = _fitting(job, counts, max(own["gradient"] for own in sizes.values()), free, sizes, beside)
    if disk is not None and need > _SHARE * disk:
        raise ValueError(f"{what}, and {_gb(disk)} are free in store={str(store.path)!r}; {less}")
    if in_memory and need + held > _SHARE * free:
        kernel = f", and what is held beside them {_gb(held)}" if held > need / 10 else ""
        raise ValueError(f"{what}{kernel}, and {_gb(free)} of memory are free; {less}, or store= on a disk with room")
    batch = 2 * one * min(job.batch_size, len(job.dataset))
    if not in_memory and batch + held > _SHARE * free:
        raise ValueError(
            f"{what}: {_gb(batch + held)} at a time, and {_gb(free)} of memory are free; "
            f"{less}, or a smaller batch_size than {job.batch_size}"
        )


def _sizes(job: Job, member: Member, bench: Workbench) -> dict[str, int] | None:
    """Bytes of one example's row, apart from what went into layers, of what is learnt, and of its gradient."""
    batch = batches.take(bench.probe, 0, 1)
    try:
        with bench.active(member, "gradient") as active:
            chosen = attributed(job.task, active.model, counting(member, job.task))
            # what no rule covers is differentiated once; whether the rules are right makes no difference to sizes
            sketch = replace(sketched(job.task, active.model, chosen, bench.probe, job.of), vectorised=False)
            blocks = Capture(job.task, active.model, chosen, sketch)(batch, job.of)[2]
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None  # it is said better where it is really computed
    own = job.features.row_bytes(blocks)
    if own is None:
        return None
    gradient = sum(p.numel() for p in chosen.values()) * 4
    inputs = own.pop("inputs", 0)
    return {
        "rows": own["rows"],
        "inputs": inputs,
        "learnt": job.features.learnt_bytes(blocks),
        "gradient": gradient,
        "low": sum((LowRank().row_bytes(blocks) or {}).values()),
        "exact": sum((Exact().row_bytes(blocks) or {}).values()),
    }


def _fitting(
    job: Job,
    counts: list[tuple[Member, int]],
    gradient: int,
    free: int,
    sizes: dict[tuple[str, ...], dict[str, int]],
    beside: int,
) -> str:
    """The features that would fit, with what they take."""
    rows = sum(count for _, count in counts)
    dims = [dim for dim in (4096, 2048, 1024, 512, 256, 64) if 4 * dim <= gradient and rows * 4 * dim < free / 2]
    out = [f"byline.Factorized({dims[0]}) takes {_gb(rows * 4 * dims[0])}"] if dims else []
    exact, low = (max(own[name] for own in sizes.values()) for name in ("exact", "low"))
    if low and rows * low + beside < free / 2:
        out.append(f"byline.LowRank() {_gb(rows * low)}")
    landmarks = next((n for n in (1024, 256) if n * exact + rows * 4 * n < free / 2), None)
    if landmarks:
        out.append(f"byline.Nystrom({landmarks}) {_gb(landmarks * exact + rows * 4 * landmarks)}")
    return f"use features that fit: {', '.join(out)}" if out else "use fewer parameters (params=) or fewer members"


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is, or is going to be."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.2g} MB"
