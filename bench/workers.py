"""What the comparisons with peers share: the peers' environment, the inputs as files, one process per contestant.

Setup of the peers, once, in an environment that shares this one's torch (`--setup` of either script does just this):

    python -m venv .venv-peers
    python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \\
        > .venv-peers/lib/python3.*/site-packages/shared.pth
    .venv-peers/bin/pip install --no-deps traker==0.3.2 dattri==0.3.0 kronfluence==1.0.1 einconv==0.1.0
    .venv-peers/bin/pip install numpy scipy pyyaml tqdm requests einops opt-einsum

kronfluence declares torchvision and never imports it; its accelerate and safetensors are this environment's. einconv
is installed without dependencies because the torch it asks for is there already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ROOT, clock, median, memory

if TYPE_CHECKING:
    import argparse

    from torch import nn
    from torch.utils.data import TensorDataset

PEERS = {"traker": "0.3.2", "dattri": "0.3.0", "kronfluence": "1.0.1"}
WITHOUT_DEPENDENCIES = {**PEERS, "einconv": "0.1.0"}
SMALL_DEPENDENCIES = ["numpy", "scipy", "pyyaml", "tqdm", "requests", "einops", "opt-einsum"]
VENV = ROOT / ".venv-peers"

Figures = dict[str, Any]
Once = Callable[[], "tuple[Callable[[], Any], Callable[[], Any]]"]
"""Makes the objects anew and returns what fits and what scores, (n_test, n_train)."""


# The parent


def parser_of(doc: str | None, example: str, batch_size: int) -> argparse.ArgumentParser:
    """What every comparison with the peers takes on its command line."""
    import argparse

    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Example:  .venv/bin/python bench/{example}",
    )
    parser.add_argument("--setup", action="store_true", help="make the peers' environment first, or what it lacks")
    parser.add_argument("--venv", type=Path, default=VENV, help="the peers' environment (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="examples per batch, for all (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads in every process (torch's own choice)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser


def setup(venv: Path) -> None:
    """The documented setup of the peers' environment; what is there already stays."""
    if not (venv / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    packages = next(venv.glob("lib/python3.*/site-packages"))
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({_site_packages()!r})\n")
    pip = [str(venv / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    pinned = [f"{name}=={version}" for name, version in WITHOUT_DEPENDENCIES.items()]
    subprocess.run([*pip, "--no-deps", *pinned], check=True)
    subprocess.run([*pip, *SMALL_DEPENDENCIES], check=True)


def _site_packages() -> str:
    import torch

    return str(Path(torch.__file__).resolve().parent.parent)


def missing(python: Path, name: str) -> str | None:
    """Why a peer cannot run, or None."""
    if not python.exists():
        return f"no environment at {python.parent.parent}"
    probe = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([str(python), "-c", probe], capture_output=True, text=True)
    return None if done.returncode == 0 else f"not installed in {python.parent.parent}"


def left_out(python: Path, names: Iterable[str]) -> dict[str, str]:
    """Why which peers cannot run, said aloud."""
    absent = {name: why for name in names if (why := missing(python, name))}
    for name, why in absent.items():
        print(f"{name} is left out: {why}; --setup installs it")
    return absent


def write_inputs(folder: Path, setting: Any, states: list[dict[str, Any]]) -> None:
    """Data, checkpoints and the model's layers, as files that need no byline to be read."""
    from safetensors.torch import save_file

    (train_x, train_y), (test_x, test_y) = setting.train_set.tensors, setting.test_set.tensors
    tensors = {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "data.safetensors")
    for i, state in enumerate(states):
        save_file({name: value.contiguous() for name, value in state.items()}, folder / f"model-{i}.safetensors")
    (folder / "layers.json").write_text(json.dumps(_described(setting.build())))


# what a layer is made with again; the names of constructor arguments that are attributes of the same name
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features"),
    "Dropout": ("p",),
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding"),
    "BatchNorm2d": ("num_features",),
    "MaxPool2d": ("kernel_size",),
    "AdaptiveMaxPool2d": ("output_size",),
    "ReLU": (),
    "Flatten": (),
    "Sequential": (),
    "Residual": (),
}


def _described(module: nn.Module) -> dict[str, Any]:
    kind = type(module).__name__
    found: dict[str, Any] = {name: getattr(module, name) for name in _ARGUMENTS[kind]}
    if kind in ("Linear", "Conv2d"):
        found["bias"] = module.bias is not None
    return {"kind": kind, "arguments": found, "inside": [_described(child) for child in module.children()]}


def run_one(
    script: str, folder: Path, contestant: dict[str, Any], python: Path, options: argparse.Namespace, repeats: int
) -> Figures:
    """One contestant in a process of its own; its figures, or what went wrong under "error"."""
    import numpy as np

    job, out, scores = folder / "job.json", folder / "figures.json", folder / "scores.npy"
    common = {"folder": str(folder), "batch_size": options.batch_size, "threads": options.threads}
    job.write_text(json.dumps({**common, **contestant, "repeats": repeats}))
    for old in (out, scores):  # so that nobody is judged by what another left behind
        old.unlink(missing_ok=True)
    interpreter = sys.executable if contestant["worker"] == "byline" else str(python.absolute())
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(options.threads)} if options.threads else None
    # a peer leaves files where it runs
    done = subprocess.run(
        [interpreter, str(Path(script).resolve()), "--worker", str(Path(job).resolve())],
        capture_output=True, text=True, env=surroundings, cwd=Path(job).parent,
    )  # fmt: skip
    if done.returncode or not out.exists():
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {done.returncode}", "stderr": lines[-20:]}
    figures = json.loads(out.read_text())
    figures["scores"] = np.load(scores)
    return figures


def run_all(
    script: str,
    folder: Path,
    jobs: Iterable[dict[str, Any]],
    python: Path,
    options: argparse.Namespace,
    judged: Callable[[dict[str, Any], Any], Figures],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One contestant after the other: (rows, what failed); a peer that is not byline's own runs once.

    Args:
        script: that runs each with ``--worker``.
        folder: of the inputs.
        jobs: what is run, with "name" and "worker".
        python: of the peers.
        options: of the command line.
        judged: from a job and its scores, what its row says of them.
    """
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for job in jobs:
        label = job["name"] + (f", {n} model{'s' if n > 1 else ''}" if (n := job.get("models")) else "")
        print(f"  {label} …", flush=True)
        figures = run_one(script, folder, job, python, options, 1 if job["worker"] in PEERS else options.repeats)
        if "error" in figures:
            print(f"  {label} failed: {figures['error']}")
            failed.append({**job, **figures})
            continue
        scores = figures.pop("scores")
        rows.append({**job, **figures, **judged(job, scores)})
        said = f", LDS {rows[-1]['lds']:.3f}" if "lds" in rows[-1] else ""
        print(f"    fit {figures['fit']:.2f} s, score {figures['score']:.2f} s{said}", flush=True)
    return rows, failed


def lds_of(scores: Any, bank: Any) -> Figures:
    """What a row says of scores."""
    import byline

    found = byline.lds(scores, bank)
    return {"lds": found.mean, "interval": list(found.interval)}


# The worker


def read_job(path: Path) -> dict[str, Any]:
    """What this process is to do; sets torch's threads and seed."""
    import torch

    job = json.loads(path.read_text())
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    return job


def read_inputs(
    job: dict[str, Any],
) -> tuple[nn.Module, list[dict[str, Any]], TensorDataset, TensorDataset]:
    """The model in eval mode, its checkpoints, the training and the test set."""
    from safetensors.torch import load_file
    from torch.utils.data import TensorDataset

    folder = Path(job["folder"])
    data = load_file(folder / "data.safetensors")
    n_train, n_test = job.get("n_train"), job.get("n_test")
    train = TensorDataset(data["train_x"][:n_train], data["train_y"][:n_train])
    test = TensorDataset(data["test_x"][:n_test], data["test_y"][:n_test])
    states = [load_file(folder / f"model-{i}.safetensors") for i in range(job["models"])]
    return _built(json.loads((folder / "layers.json").read_text())).eval(), states, train, test


def _built(described: dict[str, Any]) -> nn.Module:
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return x + self.inner(x)

    inside = [_built(child) for child in described["inside"]]
    kind = Residual if described["kind"] == "Residual" else getattr(nn, described["kind"])
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in described["arguments"].items()}
    return kind(*inside, **arguments)


def measure(job: dict[str, Any], once: Once, about: Figures, shape: Sequence[int]) -> None:
    """Time fits and scores; write scores and figures to the job's folder."""
    import numpy as np

    folder = Path(job["folder"])
    start = memory("VmRSS")
    spent: list[dict[str, float]] = []
    scores = np.empty(0)
    for _ in range(job["repeats"]):
        fit, score = once()
        with clock() as fitting:
            fit()
        with clock() as scoring:
            scores = score()
        spent.append({"fit": fitting.wall, "score": scoring.wall, "fit_cpu": fitting.cpu, "score_cpu": scoring.cpu})
    peak = memory("VmHWM")
    assert scores.shape == tuple(shape), scores.shape
    np.save(folder / "scores.npy", np.asarray(scores, dtype=np.float32))
    figures = {name: median([one[name] for one in spent]) for name in spent[0]}
    figures = {**figures, "first": spent[0], "peak": peak, "start": start, **about}
    figures["load"] = round(os.getloadavg()[0], 2)
    (folder / "figures.json").write_text(json.dumps(figures))


def batches_of(data: Any, size: int) -> Iterable[tuple[Any, Any]]:
    """The batches of a `TensorDataset` of two tensors."""
    x, y = data.tensors
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(data), size)]


def margin(logits: Any, labels: Any) -> Any:
    """(B,) log p/(1-p) of the labels, without ever forming 1-p, which rounds to 0 for a sure model."""
    import torch

    own, others = logits.gather(1, labels[:, None]), logits.scatter(1, labels[:, None], -torch.inf)
    return own.squeeze(1) - others.logsumexp(1)
