"""Ensembles trained from scratch: early stopping, snapshots, folders; recorders in other people's loops."""

from __future__ import annotations

import importlib
import json
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

import byline
import reference as ref
from byline.training import Recipe, train_many
from byline.training.ensembles import fresh, spaced
from test_training import assert_same, by_hand, loss


def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 3))


def plain():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=generator)
    noisy = x + 0.7 * torch.randn(60, 6, generator=generator)
    return TensorDataset(x, (noisy[:, 0] > 0).long() + (noisy[:, 1] > 0).long())


def sgd(lr):
    return lambda p: torch.optim.SGD(p, lr=lr)


# the cyclic learning rate


def test_a_cyclic_rate_starts_anew_in_every_cycle(data):
    recipe = Recipe(lr=0.2, batch_size=20, epochs=6, schedule="cyclic", cycles=2)
    one = [0.1 * (1 + np.cos(np.pi * t / 9)) for t in range(9)]
    assert [recipe.rate(step, 18) for step in range(18)] == pytest.approx(one * 2)
    assert recipe.cycle_ends == [3, 6]
    run = train_many(plain, data, recipe, task_loss=loss, seeds=[2], checkpoints=[3, 6])[0]
    expected = by_hand(plain, data, list(range(60)), recipe, 2, sgd(0.2), rates=one * 2)
    assert_same(run.checkpoints[3], expected[2])
    assert_same(run.state_dict, expected[5])
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert "cycles" not in Recipe().to_dict(), "what was kept of older recipes is found again"


def test_cycles_are_checked():
    with pytest.raises(ValueError, match="only schedule='cyclic' has them"):
        Recipe(epochs=4, cycles=2)
    with pytest.raises(ValueError, match="expected a divisor of epochs, 5"):
        Recipe(epochs=5, cycles=2, schedule="cyclic")


# early stopping


@pytest.mark.parametrize("batched", [True, False])
def test_training_stops_where_the_held_out_loss_was_lowest(data, batched):
    recipe = Recipe(lr=0.5, batch_size=10, epochs=12)
    subsets, held = [np.arange(30), np.arange(20, 50)], [np.arange(30, 60), np.r_[0:20, 50:60]]
    options = {"task_loss": loss, "subsets": subsets, "seeds": [0, 1], "checkpoints": range(1, 13)}
    runs = train_many(plain, data, recipe, held_out=held, patience=2, batched=batched, **options)
    free = train_many(plain, data, recipe, batched=batched, **options)
    x, y = data.tensors
    stops = []
    for seed, run in enumerate(runs):
        states = by_hand(plain, data, subsets[seed], recipe, seed, sgd(0.5))
        losses = []
        for state in states:
            model = plain()
            model.load_state_dict(state)
            with torch.no_grad():
                losses.append(float(F.cross_entropy(model(x[held[seed]]), y[held[seed]])))
        stop = 0
        while stop < 11 and stop - int(np.argmin(losses[: stop + 1])) < 2:
            stop += 1
        best = int(np.argmin(losses[: stop + 1]))
        stops.append(stop + 1)
        assert run.epoch == best + 1 < 12, "the data are such that training overfits"
        assert_same(run.state_dict, states[best], 1e-4)
        assert sorted(run.checkpoints) == list(range(1, best + 2))
        assert list(run.held_out) == pytest.approx(losses[: len(run.held_out)], rel=1e-3)
    done = max(stops) if batched else None
    for i, (run, whole) in enumerate(zip(runs, free, strict=True)):
        epochs = done or stops[i]
        assert len(run.held_out) == len(run.losses) == epochs
        # 30 examples are looked at once an epoch, forward alone
        assert run.flops == pytest.approx(whole.flops * epochs / 12 * (1 + 1 / 3))


