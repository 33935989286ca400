"""How fast byline is on a setting, as ratios within one run: everything takes turns, medians are compared.

Measured: TRAK's `fit` with projected features against a plain forward and backward pass over the same batches; an
exact member, fitted and attributed; masks side by side against one at a time; what a store on disk adds to `fit`, and
what writing as many bytes to as many files takes without byline.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import BATCH, ROOT, SETTING, Clock, alternated, environment, median, save, seconds, table, trained

FORMAT = 1
MASKS = 8
TARGET_FIT = {"fashion-mlp": 15.0, "fashion2-resnet9": 10.0, "tunes-transformer": 4.0, "stdlib-gpt": 4.0}
"""What `fit` with projected features may be of a plain forward and backward pass."""
TARGET_EXACT, TARGET_STORE = {"fashion-mlp": 3.0}, 0.15


Times = dict[str, list[Clock]]


class Subjects:
    """What is timed: each method is one call from fresh objects to finished work."""

    def __init__(self, setting: Any, states: list[Any], batch_size: int, scratch: Path | None = None):
        import byline

        self.byline, self.setting, self.states, self.batch_size = byline, setting, states, batch_size
        self.base = byline.Independent(states[:1])
        self.scratch = tempfile.TemporaryDirectory(prefix="byline-speed-", dir=scratch)

    def plain(self) -> None:
        """Forward and backward over the training set, gradients summed over each batch as training does it."""
        import torch

        model = self.setting.build().eval()
        model.load_state_dict(self.states[0])
        x, y = self.setting.train_set.tensors
        for i in range(0, len(x), self.batch_size):
            model.zero_grad()
            logits, labels = model(x[i : i + self.batch_size]), y[i : i + self.batch_size]
            # of sequences every token is a row; -100, their padding, counts for nothing
            torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()).backward()

    def attributor(self, ensemble: Any, features: Any, **options: Any) -> Any:
        arguments = {"batch_size": self.batch_size, "progress": False, **options}
        return self.byline.TRAK(self.setting.task(), ensemble, features=features, **arguments)

    def fit(self, features: Any, **options: Any) -> Callable[[], Any]:
        return lambda: self.attributor(self.base, features, **options).fit(self.setting.train_set)

    def fit_on_disk(self, features: Any) -> Callable[[], Any]:
        def work() -> None:
            # deleted at the end: deleting is no part of fit, and ext4 is slow to create files just after it
            self.fit(features, store=tempfile.mkdtemp(dir=self.scratch.name))()

        return work

    def plain_files(self, features: Any) -> Callable[[], Any]:
        """What the disk alone takes: the files of such a store, written one after the other."""
        import numpy as np

        folder = Path(tempfile.mkdtemp(dir=self.scratch.name))
        self.fit(features, store=folder)()
        found = [(file.relative_to(folder), file.stat().st_size) for file in folder.rglob("*") if file.is_file()]
        largest = np.random.default_rng(0).bytes(max(size for _, size in found))

        def work() -> None:
            root = Path(tempfile.mkdtemp(dir=self.scratch.name))
            for file, size in found:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                with (root / file).open("wb", buffering=0) as opened:
                    opened.write(memoryview(largest)[:size])

        return work

    def whole(self, features: Any, members: int) -> Callable[[], Any]:
        """Fit and attribute; of several members, to be divided by their number."""

        def work() -> None:
            made = self.attributor(self.byline.Independent(self.states[:members]), features)
            made.fit(self.setting.train_set).attribute(self.setting.test_set)

        return work

    def masks(self, features: Any, batch_size: int, together: bool) -> Callable[[], Any]:
        """Fit a dropout ensemble; the rows that run side by side are what the engine takes, or one member's."""
        from byline.engines import local

        def work() -> None:
            ensemble = self.byline.Dropout(self.base, masks=MASKS, p=0.5)
            with _setting(local, "_TILED_ROWS", local._TILED_ROWS if together else 1):
                self.attributor(ensemble, features, batch_size=batch_size, damping=1.0).fit(self.setting.train_set)

        return work


