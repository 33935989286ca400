"""The store: nothing twice, nothing of another configuration, and what is on disk."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import byline
from architectures import vectors
from byline.store import Manifest, Store
from conftest import build
from test_methods import calls  # noqa: F401


def dropout_net(seed=0, width=20):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(0.5), nn.Linear(width, 3)).eval()


def data(n=9, seed=1):
    torch.manual_seed(seed)
    return vectors()(n)


FEATURES = [
    byline.Exact(),
    byline.Factorized(20),
    byline.Factorized(20, "pca"),
    byline.Nystrom(4),
    byline.LowRank(2),
    byline.Preconditioned(byline.Factorized(16, "pca")),
    byline.Principal(byline.Factorized(16), 4),
    byline.Dense(8),
]


@pytest.mark.parametrize("features", FEATURES, ids=repr)
@pytest.mark.parametrize("method", [byline.TRAK, byline.GradDot])
def test_a_second_fit_recomputes_nothing_and_gives_equal_bits(tmp_path, calls, features, method):  # noqa: F811
    train, test = data(), data(4, 2)

    def fit():
        model = dropout_net()
        ensemble = byline.Dropout(byline.Independent([model]), masks=3)
        return method(
            byline.Task(model),
            ensemble,
            features=features,
            damping=0.3,
            store=tmp_path,
            batch_size=4,
            progress=False,
        ).fit(train)

    one = fit()
    assert calls
    first = one.attribute(test)
    calls.clear()
    two = fit()
    assert not calls
    second = two.attribute(test)
    assert (first.values == second.values).all()
    assert (first.stderr == second.stderr).all()
    assert (one.self_influence() == two.self_influence()).all()


def test_other_methods_share_what_they_have_in_common(tmp_path, calls):  # noqa: F811
    model, train = dropout_net(), data()
    byline.TRAK(byline.Task(model), byline.Independent([model]), damping=1, store=tmp_path, progress=False).fit(train)
    calls.clear()
    byline.GradDot(byline.Task(model), byline.Independent([model]), store=tmp_path, progress=False).fit(train)
    assert not calls


def test_more_masks_and_another_order_find_the_old_ones(tmp_path, calls):  # noqa: F811
    a, b, train = dropout_net(0), dropout_net(1), data()

    def fit(models, masks):
        ensemble = byline.Dropout(byline.Independent(models), masks=masks)
        byline.GradDot(byline.Task(a), ensemble, store=tmp_path, progress=False).fit(train)

    fit([a], 2)
    one = sum(calls)
    calls.clear()
    fit([a], 3)
    assert 0 < sum(calls) <= one / 2
    calls.clear()
    fit([a, b], 3)
    assert sum(calls) > 0
    calls.clear()
    fit([a], 3)
    assert not calls


def test_equal_factors_are_kept_once(tmp_path):
    """The first layer's inputs are the same under every mask; so are its tensors on disk."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3)).eval()
    train = vectors(200)(30)
    sizes = []
    for masks in (1, 8):
        ensemble = byline.Dropout(byline.Independent([model]), masks=masks)
        made = byline.GradDot(
            byline.Task(model), ensemble, store=tmp_path / str(masks), progress=False, batch_size=16
        ).fit(train)
        sizes.append(made.store.nbytes())
        paths = {e["arrays"]["0.weight:right"]["path"] for e in made.store.manifest.features.values()}
        assert len(paths) == 1
        folders = list((tmp_path / str(masks)).rglob("0.weight:right"))
        assert len(folders) == 1
    assert sizes[1] < 4 * sizes[0]


def made_for(tmp_path, **changes):
    model = changes.pop("model", None) or dropout_net()
    train = changes.pop("train", None) or data()
    task = changes.pop("task", None) or byline.Task(model, **changes.pop("of", {}))
    return byline.TRAK(task, byline.Independent([model]), damping=1, store=tmp_path, progress=False, **changes).fit(
        train
    )


def loss_a(model, batch):
    return model(batch[0]).sum(1)


def loss_b(model, batch):
    return 2 * model(batch[0]).sum(1)