def test_dropout_is_off_while_held_out_examples_are_looked_at(data):
    recipe = Recipe(lr=1e-9, batch_size=10, epochs=2)
    run = train_many(
        mlp, data, recipe, task_loss=loss, subsets=[np.arange(30)], held_out=[np.arange(30, 60)], seeds=[0]
    )[0]
    assert run.held_out[0] == pytest.approx(run.held_out[1], rel=1e-6)
    model = mlp().eval()
    model.load_state_dict(run.state_dict)
    x, y = data.tensors
    assert run.held_out[1] == pytest.approx(float(F.cross_entropy(model(x[30:]), y[30:])), rel=1e-5)


def test_examples_held_out_must_be_held_out(data):
    with pytest.raises(ValueError, match="number 0 has examples that its member is trained on"):
        train_many(plain, data, Recipe(), task_loss=loss, held_out=[[0]])
    with pytest.raises(ValueError, match="patience=0"):
        train_many(plain, data, Recipe(), task_loss=loss, validation_set=data, patience=0)


# ensembles


@pytest.fixture
def task():
    return byline.Task(plain().eval())


RECIPE = Recipe(lr=0.1, momentum=0.9, batch_size=16, epochs=6)


def states(ensemble):
    return [member.weights.load() for member in ensemble.members()]


def test_independent_models_are_those_of_train_many(data, task):
    ensemble = byline.train_ensemble(task, data, RECIPE, models=3, build=plain, seed=1)
    assert isinstance(ensemble, byline.Independent)
    assert len(ensemble) == ensemble.trained_models() == 3
    one = byline.train_ensemble(task, data, RECIPE, models=3, build=plain, seed=1)
    other = byline.train_ensemble(task, data, RECIPE, models=3, build=plain, seed=2)
    for a, b, c in zip(states(ensemble), states(one), states(other), strict=True):
        assert_same(a, b, 0)
        assert not torch.equal(a["0.weight"], c["0.weight"])
    assert not torch.equal(states(ensemble)[0]["0.weight"], states(ensemble)[1]["0.weight"])
    expected = train_many(plain, data, RECIPE, task_loss=task.loss, seeds=range(3))
    assert ensemble.cost.flops == pytest.approx(sum(run.flops for run in expected))


def test_a_trajectory_is_one_run(data, task):
    ensemble = byline.train_ensemble(task, data, RECIPE, "trajectory", checkpoints=3, models=2)
    assert isinstance(ensemble, byline.Trajectory)
    assert [len(run) for run in ensemble.runs] == [3, 3]
    assert spaced(3, 6) == [2, 4, 6]
    last = byline.train_ensemble(task, data, RECIPE, models=2)
    assert_same(states(ensemble)[2], states(last)[0], 0)
    early = byline.train_ensemble(task, data, RECIPE, "trajectory", checkpoints=[2, 4], models=2)
    assert_same(states(early)[0], states(ensemble)[0], 0)


def test_crossfit_members_are_trained_on_what_they_say(data, task):
    ensemble = byline.train_ensemble(task, data, RECIPE, "crossfit", models=6, parts=3, seed=4, build=plain)
    assert isinstance(ensemble, byline.CrossFit)
    unseen = torch.stack([member.unseen(60) for member in ensemble.members()])
    assert (unseen.reshape(2, 3, 60).sum(1) == 1).all()
    member = ensemble.members()[1]
    from byline.training.data import derive

    own = Subset(data, member.trained_on.tolist())
    alone = train_many(plain, own, RECIPE, task_loss=task.loss, seeds=[derive(4, 1, 4)])[0]
    assert_same(member.weights.load(), alone.state_dict)
    scores = byline.TRAK(task, ensemble, residual="out-of-sample", progress=False).fit(data).attribute(data)
    assert np.isfinite(scores.values).all()


def test_crossfit_of_checkpoints_stopped_by_the_fold(data, task):
    recipe = Recipe(lr=0.5, batch_size=10, epochs=12)
    ensemble = byline.train_ensemble(
        task, data, recipe, "crossfit", checkpoints=2, validation="fold", patience=1, build=plain, seed=3
    )
    members = ensemble.members()
    assert all(1 <= len([m for m in members if m.run == r]) <= 2 for r in (0, 1))
    free = byline.train_ensemble(task, data, recipe, "crossfit", build=plain, seed=3)
    assert ensemble.cost.flops < free.cost.flops


