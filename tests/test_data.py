"""IDX files, where data is looked for, and the settings."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from byline import settings
from byline.settings import data as data_module
from byline.settings.data import DEBIAN_FASHION, fashion_mnist, mnist, read_idx

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx(array):
    """An independent writer of the format."""
    code = CODES[array.dtype.str[1:]]
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def folder(path, zipped=False, labels=4):
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (4, 3, 5), dtype=np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, labels, dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (2, 3, 5), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, 2, dtype=np.uint8),
    }
    for name, array in arrays.items():
        if zipped:
            (path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (path / name).write_bytes(idx(array))
    return arrays


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_idx_round_trip(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    (tmp_path / "plain").write_bytes(idx(array))
    (tmp_path / "zipped").write_bytes(gzip.compress(idx(array)))
    for name in ("plain", "zipped"):
        got = read_idx(tmp_path / name)
        assert got.dtype == np.dtype(dtype)
        assert np.array_equal(got, array)


def test_damaged_files_are_refused_by_name(tmp_path):
    good = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    cases = {
        "short": (good[:-1], "cut short"),
        "long": (good + b"x", "cut short or too long"),
        "headless": (good[:10], "cut short"),
        "empty": (b"", "begins with nothing"),
        "other": (b"PNG and so on", "not an IDX file"),
        "halfgz": (gzip.compress(good)[:-9], "damaged gzip"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} .*{message}"):
            read_idx(tmp_path / name)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_laid_out_like_mnist(tmp_path, zipped):
    arrays = folder(tmp_path, zipped)
    images = mnist(tmp_path)
    assert np.array_equal(images.train_images, arrays["train-images-idx3-ubyte"])
    assert np.array_equal(images.test_labels, arrays["t10k-labels-idx1-ubyte"])
    assert images.train_labels.dtype == np.int64
    assert "4 train, 2 test, 3×5" in repr(images)


def test_incomplete_and_inconsistent_folders(tmp_path):
    folder(tmp_path, labels=3)
    with pytest.raises(ValueError, match=r"train images are \(4, 3, 5\) and labels \(3,\)"):
        mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="lacks train-labels-idx1-ubyte"):
        mnist(tmp_path)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No Fashion-MNIST on this machine, and no network."""
    monkeypatch.setattr(data_module, "DEBIAN_FASHION", tmp_path / "debian")
    monkeypatch.setenv("BYLINE_DATA", str(tmp_path / "data"))
    asked = []
    monkeypatch.setattr("pooch.retrieve", lambda url, **options: asked.append((url, options)))
    return tmp_path, asked


def test_without_fetch_the_network_is_not_used(nowhere):
    _, asked = nowhere
    with pytest.raises(FileNotFoundError, match=r"byline data fetch fashion-mnist.*apt-get install dataset-"):
        fashion_mnist()
    assert not asked


def test_fetch_asks_for_the_official_files_by_hash(nowhere):
    root, asked = nowhere
    with pytest.raises(FileNotFoundError):  # the stand-in brings nothing
        fashion_mnist(fetch=True)
    assert len(asked) == 4
    for url, options in asked:
        assert url.startswith("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/")
        assert len(options["known_hash"]) == len("sha256:") + 64
        assert options["path"] == root / "data" / "fashion-mnist"


def test_a_file_that_is_not_the_known_one_is_refused(nowhere):
    root, _ = nowhere
    (root / "data").mkdir()
    folder(root / "data" / "fashion-mnist")
    with pytest.raises(ValueError, match="is not the known file: its content has sha256"):
        fashion_mnist()
    with pytest.raises(ValueError, match="is not the known file"):
        fashion_mnist(root / "data" / "fashion-mnist")


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_the_debian_package(tmp_path):
    images = fashion_mnist(DEBIAN_FASHION)
    assert images.train_images.shape == (60000, 28, 28)
    assert np.bincount(images.train_labels).tolist() == [6000] * 10
    assert np.bincount(images.test_labels).tolist() == [1000] * 10
    setting = settings.get("fashion-mlp")
    pixels = images.train_images[:5000].astype(np.float32)
    low, high = setting.pixel_range
    recovered = (setting.train_set.tensors[0].numpy() - low) / (high - low) * 255
    np.testing.assert_allclose(recovered, pixels.reshape(5000, 784), atol=1e-3)
    assert (pixels / 255).mean() == pytest.approx(0.286, abs=0.005)


def test_settings():
    assert settings.names()[:2] == ["digits-mlp", "fashion-mlp"]
    with pytest.raises(KeyError, match="no setting 'mnist'; there are digits-mlp, fashion-mlp"):
        settings.get("mnist")


def test_digits_mlp_trains():
    setting = settings.get("digits-mlp")
    assert (len(setting.train_set), len(setting.test_set)) == (1000, 200)
    x, y = setting.train_set.tensors
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.shape == (1000, 64)
    assert (float(x.min()), float(x.max())) == (0, 1)
    everything = torch.cat([x, setting.test_set.tensors[0]])
    assert len({row.numpy().tobytes() for row in everything}) >= 1190  # train and test are disjoint
    # a third of the recipe is enough to tell a working setting from a broken one
    trainer = replace(setting.trainer(), recipe=replace(setting.recipe, epochs=10))
    model = trainer(setting.train_set, 0)
    inputs, labels = setting.test_set.tensors
    assert (model(inputs).argmax(1) == labels).float().mean() > 0.9
    assert setting.task(model).output(model, [inputs, labels]).shape == (200,)
