"""byline beside traker and dattri: the same checkpoints, batches and ground truth, in one run on fashion-mlp.

Every contestant runs in a process of its own, one after the other: seconds to fit (features of the training set
and whatever is solved for there), seconds to score the test set, peak memory, and the LDS of its scores against
the same bank of retrained models. Peers run with their CPU defaults, through their documented interface.

`--setup` makes the peers' environment as `workers.py` describes it. A peer that is not there is left out with a
sentence. No torchvision is installed: what is used here of these versions does not import it.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import BATCH, ROOT, SETTING, environment, save, seconds, table, trained
from workers import (
    Figures,
    Once,
    batches_of,
    lds_of,
    left_out,
    margin,
    measure,
    parser_of,
    read_inputs,
    read_job,
    run_all,
    setup,
    write_inputs,
)

PEERS = ("traker", "dattri")
FORMAT = 1


# The parent: checkpoints, processes, ground truth, table


def contestants(models: list[int], dims: list[int]) -> list[dict[str, Any]]:
    """What is run, by method and then by number of models; the first dimension alone for dattri."""
    found: list[dict[str, Any]] = []
    for count in models:
        for name, features in (
            ("byline Exact()", {"kind": "exact"}),
            ("byline Factorized(1024)", {"dim": 1024}),
            ("byline Factorized(1024, basis='pca')", {"dim": 1024, "basis": "pca"}),
        ):
            found.append({"worker": "byline", "name": name, "models": count, "features": features})
        for dim in dims:
            if count == 1 or dim == dims[0]:
                found.append({"worker": "traker", "name": f"traker {dim}", "models": count, "dim": dim})
        if count == 1:  # beside its default of half precision
            name = f"traker {dims[0]}, float32"
            found.append({"worker": "traker", "name": name, "models": count, "dim": dims[0], "half": False})
        found.append({"worker": "dattri", "name": f"dattri TRAK {dims[0]}", "models": count, "dim": dims[0]})
    return found


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds each row's times relative to byline's rows with as many models."""
    for row in rows:
        row["fit_ratio"], row["fit_cpu_ratio"], row["total_ratio"] = {}, {}, {}
        for ours in rows:
            if ours["worker"] == "byline" and ours["models"] == row["models"] and row["worker"] != "byline":
                row["fit_ratio"][ours["name"]] = row["fit"] / ours["fit"]
                row["fit_cpu_ratio"][ours["name"]] = row["fit_cpu"] / ours["fit_cpu"]
                row["total_ratio"][ours["name"]] = (row["fit"] + row["score"]) / (ours["fit"] + ours["score"])


def show(rows: list[dict[str, Any]]) -> str:
    header = ["method", "models", "fit", "score", "cpu fit", "peak memory", "above start", "LDS", "95 % interval"]
    header += ["fit ÷ Factorized", "÷ Exact", "cpu fit ÷ Factorized", "÷ Exact", "total ÷ Factorized", "÷ Exact"]
    shown = []
    for row in rows:
        ratios = [
            f"{row[kind][ours]:.0f} ×" if ours in row[kind] else ""
            for kind in ("fit_ratio", "fit_cpu_ratio", "total_ratio")
            for ours in ("byline Factorized(1024)", "byline Exact()")
        ]
        shown.append(
            [
                row["name"],
                str(row["models"]),
                seconds(row["fit"]),
                seconds(row["score"]),
                seconds(row["fit_cpu"]),
                f"{row['peak'] / 1e6:.0f} MB",
                f"{(row['peak'] - row['start']) / 1e6:.0f} MB",
                f"{row['lds']:.3f}",
                f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}",
                *ratios,
            ]
        )
    return table(header, shown)


