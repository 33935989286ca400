"""The command line: every command is a few lines over the library."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from byline.cli_store import store_app

app = typer.Typer(
    name="byline",
    help="Which training examples made a model say that, and how sure are we?",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="The data of the named benchmarks.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(store_app, name="store")

_debug = False


def _version(value: bool) -> None:
    if value:
        version()
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    _: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    global _debug
    _debug = debug


Out = Annotated[Path | None, typer.Option(help="Folder for everything that is made; runs resume in it.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few rows, a small bank: a check, not a measurement.")]
OnEngine = Annotated[str | None, typer.Option("--engine", help="Where to work: local (this process) or ray.")]
Address = Annotated[str | None, typer.Option(help="A Ray cluster to join with --engine ray, such as auto.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else, to stdout.")]


@app.command(epilog="Example:  byline demo --quick --out runs/first")
def demo(
    out: Out = Path("runs/demo"),
    quick: Quick = False,
    as_json: AsJson = False,
    engine: OnEngine = None,
    address: Address = None,
) -> None:
    """Train, attribute, retrain and compare on handwritten digits: needs no data and no network."""
    command = ["byline", "demo", *(["--quick"] if quick else []), "--out", str(out)]
    where = _where_to_work(engine, address)
    _compare("digits-mlp", out or Path("runs/demo"), quick, as_json, command, engine=where)


@app.command(epilog="Example:  byline bench fashion-mlp --methods trak,grad-cos --ensembles independent-5,dropout-1x10")
def bench(
    setting: Annotated[str | None, typer.Argument(help="Name of a benchmark, see --list.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the benchmarks.")] = False,
    out: Out = None,
    quick: Quick = False,
    as_json: AsJson = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of IDX (MNIST's format), CIFAR-10 or MIDI files.")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Of the model: the first layer's units, channels or a token's; 64 is the paper's ResNet."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, by comma, or all but the dear ones: see `byline methods`.")
    ] = None,
    ensembles: Annotated[
        str | None, typer.Option(help="Ensembles, by comma: independent-5, dropout-1x10:p=0.5, lora-1x4, noise-1x10 …")
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option(help="Measures, by comma: lds, beyond, mislabel, class, overlap, loo, removal, brittleness."),
    ] = None,
    queries: Annotated[int | None, typer.Option(help="How many test examples; all when left out.")] = None,
    engine: OnEngine = None,
    address: Address = None,
) -> None:
    """Compare ensembles on a benchmark; with --methods or --ensembles, methods × ensembles by every measure.

    Writes results.json and report.html, or grid.json and grid.html.
    """
    from byline import settings

    if list_:
        table = {name: settings.get(name).description for name in settings.names()}
        _list(table, as_json)
        return
    if setting is None or setting not in settings.names():
        known = ", ".join(settings.names())
        problem = "name a setting" if setting is None else f"no setting {setting!r}"
        raise typer.BadParameter(f"{problem}; there are {known}", param_hint="SETTING")
    where = _where_to_work(engine, address)
    folder = out or Path("runs") / setting
    options = [
        *(["--quick"] if quick else []),
        "--out",
        str(folder),
        *(["--data", str(data)] if data else []),
        *(["--width", str(width)] if width else []),
    ]
    command = ["byline", "bench", setting, *options]
    asked = {"--methods": methods, "--ensembles": ensembles, "--measures": measures, "--queries": queries}
    if all(value is None for value in asked.values()):
        _compare(setting, folder, quick, as_json, command, data, width, engine=where)
        return
    command += [part for name, value in asked.items() if value is not None for part in (name, str(value))]
    names = {
        "method_names": None if methods in (None, "all") else _names(methods),
        "ensembles": _names(ensembles),
        "measures": _names(measures),
        "queries": queries,
    }
    _compare(setting, folder, quick, as_json, command, data, width, names, where)


@app.command(epilog="Example:  byline report scores.safetensors --examples my_project:shown --out report.html")
def report(
    scores: Annotated[Path, typer.Argument(help="What scores.save(...) wrote.")],
    examples: Annotated[
        str | None,
        typer.Option(help="module:object, how examples are shown: a dict of byline.report.scores_page's arguments."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    k: Annotated[int, typer.Option("-k", help="Proponents and opponents of each test example.", min=1)] = 5,
    most: Annotated[int, typer.Option("--most", help="At most so many test examples.", min=1)] = 50,
) -> None:
    """Write a page about scores: proponents and opponents with error bars, in one file that needs no network."""
    from byline.names import named
    from byline.report import scores_page
    from byline.scores import Scores

    with _one_sentence():
        found = Scores.load(scores)
        shown = {} if examples is None else named(examples, "examples")
        shown = shown() if callable(shown) else shown
        known = {"train", "test", "self_influence", "suspects", "shares", "ledger", "title"}
        if not isinstance(shown, Mapping) or not set(shown) <= known:
            got = sorted(set(shown) - known) if isinstance(shown, Mapping) else type(shown).__name__
            raise ValueError(f"examples is {examples!r}, which gives {got}; expected a dict with {sorted(known)}")
        named_too = ["--examples", examples] if examples is not None else []
        command = shlex.join(["byline", "report", str(scores), *named_too, "--out", str(out)])
        options = {"title": scores.name, "command": command, **shown}
        page = scores_page(found, out, k=k, examples=most, **options)
    Console(stderr=True).print(f"Report: {page}", highlight=False)


@app.command(epilog="Example:  byline generate tunes-transformer --count 4")
def generate(
    setting: Annotated[str, typer.Argument(help="tunes-transformer, stdlib-gpt or smollm2-lora.")],
    count: Annotated[int, typer.Option(help="How many works.", min=1, max=50)] = 4,
    k: Annotated[int, typer.Option("-k", help="Sources of each.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run (runs/SETTING); models that it lacks are trained.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A small model of a fifth of the data: to see that all works.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let a model make up tunes, code or answers, and show which training examples taught it, bar by bar."""
    from byline import settings
    from byline.report.works import works_page
    from byline.settings import smollm
    from byline.settings.bench import form
    from byline.settings.works import make_up
    from byline.settings.workshop import Workshop, save_json

    console = Console(stderr=True)
    known = (*(name for name in settings.names() if settings.get(name).owners is not None), smollm.NAME)

    def tell(sentence: str) -> None:
        console.print(f"  {escape(sentence)}", highlight=False)

    with _one_sentence():
        if setting not in known:
            raise ValueError(f"setting is {setting!r}; expected one of {', '.join(known)}, whose models make things up")
        folder = out or Path("runs") / setting
        if setting == smollm.NAME:
            small = {"train": 24, "adapters": 2, "epochs": 1} if quick else {}
            parts = smollm.model_and_tokenizer()
            asked = smollm.questions()
            works = smollm.answer(*parts, asked, count=count, k=k, seed=seed, tell=tell, progress=True, **small)
        else:
            chosen, _ = form(settings.get(setting), quick, None)
            works = make_up(Workshop(chosen, folder, tell, True), count, k=k, seed=seed)
        command = ["byline", "generate", setting, "--count", str(count), "-k", str(k), "--seed", str(seed)]
        command += [*(["--quick"] if quick else []), "--out", str(folder)]
        page = works_page(works, folder / "works.html", title=setting, command=shlex.join(command))
        save_json(folder / "works.json", works.to_dict())
    if as_json:
        typer.echo(json.dumps(works.to_dict(), ensure_ascii=False))
        return
    for work in works.works:
        lead = work.sources[0]
        Console().print(f"no. {work.seed}: {escape(lead.title)}  {lead.score:+.3g}", highlight=False)
    console.print(f"\nTo look at: {page}", highlight=False)


