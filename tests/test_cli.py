"""The command line: what is printed where, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import byline
from byline import cli
from byline.report import terminal
from test_report import make_result

runner = CliRunner()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the comparison by a ready result, and records how it was called."""
    seen: list[dict[str, Any]] = []

    def run(setting: Any, folder: Path, **options: Any) -> dict[str, Any]:
        options["tell"]("one [step] done")
        seen.append({"setting": setting.name, "folder": folder, **options})
        return make_result()

    monkeypatch.setattr("byline.settings.bench.run", run)
    return seen


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version(arguments: list[str]) -> None:
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert result.stdout.strip() == f"byline {byline.__version__}"


@pytest.mark.parametrize("command", [["demo"], ["bench"], ["data", "list"], ["data", "fetch"], ["version"]])
def test_every_help_has_an_example(command: list[str]) -> None:
    result = runner.invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert f"Example:  byline {' '.join(command)}" in " ".join(result.stdout.split("\n")).replace("│", "")


def test_demo_writes_the_report_and_says_where(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["demo", "--quick", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "report.html").is_file()
    assert "report.html" in result.stdout.replace("\n", "")
    assert "one [step] done" in result.stdout
    assert calls[0]["setting"] == "digits-mlp"
    assert calls[0]["quick"]
    assert calls[0]["command"] == f"byline demo --quick --out {tmp_path / 'run'}"


def test_json_is_all_there_is_on_stdout(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["demo", "--json", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["rows"][0]["lds"] == 0.25
    assert "one [step] done" in result.stderr


def test_bench_lists_its_settings() -> None:
    result = runner.invoke(cli.app, ["bench", "--list", "--json"])
    assert set(json.loads(result.stdout)) >= {"digits-mlp", "fashion-mlp"}


@pytest.mark.parametrize(
    "arguments", [["bench"], ["bench", "nothing"], ["data", "fetch", "nothing"], ["demo", "--colour"], ["nothing"]]
)
def test_bad_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_failure_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    result = runner.invoke(cli.app, ["bench", "fashion-mlp", "--data", str(missing), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert str(missing) in result.stderr.replace("\n", "")
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
    result = runner.invoke(cli.app, ["--debug", "bench", "fashion-mlp", "--data", str(missing)])
    assert isinstance(result.exception, (ValueError, FileNotFoundError))


def test_data_for_a_setting_that_brings_its_own_is_refused(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["bench", "digits-mlp", "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "brings its own data" in result.stderr


def test_data_list_and_fetch() -> None:
    assert "fashion-mnist" in runner.invoke(cli.app, ["data", "list"]).stdout
    result = runner.invoke(cli.app, ["data", "fetch", "digits"])
    assert result.exit_code == 0
    assert "nothing to fetch" in result.stdout


@pytest.mark.parametrize("width", [46, 80, 140])
def test_the_table_is_readable_at_any_width(width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    result = make_result()
    terminal.show(result, console)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for row in result["rows"]:
        assert any(row["name"].split()[0] in line and f"{row['lds']:.3f}" in line for line in text.splitlines())
    assert "≥ 98 % less" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "dask"], "no engine 'dask'; expected local or ray"),
        (["--address", "auto"], "address is 'auto'; expected --engine ray with it"),
    ],
)
def test_an_unknown_engine_is_refused(calls: list[dict[str, Any]], options: list[str], said: str) -> None:
    for command in (["demo"], ["bench", "digits-mlp"]):
        result = runner.invoke(cli.app, [*command, *options])
        assert result.exit_code == 2
        assert said in " ".join(result.output.replace("│", " ").split())
    assert not calls


def test_without_ray_the_extra_is_named(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = runner.invoke(cli.app, ["demo", "--engine", "ray"])
    assert result.exit_code == 1
    assert "byline[ray]" in result.output
    assert not calls


def test_the_engine_reaches_the_comparison(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    result = runner.invoke(cli.app, ["demo", "--out", str(tmp_path), "--engine", "ray", "--address", "auto"])
    assert result.exit_code == 0, result.output
    assert calls[0]["engine"].address == "auto"
