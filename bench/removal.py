"""Is it attribution that got better, or the match to one ground truth? The frontier's strategies under other tests.

    python bench/removal.py                                                    # digits-mlp
    python bench/removal.py --setting fashion-mlp --examples 40 --sizes 50 --leave-one-out 0

REMOVAL: retrain without the k examples that a strategy calls the strongest proponents of a test example, and see how
far that example's output falls; beside it as many random examples. LEAVE-ONE-OUT: the rank correlation of the scores
of single examples with what retraining without each of them did. Intervals are over test examples, those of
leave-one-out over the examples left out too. Noise of retraining that all test examples share, that of the models of
the whole training set and of the random sets, is in none of them; it cancels in the differences. Models are those of
``bench/frontier.py``, in the same folder; everything trained is kept there, so the script may be killed at any time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from safetensors.numpy import load_file, save_file

import byline
from byline.evaluate.measure import mean_interval
from byline.settings.workshop import Workshop
from common import asked, environment, save, table
from frontier import Strategy, arguments, folder_of, named, others, setting_of, trainers_of, wanted

ASKED = (
    "independent 1",
    "independent 5",
    "independent 25",
    "5 checkpoints of a short run",
    "3 checkpoints each of 3 short runs",
    "5 short runs",
    "short halves 6",
    "5 short runs of half the width, int8",
    "3 checkpoints each of 3 short runs of half the width, int8",
    "1 short run of the simplest model, int8",
)
DRAWS = 2000
RANDOM = "as many random examples"
MODELS = 1000
"""Seeds of retrained models begin here: no model that votes is among them."""


def scores_of(strategy: Strategy, setting: Any, out: Path, seed: int, **variant: str) -> np.ndarray:
    """(n_test, n_train) TRAK's scores with its defaults, or another residual or Hessian; kept in a file."""
    shop = Workshop(setting, out, print, progress=False)
    key = shop.key(part="scores", strategy=strategy.key(), seed=seed, **others(strategy, setting), **variant)
    kept = out / "removal" / f"scores-{strategy.slug}-{key}.safetensors"
    if kept.exists():
        return load_file(kept)["scores"]
    trainers = trainers_of(strategy, setting, out / "frontier-models", seed)
    own, (ensemble, _, _) = trainers.setting, trainers.ensemble(strategy)
    attributor = byline.TRAK(
        strategy.task(own), ensemble, features=strategy.features(own), progress=False, batch_size=own.batch_size,
        **variant,
    )  # fmt: skip
    found = attributor.fit(own.train_set).attribute(own.test_set).values
    for other in named(strategy.beside) if strategy.beside else ():
        found = byline.blend(
            byline.Scores(found), byline.Scores(scores_of(other, setting, out, seed, **variant))
        ).values
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".part")
    save_file({"scores": np.ascontiguousarray(found)}, part)
    part.replace(kept)
    return found


def removal(
    strategy: Strategy, scores: list[np.ndarray], setting: Any, folder: Path, options: argparse.Namespace
) -> dict[str, np.ndarray]:
    """(sizes, examples) how far outputs fell, and by as many random examples; means over seeds of the ensemble."""
    found = []
    asked = "-".join(str(number) for number in (options.examples, *options.sizes, options.models))
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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--seeds", type=int, default=1, help="ensembles of each strategy; leave-one-out takes the first"
    )
    parser.add_argument("--only", nargs="*", default=ASKED, help="names of strategies of bench/frontier.py")
    parser.add_argument("--reference", default="independent 25", help="the strategy that others are held against")
    parser.add_argument("--examples", type=int, default=50, help="test examples of the removal")
    parser.add_argument("--sizes", type=int, nargs="*", default=[20, 100], help="how many proponents are removed")
    parser.add_argument("--models", type=int, default=2, help="retrained models of each set")
    parser.add_argument("--leave-one-out", type=int, default=100, help="training examples left out; 0 for none")
    parser.add_argument("--loo-models", type=int, default=20, help="retrained models without each of them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.sizes = sorted(set(options.sizes))
    setting = setting_of(options.setting)
    out = folder_of(options)
    strategies, _ = wanted(options.only, ASKED, setting), named(options.reference)
    if options.leave_one_out in (1, 2):
        raise SystemExit(f"--leave-one-out is {options.leave_one_out}; a correlation needs at least 3, 0 is for none")
    folder, rows = out / "removal", []
    bank = without_each(setting, folder, options) if options.leave_one_out else None
    for strategy in strategies:
        scores = [scores_of(strategy, setting, out, seed) for seed in range(options.seeds)]
        row: dict[str, Any] = {"name": strategy.name, "scores": scores[0]}
        if options.sizes:
            row |= removal(strategy, scores, setting, folder, options)
        rows.append(row)
        print(f"{strategy.name}: done", flush=True)
    figures = judge(rows, bank, options)
    print("\n" + show(figures, bank, options))
    if options.json:
        each = [{k: v.tolist() for k, v in row.items() if k in ("moved", "control")} for row in rows]
        save(options.json, {"options": asked(options), "rows": figures, "each": each, "environment": environment()})


def judge(rows: list[dict[str, Any]], bank: byline.Bank | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Means and intervals of every row, and of its difference from the reference, on the same resamples."""
    reference = next((row for row in rows if row["name"] == options.reference), None)
    figures = []
    for row in rows:
        other = reference if row is not reference else None
        found: dict[str, Any] = {"name": row["name"]}
        for i, k in enumerate(options.sizes):
            own = row["moved"][i]
            found[f"fall without {k}"] = mean_interval(own, DRAWS, 0.95, 0)
            if other is not None:
                found[f"fall without {k}, more"] = mean_interval(own - other["moved"][i], DRAWS, 0.95, 0)
        if bank is not None:
            # without the whole training set the bank is one of subsets, and the correlation an LDS
            subsets = byline.Bank(bank.subsets[1:], bank.outputs[1:])
            one = byline.lds(row["scores"], subsets)
            found["leave-one-out"] = one.mean, one.interval
            if other is not None:
                more = byline.lds_difference(row["scores"], other["scores"], subsets)
                found["leave-one-out, more"] = more.mean, more.interval
        figures.append(found)
    if options.sizes:
        control = {
            f"fall without {k}": mean_interval(rows[0]["control"][i], DRAWS, 0.95, 0)
            for i, k in enumerate(options.sizes)
        }
        figures.append({"name": RANDOM, **control})
    return figures


def show(figures: list[dict[str, Any]], bank: byline.Bank | None, options: argparse.Namespace) -> str:
    """The table."""
    titles = [f"fall without {k}" for k in options.sizes] + ["leave-one-out"] * (bank is not None)
    header = ["strategy", *(cell for title in titles for cell in (title, f"more than {options.reference}"))]
    body = []
    for row in figures:
        line = [row["name"]]
        for title in titles:
            for name in (title, f"{title}, more"):
                mean, (low, high) = row.get(name, (np.nan, (np.nan, np.nan)))
                line.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]" if name in row else "")
        body.append(line)
    said = "Means [95 % intervals over test examples; of leave-one-out over the examples left out, too]."
    if bank is not None:
        ceiling = byline.evaluate.lds.noise_ceiling(byline.Bank(bank.subsets[1:], bank.outputs[1:]))[1]
        said += f" Leave-one-out's noise ceiling is {ceiling:.2f}."
    return f"{table(header, body)}\n\n{said}"


if __name__ == "__main__":
    main()
