"""bench/frontier.py: what it measures is what the library gives, and a killed run goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import byline
import reference as ref
from byline.settings import controls
from test_bench import small

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
frontier = pytest.importorskip("frontier")


@pytest.fixture(scope="module")
def setting():
    made = small()
    return replace(made, recipe=replace(made.recipe, epochs=10))


def options(**given):
    plain = {
        "seeds": 1,
        "first_seed": 0,
        "only": None,
        "max_members": 0,
        "max_runs": 0,
        "again": False,
        "other_bank": False,
        "other_class": False,
    }
    return SimpleNamespace(**{**plain, "hessians": ["unweighted", "weighted"], **given})


@pytest.mark.parametrize("strategy", [s for s in frontier.STRATEGIES if s.members() <= 6 and not s.change])
def test_every_variant_is_what_the_library_gives(setting, tmp_path, strategy):
    strategy = replace(strategy, columns=min(strategy.columns, 20))
    trainers = frontier.trainers_of(strategy, setting, tmp_path, 0)
    setting, (ensemble, training, weights) = trainers.setting, trainers.ensemble(strategy)
    assert len(ensemble) == strategy.members()
    assert training.flops > 0
    assert weights > 0
    features = byline.Factorized(strategy.columns, basis="pca") if strategy.columns else byline.Exact()
    shared = {"features": features, "progress": False}
    for hessian in ("unweighted", "weighted"):
        studied = frontier.Studied(setting.task(), ensemble, hessian=hessian, **shared).fit(setting.train_set)
        kernel = studied.study(setting.test_set)
        found = studied.residuals_of_each()
        assert ("out-of-sample" in found) == bool(strategy.parts)
        for residual, q in found.items():
            plain = byline.TRAK(setting.task(), ensemble, hessian=hessian, residual=residual, **shared)
            ref.assert_close(kernel * q.numpy(), plain.fit(setting.train_set).attribute(setting.test_set).values)


def test_a_killed_run_goes_on_and_the_table_needs_no_models(setting, tmp_path, capsys):
    only = ["independent 1", "short halves 2", "forward-only 1×10"]
    frontier.run(options(only=only), setting, tmp_path)
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "records").iterdir()}
    assert "short-halves-2-0.json" in first
    (tmp_path / "records" / "short-halves-2-0.json").unlink()
    frontier.run(options(only=only), setting, tmp_path)
    second = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "records").iterdir()}
    assert {name for name in first if first[name] != second[name]} == {"short-halves-2-0.json"}
    capsys.readouterr()
    frontier.report(tmp_path, setting.name, None)
    said = capsys.readouterr().out
    assert "CHOSEN on it" in said
    frontier.report(tmp_path, "fashion-mlp", 0.8)
    assert "JUDGED on it. Noise ceiling 0.800" in capsys.readouterr().out
    assert "independent 1*" in said
    result = json.loads((tmp_path / "frontier.json").read_text())
    row = next(row for row in result["rows"] if row["name"] == "short halves 2")
    assert row["trainings"] == pytest.approx(1 / 2, rel=0.2), "two halves of half the epochs"
    assert "weighted out-of-sample" in row["lds"]
    assert (tmp_path / "frontier.html").stat().st_size > 10**5


def published(name, *rows):
    """The published row of a name once these are there, too."""
    (found,) = [row for row in frontier.published("digits-mlp", list(rows)) if row["name"] == name]
    return found


def test_published_rows_stay_where_there_are_no_records(capsys):
    old = published("independent 5")
    assert old["seeds"] == 3
    new = {**old, "seeds": 4, "seed_list": [0, 1, 2, 3], "space": 1.0}
    rows = frontier.published("digits-mlp", [new])
    names = [row["name"] for row in rows]
    assert published("independent 5", new)["space"] == 1, "a record replaces what was published"
    assert names.count("independent 5") == 1
    assert {"independent 1", "short halves 6"} <= set(names)
    order = [strategy.name for strategy in frontier.STRATEGIES]
    assert names == sorted(names, key=order.index)
    few = {**old, "seeds": 1, "seed_list": [1], "space": 1.0}
    assert published("independent 5", few) == old, "fewer seeds do not replace more"
    assert published("independent 5", {**few, "other": {"new": [0.3]}})["other"]["new"] == [0.3]
    assert "independent 5: 3 seeds are published" in capsys.readouterr().out
    assert frontier.published("a setting of mine", [new]) == [new]


def test_queries_of_whole_runs_cost_what_one_costs_times_their_number():
    one = {**published("independent 1"), "serving": 7.0}
    assert [published(f"independent {runs}", one)["serving"] for runs in (1, 2, 25)] == [7, 14, 175]
    dearer = published("5 short runs")
    assert published("5 short runs", one) == dearer, "other strategies keep what was measured"


def test_a_record_does_not_delete_what_it_does_not_say():
    old = published("independent 5")
    unweighted = {v: [0.1] * 3 for v in old["lds"] if v.startswith("unweighted")}
    new = published("independent 5", {**old, "lds": unweighted, "other": {}, "trainings": float("nan")})
    assert new["other"] == old["other"]
    assert new["lds"]["weighted mean"] == old["lds"]["weighted mean"]
    assert new["lds"]["unweighted mean"] == [0.1] * 3
    assert new["trainings"] == old["trainings"]


def test_published_seeds_and_others_are_one_row():
    old = published("independent 5")
    costs = {name: 2 * old[name] for name in ("training", "fitting", "serving", "space")}
    new = {**old, **costs, "seeds": 1, "seed_list": [3], "trainings": float("nan"), "other": {}}
    new["lds"] = {"unweighted mean": [0.5], "new": [0.1]}
    both = published("independent 5", new)
    assert both["seeds"] == 4
    assert both["seed_list"] == [0, 1, 2, 3]
    assert both["lds"]["unweighted mean"] == [*old["lds"]["unweighted mean"], 0.5]
    assert both["lds"]["new"] == [0.1]
    assert both["other"] == old["other"]
    assert both["trainings"] == old["trainings"], "without a record of one training there is no unit"
    assert both["space"] == pytest.approx(old["space"] * (3 + 2) / 4)
    assert published("independent 5", {**new, "seed_list": [2]}) == old, "a seed does not count twice"
    other = {**new, "strategy": {**new["strategy"], "columns": 9}}
    assert published("independent 5", other) == old, "another strategy of the same name is not added"
    (alone,) = frontier.published("a setting of mine", [{**new, "seeds": 3, "seed_list": [3, 4, 5]}])
    assert alone["seeds"] == 3


@pytest.mark.parametrize(
    ("name", "epochs"), [("full", (30, 10, 4, 2)), ("short", (10, 5, 4, 2)), ("brief", (6, 3, 3, 2))]
)
def test_shorter_runs_are_of_at_least_so_many_epochs(name, epochs):
    assert tuple(frontier.epochs_of(name, whole) for whole in (30, 10, 4, 2)) == epochs


def test_a_whole_name_asks_for_that_strategy_alone(setting):
    names = {s.name for s in frontier.chosen(options(only=["independent 1", "short halves"]), setting)}
    assert "independent 10" not in names
    assert {"independent 1", "short halves 2", "short halves 6"} < names


def test_narrower_models_have_a_folder_of_their_own_and_cost_less(setting, tmp_path):
    whole = frontier.STRATEGIES[0]
    half = replace(whole, name="half", width=0.5)
    found = [frontier.trainers_of(s, setting, tmp_path, 0) for s in (whole, half)]
    assert [t.setting.width for t in found] == [64, 32]
    (_, cost, weights), (ensemble, less, fewer) = (t.ensemble(s) for t, s in zip(found, (whole, half), strict=True))
    assert less.flops < cost.flops / 2
    assert fewer < weights
    state = next(iter(ensemble.members())).weights.load()
    assert {tuple(tensor.shape) for tensor in state.values()} >= {(32, 64), (16, 32), (10, 16)}
    assert (tmp_path / "width-32").is_dir()
    with pytest.raises(ValueError, match="the model of digits-mlp has one width"):
        half.on(replace(setting, width=0))


def test_the_simplest_model_is_linear(setting, tmp_path):
    one = next(s for s in frontier.STRATEGIES if s.name == "1 short run of the simplest model, int8")
    own = frontier.trainers_of(one, setting, tmp_path, 0).setting
    x = setting.test_set.tensors[0]
    model = own.build()
    torch.testing.assert_close(model(x) + model(0 * x), model(x / 2) * 2)
    with pytest.raises(ValueError, match="digits-mlp has no simpler model"):
        one.on(replace(setting, simplest=None))


def test_scores_of_two_strategies_are_blended_and_their_costs_added(setting, tmp_path, monkeypatch):
    one, other = frontier.Strategy("one", 1, "short"), frontier.Strategy("other", 1, "short", simplest=True)
    both = replace(one, name="both", beside="other")
    monkeypatch.setattr(frontier, "STRATEGIES", (one, other, both))
    truth = byline.retrain(
        setting.trainer(), setting.train_set, test_set=setting.test_set, task=setting.task(), subsets=8, seeds=1,
        progress=False,
    )  # fmt: skip
    found = [frontier.measure(s, setting, tmp_path, 0, [truth], ["unweighted"]) for s in (one, other, both)]
    for what in ("training", "serving"):
        assert found[2][what]["flops"] == pytest.approx(found[0][what]["flops"] + found[1][what]["flops"])
    assert found[2]["space"] == found[0]["space"] + found[1]["space"]
    assert found[2]["members"] == found[2]["models"] == 2
    scores = []
    for s in (one, other):
        trainers = frontier.trainers_of(s, setting, tmp_path, 0)
        voters, task = trainers.ensemble(s)[0], trainers.setting.task()
        scores.append(byline.TRAK(task, voters, progress=False).fit(setting.train_set).attribute(setting.test_set))
    by_hand = byline.lds(byline.blend(*scores), truth).mean
    assert found[2]["variants"][0]["lds"] == pytest.approx(by_hand, abs=1e-3)
    assert found[0]["variants"][0]["lds"] != pytest.approx(by_hand, abs=1e-3)


def test_parameters_are_chosen_by_pattern(setting):
    first = next(iter(dict(setting.build().named_parameters())))
    narrow = replace(frontier.STRATEGIES[0], params=(first,))
    assert narrow.task(setting).fingerprint() != setting.task().fingerprint()
    assert narrow.key() != frontier.STRATEGIES[0].key()
    assert "params" not in frontier.STRATEGIES[0].key(), "records from before are still found"


def test_what_a_setting_refuses_is_a_row_that_says_so(setting, tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no dropout here")

    monkeypatch.setattr(frontier, "measure", refuse)
    frontier.run(options(only=["1 short run"]), setting, tmp_path)
    assert json.loads((tmp_path / "records" / "1-short-run-0.json").read_text())["refused"] == "no dropout here"
    assert frontier.summary(tmp_path)["rows"][0]["refused"] == "no dropout here"


def test_strategies_have_names_of_their_own():
    assert len({s.slug for s in frontier.STRATEGIES}) == len(frontier.STRATEGIES)
    assert np.all([s.paper for s in frontier.STRATEGIES if s.name.startswith(("independent", "LoRA", "forward"))])


def test_other_class_asks_about_no_label_and_trains_on_the_same(setting):
    other = frontier.other_class(setting)
    x, y = setting.test_set.tensors
    again, asked = other.test_set.tensors
    assert torch.equal(again, x)
    assert not bool((asked == y).any())
    assert torch.equal(frontier.other_class(setting).test_set.tensors[1], asked)
    assert all(torch.equal(a, b) for a, b in zip(other.train_set.tensors, setting.train_set.tensors, strict=True))
    assert (other.bank_recipe.subsets, other.bank_recipe.seed) == (100, setting.bank_recipe.seed + 2)


def run(name, setting, monkeypatch, *arguments):
    """A script beside the frontier's, on this setting."""
    script = pytest.importorskip(name)
    monkeypatch.setattr(script, "setting_of", lambda _: setting)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    script.main()