def column(model, batch, which):
    return model(batch[0])[:, which]


class Column:
    def __init__(self, which):
        self.which = which

    def __call__(self, model, batch):
        return column(model, batch, self.which)


def closure(which):
    return lambda model, batch: column(model, batch, which)


def default(number):
    def output(model, batch, which=number):
        return column(model, batch, which)

    return output


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ({}, {"model": dropout_net(width=21)}, "task.model"),
        ({}, {"train": data(seed=5)}, "dataset.sha256"),
        ({}, {"train": data(8)}, "dataset.length"),
        ({}, {"features": byline.Factorized(8)}, "features"),
        ({"features": byline.Factorized(8)}, {"features": byline.Factorized(9)}, "features.dim is 9 here and 8"),
        ({"features": byline.Nystrom(3)}, {"features": byline.Nystrom(3, seed=1)}, "features.seed"),
        ({}, {"of": {"params": ["0.*"]}}, "task.model"),
        ({}, {"of": {"loss": loss_a}}, "task.loss"),
        ({"of": {"loss": loss_a}}, {"of": {"loss": loss_b}}, "task.loss"),
        ({"of": {"output": loss_a}}, {"of": {"output": loss_b}}, "task.output"),
        ({"of": {"output": closure(0)}}, {"of": {"output": closure(1)}}, "task.output"),
        ({"of": {"output": default(0)}}, {"of": {"output": default(1)}}, "task.output"),
        ({"of": {"output": Column(0)}}, {"of": {"output": Column(1)}}, "task.output"),
        (
            {"of": {"output": functools.partial(column, which=0)}},
            {"of": {"output": functools.partial(column, which=1)}},
            "task.output",
        ),
    ],
)
def test_another_configuration_is_refused_by_name(tmp_path, first, second, names):
    made_for(tmp_path, **dict(first))
    made_for(tmp_path, **dict(first))
    with pytest.raises(ValueError, match=f"was made for another configuration: .*{names}"):
        made_for(tmp_path, **dict(second))
    made_for(tmp_path, **dict(first))


class Activated(nn.Module):
    """Two models of this class print alike and have equal parameters, and are not the same function."""

    def __init__(self, scale):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(6, 5), nn.Linear(5, 3), scale

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) * self.scale))


def test_a_model_of_the_same_structure_that_computes_something_else_is_refused(tmp_path):
    one, two = Activated(1.0).eval(), Activated(-3.0).eval()
    two.load_state_dict(one.state_dict())
    made_for(tmp_path, model=one)
    with pytest.raises(ValueError, match="another"):
        made_for(tmp_path, model=two)


def test_the_same_weights_in_another_form_find_the_store(tmp_path, calls):  # noqa: F811
    model = dropout_net()
    made_for(tmp_path, model=model)
    calls.clear()
    byline.TRAK(
        byline.Task(dropout_net(9)), byline.Independent([model.state_dict()]), damping=1, store=tmp_path, progress=False
    ).fit(data())
    assert not calls


def test_the_manifest_is_what_its_documentation_says(tmp_path):
    model = dropout_net()
    made_for(tmp_path, model=model, features=byline.Factorized(8), batch_size=4)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert set(content) == {*Manifest.__dataclass_fields__, "crc32c"}
    assert content["format"] == 2
    assert content["byline"] == byline.__version__
    assert content["made_for"]["dataset"]["length"] == 9
    made = {"kind": "factorized", "dim": 8, "basis": "random", "seed": 0, "dtype": "float32"}
    assert content["made_for"]["features"] == made
    ((key, entry),) = content["features"].items()
    assert entry["member"] == "model 0"
    assert entry["identity"] == key.removesuffix("-output")
    assert entry["weights"] == byline.Independent([model]).members()[0].weights.digest()
    assert (entry["of"], entry["changes"], entry["dtype"]) == ("output", [], "float32")
    assert (entry["examples"], entry["chunk"], entry["complete"]) == (9, 4, True)
    rows = entry["arrays"]["rows"]
    assert rows == {"path": f"features/{key}/rows", "shape": [9, 8], "chunks": [4, 8], "dtype": "float32"}
    assert set(content["state"]) == {key}
    assert sorted(v.split("/")[0] for v in content["vectors"]) == ["output", "residual"]
    assert all(v["complete"] and v["member"] == "model 0" for v in content["vectors"].values())
    for array in (rows, *content["state"][key].values(), *content["vectors"].values()):
        assert (tmp_path / "arrays" / array["path"] / "zarr.json").is_file()
    documented = (Path(__file__).parent.parent / "docs" / "store.md").read_text()
    for name in (*content, *entry, *rows):
        assert f"`{name}`" in documented, name


