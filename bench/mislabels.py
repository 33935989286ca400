"""Finding flipped labels: self-influence, losses and both together, on pictures and tables, at 5, 10 and 20 % flipped.

Every ranking is of the same training set under models trained on its flipped labels. ROC-AUC and average precision with
bootstrap intervals over examples; of the flipped examples among the most suspicious (as many as were flipped), how many
get their true label suggested; and what the models behind the ranking cost to train.

Nothing was chosen with these figures in sight but what `find_mislabels` ranks by when it gets an attributor alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import early, environment, mean_loss, save, table

FORMAT = 1
FRACTIONS = (0.05, 0.1, 0.2)
CHECKPOINTS, MODELS, FOLDS = 5, 5, 5


def tabular(name: str) -> Any:
    """A classic table of scikit-learn's, standardised; three quarters of it to train on."""
    import numpy as np
    import torch
    from sklearn import datasets
    from sklearn.preprocessing import StandardScaler
    from torch import nn
    from torch.utils.data import TensorDataset

    from byline.settings import Setting
    from byline.training import Recipe

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    cut = len(x) * 3 // 4
    x = StandardScaler().fit(x[order[:cut]]).transform(x)[order].astype(np.float32)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y[order].astype(np.int64))
    classes, columns = int(labels.max()) + 1, x.shape[1]
    return Setting(
        name=name.replace("_", "-"),
        description=f"scikit-learn's {name}",
        load=lambda: (TensorDataset(inputs[:cut], labels[:cut]), TensorDataset(inputs[cut:], labels[cut:])),
        build=lambda: nn.Sequential(nn.Linear(columns, 32), nn.ReLU(), nn.Linear(32, classes)),
        recipe=Recipe(lr=0.05, momentum=0.9, batch_size=16, epochs=30),
        class_names=tuple(map(str, range(classes))),
    )


def rankings(setting: Any, given: Any, rows: int) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """(name, what finds mislabels, FLOPs of its training) for each ranking."""
    import numpy as np

    import byline
    from byline.settings.judges import labels_of
    from byline.uses import find_mislabels, out_of_sample_loss

    train, n = setting.train_set, len(labels_of(setting.train_set))
    options = {"task_loss": setting.task().loss}
    full = byline.train_many(setting.build, train, setting.recipe, seeds=range(MODELS), **options)
    checkpoints, few = early(setting)
    states = [one.state_dict for one in full]
    once, five = full[0].cost.flops, sum(one.cost.flops for one in full)
    task = setting.task()
    fitted: dict[str, Any] = {}

    def attributor(key: str, kind: Any, members: Any) -> Any:
        if key not in fitted:
            made = fitted[key] = kind(task, byline.Independent(members), progress=False).fit(train)
            # asked for by several rankings, and the dearest part of each
            known = made.self_influence(stderr=True)
            made.self_influence = lambda stderr=False: known if stderr else known[0]
        return fitted[key]

    def self_influence(key: str, kind: Any, members: Any, loss: Any = 0.0) -> Callable[[], Any]:
        # a constant loss leaves the ranking to the scores
        return lambda: find_mislabels(
            attributor(key, kind, members),
            given,
            rows=rows,
            loss=np.zeros(n) if isinstance(loss, float) else loss,
        )

    outside = out_of_sample_loss(setting.trainer(), train, task, folds=FOLDS, progress=False)
    # five models on four fifths of the examples each
    folds = (FOLDS - 1) * once
    yield "loss in the sample, 1 model", lambda: mean_loss(setting, states[:1]), once
    yield f"loss at {CHECKPOINTS} checkpoints", lambda: mean_loss(setting, checkpoints), few
    yield f"loss out of the sample, {FOLDS} folds", lambda: outside, folds
    yield "TRAK, 1 model", self_influence("one", byline.TRAK, states[:1]), once
    yield f"TRAK, {MODELS} models", self_influence("five", byline.TRAK, states), five
    yield f"TRAK, {CHECKPOINTS} checkpoints", self_influence("early", byline.TRAK, checkpoints), few
    yield f"KNN-Shapley, {CHECKPOINTS} checkpoints", self_influence("knn", byline.KNNShapley, checkpoints), few
    yield (
        f"find_mislabels(TRAK, {CHECKPOINTS} checkpoints)",
        self_influence("early", byline.TRAK, checkpoints, None),
        few,
    )
    yield (
        f"find_mislabels(KNN-Shapley, {CHECKPOINTS} checkpoints)",
        self_influence("knn", byline.KNNShapley, checkpoints, mean_loss(setting, checkpoints)),
        few,
    )
    yield (
        "the same TRAK, with loss= out of the sample",
        self_influence("early", byline.TRAK, checkpoints, outside),
        few + folds,
    )
    yield (
        "the same KNN-Shapley, with loss= out of the sample",
        self_influence("knn", byline.KNNShapley, checkpoints, outside),
        few + folds,
    )


