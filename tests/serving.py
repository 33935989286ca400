"""What the tests of the service share: what is served, and a service in a thread, a fork or a process of its own."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
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


class Gated(nn.Module):
    """Waits for every pass while there is no file at BYLINE_TEST_GATE, and says so beside it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = Path(os.environ["BYLINE_TEST_GATE"])
        if not gate.exists():
            gate.with_name("begun").touch()
            wait_for(gate.exists)
        return self.inner(x)


def gated(store: Any = None) -> Served:
    """A model that waits."""
    model = Gated(models(1)[0]).eval()
    made = byline.GradDot(
        byline.Task(model),
        byline.Independent([model]),
        features=byline.Factorized(16),
        progress=False,
        store=store,
    )
    return Served(made, examples(N, 0))


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Until a condition holds; fails when it has not held in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{getattr(condition, '__name__', condition)} did not come in {seconds} s"
        time.sleep(0.01)


def counted(client: Client, metric: str) -> float:
    """A metric's value, as Prometheus would read it; 0 where it has none yet."""
    _, _, text = client._once("GET", "/metrics", None, {})
    for line in text.decode().splitlines():
        name, _, value = line.rpartition(" ")
        if name == metric:
            return float(value)
    return 0.0


@contextmanager
def in_thread(made: Served, limits: Any = None, port: int = 0, **options: Any) -> Iterator[tuple[Client, Any]]:
    """A service with a socket in a thread of this process, and its application."""
    import uvicorn

    from byline.serve.app import create_app
    from byline.serve.server import Server, _address, _listen

    app = create_app(made, limits, **options)
    listener = _listen(_address("127.0.0.1", port), "127.0.0.1", port)
    listener.listen()
    server = Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=30))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    url = "http://{}:{}".format(*listener.getsockname())
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Client(url, timeout=60), app
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


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
        [sys.executable, "-m", "byline.cli", "serve", str(store), "--task", task, "--port", "0", "--no-page", *options],
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


class Forks:
    """``byline serve`` in forks of one child that has imported everything: a start takes a fraction of a second."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])
        self.child = subprocess.Popen(
            [sys.executable, "-c", "import serving; serving.fork_service()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=here,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "BYLINE_TOKEN": ""},
        )

    def __call__(self, store: Path, *options: str, kill: int | None = None, task: str = "serving:served") -> Start:
        """Start on a store, ask one question, end.

        Args:
            store: the store.
            options: of the command.
            kill: end it by SIGKILL when its main thread has entered or left so many functions.
            task: what is served.
        """
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        log = store.with_name("log-of-a-fork")
        ask = {"arguments": ["serve", str(store), "--task", task, "--port", "0", *options], "kill": kill}
        self.child.stdin.write(json.dumps({**ask, "log": str(log)}) + "\n")
        self.child.stdin.flush()
        code = json.loads(self.child.stdout.readline())
        lines = log.read_text().splitlines()
        said = [json.loads(line) for line in lines if line.startswith("{")]
        other = [line for line in lines if line and not line.startswith("{")]
        answers = [line for line in said if line["message"] == "answered"]
        return Start(code, said, other, answers[0] if answers else None)

    def end(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(60)


class Start:
    """What became of a start: exit code, log, lines that are no log, and the answer to one question if it served."""

    def __init__(self, code: int, log: list[dict[str, Any]], other: list[str], answer: dict[str, Any] | None):
        self.code, self.log, self.other, self.answer = code, log, other, answer

    def sentence(self) -> str:
        """Why it refused: one line, exit code 1, no traceback."""
        assert self.code == 1, (self.code, self.other, self.log)
        assert len(self.other) == 1, self.other
        assert not any("traceback" in line for line in self.log)
        return self.other[0]


def fork_service() -> None:
    """What the child of `Forks` does."""
    from byline import cli
    from byline.serve import server

    assert server
    torch.set_num_threads(1)
    served().ready()  # what is imported and made at the first use
    for line in sys.stdin:
        ask = json.loads(line)
        pid = os.fork()
        if not pid:
            _start_in_fork(cli.app, **ask)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _start_in_fork(app: Any, arguments: list[str], kill: int | None, log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 2)
    os.dup2(out, 1)
    passed = 0

    def count(*_: Any) -> None:
        nonlocal passed
        passed += 1
        if passed == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    class Told(logging.Handler):
        """Asks as soon as the service says where it is."""

        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == "serving":
                threading.Thread(target=ask, args=(record.url, passed), daemon=True).start()  # type: ignore[attr-defined]

    def ask(url: str, at: int) -> None:
        code = 1
        try:
            code, told = 0, {"results": Client(url, timeout=60, retries=0).attribute(examples(3, 1), 5)}
        except Exception as error:
            told = {"error": str(error)}
        os.write(2, (json.dumps({"message": "answered", "passed": at, **told}) + "\n").encode())
        os._exit(code)

    logging.getLogger("byline.serve").addHandler(Told())
    sys.setprofile(count)
    try:
        app(arguments)
    except SystemExit as done:
        os._exit(done.code if isinstance(done.code, int) else 1)
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(70)
