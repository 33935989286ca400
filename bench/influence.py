"""byline's influence functions beside kronfluence's and dattri's: the same checkpoints, solver, curvature and λ.

Every contestant runs in a process of its own, one after the other: seconds to fit (curvature, and byline's training
gradients), seconds to score, peak memory, and how its scores correlate with byline's. λ is absolute in every peer: it
is the one byline took, so that (H + λI)⁻¹ is the same matrix wherever H is. Signs are brought together on the peers'
side: they get the negative margin at the test examples, and what they return grows with the test output, as ours does.

Where the definitions are one, the correlation says so. Where they are not, one sentence says why, and a second table
tests it: with the peer's definition put into byline, or with the same library under another seed.

`--setup` makes the peers' environment as `workers.py` describes it; a peer that is not there is left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import BATCH, ROOT, SETTING, clock, environment, median, save, seconds, table, trained
from workers import (
    Figures,
    Once,
    left_out,
    margin,
    measure,
    parser_of,
    read_inputs,
    read_job,
    run_one,
    setup,
    write_inputs,
)

PEERS = ("kronfluence", "dattri")
FORMAT = 1
SAME = 0.99
LIMIT = {"kronfluence": 1.0, "dattri": 0.5}
"""What byline's CPU seconds may be of the peer's: kronfluence's to fit the curvature, dattri's in all."""


@dataclass
class Case:
    """One comparison.

    Attributes:
        name: In the table.
        ours: What byline runs.
        theirs: What the peers run.
        why: Why scores differ, where they do.
        checks: What else is run to test that reason, by name; byline's or a peer's.
        shared: Settings of all: n_test, n_train, params, bias.
    """

    name: str
    ours: dict[str, Any]
    theirs: list[dict[str, Any]]
    why: str = ""
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


def ours(solver: str, curvature: str, damping: float = 0.1, **options: Any) -> dict[str, Any]:
    """byline's side; ``solver_options`` make an instance, others go to the worker."""
    return {
        "worker": "byline",
        "method": "Influence",
        "solver": solver,
        "options": {"curvature": curvature, "damping": damping},
        **options,
    }


def kronfluence(strategy: str, empirical: bool, **options: Any) -> dict[str, Any]:
    return {"worker": "kronfluence", "strategy": strategy, "empirical": empirical, **options}


def dattri(attributor: str, **options: Any) -> dict[str, Any]:
    return {"worker": "dattri", "attributor": attributor, **options}


LABELS = "each draws one label per example: byline with chance ∝ p‖e-p‖ and a weight, kronfluence from p itself"
STARTS = "40 steps do not settle on a Hessian with eigenvalues of both signs: another start gives other scores"
TRANSPOSED = "dattri turns gradients by the matrix of eigenvectors where its transpose leads into the eigenbasis"
ROUNDED = "in float32 softmax less one-hot is rounding for well-learnt examples; byline normalises ∇f instead"
POSITIONS = "kronfluence divides both factors by the positions: its product lacks the positions per example of a layer"
BIAS = "dattri appends the bias's gradient to the flattened weight's and reshapes: columns and bias are shuffled"
PROJECTED = "dattri always projects on 512 random directions (projector_kwargs=None keeps its default)"
REPRESENTER = (
    "dattri fits the last layer to the model's own predictions, without bias, and takes the logit of the label"
)


def kronecker_cases(convolutions: bool) -> list[Case]:
    """EK-FAC and K-FAC, with the labels as they are and with drawn ones."""
    found = []
    for solver, title in (("ekfac", "EK-FAC"), ("kfac", "K-FAC")):
        apart = POSITIONS if convolutions and solver == "kfac" else ""
        checks: dict[str, dict[str, Any]] = {}
        if apart:
            checks["byline, product without the positions"] = ours(solver, "fisher", per_position=True)
        found.append(
            Case(f"{title}, empirical Fisher", ours(solver, "fisher"), [kronfluence(solver, True)], apart, checks)
        )
        drawn = {
            "byline, every label": ours(solver, "ggn", solver_options={"samples": None}),
            "byline, another seed": ours(solver, "ggn", seed=1),
            "kronfluence, another seed": kronfluence(solver, False, seed=1),
        }
        if apart:
            every = {"solver_options": {"samples": None}, "per_position": True}
            drawn["byline, every label, without the positions"] = ours(solver, "ggn", **every)
        why = f"{LABELS}; {apart}" if apart else LABELS
        found.append(Case(f"{title}, drawn labels", ours(solver, "ggn"), [kronfluence(solver, False)], why, drawn))
    return found


