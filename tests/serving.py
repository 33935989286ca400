"""What the tests of the service share: what is served, and a service in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
from byline.serve import Client, Served

N = 60
NEEDED = ("fastapi", "uvicorn", "prometheus_client", "httpx", "schemathesis")


def needs_extra() -> None:
    """Skip a module of tests where the extra is missing; with BYLINE_CI=1 fail."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("BYLINE_CI") == "1":
        pytest.fail(f"{', '.join(missing)} is not installed, and BYLINE_CI=1 leaves nothing out", pytrace=False)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)


def examples(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def models(count: int = 2, seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).eval() for _ in range(count)]


def attributor(seed: int = 0, **options: Any) -> byline.TRAK:
    made = models(2, seed)
    options = {"features": byline.Factorized(16), "damping": 0.3, "progress": False, **options}
    return byline.TRAK(byline.Task(made[0]), byline.Independent(made), **options)


def served(store: Any = None) -> Served:
    """What most tests serve."""
    told = [{"name": f"row {i}", "owner": None if i % 2 else 'ä"<script>\ud800'} for i in range(N)]
    return Served(attributor(store=store), examples(N, 0), metadata=told)


def another_model(store: Any = None) -> Served:
    """The same data under another model."""
    made = attributor(seed=9, features=byline.Factorized(12), store=store)
    return Served(made, examples(N, 0))


class Slow(nn.Module):
    """Takes its time for every pass."""

    def __init__(self, inner: nn.Module, seconds: float):
        super().__init__()
        self.inner, self.seconds = inner, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.inner(x)


def slow(store: Any = None) -> Served:
    """A model that needs BYLINE_TEST_SECONDS for every pass."""
    model = Slow(models(1)[0], float(os.environ.get("BYLINE_TEST_SECONDS", "0"))).eval()
    made = byline.GradDot(
        byline.Task(model),
        byline.Independent([model]),
        features=byline.Factorized(16),
        progress=False,
        batch_size=10,
        store=store,
    )
    return Served(made, examples(N, 0))


@contextmanager
def process(
    store: Path, task: str, *options: str, wait: float = 90, **environment: str
) -> Iterator[tuple[Running, Client]]:
    """``byline serve`` in a process of its own, once it listens; killed at the end."""
    running = start(store, task, *options, **environment)
    try:
        yield running, Client(listening(running, wait), environment.get("BYLINE_TOKEN"), timeout=60)
    finally:
        running.end()


class Running(subprocess.Popen[str]):
    """A service whose log is read all the time: one that nobody reads would stop at a full pipe."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **options)
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.stderr is not None
        for line in self.stderr:
            self.lines.put(line)
        self.lines.put(None)

    def rest(self, wait: float = 60) -> list[str]:
        """What of the log nobody has asked for yet, once the service has ended."""
        self.wait(wait)
        self._reader.join(wait)
        found = []
        while not self.lines.empty():
            line = self.lines.get()
            found += [] if line is None else [line]
        return found

    def end(self) -> None:
        """Kill it."""
        self.kill()
        self.wait()
        self._reader.join(10)


def start(store: Path, task: str, *options: str, **environment: str) -> Running:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])
    return Running(
        [sys.executable, "-m", "byline.cli", "serve", str(store), "--task", task, "--port", "0", *options],
        cwd=here,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "BYLINE_TOKEN": "", **environment},
    )


def listening(running: Running, wait: float = 90) -> str:
    """The URL that a service names in its log; a line that is no JSON fails."""
    return str(until(running, "serving", wait)["url"])


def until(running: Running, message: str, wait: float = 90) -> dict[str, Any]:
    """Read the log up to a message."""
    end, seen = time.monotonic() + wait, []
    while (left := end - time.monotonic()) > 0:
        try:
            line = running.lines.get(timeout=left)
        except queue.Empty:
            break
        if line is None:
            break
        seen.append(line)
        found: dict[str, Any] = json.loads(line)
        if found["message"] == message:
            return found
    raise AssertionError(f"no {message!r} in the log: {''.join(seen)}")
