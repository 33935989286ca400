"""Do shares foretell what leaving an owner out does?

The training set is dealt to owners of unequal sizes, each with classes of its own preference; or, with ``--by``,
examples have the owners that the setting knows (``--setting tunes-transformer --by family``). Models are retrained
without each owner in turn; the fall of each test output is what that owner contributed to it. Compared with it, over
owners and test examples: contributions (summed scores), shares under each scheme, and two controls that know no model:
the size of the owner, and how many of its examples have the test example's class (with ``--by``: the test example's
own owner first, then the largest).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import ROOT, SETTING, early, environment, save, table

FORMAT = 1
FEW = 15
"""Training examples below which an owner is one of the others."""


def dealt(labels: Any, owners: int, seed: int = 0) -> Any:
    """(n_train,) owners 0 …: each class is dealt with odds of its own (Dirichlet 0.3)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    out = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        out[members] = rng.choice(owners, len(members), p=rng.dirichlet(np.full(owners, 0.3)))
    return out


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    from torch.utils.data import Subset

    import byline
    from byline import settings
    from byline.evaluate.lds import spearman
    from byline.settings.judges import labels_of
    from byline.uses import shares

    setting = settings.get(options.setting)
    train, known = setting.train_set, None
    test = Subset(setting.test_set, range(min(options.queries, len(setting.test_set))))
    if options.by is None:
        labels = labels_of(setting.train_set)
        owners = dealt(labels, options.owners)
    else:
        if setting.owners is None:
            raise SystemExit(f"--by {options.by}: {options.setting} knows no owners")
        known = [[str(about[options.by]) or "unknown" for about in side] for side in setting.owners()]
        counts = Counter(known[0])
        owners = np.array([name if counts[name] >= FEW else "others" for name in known[0]])
    names, sizes = np.unique(owners, return_counts=True)
    without = np.concatenate([np.ones((1, len(owners)), bool), owners[None] != names[:, None]])
    out = options.out or ROOT / "runs" / options.setting
    which = options.owners if options.by is None else options.by
    path = out / f"owners-{which}-{options.queries}-{options.seeds}.safetensors"
    task = setting.task()
    bank = byline.retrain(
        setting.trainer(), train, test_set=test, task=task, subsets=without, seeds=options.seeds, path=path
    )
    # (n_test, owners): how much lower the output is without the owner
    fall = (bank.outputs[:1].mean(1) - bank.outputs[1:].mean(1)).T
    half = options.seeds // 2
    parts = [bank.outputs[:, s].mean(1) for s in (slice(half), slice(half, 2 * half))]
    falls = [(part[:1] - part[1:]).T for part in parts]
    members = {
        "5 checkpoints of one short run": early(setting)[0],
        "1 model": [
            byline.train_many(setting.build, train, setting.recipe, task_loss=task.loss, seeds=[0])[0].state_dict
        ],
    }
    rows = [{"of": "retraining itself, half the models", "members": "", **_against(*falls, spearman)}]
    size = np.broadcast_to(sizes, fall.shape).astype(np.float64)
    rows.append({"of": "equal split: size of the owner", "members": "", **_against(size, fall, spearman)})
    if known is None:
        same = np.eye(int(labels.max()) + 1)[labels]
        own = np.stack([same[owners == name].sum(0) for name in names])
        mine, title = own[:, labels_of(setting.test_set)[: len(test)]].T, "number of examples of the same class"
    else:
        mine = size + size.max() * (np.array(known[1][: len(test)])[:, None] == names)
        title = "the work's own owner first, then the largest"
    rows.append({"of": title, "members": "", **_against(mine, fall, spearman)})
    for title, states in members.items():
        attributor = byline.TRAK(
            task, byline.Independent(states), features=setting.features(), batch_size=setting.batch_size, progress=False
        ).fit(train)
        votes = attributor.votes(test)
        for scheme in ("net", "clipped"):
            found = shares(votes, owners, scheme=scheme)
            if scheme == "net":
                rows.append(
                    {"of": "contributions", "members": title, **_against(found.contributions.value, fall, spearman)}
                )
            rows.append({"of": f"shares, {scheme}", "members": title, **_against(found.works.value, fall, spearman)})
    return {"owners": len(names), "works": len(test), "sizes": [int(sizes.min()), int(sizes.max())], "rows": rows}


def _against(said: Any, fall: Any, spearman: Any) -> dict[str, Any]:
    """Mean rank correlation over owners, per test example, with a bootstrap interval over test examples."""
    import numpy as np

    each = spearman(np.asarray(said, np.float64), np.asarray(fall, np.float64))
    each = each[np.isfinite(each)]
    draws = each[np.random.default_rng(0).integers(0, len(each), (2000, len(each)))].mean(1)
    # of a catalogue: what an owner has done for all works together
    whole = spearman(np.mean(said, 0)[None].astype(np.float64), np.mean(fall, 0)[None].astype(np.float64))[0]
    return {
        "per_work": float(each.mean()),
        "interval": np.quantile(draws, [0.025, 0.975]).tolist(),
        "catalogue": float(whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/shares.py --json runs/shares.json",
    )
    parser.add_argument("--setting", default=SETTING, help="a setting with labels (%(default)s)")
    parser.add_argument("--owners", type=int, default=20, help="among whom the training set is dealt (%(default)s)")
    parser.add_argument("--by", help="whose examples are, as the setting knows it: collection, family, module")
    parser.add_argument("--queries", type=int, default=200, help="test examples, the works (%(default)s)")
    parser.add_argument("--seeds", type=int, default=10, help="models retrained without each owner (%(default)s)")
    parser.add_argument("--out", type=Path, help="where what is retrained is kept (runs/SETTING)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    about = environment()
    result = measure(options)
    lines = []
    for row in result["rows"]:
        low, high = row["interval"]
        work = f"{row['per_work']:.3f} ({low:.2f} to {high:.2f})"
        lines.append([row["of"], row["members"], work, f"{row['catalogue']:.3f}"])
    low, high = result["sizes"]
    print(f"\n{options.setting}, {result['owners']} owners of {low} to {high} examples each, {result['works']} works\n")
    print(table(["foretold by", "members", "rank correlation over owners, per work", "catalogue"], lines))
    save(options.json, {"format": FORMAT, "environment": about, **result})


if __name__ == "__main__":
    main()
