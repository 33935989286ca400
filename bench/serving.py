"""What an answer costs: scoring against this machine's memory bandwidth, and a real service under eight clients.

One vector against N rows reads every row once, so scoring can be no faster than memory. Measured side by side, taking
turns: ``torch.sum`` over a large float32 array (the plain read, with the same threads), the scoring kernels alone over
all rows of all members (`byline.methods.scan`), and `Attributor.top` for one example, which is what the service calls:
the example's gradients under every member, the kernels, the mean, its standard error, the k best. Then ``byline serve``
in a process of its own on the same store, asked by one client and by several at once.

Rows are the gradients of small random models on random examples: many and wide, and cheap to make.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import ROOT, alternated, environment, median, save, seconds, table

FORMAT = 1
BANDWIDTH, FASTER = 0.6, 2.5
"""Targets: scoring of plain reads, and int8 of float32."""
PLAIN = 2**28  # numbers of the array that is read plainly
WIDTHS = {"float32": 4, "float16": 2, "int8": 1}
SETTINGS = "BYLINE_BENCH_SERVING"


def made(rows: int, columns: int, members: int, method: str) -> Any:
    """A method on random models whose features have so many columns, and its training set."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    import byline

    torch.manual_seed(0)
    hidden = max(2, columns // 64)
    models = [nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 3)).eval() for _ in range(members)]
    attributor = getattr(byline, method)(
        byline.Task(models[0]),
        byline.Independent(models),
        features=byline.Factorized(columns),
        damping=0.1,
        batch_size=1024,
    )
    return attributor, TensorDataset(torch.randn(rows, 64), torch.randint(0, 3, (rows,)))


def queries(count: int) -> Any:
    import torch
    from torch.utils.data import TensorDataset

    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(count, 64, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    )


def served() -> Any:
    """What ``byline serve --task serving:served`` serves."""
    import torch

    from byline.serve import Served

    asked = json.loads(os.environ[SETTINGS])
    torch.set_num_threads(asked.pop("threads"))
    return Served(*made(**asked))


def check_memory(need: int) -> None:
    """Refuse what does not fit."""
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    if need > free:
        raise SystemExit(
            f"{need / 1e9:.1f} GB of memory are needed and {free / 1e9:.1f} GB are free; use --quick, or fewer --rows"
        )


