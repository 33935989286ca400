"""The grid of methods and ensembles, end to end on a small scale; its parts by themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import escape
from typer.testing import CliRunner

import byline
from byline import cli, report
from byline.methods.registry import methods
from byline.report.grid import grid_content, grid_verdict
from byline.settings import controls, judges
from byline.settings.grid import run
from byline.settings.rows import GRID, Row, parse
from byline.settings.workshop import Workshop
from byline.training import Trainer
from test_bench import BANK, small

METHODS = ["trak", "grad-dot", "influence-ekfac", "representation", "dvemb", "random"]
ENSEMBLES = ["independent-1", "independent-2", "dropout-1x2", "forward-only-1x2", "trajectory-1x2"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("grid")
    options = {"method_names": METHODS, "ensembles": ENSEMBLES, "bank_recipe": BANK}
    return folder, run(small(), folder, command="byline bench digits-mlp --methods all", **options)


def cells(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(cell["method"], cell["ensemble"]): cell for cell in result["cells"]}


def test_every_cell_is_measured_or_refused_with_a_sentence(grid: tuple[Path, dict[str, Any]]) -> None:
    found = cells(grid[1])
    assert len(found) == len(METHODS) * len(ENSEMBLES)
    for (method, ensemble), cell in found.items():
        forward = ensemble.startswith("forward-only")
        refused = (forward and method in ("grad-dot", "influence-ekfac", "representation", "dvemb")) or (
            method == "dvemb" and not ensemble.startswith("2 checkpoints")
        )
        if forward and method == "random":
            continue
        assert (cell["refused"] is not None) == refused, (method, ensemble, cell["refused"])
        if refused:
            assert len(cell["refused"]) > 20
            continue
        for name in ("lds", "mislabel", "class"):
            figure = cell["measures"][name]
            assert figure["low"] <= figure["mean"] <= figure["high"], (method, ensemble, name)
        assert cell["training"]["flops"] > 0
        assert cell["space"] > 0


def test_overlap_compares_with_the_largest_naive_ensemble(grid: tuple[Path, dict[str, Any]]) -> None:
    found = cells(grid[1])
    assert found["trak", "independent 2"]["measures"]["overlap"] is None
    one = found["trak", "independent 1"]["measures"]["overlap"]["mean"]
    random = found["random", "independent 1"]["measures"]["overlap"]["mean"]
    assert random < one <= 1


def test_baselines_stand_beside_the_mislabels(grid: tuple[Path, dict[str, Any]]) -> None:
    lines = grid[1]["baselines"]
    assert [line["measure"] for line in lines] == ["mislabel", "mislabel"]
    assert all(0 <= line["mean"] <= 1 and line["flops"] > 0 for line in lines)


def test_the_page_holds_every_figure(grid: tuple[Path, dict[str, Any]]) -> None:
    folder, result = grid
    assert json.loads((folder / "grid.json").read_text()) == result
    html = report.build(result, folder / "grid.html").read_text()
    for cell in result["cells"]:
        for figure in cell["measures"].values():
            if figure is not None:
                assert f"{figure['mean']:.3f}" in html
        if cell["refused"]:
            assert str(escape(cell["refused"].split(":")[0])) in html
    assert "Efficacy against cost" in html
    assert grid_verdict(result).split(",")[0] in html
    assert "http-equiv" in html
    assert 'src="http' not in html


def test_a_heat_map_starts_at_what_chance_scores(grid: tuple[Path, dict[str, Any]]) -> None:
    """A ranking that says nothing has an area of 0.5 under its curve, and is as cold as an LDS of 0."""
    figure = {"mean": 0.5, "low": 0.5, "high": 0.5}
    cell = grid[1]["cells"][0]
    result = {**grid[1], "baselines": [], "cells": [{**cell, "measures": {"mislabel": figure, "lds": figure}}]}
    result["methods"] = [m for m in result["methods"] if m["name"] == cell["method"]]
    result["ensembles"] = [e for e in result["ensembles"] if e["name"] == cell["ensemble"]]
    maps = {m["name"]: m["rows"][0]["cells"][0]["heat"] for m in grid_content(result)["maps"]}
    assert maps["mislabel"] == 0 < maps["lds"]


def test_a_second_run_makes_nothing_again(grid: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, before = grid

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("byline.TRAK.fit", never)
    monkeypatch.setattr("byline.Influence.fit", never)
    monkeypatch.setattr(judges, "out_of_sample", lambda shop: (np.arange(80.0), 1.0))
    monkeypatch.setattr(Trainer, "many", never)
    again = run(small(), folder, method_names=METHODS, ensembles=ENSEMBLES, bank_recipe=BANK)
    assert cells(again).keys() == cells(before).keys()
    for key, cell in cells(again).items():
        assert cell == cells(before)[key], key


def test_measures_that_retrain_are_run_when_asked_for(tmp_path: Path) -> None:
    result = run(
        small(),
        tmp_path,
        method_names=["grad-dot"],
        ensembles=["independent-1"],
        measures=["loo", "removal", "brittleness"],
        queries=4,
    )
    measured = result["cells"][0]["measures"]
    assert set(measured) == {"loo", "removal", "brittleness"}
    assert -1 <= measured["loo"]["mean"] <= 1
    assert np.isfinite(measured["removal"]["mean"])


def test_what_is_beyond_what_never_saw_trained_weights_is_asked_for(tmp_path: Path) -> None:
    setting, recipe = small(), replace(BANK, subsets=20)
    options = {"method_names": ["grad-dot"], "ensembles": ["independent-1"], "bank_recipe": recipe}
    result = run(setting, tmp_path, measures=["lds", "beyond"], queries=8, **options)
    first = torch.utils.data.Subset(setting.test_set, range(8))
    known = [controls.untrained(setting, test_set=first), controls.simplest(setting, test_set=first)]
    known += [values[:8] for values in controls.nearness(setting).values()]
    whole = Workshop(setting, tmp_path, print, False).bank(recipe)
    bank = byline.Bank(whole.subsets, whole.outputs[:, :, :8])
    (path,) = (tmp_path / "scores").glob("*.safetensors")
    own = byline.partial_lds(byline.Scores.load(path), known, bank)
    (cell,) = result["cells"]
    figure = cell["measures"]["beyond"]
    assert (figure["mean"], figure["low"]) == pytest.approx((own.mean, own.interval[0]), abs=1e-3)
    assert figure["ceiling"] == pytest.approx(own.ceiling, abs=1e-3)
    assert [line["measure"] for line in result["baselines"]] == ["lds"] * 5
    means = [byline.lds(values, bank).mean for values in known]
    assert [line["mean"] for line in result["baselines"]] == pytest.approx(means, abs=1e-3)
    page = report.build(result, tmp_path / "grid.html").read_text()
    assert page.count("never saw trained weights</small>") == 5
    assert f"no method come further than {own.ceiling:.2f}" in page
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "controls").iterdir()}
    again = run(setting, tmp_path, measures=["beyond"], queries=8, **options)
    assert again["baselines"] == []
    assert again["cells"][0]["measures"]["beyond"] == figure
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "controls").iterdir()} == made
    few = run(
        setting, tmp_path, measures=["beyond", "lds"], queries=8, **{**options, "bank_recipe": replace(BANK, subsets=9)}
    )
    assert len(few["baselines"]) == 2, "a bank of nine subsets lets two be known"
    none = run(
        setting, tmp_path, measures=["beyond"], queries=8, **{**options, "bank_recipe": replace(BANK, subsets=3)}
    )
    assert none["cells"][0]["measures"]["beyond"] is None
    assert "Partial LDS" in report.build(none, tmp_path / "none.html").read_text()


def test_untrained_models_are_none_of_those_that_vote() -> None:
    setting = small()
    states = []
    for number in range(2):
        torch.manual_seed(controls.SEEDS + 3000 + number)
        states.append(setting.build().state_dict())
    attributor = byline.TRAK(setting.task(), byline.Independent(states), progress=False).fit(setting.train_set)
    expected = attributor.attribute(setting.test_set).values
    before = torch.random.get_rng_state()
    np.testing.assert_allclose(controls.untrained(setting, 2, 3), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_simplest_model_is_trained_once_for_a_third_of_the_epochs() -> None:
    setting = replace(small(), recipe=replace(small().recipe, epochs=18))
    task = setting.task().with_model(setting.simplest().eval())
    recipe = replace(setting.recipe, epochs=6)
    ensemble = byline.train_ensemble(
        task, setting.train_set, recipe, models=1, build=setting.simplest, seed=2, progress=False
    )
    expected = byline.TRAK(task, ensemble, progress=False).fit(setting.train_set).attribute(setting.test_set).values
    found = controls.simplest(setting, 2)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999
    longer = replace(setting, recipe=replace(setting.recipe, epochs=54))
    assert np.corrcoef(controls.simplest(longer, 2).ravel(), expected.ravel())[0, 1] < 0.999
    with pytest.raises(ValueError, match="has no simpler model"):
        controls.simplest(replace(setting, simplest=None))


def test_kernel_ridge_scores_are_contributions_to_a_prediction() -> None:
    """By hand: H(z, ·) of scikit-learn's solution, and what is left of the one-hot labels."""
    from sklearn.kernel_ridge import KernelRidge

    setting = small()
    (x, y), (asked, labels) = (tuple(t.numpy() for t in data.tensors) for data in (setting.train_set, setting.test_set))
    x, asked = x.reshape(len(x), -1).astype(float), asked.reshape(len(asked), -1).astype(float)
    distance = ((asked[:, None] - x[None]) ** 2).sum(-1)
    width = float(torch.as_tensor(distance).median())
    fitted = KernelRidge(alpha=0.1, kernel="rbf", gamma=1 / width).fit(x, np.eye(len(x)))
    hat, among = fitted.predict(asked), fitted.predict(x)
    target = np.eye(int(y.max()) + 1)[y]
    expected = hat * (target - among @ target)[:, labels].T
    found = controls.nearness(setting)
    np.testing.assert_allclose(found["kernel ridge"], expected, atol=1e-5)
    same = labels[:, None] == y[None]
    np.testing.assert_allclose(
        found["nearer"], np.exp(-distance / (width / 4)) * np.where(same, 1, -1 / y.max()), atol=1e-5
    )


