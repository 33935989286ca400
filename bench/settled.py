"""How many members are enough: what `settled` says of the first m members, beside what their scores are worth.

For m members of an ensemble: the reliability that `byline.settled` foretells from the agreement of members, the rank
correlation that their scores really have with those of as many others, and their LDS as a share of all members' LDS.
Nothing of the ground truth goes into the first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import ROOT, environment, save, table

FORMAT = 1
SIZES = (2, 3, 5, 8, 12)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    import numpy as np

    import byline
    from byline import settings
    from byline.evaluate.lds import spearman
    from byline.settings.grid import first
    from byline.settings.workshop import Workshop
    from byline.votes import Votes

    setting = settings.get(options.setting)
    out = options.out or ROOT / "runs" / options.setting
    shop = Workshop(setting, out, lambda sentence: print(f"  {sentence}", flush=True), progress=False)
    count = 2 * max(SIZES)
    models = byline.Independent([model.state for model in shop.models(count)])
    bank = shop.bank(setting.bank_recipe)
    queries = min(options.queries, len(setting.test_set))
    bank = byline.Bank(bank.subsets, bank.outputs[:, :, :queries], bank.metadata)
    ensembles = {
        "independent models": models,
        "masks of one model, p 0.5": byline.Dropout(
            byline.Independent([model.state for model in shop.models(1)]), masks=count, p=0.5
        ),
    }
    rows = []
    for name, ensemble in ensembles.items():
        attributor = byline.TRAK(setting.task(), ensemble, progress=False).fit(setting.train_set)
        votes = attributor.votes(first(setting.test_set, queries))

        def some(places: Any, votes: Votes = votes) -> Votes:
            residuals = None if votes.residuals is None else votes.residuals[places]
            return Votes(votes.values[places], votes.weights[places], residuals, votes.models[places], info=votes.info)

        whole = byline.lds(votes.mean(), bank).mean
        for m in SIZES:
            one, other = some(np.arange(m)), some(np.arange(m, 2 * m))
            said = byline.settled(one, examples=queries)
            rows.append(
                {
                    "ensemble": name,
                    "members": m,
                    "foretold": said.reliability,
                    "needed": said.needed,
                    "agreement": float(np.nanmean(spearman(one.mean(), other.mean()))),
                    "lds": byline.lds(one.mean(), bank, bootstrap=0).mean,
                    "share": byline.lds(one.mean(), bank, bootstrap=0).mean / whole,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/settled.py --json runs/settled.json",
    )
    parser.add_argument("--setting", default="digits-mlp", help="(%(default)s)")
    parser.add_argument("--queries", type=int, default=200, help="test examples (%(default)s)")
    parser.add_argument("--out", type=Path, help="where models and bank are kept (runs/SETTING)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    about = environment()
    rows = measure(options)
    head = ["ensemble", "members", "foretold", "agreement with others", "LDS", "of all members'", "needed for 0.9"]
    lines = [
        [
            row["ensemble"],
            str(row["members"]),
            f"{row['foretold']:.2f}",
            f"{row['agreement']:.2f}",
            f"{row['lds']:.3f}",
            f"{row['share'] * 100:.0f} %",
            str(row["needed"]),
        ]
        for row in rows
    ]
    print(f"\n{options.setting}\n\n{table(head, lines)}")
    save(options.json, {"format": FORMAT, "environment": about, "rows": rows})


if __name__ == "__main__":
    main()