@contextmanager
def _setting(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def measure(subjects: Subjects, repeats: int, members: int, only_fit: bool = False) -> Times:
    """Seconds of every call of every subject."""
    factorized, exact = subjects.byline.Factorized, subjects.byline.Exact
    fits = {
        "plain forward + backward": subjects.plain,
        "fit Factorized(1024)": subjects.fit(factorized(1024)),
        "fit Factorized(1024), store on disk": subjects.fit_on_disk(factorized(1024)),
        "fit Factorized(1024), its files alone": subjects.plain_files(factorized(1024)),
        "fit Factorized(1024, basis='pca')": subjects.fit(factorized(1024, basis="pca")),
        "fit Nystrom(1024)": subjects.fit(subjects.byline.Nystrom(1024)),
        "fit Exact()": subjects.fit(exact()),
        "fit Exact(), store on disk": subjects.fit_on_disk(exact()),
        "fit Exact(), its files alone": subjects.plain_files(exact()),
    }
    found = alternated(fits, repeats)
    if only_fit:
        return found
    whole = {
        "fit + attribute Exact()": subjects.whole(exact(), 1),
        f"fit + attribute Exact(), {members} members": subjects.whole(exact(), members),
        "fit + attribute Factorized(1024)": subjects.whole(factorized(1024), 1),
    }
    found |= alternated(whole, max(1, repeats // 2))
    masks = {
        f"fit {MASKS} masks, batch {size}, {how}": subjects.masks(factorized(1024), size, how == "side by side")
        for size in (32, subjects.batch_size)
        for how in ("side by side", "one at a time")
    }
    return found | alternated(masks, max(1, repeats // 2))


def figures_of(times: dict[str, list[float]], members: int, batch_size: int, setting: str) -> list[dict[str, Any]]:
    """Each figure with the target it is held against, where there is one; of seconds on the clock, or of the CPU."""
    middle = {name: median(values) for name, values in times.items()}
    plain = middle["plain forward + backward"]

    def figure(name: str, value: float, unit: str, target: float | None = None) -> dict[str, Any]:
        return {"name": name, "value": value, "unit": unit, "target": target}

    def ratio(over: str, under: str) -> float:
        """Median of the ratios of calls that took turns."""
        return median([a / b for a, b in zip(times[over], times[under], strict=True)])

    def stored(what: str) -> list[dict[str, Any]]:
        added = ratio(f"fit {what}, store on disk", f"fit {what}") - 1
        alone = ratio(f"fit {what}, its files alone", f"fit {what}")
        return [
            figure(f"store on disk, added to fit {what}", added, "%", TARGET_STORE),
            figure("- writing such files without byline", alone, "%"),
        ]

    fit, whole = TARGET_FIT.get(setting), TARGET_EXACT.get(setting)
    found = [
        figure("fit Factorized(1024) ÷ plain", middle["fit Factorized(1024)"] / plain, "×", fit),
        figure("fit Factorized(1024, basis='pca') ÷ plain", middle["fit Factorized(1024, basis='pca')"] / plain, "×"),
        figure("fit Nystrom(1024) ÷ plain", middle["fit Nystrom(1024)"] / plain, "×"),
        figure("fit Exact() ÷ plain", middle["fit Exact()"] / plain, "×"),
        *stored("Factorized(1024)"),
        *stored("Exact()"),
    ]
    if "fit + attribute Exact()" not in times:
        return found
    exact = f"fit + attribute Exact(), {members} members"
    masks = [f"fit {MASKS} masks, batch {size}" for size in (32, batch_size)]
    return [
        *found,
        figure("fit + attribute Factorized(1024) ÷ plain", middle["fit + attribute Factorized(1024)"] / plain, "×"),
        figure("fit + attribute Exact(), 1 member", middle["fit + attribute Exact()"], "s", whole),
        figure(f"fit + attribute Exact(), each of {members}", middle[exact] / members, "s", whole),
        *(
            figure(f"{m}: one at a time ÷ side by side", ratio(f"{m}, one at a time", f"{m}, side by side"), "×")
            for m in masks
        ),
    ]


def conclude(times: Times, members: int, batch_size: int, setting: str) -> list[dict[str, Any]]:
    """The figures by the clock, which targets are held against, with the same by CPU seconds beside them."""
    wall = figures_of(
        {name: [one.wall for one in values] for name, values in times.items()}, members, batch_size, setting
    )
    cpu = figures_of(
        {name: [one.cpu for one in values] for name, values in times.items()}, members, batch_size, setting
    )
    return [
        {**a, "cpu": b["value"], "met": None if a["target"] is None else a["value"] <= a["target"]}
        for a, b in zip(wall, cpu, strict=True)
    ]


def show(times: Times, figures: list[dict[str, Any]]) -> str:
    def line(name: str, values: list[Clock]) -> list[str]:
        wall = [one.wall for one in values]
        cpu = median([one.cpu for one in values])
        return [name, *map(seconds, (median(wall), min(wall), max(wall), cpu)), str(len(values))]

    def written(value: float, unit: str) -> str:
        return f"{value * 100:.0f} %" if unit == "%" else f"{value:.2f} {unit}"

    judged = [
        [
            one["name"],
            written(one["value"], one["unit"]),
            written(one["cpu"], one["unit"]),
            "" if one["target"] is None else f"at most {written(one['target'], one['unit'])}",
            "" if one["met"] is None else "yes" if one["met"] else "NO",
        ]
        for one in figures
    ]
    header = ["what", "median", "least", "most", "cpu median", "calls"]
    timed = table(header, [line(name, values) for name, values in times.items()])
    return f"{timed}\n\n{table(['figure', 'by the clock', 'by cpu seconds', 'target (clock)', 'met'], judged)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/speed.py --repeats 7 --json runs/speed.json",
    )
    parser.add_argument("--repeats", type=int, default=7, help="calls of each, after a first (%(default)s)")
    parser.add_argument("--members", type=int, default=5, help="trained models of the larger ensemble (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=BATCH, help="examples per batch (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (torch's own choice)")
    parser.add_argument("--setting", default=SETTING, help="a setting of tensors: pictures or sequences (%(default)s)")
    parser.add_argument("--out", type=Path, help="where models are kept (runs/SETTING)")
    parser.add_argument("--models", type=Path, help="a folder of checkpoints (.safetensors) to take instead")
    parser.add_argument("--scratch", type=Path, help="where stores are written (the system's temporary folder)")
    parser.add_argument("--only-fit", action="store_true", help="leave out scoring and masks: a minute less")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    about = environment()
    out = options.out or ROOT / "runs" / options.setting
    setting, states, _ = trained(out, options.members, options.models, None, need_bank=False, name=options.setting)
    times = measure(
        Subjects(setting, states, options.batch_size, options.scratch),
        options.repeats,
        options.members,
        options.only_fit,
    )
    figures = conclude(times, options.members, options.batch_size, setting.name)
    print(f"\n{show(times, figures)}\n")
    print(
        f"{setting.name}: {len(setting.train_set)} training and {len(setting.test_set)} test examples, batches of "
        f"{options.batch_size}, {about['threads']} threads, load {about['load_before']} before. Every call begins with "
        "fresh objects: fit includes reading the data's fingerprint, checking the rules against autograd and writing "
        "to the store (in memory unless it says otherwise). The kernel and its factorisation are made by attribute. "
        "On a busy machine the clock says more about the others: look at the CPU seconds, with --threads 1."
    )
    raw = {name: [{"wall": one.wall, "cpu": one.cpu} for one in values] for name, values in times.items()}
    save(options.json, {"format": FORMAT, "environment": about, "seconds": raw, "figures": figures})


if __name__ == "__main__":
    main()
