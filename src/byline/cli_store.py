"""``byline store``: what is in a store, whether it is whole, and what one will take."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from byline.features import Features

store_app = typer.Typer(
    help="Stores: what is in them, whether they are whole, what one will take.", no_args_is_help=True
)

Place = Annotated[str, typer.Argument(help="A folder, or a URL that fsspec knows.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else, to stdout.")]
TaskAt = Annotated[
    str | None, typer.Option("--task", help="module:object of a byline.Task, or of a function that makes one.")
]
TrainAt = Annotated[
    str | None, typer.Option("--train", help="module:object of the training set, or of a function that makes it.")
]


@store_app.command(epilog="Example:  byline store info runs/first")
def info(place: Place, as_json: AsJson = False) -> None:
    """Say what a store holds: members, chunks, bytes, and who is writing."""
    from byline.store import info as look

    with _one_sentence():
        found = look(place)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    _say(f"{found['store']}: format {found['format']}, written by byline {found['byline']}, {_size(found['bytes'])}")
    for member in found["members"]:
        done, count = member["chunks"]
        state = "complete" if member["complete"] else f"{done} of {count} chunks"
        _say(f"  {member['member']} ({member['of']}, {member['dtype']}): {state}, {_size(member['bytes'])}")
    if found["writer"]:
        _say(f"  being written by process {found['writer']['pid']} on {found['writer']['host']}")


@store_app.command(epilog="Example:  byline store verify runs/first --json")
def verify(place: Place, as_json: AsJson = False) -> None:
    """Read every chunk and hold it against its checksum; exits with 1 when something is damaged or missing."""
    from byline.store import verify as check

    with _one_sentence():
        report = check(place)
    _tell(report, as_json)
    if not report.whole:
        raise typer.Exit(1)


@store_app.command(epilog="Example:  byline store repair runs/first --task mine:task --train mine:train_set")
def repair(
    place: Place,
    task: TaskAt = None,
    train: TrainAt = None,
    ensemble: Annotated[
        str | None, typer.Option(help="module:object of the ensemble; with --task and --train, to compute at once.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Drop what is damaged, so that the next fit computes only that; with --task, --train and --ensemble, at once."""
    from byline.store import repair as mend

    given = {"--task": task, "--train": train, "--ensemble": ensemble}
    lacking = [name for name, value in given.items() if value is None]
    if lacking and len(lacking) < 3:
        raise typer.BadParameter(f"{', '.join(lacking)} is missing; expected all of {', '.join(given)}, or none")
    with _one_sentence():
        report = mend(place)
        if task and train and ensemble:
            _refit(place, _object(task, "--task"), _object(ensemble, "--ensemble"), _object(train, "--train"))
    _tell(report, as_json)
    if not as_json and report.problems:
        _say("computed again" if task else "dropped: the next fit computes it again, and nothing else")


