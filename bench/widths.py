"""How wide a model must be to explain: the LDS of narrower and wider models, against the outputs of the setting's own.

    python bench/widths.py                          # digits-mlp
    python bench/widths.py --setting fashion-mlp --lengths short

The ground truth is the setting's bank, of models at its own width; only those that vote are narrower or wider. TRAK
with its defaults, and with the weighted Hessian; the bank and the folder of models are those of ``bench/frontier.py``.
Q is the mean over the training set of 1 - p, what a member has not learnt by heart; the loss is that of the test set.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from torch.utils.data import DataLoader

import byline
from byline.ledger import Ledger, human_flops
from byline.settings.workshop import Workshop
from common import environment, save, spread, table
from frontier import Strategy, arguments, folder_of, refusal, setting_of, trainers_of


def unlearnt(setting: Any, ensemble: Any) -> tuple[float, float]:
    """The mean Q of the training set, and the mean loss of the test set, over members."""
    task = setting.task()
    parts: tuple[list[float], list[float]] = ([], [])
    for member in ensemble.members():
        task.model.load_state_dict(member.weights.load())
        for found, data, of in zip(
            parts, (setting.train_set, setting.test_set), (task.residual, task.loss), strict=True
        ):
            with torch.no_grad():
                values = torch.cat([of(task.model, batch) for batch in DataLoader(data, setting.batch_size)])
            found.append(values.mean().item())
    return float(np.mean(parts[0])), float(np.mean(parts[1]))


def measure(options: argparse.Namespace, setting: Any, out: Path) -> list[dict[str, Any]]:
    """A row per length and width, with the LDS of every seed."""
    bank = Workshop(setting, out, print, progress=False).bank(setting.bank_recipe)
    rows = []
    for length in options.lengths:
        for width in options.widths:
            strategy = Strategy("", options.runs, length, width=width)
            row: dict[str, Any] = {"length": length, "width": width, "lds": [], "weighted": [], "q": [], "loss": []}
            for seed in range(options.seeds):
                trainers = trainers_of(strategy, setting, out / "frontier-models", seed)
                own, (ensemble, cost, _) = trainers.setting, trainers.ensemble(strategy)
                for hessian, found in (("unweighted", row["lds"]), ("weighted", row["weighted"])):
                    ledger = Ledger()
                    attributor = byline.TRAK(
                        own.task(), ensemble, features=own.features(), hessian=hessian, batch_size=own.batch_size,
                        ledger=ledger, progress=False,
                    ).fit(own.train_set)  # fmt: skip
                    found.append(byline.lds(attributor.attribute(own.test_set), bank, bootstrap=0).mean)
                    row.setdefault("serving", ledger.serving.flops / len(own.test_set))
                q, loss = unlearnt(own, ensemble)
                row["q"].append(q)
                row["loss"].append(loss)
                row["training"] = cost.flops
            row["parameters"] = sum(p.numel() for p in own.build().parameters())
            rows.append(row)
            print(f"  {length}, {width:g}: {spread(row['lds'])}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--widths", type=float, nargs="+", default=[2, 1, 0.5, 0.25, 0.125], help="over its own")
    parser.add_argument("--lengths", nargs="+", default=["full", "short"], choices=["full", "short", "brief"])
    parser.add_argument("--runs", type=int, default=5, help="models that vote (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="ensembles of each width (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    setting = setting_of(options.setting)
    if refused := [said for width in options.widths if (said := refusal(Strategy("", width=width), setting))]:
        raise SystemExit(refused[0])
    rows = measure(options, setting, folder_of(options))
    whole = next((row["training"] for row in rows if (row["length"], row["width"]) == ("full", 1)), rows[0]["training"])
    header = ["runs", "width", "parameters", "training", "serving a query", "test loss", "mean Q", "LDS", "W"]
    body = [
        [
            f"{options.runs} {row['length']}", f"{row['width']:g}", f"{row['parameters']:,}",
            f"{row['training'] / whole:.0%}", human_flops(row["serving"]), f"{np.mean(row['loss']):.3f}",
            f"{np.mean(row['q']):.4f}", spread(row["lds"]), spread(row["weighted"]),
        ]
        for row in rows
    ]  # fmt: skip
    print(table(header, body))
    if options.json:
        save(options.json, {"setting": setting.name, "rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
