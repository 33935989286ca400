"""byline beside dattri on a transformer of tokens: the same checkpoint, batches and ground truth, in one run.

    .venv/bin/python bench/sequences.py --setup --json runs/sequences.json

Every contestant runs in a process of its own, as in ``peers.py``: seconds to fit and to score, memory above what the
process held before, and LDS against the bank of `tunes-transformer` (or another setting of sequences). All see one
trained model. dattri's TRAK takes per-example gradients of all parameters by ``torch.func`` and projects them; its
LoGra hooks the linear layers, all but relative attention's table of distances, whose input has a dimension more.
Both run with their CPU defaults; a plain forward and backward pass over the training set stands beside them.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import ROOT, environment, save, seconds, table, trained
from workers import Figures, Once, lds_of, left_out, measure, parser_of, read_job, run_all, setup

FORMAT = 1
ADAPTERS = (1, 4)
"""Of the trained model, fine-tuned for one epoch: what features of several cost, over what those of one do."""


def contestants(columns: list[int], per_layer: list[int]) -> list[dict[str, Any]]:
    """What is run; dattri's TRAK with the first number of columns alone."""
    found: list[dict[str, Any]] = [{"worker": "plain", "name": "plain forward + backward"}]
    for dim in columns:
        found.append({"worker": "byline", "name": f"byline TRAK, Factorized({dim})", "method": "trak", "dim": dim})
    for dim in columns:
        name = f"byline TRAK, Factorized({dim}, basis='pca')"
        found.append({"worker": "byline", "name": name, "method": "trak", "dim": dim, "basis": "pca"})
    # the models are trained with AdamW; Adam's metric has no few leading directions
    wide = {"dim": 20_000, "basis": "pca", "dtype": "int8"}
    for title, more in (("Factorized(20000, 'pca', int8)", {}), ("the same in Adam's metric", {"adam": True})):
        found.append({"worker": "byline", "name": f"byline TRAK, {title}", "method": "trak", **wide, **more})
    for title, more in (("Exact", {}), ("Exact in Adam's metric", {"adam": True})):
        found.append({"worker": "byline", "name": f"byline TRAK, {title}", "method": "trak", "dim": "all", **more})
    for count in ADAPTERS:
        name = f"byline TRAK of {count} adapter{'s' if count > 1 else ''}, Factorized({columns[0]})"
        found.append({"worker": "byline", "name": name, "method": "trak", "dim": columns[0], "adapters": count})
    for dim in columns:
        found.append({"worker": "byline", "name": f"byline LoGra, {dim} columns", "method": "logra", "dim": dim})
    name = f"byline LoGra, {columns[-1]} columns, basis='pca'"
    found.append({"worker": "byline", "name": name, "method": "logra", "dim": columns[-1], "basis": "pca"})
    found.append({"worker": "dattri", "name": f"dattri TRAK {columns[0]}", "method": "trak", "dim": columns[0]})
    for dim in per_layer:
        found.append({"worker": "dattri", "name": f"dattri LoGra, {dim} a layer", "method": "logra", "dim": dim})
    return found


def show(rows: list[dict[str, Any]]) -> str:
    plain = next((row["fit"] for row in rows if row["worker"] == "plain"), None)
    header = ["method", "columns", "fit", "score", "fit ÷ plain", "above start", "LDS", "95 % interval"]
    body = []
    for row in rows:
        judged = "lds" in row
        body.append(
            [
                row["name"],
                str(row.get("columns", "")),
                seconds(row["fit"]),
                seconds(row["score"]) if judged else "",
                f"{row['fit'] / plain:.1f} ×" if plain else "",
                f"{(row['peak'] - row['start']) / 1e6:.0f} MB",
                f"{row['lds']:.3f}" if judged else "",
                f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}" if judged else "",
            ]
        )
    return table(header, body)


