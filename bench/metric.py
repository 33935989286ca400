"""In which metric to compare gradients: that of SGD or that of Adam, for models trained by either.

    python bench/metric.py --json runs/metric.json

digits-mlp, trained with SGD as the setting has it, with Adam, and with AdamW under a linear schedule, each with a bank
of its own. TRAK with exact features, plain and `Preconditioned` with the powers ½ (that of Adam) and 1 (the inverse of
the diagonal of the Fisher information), of a fully trained model and of five early checkpoints. Means over seeds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import byline
from byline import settings
from byline.training import Recipe
from common import environment, save, spread, table

RECIPES = {
    "SGD, momentum 0.9": None,
    "Adam": Recipe(optimizer="adam", lr=3e-3, batch_size=50, epochs=30),
    "AdamW, linear schedule": Recipe(
        optimizer="adamw", lr=3e-3, batch_size=50, epochs=30, schedule="linear", weight_decay=0.01
    ),
}
EARLY = (2, 4, 6, 8, 10)
FEATURES = {
    "plain": byline.Exact(),
    "power ½": byline.Preconditioned(byline.Exact()),
    "power 1": byline.Preconditioned(byline.Exact(), power=1),
}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per recipe and kind of voters, with the LDS of every seed."""
    rows = []
    base = settings.get("digits-mlp")
    for name, recipe in RECIPES.items():
        setting = replace(base, recipe=recipe or base.recipe)
        folder = options.out / name.replace(", ", "-").replace(" ", "-")
        bank = byline.retrain(
            setting.trainer(), setting.train_set, test_set=setting.test_set, task=setting.task(),
            path=folder / "bank.safetensors", subsets=50, fraction=0.5, seeds=4, seed=0, progress=False,
        )  # fmt: skip
        epochs = setting.recipe.epochs
        found: dict[str, dict[str, list[float]]] = {}
        for seed in range(1, options.seeds + 1):
            run = byline.train_ensemble(
                setting.task(), setting.train_set, setting.recipe, "trajectory", checkpoints=epochs,
                build=setting.build, seed=seed, folder=folder / f"run-{seed}", progress=False,
            )  # fmt: skip
            states = [member.weights.source for member in run.members()]
            for voters, chosen in (("fully trained", [states[-1]]), ("5 early", [states[e - 1] for e in EARLY])):
                for kind, features in FEATURES.items():
                    attributor = byline.TRAK(
                        setting.task(), byline.Independent(chosen), features=features, progress=False
                    ).fit(setting.train_set)
                    score = byline.lds(attributor.attribute(setting.test_set), bank, bootstrap=0).mean
                    found.setdefault(voters, {}).setdefault(kind, []).append(score)
            print(f"  {name}, seed {seed}", file=sys.stderr, flush=True)
        rows += [{"recipe": name, "voters": voters, "lds": own} for voters, own in found.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/metric.py --json runs/metric.json",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the voters (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/metric"), help="where models are kept (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    rows = measure(options)
    body = [[row["recipe"], row["voters"], *(spread(row["lds"][kind]) for kind in FEATURES)] for row in rows]
    print(table(["trained with", "voters", *FEATURES], body))
    if options.json:
        save(options.json, {"rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
