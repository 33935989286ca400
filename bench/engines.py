"""What Ray costs on one machine: the same jobs in this process and on Ray's workers, on the same cores, taking turns.

Measured: `byline.train_many` on a part of a bank, and `fit` of a dropout ensemble into a store on disk. In process
torch has a thread per core, on Ray there is a worker per core with one thread each. Ray's start, and that of its
workers, is stated apart: a job pays it once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import Clock, alternated, environment, median, save, seconds, table

FORMAT = 1
TARGET = 1.2
"""What a job on Ray may take of the same in process."""


class Jobs:
    """Each is one call from nothing to finished work, on any engine."""

    def __init__(self, options: argparse.Namespace, scratch: Path):
        from byline import settings

        self.options, self.scratch, self.setting = options, scratch, settings.get("fashion-mlp")
        # read before the clock runs
        self.train_set = self.setting.train_set

    def train(self, engine: Any) -> None:
        """Models of the setting's recipe, in groups that are trained stacked."""
        import byline

        seeds, setting = range(self.options.models), self.setting
        byline.train_many(
            setting.build,
            self.train_set,
            setting.recipe,
            task_loss=setting.task().loss,
            seeds=seeds,
            group=self.options.group,
            engine=engine,
        )

    def fit(self, engine: Any) -> None:
        """Rows of every mask of several models, untrained: trained ones take as long."""
        import torch

        import byline

        models = []
        for seed in range(self.options.members):
            torch.manual_seed(seed)
            models.append(self.setting.build().eval())
        byline.TRAK(
            self.setting.task(),
            byline.Dropout(byline.Independent(models), masks=self.options.masks, p=0.5),
            features=byline.Factorized(512, "pca"),
            store=tempfile.mkdtemp(dir=self.scratch),
            progress=False,
            engine=engine,
        ).fit(self.train_set)


def started(workers: int) -> tuple[Any, dict[str, float]]:
    """Ray, and the seconds until it runs and until every worker has imported byline and done a first piece."""
    import torch

    import byline
    from byline.engines import Ray

    before = time.perf_counter()
    engine = Ray(workers=workers)
    engine.processes()
    up = time.perf_counter() - before
    small = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    model = torch.nn.Linear(4, 2).eval()
    with tempfile.TemporaryDirectory() as folder:
        byline.GradDot(
            byline.Task(model), byline.Independent([model]), store=folder, batch_size=1, progress=False, engine=engine
        ).fit(small)
    return engine, {"ray": up, "first job": time.perf_counter() - before - up}


def measure(options: argparse.Namespace, scratch: Path) -> tuple[dict[str, list[Clock]], dict[str, float]]:
    jobs = Jobs(options, scratch)
    engine, startup = started(options.workers)
    try:
        works: dict[str, Callable[[], Any]] = {}
        for name in options.jobs:
            job = getattr(jobs, name)
            works[f"{name}, in process"] = lambda job=job: job(None)
            works[f"{name}, on Ray"] = lambda job=job: job(engine)
        return alternated(works, options.repeats, warm=0), startup
    finally:
        engine.close()


def conclude(times: dict[str, list[Clock]], jobs: list[str]) -> list[dict[str, Any]]:
    out = []
    for name in jobs:
        here, there = times[f"{name}, in process"], times[f"{name}, on Ray"]
        ratio = median([b.wall / a.wall for a, b in zip(here, there, strict=True)])
        wall = [median([one.wall for one in values]) for values in (here, there)]
        out.append(
            {
                "job": name,
                "in_process": wall[0],
                "on_ray": wall[1],
                "ratio": ratio,
                "target": TARGET,
                "met": ratio <= TARGET,
            }
        )
    return out


def show(found: list[dict[str, Any]]) -> str:
    header = ["job", "in process", "on Ray", "Ray ÷ in process", "at most 1.2"]
    rows = [
        [one["job"], seconds(one["in_process"]), seconds(one["on_ray"]), f"{one['ratio']:.2f}", _yes(one["met"])]
        for one in found
    ]
    return table(header, rows)


def _yes(met: bool) -> str:
    return "yes" if met else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/engines.py --json runs/engines.json",
    )
    parser.add_argument("--jobs", nargs="+", choices=("train", "fit"), default=["train", "fit"], help="which (both)")
    parser.add_argument("--models", type=int, default=48, help="models to train (%(default)s)")
    parser.add_argument("--group", type=int, default=6, help="models trained at once (%(default)s)")
    parser.add_argument("--members", type=int, default=5, help="models to fit (%(default)s)")
    parser.add_argument("--masks", type=int, default=60, help="masks on each (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="of Ray, and threads in process (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (%(default)s)")
    parser.add_argument("--scratch", type=Path, help="where stores are written (the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.workers)
    about = environment()
    with tempfile.TemporaryDirectory(prefix="byline-engines-", dir=options.scratch) as scratch:
        times, startup = measure(options, Path(scratch))
    found = conclude(times, options.jobs)
    print(f"\n{show(found)}\n")
    print(
        f"Medians of {options.repeats} turns; {options.workers} threads in process, {options.workers} workers of one "
        f"thread on Ray; load {about['load_before']} before. Ray was up after {seconds(startup['ray'])}, and its "
        f"workers had done a first small job {seconds(startup['first job'])} later; neither is in the table."
    )
    raw = {name: [{"wall": one.wall, "cpu": one.cpu} for one in values] for name, values in times.items()}
    save(options.json, {"format": FORMAT, "environment": about, "startup": startup, "seconds": raw, "jobs": found})


if __name__ == "__main__":
    main()
