"""Advice is what the measurements say, within the budget, and its code runs."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import byline
from byline.cli import app
from byline.recommend import budget, measured, recommend

PLAIN = {
    "runs": 1, "length": "full", "checkpoints": 0, "parts": 0, "cycles": 0, "change": "", "each": 1, "options": {},
    "columns": 0, "validation": 0.0, "paper": True,
}  # fmt: skip


def row(name, trainings, serving, space, lds, **strategy):
    strategy = {**PLAIN, "name": name, **strategy}
    return {
        "name": name, "trainings": trainings, "serving": serving, "space": space, "strategy": strategy,
        "refused": None, "lds": lds,
    }  # fmt: skip


def setting(name, output="classification", ceiling=0.8, scale=1.0):
    return {
        "setting": name,
        "output": output,
        "ceiling": ceiling,
        "rows": [
            row("independent 1", 1, 10, 100, {"unweighted mean": [0.2 * scale, 0.3 * scale]}),
            row("independent 5", 5, 50, 500, {"unweighted mean": [0.5 * scale, 0.5 * scale]}, runs=5),
            row(
                "checkpoints", 0.33, 30, 300,
                {"unweighted mean": [0.4 * scale], "weighted sqrt": [0.6 * scale]}, length="short", checkpoints=3,
            ),
            row("masks", 1, 100, 100, {"unweighted mean": [0.7 * scale]}, change="dropout", each=2, options={"p": 0.5}),
            {"name": "refused", "strategy": PLAIN, "refused": "no"},
        ],
    }  # fmt: skip


def test_the_best_within_the_budget():
    data = {"a": setting("a")}
    assert [a.strategy for a in recommend("a", {}, data=data)] == ["masks", "checkpoints", "independent 5"]
    one = recommend("a", {"trainings": 1, "serving": 1}, data=data)
    assert [a.strategy for a in one] == ["checkpoints", "independent 1"]
    assert (one[0].hessian, one[0].residual) == ("weighted", "sqrt")
    assert one[0].share == pytest.approx(0.6 / 0.8)
    assert (one[0].serving, one[0].space) == (pytest.approx(0.6), pytest.approx(0.6))
    assert (one[1].low, one[1].high) == (0.2, 0.3)
    assert one[0].reason == "number 1 of 2 strategies within the budget; independent models alone reach 31%"
    assert "beyond it" in recommend("a", {"trainings": 0.5}, data=data)[0].reason
    assert len(recommend("a", {}, count=1, data=data)) == 1
    with pytest.raises(ValueError, match="nothing measured is within it; the least there is"):
        recommend("a", {"trainings": 0.1}, data=data)
    with pytest.raises(ValueError, match="c was not measured; expected one of a"):
        recommend("c", {}, data=data)


@pytest.mark.parametrize(
    ("strategy", "features"),
    [
        ({}, None),
        ({"columns": 64}, 'byline.Factorized(64, basis="pca")'),
        ({"columns": 64, "dtype": "int8"}, 'byline.Factorized(64, basis="pca", dtype="int8")'),
        ({"rank": 32, "dtype": "int8"}, 'byline.LowRank(32, dtype="int8")'),
        ({"dtype": "int8"}, 'byline.Exact(dtype="int8")'),
        ({"rank": 32}, "byline.LowRank(32)"),
        ({"rank": 32, "columns": 9}, "byline.LowRank(32, columns=9)"),
        ({"columns": 64, "preconditioned": True}, 'byline.Preconditioned(byline.Factorized(64, basis="pca"))'),
        ({"preconditioned": True}, "byline.Preconditioned(byline.Exact())"),
        (
            {"columns": 64, "components": 8, "dtype": "int8"},
            'byline.Principal(byline.Factorized(64, basis="pca", dtype="int8"), 8, dtype="int8")',
        ),
    ],
)
def test_the_code_names_the_features(strategy, features):
    data = setting("a")
    data["rows"].append(row("small", 0.1, 1, 1, {"unweighted mean": [0.9]}, **strategy))
    (one,) = recommend("a", {}, count=1, data={"a": data})
    call = one.code.splitlines()[-1]
    assert (
        call == f"attributor = byline.TRAK(task, ensemble{f', features={features}' if features else ''}).fit(train_set)"
    )


@pytest.mark.parametrize(("dtype", "last"), [("float32", ""), ("int8", ', dtype="int8"')])
def test_the_code_names_the_features_of_the_setting(dtype, last):
    data = {**setting("a"), "features": "Factorized(2048, basis='pca')"}
    data["rows"].append(row("small", 0.1, 1, 1, {"unweighted mean": [0.9]}, dtype=dtype))
    (one,) = recommend("a", {}, count=1, data={"a": data})
    assert f"features=byline.Factorized(2048, basis='pca'{last})).fit" in one.code


def test_the_code_of_narrower_models_asks_for_one_and_changes_the_task():
    data = setting("a")
    data["rows"].append(row("small", 0.1, 1, 1, {"unweighted mean": [0.9]}, width=0.5))
    (one,) = recommend("a", {}, count=1, data={"a": data})
    said, line, *_ = one.code.splitlines()
    assert said == "# narrow: your architecture, 0.5 times as wide, in eval mode"
    assert line == "task = task.with_model(narrow)"


def test_a_simplest_model_is_advice_for_the_settings_that_have_one():
    data = setting("a")
    data["rows"].append(row("linear", 0.0, 1, 1, {"unweighted mean": [0.9]}, simplest=True))
    (one,) = recommend("a", {}, count=1, data={"a": data})
    assert (one.strategy, one.code.splitlines()[1]) == ("linear", "task = task.with_model(simplest)")
    task = byline.Task(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)).eval())
    assert "linear" not in {a.strategy for a in recommend(task, {}, count=99, data={"a": data})}


def test_the_code_makes_shorter_runs_and_chooses_parameters():
    data = {**setting("a"), "features": "Factorized(2048, basis='pca')"}
    own = {"length": "brief", "params": ["head.*"], "exact": True, "dtype": "int8"}
    data["rows"].append(row("small", 0.1, 1, 1, {"unweighted mean": [0.9]}, **own))
    (one,) = recommend("a", {}, count=1, data={"a": data})
    first, *_, chosen, last = one.code.splitlines()
    assert first == "recipe = dataclasses.replace(recipe, epochs=max(recipe.epochs // 5, min(3, recipe.epochs)))"
    assert chosen == "task = task.choosing(['head.*'])"
    assert last == 'attributor = byline.TRAK(task, ensemble, features=byline.Exact(dtype="int8")).fit(train_set)'
    found = recommend(byline.Task(nn.Linear(2, 2)), {}, count=9, data={"a": data})
    assert "small" not in [one.strategy for one in found], "the names are another model's"


def test_settings_of_few_strategies_count_where_there_are_no_others(monkeypatch):
    monkeypatch.setattr("byline.recommend.WIDE", 4)
    task = byline.Task(nn.Linear(2, 2))
    few = {**setting("few"), "rows": setting("few")["rows"][:2]}
    both = recommend(task, {}, count=9, data={"a": setting("a"), "few": few})
    assert {one.settings for one in both} == {("a",)}
    assert {one.settings for one in recommend(task, {}, count=9, data={"few": few})} == {("few",)}
    assert [one.settings for one in recommend("few", {}, count=1, data={"a": setting("a"), "few": few})] == [("few",)]


def test_a_task_is_advised_by_settings_like_it():
    data = {"a": setting("a"), "b": setting("b", scale=0.5), "r": setting("r", "regression", scale=0.1)}
    task = byline.Task(nn.Linear(3, 2).eval())
    found = recommend(task, {}, data=data)
    assert found[0].settings == ("a", "b")
    assert [a.strategy for a in found] == ["checkpoints", "independent 5", "independent 1"], "it has no dropout layer"
    assert (found[0].low, found[0].high) == (pytest.approx(0.3), pytest.approx(0.6))
    other = byline.Task(nn.Linear(3, 2).eval(), output=lambda m, b: m(b[0])[:, 0])
    assert recommend(other, {}, data=data)[0].settings == ("a", "b", "r")


@pytest.mark.parametrize("text", ["trainings", "trainings=x", "trainings=0", "money=3", "trainings=nan"])
def test_budgets_are_checked(text):
    with pytest.raises(ValueError, match="expected numbers above 0 such as trainings=1"):
        budget(text)
    assert budget("trainings=1, space=0.5") == {"trainings": 1.0, "space": 0.5}


def test_what_ships_is_there_and_every_advice_runs():
    data = measured()
    assert "digits-mlp" in data
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    train_set = TensorDataset(x, (x[:, 0] > 0).long())
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2)).eval()
    scope = {
        "byline": byline,
        "dataclasses": dataclasses,
        "task": byline.Task(model),
        "narrow": nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 2)).eval(),
        "simplest": nn.Linear(6, 2).eval(),
        "train_set": train_set,
        "test_set": TensorDataset(x[:5], train_set.tensors[1][:5]),
        "recipe": byline.Recipe(lr=0.05, batch_size=40, epochs=30),
    }
    advice = recommend("digits-mlp", {}, count=100)
    assert len(advice) > 20
    tried: set[str] = set()
    for one in advice:
        shape = re.sub(r"[0-9.]+", "0", one.code)
        if shape in tried or "models=25" in one.code:
            continue  # the same code with other numbers
        tried.add(shape)
        here = dict(scope)
        exec(one.code, here)
        assert here["attributor"].n_train_ == 40, one.strategy
        if "byline.blend" in one.code:
            blended = here["scores"]
            assert blended.shape == (5, 40)
            assert here["attributor"].task.model is not here["simplest"]
    assert blended.info["method"] == "blend"


def test_on_the_command_line(tmp_path, monkeypatch):
    done = CliRunner().invoke(app, ["recommend", "digits-mlp", "--budget", "trainings=1", "--count", "1"])
    assert done.exit_code == 0, done.output
    assert "train_ensemble(task, train_set, recipe" in done.output
    assert "of the noise ceiling" in done.output
    (tmp_path / "mine.py").write_text(
        "import byline\nfrom torch import nn\ndef task():\n    return byline.Task(nn.Linear(3, 2).eval())\n"
    )
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["recommend", "mine:task", "--json"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["recommend", "digits-mlp", "--budget", "trainings=0.0001"])
    assert done.exit_code == 1
    assert "nothing measured is within it" in done.output
