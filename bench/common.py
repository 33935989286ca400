"""What the measurements share: checkpoints and ground truth made once, timing, memory, tables, JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from byline import Bank
    from byline.settings import Setting

ROOT = Path(__file__).resolve().parent.parent
SETTING = "fashion-mlp"
BATCH = 256


class Clock:
    """Seconds on the clock and of the CPU, taken over a block."""

    wall = cpu = 0.0


@contextmanager
def clock() -> Iterator[Clock]:
    """Time a block; the result is complete when the block has ended."""
    found = Clock()
    wall, cpu = time.perf_counter(), _cpu()
    yield found
    found.wall, found.cpu = time.perf_counter() - wall, _cpu() - cpu


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def alternated(works: dict[str, Callable[[], Any]], repeats: int, warm: int = 1) -> dict[str, list[Clock]]:
    """The time of each call, the works taking turns, so that a busy spell of the machine meets all of them."""
    times: dict[str, list[Clock]] = {name: [] for name in works}
    for turn in range(warm + repeats):
        for name, work in works.items():
            with clock() as spent:
                work()
            if turn >= warm:
                times[name].append(spent)
    return times


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def memory(field: str = "VmHWM") -> int:
    """Bytes of this process: its peak (VmHWM) or what it holds now (VmRSS).

    Not `ru_maxrss`: Linux hands that of the parent on to a program it starts.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only")


def trained(
    folder: Path, count: int, models: Path | None, bank: Path | None, need_bank: bool = True, name: str = SETTING
) -> tuple[Setting, list[dict[str, Any]], Bank | None]:
    """The setting, ``count`` trained models and the bank: from the files given, else made once under ``folder``."""
    import byline
    from byline import settings
    from byline.settings.workshop import Workshop

    setting = settings.get(name)
    shop = Workshop(setting, folder, lambda sentence: print(f"  {sentence}", flush=True), progress=False)
    if models is None:
        states = [model.state for model in shop.models(count)]
    else:
        from safetensors.torch import load_file

        files = sorted(models.glob("*.safetensors"), key=lambda file: (len(file.name), file.name))[:count]
        if len(files) < count:
            raise SystemExit(f"{models} holds {len(files)} .safetensors files; {count} are needed")
        states = [load_file(file) for file in files]
    if not need_bank:
        return setting, states, None
    return setting, states, shop.bank(setting.bank_recipe) if bank is None else byline.Bank.load(bank)


def early(setting: Setting, epochs: Sequence[int] = (2, 4, 6, 8, 10)) -> tuple[list[dict[str, Any]], float]:
    """Checkpoints of one short run at these epochs, and the FLOPs of its training."""
    from dataclasses import replace

    import byline

    recipe = replace(setting.recipe, epochs=epochs[-1])
    options = {"task_loss": setting.task().loss, "seeds": [0], "checkpoints": list(epochs)}
    run = byline.train_many(setting.build, setting.train_set, recipe, **options)[0]
    return [run.checkpoints[epoch] for epoch in epochs], run.cost.flops


def mean_loss(setting: Setting, states: Sequence[dict[str, Any]]) -> Any:
    """(n_train,) the mean over models of each training example's loss."""
    import torch

    from byline.evaluate.retraining import model_of

    task = setting.task()
    with torch.no_grad():
        each = [task.loss(model_of(task, state), setting.train_set.tensors) for state in states]
    return torch.stack(each).mean(0).double().numpy()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain columns; the first is aligned left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        first, *others = [f"{cell:{'<>'[i > 0]}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def seconds(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def spread(values: Sequence[float]) -> str:
    """The mean over seeds, and the standard deviation where there are several."""
    if not values:
        return "-"
    return f"{statistics.fmean(values):.3f}" + (f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else "")


def environment() -> dict[str, Any]:
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--", "src").splitlines()),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """What a script was asked, as JSON has it."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}


def save(path: Path | None, result: dict[str, Any], quiet: bool = False) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        print(f"\nwritten to {path}")
