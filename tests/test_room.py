"""What does not fit into memory or onto the disk is refused before any gradient is computed, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
from byline.engines import room
from byline.store.chunks import Spec

N = 40


class Words(nn.Module):
    """A language model with a tied head: its rows are as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.mix, self.head = nn.Embedding(97, 16), nn.Linear(16, 16), nn.Linear(16, 97, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.emb(x))))


def words():
    generator = torch.Generator().manual_seed(1)
    return byline.Task(Words().eval(), "language-modeling"), TensorDataset(
        torch.randint(97, (N, 6), generator=generator)
    )


def vectors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 4)).eval()
    return byline.Task(model), TensorDataset(torch.randn(N, 8), torch.arange(N) % 4)


def pictures():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    return byline.Task(model), TensorDataset(torch.randn(N, 1, 8, 8), torch.arange(N) % 3)


FEATURES = [
    byline.Exact(),
    byline.Exact(dtype="int8"),
    byline.Exact(dtype="float16"),
    byline.LowRank(3),
    byline.LowRank(3, dtype="int8"),
    byline.Factorized(40),
    byline.Nystrom(16),
    byline.Dense(24, dtype="float16"),
]


def kept(at) -> int:
    """Bytes of the rows that a fit has really written."""
    total = 0
    for member in at.ensemble.members():
        entry = at.store.record(f"{member.identity('gradient')}-{at._of}")
        arrays = {path.path: path for path in map(Spec.of, entry["arrays"].values())}
        total += sum(spec.nbytes for spec in arrays.values())
    return total


def trak(task, features=None, ensemble=None, kind=byline.GradDot, **options):
    return kind(task, ensemble or byline.Independent([task.model]), features=features, progress=False, **options)


def nothing(monkeypatch):
    """No gradient may be computed any more."""

    def calibrate(*args):
        raise AssertionError("gradients are computed")

    monkeypatch.setattr("byline.engines.workbench.calibrate", calibrate)


@pytest.mark.parametrize("features", FEATURES, ids=repr)
@pytest.mark.parametrize("make", [words, vectors, pictures], ids=lambda make: make.__name__)
def test_what_is_refused_is_what_does_not_fit(make, features, monkeypatch):
    task, data = make()
    need = kept(trak(task, features, batch_size=N).fit(data))
    beside = 20 * kept(trak(task).fit(data)) / N if isinstance(features, byline.Nystrom) else 0
    monkeypatch.setattr(room, "available", lambda: 1.25 * need + beside)
    trak(task, features, batch_size=N).fit(data)
    monkeypatch.setattr(room, "available", lambda: 0.85 * need)
    nothing(monkeypatch)
    with pytest.raises(ValueError, match=rf"whose rows of {N} train_set examples .* of memory are free; use"):
        trak(task, features, batch_size=N).fit(data)


def test_the_kernel_counts_and_so_do_members(monkeypatch):
    task, data = vectors()
    need = kept(trak(task, batch_size=N).fit(data))
    kernel = 24 * N * N
    monkeypatch.setattr(room, "available", lambda: 1.25 * need)
    nothing(monkeypatch)
    with pytest.raises(ValueError, match="train_set examples and 2 members take about"):
        trak(task, ensemble=byline.Independent([task.model, vectors_of_another_seed()])).fit(data)
    monkeypatch.setattr(room, "available", lambda: need + 0.9 * kernel)
    with pytest.raises(ValueError, match=r"what is held beside them 0\.038 MB"):
        trak(task, kind=byline.TRAK).fit(data)


def vectors_of_another_seed():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 4))


def test_masks_share_what_goes_into_their_first_layers(monkeypatch):
    task, data = vectors()
    masks = byline.Dropout(byline.Independent([task.model]), masks=6)
    at = trak(task, ensemble=masks, batch_size=N).fit(data)
    need = sum(size for key, size in at.store.files.walk() if "/output" not in key)
    monkeypatch.setattr(room, "available", lambda: 1.25 * need)
    trak(task, ensemble=masks, batch_size=N).fit(data)


def test_a_store_needs_room_on_its_disk_and_batches_in_memory(tmp_path, monkeypatch):
    task, data = words()
    need = kept(trak(task, batch_size=N).fit(data))
    monkeypatch.setattr(room, "available", lambda: need / 2)
    trak(task, store=tmp_path / "fits", batch_size=4).fit(data)
    with monkeypatch.context() as patch:
        nothing(patch)
        with pytest.raises(ValueError, match=r"at a time, and .* or a smaller batch_size than 40"):
            trak(task, store=tmp_path / "batch", batch_size=N).fit(data)
        patch.setattr(room, "_free", lambda folder: 0.9 * need)
        with pytest.raises(ValueError, match=r"are free in store='.*full'; use features that fit"):
            trak(task, store=tmp_path / "full", batch_size=4).fit(data)
    # what is there already needs no room
    monkeypatch.setattr(room, "_free", lambda folder: 0)
    trak(task, store=tmp_path / "fits", batch_size=4).fit(data)


def test_the_features_that_are_named_fit(monkeypatch):
    task, data = words()
    need = kept(trak(task, batch_size=N).fit(data))
    monkeypatch.setattr(room, "available", lambda: 0.6 * need)
    with pytest.raises(ValueError, match=r"use features that fit: byline.Factorized\(\d+\) takes") as refused:
        trak(task).fit(data)
    dim = int(str(refused.value).partition("Factorized(")[2].partition(")")[0])
    trak(task, byline.Factorized(dim)).fit(data)


def test_limits_of_the_process_and_of_its_control_group(tmp_path, monkeypatch):
    import resource

    plain = room.available()
    assert plain > 0
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    real = resource.getrlimit
    limited = lambda kind: (used + 10**7, -1) if kind == resource.RLIMIT_AS else real(kind)  # noqa: E731
    monkeypatch.setattr(resource, "getrlimit", limited)
    assert 0 <= room.available() <= 10**7 < plain
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("1000000\n")
    (tmp_path / "job" / "memory.current").write_text("700000\n")
    (tmp_path / "job" / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    assert list(room._groups(own, tmp_path)) == [400_000]
    old = tmp_path / "memory" / "docker"
    old.mkdir(parents=True)
    for name, text in (("limit_in_bytes", "5000"), ("usage_in_bytes", "2000"), ("stat", "total_inactive_file 500")):
        (old / f"memory.{name}").write_text(text)
    own.write_text("5:cpu,cpuacct:/x\n4:memory:/docker\n")
    assert list(room._groups(own, tmp_path)) == [3500]
