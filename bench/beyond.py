"""What the frontier's strategies foretell beyond scores that never saw trained weights: partial LDS.

    python bench/beyond.py                                                    # digits-mlp
    python bench/beyond.py --setting fashion-mlp --other-bank

An LDS asks in great part what is in the data. Scores that never saw trained weights of the setting's model say how far
that goes: of its simplest model (linear, or a table of which token follows which), of TRAK on untrained models, and, of
pictures and rows, three that have no network at all: how near two inputs are, at two widths, and a ridge regression on
the labels with a kernel of the inputs (`byline.settings.controls`). For each strategy: its LDS, its partial LDS given
the simplest model, and given all of these; and how much more that is than a reference's, with an interval over subsets
and test examples, both the mean over seeds. What follows ± is the standard deviation over seeds, of the strategy's
ensembles and of the known scores' together. TRAK with its defaults, or, of the strategies, with another residual or
Hessian. Models, strategies' scores and bank are those of ``bench/frontier.py`` and ``bench/removal.py``, in the same
folder, and kept there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np

import byline
from byline.methods import residuals, trak
from byline.settings import controls
from byline.settings.workshop import Workshop
from common import asked, environment, save, spread, table
from frontier import Strategy, arguments, folder_of, named, other_recipe, setting_of, wanted
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


def ignorant(setting: Any, out: Path, seed: int, strategy: str, untrained: int) -> dict[str, np.ndarray]:
    """(n_test, n_train) scores that never saw trained weights, the simplest model's first."""
    found = {
        "simplest": scores_of(named(strategy)[0], setting, out, seed),
        "untrained": controls.untrained(setting, untrained, seed),
    }
    return found | (controls.nearness(setting) if setting.output == "classification" else {})


def measured(
    scores: list[np.ndarray], known: list[list[np.ndarray]], reference: list[np.ndarray], bank: byline.Bank, draws: int
) -> dict[str, Any]:
    """LDS, partial LDS given the first and given all of what is known, and how much more than the reference's."""
    row: dict[str, Any] = {"lds": [], "simplest": [], "all": [], "more": [], "low": [], "high": []}
    for own, given, other in zip(scores, known, reference, strict=True):
        simplest, every = (byline.partial_lds(own, of, bank, bootstrap=0) for of in (given[0], given))
        row["lds"].append(byline.lds(own, bank, bootstrap=0).mean)
        row["simplest"].append(simplest.mean)
        row["all"].append(every.mean)
        row["ceilings"] = [simplest.ceiling, every.ceiling]
        if draws and not np.array_equal(own, other):
            more = byline.lds_difference(own, other, bank, given=given, bootstrap=draws)
            for name, value in zip(("more", "low", "high"), (more.mean, *more.interval), strict=True):
                row[name].append(value)
    return row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="ensembles of each strategy (%(default)s)")
    parser.add_argument("--only", nargs="*", default=ASKED, help="names of strategies of bench/frontier.py")
    parser.add_argument("--simplest", help="the strategy of the simplest model (a short run of the setting's)")
    parser.add_argument("--untrained", type=int, default=10, help="untrained models that vote (%(default)s)")
    parser.add_argument("--residual", default="mean", choices=residuals.KINDS, help="the strategies' (%(default)s)")
    parser.add_argument("--hessian", default="unweighted", choices=trak.HESSIANS, help="the strategies' (%(default)s)")
    parser.add_argument("--other-bank", action="store_true", help="against subsets of a quarter instead of a half")
    parser.add_argument("--reference", default="independent 25", help="what others are held against (%(default)s)")
    parser.add_argument("--reference-residual", default="mean", choices=residuals.KINDS, help="its own (%(default)s)")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of the interval (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    setting = setting_of(options.setting)
    out = folder_of(options)
    strategies = wanted(options.only, ASKED, setting)
    simplest = options.simplest or SIMPLEST.get(setting.task().name, AMONG_TOKENS)
    wanted((simplest, options.reference), (), setting)
    recipe = other_recipe(setting) if options.other_bank else setting.bank_recipe
    bank = Workshop(setting, out, print, progress=False).bank(recipe)
    seeds = range(options.seeds)
    known = [ignorant(setting, out, seed, simplest, options.untrained) for seed in seeds]
    given = [list(of.values()) for of in known]

    def scores(strategy: Strategy, **variant: str) -> list[np.ndarray]:
        variant = {name: value for name, value in variant.items() if value != parser.get_default(name)}
        return [scores_of(strategy, setting, out, seed, **variant) for seed in seeds]

    # the reference has its own residual: with it a fully trained ensemble is at its best
    reference = scores(*named(options.reference), residual=options.reference_residual)
    rows = []
    for strategy in strategies:
        own = scores(strategy, residual=options.residual, hessian=options.hessian)
        rows.append({"name": strategy.name, **measured(own, given, reference, bank, options.bootstrap)})
        print(f"  {strategy.name}: {spread(rows[-1]['all'])}", file=sys.stderr, flush=True)
    of_known = [
        {
            "name": name,
            "lds": [byline.lds(of[name], bank, bootstrap=0).mean for of in known],
            "beyond": [
                byline.partial_lds(of[name], [of[o] for o in of if o != name], bank, bootstrap=0).mean for of in known
            ],
        }
        for name in known[0]
    ]
    print(show(rows, of_known, options.reference))
    if options.json:
        save(options.json, {"options": asked(options), "rows": rows, "known": of_known, "environment": environment()})


def show(rows: list[dict[str, Any]], known: list[dict[str, Any]], reference: str) -> str:
    """The table."""
    header = ["strategy", "LDS", "beyond the simplest", f"beyond all {len(known)}", f"more than {reference}"]
    body = []
    for row in rows:
        more, low, high = (np.mean(row[name]) if row[name] else None for name in ("more", "low", "high"))
        said = "" if more is None else f"{more:+.3f} [{low:+.3f}, {high:+.3f}]"
        body.append([row["name"], spread(row["lds"]), spread(row["simplest"]), spread(row["all"]), said])
    own = "; ".join(f"{of['name']} {spread(of['lds'])} ({spread(of['beyond'])})" for of in known)
    ceilings = ", ".join(f"{ceiling:.2f}" for ceiling in rows[0]["ceilings"])
    said = f"LDS of what never saw trained weights, and in brackets what each has beyond the others: {own}. "
    said += f"Ceilings of the two columns of what is beyond: {ceilings}."
    return f"{table(header, body)}\n\n{said}"


if __name__ == "__main__":
    main()