def scoring(options: argparse.Namespace, attributor: Any) -> dict[str, Any]:
    """Seconds of plain reads, kernels and whole answers, by what rows are kept as."""
    import torch

    from byline.methods import scan

    plain, vector = torch.randn(PLAIN), scan.Vectors(torch.randn(1, attributor.columns() // options.members))
    example = queries(1)
    held: dict[str, Any] = {}
    sizes: dict[str, int] = {}

    def kernels(dtype: str) -> None:
        for resident in held[dtype].values():
            for chunk in resident.chunks:
                chunk.dots(vector)

    def answer(dtype: str) -> None:
        attributor._resident = held[dtype]
        attributor.top(example, 10)

    found: dict[str, Any] = {}
    # float32 and int8 take turns, as their ratio is asked for; float16 comes when there is room again
    for dtypes in (("float32", "int8"), ("float16",)):
        dtypes = tuple(dtype for dtype in dtypes if dtype in options.dtypes)
        if not dtypes:
            continue
        held.clear()
        attributor._resident = {}
        works: dict[str, Any] = {"plain": lambda: float(plain.sum())}
        for dtype in dtypes:
            sizes[dtype] = attributor.hold(dtype)
            held[dtype] = attributor._resident
            works[f"kernels {dtype}"] = lambda dtype=dtype: kernels(dtype)
            works[f"answer {dtype}"] = lambda dtype=dtype: answer(dtype)
        times = alternated(works, options.repeats)
        for dtype in dtypes:
            one: dict[str, Any] = {"bytes": sizes[dtype], "plain_bytes": 4 * PLAIN}
            for clock in ("wall", "cpu"):
                reads = [getattr(t, clock) / (4 * PLAIN) for t in times["plain"]]
                one[f"plain_{clock}"] = 1 / median(reads)
                for part in ("kernels", "answer"):
                    spent = [getattr(t, clock) for t in times[f"{part} {dtype}"]]
                    one[f"{part}_{clock}"] = median(spent)
                    one[f"{part}_of_plain_{clock}"] = median(
                        [a * sizes[dtype] / b for a, b in zip(reads, spent, strict=True)]
                    )
                    if dtype == "int8" and "float32" in dtypes:
                        full = [getattr(t, clock) for t in times[f"{part} float32"]]
                        one[f"{part}_faster_{clock}"] = median([a / b for a, b in zip(full, spent, strict=True)])
            found[dtype] = one
    attributor._resident = {}
    return found


@contextmanager
def service(options: argparse.Namespace, folder: Path, dtype: str) -> Iterator[Any]:
    """``byline serve`` on the store, and a client."""
    from byline import Client

    asked = {name: getattr(options, name) for name in ("rows", "columns", "members", "method", "threads")}
    log = folder / f"serve-{dtype}.log"
    command = [sys.executable, "-m", "byline.cli", "serve", str(folder / "store"), "--task", "serving:served"]
    with log.open("w") as out:
        running = subprocess.Popen(
            [*command, "--port", "0", "--rows", dtype, "--timeout", "120"],
            cwd=Path(__file__).resolve().parent,
            env={
                **os.environ,
                SETTINGS: json.dumps(asked),
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": str(options.threads),
            },
            stderr=out,
            stdout=out,
        )
    try:
        url = None
        while url is None:
            if running.poll() is not None:
                raise SystemExit(f"the service did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
            url = next((line["url"] for line in lines if line["message"] == "serving"), None)
        yield Client(url, timeout=300)
    finally:
        running.terminate()
        running.wait(60)


def asked(client: Any, clients: int, requests: int) -> dict[str, Any]:
    """Latencies of so many clients, each of which asks again as soon as it is answered."""
    tests = queries(clients * requests)
    taken: list[float] = []

    def ask(first: int) -> None:
        for place in range(first, first + requests):
            begun = time.perf_counter()
            client.attribute([tests[place]], 10)
            taken.append(time.perf_counter() - begun)
        client.close()

    threads = [threading.Thread(target=ask, args=(i * requests,)) for i in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - begun
    if len(taken) != clients * requests:
        raise SystemExit(f"{clients * requests - len(taken)} requests failed")
    taken.sort()
    return {
        "clients": clients,
        "requests": len(taken),
        "p50": taken[len(taken) // 2],
        "p99": taken[min(len(taken) - 1, int(0.99 * len(taken)))],
        "per_second": len(taken) / spent,
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = options.rows * options.columns * options.members
    at_once = max(WIDTHS[dtype] for dtype in options.dtypes) + WIDTHS["int8"] * (len(options.dtypes) > 1)
    check_memory(rows * at_once + 4 * PLAIN * (options.part != "service") + 2**30)
    attributor, train_set = made(options.rows, options.columns, options.members, options.method)
    from byline.store import Store

    attributor.store = Store(folder / "store")
    begun = time.perf_counter()
    attributor.fit(train_set)
    print(
        f"  a store of {options.rows} × {attributor.columns()} numbers: {time.perf_counter() - begun:.0f} s", flush=True
    )
    found: dict[str, Any] = {"columns": attributor.columns(), "scoring": {}, "service": {}}
    if options.part != "service":
        found["scoring"] = scoring(options, attributor)
        print(f"\n{show_scoring(found['scoring'])}\n", flush=True)
    want = attributor.top(queries(1), 10).proponents.indices[0].tolist()
    del attributor
    for dtype in options.dtypes if options.part != "scoring" else ():
        with service(options, folder, dtype) as client:
            got = [row["index"] for row in client.attribute(queries(1), 10)[0]["proponents"]]
            if dtype == "float32" and got != want:
                raise SystemExit(f"the service says {got}, the library {want}")
            alone = asked(client, 1, options.requests)
            crowd = asked(client, options.clients, options.requests)
            found["service"][dtype] = {"alone": alone, "crowd": crowd, "cost": client.info().get("cost")}
    return found


def show_scoring(found: dict[str, Any]) -> str:
    def line(dtype: str, part: str) -> list[str]:
        one = found[dtype]
        shares = [f"{one[f'{part}_of_plain_{clock}'] * 100:.0f} %" for clock in ("wall", "cpu")]
        faster = [f"{one[f'{part}_faster_{c}']:.2f} ×" if f"{part}_faster_{c}" in one else "" for c in ("wall", "cpu")]
        speed = f"{one['bytes'] / one[f'{part}_wall'] / 1e9:.2f} GB/s"
        plain = f"{one['plain_wall'] / 1e9:.2f} GB/s"
        return [f"{dtype}, {part}", f"{one['bytes'] / 1e9:.2f} GB", seconds(one[f"{part}_wall"]), speed, plain, *shares,
                *faster]  # fmt: skip

    header = ["rows, what", "size", "time", "speed", "plain reads", "of plain", "by cpu", "× float32", "by cpu"]
    return table(header, [line(dtype, part) for dtype in found for part in ("kernels", "answer")])


def show_service(found: dict[str, Any]) -> str:
    lines = []
    for dtype, one in found.items():
        for who in (one["alone"], one["crowd"]):
            lines.append([f"{dtype}, {who['clients']} client{'s' * (who['clients'] > 1)}", str(who["requests"]),
                          seconds(who["p50"]), seconds(who["p99"]), f"{who['per_second']:.2f}"])  # fmt: skip
    return table(["rows, clients", "requests", "p50", "p99", "requests/s"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/serving.py --threads 1 --json runs/serving.json",
    )
    parser.add_argument("--rows", type=int, default=200_000, help="training examples (%(default)s)")
    parser.add_argument("--columns", type=int, default=2048, help="numbers per example and member (%(default)s)")
    parser.add_argument("--members", type=int, default=5, help="members (%(default)s)")
    parser.add_argument("--method", default="GradDot", help="a class of byline that streams (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch's, here and in the service (torch's own choice)")
    parser.add_argument("--clients", type=int, default=8, help="that ask at once (%(default)s)")
    parser.add_argument("--requests", type=int, default=25, help="of each client (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="turns, after a first (%(default)s)")
    parser.add_argument("--dtypes", default="float32,int8,float16", help="what rows are kept as (%(default)s)")
    parser.add_argument("--part", choices=("scoring", "service"), help="one of the two; both when left out")
    parser.add_argument("--quick", action="store_true", help="8000 × 512 × 2: a check, not a measurement")
    parser.add_argument("--folder", type=Path, help="where the store is made, and removed (a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.columns, options.members, options.repeats, options.requests = 8000, 512, 2, 3, 5
    options.dtypes = options.dtypes.split(",")
    if not set(options.dtypes) <= set(WIDTHS):
        raise SystemExit(f"--dtypes is {','.join(options.dtypes)}; expected some of {','.join(WIDTHS)}")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
        threadpool_limits(options.threads)  # numpy's, which scores float32
    options.threads = torch.get_num_threads()
    about = environment()
    with tempfile.TemporaryDirectory(prefix="byline-serving-", dir=options.folder) as folder:
        found = measure(options, Path(folder))
    if found["service"]:
        print(show_service(found["service"]))
    full, int8 = found["scoring"].get("float32"), found["scoring"].get("int8")
    if full and int8:
        found["targets"] = {
            "bandwidth": {"of_plain": full["answer_of_plain_wall"], "target": BANDWIDTH},
            "faster": {"int8": int8["answer_faster_wall"], "target": FASTER},
        }
        print(f"float32 answers at {full['answer_of_plain_wall'] * 100:.0f} % of plain reads (target: 60 %); "
              f"int8 is {int8['answer_faster_wall']:.2f} × as fast (target: 2.5 ×)")  # fmt: skip
    print("On a busy machine the clock says more about the others: look at the CPU seconds.")
    asked_for = {name: getattr(options, name) for name in ("rows", "columns", "members", "method", "threads")}
    save(options.json, {"format": FORMAT, "environment": about, "settings": asked_for, **found})


if __name__ == "__main__":
    main()
