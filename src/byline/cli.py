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

_debug = False

TABLE_WIDTH = 108
"""Narrower terminals get lines instead of a table: columns must not be folded into unreadable strips."""


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
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else, to stdout.")]


@app.command(epilog="Example:  byline demo --quick --out runs/first")
def demo(out: Out = Path("runs/demo"), quick: Quick = False, as_json: AsJson = False) -> None:
    """Train, attribute, retrain and compare on handwritten digits: needs no data and no network."""
    command = ["byline", "demo", *(["--quick"] if quick else []), "--out", str(out)]
    _compare("digits-mlp", out or Path("runs/demo"), quick, as_json, None, command)


@app.command(epilog="Example:  byline bench fashion-mlp --out runs/fashion")
def bench(
    setting: Annotated[str | None, typer.Argument(help="Name of a benchmark, see --list.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the benchmarks.")] = False,
    out: Out = None,
    quick: Quick = False,
    as_json: AsJson = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of IDX files (MNIST's format) to use instead.")
    ] = None,
) -> None:
    """Compare all ensembles on a named benchmark; writes results.json and report.html."""
    from byline import settings

    if list_:
        table = {name: settings.get(name).description for name in settings.names()}
        _list(table, as_json)
        return
    if setting is None or setting not in settings.names():
        known = ", ".join(settings.names())
        problem = "name a setting" if setting is None else f"no setting {setting!r}"
        raise typer.BadParameter(f"{problem}; there are {known}", param_hint="SETTING")
    folder = out or Path("runs") / setting
    options = [
        *(["--quick"] if quick else []),
        "--out",
        str(folder),
        *(["--data", str(data)] if data else []),
    ]
    _compare(setting, folder, quick, as_json, data, ["byline", "bench", setting, *options])


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
}


def _where(name: str) -> str:
    if name == "digits":
        return DATA[name]
    from byline.settings.data import fashion_mnist

    try:
        return f"{DATA[name]}; in {fashion_mnist().source}"
    except FileNotFoundError:
        return f"{DATA[name]}; not here yet: byline data fetch {name}"


def _fetch(name: str, to: Path | None) -> str:
    if name == "digits":
        return "digits are inside scikit-learn: there is nothing to fetch."
    from byline.settings.data import fashion_mnist

    found = fashion_mnist(to.expanduser() if to else None, fetch=True)
    return f"{name} is in {found.source}."


def _compare(name: str, out: Path, quick: bool, as_json: bool, data: Path | None, command: list[str]) -> None:
    """What demo and bench share: run, write the report, show the table."""
    console = Console(stderr=as_json)
    with _one_sentence():
        from byline import report, settings
        from byline.settings.bench import run, with_data

        setting = settings.get(name)
        if data is not None:
            setting = with_data(setting, data)
        result = run(
            setting,
            out,
            quick=quick,
            command=shlex.join(command),
            tell=lambda sentence: console.print(f"[dim]{escape(sentence)}[/dim]", highlight=False),
            progress=sys.stderr.isatty() and sys.stdout.isatty(),
        )
        path = report.build(result, out / "report.html")
    if as_json:
        typer.echo(json.dumps(result))
        return
    show(result, console)
    console.print(f"\nReport: [bold]{escape(str(path))}[/bold]  (numbers: {escape(str(out / 'results.json'))})")


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints the rows and the verdict: a table, or a few lines a row where the terminal is too narrow for one."""
    from byline.report.words import verdict

    rows = [_cells(row) for row in result["rows"]]
    console.print()
    if console.width >= TABLE_WIDTH:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("ensemble", overflow="fold")
        for heading in ("LDS", "as good as"):
            table.add_column(heading)
        for heading in ("training", "serving a query", "space"):
            table.add_column(heading, justify="right")
        for name, lds, equal, *costs in rows:
            table.add_row(f"[bold]{name}[/bold]", lds, equal, *("\n".join(cost) for cost in costs))
        console.print(table)
    else:
        for name, lds, equal, *costs in rows:
            console.print(f"[bold]{name}[/bold]  LDS {lds}", highlight=False)
            for what, cost in zip(("training", "serving", "space"), costs, strict=True):
                console.print(f"  [dim]{what}[/dim] {'  '.join(cost)}", highlight=False)
            if equal != "–":
                console.print(f"  [dim]as good as[/dim] {equal} [dim]trained independently[/dim]")
    bank = result["bank"]
    console.print(
        f"\n[dim]Truth: {bank['subsets']} subsets × {bank['seeds']} seeds. Percentages compare with independently "
        "trained models of equal LDS; ≥ where no such ensemble that was run is as good, then with the largest."
        "[/dim]",
        highlight=False,
    )
    console.print(f"\n{escape(verdict(result))}", highlight=False)


def _cells(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Name, LDS, the naive ensemble of equal LDS, and (cost, share saved) of training, serving and space."""
    from byline.ledger import human_bytes, human_flops, human_seconds
    from byline.report.words import as_good_as, percent

    saved = row["saved"] or {}
    low, high = row["interval"]

    def cost(part: str) -> tuple[str, ...]:
        if part == "space":
            words = human_bytes(row["space"])
        else:
            words = f"{human_flops(row[part]['flops'])}, {human_seconds(row[part]['seconds'])}"
        if saved.get(part) is None:
            return (words,)
        colour = "green" if saved[part] > 0 and saved["bound"] != "below" else "yellow"
        return words, f"[{colour}]{percent(saved[part], saved['bound'])}[/{colour}]"

    lds = f"[bold]{row['lds']:.3f}[/bold] [dim]{low:.2f} to {high:.2f}[/dim]"
    return escape(row["name"]), lds, as_good_as(row), cost("training"), cost("serving"), cost("space")


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
    except (ValueError, OSError) as error:
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
