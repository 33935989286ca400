"""The batched trainer against plain torch training, one model after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from byline.training import Recipe, Trainer, train_many, train_one
from byline.training.data import order


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mlp(dropout=0.0):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


class Odd(nn.Module):
    """Embedding, convolution, norm, a tied weight, a bare 3-d parameter, a frozen one, a constant buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.bare = nn.Parameter(torch.randn(2, 3, 5))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("scale", torch.rand(5) + 0.5)

    def forward(self, tokens):
        hidden = self.conv(self.embed(tokens).mT).mT
        hidden = self.norm(hidden).mean(1) + self.frozen
        return self.head(hidden) * self.scale + self.bare.sum((0, 1))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def by_hand(build, data, index, recipe, seed, optimizer, rates=None):
    """The oracle: nothing of the trainer but the order of the examples."""
    torch.manual_seed(seed)
    model = build().train()
    optimizer = optimizer(model.parameters())
    inputs, labels = data[index]
    states, step = [], 0
    for epoch in range(recipe.epochs):
        visits = order(seed, epoch, len(index))
        for start in range(0, len(index), recipe.batch_size):
            chosen = visits[start : start + recipe.batch_size]
            if rates is not None:
                optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
            step += 1
        states.append({key: tensor.detach().clone() for key, tensor in model.state_dict().items()})
    return states


def assert_same(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=tolerance, atol=tolerance)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_batched_equals_plain_training(data, optimizer):
    recipe = Recipe(optimizer, lr=0.1, momentum=0.9 * (optimizer == "sgd"), weight_decay=0.01, batch_size=16, epochs=3)
    subsets = [torch.randperm(50, generator=torch.Generator().manual_seed(i))[:25].numpy() for i in range(5)]
    runs = train_many(mlp, data, recipe, task_loss=loss, subsets=subsets, seeds=range(5), group=3, checkpoints=[1, 3])
    for seed, run in enumerate(runs):
        assert run.batched
        assert run.seed == seed
        expected = by_hand(mlp, data, subsets[seed], recipe, seed, OPTIMIZERS[optimizer])
        assert_same(run.state_dict, expected[-1])
        assert set(run.checkpoints) == {1, 3}
        assert_same(run.checkpoints[1], expected[0])
        assert_same(run.checkpoints[3], expected[2])


def test_odd_modules_train_batched():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, (30, 7), generator=generator)
    data = TensorDataset(tokens, tokens[:, 0])
    recipe = Recipe(lr=0.05, momentum=0.9, batch_size=8, epochs=2)
    runs = train_many(Odd, data, recipe, task_loss=loss, seeds=[3, 4], batched=True)
    for run in runs:
        expected = by_hand(
            Odd, data, list(range(30)), recipe, run.seed, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)
        )
        assert_same(run.state_dict, expected[-1])
        model = Odd()
        model.load_state_dict(run.state_dict)
        assert model.head.weight is model.embed.weight


def test_batchnorm_falls_back_to_one_after_the_other(data):
    def build():
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    recipe = Recipe(lr=0.1, batch_size=16, epochs=2)
    runs = train_many(build, data, recipe, task_loss=loss, seeds=[0, 1])
    for run in runs:
        assert not run.batched
        expected = by_hand(build, data, list(range(50)), recipe, run.seed, lambda p: torch.optim.SGD(p, lr=0.1))
        assert_same(run.state_dict, expected[-1])
    with pytest.raises(ValueError, match=r"cannot be trained stacked: .*running_mean"):
        train_many(build, data, recipe, task_loss=loss, seeds=[0, 1], batched=True)


