"""The setting fashion2-resnet9: its data, its model, and the paper's own data and size through the same code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import byline
from byline import settings
from byline.settings import cifar
from byline.settings.data import DEBIAN_FASHION
from byline.settings.resnet import resnet9, two_classes


def write_cifar(folder: Path, each: int = 1200, seed: int = 0) -> np.ndarray:
    """Random files of CIFAR-10's binary layout; returns the first batch's records."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    first = None
    for name in (*cifar.TRAIN_FILES, cifar.TEST_FILE):
        count = each if name != cifar.TEST_FILE else each * 5 // 2
        records = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)
        first = records if first is None else first
    assert first is not None
    return first


def test_cifar_records_are_read_plane_by_plane(tmp_path: Path) -> None:
    first = write_cifar(tmp_path, 20)
    read = cifar.cifar10(tmp_path)
    assert read.train_images.shape == (100, 3, 32, 32)
    assert read.train_labels[:20].tolist() == first[:, 0].tolist()
    # record: label, 1024 red, 1024 green, 1024 blue, each by rows
    assert read.train_images[7, 1, 5, 9] == first[7, 1 + 1024 + 5 * 32 + 9]


def test_a_damaged_or_missing_cifar_file_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, 20)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\x00" * 3000)
    with pytest.raises(ValueError, match=r"data_batch_3.bin is cut short"):
        cifar.cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_3.bin"):
        cifar.cifar10(tmp_path)
    write_cifar(tmp_path, 20)
    (tmp_path / "test_batch.bin").write_bytes(bytes([77]) * 3073)
    with pytest.raises(ValueError, match=r"label 77"):
        cifar.cifar10(tmp_path)


def test_the_same_setting_reads_cifar_at_the_papers_width(tmp_path: Path) -> None:
    # a fifth of the labels are cats or dogs
    write_cifar(tmp_path, 6000)
    setting = settings.get("fashion2-resnet9").variant(tmp_path, 64)
    assert (len(setting.train_set), len(setting.test_set)) == (5000, 500)
    x, y = setting.train_set.tensors
    assert x.shape == (5000, 3, 32, 32)
    assert setting.simplest()(x[:2]).shape == setting.build().eval()(x[:2]).shape == (2, 2)
    assert set(y.tolist()) == {0, 1}
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    model = setting.build().eval()
    assert model[0][0].out_channels == 64
    assert model(x[:2]).shape == (2, 2)
    narrow = settings.get("fashion2-resnet9").variant(tmp_path)
    assert narrow.build()[0][0].out_channels == 8


def test_two_classes_become_zero_and_one_and_too_few_are_refused() -> None:
    labels = np.array([3, 5, 1, 5, 3])
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    x, y = two_classes(images, labels, (3, 5), 4)
    assert y.tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(x[1, 0], torch.tensor([[4, 5], [6, 7]]) / 255)
    with pytest.raises(ValueError, match="have 4 pictures; expected 5"):
        two_classes(images, labels, (3, 5), 5)


def test_settings_without_files_or_width_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data is for settings"):
        settings.get("digits-mlp").variant(tmp_path)
    with pytest.raises(ValueError, match="--width is for settings"):
        replace(settings.get("fashion-mlp"), at_width=None).variant(None, 8)
    with pytest.raises(ValueError, match="width is 7; expected an even number"):
        settings.get("digits-mlp").variant(None, 7)
    with pytest.raises(ValueError, match="width is 0"):
        settings.get("fashion2-resnet9").variant(None, 0)


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_the_data_are_two_balanced_classes() -> None:
    setting = settings.get("fashion2-resnet9")
    x, y = setting.train_set.tensors
    assert x.shape == (2000, 1, 28, 28)
    assert 0.4 < float(y.float().mean()) < 0.6
    assert len(setting.test_set) == 400


class Small:
    """Sixteen random pictures for a ResNet of width 2."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = resnet9(2).eval()
        for module in self.model.modules():  # statistics as after training
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        y = torch.randint(2, (16,))
        self.train = torch.utils.data.TensorDataset(torch.randn(16, 1, 28, 28), y)
        self.task = byline.Task(self.model)


def test_masks_reach_a_model_that_was_trained_without() -> None:
    small = Small()
    plain = byline.Independent([small.model])
    members = {
        "rate 0": byline.Dropout(plain, masks=2, p=0.0),
        "masks": byline.Dropout(plain, masks=2, p=0.5),
        "noise": byline.WeightNoise(plain, draws=2, scale=0.6),
    }
    scores = {
        name: byline.GradDot(small.task, e, progress=False).fit(small.train).attribute(small.train).values
        for name, e in {"plain": plain, **members}.items()
    }
    unmasked = byline.GradDot(small.task, byline.Dropout(plain, masks=2, p=None), progress=False)
    with pytest.raises(ValueError, match="has rate 0"):
        unmasked.fit(small.train)
    np.testing.assert_allclose(scores["rate 0"], scores["plain"], rtol=1e-4, atol=1e-5)
    for name in ("masks", "noise"):
        assert np.corrcoef(scores[name].ravel(), scores["plain"].ravel())[0, 1] < 0.999, name


def test_adapters_on_convolutions_give_the_gradients_of_autograd() -> None:
    small = Small()
    ensemble = byline.train_lora(
        small.task,
        byline.Independent([small.model]),
        small.train,
        adapters=1,
        rank=2,
        epochs=2,
        lr=0.02,
        progress=False,
    )
    member = ensemble.members()[0]
    assert any("conv" in name or "inner" in name for name in ensemble.adapters[0][0].tensors)
    found = byline.GradDot(small.task, ensemble, progress=False).fit(small.train).attribute(small.train).values
    with member.applied(small.model, "gradient") as model:
        rows: dict[str, list[torch.Tensor]] = {"output": [], "loss": []}
        chosen = [p for name, p in model.named_parameters() if "lora_" in name]
        for i in range(len(small.train)):
            x, y = (t[i : i + 1] for t in small.train.tensors)
            for of, sign in (("output", 1), ("loss", -1)):
                value = getattr(small.task, of)(model, (x, y)).sum()
                grads = torch.autograd.grad(sign * value, chosen)
                rows[of].append(torch.cat([g.flatten() for g in grads]))
    expected = torch.stack(rows["output"]) @ torch.stack(rows["loss"]).T
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=2e-3, atol=1e-5 * float(expected.abs().max()))
