"""What an estimate says of a fit: how its parts are put together, without the warm-up of the first call."""

from __future__ import annotations

import shlex

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
from byline.engines import estimate as estimating
from byline.engines.estimate import estimate


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.ReLU(), nn.Linear(6, 3)).eval()


def examples(n: int) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(n, 4), torch.arange(n) % 3)


class Clock:
    """A clock under which the first piece of each kind of work takes a hundred times as long as the others."""

    def __init__(self, monkeypatch):
        self.now, self.seen = 0.0, set()
        monkeypatch.setattr(estimating.time, "perf_counter", lambda: self.now)
        done = estimating.do

        def do(job, unit, store, bench, advance=None):
            per = {"learn": 0.002, "rows": 0.003}[unit.kind] * len(unit.members) * max(1, len(unit.chunks))
            self.now += per if unit.kind in self.seen else 100 * per if unit.kind == "rows" else per
            self.seen.add(unit.kind)
            return done(job, unit, store, bench, advance)

        monkeypatch.setattr(estimating, "do", do)


@pytest.mark.parametrize(
    ("ensemble", "members"),
    [
        (lambda: byline.Independent([model()]), 1),
        (lambda: byline.Independent([model(), model(1)]), 2),
        (lambda: byline.Dropout(byline.Independent([model()]), masks=5), 5),
    ],
)
def test_seconds_are_those_of_warm_batches(monkeypatch, ensemble, members):
    Clock(monkeypatch)
    found = estimate(byline.Task(model()), ensemble(), examples(1000), features=byline.Factorized(8), batch_size=50)
    assert found.members == members
    assert found.seconds == pytest.approx(members * (0.002 + 20 * 0.003), rel=1e-6)


def test_forward_only_members_take_a_third_of_their_model(monkeypatch):
    Clock(monkeypatch)
    ensemble = byline.Dropout(byline.Independent([model()]), masks=6, forward_only=True)
    found = estimate(byline.Task(model()), ensemble, examples(1000), features=byline.Factorized(8), batch_size=50)
    assert found.seconds == pytest.approx(0.002 + 20 * 0.003 * (1 + 6 / 3), rel=1e-6)


@pytest.mark.parametrize("n", [7, 50, 1000])
def test_flops_are_those_of_the_ledger(n):
    ledger = byline.Ledger()
    task, ensemble = byline.Task(model()), byline.Independent([model(), model(1)])
    byline.TRAK(task, ensemble, features=byline.Factorized(8), batch_size=50, ledger=ledger, progress=False).fit(
        examples(n)
    )
    found = estimate(task, ensemble, examples(n), features=byline.Factorized(8), batch_size=50)
    assert found.flops == pytest.approx(ledger.fitting.flops, rel=1e-6)


def test_the_example_of_its_help_works():
    from typer.testing import CliRunner

    from byline.cli import app
    from byline.cli_store import store_app

    epilog = next(c.epilog for c in store_app.registered_commands if c.callback.__name__ == "estimate")
    words = shlex.split(epilog.partition("byline ")[2])
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "9 members of 1000 examples" in found.output
    shown = CliRunner().invoke(app, ["store", "estimate", "--help"], env={"COLUMNS": "80"}).output
    assert " ".join(words) in shown, "it is broken into lines, and cannot be copied"
