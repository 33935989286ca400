"""Is it attribution that got better, or the match to one ground truth? The frontier's strategies under other tests.

    python bench/removal.py                                                    # digits-mlp
    python bench/removal.py --setting fashion-mlp --examples 40 --sizes 50 --leave-one-out 0

REMOVAL: retrain without the k examples that a strategy calls the strongest proponents of a test example, and see how
far that example's output falls; beside it as many random examples. LEAVE-ONE-OUT: the rank correlation of the scores
of single examples with what retraining without each of them did. Models are those of ``bench/frontier.py``, in the same
folder; everything trained is kept there, so the script may be killed at any time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np

import byline
from byline.evaluate.measure import mean_interval
from common import ROOT, environment, save, table
from frontier import STRATEGIES, Strategy, Trainers, setting_of

ASKED = (
    "independent 1",
    "independent 5",
    "independent 25",
    "5 checkpoints of a short run",
    "3 checkpoints each of 3 short runs",
    "5 short runs",
    "short halves 6",
)
REFERENCE = "independent 5"
RANDOM = "as many random examples"
MODELS = 1000
"""Seeds of retrained models begin here: no model that votes is among them."""


def scores_of(strategy: Strategy, setting: Any, models: Path, seed: int) -> np.ndarray:
    """(n_test, n_train) TRAK's scores with its defaults."""
    ensemble, _, _ = Trainers(setting, models, seed).ensemble(strategy)
    attributor = byline.TRAK(
        strategy.task(setting), ensemble, features=strategy.features(setting), progress=False,
        batch_size=setting.batch_size,
    )  # fmt: skip
    return attributor.fit(setting.train_set).attribute(setting.test_set).values


def removal(
    strategy: Strategy, scores: list[np.ndarray], setting: Any, folder: Path, options: argparse.Namespace
) -> dict[str, np.ndarray]:
    """(sizes, examples) how far outputs fell, and by as many random examples; means over seeds of the ensemble."""
    found = []
    asked = "-".join(str(number) for number in (options.examples, *options.sizes))
    for seed, values in enumerate(scores):
        measure = byline.removal_curve(
            values, setting.trainer(), setting.train_set, test_set=setting.test_set, task=setting.task(),
            sizes=options.sizes, examples=options.examples, seeds=options.models, seed=MODELS, bootstrap=0,
            path=folder / f"removal-{strategy.slug}-{seed}-{asked}.safetensors", progress=False,
        )  # fmt: skip
        found.append(measure.details)
    return {name: np.mean([d[name] for d in found], 0) for name in ("moved", "control")}


def without_each(setting: Any, folder: Path, options: argparse.Namespace) -> byline.Bank:
    """The ground truth of leave-one-out."""
    n, count = len(setting.train_set), options.leave_one_out
    places = np.random.default_rng(0).choice(n, count, replace=False)
    return byline.retrain(
        setting.trainer(), setting.train_set, test_set=setting.test_set, task=setting.task(),
        subsets=byline.leave_one_out_subsets(n, places), seeds=options.loo_models, seed=MODELS, progress=False,
        path=folder / f"leave-one-out-{count}-{options.loo_models}.safetensors",
    )  # fmt: skip


def cell(values: np.ndarray) -> str:
    """A mean and its interval over test examples."""
    mean, (low, high) = mean_interval(values, 2000, 0.95, 0)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="digits-mlp")
    parser.add_argument("--out", type=Path, help="folder of the frontier; runs/frontier/<setting> by default")
    parser.add_argument("--seeds", type=int, default=1, help="ensembles of each strategy")
    parser.add_argument("--only", nargs="*", default=ASKED, help="names of strategies of bench/frontier.py")
    parser.add_argument("--examples", type=int, default=50, help="test examples of the removal")
    parser.add_argument("--sizes", type=int, nargs="*", default=[20, 100], help="how many proponents are removed")
    parser.add_argument("--models", type=int, default=2, help="retrained models of each set")
    parser.add_argument("--leave-one-out", type=int, default=100, help="training examples left out; 0 for none")
    parser.add_argument("--loo-models", type=int, default=20, help="retrained models without each of them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    setting = setting_of(options.setting)
    out = options.out or ROOT / "runs" / "frontier" / options.setting
    named = {strategy.name: strategy for strategy in STRATEGIES}
    if unknown := set(options.only) - set(named):
        raise SystemExit(f"no strategy {', '.join(sorted(unknown))}; there are: {', '.join(named)}")
    folder, rows = out / "removal", []
    bank = without_each(setting, folder, options) if options.leave_one_out else None
    for name in options.only:
        scores = [scores_of(named[name], setting, out / "frontier-models", seed) for seed in range(options.seeds)]
        row: dict[str, Any] = {"name": name}
        if options.sizes:
            row |= removal(named[name], scores, setting, folder, options)
        if bank is not None:
            each = [byline.leave_one_out(values, bank, bootstrap=0) for values in scores]
            row |= {"leave-one-out": np.mean([m.per_example for m in each], 0), "ceiling": each[0].details["ceiling"]}
        rows.append(row)
        print(f"{name}: done", flush=True)
    print("\n" + show(rows, options))
    if options.json:
        plain = [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows]
        asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        save(options.json, {"options": asked, "rows": plain, "environment": environment()})


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """A row per strategy; differences are paired, for the same test examples and retrained seeds."""
    reference = next((row for row in rows if row["name"] == REFERENCE), None)
    header, body = ["strategy"], []
    measures = [("moved", i, f"fall without {k}") for i, k in enumerate(sorted(options.sizes))]
    measures += [("leave-one-out", slice(None), "leave-one-out")] * bool(options.leave_one_out)
    for _, _, title in measures:
        header += [title, f"more than {REFERENCE}"]
    for row in rows:
        line = [row["name"]]
        for what, place, _ in measures:
            line.append(cell(row[what][place]))
            other = reference is not None and row is not reference
            line.append(cell(row[what][place] - reference[what][place]) if reference is not None and other else "")
        body.append(line)
    if options.sizes:
        line = [RANDOM]
        for what, place, _ in measures:
            line += [cell(rows[0]["control"][place]) if what == "moved" else "", ""]
        body.append(line)
    said = "Means [95 % intervals over test examples]."
    if options.leave_one_out:
        said += f" Leave-one-out's noise ceiling is {rows[0]['ceiling']:.2f}."
    return f"{table(header, body)}\n\n{said}"


if __name__ == "__main__":
    main()