def test_flipped_labels_are_known_from_the_draw() -> None:
    setting = small()
    flipped = judges.relabelled(setting)
    before, after = judges.labels_of(setting.train_set), judges.labels_of(flipped.train_set)
    np.testing.assert_array_equal(before != after, judges.mask_of(flipped))
    assert (before != after).sum() == 8


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("independent-5", Row("independent", 5)),
        ("dropout-1x10", Row("dropout", 1, 10, {"p": 0.5})),
        ("dropout-5x10", Row("dropout", 5, 10, {"p": 0.3})),
        ("forward-only-1x4:p=0.2", Row("forward-only", 1, 4, {"p": 0.2})),
        ("lora-1x4:rank=2", Row("lora", 1, 4, {"rank": 2, "epochs": 3, "lr": 1e-3})),
        ("noise-1x10", Row("weight noise", 1, 10, {"scale": 0.6})),
        ("trajectory-2x3", Row("trajectory", 2, 3)),
    ],
)
def test_names_of_ensembles(text: str, row: Row) -> None:
    assert parse(text) == row


@pytest.mark.parametrize("text", ["masks-1x2", "dropout", "dropout-1x10:rate=1", "dropout-1x10:p=much", "lora-0x1"])
def test_unknown_ensembles_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|takes|at least one"):
        parse(text)
    assert all(parse(name) for name in GRID)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "trakk"], "no method trakk"),
        (["--methods", "trak", "--measures", "auc"], "no measure auc"),
        (["--methods", "trak", "--queries", "0"], "queries is 0"),
        (["--ensembles", "mask-1x2"], "ensemble 'mask-1x2'"),
    ],
)
def test_the_command_line_names_what_it_does_not_know(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "digits-mlp", "--out", str(tmp_path), *options])
    assert done.exit_code == 1
    assert message in done.stderr.replace("\n", "")


def test_methods_are_listed_with_their_sources() -> None:
    done = CliRunner().invoke(cli.app, ["methods", "--json"])
    listed = json.loads(done.stdout)
    assert [info["name"] for info in listed] == [info.name for info in methods()]
    assert all(info["citation"] for info in listed)
    plain = CliRunner().invoke(cli.app, ["methods"])
    assert "influence-ekfac" in plain.stdout