@pytest.mark.parametrize(
    "features", [byline.Factorized(8), byline.Exact(), byline.Factorized(8, dtype="int8")], ids=repr
)
def test_arrays_are_zarr_v3_and_readable_without_byline(tmp_path, features):
    import zarr

    made = made_for(tmp_path, features=features, batch_size=4)
    group = zarr.open_group(tmp_path / "arrays", mode="r")
    assert group.metadata.zarr_format == 3
    ((key, entry),) = made.store.manifest.features.items()
    stored = made.store.features(key)
    for name, array in entry["arrays"].items():
        found = group[array["path"]]
        assert found.chunks == tuple(array["chunks"])
        assert (found[:] == stored._arrays(0, 9)[name].numpy()).all()
    for path in made.store.manifest.vectors:
        assert (group[path][:] == made.store.vector(*path.split("/")).numpy()).all()
    for name, value in made.store.state(key).items():
        found = group[made.store.manifest.state[key][name]["path"]]
        assert (found[:] == value.numpy()).all()
        assert found.attrs["scalar"] == (value.ndim == 0)
    assert {name for name, _ in group.groups()} == {"features", "output", "residual", "state"}


def test_a_newer_format_and_a_broken_manifest_are_refused(tmp_path):
    made_for(tmp_path)
    file = tmp_path / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "format": 3}))
    with pytest.raises(ValueError, match="has format 3; this byline reads up to 2"):
        made_for(tmp_path)
    file.write_text(json.dumps({**content, "format": 1}))
    with pytest.raises(ValueError, match="has format 1, of an earlier byline; this one reads format 2"):
        made_for(tmp_path)
    for broken in ("{", "[]", '{"format": "new"}', "{}"):
        file.write_text(broken)
        with pytest.raises(ValueError, match="unreadable manifest"):
            made_for(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file; expected a folder"):
        Store(tmp_path / "file")


@pytest.mark.parametrize("features", FEATURES, ids=repr)
@pytest.mark.parametrize("stop_at", [1, 2, 5, 8])
def test_only_the_missing_chunks_of_an_interrupted_run_are_computed(tmp_path, calls, monkeypatch, features, stop_at):  # noqa: F811
    models = [dropout_net(s) for s in range(3)]
    train = data()

    def fit(store):
        return byline.TRAK(
            byline.Task(models[0]),
            byline.Independent(models),
            features=features,
            damping=0.3,
            store=store,
            batch_size=4,
            progress=False,
        ).fit(train)

    write, count = Store.write, []

    def failing(self, *arguments):
        count.append(1)
        if len(count) == stop_at:
            raise KeyboardInterrupt
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path)
    assert not (tmp_path / "lock").exists()
    written = []
    monkeypatch.setattr(
        Store, "write", lambda self, key, index, *rest: written.append(1) or write(self, key, index, *rest)
    )
    resumed = fit(tmp_path)
    # three chunks of each of three members, less those that were there
    assert len(written) == 9 - (stop_at - 1)
    whole = fit(None)
    for a, b in ((resumed.attribute(train), whole.attribute(train)),):
        assert (a.values == b.values).all()
        assert (a.stderr == b.stderr).all()
    assert not list(tmp_path.glob("progress/*"))


