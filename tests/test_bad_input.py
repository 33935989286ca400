"""Bad input gets one clear sentence, before long work and with the offender's name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import byline
from architectures import vectors
from conftest import build


@pytest.fixture
def made():
    return build("mlp")


def fit(made, train=None, model=None, ensemble=None, method=byline.TRAK, **arguments):
    task = made.task if model is None else byline.Task(model)
    ensemble = byline.Independent([task.model]) if ensemble is None else ensemble
    attributor = method(task, ensemble, **{"damping": 1, "progress": False, "batch_size": 4, **arguments})
    return attributor.fit(made.train if train is None else train)


@pytest.mark.parametrize("of", ["output", "loss", "residual"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m, b: m(b[0]), r"shape \(\d, 3\); expected one number per example, \(\d,\)"),
        (lambda m, b: m(b[0]).sum(), r"shape \(\); expected one number per example"),
        (lambda m, b: m(b[0])[:, 0].tolist(), "gave a list; expected a tensor of shape"),
        (lambda m, b: torch.cat([m(b[0])[:, 0]] * 2), r"shape \(\d,\); expected one number per example"),
    ],
)
def test_an_output_of_the_wrong_shape(made, of, wrong, message):
    right = lambda m, b: m(b[0])[:, 0]  # noqa: E731
    task = byline.Task(made.model, **{"output": right, of: wrong})
    method = byline.GradDot if of == "loss" else byline.TRAK
    with pytest.raises(ValueError, match=f"the task's {of} .*{message}"):
        method(task, byline.Independent([made.model]), damping=1, progress=False).fit(made.train)


def test_logits_and_labels_of_the_wrong_shape(made):
    with pytest.raises(ValueError, match=r"classification expects .batch, classes. with two classes or more"):
        fit(made, model=nn.Linear(6, 1).eval())
    with pytest.raises(ValueError, match="classification expects a tensor of integer labels"):
        fit(made, [(x, y.float()) for x, y in made.train])
    with pytest.raises(ValueError, match=r"the labels have shape \(\d, 2\)"):
        fit(made, [(x, torch.stack([y, y])) for x, y in made.train])
    with pytest.raises(ValueError, match="the labels are missing"):
        fit(made, [(x,) for x, _ in made.train])


@pytest.mark.parametrize("place", [0, 1, 5, 8])
@pytest.mark.parametrize("label", [3, -1, -100])
def test_labels_out_of_range_name_the_example(made, place, label):
    data = list(made.train)
    data[place] = (data[place][0], torch.tensor(label))
    with pytest.raises(ValueError, match=rf"train_set\[{place}\]: label {label} is out of range; expected 0 to 2"):
        fit(made, data)
    attributor = fit(made)
    with pytest.raises(ValueError, match=rf"test_set\[{place}\]: label {label} is out of range"):
        attributor.attribute(data)


def test_labels_out_of_range_of_a_language_model():
    made = build("tied-head")
    data = list(made.train)
    data[6] = (data[6][0], data[6][1].clone())
    data[6][1][2] = 11
    with pytest.raises(ValueError, match=r"train_set\[6\]: label 11 is out of range; expected 0 to 10"):
        fit(made, data)
    data[6] = (data[6][0], torch.full_like(data[6][1], -100))
    with pytest.raises(ValueError, match=r"train_set\[6\].*no target token"):
        fit(made, data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 2, 6])
@pytest.mark.parametrize(
    "features",
    [
        byline.Exact(),
        byline.LowRank(3),
        byline.Factorized(9),
        byline.Factorized(9, "pca"),
        byline.Nystrom(9),
        byline.Dense(4),
    ],
    ids=repr,
)
def test_a_gradient_that_is_not_finite_names_the_example(made, value, place, features):
    data = [(x.clone(), y) for x, y in made.train]
    data[place][0][3] = value
    with pytest.raises(ValueError, match=rf"train_set\[{place}\] has a NaN or infinite"):
        fit(made, data, features=features)
    if features.describe()["kind"] == "exact":
        attributor = fit(made)
        with pytest.raises(ValueError, match=rf"test_set\[{place}\] has a NaN or infinite"):
            attributor.attribute(data)


def test_landmarks_with_bad_labels_are_named_by_their_place_in_the_dataset():
    """Nystrom looks at a sample: what it finds there has the dataset's number, not the sample's."""
    made = build("mlp", train=40)
    for place in (7, 23, 38):
        data = list(made.train)
        data[place] = (data[place][0], torch.tensor(9))
        with pytest.raises(ValueError, match=rf"train_set\[{place}\]: label 9"):
            fit(made, data, features=byline.Nystrom(30))


def test_nan_in_residuals_of_forward_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 3)).eval()
    bad = {k: torch.full_like(v, float("nan")) for k, v in model.state_dict().items()}
    ensemble = byline.Dropout(byline.Independent([model, bad]), masks=2, forward_only=True)
    with pytest.raises(ValueError, match=r"train_set\[0\] has a NaN or infinite"):
        byline.TRAK(byline.Task(model), ensemble, damping=1, progress=False).fit(vectors()(9))


def test_nothing_of_a_failed_member_counts_as_done(made, tmp_path):
    data = [(x.clone(), y) for x, y in made.train]
    data[6][0][3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        fit(made, data, store=tmp_path)
    with pytest.raises(ValueError, match="NaN"):
        fit(made, data, store=tmp_path)


class Random(Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, index):
        return torch.randn(6), torch.tensor(1)


class Endless(Dataset):
    def __getitem__(self, index):
        return torch.randn(6), torch.tensor(1)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.randn(6), torch.tensor(1)


class LongStream(Stream):
    def __len__(self):
        return 9


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "train_set is empty; expected at least one example"),
        (TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)), "train_set is empty"),
        (
            Random(),
            r"train_set\[0\] is not the same on a second read; expected a dataset that neither shuffles",
        ),
        (Endless(), "train_set is a Endless without __len__"),
        (Stream(), "train_set is a Stream"),
        (LongStream(), "train_set is a LongStream"),
        (iter([1]), "train_set is a list_iterator without __len__ and __getitem__"),
        (3, "train_set is a int without __len__"),
        (None, "train_set is a NoneType"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_datasets_that_shuffle_or_have_no_length(made, data, message):
    attributor = fit(made)
    with pytest.raises((ValueError, TypeError), match=message):
        attributor.fit(data)
    with pytest.raises((ValueError, TypeError), match=message.replace("train_set", "test_set")):
        attributor.attribute(data)


def test_dataloaders(made):
    x, y = torch.stack([x for x, _ in made.train]), torch.stack([y for _, y in made.train])
    data = TensorDataset(x, y)
    with pytest.raises(TypeError, match="train_set is a DataLoader that shuffles"):
        fit(made, DataLoader(data, shuffle=True))
    plain = fit(made, DataLoader(data, batch_size=2)).attribute(DataLoader(data)).values
    assert (plain == fit(made, data).attribute(data).values).all()


def test_a_model_in_train_mode(made):
    made.model.train()
    with pytest.raises(ValueError, match=r"the model is in train mode; .*model.eval\(\)"):
        fit(made)
    made.model.eval()
    made.model.parts[2].train()
    with pytest.raises(ValueError, match=r"in train mode \(in parts.2\)"):
        fit(made)


def test_checkpoints_whose_keys_do_not_match(made):
    state = made.model.state_dict()
    without = {k: v for k, v in state.items() if k != "parts.2.bias"}
    with pytest.raises(ValueError, match=r"checkpoint 1 does not fit.*missing: parts.2.bias"):
        fit(made, ensemble=byline.Independent([state, without]))
    with pytest.raises(ValueError, match=r"unexpected: module.parts.0.bias, .* and 1 more"):
        fit(made, ensemble=byline.Independent([{**state, **{f"module.{k}": v for k, v in state.items()}}]))
    with pytest.raises(ValueError, match=r"of another shape: parts.0.bias \(4,\) instead of \(5,\)"):
        fit(made, ensemble=byline.Independent([{**state, "parts.0.bias": torch.zeros(4)}]))
    with pytest.raises(ValueError, match="run 0, checkpoint 1 does not fit"):
        fit(made, ensemble=byline.Trajectory([[state, without]]))


def test_checkpoints_that_are_none(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint 0: no checkpoint file at"):
        byline.Independent([tmp_path / "none.pt"])
    (tmp_path / "model.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a .safetensors or a .pt file"):
        byline.Independent([tmp_path / "model.pkl"])
    with pytest.raises(TypeError, match="checkpoint 0 is a int"):
        byline.Independent([3])
    for one in (made.model, made.model.state_dict(), "path.pt", tmp_path):
        with pytest.raises(TypeError, match="expected a list of them"):
            byline.Independent(one)
    with pytest.raises(ValueError, match="checkpoints is empty"):
        byline.Independent([])
    with pytest.raises(TypeError, match="ensemble is a Net"):
        byline.TRAK(made.task, made.model)
    with pytest.raises(TypeError, match="base is a Net"):
        byline.Dropout(made.model)
    with pytest.raises(TypeError, match=r"task is a Net; expected a byline.Task"):
        byline.TRAK(made.model, byline.Independent([made.model]))


def test_a_pickle_is_not_opened(made, tmp_path):
    torch.save(made.model, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="cannot be read with weights_only=True"):
        fit(made, ensemble=byline.Independent([tmp_path / "whole.pt"]))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state_dict"):
        fit(made, ensemble=byline.Independent([tmp_path / "list.pt"]))


def test_trajectories_are_checked(made):
    state = made.model.state_dict()
    for runs in ([state], state, []):
        with pytest.raises(TypeError, match="runs must be a list of runs"):
            byline.Trajectory(runs)
    with pytest.raises(ValueError, match="without checkpoints"):
        byline.Trajectory([[state], []])
    with pytest.raises(ValueError, match=r"weights has lengths \[1\]; expected one number per checkpoint, \[2\]"):
        byline.Trajectory([[state, state]], weights=[0.1])
    for weights in ([-1, 2], [0, 0], [float("nan"), 1]):
        with pytest.raises(ValueError, match="weights must be finite"):
            byline.Trajectory([[state, state]], weights=weights)


def test_noise_is_checked(made):
    base = byline.Independent([made.model])
    for arguments in ({"draws": 0}, {"scale": -1}, {"scale": float("nan")}, {"scale": "a"}, {"seed": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} is .*expected"):
            byline.WeightNoise(base, **arguments)


def test_adapters_are_checked(made, tmp_path):
    base = byline.Independent([made.model])
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json; expected a folder as PEFT saves it"):
        byline.LoRA(base, [[tmp_path]])
    with pytest.raises(TypeError, match="adapters must be a list of adapters per trained model"):
        byline.LoRA(base, [tmp_path])
    with pytest.raises(ValueError, match="adapters has 2 lists; expected one per trained model, 1"):
        byline.LoRA(base, [[tmp_path], [tmp_path]])


def test_no_parameter_is_left(made):
    for p in made.model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is attributed"):
        fit(made)
    made.model.requires_grad_(True)
    task = byline.Task(made.model, params="nothing.*")
    with pytest.raises(ValueError, match="no parameter is attributed"):
        byline.TRAK(task, byline.Independent([made.model]), progress=False).fit(made.train)


def test_attributing_before_fitting(made):
    attributor = byline.TRAK(made.task, byline.Independent([made.model]))
    for call in (lambda: attributor.attribute(made.test), attributor.self_influence):
        with pytest.raises(RuntimeError, match=r"this TRAK is not fitted; call fit\(train_set\) first"):
            call()


class Together(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x - x.mean(0))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x + torch.randn_like(x))


def test_models_that_are_random_or_mix_their_batch(made):
    with pytest.raises(ValueError, match="depends on the other examples in its batch"):
        fit(made, model=Together().eval())
    with pytest.raises(ValueError, match="deterministic"):
        fit(made, model=Noisy().eval())


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_batch_size_is_checked(made, size):
    with pytest.raises(ValueError, match=r"batch_size is .*; expected an int of at least 1"):
        byline.TRAK(made.task, byline.Independent([made.model]), batch_size=size)


def test_a_kernel_that_does_not_fit_is_refused_before_work(made, monkeypatch):
    from byline.methods import kernels

    monkeypatch.setattr(kernels.os, "sysconf", lambda name: 30)
    with pytest.raises(ValueError, match=r"kernel of 9 × 9 .*use byline.Nystrom"):
        fit(made)


def test_numpy_scalars_are_fine_where_numbers_are(made):
    assert np.isfinite(fit(made, damping=float(np.float32(0.5))).self_influence()).all()
