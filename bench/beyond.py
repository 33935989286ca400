"""What the frontier's strategies foretell beyond scores that know nothing of the model: partial LDS.

    python bench/beyond.py                                                    # digits-mlp
    python bench/beyond.py --setting fashion-mlp --other-bank

An LDS asks in great part what is in the data. Four kinds of scores that never saw a trained model of the setting say
how far that goes: its simplest model (linear, or a table of which token follows which), TRAK on untrained models, and,
of pictures and rows, how near two inputs are, exp(-d² / h) with h the median d² and a quarter of it, where the labels
are equal, and a share of its negative where they differ. For each strategy: its LDS, its partial LDS given the simplest
model, and given all four, with the interval of the first ensemble over subsets and test examples. TRAK with its
defaults, or, of the strategies, with another residual or Hessian. Models, scores and bank are those of
``bench/frontier.py`` and ``bench/removal.py``, in the same folder, and kept there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from torch import Tensor

import byline
from byline.methods import residuals, trak
from byline.settings import controls
from byline.settings.workshop import Workshop
from common import environment, save, spread, table
from frontier import arguments, folder_of, named, other_recipe, refusal, setting_of
from removal import scores_of

ASKED = (
    "independent 1",
    "independent 5",
    "independent 25",
    "dropout 1×10",
    "dropout 5×5",
    "forward-only 1×10",
    "forward-only 5×10",
    "LoRA 1×4",
    "LoRA 5×4",
    "weight noise 1×10",
    "1 short run, int8",
    "5 short runs",
    "5 brief runs",
    "5 checkpoints of a short run",
    "10 checkpoints of a full run",
    "3 checkpoints each of 3 short runs",
    "short halves 2",
    "short halves 6",
    "halves 10",
    "5 short runs of half the width, int8",
    "3 checkpoints each of 3 short runs of half the width, int8",
    "5 checkpoints of a short run, and the simplest model, int8",
)
SIMPLEST = {"classification": "1 short run of the simplest model, int8"}
AMONG_TOKENS = "1 short run of the simplest model, exact in Adam's metric"
NAMES = "simplest", "untrained", "near", "nearer"


def ignorant(setting: Any, out: Path, seed: int, simplest: str, untrained: int) -> list[np.ndarray]:
    """(n_test, n_train) scores that know nothing of the trained model, the simplest model's first."""
    found = [scores_of(named(simplest)[0], setting, out, seed), controls.untrained(setting, untrained, seed)]
    return found + (of_inputs(setting) if setting.task().name == "classification" else [])


def of_inputs(setting: Any) -> list[np.ndarray]:
    """How near inputs are, at two widths: proponents of the same label, opponents of others, in balance."""
    (x, y), (asked, labels) = (pair(data) for data in (setting.train_set, setting.test_set))
    distance = torch.cdist(asked.flatten(1), x.flatten(1)).square()
    sign = torch.where(labels[:, None] == y[None], 1.0, -1 / int(y.max()))
    width = distance.median()
    return [(torch.exp(-distance / h) * sign).numpy() for h in (width, width / 4)]


def pair(data: Any) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a dataset."""
    x, y = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(x).float(), torch.as_tensor(y)


def measured(scores: list[np.ndarray], known: list[list[np.ndarray]], bank: byline.Bank, draws: int) -> dict[str, Any]:
    """LDS, and partial LDS given the first and given all of what is known, of every seed; the first seed's interval."""
    every = [
        byline.partial_lds(own, given, bank, bootstrap=0 if number else draws)
        for number, (own, given) in enumerate(zip(scores, known, strict=True))
    ]
    simplest = [byline.partial_lds(own, given[0], bank, bootstrap=0) for own, given in zip(scores, known, strict=True)]
    return {
        "lds": [byline.lds(own, bank, bootstrap=0).mean for own in scores],
        "simplest": [found.mean for found in simplest],
        "all": [found.mean for found in every],
        "interval": list(every[0].interval),
        "ceilings": [simplest[0].ceiling, every[0].ceiling],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="ensembles of each strategy (%(default)s)")
    parser.add_argument("--only", nargs="*", default=ASKED, help="names of strategies of bench/frontier.py")
    parser.add_argument("--simplest", help="the strategy of the simplest model (a short run of the setting's)")
    parser.add_argument("--untrained", type=int, default=10, help="untrained models that vote (%(default)s)")
    parser.add_argument("--residual", default="mean", choices=residuals.KINDS, help="the strategies' (%(default)s)")
    parser.add_argument("--hessian", default="unweighted", choices=trak.HESSIANS, help="the strategies' (%(default)s)")
    parser.add_argument("--other-bank", action="store_true", help="against subsets of a quarter instead of a half")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of the interval (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    setting = setting_of(options.setting)
    out = folder_of(options)
    strategies = named(*options.only)
    simplest = options.simplest or SIMPLEST.get(setting.task().name, AMONG_TOKENS)
    if options.only is ASKED:
        strategies = [strategy for strategy in strategies if not refusal(strategy, setting)]
    for strategy in (*strategies, *named(simplest)):
        if said := refusal(strategy, setting):
            raise SystemExit(f"{strategy.name}: {said}")
    recipe = other_recipe(setting) if options.other_bank else setting.bank_recipe
    bank = Workshop(setting, out, print, progress=False).bank(recipe)
    seeds = range(options.seeds)
    known = [ignorant(setting, out, seed, simplest, options.untrained) for seed in seeds]
    rows = []
    asked = {"residual": options.residual, "hessian": options.hessian}
    variant = {name: value for name, value in asked.items() if value != parser.get_default(name)}
    for strategy in strategies:
        scores = [scores_of(strategy, setting, out, seed, **variant) for seed in seeds]
        rows.append({"name": strategy.name, **measured(scores, known, bank, options.bootstrap)})
        print(f"  {strategy.name}: {spread(rows[-1]['all'])}", file=sys.stderr, flush=True)
    own = {
        name: [byline.lds(values, bank, bootstrap=0).mean for values in of_seeds]
        for name, of_seeds in zip(NAMES, zip(*known, strict=True), strict=False)
    }
    print(show(rows, own))
    if options.json:
        given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        save(options.json, {"options": given, "rows": rows, "known": own, "environment": environment()})


def show(rows: list[dict[str, Any]], known: dict[str, list[float]]) -> str:
    """The table."""
    header = ["strategy", "LDS", "beyond the simplest model", "beyond all that knows no model", "95 % interval"]
    body = [
        [
            row["name"], spread(row["lds"]), spread(row["simplest"]), spread(row["all"]),
            "{:.3f} to {:.3f}".format(*row["interval"]),
        ]
        for row in rows
    ]  # fmt: skip
    own = "; ".join(f"{name} {spread(values)}" for name, values in known.items())
    ceilings = ", ".join(f"{ceiling:.2f}" for ceiling in rows[0]["ceilings"])
    said = f"LDS of what knows no model: {own}. Ceilings of the two columns of what is beyond: {ceilings}."
    return f"{table(header, body)}\n\n{said}"


if __name__ == "__main__":
    main()