def measure(names: list[str], fractions: list[float], rows: list[dict[str, Any]], keep: Any) -> list[dict[str, Any]]:
    """All figures, those of ``rows`` as they are; ``keep`` is called with what there is after each case."""
    import byline
    from byline import settings
    from byline.settings.judges import labels_of, mask_of, relabelled
    from byline.uses import Mislabels

    out = list(rows)
    for name in names:
        base = tabular(name) if name in ("wine", "breast_cancer") else settings.get(name)
        truth = labels_of(base.train_set)
        for fraction in fractions:
            if any((row["data"], row["fraction"]) == (name, fraction) for row in rows):
                continue
            flipped_setting = relabelled(base, fraction)
            given, flipped = labels_of(flipped_setting.train_set), mask_of(flipped_setting, fraction)
            print(f"  {name}, {fraction * 100:g} % flipped", flush=True)
            for title, make, flops in rankings(flipped_setting, given, int(flipped.sum())):
                found = make()
                suspicion = found.every if isinstance(found, Mislabels) else found
                measured = byline.mislabel_detection(suspicion, flipped)
                right = None
                if isinstance(found, Mislabels):
                    hits = flipped[found.index]
                    right = float((found.suggested[hits] == truth[found.index][hits]).mean())
                precision = measured.details["average_precision"]
                out.append(
                    {
                        "data": name,
                        "fraction": fraction,
                        "ranking": title,
                        "auc": measured.mean,
                        "auc_interval": list(measured.interval),
                        "precision": precision,
                        "precision_interval": list(measured.details["average_precision_interval"]),
                        "suggestions_right": right,
                        "training_flops": flops,
                    }
                )
            keep(out)
    return out


def show(rows: list[dict[str, Any]]) -> str:
    from byline.ledger import human_flops

    lines = []
    for row in rows:
        (a, b), (c, d) = row["auc_interval"], row["precision_interval"]
        right = row["suggestions_right"]
        lines.append(
            [
                f"{row['data']}, {row['fraction'] * 100:g} %",
                row["ranking"],
                f"{row['auc']:.3f} ({a:.3f} to {b:.3f})",
                f"{row['precision']:.3f} ({c:.2f} to {d:.2f})",
                "" if right is None else f"{right * 100:.0f} %",
                human_flops(row["training_flops"]),
            ]
        )
    head = ["labels flipped", "ranking", "ROC-AUC", "average precision", "label suggested right", "training"]
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/mislabels.py --json runs/mislabels.json",
    )
    known = ["fashion-mlp", "digits-mlp", "wine", "breast_cancer"]
    parser.add_argument("--data", nargs="+", choices=known, default=known, help="which (all)")
    parser.add_argument("--fractions", nargs="+", type=float, default=list(FRACTIONS), help="share of labels flipped")
    parser.add_argument("--json", type=Path, help="write the figures here; a second run goes on from them")
    options = parser.parse_args()
    about = environment()
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {}
    before = known["rows"] if known.get("format") == FORMAT else []

    def keep(rows: list[dict[str, Any]]) -> None:
        save(options.json, {"format": FORMAT, "environment": about, "rows": rows}, quiet=True)

    rows = measure(options.data, options.fractions, before, keep)
    print(f"\n{show(rows)}")
    save(options.json, {"format": FORMAT, "environment": about, "rows": rows})


if __name__ == "__main__":
    main()