def test_removal_says_how_far_outputs_fall(setting, tmp_path, monkeypatch, capsys):
    given = [
        "--out",
        tmp_path,
        "--reference",
        "independent 5",
        "--only",
        "independent 5",
        "1 short run",
        "--json",
        tmp_path / "found.json",
    ]
    given += ["--examples", 4, "--sizes", 20, 5, "--models", 1, "--leave-one-out", 4, "--loo-models", 2]
    run("removal", setting, monkeypatch, *given)
    said = capsys.readouterr().out
    assert "fall without 5" in said
    assert "as many random examples" in said
    found = json.loads((tmp_path / "found.json").read_text())
    first, second = found["each"]
    assert np.isfinite([row[kind] for row in (first, second) for kind in ("moved", "control")]).all()
    rows = {row["name"]: row for row in found["rows"]}
    more = rows["1 short run"]["fall without 5, more"][0]
    assert more == pytest.approx(np.mean(second["moved"][0]) - np.mean(first["moved"][0]))
    assert rows["1 short run"]["fall without 20"][0] == pytest.approx(np.mean(second["moved"][1]))
    assert "leave-one-out, more" not in rows["independent 5"]
    assert np.shape(first["moved"]) == (2, 4)
    assert first["control"] == second["control"], "as many random examples, the same for all"
    assert first["moved"] != second["moved"]
    bank = byline.Bank.load(tmp_path / "removal" / "leave-one-out-4-2.safetensors")
    # by hand: what the strategy's scores name for the second test example is what was taken out
    voters = frontier.Trainers(setting, tmp_path / "frontier-models", 0).ensemble(frontier.STRATEGIES[2])[0]
    scores = byline.TRAK(setting.task(), voters, progress=False).fit(setting.train_set).attribute(setting.test_set)
    by_hand = byline.leave_one_out(scores, bank).mean
    assert rows["independent 5"]["leave-one-out"][0] == pytest.approx(by_hand, abs=0.02)
    (file,) = (tmp_path / "removal").glob("removal-independent-5-*.safetensors")
    bank = byline.Bank.load(file)
    gone = np.flatnonzero(~bank.subsets[1 + 1])
    assert set(gone) == set(scores.top(5)[1].proponents.indices)
    assert first["moved"][0][1] == pytest.approx(float(bank.outputs[0, 0, 1] - bank.outputs[2, 0, 1]), rel=1e-5)
    assert len(list((tmp_path / "removal").glob("scores-*.safetensors"))) == 2
    with monkeypatch.context() as patched:
        patched.setattr(byline, "TRAK", None)
        run("removal", setting, patched, *given)  # started again, it does not score again
        assert capsys.readouterr().out == said
    narrow = "5 full runs of half the width, int8"
    with pytest.raises(SystemExit, match=f"{narrow}: the model of digits-mlp has one width"):
        run("removal", replace(setting, width=0), monkeypatch, "--out", tmp_path, "--only", narrow, "independent 25")
    with pytest.raises(SystemExit, match="no strategy nonsense"):
        run("removal", setting, monkeypatch, "--out", tmp_path, "--only", "nonsense")


