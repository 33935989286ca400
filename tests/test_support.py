"""How each parameter's gradients are had, and the page that says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import byline
from byline import cli
from byline.engines.support import grouped, paths

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import support

DATA = TensorDataset(torch.randn(20, 5, 4), torch.arange(20) % 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.rnn, self.head = nn.Parameter(torch.ones(4)), nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x * self.scale)[0][:, -1])


class Rare(nn.Module):
    """For a rare example, a weight is used behind its layer's back."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, rare = self.a(x.mean(1)), x[:, 0, 0] > 5
        if rare.any():
            more = nn.functional.linear(x.sum(1), 1 * self.a.weight)
            out = out + torch.where(rare.unsqueeze(1), more, torch.zeros_like(more))
        return out


def pair() -> tuple[byline.Task, Any]:
    return byline.Task(Net().eval()), DATA


def test_ways_are_those_that_are_taken() -> None:
    found = {one["parameter"]: one for one in paths(*pair())}
    assert [one["way"] for one in found.values()].count("vmap") == 4
    for name, one in found.items():
        assert one["way"] == ("vmap" if name.startswith("rnn") else "one pass"), name
    assert found["scale"]["layer"] == "Net"
    assert found["head.weight"] == {
        "parameter": "head.weight", "layer": "Linear", "size": 16, "way": "one pass", "how": "its layer's rule",
    }  # fmt: skip
    model = Net()
    assert sum(one["size"] for one in grouped(list(found.values()))) == sum(p.numel() for p in model.parameters())


def test_chosen_parameters_alone() -> None:
    task = byline.Task(Net().eval(), params="head.*")
    assert [one["parameter"] for one in paths(task, DATA)] == ["head.weight", "head.bias"]


def test_what_a_batch_shows_counts_too() -> None:
    x = torch.randn(20, 5, 4).clamp(-4, 4)
    x[3, 0, 0] = 9.0  # among the eight, not among the three
    found = {one["parameter"]: one for one in paths(byline.Task(Rare().eval()), TensorDataset(x, DATA.tensors[1]))}
    assert found["a.weight"]["way"] != "one pass"
    assert found["a.weight"]["how"] == "its rule does not hold in every batch"


def test_what_fit_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train mode; call model\.eval"):
        paths(byline.Task(Net()), DATA)
    with pytest.raises(ValueError, match="of is 'rows'; expected"):
        paths(*pair(), of="rows")


def test_command() -> None:
    done = CliRunner().invoke(cli.app, ["support", f"{__name__}:pair", "--json"])
    assert done.exit_code == 0, done.output
    assert {one["way"] for one in json.loads(done.stdout)} == {"vmap", "one pass"}
    done = CliRunner().invoke(cli.app, ["support", f"{__name__}:pair"])
    assert "LSTM" in done.stdout
    done = CliRunner().invoke(cli.app, ["support", f"{__name__}:DATA"])
    assert done.exit_code != 0
    assert "expected a byline.serve.Served" in done.output


@pytest.mark.parametrize(
    "name", ["MLP", "Mixture of experts", "Table with nn.EmbeddingBag", "Batch norm in train mode"]
)
def test_the_page_says_what_is_measured(name: str) -> None:
    kept = json.loads(support.KEPT.read_text())
    assert not support.differences({name: support.measure(name)}, kept)


def test_the_page_is_of_what_is_kept() -> None:
    kept = json.loads(support.KEPT.read_text())
    assert list(kept) == list(support.FAMILIES)
    page = support.PAGE.read_text()
    assert page.partition(support.BEGIN)[2].partition(support.END)[0].strip() == support.measured_part(kept)


def test_another_measurement_is_told() -> None:
    kept = json.loads(support.KEPT.read_text())
    for name, change in (
        ("MLP", {"error": 1e-2}),
        ("MLP", {"masks": "one after the other"}),
        ("GRU", {"numbers": {"one pass": 1, "vmap": 0, "one by one": 0}}),
    ):
        assert support.differences({name: {**kept[name], **change}}, kept), change
    assert support.differences({"MLP": {"refused": "no"}}, kept)
    assert support.differences({"new": kept["MLP"]}, kept)
    refused = kept["Padding that the model does not mask"]["refused"]
    assert not support.differences(
        {"Padding that the model does not mask": {"refused": refused.replace("0.", "1.")}}, kept
    )