def test_a_share_held_out_is_known_to_the_members(data, task):
    ensemble = byline.train_ensemble(task, data, RECIPE, "trajectory", models=2, validation=0.25, build=plain)
    assert isinstance(ensemble, byline.CrossFit)
    held = [member.unseen(60) for member in ensemble.members()]
    assert all(int(one.sum()) == 15 for one in held)
    assert not torch.equal(held[0], held[-1])


def test_snapshots_are_the_ends_of_cycles(data, task):
    ensemble = byline.train_ensemble(task, data, RECIPE, "snapshot", checkpoints=3, build=plain)
    cyclic = Recipe(lr=0.1, momentum=0.9, batch_size=16, epochs=6, schedule="cyclic", cycles=3)
    same = byline.train_ensemble(task, data, cyclic, "trajectory", checkpoints=[2, 4, 6], build=plain)
    for a, b in zip(states(ensemble), states(same), strict=True):
        assert_same(a, b, 0)


def test_a_folder_is_found_again_and_goes_on(data, task, tmp_path, monkeypatch):
    options = {"kind": "crossfit", "models": 4, "checkpoints": 2, "group": 2, "build": plain, "seed": 5}
    here = byline.train_ensemble(task, data, RECIPE, **options)
    ledger = byline.Ledger()
    kept = byline.train_ensemble(task, data, RECIPE, folder=tmp_path / "e", ledger=ledger, **options)
    assert ledger.training.flops == kept.cost.flops > 0
    assert kept.cost.bytes == sum(t.numel() * 4 for state in states(here) for t in state.values())
    for a, b in zip(states(here), states(kept), strict=True):
        assert_same(a, b, 0)
    # an interruption between the two groups
    (tmp_path / "e" / "run-3" / "run.json").unlink()
    calls = []

    def counted(*args, **kw):
        calls.append(kw["seeds"])
        return train_many(*args, **kw)

    monkeypatch.setattr("byline.training.ensembles.train_many", counted)
    again = byline.train_ensemble(task, data, RECIPE, folder=tmp_path / "e", **options)
    assert [len(seeds) for seeds in calls] == [2]
    for a, b in zip(states(here), states(again), strict=True):
        assert_same(a, b, 0)
    with pytest.raises(ValueError, match="holds an ensemble of another task"):
        byline.train_ensemble(task, data, RECIPE, folder=tmp_path / "e", **{**options, "seed": 6})


def test_a_fresh_model_is_what_it_was_when_it_was_made():
    model = plain()
    build = fresh(model)
    torch.manual_seed(7)
    made = build()
    torch.manual_seed(7)
    assert_same(made.state_dict(), plain().state_dict(), 0)
    assert made is not model

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"the model \(Bare\) cannot be initialised anew"):
        fresh(Bare())
    fresh(nn.MultiheadAttention(4, 2))()


def test_a_folder_made_by_another_function_is_refused(data, task, tmp_path):
    recipe = Recipe(lr=0.1, batch_size=20, epochs=2)
    byline.train_ensemble(task, data, recipe, build=mlp, folder=tmp_path / "a")
    byline.train_ensemble(task, data, recipe, build=mlp, folder=tmp_path / "a")
    with pytest.raises(ValueError, match="holds an ensemble of another task"):
        byline.train_ensemble(task, data, recipe, build=plain, folder=tmp_path / "a")
    with pytest.raises(ValueError, match="holds an ensemble of another task"):
        byline.train_ensemble(task, data, recipe, folder=tmp_path / "a")
    (tmp_path / "a" / "ensemble.json").write_text('{"sha')
    with pytest.raises(ValueError, match=r"ensemble\.json is damaged"):
        byline.train_ensemble(task, data, recipe, build=mlp, folder=tmp_path / "a")