def test_what_strategies_say_beyond_what_never_saw_trained_weights(setting, tmp_path, monkeypatch, capsys):
    given = ["--out", tmp_path, "--seeds", 2, "--bootstrap", 50, "--untrained", 2, "--reference", "independent 1"]
    given += ["--json", tmp_path / "found.json", "--only"]
    simplest = "1 short run of the simplest model, int8"
    monkeypatch.setattr(frontier.Workshop, "bank", lambda *_: bank)
    bank = byline.retrain(
        setting.trainer(), setting.train_set, test_set=setting.test_set, task=setting.task(), subsets=20, progress=False
    )
    run("beyond", setting, monkeypatch, *given, "independent 1", "1 short run", simplest)
    assert "more than independent 1" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    reference, one, itself = found["rows"]

    def scores(name, **variant):
        (strategy,) = frontier.named(name)
        trainers = frontier.trainers_of(strategy, setting, tmp_path / "frontier-models", 1)
        attributor = byline.TRAK(
            trainers.setting.task(), trainers.ensemble(strategy)[0], features=strategy.features(trainers.setting),
            progress=False, **variant,
        )  # fmt: skip
        return attributor.fit(setting.train_set).attribute(setting.test_set).values

    own, known = scores("1 short run"), [scores(simplest), controls.untrained(setting, 2, 1)]
    known += controls.nearness(setting).values()
    for place, of in enumerate(found["known"]):
        others = [values for i, values in enumerate(known) if i != place]
        assert of["name"] == ("simplest", "untrained", *controls.NEAR)[place]
        assert of["lds"][1] == pytest.approx(byline.lds(known[place], bank, bootstrap=0).mean, abs=1e-3)
        rest = byline.partial_lds(known[place], others, bank, bootstrap=0)
        assert of["beyond"][1] == pytest.approx(rest.mean, abs=1e-3)
    assert one["simplest"][1] == pytest.approx(byline.partial_lds(own, known[0], bank, bootstrap=0).mean, abs=1e-3)
    assert one["all"][1] == pytest.approx(byline.partial_lds(own, known, bank, bootstrap=0).mean, abs=1e-3)
    assert one["lds"][1] == pytest.approx(byline.lds(own, bank, bootstrap=0).mean, abs=1e-3)
    more = byline.lds_difference(own, scores("independent 1"), bank, given=known, bootstrap=50)
    assert [one[name][1] for name in ("more", "low", "high")] == pytest.approx([more.mean, *more.interval], abs=1e-3)
    assert itself["simplest"] == itself["all"] == [0, 0]
    assert reference["more"] == []
    variant = ["--residual", "sqrt", "--hessian", "weighted", "--reference-residual", "sqrt"]
    run("beyond", setting, monkeypatch, *variant, *given, "independent 1", "1 short run")
    reference, one = json.loads((tmp_path / "found.json").read_text())["rows"]
    own = scores("1 short run", residual="sqrt", hessian="weighted")
    assert one["lds"][1] == pytest.approx(byline.lds(own, bank, bootstrap=0).mean, abs=1e-3)
    best = scores("independent 1", residual="sqrt")
    more = byline.lds_difference(own, best, bank, given=known, bootstrap=50)
    assert one["more"][1] == pytest.approx(more.mean, abs=1e-3)
    assert len(reference["more"]) == 2, "the reference keeps the Hessian of its default"
    with pytest.raises(SystemExit, match=f"{simplest}: digits-mlp has no simpler model"):
        run("beyond", replace(setting, simplest=None), monkeypatch, *given, "1 short run")


