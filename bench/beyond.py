"""What the frontier's strategies foretell beyond the simplest model: partial LDS.

    python bench/beyond.py                                                    # digits-mlp
    python bench/beyond.py --setting fashion-mlp --other-bank

A linear model of the same inputs, or a table of which token follows which, has a good LDS where the data say most of
what there is to say. What a method adds to it is about the model. For each strategy: its LDS, its partial LDS given the
scores of the baseline, with the interval of the first ensemble over subsets and test examples, and the partial LDS of
the baseline given the strategy's scores. TRAK with its defaults; models, scores and bank are those of
``bench/frontier.py`` and ``bench/removal.py``, in the same folder, and kept there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np

import byline
from byline.settings.workshop import Workshop
from common import environment, save, spread, table
from frontier import arguments, folder_of, named, other_recipe, refusal, setting_of
from removal import scores_of

ASKED = (
    "independent 1",
    "independent 5",
    "independent 25",
    "LoRA 1×4",
    "1 short run, int8",
    "5 checkpoints of a short run",
    "3 checkpoints each of 3 short runs",
    "5 short runs",
    "short halves 2",
    "short halves 6",
    "3 checkpoints each of 3 short runs of half the width, int8",
    "5 checkpoints of a short run, and the simplest model, int8",
)
SIMPLEST = {"classification": "1 short run of the simplest model, int8"}
AMONG_TOKENS = "1 short run of the simplest model, exact in Adam's metric"


def measured(scores: list[np.ndarray], baselines: list[np.ndarray], bank: byline.Bank, draws: int) -> dict[str, Any]:
    """LDS, partial LDS and the baseline's partial LDS of every seed, and the interval of the first."""
    pairs = list(zip(scores, baselines, strict=True))
    beyond = [
        byline.partial_lds(own, known, bank, bootstrap=draws if number == 0 else 0)
        for number, (own, known) in enumerate(pairs)
    ]
    return {
        "lds": [byline.lds(own, bank, bootstrap=0).mean for own in scores],
        "beyond": [found.mean for found in beyond],
        "interval": list(beyond[0].interval),
        "ceiling": beyond[0].ceiling,
        "left": [byline.partial_lds(known, own, bank, bootstrap=0).mean for own, known in pairs],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="ensembles of each strategy (%(default)s)")
    parser.add_argument("--only", nargs="*", default=ASKED, help="names of strategies of bench/frontier.py")
    parser.add_argument("--baseline", help="the strategy that is taken as known (the setting's simplest model)")
    parser.add_argument("--other-bank", action="store_true", help="against subsets of a quarter instead of a half")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of the interval (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    setting = setting_of(options.setting)
    out = folder_of(options)
    strategies = named(*options.only)
    (baseline,) = named(options.baseline or SIMPLEST.get(setting.task().name, AMONG_TOKENS))
    if options.only is ASKED:
        strategies = [strategy for strategy in strategies if not refusal(strategy, setting)]
    for strategy in (*strategies, baseline):
        if said := refusal(strategy, setting):
            raise SystemExit(f"{strategy.name}: {said}")
    recipe = other_recipe(setting) if options.other_bank else setting.bank_recipe
    bank = Workshop(setting, out, print, progress=False).bank(recipe)
    seeds = range(options.seeds)
    known = [scores_of(baseline, setting, out, seed) for seed in seeds]
    rows = []
    for strategy in strategies:
        scores = [scores_of(strategy, setting, out, seed) for seed in seeds]
        rows.append({"name": strategy.name, **measured(scores, known, bank, options.bootstrap)})
        print(f"  {strategy.name}: {spread(rows[-1]['beyond'])}", file=sys.stderr, flush=True)
    print(show(rows, [byline.lds(own, bank, bootstrap=0).mean for own in known], baseline.name))
    if options.json:
        asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        save(options.json, {"options": asked, "rows": rows, "environment": environment()})


def show(rows: list[dict[str, Any]], own: list[float], baseline: str) -> str:
    """The table."""
    header = ["strategy", "LDS", "beyond the simplest", "95 % interval", "the simplest beyond it"]
    body = [
        [
            row["name"], spread(row["lds"]), spread(row["beyond"]),
            "{:.3f} to {:.3f}".format(*row["interval"]), spread(row["left"]),
        ]
        for row in rows
    ]  # fmt: skip
    said = f"The simplest: {baseline}, LDS {spread(own)}. The ceiling of what is beyond it: {rows[0]['ceiling']:.2f}."
    return f"{table(header, body)}\n\n{said}"


if __name__ == "__main__":
    main()
