"""Where a factor's coordinates are nearly its eigenvectors: the overlap of the two, factor by factor.

    python bench/directions.py                                    # digits-mlp
    python bench/directions.py --setting tunes-transformer        # a model of seed 0, trained if it is not there

The overlap of the leading eigenvectors of a factor's second moments with as many of its largest coordinates, at a
quarter and at half of its width: 1 where they span the same, 0.25 and 0.5 by chance. `byline.Factorized` and
`byline.LowRank` take coordinates where both are at least 0.8 and the factor is wide. Models are those of
``bench/frontier.py``, in the same folder; no ground truth is looked at.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

import byline
from byline.features import directions, factorized
from common import environment, save, table
from frontier import Trainers, arguments, folder_of, named, setting_of


def overlaps(setting: Any, out: Path, preconditioned: bool) -> list[dict[str, Any]]:
    """A row per factor, in the order in which their bases are learnt."""
    (strategy,) = named("independent 1")
    ensemble, _, _ = Trainers(setting, out / "frontier-models", 0).ensemble(strategy)
    rows: list[dict[str, Any]] = []

    def watched(moment: torch.Tensor, *options: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = directions.leading(moment, *options, **more)
        vectors, places = torch.linalg.eigh(moment)[1].flip(1), moment.diagonal().argsort(descending=True)
        width = len(moment)
        quarter, half = (directions.overlap(vectors, places, max(1, width // part)) for part in (4, 2))
        rows.append({"width": width, "quarter": quarter, "half": half, "coordinates": not found[1].is_floating_point()})
        return found

    features: Any = byline.Factorized(2048, basis="pca")
    real, factorized.leading = factorized.leading, watched
    try:
        chosen = byline.Preconditioned(features) if preconditioned else features
        byline.GradDot(
            setting.task(), ensemble, features=chosen, progress=False, batch_size=setting.batch_size
        ).fit(setting.train_set)  # fmt: skip
    finally:
        factorized.leading = real
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--preconditioned", action="store_true", help="of gradients in Adam's metric")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = overlaps(setting_of(options.setting), folder_of(options), options.preconditioned)
    body = [[str(r["width"]), f"{r['quarter']:.2f}", f"{r['half']:.2f}", "yes" * r["coordinates"]] for r in rows]
    print(table(["width", "at a quarter", "at half", "coordinates"], body))
    if options.json:
        save(options.json, {"setting": options.setting, "rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