def test_layers_are_compared_alone_and_left_out(setting, tmp_path, monkeypatch, capsys):
    given = ["--out", tmp_path, "--strategies", "1 short run", "--seeds", 1, "--json", tmp_path / "found.json"]
    run("layers", setting, monkeypatch, *given)
    rows = {row["layers"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    whole = rows.pop("all")
    alone = [row for title, row in rows.items() if title.endswith("alone")]
    assert sum(row["parameters"] for row in alone) == whole["parameters"]
    assert all(row["serving"] < whole["serving"] for row in alone)
    assert len({row["lds"][0] for row in [whole, *alone]}) == 1 + len(alone)
    assert "serving a query" in capsys.readouterr().out
    blended = "5 checkpoints of a short run, and the simplest model, int8"
    with pytest.raises(SystemExit, match="blends two models"):
        run("layers", setting, monkeypatch, "--out", tmp_path, "--strategies", blended)


def test_costs_are_in_trainings_of_one_model_or_nothing_is_said(setting, tmp_path):
    frontier.run(options(only=["1 short run"]), setting, tmp_path)
    with pytest.raises(SystemExit, match='the unit of training is that of "independent 1"'):
        frontier.report(tmp_path, "a setting of mine", None)
    frontier.report(tmp_path, "digits-mlp", None)
    (row,) = json.loads((tmp_path / "frontier.json").read_text())["rows"]
    (one,) = [row for row in frontier.kept("digits-mlp") if row["name"] == "independent 1"]
    assert row["trainings"] == pytest.approx(row["training"] / one["training"])