def main() -> None:
    parser = parser_of(__doc__, "sequences.py --setup --json runs/sequences.json", 32)
    parser.add_argument("--setting", default="tunes-transformer", help="a setting of sequences (%(default)s)")
    parser.add_argument("--columns", type=int, nargs="+", default=[512, 2048], help="columns in all (512 2048)")
    parser.add_argument("--per-layer", type=int, nargs="+", default=[64, 256], help="dattri's LoGra (64 256)")
    parser.add_argument("--repeats", type=int, default=3, help="of byline and the plain pass (%(default)s)")
    parser.add_argument("--out", type=Path, help="where models and bank are kept (runs/SETTING)")
    parser.add_argument("--only", nargs="+", help="contestants whose name contains one of these")
    options = parser.parse_args()
    if options.worker:
        return work(options.worker)

    if options.setup:
        setup(options.venv)
    python = options.venv / "bin" / "python"
    about = {**environment(), "threads_asked": options.threads}
    absent = left_out(python, ["dattri"])
    out = options.out or ROOT / "runs" / options.setting
    _, states, bank = trained(out, 1, None, None, name=options.setting)
    assert bank is not None
    with tempfile.TemporaryDirectory(prefix="byline-sequences-") as name:
        _write(Path(name), states[0])
        jobs = [
            {**job, "setting": options.setting}
            for job in contestants(options.columns, options.per_layer)
            if job["worker"] not in absent and (not options.only or any(word in job["name"] for word in options.only))
        ]

        def judged(job: dict[str, Any], scores: Any) -> Figures:
            return {} if job["worker"] == "plain" else lds_of(scores, bank)

        rows, failed = run_all(__file__, Path(name), jobs, python, options, judged)
    print(f"\n{show(rows)}\n")
    fits = {row["adapters"]: row["fit"] for row in rows if "adapters" in row}
    if len(fits) == len(ADAPTERS):
        one, several = (fits[count] for count in ADAPTERS)
        ratio = several / one
        print(f"{ADAPTERS[1]} adapters take {ratio:.2f} × the fit of one, {ratio / ADAPTERS[1]:.2f} × for each\n")
    print(
        f"{options.setting}, one model, batches of {options.batch_size}. Seconds on the clock, byline's and the plain "
        f"pass's the median of {options.repeats} in one process, dattri's of one run. byline factorises its kernel in "
        "score, dattri solves in fit: compare the totals too."
    )
    result = {"format": FORMAT, "environment": about, "batch_size": options.batch_size, "repeats": options.repeats}
    save(options.json, {**result, "rows": rows, "failed": failed, "left_out": absent})
    if failed:
        raise SystemExit(f"{len(failed)} of {len(failed) + len(rows)} failed")


