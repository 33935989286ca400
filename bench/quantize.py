"""What fewer bytes per number cost: the LDS of TRAK with rows kept as float32, float16 and int8, on the same models."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import BATCH, ROOT, SETTING, clock, environment, save, seconds, table, trained

FORMAT = 1
DTYPES = ("float32", "float16", "int8")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    import numpy as np

    import byline

    out = options.out or ROOT / "runs" / options.setting
    setting, states, bank = trained(out, options.members, options.models, options.bank, name=options.setting)
    kinds = {
        "exact": lambda dtype: byline.Exact(dtype=dtype),
        "factorized, 1024": lambda dtype: byline.Factorized(1024, dtype=dtype),
        "pca, 1024": lambda dtype: byline.Factorized(1024, "pca", dtype=dtype),
        "nystrom, 1024": lambda dtype: byline.Nystrom(1024, dtype=dtype),
    }
    found = []
    for name, make in kinds.items():
        reference: Any = None
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory(prefix="byline-quantize-") as folder:
                attributor = byline.TRAK(
                    setting.task(),
                    byline.Independent(states),
                    features=make(dtype),
                    damping=options.damping,
                    store=folder,
                    batch_size=options.batch_size,
                    progress=False,
                )
                with clock() as spent:
                    scores = attributor.fit(setting.train_set).attribute(setting.test_set)
                size = sum(file.stat().st_size for file in Path(folder).glob("arrays/features/**/c.*"))
            result = byline.lds(scores, bank)
            reference = (scores, result) if reference is None else reference
            pairs = zip(scores.values, reference[0].values, strict=True)
            found.append(
                {
                    "features": name,
                    "dtype": dtype,
                    "bytes": size,
                    "lds": result.mean,
                    "lds_change": result.mean - reference[1].mean,
                    "correlation": float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])),
                    "seconds": spent.wall,
                }
            )
            print(f"  {name}, {dtype}: LDS {result.mean:.4f}", flush=True)
    return found


def show(found: list[dict[str, Any]]) -> str:
    def line(one: dict[str, Any]) -> list[str]:
        return [
            f"{one['features']}, {one['dtype']}",
            f"{one['bytes'] / 1e6:.1f} MB",
            f"{one['lds']:.4f}",
            f"{one['lds_change']:+.4f}",
            f"{one['correlation']:.6f}",
            seconds(one["seconds"]),
        ]

    header = ["rows", "bytes of rows", "LDS", "change", "correlation with float32", "fit + attribute"]
    return table(header, [line(one) for one in found])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/quantize.py --members 5 --json runs/quantize.json",
    )
    parser.add_argument("--members", type=int, default=5, help="trained models (%(default)s)")
    parser.add_argument("--damping", type=float, default=1.0, help="relative damping, the same for all (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=BATCH, help="examples per batch (%(default)s)")
    parser.add_argument("--setting", default=SETTING, help="a setting with a bank (%(default)s)")
    parser.add_argument("--out", type=Path, help="where models and bank are kept (runs/SETTING)")
    parser.add_argument("--models", type=Path, help="a folder of checkpoints (.safetensors) to take instead")
    parser.add_argument("--bank", type=Path, help="a bank to take instead")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    about = environment()
    found = measure(options)
    print(f"\n{show(found)}\n")
    save(options.json, {"format": FORMAT, "environment": about, "dtypes": found})


if __name__ == "__main__":
    main()