@app.command(epilog="Example:  byline mislabels photos/   or   byline mislabels customers.csv --label churned")
def mislabels(
    data: Annotated[Path, typer.Argument(help="A folder with a folder of pictures for each class, or a CSV file.")],
    label: Annotated[str | None, typer.Option(help="The column of a CSV file that holds the labels.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for mislabels.csv and mislabels.html; runs/mislabels/NAME by default.")
    ] = None,
    rows: Annotated[int, typer.Option(help="How many suspicious examples.", min=1)] = 50,
    size: Annotated[int, typer.Option(help="Height and width that pictures are brought to.")] = 32,
    epochs: Annotated[int, typer.Option(help="Of the one short training run.", min=1)] = 10,
    as_json: AsJson = False,
) -> None:
    """Find the labels in your own pictures or table that are probably wrong: trains a small model, once."""
    from byline.report.suspects import suspects_page
    from byline.uses import own

    console = Console(stderr=True)
    with _one_sentence():
        found_data = own.read(data, label, size)
        for note in found_data.notes:
            console.print(escape(f"- {note}"), highlight=False, soft_wrap=True)
        console.print(f"{escape(found_data.what)}: training a small model for {epochs} epochs", highlight=False)
        found = own.look_for_mislabels(found_data, rows=rows, epochs=epochs)
        whole = data.resolve()
        out = Path("runs/mislabels") / (whole.name if whole.is_dir() else whole.stem) if out is None else out
        frame = found.to_dataframe()
        frame.insert(1, "name", [found_data.names[i] for i in found.index])
        frame["evidence"] = [[found_data.names[i] for i in row] for row in found.evidence.indices]
        out.mkdir(parents=True, exist_ok=True)
        frame.to_csv(out / "mislabels.csv", index=False, errors="replace")
        options = ["--label", label] if label is not None else ["--size", str(size)]
        options += ["--out", str(out), "--rows", str(rows), "--epochs", str(epochs)]
        command = shlex.join(["byline", "mislabels", str(data), *options])
        page = suspects_page(
            found,
            out / "mislabels.html",
            title=found_data.what,
            names=found_data.names,
            pictures=found_data.pictures,
            rows=found_data.rows,
            notes=found_data.notes,
            command=command,
        )
    if as_json:
        typer.echo(frame.to_json(orient="records"))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("example", "given label", "perhaps", "suspicion"):
        table.add_column(name)
    for row in range(min(15, len(found))):
        cells = (found_data.names[found.index[row]], str(found.given[row]), str(found.suggested[row]))
        table.add_row(*map(escape, cells), f"{found.suspicion[row] * 100:.1f} %")
    Console().print(table)
    if found_data.rows is not None:
        console.print("\nRow 0 is the first below the header.", highlight=False)
    console.print(f"\nAll {len(found)}: {out / 'mislabels.csv'}; to look at: {page}", highlight=False, soft_wrap=True)