@store_app.command(epilog="Example:  byline store gc runs/first")
def gc(
    place: Place,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Remove members that are not complete too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what nothing refers to: files of killed runs, members that were left behind."""
    from byline.store import gc as collect

    with _one_sentence():
        removed = collect(place, unfinished)
    if as_json:
        typer.echo(json.dumps(removed))
        return
    _say(f"removed {len(removed['files'])} files, {_size(removed['bytes'])}")


@store_app.command(epilog="Example:  byline store estimate digits-mlp --features factorized:512 --masks 9")
def estimate(
    setting: Annotated[str | None, typer.Argument(help="A setting's name, instead of --task and --train.")] = None,
    task: TaskAt = None,
    train: TrainAt = None,
    features: Annotated[
        str,
        typer.Option(
            help="exact, low-rank:RANK, factorized:DIM, pca:DIM, nystrom:LANDMARKS or dense:DIM; adam: before any"
        ),
    ] = "exact",
    dtype: Annotated[str, typer.Option(help="float32, float16 or int8")] = "float32",
    members: Annotated[int, typer.Option(min=1, help="Trained models.")] = 1,
    masks: Annotated[int, typer.Option(min=0, help="Dropout masks on each; 0 for none.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Say what a store will take before it is made: bytes, memory, FLOPs and time, from a few batches."""
    import byline
    from byline import settings
    from byline.engines.estimate import estimate as guess

    if (setting is None) == (task is None) or (task is None) != (train is None):
        raise typer.BadParameter("expected the name of a setting, or both --task and --train")
    with _one_sentence():
        kind = _features(features, dtype)
        if setting is not None:
            if setting not in settings.names():
                raise ValueError(f"no setting {setting!r}; there are {', '.join(settings.names())}")
            chosen = settings.get(setting)
            model, data = chosen.task(), chosen.train_set
            # untrained weights take as long and as much room as trained ones
            states: list[Any] = [chosen.build() for _ in range(members)]
        else:
            assert task is not None
            assert train is not None
            model, data = _object(task, "--task"), _object(train, "--train")
            if not isinstance(model, byline.Task):
                raise ValueError(f"--task gives a {type(model).__name__}; expected a byline.Task")
            states = [_shaken(model.model, seed) for seed in range(members)]
        ensemble: Any = byline.Independent(states)
        if masks:
            ensemble = byline.Dropout(ensemble, masks=masks)
        found = guess(model, ensemble, data, features=kind, batch_size=batch_size)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    _say(f"{found.members} members of {found.examples} examples and {found.columns} columns, {features} as {dtype}")
    _say(f"  store: {_size(found.bytes)}, {_size(found.bytes_per_member)} for each further member")
    _say(f"  memory: {_size(found.memory)} at most")
    if found.kernel:
        _say(f"    of it {_size(found.kernel)} for TRAK's kernel; methods without one do not need it")
    _say(f"  fit: {found.flops:.2g} FLOPs, about {found.seconds:.0f} s here")


def _features(text: str, dtype: str) -> Features:
    import byline

    name, _, size = text.partition(":")
    makers = {
        "factorized": lambda n: byline.Factorized(n, dtype=dtype),
        "pca": lambda n: byline.Factorized(n, "pca", dtype=dtype),
        "nystrom": lambda n: byline.Nystrom(n, dtype=dtype),
        "low-rank": lambda n: byline.LowRank(n, dtype=dtype),
        "dense": lambda n: byline.Dense(n, dtype=dtype),
    }
    if text.startswith("adam:"):
        return byline.Preconditioned(_features(text.removeprefix("adam:"), dtype))
    if text == "exact":
        return byline.Exact(dtype=dtype)
    if name not in makers or not size.isdigit():
        raise ValueError(
            f"--features is {text!r}; expected exact, or one of {', '.join(makers)} with :COLUMNS (low-rank: :RANK), "
            "after adam: for those in Adam's metric"
        )
    return makers[name](int(size))


def _shaken(model: Any, seed: int) -> dict[str, Any]:
    """Weights that differ from the model's, so that they count as another member."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + 1e-6 * torch.randn(value.shape, generator=generator).to(value)
        if value.is_floating_point()
        else value
        for key, value in model.state_dict().items()
    }


def _object(where: str, option: str) -> Any:
    """What ``module:object`` names; a function, or a class that is no dataset, is called."""
    module, found, name = where.partition(":")
    if not found or not module or not name:
        raise ValueError(f"{option} is {where!r}; expected module:object")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} is {where!r}: {error}") from None
    return value() if callable(value) and not hasattr(value, "__getitem__") else value


def _refit(place: str, task: Any, ensemble: Any, train: Any) -> None:
    """Compute what a store lacks of an ensemble, with the features that it was made for."""
    import byline
    from byline.store import Store

    features = _as_kept(Store(place).manifest.made_for["features"])
    ofs = {entry["of"] for entry in Store(place).manifest.features.values()}
    method = byline.GradDot if ofs == {"loss"} else byline.TRAK
    method(task, ensemble, features=features, damping=1.0, store=place, progress=False).fit(train)


def _as_kept(described: Mapping[str, Any]) -> Features:
    """The features of which a manifest says this."""
    import byline

    kept = dict(described)
    kind = kept.pop("kind")
    if kind in ("preconditioned", "principal"):
        around = byline.Preconditioned if kind == "preconditioned" else byline.Principal
        return around(_as_kept(kept.pop("features")), **kept)
    if kind == "dense":
        kept["kind"] = kept.pop("projection")
    classes: dict[str, Callable[..., Features]] = {
        "exact": byline.Exact,
        "low-rank": byline.LowRank,
        "factorized": byline.Factorized,
        "nystrom": byline.Nystrom,
        "dense": byline.Dense,
    }
    if kind not in classes:
        raise ValueError(f"the store keeps {kind!r}, which --task cannot compute; fit the method itself again")
    return classes[kind](**kept)


def _tell(report: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.to_dict(), ensure_ascii=False))
        return
    for problem in report.problems:
        _say(str(problem))
    bad = len(report.problems)
    state = "all is whole" if not bad else f"{bad} {'file is' if bad == 1 else 'files are'} damaged or missing"
    _say(f"{report.store}: {report.chunks} chunks, {_size(report.bytes)} read; {state}")
    if report.unfinished:
        _say(f"{len(report.unfinished)} arrays are not complete yet; the next fit goes on with them")


def _say(sentence: str) -> None:
    Console().print(escape(sentence), highlight=False, soft_wrap=True)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _one_sentence() -> Any:
    from byline import cli

    return cli._one_sentence()
