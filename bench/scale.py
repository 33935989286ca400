"""What attribution takes at any size: a cost model, held against runs of four sizes, then taken further on paper.

The model is TRAK with `byline.Factorized` in float32. Its FLOPs and bytes are those of `byline.engines.model.Workload`.
Its time is a sum of such counts, each over a rate; the rates are fitted to small runs on this machine (`CALIBRATION`),
and the sum is held against larger runs (`SIZES`), which had no part in it. Times are CPU seconds of one thread, the
least of several runs: what a busy machine changes least.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import clock, environment, save, seconds, table

FORMAT = 1
TARGET = 0.2
INPUTS, CLASSES, QUERIES = 64, 10, 64
CALLS = 5
"""Of a batch of queries, the least of which counts: one alone is mostly what its first touch of memory costs."""


@dataclass(frozen=True)
class Size:
    """One run: N examples, a network INPUTS-width-width-CLASSES, k columns, M members."""

    examples: int
    width: int
    columns: int
    members: int

    def layers(self) -> tuple[Any, ...]:
        from byline.engines.model import Layer

        w = self.width
        return Layer("0.weight", w, INPUTS, first=True), Layer("2.weight", w, w), Layer("4.weight", CLASSES, w)

    def workload(self) -> Any:
        from byline.engines.model import Workload

        return Workload(self.layers(), self.examples, self.columns, self.members)

    def __str__(self) -> str:
        return f"N {self.examples}, P {self.workload().parameters}, k {self.columns}, M {self.members}"


CALIBRATION = [
    Size(2048, 64, 128, 1),
    Size(8192, 64, 256, 1),
    Size(4096, 256, 128, 1),
    Size(2048, 256, 1024, 1),
    Size(8192, 128, 512, 1),
    Size(4096, 128, 512, 2),
    Size(2048, 128, 2048, 1),
    Size(4096, 384, 1024, 1),
    Size(8192, 256, 1024, 1),
    Size(8192, 384, 2048, 1),
]
"""What the rates are fitted to: small training sets; columns up to the largest, whose products run at other rates."""
SIZES = [Size(16384, 256, 512, 5), Size(16384, 384, 1024, 1), Size(32768, 256, 1024, 2), Size(32768, 512, 2048, 1)]
"""What is predicted. P is that of `Size.workload`."""


def model(width: int, seed: int) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    ).eval()


def run(size: Size, scratch: Path, repeats: int) -> dict[str, Any]:
    """CPU seconds, FLOPs and bytes of fit, of the solve that the first query brings, and of a batch of queries."""
    import torch
    from torch.utils.data import TensorDataset

    import byline

    torch.manual_seed(0)
    train = TensorDataset(torch.randn(size.examples, INPUTS), torch.arange(size.examples) % CLASSES)
    tests = TensorDataset(torch.randn(QUERIES, INPUTS), torch.arange(QUERIES) % CLASSES)
    models = [model(size.width, seed) for seed in range(size.members)]
    found: list[dict[str, float]] = []
    for _ in range(repeats):
        folder, ledger = Path(tempfile.mkdtemp(dir=scratch)), byline.Ledger()
        made = byline.TRAK(
            byline.Task(models[0]),
            byline.Independent(models),
            features=byline.Factorized(size.columns),
            damping=1.0,
            store=folder,
            progress=False,
            ledger=ledger,
        )
        with clock() as fit:
            made.fit(train)
        with clock() as solve:
            made._warm()
        queries = []
        for _ in range(CALLS):
            with clock() as query:
                made.top(tests, k=10)
            queries.append(query.cpu)
        held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        shutil.rmtree(folder)
        flops = {"fit": ledger.fitting.flops, "query": ledger.serving.flops / CALLS}
        found.append({"fit": fit.cpu, "solve": solve.cpu, "query": min(queries), "bytes": held, **_named(flops)})
    least = {part: min(one[part] for one in found) for part in ("fit", "solve", "query")}
    return {"seconds": least, "bytes": found[-1]["bytes"], "flops": found[-1]["fit FLOPs"] + found[-1]["query FLOPs"]}


def _named(flops: dict[str, float]) -> dict[str, float]:
    return {f"{name} FLOPs": value for name, value in flops.items()}


def counts(size: Size) -> dict[str, dict[str, float]]:
    """What each part's time is a sum of, each over a rate."""
    load = size.workload()
    m, n, k = load.members, load.examples, load.kept
    return {
        "fit": {
            "members": m,
            "batches": m * load.chunks,
            "FLOPs of capture": m * n * load.capture_flops,
            "FLOPs of projection": m * n * load.project_flops,
            "bytes written": m * n * load.row_bytes,
        },
        "solve": {
            "FLOPs of the second moment": m * 2.0 * n * k * k,
            "FLOPs of the factor": m * k**3 / 3,
            "bytes read": load.scan_bytes,
        },
        "query": {
            "call": 1,
            "members": m,
            "FLOPs of rows and solves": QUERIES * m * (load.capture_flops + load.project_flops + 2.0 * k * k),
            "FLOPs of the scan": QUERIES * m * 2.0 * n * k,
            "bytes read": load.scan_bytes,
            # all members' scores are merged before the best are kept
            "scores": QUERIES * n,
        },
    }


