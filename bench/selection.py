"""Choosing what to train on: accuracy of models retrained on 10, 25 and 50 % of the data, chosen in several ways.

Half of the test set is the target that scores are taken on; accuracy is measured on the other half, which no choice
has seen. Every choice is retrained from scratch with several seeds; intervals are bootstrapped over seeds and test
examples. A part of the training labels is flipped (--flipped), as data in the wild have it; with --flipped 0 they are
clean.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import ROOT, SETTING, early, environment, mean_loss, save, table

FORMAT = 1
BUDGETS = (0.1, 0.25, 0.5)


def lead(model: Any, batch: Any) -> Any:
    """By how much the label's logit leads: above 0 where the prediction is right."""
    import torch

    logits, labels = model(batch[0]), batch[1][:, None]
    others = logits.scatter(1, labels, float("-inf")).amax(1)
    return torch.gather(logits, 1, labels)[:, 0] - others


def choices(setting: Any, target: Any) -> dict[str, dict[float, Any]]:
    """(n_train,) bool masks by name and budget."""
    import numpy as np

    import byline
    from byline.settings.judges import labels_of
    from byline.uses import select

    train, labels = setting.train_set, labels_of(setting.train_set)
    n, task = len(labels), setting.task()
    checkpoints, _ = early(setting)
    members = byline.Independent(checkpoints)
    trak = byline.TRAK(task, members, progress=False).fit(train).attribute(target)
    alike = byline.RepresentationSimilarity(task, members, progress=False).fit(train).attribute(target)
    loss = mean_loss(setting, checkpoints)
    rng = np.random.default_rng(0)
    found: dict[str, dict[float, Any]] = {}

    def keep(name: str, budget: float, places: Any) -> None:
        mask = np.zeros(n, bool)
        mask[places] = True
        found.setdefault(name, {})[budget] = mask

    for budget in BUDGETS:
        count = round(budget * n)
        keep("random", budget, rng.permutation(n)[:count])
        keep("lowest loss", budget, np.argsort(loss, kind="stable")[:count])
        keep("highest loss", budget, np.argsort(-loss, kind="stable")[:count])
        keep("embedding, nearest to the target", budget, select(alike, budget, groups=labels, per_group="same").keep)
        keep("select(TRAK)", budget, select(trak, budget).keep)
        keep(
            "select(TRAK, classes keep their share)", budget, select(trak, budget, groups=labels, per_group="same").keep
        )
        diverse = select(trak, budget, groups=labels, per_group="same", diversity=0.5)
        keep("select(TRAK, shares, diversity=0.5)", budget, diverse.keep)
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    import numpy as np
    from torch.utils.data import Subset

    import byline
    from byline import settings
    from byline.settings.judges import relabelled

    base = settings.get(options.setting)
    setting = relabelled(base, options.flipped) if options.flipped else base
    order = np.random.default_rng(0).permutation(len(setting.test_set))
    half = len(order) // 2
    target, rest = Subset(setting.test_set, order[:half].tolist()), Subset(setting.test_set, order[half:].tolist())
    found = choices(setting, target)
    everything = np.ones((1, len(setting.train_set)), bool)
    names = [(name, budget) for name, masks in found.items() for budget in masks]
    masks = np.concatenate([everything, np.stack([found[name][budget] for name, budget in names])])
    task = byline.Task(setting.build().eval(), output=lead)
    out = options.out or ROOT / "runs" / options.setting
    bank = byline.retrain(
        setting.trainer(),
        setting.train_set,
        test_set=rest,
        task=task,
        subsets=masks,
        seeds=options.seeds,
        path=out / f"selection-{options.flipped:g}-{options.seeds}.safetensors",
    )
    right = bank.outputs > 0
    rng, rows = np.random.default_rng(0), []
    for (name, budget), each in zip([("all of it", 1.0), *names], right, strict=True):
        seeds = rng.integers(0, each.shape[0], (2000, each.shape[0]))
        tests = rng.multinomial(each.shape[1], np.full(each.shape[1], 1 / each.shape[1]), 2000) / each.shape[1]
        draws = np.array([each[s].mean(0) @ t for s, t in zip(seeds, tests, strict=True)])
        low, high = np.quantile(draws, [0.025, 0.975])
        rows.append({"choice": name, "budget": budget, "accuracy": float(each.mean()), "interval": [low, high]})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    def cell(row: dict[str, Any]) -> str:
        low, high = row["interval"]
        return f"{row['accuracy'] * 100:.1f} % ({low * 100:.1f} to {high * 100:.1f})"

    names = list(dict.fromkeys(row["choice"] for row in rows if row["budget"] < 1))
    lines = [[name, *[cell(row) for row in rows if row["choice"] == name]] for name in names]
    whole = next(row for row in rows if row["budget"] == 1)
    head = ["kept", *[f"{budget * 100:g} %" for budget in BUDGETS]]
    return f"{table(head, lines)}\n\nAll of the training set: {cell(whole)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/selection.py --json runs/selection.json",
    )
    parser.add_argument("--setting", default=SETTING, help="a setting with labels (%(default)s)")
    parser.add_argument("--flipped", type=float, default=0.1, help="share of training labels flipped (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="models retrained on each choice (%(default)s)")
    parser.add_argument("--out", type=Path, help="where what is retrained is kept (runs/SETTING)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    about = environment()
    rows = measure(options)
    print(f"\n{options.setting}, {options.flipped * 100:g} % of the labels flipped, accuracy on unseen test examples\n")
    print(show(rows))
    save(options.json, {"format": FORMAT, "environment": about, "flipped": options.flipped, "rows": rows})


if __name__ == "__main__":
    main()