def dattri_cases(last: list[str], few: int, some: int) -> list[Case]:
    """dattri's solvers; those that need a convex loss on the last layer alone, where the Hessian is the GGN."""
    layer = {"params": last, "n_test": some}
    # dattri's CG and LiSSA keep what each of their steps needs: of 5000 training examples and 200 steps beyond 20 GB
    one_by_one = {"params": last, "n_test": few, "n_train": 500}
    ekfac = {"output": "loss"}
    cg, lissa, arnoldi = 200, 300, 100
    return [
        Case("explicit, last layer", ours("explicit", "hessian"), [dattri("Explicit")], shared=layer),
        Case(
            f"CG, {cg} steps, last layer",
            ours("cg", "hessian", solver_options={"iterations": cg, "tolerance": 1e-30}),
            [dattri("CG", options={"max_iter": cg})],
            shared=one_by_one,
        ),
        Case(
            f"LiSSA, {lissa} steps, last layer",
            ours("lissa", "hessian", 10.0, solver_options={"iterations": lissa, "tolerance": 0.0}),
            [dattri("LiSSA", options={"recursion_depth": lissa})],
            shared=one_by_one,
        ),
        Case(
            f"Arnoldi, top 50 of {arnoldi}, last layer",
            ours("arnoldi", "hessian", solver_options={"top": 50, "iterations": arnoldi - 1}),
            [dattri("Arnoldi", options={"proj_dim": 50, "max_iter": arnoldi})],
            shared=layer,
        ),
        Case(
            "CG, 10 steps, all layers",
            ours("cg", "hessian", 3000.0, solver_options={"iterations": 10, "tolerance": 1e-30}),
            [dattri("CG", options={"max_iter": 10})],
            shared={"n_test": few},
        ),
        Case(
            "Arnoldi, top 20 of 40, all layers",
            ours("arnoldi", "hessian", solver_options={"top": 20, "iterations": 39}),
            [dattri("Arnoldi", options={"proj_dim": 20, "max_iter": 40})],
            STARTS,
            {"byline, another start": ours("arnoldi", "hessian", seed=1, solver_options={"top": 20, "iterations": 39})},
            {"n_test": few},
        ),
        # dattri holds a gradient per training example, several times
        Case("DataInf", ours("datainf", "fisher"), [dattri("DataInf")], shared={"n_test": few, "n_train": 500}),
        Case(
            "EK-FAC of the loss",
            ours("ekfac", "fisher", **ekfac),
            [dattri("EKFAC", **ekfac)],
            f"{TRANSPOSED}; {BIAS}",
            {"byline, both as in dattri": ours("ekfac", "fisher", transposed=True, shuffled=True, **ekfac)},
            {"n_test": some},
        ),
        Case(
            "EK-FAC of the loss, biases removed",
            ours("ekfac", "fisher", **ekfac),
            [dattri("EKFAC", **ekfac)],
            TRANSPOSED,
            {"byline, turned as in dattri": ours("ekfac", "fisher", transposed=True, **ekfac)},
            {"n_test": some, "bias": False},
        ),
    ]


def gradient_cases() -> list[Case]:
    """Methods without curvature."""
    plain = {"worker": "byline", "options": {}}
    bare = {"unprojected": True}
    return [
        Case("Grad-Dot", {**plain, "method": "GradDot"}, [dattri("TracIn", **bare)]),
        Case(
            "Grad-Cos",
            {**plain, "method": "GradCos"},
            [dattri("TracIn", normalized=True, **bare)],
            ROUNDED,
            {"dattri in float64": dattri("TracIn", normalized=True, double=True, **bare)},
        ),
        Case(
            "Grad-Dot, dattri's default",
            {**plain, "method": "GradDot"},
            [dattri("TracIn")],
            PROJECTED,
            {"dattri, another projection": dattri("TracIn", seed=1)},
        ),
        Case("TracIn, 3 checkpoints", {**plain, "method": "TracIn"}, [dattri("TracIn", **bare)], shared={"models": 3}),
        Case("KNN-Shapley, 5 neighbours", {**plain, "method": "KNNShapley"}, [dattri("KNNShapley")]),
        Case(
            "representer points",
            {**plain, "method": "RepresenterPoints", "options": {"l2": 0.003}},
            [dattri("RPS")],
            REPRESENTER,
        ),
    ]