def test_masks_side_by_side_are_resumed_with_the_same_bits(tmp_path, monkeypatch):
    model, train = dropout_net(), data()

    def fit(store):
        ensemble = byline.Dropout(byline.Independent([model]), masks=3)
        return byline.TRAK(byline.Task(model), ensemble, damping=0.3, store=store, batch_size=4, progress=False).fit(
            train
        )

    put, count = Store._put_cell, []

    def failing(self, *arguments):
        count.append(1)
        if len(count) == 50:
            raise KeyboardInterrupt
        put(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_put_cell", failing)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path)
    assert [len(Store(tmp_path).missing(file.stem)) for file in tmp_path.glob("progress/*")] != [3, 3, 3]
    assert (fit(tmp_path).attribute(train).values == fit(None).attribute(train).values).all()


class Ragged(torch.utils.data.Dataset):
    """Sequences of several lengths, filled up within a batch."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(2 + (index * 5) % 9, 6, generator=generator), index % 3


def padded(items):
    longest = max(len(x) for x, _ in items)
    x = torch.stack([torch.cat([x, x.new_zeros(longest - len(x), 6)]) for x, _ in items])
    return x, torch.tensor([y for _, y in items])


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(6, 30), nn.Linear(30, 3)

    def forward(self, x):
        mask = x.abs().sum(-1, keepdim=True) > 0
        return self.b((torch.tanh(self.a(x)) * mask).sum(1))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_sequences_of_several_lengths_are_kept_whole(tmp_path, dtype):
    model, found = Pooled().eval(), []
    for store, size in ((tmp_path / "a", 3), (None, 3), (tmp_path / "b", 11)):
        made = byline.GradDot(
            byline.Task(model),
            byline.Independent([model]),
            features=byline.Exact(dtype=dtype),
            store=store,
            batch_size=size,
            collate=padded,
            progress=False,
        ).fit(Ragged())
        found.append(made.attribute(Ragged()).values)
        if dtype == "float32" and store is not None:
            (entry,) = made.store.manifest.features.values()
            assert entry["arrays"]["a.weight:left"]["shape"][2] >= 10
    assert (found[0] == found[1]).all()
    np.testing.assert_allclose(found[0], found[2], rtol=1e-4, atol=1e-5 * np.abs(found[2]).max())


def test_a_flipped_bit_is_noticed(tmp_path):
    made_for(tmp_path, features=byline.Factorized(8))
    chunk = max(
        (p for p in (tmp_path / "arrays" / "features").rglob("*") if p.is_file() and p.name != "zarr.json"),
        key=lambda p: p.stat().st_size,
    )
    content = bytearray(chunk.read_bytes())
    content[10] ^= 1
    chunk.write_bytes(bytes(content))
    with pytest.raises(Exception, match=r"(?i)checksum|crc"):
        made_for(tmp_path, features=byline.Factorized(8)).attribute(data(3))


def test_memory_and_folder_give_equal_bits(tmp_path):
    one = made_for(tmp_path).attribute(data(3)).values
    two = made_for(None).attribute(data(3)).values
    assert (one == two).all()


def test_a_store_of_another_batch_size_can_be_gone_on_with(tmp_path):
    models = [dropout_net(s) for s in range(2)]
    out = []
    for size in (4, 7):
        made = byline.TRAK(
            byline.Task(models[0]),
            byline.Independent(models[: 1 if size == 4 else 2]),
            damping=1,
            store=tmp_path,
            batch_size=size,
            progress=False,
        ).fit(data())
        out.append(made.attribute(data(3)).values)
    direct = byline.TRAK(byline.Task(models[0]), byline.Independent(models), damping=1, progress=False).fit(data())
    assert out[0].shape == (3, 9)
    np.testing.assert_allclose(out[1], direct.attribute(data(3)).values, rtol=1e-4, atol=1e-5)


def test_parameter_names_with_separators(tmp_path):
    made = build("params-filter")
    byline.TRAK(made.task, byline.Independent([made.model]), damping=1, store=tmp_path, progress=False).fit(made.train)
    again = byline.TRAK(made.task, byline.Independent([made.model]), damping=1, store=tmp_path, progress=False)
    assert again.fit(made.train).attribute(made.test).values.shape == (4, 9)
