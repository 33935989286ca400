"""Is ``damping="auto"`` within 5 % of the best fixed damping? LDS over a grid of dampings, on five cases.

    python bench/damping.py --out runs/damping
    python bench/damping.py --method logra --cases digits-mlp diabetes-mlp cancer-mlp

The rule (`byline.methods.damping`) has two constants, chosen on the first four cases. The fifth, cancer-mlp, was not
looked at before they were fixed. LoGra's default is a constant, chosen on the three cases above (and on tunes, with
``bench/sequences.py``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn
from torch.utils.data import TensorDataset

import byline
from byline import settings
from byline.settings.data import fashion_mnist
from byline.training import Recipe, Trainer

GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 5 * 5, 2),
    )  # fmt: skip


def shirts() -> tuple[TensorDataset, TensorDataset]:
    """T-shirts against shirts, 1500 and 200, as pictures."""
    data = fashion_mnist()

    def two(images: Any, labels: Any, count: int) -> TensorDataset:
        x, y = torch.tensor(images).float().div(255).sub(0.286).div(0.353), torch.tensor(labels).long()
        chosen = torch.isin(y, torch.tensor([0, 6])).nonzero().flatten()[:count]
        return TensorDataset(x[chosen].unsqueeze(1), (y[chosen] == 6).long())

    return two(data.train_images, data.train_labels, 1500), two(data.test_images, data.test_labels, 200)


def tabular_net() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))


def diabetes() -> tuple[TensorDataset, TensorDataset]:
    """Progression of diabetes, 342 and 100 patients, standardised."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    x, y = torch.tensor(x).float(), torch.tensor(y).float()
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:342], order[342:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def cancer_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(30, 24), nn.ReLU(), nn.Dropout(0.1), nn.LayerNorm(24), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 2)
    )  # fmt: skip


def cancer() -> tuple[TensorDataset, TensorDataset]:
    """Breast cancer, 449 and 120 patients, standardised."""
    x, y = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(x).float(), torch.tensor(y).long()
    x = (x - x.mean(0)) / x.std(0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:449], order[449:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def cases() -> dict[str, tuple[Callable[[], Any], Callable[[], nn.Module], Recipe, str]]:
    digits, fashion = settings.get("digits-mlp"), settings.get("fashion-mlp")
    return {
        "digits-mlp": (lambda: (digits.train_set, digits.test_set), digits.build, digits.recipe, "classification"),
        "fashion-mlp": (lambda: (fashion.train_set, fashion.test_set), fashion.build, fashion.recipe, "classification"),
        "shirts-conv": (shirts, conv_net, Recipe(lr=0.01, momentum=0.9, batch_size=50, epochs=15), "classification"),
        "diabetes-mlp": (diabetes, tabular_net, Recipe(lr=0.02, momentum=0.9, batch_size=19, epochs=30), "regression"),
        "cancer-mlp": (cancer, cancer_net, Recipe(lr=0.02, momentum=0.9, batch_size=28, epochs=20), "classification"),
    }


def logra(task: byline.Task, ensemble: byline.Ensemble, damping: float | str) -> byline.Influence:
    features = byline.Factorized(512)
    return byline.Influence(
        task, ensemble, solver="explicit", curvature="fisher", features=features, damping=damping, progress=False
    )


METHODS = {"trak": lambda *given: byline.TRAK(*given[:2], damping=given[2]), "logra": logra}


def measure(name: str, folder: Path, models: int, method: str = "trak") -> dict[str, list[float]]:
    load, build, recipe, output = cases()[name]
    train_set, test_set = load()
    task = byline.Task(build().eval(), output=output)
    trainer = Trainer(build, recipe, task_loss=task.loss)
    bank = byline.retrain(
        trainer, train_set, test_set=test_set, task=task, subsets=50, seeds=4, path=folder / f"{name}.safetensors"
    )
    early = max(1, recipe.epochs // 4)
    runs = trainer.many(train_set, None, range(100, 100 + models), checkpoints=[early, recipe.epochs])
    full = byline.Independent([run.state_dict for run in runs])
    ensembles: dict[str, byline.Ensemble] = {
        "1 model": byline.Independent([runs[0].state_dict]),
        f"{models} models": full,
        f"1 model stopped at epoch {early}": byline.Independent([runs[0].checkpoints[early]]),
        "weight noise 1×10": byline.WeightNoise(byline.Independent([runs[0].state_dict]), draws=10),
    }
    if any(isinstance(module, nn.Dropout) for module in task.model.modules()):
        ensembles["dropout 1×10"] = byline.Dropout(byline.Independent([runs[0].state_dict]), masks=10, p=0.5)
    found = {}
    for label, ensemble in ensembles.items():
        row = []
        for damping in (*GRID, "auto"):
            attributor = METHODS[method](task, ensemble, damping).fit(train_set)
            row.append(byline.lds(attributor.attribute(test_set), bank, bootstrap=10).mean)
        found[label] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/damping"), help="where banks are kept")
    parser.add_argument("--cases", nargs="*", default=list(cases()), help="which cases")
    parser.add_argument("--models", type=int, default=5, help="size of the independent ensemble")
    parser.add_argument("--method", choices=list(METHODS), default="trak", help="whose damping (%(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    head = " | ".join(f"{d:g}" for d in GRID)
    print(f"| case | ensemble | {head} | auto | of the best |\n|{' --- |' * (len(GRID) + 4)}")
    results = {}
    for name in options.cases:
        results[name] = measure(name, options.out, options.models, options.method)
        for label, row in results[name].items():
            best = max(row[:-1])
            numbers = " | ".join(f"{x:.3f}" for x in row)
            print(f"| {name} | {label} | {numbers} | {row[-1] / best:.0%} |", flush=True)
    (options.out / "damping.json").write_text(json.dumps({"grid": GRID, "lds": results}, indent=1))


if __name__ == "__main__":
    main()