@app.command(
    epilog="Example:  byline serve runs/demo   or   byline serve runs/mine --data photos/   "
    "or   byline serve runs/x --task my_project:served"
)
def serve(
    store: Annotated[Path, typer.Argument(help="A run of demo or bench, or a folder; what it lacks is made first.")],
    task: Annotated[
        str | None, typer.Option(help="module:object, a byline.serve.Served or a function that returns one.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Your own: a folder with a folder of pictures for each class, or a CSV file.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="The column of a CSV file that holds the labels.")] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Serve the explorer's page beside the API.")] = True,
    host: Annotated[str, typer.Option(help="Where to listen; others than localhost need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None, typer.Option(help="Bearer token that requests need.", envvar="BYLINE_TOKEN", show_envvar=True)
    ] = None,
    rows: Annotated[
        str, typer.Option(help="Training rows in memory as float32, float16 or int8; store leaves them; or auto.")
    ] = "auto",
    max_batch: Annotated[int, typer.Option(help="Examples of a request.", min=1)] = 64,
    max_k: Annotated[int, typer.Option(help="Proponents and opponents per example.", min=1)] = 100,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.", min=1024)] = 16 * 2**20,
    max_queue: Annotated[int, typer.Option(help="Examples that may wait.", min=1)] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds for an answer.", min=0.1)] = 30.0,
) -> None:
    """Open the explorer's page, and answer over HTTP. Needs the extra: byline[serve].

    Serves the run of a benchmark, a small model trained on your own files (--data), or a model of yours (--task).
    """
    with _one_sentence():
        try:
            from byline.serve import Limits, logs
            from byline.serve.server import serve as run
        except ImportError as error:
            raise ValueError(str(error)) from None
        logs.configure()
        limits = Limits(body=max_body, batch=max_batch, k=max_k, queue=max_queue, seconds=timeout)
        where: dict[str, Any] = {
            "host": host,
            "port": port,
            "token": token,
            "rows": rows,
            "limits": limits,
            "page": page,
        }
        if task is not None and data is not None:
            raise ValueError("--task and --data were given; expected one of them")
        if label is not None and data is None:
            raise ValueError("--label is for the CSV file of --data")
        if task is not None:
            run(store, task, **where)
            return
        from byline.serve import runs

        made = (lambda: runs.of_run(store)) if data is None else (lambda: runs.of_files(data, label, store))
        run(store / runs.STORE, made, **where)


@app.command("methods", epilog="Example:  byline methods --json")
def list_methods(as_json: AsJson = False) -> None:
    """List the attribution methods: what each is, what it needs, and where it comes from."""
    from byline.methods.registry import methods

    if as_json:
        typer.echo(json.dumps([info.to_dict() for info in methods()], ensure_ascii=False))
        return
    _list({info.name: f"{info.title}: {info.description} ({info.citation})" for info in methods()}, False)


@app.command("recommend", epilog="Example:  byline recommend digits-mlp --budget trainings=1,serving=0.1")
def recommend_ensemble(
    what: Annotated[str, typer.Argument(help="A measured setting, or module:object of a byline.Task.")],
    limits: Annotated[
        str,
        typer.Option(
            "--budget",
            help="trainings=… (of one model), serving=… and space=… (of what five independent models take).",
        ),
    ] = "trainings=1",
    count: Annotated[int, typer.Option(help="How many to name.", min=1)] = 3,
    as_json: AsJson = False,
) -> None:
    """Which ensemble to use for a budget, what LDS to expect of it, and how it is made: from measurements."""
    from dataclasses import asdict

    from byline.names import named
    from byline.recommend import budget, recommend

    with _one_sentence():
        asked = what
        if ":" in what:
            found = named(what, "the argument")
            asked = found() if callable(found) else found
        advice = recommend(asked, budget(limits), count)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in advice], ensure_ascii=False))
        return
    for one in advice:
        typer.secho(f"{one.strategy}, hessian={one.hessian!r}, residual={one.residual!r}", bold=True)
        typer.echo(
            f"  LDS {one.low:.2f} to {one.high:.2f} on {', '.join(one.settings)}, {one.share:.0%} of the noise "
            f"ceiling; training {one.trainings:.2g} of a model's; serving {one.serving:.2g} and space {one.space:.2g} "
            "of five independent models'\n"
            f"  {one.reason}\n"
        )
        typer.echo("".join(f"    {line}\n" for line in one.code.splitlines()))