def test_a_data_sets_own_collate_fn_is_used(data, task):
    class Doubled(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, i):
            return {"x": data[i][0], "y": data[i][1]}

        def collate_fn(self, items):
            return torch.stack([2 * item["x"] for item in items]), torch.stack([item["y"] for item in items])

    recipe = Recipe(lr=0.1, batch_size=20, epochs=1)
    found = byline.train_ensemble(task, Doubled(), recipe, build=plain)
    want = byline.train_ensemble(task, TensorDataset(2 * data.tensors[0], data.tensors[1]), recipe, build=plain)
    assert_same(found.members()[0].weights.load(), want.members()[0].weights.load(), 0)


def test_an_attention_is_what_it_was_when_it_was_made():
    torch.manual_seed(0)
    made = fresh(nn.TransformerEncoderLayer(8, 2, 16))()
    assert made.self_attn.out_proj.bias.abs().max() == 0


def test_a_held_out_loss_that_is_no_number_is_refused(data, task):
    other = TensorDataset(torch.full((4, 6), float("nan")), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"validation: .*held-out examples is nan"):
        byline.train_ensemble(task, data, Recipe(lr=0.1, epochs=2), validation=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bagging"}, "kind is 'bagging'"),
        ({"checkpoints": 2}, "an independent ensemble has the last weights alone"),
        ({"kind": "trajectory", "checkpoints": 7}, "at most the 6 epochs"),
        ({"kind": "trajectory", "checkpoints": [0, 2]}, "expected epochs from 1 to 6"),
        ({"kind": "crossfit", "models": 3}, "a multiple of parts, 2"),
        ({"kind": "crossfit", "parts": 1}, "parts is 1"),
        ({"kind": "snapshot", "checkpoints": 4}, "a divisor of epochs"),
        ({"kind": "snapshot", "validation": 0.5}, "ends of its cycles"),
        ({"validation": "fold"}, "validation is 'fold'"),
        ({"validation": 1.0}, "a share between 0 and 1"),
        ({"models": 0}, "models is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_arguments_are_checked(data, task, options, message):
    with pytest.raises(ValueError, match=message):
        byline.train_ensemble(task, data, RECIPE, build=plain, **options)


def test_adapters_of_a_crossfit_see_what_their_model_saw(data, monkeypatch):
    pytest.importorskip("peft")
    from byline.ensembles import lora

    task, looked = byline.Task(plain().eval()), []

    def watched(task, weights, data, *rest):
        looked.append(data.indices)
        return one(task, weights, data, *rest)

    one = lora._train_one
    monkeypatch.setattr(lora, "_train_one", watched)
    ensemble = byline.train_ensemble(task, data, RECIPE, "crossfit", build=plain)
    made = byline.train_lora(task, ensemble, data, adapters=1, rank=2, epochs=1, progress=False)
    assert looked == [member.trained_on.tolist() for member in made.members()]
    short = torch.utils.data.Subset(data, range(len(data) - 1))
    with pytest.raises(ValueError, match=f"was trained on the example at {len(data) - 1}, and the training set has"):
        byline.train_lora(task, ensemble, short, adapters=1, rank=2, epochs=1, progress=False)
    assert len(looked) == len(made)


# loops of other people


def test_a_recorder_in_a_plain_loop(data, tmp_path):
    torch.manual_seed(0)
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorders = [byline.Recorder(every=2, first=True), byline.Recorder(every=2, folder=tmp_path / "run")]
    recorders[0].start(model)
    expected, x, y = [], *data.tensors
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 * (step + 1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for recorder in recorders:
            recorder.step(model, lr=0.1 * (step + 1))
        if step in (1, 3, 4):
            expected.append({k: v.clone() for k, v in model.state_dict().items()})
    for recorder in recorders:
        recorder.finish(model)
        recorder.finish(model)
    memory, disk = recorders
    assert memory.steps == [0, 2, 4, 5]
    assert disk.steps == [2, 4, 5]
    assert disk.rates == pytest.approx([0.3, 0.7, 0.5])
    for found in (
        memory.checkpoints[1:],
        states(disk.trajectory()),
        states(byline.Recorder.load(disk.folder).trajectory()),
    ):
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b, 0)
    members = disk.trajectory(examples=60).members()
    assert [m.weight for m in members] == pytest.approx([0.3 / 60, 0.7 / 60, 0.5 / 60])
    assert not any(m.weighted for m in disk.trajectory().members())
    task = byline.Task(model.eval())
    by_sum = byline.TracIn(task, disk.trajectory(examples=60), progress=False).fit(data).attribute(data).values
    total = 0
    for state, rate in zip(expected, (0.3, 0.7, 0.5), strict=True):
        one = plain()
        one.load_state_dict(state)
        side = ref.side(one, data, ref.classification)
        total = total + rate / 60 * ref.graddot(side, side)
    ref.assert_close(by_sum, total, 1e-3)


def test_a_recorder_says_what_is_wrong(tmp_path):
    model = plain()
    with pytest.raises(ValueError, match="every is 0"):
        byline.Recorder(every=0)
    with pytest.raises(ValueError, match="no checkpoint was recorded in 0 steps"):
        byline.Recorder(every=3).trajectory()
    with pytest.raises(ValueError, match="expected start"):
        byline.Recorder(every=3, first=True).step(model)
    with pytest.raises(ValueError, match="lr is -1"):
        byline.Recorder(every=3).step(model, -1)
    for lr in ("0.1", float("nan"), torch.ones(2), None):
        with pytest.raises(ValueError, match=r"lr is .*expected a finite number"):
            byline.Recorder(every=3).step(model, lr)
    recorder = byline.Recorder(every=1, folder=tmp_path)
    recorder.step(model)
    with pytest.raises(ValueError, match="has checkpoints of a run already"):
        byline.Recorder(every=1, folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="expected what byline"):
        byline.Recorder.load(tmp_path / "none")
    record = json.loads((tmp_path / "recorded.json").read_text())
    (tmp_path / "recorded.json").write_text(json.dumps({**record, "files": ["../../etc/passwd"]}))
    assert byline.Recorder.load(tmp_path).checkpoints[0].parent == tmp_path
    for damaged in ("{", "[]", "{}", json.dumps({**record, "steps": []}), json.dumps({**record, "rates": [None]}),
                    json.dumps({**record, "files": [".."]})):  # fmt: skip
        (tmp_path / "recorded.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"recorded\.json is damaged; expected files, steps and rates"):
            byline.Recorder.load(tmp_path)
    (tmp_path / "recorded.json").write_text('{"files": [], "steps": [], "rates": []}')
    with pytest.raises(ValueError, match="names no checkpoint"):
        byline.Recorder.load(tmp_path)


def test_a_recorder_takes_the_numbers_that_schedules_give():
    model, recorder = plain(), byline.Recorder(every=3)
    for lr in (np.float32(0.5), torch.tensor(0.25), 1):
        recorder.step(model, lr)
    assert recorder.rates == [1.75]


def test_a_lightning_callback(data, monkeypatch):
    """Lightning's order of calls: before_optimizer_step, then the schedule, then train_batch_end."""
    if importlib.util.find_spec("lightning") is None:
        fake = types.ModuleType("lightning.pytorch")
        fake.Callback = type("Callback", (), {})
        monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
        monkeypatch.setitem(sys.modules, "lightning.pytorch", fake)
    sys.modules.pop("byline.lightning", None)
    module = importlib.import_module("byline.lightning")
    callback = module.Checkpoints(every=2, module="model")
    holder = SimpleNamespace(model=plain())
    optimizer = torch.optim.SGD(holder.model.parameters(), lr=0.1)
    trainer = SimpleNamespace(global_step=0, optimizers=[optimizer])
    callback.on_train_start(trainer, holder)
    for batch in range(10):
        if batch % 2:  # two batches to a step
            callback.on_before_optimizer_step(trainer, holder, optimizer)
            optimizer.param_groups[0]["lr"] *= 0.5
            trainer.global_step += 1
        callback.on_train_batch_end(trainer, holder, None, None, batch)
    callback.on_train_end(trainer, holder)
    assert callback.recorder.steps == [2, 4, 5]
    assert callback.recorder.rates == pytest.approx([0.15, 0.0375, 0.00625])
    assert len(callback.trajectory()) == 3
    sys.modules.pop("byline.lightning", None)