def cases_of(setting: Any, options: argparse.Namespace) -> list[Case]:
    """What is run on a setting."""
    from torch import nn

    modules = [(name, m) for name, m in setting.build().named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    tracked = [f"{name}.{own}" for name, module in modules for own, _ in module.named_parameters()]
    convolutions = any(isinstance(module, nn.Conv2d) for _, module in modules)
    found = kronecker_cases(convolutions)
    for case in found:
        case.shared["params"] = tracked
    if not convolutions:  # what dattri's forms of the others take hours for on a convolution, or have no rule for
        last = [f"{modules[-1][0]}.{own}" for own, _ in modules[-1][1].named_parameters()]
        few, some = (5, 20) if options.quick else (options.few, options.some)
        found += dattri_cases(last, few, some) + gradient_cases()
    for case in found:
        if options.quick:
            case.shared = {**case.shared, "n_train": 500, "n_test": min(20, case.shared.get("n_test", 20))}
    chosen = options.cases
    return [c for c in found if not chosen or any(word.lower() in c.name.lower() for word in chosen)]


# The parent


def correlations(a: Any, b: Any) -> Figures:
    """Of each test example's scores, averaged over test examples; and the least."""
    import numpy as np
    from scipy import stats

    def each(x: Any, y: Any) -> Any:
        x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
        below = np.sqrt((x**2).sum(1) * (y**2).sum(1))
        return (x * y).sum(1) / np.where(below > 0, below, np.inf)

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not np.isfinite(b).all():
        return {"pearson": float("nan"), "spearman": float("nan"), "least": float("nan")}
    pearson = each(a, b)
    spearman = each(stats.rankdata(a, axis=1), stats.rankdata(b, axis=1))
    return {"pearson": float(pearson.mean()), "spearman": float(spearman.mean()), "least": float(pearson.min())}


class Run:
    """Runs cases and keeps what they gave."""

    def __init__(self, folder: Path, python: Path, options: argparse.Namespace, about: Figures):
        self.folder, self.python, self.options, self.about = folder, python, options, about
        self.absent: dict[str, str] = about["left_out"]
        self.rows: list[Figures] = []
        self.checks: list[Figures] = []
        self.failed: list[Figures] = []
        if options.json and options.json.exists():
            found = json.loads(options.json.read_text(encoding="utf-8"))
            if all(found.get(key) == self.about[key] for key in ("format", "asked", "left_out")):
                self.rows, self.checks = found["rows"], found["checks"]

    def known(self, case: Case) -> bool:
        """Whether a run before this one has done all of it; what it did of it is forgotten otherwise."""
        names = {row["name"] for row in self.rows if row["case"] == case.name}
        wanted = {"byline", *(c["worker"] for c in case.theirs if c["worker"] not in self.absent)}
        if wanted <= names:
            return True
        self.rows = [row for row in self.rows if row["case"] != case.name]
        self.checks = [row for row in self.checks if row["case"] != case.name]
        return False

    def result(self) -> Figures:
        return {**self.about, "rows": self.rows, "checks": self.checks, "failed": self.failed}

    def one(self, case: Case, contestant: dict[str, Any], name: str, repeats: int) -> Figures | None:
        print(f"  {case.name}: {name} …", flush=True)
        job = {"models": 1, **case.shared, **contestant}
        figures = run_one(__file__, self.folder, job, self.python, self.options, repeats)
        if "error" in figures:
            print(f"    failed: {figures['error']}")
            self.failed.append({"case": case.name, "name": name, **figures})
            return None
        print(f"    fit {seconds(figures['fit_cpu'])}, score {seconds(figures['score_cpu'])} of the CPU", flush=True)
        return {"case": case.name, "library": contestant["worker"], "job": job, **figures}

    def case(self, case: Case) -> None:
        repeats = self.options.repeats
        mine = self.one(case, case.ours, "byline", repeats)
        if mine is None:
            return
        scores = mine.pop("scores")
        self.rows.append({**mine, "why": "", "name": "byline"})
        known = {"byline": scores}
        given = {name: mine.get(name) for name in ("ridge", "scale")}
        for contestant in case.theirs:
            library = contestant["worker"]
            if library in self.absent:
                continue
            again = repeats if library == "kronfluence" else 1
            row = self.one(case, {**contestant, **given}, library, again)
            if row is None:
                continue
            known[library] = row.pop("scores")
            row |= correlations(scores, known[library])
            row["fit_ratio"] = mine["fit_cpu"] / row["fit_cpu"] if row["fit_cpu"] > 0.01 else float("nan")
            if library == "kronfluence":
                # its fit is the curvature alone: it takes the training gradients when it scores
                row["curvature_ratio"] = mine["curvature_cpu"] / row["fit_cpu"]
            total = (mine["fit_cpu"] + mine["score_cpu"]) / (row["fit_cpu"] + row["score_cpu"])
            row["total_ratio"] = total
            judged = row["curvature_ratio"] if library == "kronfluence" else total
            row["met"] = judged <= LIMIT[library]
            row["why"] = "" if min(row["pearson"], row["spearman"]) > SAME else case.why or "not known"
            row["name"] = library
            self.rows.append(row)
        if len(known) > 1:
            self.check(case, known, given)

    def check(self, case: Case, known: dict[str, Any], given: Figures) -> None:
        """What tests the reason of a difference."""
        for name, contestant in case.checks.items():
            if contestant["worker"] in self.absent:
                continue
            row = self.one(case, {**contestant, **given}, name, 1)
            if row is None:
                continue
            found = row.pop("scores")
            for other, scores in known.items():
                self.checks.append({"case": case.name, "of": name, "with": other, **correlations(found, scores)})


def show(rows: list[Figures], checks: list[Figures]) -> str:
    def bare(value: float, digits: int = 3) -> str:
        return f"{value:.{digits}f}"

    def ratio(value: float) -> str:
        return "-" if value != value else f"{value:.2f}"

    shown = []
    for row in rows:
        peer = row["library"] != "byline"
        test, train = row["shape"]
        shown.append(
            [
                row["case"] if not peer else "",
                row["name"],
                f"{test} × {train}",
                seconds(row["fit_cpu"]),
                seconds(row["curvature_cpu"]) if row.get("curvature_cpu") else "",
                seconds(row["score_cpu"]),
                f"{row['fit']:.2f} + {row['score']:.2f} s",
                ratio(row["curvature_ratio"]) if "curvature_ratio" in row else "",
                *([ratio(row["fit_ratio"]), ratio(row["total_ratio"])] if peer else ["", ""]),
                f"{row['peak'] / 1e6:.0f} MB",
                f"{(row['peak'] - row['start']) / 1e6:.0f} MB",
                *([bare(row["pearson"], 4), bare(row["spearman"], 4)] if peer else ["", ""]),
                ("" if row["met"] is None else "yes" if row["met"] else "NO") if peer else "",
            ]
        )
    header = ["method", "library", "test × train", "cpu fit", "curvature", "cpu score", "clock"]
    header += ["byline ÷ it, curvature", "fit", "in all"]
    header += ["peak memory", "above start", "Pearson", "Spearman", "target met"]
    parts = [table(header, shown)]
    reasons = [f"  {row['case']}: {row['why']}." for row in rows if row["why"]]
    if reasons:
        parts.append("Why scores differ:\n" + "\n".join(reasons))
    if checks:
        lines = [[c["case"], c["of"], c["with"], bare(c["pearson"], 4), bare(c["spearman"], 4)] for c in checks]
        parts.append(table(["what tests the reason", "scores of", "with those of", "Pearson", "Spearman"], lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = parser_of(__doc__, "influence.py --setup --threads 1 --json runs/influence.json", BATCH)
    parser.add_argument("--setting", default=SETTING, help="a setting with pictures and labels (%(default)s)")
    parser.add_argument("--cases", nargs="+", help="run those alone whose name has one of these words")
    parser.add_argument("--quick", action="store_true", help="500 training and 20 test examples, one run of each")
    parser.add_argument("--few", type=int, default=20, help="test examples where a peer is slow (%(default)s)")
    parser.add_argument("--some", type=int, default=100, help="test examples where it is less slow (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of byline and kronfluence (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PEERS, help="these peers alone")
    parser.add_argument("--out", type=Path, help="where models are kept (runs/SETTING)")
    parser.add_argument("--models", type=Path, help="a folder of checkpoints (.safetensors) to take instead")
    options = parser.parse_args()
    if options.worker:
        return work(options.worker)
    if options.setup:
        setup(options.venv)
    if options.quick:
        options.repeats = 1
    python = options.venv / "bin" / "python"
    about = {**environment(), "threads_asked": options.threads, "setting": options.setting}
    absent = left_out(python, options.only or PEERS)
    absent |= {name: "not asked for" for name in PEERS if options.only and name not in options.only}
    print("checkpoints")
    out = options.out or ROOT / "runs" / options.setting
    setting, states, _ = trained(out, 3, options.models, None, need_bank=False, name=options.setting)
    with tempfile.TemporaryDirectory(prefix="byline-influence-") as name:
        write_inputs(Path(name), setting, states)
        asked = {key: getattr(options, key) for key in ("setting", "quick", "few", "some", "batch_size", "threads")}
        kept = {"format": FORMAT, "asked": {**asked, "repeats": options.repeats}, "left_out": absent}
        run = Run(Path(name), python, options, {**kept, "environment": about})
        for case in cases_of(setting, options):
            if not run.known(case) and any(contestant["worker"] not in absent for contestant in case.theirs):
                run.case(case)
                save(options.json, run.result(), quiet=True)
    print(f"\n{show(run.rows, run.checks)}\n")
    print(
        f"{options.setting}, batches of {options.batch_size}. Seconds of the CPU (of all threads), byline's and "
        f"kronfluence's the median of {options.repeats} in one process, dattri's of one run. byline takes the training "
        "gradients in fit and keeps them; the peers take them in score. Targets, by CPU seconds: byline's curvature at "
        "most kronfluence's fit, which is the same work, byline's total at most half of dattri's. Correlations are of "
        "each test example's scores with byline's, averaged over test examples."
    )
    save(options.json, run.result())
    if run.failed:
        raise SystemExit(f"{len(run.failed)} of {len(run.failed) + len(run.rows)} failed")


# The workers: one process each. byline is imported in its own alone.


def work(path: Path) -> None:
    """What runs in a contestant's process."""
    job = read_job(path)
    model, states, train, test = read_inputs(job)
    if not job.get("bias", True):
        model, states = _without_biases(model, states)
    make = {"byline": _byline, "kronfluence": _kronfluence, "dattri": _dattri}[job["worker"]]
    once, about = make(job, model, states, train, test)
    about["shape"] = len(test), len(train)
    measure(job, once, about, about["shape"])


def _without_biases(model: Any, states: list[Any]) -> tuple[Any, list[Any]]:
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias = None
    return model, [{k: v for k, v in state.items() if not k.endswith("bias")} for state in states]


def _byline(job: dict[str, Any], model: Any, states: list[Any], train: Any, test: Any) -> tuple[Once, Figures]:
    import torch

    import byline
    from byline.methods import curvature
    from byline.methods.curvature.base import Problem

    warnings.filterwarnings("ignore", message=".*stopped after.*")
    about: Figures = {"version": byline.__version__, "ridge": None}
    curvatures: list[float] = []
    ridge = Problem.ridge

    def noted(self: Any, trace: float, damping: float) -> float:
        """What λ is, for the peers; or the λ of the case, where this run is a check of it."""
        about["ridge"] = job["ridge"] if job.get("ridge") is not None else ridge(self, trace, damping)
        return about["ridge"]

    Problem.ridge = noted  # type: ignore[method-assign]
    summed = curvature.LiSSA._sum

    def scaled(self: Any, problem: Any, vectors: Any, ridge: float, scale: float) -> Any:
        about["scale"] = scale
        return summed(self, problem, vectors, ridge, scale)

    curvature.LiSSA._sum = scaled  # type: ignore[method-assign]

    def loss(model: Any, batch: Any) -> Any:
        return -torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    output = loss if job.get("output") == "loss" else "classification"
    arguments = {**job["options"], "params": job.get("params"), "batch_size": job["batch_size"], "progress": False}
    if "seed" in job:
        arguments["seed"] = job["seed"]

    def once() -> tuple[Any, Any]:
        if "solver" in job:
            kind = curvature.SOLVERS[job["solver"]]
            if job.get("per_position"):
                kind = _per_position(kind)
            if job.get("transposed"):
                kind = _transposed(kind)
            if job.get("shuffled"):
                kind = _shuffled(kind)
            arguments["solver"] = kind(**job.get("solver_options", {}))
        ensemble = byline.Trajectory([states]) if len(states) > 1 else byline.Independent(states)
        attributor = getattr(byline, job["method"])(byline.Task(model, output=output), ensemble, **arguments)
        # between the training gradients and the end of fit
        prepare = attributor._prepare

        def timed() -> None:
            with clock() as spent:
                prepare()
            curvatures.append(spent.cpu)
            about["curvature_cpu"] = median(curvatures)

        attributor._prepare = timed
        return lambda: attributor.fit(train), lambda: attributor.attribute(test).values

    return once, about


def _per_position(kind: Any) -> Any:
    """K-FAC as kronfluence has it: both factors divided by the positions, their product not multiplied by them."""

    class PerPosition(kind):
        def fit(self, problem: Any) -> Any:
            state = super().fit(problem)
            for part in problem.layout.parts:
                block = next(problem.gradients())[0][part.name]
                state[f"{part.name}/values"] /= block.left.shape[2]
            return state

    return PerPosition


def _transposed(kind: Any) -> Any:
    """EK-FAC in the basis of the rows of the eigenvectors' matrices instead of their columns."""
    from byline.methods.curvature import KFAC

    class Turned(KFAC):
        def fit(self, problem: Any) -> Any:
            state = super().fit(problem)
            sides = [name for name in state if name.endswith(("/left", "/right"))]
            return {**state, **{name: state[name].mT.contiguous() for name in sides}}

    # the corrected eigenvalues are taken after, in the basis that is there
    return type("Transposed", (kind, Turned), {"name": kind.name})


def _shuffled(kind: Any) -> Any:
    """EK-FAC with gradients (o, i) and their bias (o) laid out one after the other and read as (o, i + 1)."""
    import torch

    class Shuffled(kind):
        def inverse(self, problem: Any, state: Any, damping: float) -> Any:
            inner = super().inverse(problem, state, damping)
            order = []
            for part in problem.layout.parts:
                place = torch.arange(part.start, part.stop).view(*part.shape[1:])
                order.append(torch.cat([place[:, :-1].flatten(), place[:, -1]]))
            there = torch.cat(order)
            back = there.argsort()
            return lambda vectors: inner(vectors[:, there])[:, back]

    return Shuffled


def _kronfluence(job: dict[str, Any], model: Any, states: list[Any], train: Any, test: Any) -> tuple[Once, Figures]:
    """`Analyzer` as its documentation has it: fit all factors, then compute pairwise scores."""
    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.nn.functional import cross_entropy

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            x, y = batch
            logits = model(x)
            if sample:
                y = torch.multinomial(logits.detach().softmax(1), 1).flatten()
            return cross_entropy(logits, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return -margin(model(batch[0]), batch[1]).sum()

    model.load_state_dict(states[0])

    def once() -> tuple[Any, Any]:
        torch.manual_seed(job.get("seed", 0))
        place = tempfile.TemporaryDirectory(dir=job["folder"])
        task = Classification()
        analyzer = Analyzer(
            "bench",
            model=prepare_model(copy.deepcopy(model), task),
            task=task,
            cpu=True,
            disable_tqdm=True,
            output_dir=place.name,
        )

        def fit() -> None:
            analyzer.fit_all_factors(
                factors_name="factors",
                dataset=train,
                per_device_batch_size=job["batch_size"],
                factor_args=FactorArguments(strategy=job["strategy"], use_empirical_fisher=job["empirical"]),
            )

        def score() -> Any:
            analyzer.compute_pairwise_scores(
                scores_name="scores",
                factors_name="factors",
                query_dataset=test,
                train_dataset=train,
                per_device_query_batch_size=job["batch_size"],
                per_device_train_batch_size=job["batch_size"],
                score_args=ScoreArguments(damping_factor=job["ridge"]),
            )
            found = analyzer.load_pairwise_scores("scores")["all_modules"].numpy().copy()
            place.cleanup()
            return found

        return fit, score

    return once, {"version": importlib.metadata.version("kronfluence")}


def _dattri(job: dict[str, Any], model: Any, states: list[Any], train: Any, test: Any) -> tuple[Once, Figures]:
    """dattri's attributors as its documentation has them: `cache` the training set, `attribute`.

    Solvers with a Hessian take the training set as one batch: of several they would add the inverses.
    """
    import torch
    from dattri import algorithm
    from dattri.algorithm.data_shapley import KNNShapleyAttributor
    from dattri.algorithm.rps import RPSAttributor
    from dattri.task import AttributionTask
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader

    if job.get("double"):
        model = model.double()
        states = [{k: v.double() for k, v in state.items()} for state in states]
        train, test = (type(data)(data.tensors[0].double(), data.tensors[1]) for data in (train, test))
    kind, size = job["attributor"], tuple(train.tensors[0].shape[1:])
    chosen = {"layer_name": job["params"]} if job.get("params") else {}
    ridge, options = job["ridge"], job.get("options", {})

    def logits_of(params: Any, data: Any) -> tuple[Any, Any]:
        x, y = data
        return torch.func.functional_call(model, params, x.reshape(-1, *size)), y.reshape(-1).long()

    def loss(params: Any, data: Any) -> Any:
        return cross_entropy(*logits_of(params, data))

    def target(params: Any, data: Any) -> Any:
        return -margin(*logits_of(params, data)).mean()

    def made() -> Any:
        if kind == "KNNShapley":
            embed = model[:-1]
            model.load_state_dict(states[0])
            return KNNShapleyAttributor(5, distance_func=lambda a, b: torch.cdist(embed(a[0]), embed(b[0])))
        if kind == "RPS":
            task = AttributionTask(loss_func=cross_entropy, model=model, checkpoints=states)
            return RPSAttributor(task=task, final_linear_layer_name=list(model._modules)[-1], l2_strength=0.003)
        own = None if job.get("output") == "loss" else target
        task = AttributionTask(loss_func=loss, model=model, checkpoints=states, target_func=own)
        if kind == "TracIn":
            found = algorithm.tracin.TracInAttributor(
                task=task,
                weight_list=torch.ones(len(states)),
                normalized_grad=job.get("normalized", False),
                projector_kwargs={"proj_seed": job.get("seed", 0)},
            )
            if job.get("unprojected"):
                found.projector_kwargs = None
            return found
        at = algorithm.influence_function
        if kind == "EKFAC":
            return at.IFAttributorEKFAC(task=task, damping=ridge)
        if kind == "LiSSA":
            # x ← v + (1 - damping) x - H x / scaling: λ = damping · scaling
            own = {"batch_size": len(train), "scaling": job["scale"], "damping": ridge / job["scale"]}
            return at.IFAttributorLiSSA(task=task, **own, **options, **chosen)
        return getattr(at, f"IFAttributor{kind}")(task=task, regularization=ridge, **options, **chosen)

    def once() -> tuple[Any, Any]:
        attributor = made()
        one = kind in ("TracIn", "EKFAC")
        loader = DataLoader(train, batch_size=job["batch_size"] if one else len(train), shuffle=False)
        # the transformation of a test batch is computed anew for each training batch
        whole = DataLoader(train, batch_size=len(train), shuffle=False)
        tests = DataLoader(test, batch_size=job["batch_size"], shuffle=False)

        def fit() -> None:
            if kind not in ("TracIn", "KNNShapley"):
                attributor.cache(loader)

        def score() -> Any:
            found = attributor.attribute(loader if kind == "TracIn" else whole, tests)
            return (found if kind == "KNNShapley" else found.T).detach().numpy()

        return fit, score

    return once, {"version": importlib.metadata.version("dattri")}


if __name__ == "__main__":
    main()
