"""Settings at other widths, with their simplest models, and what bench/widths.py makes of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import byline
from byline import settings
from byline.settings.base import BankRecipe
from byline.settings.resnet import fashion2_resnet9, resnet9
from byline.settings.transformer import Bigrams
from test_bench import small

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
widths = pytest.importorskip("widths")


def test_the_papers_mlp_is_the_one_at_full_width() -> None:
    shapes = [tuple(p.shape) for p in settings.get("fashion-mlp").build().parameters()]
    assert shapes == [(128, 784), (128,), (64, 128), (64,), (10, 64), (10,)]
    shapes = [tuple(p.shape) for p in settings.get("digits-mlp").build().parameters()]
    assert shapes == [(64, 64), (64,), (32, 64), (32,), (10, 32), (10,)]


@pytest.mark.parametrize("name", ["digits-mlp", "fashion-mlp", "fashion2-resnet9", "stdlib-gpt"])
def test_half_the_width_has_fewer_parameters_and_the_same_outputs(name: str) -> None:
    whole = settings.get(name)
    half = whole.variant(width=whole.width // 2)
    assert half.width == whole.width // 2
    wide, narrow, simple = (s() for s in (whole.build, half.build, whole.simplest))
    counts = [sum(p.numel() for p in m.parameters()) for m in (narrow, wide)]
    assert counts[0] < 0.6 * counts[1]
    x = torch.randint(9, (2, 5)) if name == "stdlib-gpt" else torch.randn(2, 28, 28)
    x = torch.randn(2, 64) if name == "digits-mlp" else x
    x = x.flatten(1) if name == "fashion-mlp" else x[:, None] if name == "fashion2-resnet9" else x
    assert len({model.eval()(x).shape for model in (wide, narrow, simple)}) == 1


def test_the_resnet_says_its_width() -> None:
    first = next(fashion2_resnet9.build().parameters())
    assert len(first) == fashion2_resnet9.width == len(next(resnet9(width=8).parameters()))


def test_a_table_of_bigrams_looks_at_one_token_and_learns_how_often_which_follows() -> None:
    model = Bigrams(4).eval()
    task = byline.Task(model, "language-modeling")
    ids = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 2]])
    with torch.no_grad():
        assert (model(ids) == 0).all(), "all tokens are as likely before training"
    anew = byline.train_ensemble(
        task, [ids[0]], byline.Recipe(lr=1e-12, batch_size=1, epochs=1), models=1, progress=False
    )
    (member,) = anew.members()
    assert all((tensor.abs() < 1e-6).all() for tensor in member.weights.load().values()), (
        "training, too, begins with zeros"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(400):
        optimizer.zero_grad()
        task.loss(model, ids).mean().backward()
        optimizer.step()
    after = model(torch.tensor([[3, 0], [1, 0]])).softmax(-1)
    torch.testing.assert_close(after[0, 1], after[1, 1])
    torch.testing.assert_close(after[0, 1], torch.tensor([0, 0.75, 0.25, 0]), atol=0.02, rtol=0)


def test_the_table_says_what_each_width_costs_and_has(tmp_path, monkeypatch, capsys) -> None:
    made = replace(small(), bank_recipe=BankRecipe(subsets=4, seeds=1))
    monkeypatch.setattr(widths, "setting_of", lambda name: made)
    file = tmp_path / "found.json"
    given = ["--out", tmp_path, "--widths", 1, 0.5, "--lengths", "full", "--runs", 2, "--seeds", 1, "--json", file]
    monkeypatch.setattr(sys, "argv", ["widths.py", *map(str, given)])
    widths.main()
    wide, narrow = json.loads(file.read_text())["rows"]
    assert narrow["training"] < wide["training"] / 2
    assert narrow["parameters"] < wide["parameters"] / 2
    assert 0 < wide["q"][0] < 1
    assert "mean Q" in capsys.readouterr().out


def test_q_and_loss_are_those_of_the_members() -> None:
    made = small()
    models = [made.build().eval() for _ in range(2)]
    q, loss = widths.unlearnt(made, byline.Independent(models))
    x, y = made.train_set.tensors
    by_hand = torch.stack([1 - m(x).softmax(-1).gather(1, y[:, None]) for m in models]).mean()
    assert q == pytest.approx(by_hand.item(), abs=1e-5)
    x, y = made.test_set.tensors
    by_hand = torch.stack([nn.functional.cross_entropy(m(x), y) for m in models]).mean()
    assert loss == pytest.approx(by_hand.item(), abs=1e-5)