def test_hidden_state_is_not_stacked(data):
    """A tensor that is neither parameter nor buffer would be shared by all members without a word."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)
            self.hidden = torch.randn(6)

        def forward(self, x):
            return self.linear(x * self.hidden)

    run = train_many(Hidden, data, Recipe(epochs=1), task_loss=loss, seeds=[0, 1])[1]
    assert not run.batched


def test_dropout_differs_between_members_and_repeats(data):
    recipe = Recipe(lr=0.1, batch_size=16, epochs=2)

    def train(seeds, **options):
        return train_many(lambda: mlp(0.5), data, recipe, task_loss=loss, seeds=seeds, **options)

    def same_start():
        torch.manual_seed(0)
        return mlp(0.5)

    first, second = train([1, 2, 3], group=2), train([1, 2, 3], group=2)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a.state_dict[key], b.state_dict[key]) for key in a.state_dict)
    # a finished group never depends on the ones before it, which is what makes resuming exact
    assert torch.equal(train([3])[0].state_dict["0.weight"], first[2].state_dict["0.weight"])
    full_batch = Recipe(lr=0.1, batch_size=50, epochs=1)
    twins = train_many(same_start, data, full_batch, task_loss=loss, seeds=[1, 2])
    assert not torch.allclose(twins[0].state_dict["0.weight"], twins[1].state_dict["0.weight"], atol=1e-4)
    plain = train_many(lambda: (torch.manual_seed(0), mlp(0.0))[1], data, full_batch, task_loss=loss, seeds=[1, 2])
    assert_same(plain[0].state_dict, plain[1].state_dict)  # the same full batch: only dropout told the twins apart


def test_callers_random_state_is_left_alone(data):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_many(lambda: mlp(0.5), data, Recipe(epochs=1), task_loss=loss, seeds=[0, 1])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules(data, schedule):
    recipe = Recipe(lr=0.2, batch_size=25, epochs=4, schedule=schedule)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    if schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    else:
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=8)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [recipe.rate(step, 8) for step in range(8)] == pytest.approx(rates)
    run = train_one(mlp, data, recipe, task_loss=loss, seed=2, checkpoints=[0, 2, 4])
    expected = by_hand(mlp, data, list(range(50)), recipe, 2, lambda p: torch.optim.SGD(p, lr=0.2), rates=rates)
    assert_same(run.state_dict, expected[-1])
    assert run.learning_rates[0] == 0.2
    assert run.learning_rates[2] == pytest.approx(sum(rates[:4]) / 4)
    assert run.learning_rates[4] == pytest.approx(sum(rates[4:]) / 4)


def test_flops_are_those_of_a_plain_training(data):
    recipe = Recipe(batch_size=16, epochs=3)
    run = train_many(mlp, data, recipe, task_loss=loss, seeds=range(4))[0]
    # per example: two products a weight (forward, its gradient), a third for the input gradient of layer two
    assert run.flops == 3 * 50 * 2 * (2 * 6 * 8 + 3 * 8 * 3)
    assert run.seconds > 0


def test_subsets_of_different_sizes_keep_their_order(data):
    recipe = Recipe(lr=0.1, batch_size=8, epochs=2)
    subsets = [range(10), range(20), range(5, 15), range(30, 50)]
    runs = train_many(mlp, data, recipe, task_loss=loss, subsets=subsets, seeds=[7, 8, 9, 10])
    assert [run.seed for run in runs] == [7, 8, 9, 10]
    for run, index in zip(runs, subsets, strict=True):
        expected = by_hand(mlp, data, list(index), recipe, run.seed, lambda p: torch.optim.SGD(p, lr=0.1))
        assert_same(run.state_dict, expected[-1])


class Dicts(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return {"x": x, "labels": y}


def test_any_dataset_gives_the_same_training(data):
    recipe = Recipe(lr=0.1, batch_size=16, epochs=1)
    plain = train_one(mlp, data, recipe, task_loss=loss)

    def dict_loss(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    from_dicts = train_one(mlp, Dicts(data), recipe, task_loss=dict_loss)
    from_subset = train_one(mlp, Subset(data, range(50)), recipe, task_loss=loss)
    assert_same(from_dicts.state_dict, plain.state_dict, 0)
    assert_same(from_subset.state_dict, plain.state_dict, 0)


def test_trainer_is_a_training_function(data):
    trainer = Trainer(mlp, Recipe(lr=0.1, epochs=1), loss)
    model = trainer(data, 4)
    assert not model.training
    assert_same(model.state_dict(), trainer.many(data, None, [4])[0].state_dict, 0)
    assert trainer.describe()["recipe"] == trainer.recipe.to_dict()
    assert Recipe.from_dict(trainer.recipe.to_dict()) == trainer.recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "lion"),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("weight_decay", -1),
        ("batch_size", 0),
        ("epochs", 1.5),
        ("schedule", "step"),
    ],
)
def test_recipes_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        Recipe(**{field: value})


def test_bad_arguments_get_one_clear_error(data):
    recipe = Recipe(epochs=1)

    def train(loss=loss, recipe=recipe, data=data, **options):
        return train_many(mlp, data, recipe, task_loss=loss, **options)

    with pytest.raises(ValueError, match=r"task_loss: got \(\) for 2 examples; expected .* \(2,\)"):
        train(lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    with pytest.raises(ValueError, match="got 1 subsets for 2 seeds"):
        train(subsets=[[0]], seeds=[0, 1])
    with pytest.raises(ValueError, match="0 to 50, expected 0 to 49"):
        train(subsets=[range(51)])
    with pytest.raises(ValueError, match="number 0 has shape"):
        train(subsets=[[True] * 50])
    with pytest.raises(ValueError, match=r"checkpoints=\[2\]: expected epochs from 0 to 1"):
        train(checkpoints=[2])
    with pytest.raises(ValueError, match="seeds="):
        train(seeds=[-1])
    with pytest.raises(ValueError, match="diverged: seed 0, epoch 1"):
        train(recipe=Recipe(lr=1e30, batch_size=8, epochs=1))
    with pytest.raises(ValueError, match="train_set is empty"):
        train(data=TensorDataset(torch.zeros(0, 6), torch.zeros(0)))
    with pytest.raises(TypeError, match="shuffles"):
        train(data=DataLoader(data, shuffle=True))
