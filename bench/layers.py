"""Which layers matter: the LDS of each layer's gradients alone, and of all but it.

    python bench/layers.py                                             # digits-mlp
    python bench/layers.py --setting stdlib-gpt --strategies "1 full run, Adam's metric"

TRAK with its defaults; the models, the bank and the strategies are those of ``bench/frontier.py``, in the same folder.
A layer is what the model's children are, and each block of a list of blocks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from torch import nn

import byline
from byline.ledger import Ledger, human_flops
from byline.settings.workshop import Workshop
from common import environment, save, spread, table
from frontier import arguments, folder_of, named, setting_of, trainers_of

ASKED = ("independent 5", "5 checkpoints of a short run")


def layers(model: nn.Module) -> list[str]:
    """The names of children that have parameters; of a list of blocks those of the blocks."""
    found = []
    for name, child in model.named_children():
        parts = [f"{name}.{number}" for number, _ in child.named_children()]
        found += parts if isinstance(child, nn.ModuleList) else [name]
    # a tied weight has the name of where it comes first
    named = [name for name, _ in model.named_parameters()]
    return [layer for layer in found if any(name.startswith(f"{layer}.") for name in named)]


def selections(model: nn.Module) -> Iterator[tuple[str, Callable[[str], bool] | None]]:
    """What is compared: a title, and whether a parameter of this name counts."""
    yield "all", None
    for layer in layers(model):
        yield f"{layer} alone", lambda name, own=f"{layer}.": name.startswith(own)
    if len(layers(model)) > 2:
        for layer in layers(model):
            yield f"all but {layer}", lambda name, own=f"{layer}.": not name.startswith(own)


def measure(options: argparse.Namespace, setting: Any, out: Path) -> list[dict[str, Any]]:
    """A row per strategy and selection, with the LDS of every seed."""
    strategies = named(*options.strategies)
    bank = Workshop(setting, out, print, progress=False).bank(setting.bank_recipe)
    rows = []
    for strategy in strategies:
        trainers = [trainers_of(strategy, setting, out / "frontier-models", seed) for seed in range(options.seeds)]
        ensembles, model = [each.ensemble(strategy)[0] for each in trainers], strategy.on(setting).build()
        for title, chosen in selections(model):
            task = setting.task(model) if chosen is None else setting.task(model).choosing(chosen)
            found = []
            for ensemble in ensembles:
                ledger = Ledger()
                attributor = byline.TRAK(
                    task, ensemble, features=strategy.features(setting), batch_size=setting.batch_size,
                    ledger=ledger, progress=False,
                ).fit(setting.train_set)  # fmt: skip
                found.append(byline.lds(attributor.attribute(setting.test_set), bank, bootstrap=0).mean)
            flops = ledger.serving.flops / len(setting.test_set)
            count = sum(p.numel() for n, p in model.named_parameters() if chosen is None or chosen(n))
            rows.append(
                {"strategy": strategy.name, "layers": title, "parameters": count, "serving": flops, "lds": found}
            )
            print(f"  {strategy.name}, {title}: {spread(found)}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--strategies", nargs="+", default=ASKED, help="names of strategies of bench/frontier.py")
    parser.add_argument("--seeds", type=int, default=3, help="ensembles of each strategy (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    setting = setting_of(options.setting)
    if two := [strategy.name for strategy in named(*options.strategies) if strategy.beside]:
        raise SystemExit(f"--strategies: {two[0]!r} blends two models; layers are compared within one")
    rows = measure(options, setting, folder_of(options))
    body = [
        [row["strategy"], row["layers"], f"{row['parameters']:,}", human_flops(row["serving"]), spread(row["lds"])]
        for row in rows
    ]
    print(table(["strategy", "layers", "parameters", "serving a query", "LDS"], body))
    if options.json:
        save(options.json, {"setting": setting.name, "rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
