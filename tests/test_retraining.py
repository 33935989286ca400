"""Banks: what is recorded, what is kept, and what a second call does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from byline.evaluate.bank import Bank
from byline.evaluate.retraining import draw_subsets, retrain
from byline.training import Recipe, Trainer


def build():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 2))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Output:
    """As much of a task as retraining needs."""

    def __init__(self):
        self.model = build().eval()

    def output(self, model, batch):
        logits = model(batch[0])
        return logits[:, 1] - logits[:, 0]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    return TensorDataset(x[:30], y[:30]), TensorDataset(x[30:], y[30:])


@pytest.fixture
def trainer():
    return Trainer(build, Recipe(lr=0.1, batch_size=8, epochs=2), loss, group=3)


@pytest.fixture
def make(data, trainer):
    def call(train_fn=trainer, **options):
        options = {"subsets": 4, "seeds": 2, "progress": False, **options}
        return retrain(train_fn, data[0], test_set=data[1], task=Output(), **options)

    return call


def test_subsets_are_drawn_from_the_seed():
    drawn = draw_subsets(30, 5, 15, seed=1)
    assert (drawn.sum(1) == 15).all()
    assert len({row.tobytes() for row in drawn}) == 5
    assert np.array_equal(drawn[:3], draw_subsets(30, 3, 15, seed=1))
    assert not np.array_equal(drawn, draw_subsets(30, 5, 15, seed=2))
    assert draw_subsets(200, 400, 100, seed=0).mean(0) == pytest.approx(0.5, abs=0.15)


def test_outputs_are_those_of_models_trained_on_the_subsets(data, make):
    """A training function whose model tells which examples it saw, and a task that reads it off."""

    def remember(subset, seed):
        model = build()
        with torch.no_grad():
            model[3].bias.copy_(torch.tensor([0.0, float(sum(x.sum() for x, _ in subset))]))
            model[3].weight.zero_()
        return model.train()  # retrain must turn dropout off itself

    bank = make(remember)
    sums = data[0].tensors[0].sum(1).numpy()
    for s in range(4):
        np.testing.assert_allclose(bank.outputs[s], sums[bank.subsets[s]].sum(), rtol=1e-4, atol=1e-4)
    assert bank.outputs.shape == (4, 2, 10)
    assert bank.outputs.dtype == np.float32


def test_every_model_has_its_own_seed(data, make):
    seen = []

    def untrained(subset, seed):
        seen.append(seed)
        torch.manual_seed(seed)
        return build().state_dict()

    bank = make(untrained)
    assert len(set(seen)) == 8
    for number, seed in enumerate(seen):  # subset by subset, and within each seed by seed
        with torch.no_grad():
            expected = Output().output(build_from(seed), data[1].tensors).numpy()
        np.testing.assert_allclose(bank.outputs[number // 2, number % 2], expected, atol=1e-6)


def build_from(seed):
    torch.manual_seed(seed)
    return build().eval()


def test_batched_and_plain_training_functions_agree(make):
    trainer = Trainer(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0), nn.Linear(6, 2)),
        Recipe(lr=0.1, batch_size=8, epochs=2),
        loss,
    )
    together, alone = make(trainer), make(lambda subset, seed: trainer(subset, seed))
    assert np.array_equal(together.subsets, alone.subsets)
    np.testing.assert_allclose(together.outputs, alone.outputs, atol=1e-5)
    assert together.metadata["cost"]["flops"] > 0


def test_save_and_load(make, tmp_path):
    bank = make()
    bank.save(tmp_path / "bank.safetensors")
    loaded = Bank.load(tmp_path / "bank.safetensors")
    assert np.array_equal(loaded.subsets, bank.subsets)
    assert np.array_equal(loaded.outputs, bank.outputs)
    assert loaded.metadata == bank.metadata
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]
    assert repr(loaded) == "Bank(4 subsets of 15 of 30 examples × 2 seeds, 10 test examples)"
    with pytest.raises(FileNotFoundError):
        Bank.load(tmp_path / "none")
    (tmp_path / "cut").write_bytes((tmp_path / "bank.safetensors").read_bytes()[:-5])
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    for name in ("cut", "pickle"):
        with pytest.raises(ValueError, match="damaged or was not written by byline"):
            Bank.load(tmp_path / name)


def test_a_killed_run_resumes_to_equal_bits(make, trainer, tmp_path):
    expected = make()
    trained = []

    class Killed:
        group = trainer.group
        describe = trainer.describe

        def __init__(self, parts):
            self.parts = parts

        def many(self, train_set, subsets, seeds):
            if not self.parts:
                raise KeyboardInterrupt
            self.parts -= 1
            trained.extend(seeds)
            return trainer.many(train_set, subsets, seeds)

    path = tmp_path / "bank.safetensors"
    with pytest.raises(KeyboardInterrupt):
        make(Killed(2), path=path)
    assert not path.exists()
    assert len(list((tmp_path / "bank.safetensors.parts").iterdir())) == 2
    resumed = make(Killed(1), path=path)
    assert len(trained) == len(set(trained)) == 8  # nothing was trained twice
    assert np.array_equal(resumed.outputs, expected.outputs)
    assert not (tmp_path / "bank.safetensors.parts").exists()
    assert np.array_equal(make(Killed(0), path=path).outputs, expected.outputs)


def test_a_path_made_otherwise_is_refused(make, trainer, tmp_path):
    path = tmp_path / "bank.safetensors"
    make(path=path)
    with pytest.raises(ValueError, match="was made with seed 0, not 1"):
        make(path=path, seed=1)
    with pytest.raises(ValueError, match=r"made with train_fn recipe lr 0\.1, not recipe lr 0\.2"):
        make(Trainer(build, Recipe(lr=0.2, batch_size=8, epochs=2), loss, group=3), path=path)
    with pytest.raises(ValueError, match="made with fraction"):
        make(path=path, fraction=0.4)


def test_other_data_is_refused(data, trainer, make, tmp_path):
    path = tmp_path / "bank.safetensors"
    make(path=path)
    changed = TensorDataset(data[0].tensors[0].clone(), data[0].tensors[1])
    changed.tensors[0][17, 2] += 1
    with pytest.raises(ValueError, match="made with train_set"):
        retrain(trainer, changed, test_set=data[1], task=Output(), subsets=4, seeds=2, path=path, progress=False)


def test_bad_arguments_get_one_clear_error(make):
    with pytest.raises(ValueError, match="subsets of 30 of 30"):
        make(fraction=1.0)
    with pytest.raises(ValueError, match="seeds=0"):
        make(seeds=0)
    with pytest.raises(ValueError, match="train_fn: got int; expected a module or a state_dict"):
        make(lambda subset, seed: 3)

    def broken(subset, seed):
        model = build()
        nn.init.constant_(model[3].bias, float("nan"))
        return model

    with pytest.raises(ValueError, match="subset 0, seed 0 gives nan for test example 0"):
        make(broken)
    with pytest.raises(ValueError, match=r"outputs: got \(3, 2\)"):
        Bank(np.ones((3, 4), bool), np.ones((3, 2)))
    with pytest.raises(ValueError, match="expected bool"):
        Bank(np.ones((3, 4)), np.ones((3, 2, 1)))