@app.command("support", epilog="Example:  byline support my_project:served")
def support_of(
    what: Annotated[
        str, typer.Argument(help="module:object, a byline.serve.Served, a pair (task, train_set), or a function of it.")
    ],
    as_json: AsJson = False,
) -> None:
    """How the gradients of a model's parameters are had: in one pass, or by per-example autograd."""
    from byline.batches import as_dataset
    from byline.engines.support import grouped, paths
    from byline.names import named
    from byline.serve import Served
    from byline.task import Task

    with _one_sentence():
        found = named(what, "the argument")
        found = found() if callable(found) else found
        options: dict[str, Any] = {}
        if isinstance(found, Served) and found.train_set is not None:
            task, data = found.attributor.task, found.train_set
            options = {"ensemble": found.attributor.ensemble, "collate": found.attributor.collate}
        elif isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Task):
            task, data = found
        else:
            raise ValueError(
                f"the argument is {what!r}, which gives a {type(found).__name__}; expected a byline.serve.Served with "
                "its train_set, or a pair (task, train_set)"
            )
        rows = paths(task, as_dataset(data, "train_set"), **options)
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "parameter", "numbers", "way", "how"):
        table.add_column(name, justify="right" if name == "numbers" else "left")
    for row in grouped(rows):
        cells = (row["layer"], row["parameter"], f"{row['size']:,}", row["way"], row["how"])
        table.add_row(*map(escape, cells))
    Console().print(table)


def _where_to_work(engine: str | None, address: str | None) -> Any:
    """The engine of --engine and --address."""
    if engine in (None, "local") and address is None:
        return None
    if engine != "ray":
        problem = f"address is {address!r}" if engine in (None, "local") else f"no engine {engine!r}"
        expected = "--engine ray with it" if engine in (None, "local") else "local or ray"
        raise typer.BadParameter(f"{problem}; expected {expected}", param_hint="--engine")
    with _one_sentence():
        from byline.engines import Ray

        return Ray(address=address)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