def _write(folder: Path, state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")


# The workers: one process each. The model and the data are byline's in all of them.


def work(path: Path) -> None:
    """What runs in a contestant's process: the setting, fit, score, write scores and figures."""
    from safetensors.torch import load_file

    from byline import settings

    job = read_job(path)
    setting = settings.get(job["setting"])
    model = setting.build().eval()
    model.load_state_dict(load_file(Path(job["folder"]) / "model.safetensors"))
    make = {"byline": _byline, "dattri": _dattri, "plain": _plain}[job["worker"]]
    once, about = make(job, setting, model)
    measure(job, once, about, (len(setting.test_set), len(setting.train_set)))


def _loss(model: Any, batch: Any) -> Any:
    """(B,) the mean over a sequence's target tokens of their negative log-likelihood."""
    import torch

    ids, targets = batch
    each = torch.nn.functional.cross_entropy(model(ids).transpose(1, 2), targets, reduction="none")
    # -100 marks what is no target; its loss is 0
    return each.sum(1) / (targets != -100).sum(1)


def _plain(job: dict[str, Any], setting: Any, model: Any) -> tuple[Once, Figures]:
    import numpy as np

    from workers import batches_of

    def once() -> tuple[Callable[[], Any], Callable[[], Any]]:
        def fit() -> None:
            for batch in batches_of(setting.train_set, job["batch_size"]):
                model.zero_grad()
                _loss(model, batch).sum().backward()

        return fit, lambda: np.zeros((len(setting.test_set), len(setting.train_set)), np.float32)

    return once, {}


def _byline(job: dict[str, Any], setting: Any, model: Any) -> tuple[Once, Figures]:
    import byline

    features: Any = byline.Exact()
    if job["dim"] != "all":
        kept = job.get("dtype", "float32")
        features = byline.Factorized(job["dim"], basis=job.get("basis", "random"), dtype=kept)
    if job.get("adam"):
        features = byline.Preconditioned(features)
    common: dict[str, Any] = {"features": features, "batch_size": job["batch_size"], "progress": False}

    ensemble: Any = byline.Independent([model])
    if "adapters" in job:
        options: dict[str, Any] = {"adapters": job["adapters"], "epochs": 1, "batch_size": 8, "progress": False}
        ensemble = byline.train_lora(setting.task(), ensemble, setting.train_set, **options)

    def once() -> tuple[Callable[[], Any], Callable[[], Any]]:
        task = setting.task()
        if job["method"] == "trak":
            made: Any = byline.TRAK(task, ensemble, **common)
        else:
            made = byline.Influence(task, ensemble, solver="explicit", curvature="fisher", **common)
        return lambda: made.fit(setting.train_set), lambda: made.attribute(setting.test_set).values

    return once, {"version": byline.__version__, "columns": job["dim"]}


def _dattri(job: dict[str, Any], setting: Any, model: Any) -> tuple[Once, Figures]:
    """`TRAKAttributor` and `LoGraAttributor` as their documentation has them: `cache`, then `attribute`."""
    import torch
    from dattri.algorithm import TRAKAttributor
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader

    class Named(torch.nn.Module):
        """Takes batches by name and gives their loss, as LoGra expects of a model of sequences."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Any, targets: Any) -> Any:
            return SimpleNamespace(loss=_loss(self.inner, (ids, targets)).sum())

    def named(examples: Any) -> dict[str, Any]:
        return {
            name: torch.stack(part) for name, part in zip(("ids", "targets"), zip(*examples, strict=True), strict=True)
        }

    collate = named if job["method"] == "logra" else None
    loaders = [
        DataLoader(part, batch_size=job["batch_size"], shuffle=False, collate_fn=collate)
        for part in (setting.train_set, setting.test_set)
    ]

    def each(params: Any, example: Any) -> tuple[Any, Any]:
        ids, targets = example
        return torch.func.functional_call(model, params, ids.unsqueeze(0))[0], targets

    def margin_of(params: Any, example: Any) -> Any:
        logits, targets = each(params, example)
        known, own = targets != -100, targets.clamp(min=0)[:, None]
        others = logits.scatter(1, own, -torch.inf).logsumexp(1)
        return ((logits.gather(1, own)[:, 0] - others) * known).sum() / known.sum()

    def probability(params: Any, example: Any) -> Any:
        logits, targets = each(params, example)
        found = torch.nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction="none").neg().exp()
        return (found * (targets != -100)).sum() / (targets != -100).sum()

    def loss_of_batch(model: Any, batch: Any, device: Any) -> Any:
        return model(**batch).loss

    def once() -> tuple[Callable[[], Any], Callable[[], Any]]:
        if job["method"] == "trak":
            task = AttributionTask(loss_func=margin_of, model=model, checkpoints=[model.state_dict()])
            made: Any = TRAKAttributor(
                task=task, correct_probability_func=probability, projector_kwargs={"proj_dim": job["dim"]}, device="cpu"
            )
        else:
            named_model = Named().eval()
            layers = [
                name
                for name, module in named_model.named_modules()
                if isinstance(module, torch.nn.Linear) and not name.endswith("distance")
            ]
            task = AttributionTask(loss_func=loss_of_batch, model=named_model, checkpoints=[named_model.state_dict()])
            made = LoGraAttributor(task=task, layer_names=layers, proj_dim=job["dim"], device="cpu")

        # LoGra is given the training set again
        asked = loaders[1:] if job["method"] == "trak" else loaders

        def guarded(work: Callable[[], Any]) -> Any:
            if job["method"] != "trak":
                return work()
            with torch.no_grad():
                return work()

        return (
            lambda: guarded(lambda: made.cache(loaders[0])),
            lambda: guarded(lambda: made.attribute(*asked).T.detach().numpy()),
        )

    columns = job["dim"] if job["method"] == "trak" else f"{job['dim']} a layer"
    return once, {"version": importlib.metadata.version("dattri"), "columns": columns}


if __name__ == "__main__":
    main()
