"""How fast a store is read: checked against its checksums, beside plain reads of the same files, in one run.

Measured: bytes per second of `Stored.read` over all rows of a member, of `Stored.read_raw`, and of reading the same
files with ``open(...).readinto``, taking turns; from the page cache, where the checksum costs most.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import alternated, environment, median, save, table

FORMAT = 1
SHARES = ("checked_of_plain", "checked_of_plain_by_cpu", "decoded_of_plain")
TARGET = 0.5
"""What checksummed reads may at least be of plain ones."""


def filled(folder: Path, rows: int, columns: int, chunk: int, dtype: str) -> Any:
    """A store with one member of synthetic rows."""
    import torch

    from byline.store import Store
    from byline.store.quantize import encode

    store = Store(folder)
    about = {"member": "synthetic", "identity": "synthetic", "of": "output", "dtype": dtype, "examples": rows}
    generator = torch.Generator().manual_seed(0)
    key, zeros = "synthetic-output", torch.zeros(chunk)
    with store.session():
        example = encode({"rows": torch.zeros(1, columns)}, dtype)
        store.begin(key, about, chunk, {}, example)
        for index, start in enumerate(range(0, rows, chunk)):
            size = min(chunk, rows - start)
            batch = encode({"rows": torch.randn(size, columns, generator=generator)}, dtype)
            store.write(key, index, batch, zeros[:size], zeros[:size])
        store.finish([key])
    return store.features(key)


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    import numpy as np

    out = []
    for dtype in ("float32", "float16", "int8"):
        stored = filled(folder / dtype, options.rows, options.columns, options.chunk, dtype)
        files = sorted((folder / dtype / "arrays" / "features").rglob("c.*"))
        size = sum(file.stat().st_size for file in files)
        buffer = np.empty(max(file.stat().st_size for file in files), np.uint8)

        def plain(files: list[Path] = files, buffer: Any = buffer) -> None:
            # into memory of its own, as the store's rows are
            for file in files:
                with file.open("rb", buffering=0) as open_file:
                    open_file.readinto(np.empty_like(buffer))

        def raw(stored: Any = stored) -> None:
            for start, stop in stored.spans(options.chunk):
                stored.read_raw(start, stop)

        def read(stored: Any = stored) -> None:
            for start, stop in stored.spans(options.chunk):
                stored.read(start, stop)

        times = alternated({"plain": plain, "raw": raw, "read": read}, options.repeats)
        speeds = {name: size / median([one.wall for one in values]) for name, values in times.items()}
        share = median([a.wall / b.wall for a, b in zip(times["plain"], times["raw"], strict=True)])
        by_cpu = median([a.cpu / b.cpu for a, b in zip(times["plain"], times["raw"], strict=True)])
        decoded = median([a.wall / b.wall for a, b in zip(times["plain"], times["read"], strict=True)])
        out.append(
            {
                "dtype": dtype,
                "bytes": size,
                "files": len(files),
                "bytes_per_second": speeds,
                "checked_of_plain": share,
                "checked_of_plain_by_cpu": by_cpu,
                "decoded_of_plain": decoded,
                "target": TARGET,
                "met": share >= TARGET,
            }
        )
    return out


def show(found: list[dict[str, Any]]) -> str:
    def line(one: dict[str, Any]) -> list[str]:
        speeds = [f"{one['bytes_per_second'][name] / 1e9:.2f} GB/s" for name in ("plain", "raw", "read")]
        shares = [f"{one[name] * 100:.0f} %" for name in SHARES]
        return [one["dtype"], f"{one['bytes'] / 1e6:.0f} MB", *speeds, *shares, "yes" if one["met"] else "NO"]

    header = [
        "rows as",
        "size",
        "plain",
        "checked",
        "decoded",
        "checked ÷ plain",
        "by cpu seconds",
        "decoded ÷ plain",
        "50 % met",
    ]
    return table(header, [line(one) for one in found])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/store.py --json runs/store.json",
    )
    parser.add_argument("--rows", type=int, default=40_000, help="examples (%(default)s)")
    parser.add_argument("--columns", type=int, default=2048, help="numbers per example (%(default)s)")
    parser.add_argument("--chunk", type=int, default=256, help="examples per chunk (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="passes of each, after a first (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the store is made (a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    about = environment()
    with tempfile.TemporaryDirectory(prefix="byline-store-", dir=options.folder) as folder:
        found = measure(options, Path(folder))
    print(f"\n{show(found)}\n")
    print("On a busy machine the clock says more about the others: look at the CPU seconds.")
    save(options.json, {"format": FORMAT, "environment": about, "reads": found})


if __name__ == "__main__":
    main()
