"""The comparison, end to end on a small scale: every kind of row, and a second run that makes nothing again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from byline import report, settings
from byline.ledger import Cost
from byline.settings.base import BankRecipe, Setting
from byline.settings.bench import run
from byline.settings.rows import QUICK, Row, rows_of
from byline.settings.workshop import Trained, _load, _save, save_json
from byline.training import Trainer

BANK = BankRecipe(subsets=5, fraction=0.5, seeds=2)
SMALL = (
    Row("independent", 1),
    Row("independent", 2),
    Row("dropout", 2, 2, {"p": 0.5}),
    Row("forward-only", 1, 3, {"p": 0.5}),
    Row("lora", 1, 2, {"rank": 2, "epochs": 1, "lr": 1e-3}),
    Row("weight noise", 1, 2, {"scale": 0.5}),
    Row("trajectory", 1, 2),
)


def small() -> Setting:
    digits = settings.get("digits-mlp")

    def load() -> tuple[TensorDataset, TensorDataset]:
        train, test = digits.load()
        return TensorDataset(*(t[:80] for t in train.tensors)), TensorDataset(*(t[:12] for t in test.tensors))

    return replace(digits, load=load, recipe=replace(digits.recipe, epochs=3))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    folder, said = tmp_path_factory.mktemp("run"), []
    result = run(small(), folder, rows=SMALL, bank_recipe=BANK, command="byline demo", tell=said.append)
    return folder, result, said


def test_every_row_is_measured(first: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, result, _ = first
    rows = {row["kind"]: row for row in result["rows"][1:]}
    assert [row["name"] for row in result["rows"]] == [row.name for row in SMALL]
    for row in result["rows"]:
        assert -1 <= row["lds"] <= 1
        for part in ("training", "fitting", "serving"):
            assert row[part]["flops"] > 0, (row["name"], part)
            assert row[part]["seconds"] > 0, (row["name"], part)
        assert row["space"] == sum(row["space_parts"].values())
    one = result["rows"][0]
    # Two models cost twice one; masks cost no training; adapters cost a little more; a shorter run costs less.
    assert rows["independent"]["training"]["flops"] == pytest.approx(2 * one["training"]["flops"])
    assert rows["forward-only"]["training"]["flops"] == pytest.approx(one["training"]["flops"])
    assert rows["lora"]["training"]["flops"] > one["training"]["flops"]
    assert rows["trajectory"]["training"]["flops"] == pytest.approx(one["training"]["flops"] * 2 / 3)
    # Forward-only masks leave the features alone, whatever their number; masks proper do not.
    assert rows["forward-only"]["serving"]["flops"] == pytest.approx(one["serving"]["flops"])
    assert rows["dropout"]["serving"]["flops"] == pytest.approx(4 * one["serving"]["flops"], rel=0.05)
    assert rows["forward-only"]["space"] < 1.2 * one["space"]
    assert one["saved"] is None
    assert rows["dropout"]["saved"]["naive_models"] >= 1


def test_results_are_json_beside_the_report(first: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, result, _ = first
    assert json.loads((folder / "results.json").read_text()) == result
    html = report.build(result, folder / "report.html").read_text()
    assert html.count("data:image/png") >= 10
    assert result["examples"][0]["predicted"] in "0123456789"
    for example in result["examples"]:
        assert all(item["score"] > 0 for item in example["proponents"])
        assert all(item["score"] < 0 for item in example["opponents"])


def test_a_second_run_makes_nothing_again(
    first: tuple[Path, dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result, _ = first

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(Trainer, "many", never)
    monkeypatch.setattr("byline.settings.workshop.train_lora", never)
    monkeypatch.setattr("byline.TRAK.fit", never)
    again = run(small(), folder, rows=SMALL, bank_recipe=BANK, command="byline demo")
    assert again["rows"] == result["rows"]
    assert again["examples"] == result["examples"]


def test_an_interrupted_run_goes_on(
    first: tuple[Path, dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result, _ = first
    lost = sorted((folder / "rows").iterdir())[0]
    lost.unlink()
    monkeypatch.setattr(Trainer, "many", None)
    again = run(small(), folder, rows=SMALL, bank_recipe=BANK, command="byline demo")
    assert [row["lds"] for row in again["rows"]] == [row["lds"] for row in result["rows"]]


def test_another_configuration_takes_nothing_of_this_one(
    first: tuple[Path, dict[str, Any], list[str]],
) -> None:
    folder, result, _ = first
    other = replace(small(), recipe=replace(small().recipe, lr=0.01))
    before = set((folder / "rows").iterdir())
    again = run(other, folder, rows=SMALL[:1], bank_recipe=BANK)
    assert len(set((folder / "rows").iterdir()) - before) == 1
    assert again["rows"][0]["lds"] != result["rows"][0]["lds"]


def test_rows_are_data() -> None:
    assert rows_of("a setting that is not listed") == rows_of("fashion-mlp")
    assert rows_of("digits-mlp", quick=True) == QUICK
    names = [row.name for row in rows_of("fashion-mlp")]
    assert len(set(names)) == len(names)
    assert "10 checkpoints of one short run" in names
    with pytest.raises(ValueError, match="expected one of independent"):
        Row("magic")


def test_json_keeps_its_strings_and_is_compact(tmp_path: Path) -> None:
    data = {"text": "[1,  2]\n[ 3 ]", "picture": [[0, 128], [255, 1e-9]], "none": None, "empty": []}
    save_json(tmp_path / "a.json", data)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == data
    assert "[0, 128]" in text
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_pictures_come_from_the_data(first: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, result, _ = first
    example = result["examples"][0]
    expected = small().test_set[example["index"]][0].reshape(8, 8)
    shown = torch.tensor(example["image"]) / 255
    assert torch.allclose(shown, (expected - expected.min()) / (expected.max() - expected.min()), atol=0.01)


def test_models_come_back_as_they_were(tmp_path: Path) -> None:
    state = {"weight": torch.randn(2, 3).T, "count": torch.tensor(7)}
    path = tmp_path / "models.safetensors"
    _save(path, [Trained((state,), Cost())])
    (found,) = _load(path)
    for name, tensor in state.items():
        assert found.state[name].shape == tensor.shape
        assert torch.equal(found.state[name], tensor)