def main() -> None:
    parser = parser_of(__doc__, "peers.py --setup --json runs/peers.json", BATCH)
    parser.add_argument("--count", type=int, nargs="+", default=[1, 5], help="numbers of models (1 5)")
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 2048], help="projection dimensions (512 2048)")
    parser.add_argument("--repeats", type=int, default=5, help="of byline's runs, for the median (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=["byline", *PEERS], help="run these alone")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / SETTING, help="where models and bank are kept")
    parser.add_argument("--models", type=Path, help="a folder of checkpoints (.safetensors) to take instead")
    parser.add_argument("--bank", type=Path, help="a bank to take instead")
    options = parser.parse_args()
    if options.worker:
        return work(options.worker)

    if options.setup:
        setup(options.venv)
    python = options.venv / "bin" / "python"
    about = {**environment(), "threads_asked": options.threads}
    chosen = set(options.only or ["byline", *PEERS])
    absent = left_out(python, [name for name in PEERS if name in chosen])
    print("checkpoints and ground truth")
    setting, states, bank = trained(options.out, max(options.count), options.models, options.bank)
    assert bank is not None
    with tempfile.TemporaryDirectory(prefix="byline-peers-") as name:
        write_inputs(Path(name), setting, states)
        jobs = [
            job
            for job in contestants(options.count, options.dims)
            if job["worker"] in chosen and job["worker"] not in absent
        ]
        rows, failed = run_all(__file__, Path(name), jobs, python, options, lambda job, scores: lds_of(scores, bank))
    compare(rows)
    print(f"\n{show(rows)}\n")
    print(
        f"Batches of {options.batch_size}; seconds on the clock (cpu: of all threads), byline's the median of "
        f"{options.repeats} in one process, the peers' of one run. Imports, reading files and making the objects are "
        "not timed. byline factorises its kernel in score, the peers solve theirs in fit: compare the totals. Peak "
        "memory is the process's own, libraries and all; 'above start' is without what it held before."
    )
    result = {"format": FORMAT, "environment": about, "batch_size": options.batch_size, "repeats": options.repeats}
    save(options.json, {**result, "rows": rows, "failed": failed, "left_out": absent})
    if failed:
        raise SystemExit(f"{len(failed)} of {len(failed) + len(rows)} failed")


# The workers: one process each. byline is imported in its own alone.


def work(path: Path) -> None:
    """What runs in a contestant's process: read the inputs, fit, score, write scores and figures."""
    job = read_job(path)
    model, states, train, test = read_inputs(job)
    make = {"byline": _byline, "traker": _traker, "dattri": _dattri}[job["worker"]]
    once, about = make(job, model, states, train, test)
    measure(job, once, about, (len(test), len(train)))


def _byline(job: dict[str, Any], model: Any, states: list[Any], train: Any, test: Any) -> tuple[Once, Figures]:
    import byline

    features = byline.Exact() if job["features"].get("kind") == "exact" else byline.Factorized(**job["features"])

    def once() -> tuple[Callable[[], Any], Callable[[], Any]]:
        attributor = byline.TRAK(
            byline.Task(model, output="classification"),
            byline.Independent(states),
            features=features,
            batch_size=job["batch_size"],
            progress=False,
        )
        return lambda: attributor.fit(train), lambda: attributor.attribute(test).values

    return once, {"version": byline.__version__}


def _traker(job: dict[str, Any], model: Any, states: list[Any], train: Any, test: Any) -> tuple[Once, Figures]:
    """`TRAKer` as its quickstart has it: featurize and finalize each checkpoint, then score and finalize."""
    from trak import TRAKer

    def once() -> tuple[Callable[[], Any], Callable[[], Any]]:
        place = tempfile.TemporaryDirectory(dir=job["folder"])
        # on the CPU its default is a BasicProjector of normal entries, and its default half precision
        traker = TRAKer(
            model=model,
            task="image_classification",
            train_set_size=len(train),
            save_dir=place.name,
            device="cpu",
            proj_dim=job["dim"],
            use_half_precision=job.get("half", True),
            logging_level=40,
        )

        def fit() -> None:
            for i, state in enumerate(states):
                traker.load_checkpoint(state, model_id=i)
                for batch in batches_of(train, job["batch_size"]):
                    traker.featurize(batch=batch, num_samples=len(batch[1]))
            traker.finalize_features()

        def score() -> Any:
            for i, state in enumerate(states):
                traker.start_scoring_checkpoint("test", checkpoint=state, model_id=i, num_targets=len(test))
                for batch in batches_of(test, job["batch_size"]):
                    traker.score(batch=batch, num_samples=len(batch[1]))
            scores = traker.finalize_scores(exp_name="test").T.copy()
            place.cleanup()
            return scores

        return fit, score

    return once, {"version": importlib.metadata.version("traker")}


def _dattri(job: dict[str, Any], model: Any, states: list[Any], train: Any, test: Any) -> tuple[Once, Figures]:
    """`TRAKAttributor` as its documentation has it: a task of the margin, `cache` the training set, `attribute`."""
    import torch
    from dattri.algorithm import TRAKAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader

    def logits_of(params: Any, example: Any) -> tuple[Any, Any]:
        x, y = example
        return torch.func.functional_call(model, params, x.unsqueeze(0)), y.unsqueeze(0)

    def margin_of(params: Any, example: Any) -> Any:
        return margin(*logits_of(params, example)).sum()

    def probability(params: Any, example: Any) -> Any:
        logits, label = logits_of(params, example)
        return torch.exp(-torch.nn.functional.cross_entropy(logits, label))

    def once() -> tuple[Callable[[], Any], Callable[[], Any]]:
        task = AttributionTask(loss_func=margin_of, model=model, checkpoints=states)
        attributor = TRAKAttributor(
            task=task,
            correct_probability_func=probability,
            projector_kwargs={"proj_dim": job["dim"]},
            device="cpu",
        )
        loaders = [DataLoader(data, batch_size=job["batch_size"], shuffle=False) for data in (train, test)]

        def score() -> Any:
            with torch.no_grad():
                return attributor.attribute(loaders[1]).T.detach().numpy()

        def fit() -> None:
            with torch.no_grad():
                attributor.cache(loaders[0])

        return fit, score

    return once, {"version": importlib.metadata.version("dattri")}


if __name__ == "__main__":
    main()
