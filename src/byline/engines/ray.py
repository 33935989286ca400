"""Work on Ray: pieces as tasks, on the cores of this machine or of a cluster.

What a piece is and how it is done is `byline.engines.base.Work`'s, the same as in process. Here is who does it: each
task gets a piece; the work itself (task, members, dataset) goes once to each process, which keeps it. What is sent is
pickled by Ray between the processes of one user; nothing that comes from a store or a checkpoint ever is.

A worker that is lost (killed, out of memory, its machine gone) costs what it had not finished: the driver asks the work
what is left of the piece, and gives that to another.
"""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from byline.engines.base import Engine, Take, Work, installed
from byline.progress import Advance
from byline.store import Store

log = logging.getLogger("byline")

_PATIENCE = 10.0  # seconds that tasks get to end after something went wrong elsewhere


@dataclass
class Ray(Engine):
    """Tasks on Ray, which this process joins or starts when it is first needed.

    A Ray that runs in this process already (``ray.init``) is used as it is. Otherwise ``address`` is joined, or that in
    the environment variable ``RAY_ADDRESS``; without either, Ray starts on this machine and ends with this process, or
    with `close`. No usage statistics are sent.

    Args:
        address: of a cluster, such as ``"auto"`` or ``"10.0.0.1:6379"``.
        workers: tasks at once; as many as the cluster has room for when left out.
        cpus: cores per task, and threads; the cluster's cores over ``workers`` when left out, else 1.
        gpus: GPUs per task, or a part of one. Untested.
        retries: how many lost workers a piece of work survives.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: an argument is out of range.
    """

    address: str | None = None
    workers: int | None = None
    cpus: int | None = None
    gpus: float = 0
    retries: int = 3

    def __post_init__(self) -> None:
        installed("ray", "ray", "engine 'ray'")
        for name, least in (("workers", 1), ("cpus", 1), ("retries", 0)):
            value = getattr(self, name)
            if value is None and name != "retries":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; expected an int of at least {least}")
        if not isinstance(self.gpus, int | float) or isinstance(self.gpus, bool) or not 0 <= self.gpus < math.inf:
            raise ValueError(f"gpus is {self.gpus!r}; expected a number of at least 0")
        if self.address is not None and not isinstance(self.address, str):
            raise ValueError(f"address is {self.address!r}; expected a str such as 'auto' or '10.0.0.1:6379'")
        self._started = False

    def check(self, store: Store) -> None:
        """Workers write to the store themselves.

        Raises:
            ValueError: it is in memory.
        """
        if store.place is None or store.place.startswith("memory:"):
            where = "None" if store.place is None else f"{store.place}, which only one process sees"
            raise ValueError(
                f"engine is 'ray', whose workers write straight to the store, and store is {where}; expected a folder "
                "or a URL that all of them reach"
            )

    def processes(self) -> int:
        """Tasks at once, as the cluster is now."""
        return self._room()[0]

    def close(self) -> None:
        """End Ray, if this engine started it."""
        if self._started:
            import ray

            ray.shutdown()
            self._started = False

    def run(
        self, work: Work, stages: Sequence[Sequence[Any]], take: Take, advance: Advance, ordered: bool = False
    ) -> None:
        """Tasks, at most as many as `processes` at once.

        Raises:
            ValueError: the work cannot be pickled.
            RuntimeError: one piece lost more workers than ``retries``.
        """
        ray = self._connected()
        at_once, threads = self._room()
        options: dict[str, Any] = {"num_cpus": threads, "num_gpus": self.gpus, "max_retries": 0}
        task = ray.remote(**options)(_perform)
        # in a list, or Ray would hand the content to every task instead of the reference
        shelf = [ray.put(_pickled(work))]
        name, lost, first = uuid.uuid4().hex, Counter[int](), 0
        waiting: dict[int, Any] = {}
        running: dict[Any, tuple[int, Any]] = {}
        try:
            for stage in stages:
                todo = deque(enumerate(stage, first))
                given, first = first, first + len(stage)
                while todo or running:
                    while todo and len(running) < at_once and (not ordered or todo[0][0] < given + 2 * at_once):
                        place, piece = todo.popleft()
                        running[task.remote(name, shelf, threads, work.pack(piece))] = place, piece
                    (reference, *_), _ = ray.wait(list(running))
                    place, piece = running.pop(reference)
                    try:
                        result, seconds = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        raise (error.cause if isinstance(error.cause, Exception) else error) from error
                    except ray.exceptions.RayError as error:
                        lost[place] += 1
                        self._bear(error, lost[place], work)
                        rest = work.left(piece)
                        if rest is not None:
                            advance(work.steps(piece) - work.steps(rest))
                            todo.appendleft((place, rest))
                            continue
                        result, seconds = None, 0.0
                    result = work.receive(result)
                    work.credit(seconds)
                    advance(work.steps(piece))
                    if not ordered:
                        take(place, result)
                        continue
                    waiting[place] = result
                    while given in waiting:
                        take(given, waiting.pop(given))
                        given += 1
        finally:
            _end(ray, list(running))

    def _bear(self, error: Exception, times: int, work: Work) -> None:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if times > self.retries:
            raise RuntimeError(
                f"Ray lost {times} workers on the same piece of {work.what}: {said} (out of memory? fewer workers or a "
                "smaller batch_size may help); what is complete is kept"
            ) from None
        log.warning("Ray lost a worker: %s What it had not finished goes to another.", said)

    def _connected(self) -> Any:
        """Ray, joined or started."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's announcement of how a later version treats tasks without GPUs is no news to a user of byline
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        if ray.is_initialized():
            return ray
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"logging_level": logging.WARNING}
        if address == "local":
            options |= {"num_cpus": _cores(), "include_dashboard": False}
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            said = str(error).strip().splitlines()[0]
            raise ConnectionError(f"address is {address!r}, and no Ray answers there: {said}") from None
        self._started = True
        return ray

    def _room(self) -> tuple[int, int]:
        """Tasks at once, and cores for each."""
        nodes = [node["Resources"] for node in self._connected().nodes() if node["Alive"]]
        cores = max(1, int(sum(node.get("CPU", 0) for node in nodes)))
        largest = max(1, int(max((node.get("CPU", 0) for node in nodes), default=1)))
        # no task fits into two machines
        each = self.cpus or (1 if self.workers is None else max(1, min(largest, cores // self.workers)))
        if self.workers is not None:
            return self.workers, each
        room = cores // each
        if self.gpus:
            room = min(room, int(sum(node.get("GPU", 0) for node in nodes) / self.gpus))
        return max(1, room), each


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pickled(work: Work) -> bytes:
    from ray import cloudpickle

    try:
        return cloudpickle.dumps(work)
    except Exception as error:
        raise ValueError(
            f"engine is 'ray', which sends {work.what} to other processes, and not all of it can be pickled "
            f"({type(error).__name__}: {error}); expected a model, functions and datasets without open files, locks or "
            "connections"
        ) from error


def _end(ray: Any, running: list[Any]) -> None:
    """Let no task go on writing after the run has ended."""
    if not running or not ray.is_initialized():
        return
    for reference in running:
        ray.cancel(reference, force=False)
    _, left = ray.wait(running, num_returns=len(running), timeout=_PATIENCE)
    for reference in left:
        ray.cancel(reference, force=True)


# in a worker

_kept: dict[str, Work] = {}


def _perform(name: str, shelf: list[Any], threads: int, packed: Any) -> tuple[Any, float]:
    """Do a piece; returns its result and the CPU seconds it took."""
    import ray
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if name not in _kept:
        _kept.clear()
        # bytes, not objects of Ray's own pickling: those would share read-only memory
        _kept[name] = ray.cloudpickle.loads(ray.get(shelf[0]))
    work, before = _kept[name], time.process_time()
    result = work.send(work.do(work.unpack(packed), _silent))
    return result, time.process_time() - before


def _silent(steps: float = 1, doing: str | None = None) -> None:
    """The bar is the driver's."""
