"""What the explorer's page waits for: the first answer, and what it asks afterwards, over HTTP from a real service.

A store of many training examples is made (the gradients of small random models on random examples), and ``byline
serve`` is started on it in a process of its own. Then the page's own questions are asked: all scores of an example that
was not asked about before, what removing a tenth of the training set would change, and where a training example leads.
The first of each and the median of the rest are told: the first answer is the one that finds nothing warm.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import serving
from common import environment, median, save, seconds, table

FORMAT = 1
TARGET = 1.0  # seconds for the first answer


def timed(client: Any, method: str, path: str, body: Any = None) -> tuple[float, Any]:
    """Seconds from a question to its whole answer, and the answer."""
    begun = time.perf_counter()
    found = client._ask(method, path, body)
    return time.perf_counter() - begun, found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of each question."""
    from byline.store import Store

    serving.check_memory(4 * options.rows * options.columns * options.members + 2**30)
    attributor, train_set = serving.made(options.rows, options.columns, options.members, options.method)
    attributor.store = Store(folder / "store")
    attributor.fit(train_set)
    columns = attributor.columns()
    del attributor
    with serving.service(options, folder, options.dtypes[0]) as client:
        found: dict[str, Any] = {}
        paths: list[tuple[str, str, str, Any]] = []
        for place in range(options.requests):
            question = {"test": 17 * place}
            removed = list(range(place, options.rows, 10))
            paths += [
                ("all scores of an example", "POST", "/v1/explore/scores", question),
                ("without a tenth of the training set", "POST", "/v1/explore/change",
                 {"question": question, "removed": removed}),
                ("where a training example leads", "GET", f"/v1/explore/influence/{31 * place}", None),
            ]  # fmt: skip
        columns_took, _ = timed(client, "GET", "/v1/explore/columns")
        for what, method, path, body in paths:
            took, answer = timed(client, method, path, body)
            found.setdefault(what, []).append(took)
            if "scores" in answer and what.startswith("all") and answer["scores"]["shape"] != [options.rows]:
                raise SystemExit(f"{path} gave {answer['scores']['shape']} scores")
    return {
        "columns": columns,
        "labels_and_owners": columns_took,
        "first": {what: times[0] for what, times in found.items()},
        "median": {what: median(times[1:]) for what, times in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/explorer.py --json runs/explorer.json",
    )
    parser.add_argument("--rows", type=int, default=50_000, help="training examples (%(default)s)")
    parser.add_argument("--members", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--columns", type=int, default=2048, help="of each member (%(default)s)")
    parser.add_argument("--method", default="TRAK", help="(%(default)s)")
    parser.add_argument("--dtypes", nargs=1, default=["float32"], help="what rows are kept as (%(default)s)")
    parser.add_argument("--requests", type=int, default=20, help="of each kind (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small store: a check, not a measurement")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.columns, options.requests = 3000, 256, 4
    with tempfile.TemporaryDirectory(prefix="byline-explorer-") as folder:
        found = measure(options, Path(folder))
    lines = [[what, seconds(found["first"][what]), seconds(found["median"][what])] for what in found["first"]]
    print(f"{options.rows} × {options.members} members × {found['columns'] // options.members} columns\n")
    print(table(["the page asks", "the first time", "median"], lines))
    print(f"\nlabels and owners, once: {seconds(found['labels_and_owners'])}")
    first = found["first"]["all scores of an example"]
    print(f"the first answer within {TARGET:g} s: {'yes' if first <= TARGET else 'no'}")
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name != "json"}
        save(options.json, {"format": FORMAT, "asked": asked, **found, "environment": environment()})
        print(f"figures: {options.json}")


if __name__ == "__main__":
    main()