@data_app.command("list", epilog="Example:  byline data list")
def data_list(as_json: AsJson = False) -> None:
    """List the data sets, and where this machine has them."""
    _list({name: _where(name) for name in DATA}, as_json)


@data_app.command("fetch", epilog="Example:  byline data fetch fashion-mnist --to ~/data/fashion-mnist")
def data_fetch(
    name: Annotated[str, typer.Argument(help="Name of a data set, see `byline data list`.")],
    to: Annotated[Path | None, typer.Option(help="Folder; the cache of this machine when left out.")] = None,
) -> None:
    """Find a data set on this machine, or download it; checked by hash."""
    if name not in DATA:
        raise typer.BadParameter(f"no data set {name!r}; there are {', '.join(DATA)}", param_hint="NAME")
    with _one_sentence():
        Console().print(escape(_fetch(name, to)))


@app.command(epilog="Example:  byline version")
def version() -> None:
    """Print the version."""
    import byline

    typer.echo(f"byline {byline.__version__}")


DATA = {
    "digits": "1797 digits of 8×8 pixels: inside scikit-learn, nothing to fetch",
    "fashion-mnist": "70 000 pictures of clothes, 28×28 pixels, 30 MB",
    "tunes": "folk tunes and chorales: inside music21 (pip install 'byline[music]'), nothing to fetch",
    "stdlib": "the functions of Python's standard library: inside this Python, nothing to fetch",
}


def _where(name: str) -> str:
    if name != "fashion-mnist":
        return DATA[name]
    from byline.settings.data import fashion_mnist

    try:
        return f"{DATA[name]}; in {fashion_mnist().source}"
    except FileNotFoundError:
        return f"{DATA[name]}; not here yet: byline data fetch {name}"


def _fetch(name: str, to: Path | None) -> str:
    if name == "digits":
        return "digits are inside scikit-learn: there is nothing to fetch."
    if name != "fashion-mnist":
        return f"{name}: {DATA[name]}."
    from byline.settings.data import fashion_mnist

    found = fashion_mnist(to.expanduser() if to else None, fetch=True)
    return f"{name} is in {found.source}."


def _compare(
    name: str,
    out: Path,
    quick: bool,
    as_json: bool,
    command: list[str],
    data: Path | None = None,
    width: int | None = None,
    grid: Mapping[str, Any] | None = None,
    engine: Any = None,
) -> None:
    """What demo and bench share: run, write the report, show the table."""
    console = Console(stderr=as_json)
    with _one_sentence():
        from byline import report, settings
        from byline.report import terminal

        if grid is None:
            from byline.settings.bench import run
        else:
            from byline.settings.grid import run  # type: ignore[assignment]
        result = run(
            settings.get(name).variant(data, width),
            out,
            quick=quick,
            command=shlex.join(command),
            tell=lambda sentence: console.print(f"[dim]{escape(sentence)}[/dim]", highlight=False),
            progress=sys.stderr.isatty() and sys.stdout.isatty(),
            **({} if engine is None else {"engine": engine}),
            **(grid or {}),
        )
        path = report.build(result, out / ("report.html" if grid is None else "grid.html"))
    if as_json:
        typer.echo(json.dumps(result))
        return
    (terminal.show if grid is None else terminal.show_grid)(result, console)
    numbers = out / ("results.json" if grid is None else "grid.json")
    console.print(f"\nReport: [bold]{escape(str(path))}[/bold]  (numbers: {escape(str(numbers))})")


def _list(items: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(items, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, words in items.items():
        table.add_row(escape(name), escape(words))
    Console().print(table)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """A user's mistake is one red sentence and exit code 1, not a traceback."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if _debug:
            raise
        Console(stderr=True).print(f"[red]{escape(str(error))}[/red]", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("[yellow]stopped; the same command goes on from here[/yellow]")
        raise typer.Exit(130) from None


def main() -> None:
    """The console entry point."""
    app()


if __name__ == "__main__":
    main()