def calibrate(found: list[tuple[Size, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Seconds per unit of every count, none below 0, by least squares of the relative errors."""
    import numpy as np
    from scipy.optimize import nnls

    out: dict[str, dict[str, float]] = {}
    for part in ("fit", "solve", "query"):
        names = list(counts(found[0][0])[part])
        rows = np.array([[counts(size)[part][name] for name in names] for size, _ in found])
        target = np.array([measured["seconds"][part] for _, measured in found])
        scale = rows.max(0)
        weights, _ = nnls(rows / scale / target[:, None], np.ones(len(target)))
        out[part] = dict(zip(names, (weights / scale).tolist(), strict=True))
    return out


def predict(size: Size, rates: dict[str, dict[str, float]]) -> dict[str, Any]:
    load = size.workload()
    spent = {
        part: sum(value * rates[part][name] for name, value in units.items()) for part, units in counts(size).items()
    }
    flops = load.fit_flops + load.solve_flops + QUERIES * load.query_flops
    return {"seconds": spent, "bytes": load.store_bytes, "flops": flops}


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    # the first run of a process pays for what torch and byline load on their first use
    run(Size(1024, 32, 64, 1), scratch, 1)
    calibration = []
    for size in CALIBRATION:
        calibration.append((size, run(size, scratch, options.repeats)))
        print(f"  calibrated on {size}", flush=True)
    rates = calibrate(calibration)
    sizes = []
    for size in SIZES:
        predicted, measured = predict(size, rates), run(size, scratch, options.repeats)
        sizes.append({"size": asdict(size), "name": str(size), "predicted": predicted, "measured": measured})
        print(f"  measured {size}", flush=True)
    return {"rates": rates, "calibration": [{"size": asdict(s), **m} for s, m in calibration], "sizes": sizes}


def again(result: dict[str, Any]) -> dict[str, Any]:
    """Rates and predictions anew, of what was measured before."""
    rates = calibrate([(Size(**one["size"]), one) for one in result["calibration"]])
    sizes = [{**one, "predicted": predict(Size(**one["size"]), rates)} for one in result["sizes"]]
    return {**result, "rates": rates, "sizes": sizes}


def errors(one: dict[str, Any]) -> dict[str, float]:
    """Prediction over measurement, less 1: of each part's time too."""
    a, b = one["predicted"], one["measured"]
    parts = {part: a["seconds"][part] / b["seconds"][part] - 1 for part in a["seconds"]}
    total = sum(a["seconds"].values()) / sum(b["seconds"].values()) - 1
    return {"bytes": a["bytes"] / b["bytes"] - 1, "flops": a["flops"] / b["flops"] - 1, "time": total, **parts}


def show(sizes: list[dict[str, Any]]) -> str:
    from byline.ledger import human_bytes, human_flops

    def line(one: dict[str, Any]) -> list[str]:
        a, b, off = one["predicted"], one["measured"], errors(one)
        pairs = [
            f"{human_bytes(a['bytes'])} / {human_bytes(b['bytes'])}",
            f"{human_flops(a['flops'])} / {human_flops(b['flops'])}",
            *(f"{seconds(a['seconds'][p])} / {seconds(b['seconds'][p])}" for p in ("fit", "solve", "query")),
        ]
        worst = max(abs(value) for value in off.values())
        told = [f"{off[name] * 100:+.0f} %" for name in ("fit", "solve", "query", "time")]
        return [one["name"], *pairs, ", ".join(told), "yes" if worst <= TARGET else "NO"]

    header = [
        "size",
        "bytes",
        "FLOPs",
        "fit",
        "solve",
        f"{QUERIES} queries",
        "time off by: each, in all",
        "within 20 %",
    ]
    return table(header, [line(one) for one in sizes])


# on paper


@dataclass(frozen=True)
class Machine:
    """What is assumed of the hardware. Nothing of it was measured."""

    name: str = "8 × H100 (SXM)"
    devices: int = 8
    peak: float = 989e12
    """FLOP/s of a device, dense bfloat16."""
    share: float = 0.4
    """Of it, that a training step of such a model reaches; the backward pass here is the same work less a third."""
    memory: float = 300e9
    """Bytes/s that one machine's processors read from RAM."""
    ram: float = 1.5e12
    """Bytes of RAM of a machine, of which rows may fill two thirds."""
    network: float = 10e9
    """Bytes/s between a machine and the object store."""
    solver: float = 2e12
    """FLOP/s of float32 matrix products on a machine's processors, where the second moment is formed."""


SEVEN_BILLION = {"blocks": 32, "width": 4096, "inner": 11008, "vocabulary": 32000}
TOKENS = 2048


def transformer() -> tuple[tuple[Any, ...], float]:
    """The linear layers of a model of 7 billion parameters, and the FLOPs of its attention per example, forward."""
    from byline.engines.model import Layer

    w, inner = SEVEN_BILLION["width"], SEVEN_BILLION["inner"]
    layers = []
    for block in range(SEVEN_BILLION["blocks"]):
        shapes = {"q": (w, w), "k": (w, w), "v": (w, w), "o": (w, w), "gate": (inner, w), "up": (inner, w)}
        shapes["down"] = (w, inner)
        layers += [Layer(f"{block}.{name}", o, i, TOKENS, bias=False) for name, (o, i) in shapes.items()]
    layers.append(Layer("head", SEVEN_BILLION["vocabulary"], w, TOKENS, bias=False))
    attention = SEVEN_BILLION["blocks"] * 4.0 * TOKENS**2 * w
    return tuple(layers), attention


def on_paper(machine: Machine) -> list[dict[str, Any]]:
    from byline.engines.model import Workload

    layers, attention = transformer()
    plans = [
        ("1 model", 1, 0, 8192),
        ("1 model, 10 forward-only masks", 1, 10, 8192),
        ("5 checkpoints", 5, 0, 8192),
        ("1 model, 65 536 columns", 1, 0, 65536),
    ]
    out = []
    for examples in (10**6, 10**9):
        for name, members, forward, columns in plans:
            load = Workload(layers, examples, columns, members, forward, "int8", 4096, attention)
            rate = machine.devices * machine.peak * machine.share
            machines = max(1, -(-load.scan_bytes // int(machine.ram * 2 / 3)))
            spent = {
                "fit": load.fit_flops / rate,
                "upload": load.store_bytes / machine.network,
                "solve": max(load.solve_flops / machine.solver, load.scan_bytes / machine.network),
            }
            query = load.members * (load.capture_flops + load.project_flops) / (rate / machine.devices)
            scan = load.scan_bytes / machine.memory / machines
            out.append(
                {
                    "name": name,
                    "examples": examples,
                    "columns": load.kept,
                    "flops": load.fit_flops,
                    "machine_hours": {part: value / 3600 for part, value in spent.items()},
                    "bytes": load.store_bytes,
                    "files": load.files,
                    "machines_to_hold": machines,
                    "query": {"rows": query, "scan": scan, "scan_from_store": load.scan_bytes / machine.network},
                    "bottleneck": max(spent, key=lambda part: spent[part]),
                    "parameters": load.parameters,
                }
            )
    return out


def show_paper(found: list[dict[str, Any]]) -> str:
    from byline.ledger import human_bytes

    def hours(value: float) -> str:
        return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"

    def line(one: dict[str, Any]) -> list[str]:
        spent = one["machine_hours"]
        return [
            f"10^{len(str(one['examples'])) - 1}, {one['name']}",
            f"{one['flops']:.1e}",
            *(hours(spent[part]) for part in ("fit", "upload", "solve")),
            human_bytes(one["bytes"]),
            f"{one['files']:,}",
            str(one["machines_to_hold"]),
            seconds(one["query"]["rows"] + one["query"]["scan"]),
            f"{one['query']['scan_from_store'] / 3600:.2g} h",
        ]

    header = ["N, ensemble", "FLOPs of fit", "fit, machine-hours", "upload", "solve", "store", "objects"]
    header += ["machines whose RAM holds it", "a query from RAM", "a pass over the store, 1 machine"]
    return table(header, [line(one) for one in found])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/scale.py --json runs/scale.json",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each size, the least of which counts (3)")
    parser.add_argument("--scratch", type=Path, help="where stores are written (the system's temporary folder)")
    parser.add_argument("--paper", action="store_true", help="only what is computed, nothing measured")
    parser.add_argument("--from-json", type=Path, help="predict anew for the measurements of an earlier --json")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    about, machine = environment(), Machine()
    result: dict[str, Any] = {"format": FORMAT, "environment": about}
    if options.from_json:
        result = again(json.loads(options.from_json.read_text()))
    elif not options.paper:
        with tempfile.TemporaryDirectory(prefix="byline-scale-", dir=options.scratch) as scratch:
            result |= measure(options, Path(scratch))
    if "sizes" in result:
        print(f"\n{show(result['sizes'])}\n")
        print("Predicted / measured; CPU seconds of one thread.")
    result |= {"machine": asdict(machine), "paper": on_paper(machine)}
    print(f"\n{show_paper(result['paper'])}\n")
    for name, value in result["machine"].items():
        print(f"  {name}: {value if isinstance(value, str) else f'{value:g}'}")
    print(f"  parameters of the linear layers: {result['paper'][0]['parameters']:,}; {TOKENS} tokens an example")
    save(options.json, result)


if __name__ == "__main__":
    main()
