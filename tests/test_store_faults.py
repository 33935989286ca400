"""What a store survives: kills at any moment, full and read-only disks, damage, and two writers at once."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import byline
from architectures import vectors
from byline.cli import app
from byline.store import Store, gc, info, repair, verify
from byline.store.lock import Lock
from byline.training import Recipe, Trainer

HERE = Path(__file__).resolve().parent
KILLS = int(os.environ.get("BYLINE_KILLS", "6"))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 3)).eval()


def data(n=60, seed=1):
    torch.manual_seed(seed)
    return vectors()(n)


def fitted(store, features=None, masks=3, models=2, batch_size=6, method=byline.TRAK):
    nets = [net(seed) for seed in range(models)]
    ensemble = byline.Independent(nets) if masks is None else byline.Dropout(byline.Independent(nets), masks=masks)
    return method(
        byline.Task(nets[0]),
        ensemble,
        features=features or byline.Exact(),
        damping=0.3,
        store=store,
        batch_size=batch_size,
        progress=False,
    ).fit(data())


# what killed processes do


def work(store):
    """Fit, then attribute."""
    found = fitted(store, masks=3, models=1).attribute(data(8, 2))
    return found.values, found.stderr


def start(store):
    """What a service does before it listens, and a first request: fit on the store, hold the rows, take the best."""
    made = fitted(store, byline.Factorized(8), masks=3, models=1)
    made.hold("int8")
    found = made.top(data(8, 2), 3)
    return found.proponents.scores, found.opponents.scores


def bank(store):
    """Ground truth: parts of two models, each kept when it is done."""
    if store is not None:
        store = Path(store)
        store.mkdir(exist_ok=True)
    recipe = Recipe(lr=0.1, batch_size=8, epochs=3)
    task = byline.Task(net())
    found = byline.retrain(
        Trainer(net, recipe, task.loss, group=2),
        data(),
        test_set=data(8, 2),
        task=task,
        subsets=4,
        seeds=2,
        path=None if store is None else store / "bank.safetensors",
        progress=False,
    )
    return (found.outputs,)


# kills


@pytest.fixture(scope="module")
def forks():
    """Run `work`, `start` or `bank` in forks of one child, which has imported torch.

    ``forks(stores, seconds, what)`` kills them after so long, or lets them end; returns exit codes and the seconds it
    took.
    """
    code = (
        "import os, sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\n"
        "import test_store_faults as t\n"
        "for what in (t.work, t.start, t.bank): what(None)\n"
        "for line in sys.stdin:\n"
        "    what, *stores = line.split(); pids = []\n"
        "    for store in stores:\n"
        "        pid = os.fork()\n"
        "        if not pid:\n"
        "            try: getattr(t, what)(store)\n"
        "            except BlockingIOError: os._exit(3)\n"
        "            except BaseException: os._exit(1)\n"
        "            os._exit(0)\n"
        "        pids.append(pid)\n"
        "    print(*pids, flush=True); print(*(os.waitpid(pid, 0)[1] for pid in pids), flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(HERE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(stores, seconds=None, what="work"):
        child.stdin.write(" ".join(map(str, [what, *stores])) + "\n")
        child.stdin.flush()
        pids, started = child.stdout.readline().split(), time.perf_counter()
        if seconds is not None:
            time.sleep(seconds)
            for pid in pids:
                # it may be done already
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(int(status)) for status in child.stdout.readline().split()]
        return codes, time.perf_counter() - started

    yield run
    child.stdin.close()
    child.wait(30)


@pytest.mark.parametrize("what", ["work", "start", "bank"])
def test_a_kill_at_any_moment_costs_no_bits(tmp_path, forks, what):
    """Of fit and attribute, a service's start, or a bank; half of the kills meet a resumed run."""
    again = globals()[what]
    expected = [value.tobytes() for value in again(None)]
    generator, partial, folder = random.Random(0), 0, tmp_path / "store"
    length = min(forks([tmp_path / name], what=what)[1] for name in "ab")
    for kill in range(4 * KILLS):
        # on a busy machine the first ones may all come too late, or too early
        if kill >= KILLS and partial:
            break
        # what comes before the first write takes a good part of the time
        moment = generator.random() if kill < KILLS else 0.4 + 0.6 * generator.random()
        forks([folder], moment * length, what)
        if what == "bank":
            partial += bool(list(folder.rglob("*.parts/*.safetensors")))
        elif (folder / "manifest.json").exists():
            report = verify(folder)
            assert report.whole, report.problems
            partial += bool(report.unfinished)
        if kill % 2:
            assert [value.tobytes() for value in again(folder)] == expected
            if what != "bank":
                gc(folder)
                assert verify(folder).whole
            assert not list(folder.rglob("*.tmp"))
            shutil.rmtree(folder)
    assert partial, "no kill fell into the middle of the work"


# damage


def files_of(folder):
    return {
        "manifest": folder / "manifest.json",
        "zarr.json": next(folder.glob("arrays/features/*/*/zarr.json")),
        "group": folder / "arrays" / "zarr.json",
        "chunk": next(folder.glob("arrays/features/*/*left/c.3.*")),
        "shared chunk": next(folder.glob("arrays/features/*/0.weight:right/c.3.*")),
        "vector": next(folder.glob("arrays/residual/*/c.2")),
        "output": next(folder.glob("arrays/output/*/c.0")),
        "state": next(folder.glob("arrays/state/*/*/c.0")),
    }


KINDS = ("manifest", "zarr.json", "group", "chunk", "shared chunk", "vector", "output", "state")


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_never_taken_for_numbers(tmp_path, kind, how):
    def fitted(place):
        return globals()["fitted"](place, masks=2)

    before = fitted(tmp_path).attribute(data(8, 2))
    file = files_of(tmp_path)[kind]
    content = bytearray(file.read_bytes())
    if how == "missing":
        if kind == "manifest":
            pytest.skip("a folder without a manifest is no store")
        file.unlink()
    else:
        position = len(content) // 2
        content[position] ^= 1
        file.write_bytes(content if how == "flipped" else content[:position])
    if kind == "manifest":
        for action in (fitted, verify, info, repair, gc):
            with pytest.raises(ValueError, match=r"manifest\.json"):
                action(tmp_path)
        return
    report = verify(tmp_path)
    assert [problem.file for problem in report.problems] == [str(file.relative_to(tmp_path))]
    result = CliRunner().invoke(app, ["store", "verify", str(tmp_path)])
    assert result.exit_code == 1
    assert str(file.relative_to(tmp_path)) in result.stdout
    # never wrong silently: what is not read does not matter, what is read is refused
    if kind in ("zarr.json", "group", "output"):
        assert (fitted(tmp_path).attribute(data(8, 2)).values == before.values).all()
    else:
        with pytest.raises(ValueError, match="store repair"):
            fitted(tmp_path).attribute(data(8, 2))
    repair(tmp_path)
    assert verify(tmp_path).whole
    written, write = [], Store.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Store, "write", lambda self, key, index, *rest: written.append(index) or write(self, key, index, *rest)
        )
        again = fitted(tmp_path)
    if kind == "shared chunk":
        # every member refers to it
        assert written == [3] * 4
    elif kind in ("chunk", "vector", "output"):
        assert written == [int(file.name.split(".")[1])]
    found = again.attribute(data(8, 2))
    np.testing.assert_allclose(found.values, before.values, rtol=1e-5, atol=1e-6)
    assert verify(tmp_path).whole
    assert not verify(tmp_path).unfinished


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("kind", ["record", "lock"])
def test_damage_to_what_a_stopped_run_left_costs_no_bits(tmp_path, monkeypatch, kind, how):
    """Its record of the member that it was at, and its lock: neither is there once all is complete."""
    expected = fitted(None).attribute(data(8, 2)).values
    write, left = Store.write, 4

    def stop(self, *arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            fitted(tmp_path)
    assert verify(tmp_path).unfinished
    if kind == "lock":
        # as a kill leaves it; whole, it would name a process that is gone
        file = tmp_path / "lock"
        file.write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename, "started": "1", "token": "x"}))
    else:
        file = next((tmp_path / "progress").glob("*.json"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    named = [problem.file for problem in verify(tmp_path).problems]
    assert named == ([f"progress/{file.name}"] if kind == "record" and how != "missing" else [])
    assert (fitted(tmp_path).attribute(data(8, 2)).values == expected).all()
    assert not (tmp_path / "lock").exists()
    report = verify(tmp_path)
    assert report.whole
    assert not report.unfinished


def test_verify_names_the_member_the_array_the_chunk_and_the_examples(tmp_path):
    fitted(tmp_path, byline.Factorized(8), masks=None, models=1)
    (file,) = tmp_path.glob("arrays/features/*/rows/c.4.0")
    file.write_bytes(file.read_bytes()[:-1])
    result = CliRunner().invoke(app, ["store", "verify", str(tmp_path), "--json"])
    (problem,) = json.loads(result.stdout)["problems"]
    assert result.exit_code == 1
    assert (problem["member"], problem["chunk"], problem["examples"]) == ("model 0", "4.0", [24, 30])
    assert problem["array"].endswith("/rows")


def test_nothing_is_unpickled(tmp_path):
    """Pickles in place of every file are refused, and do nothing."""

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    folder = tmp_path / "store"
    fitted(folder, masks=None, models=1)
    for file in files_of(folder).values():
        content = file.read_bytes()
        file.write_bytes(pickle.dumps(Trap()))
        try:
            verify(folder)
            fitted(folder, masks=None, models=1).attribute(data(3, 2))
        except ValueError:
            pass
        file.write_bytes(content)
    assert not (tmp_path / "sprung").exists()


# places


@contextmanager
def mounted(size):
    """A small disk of its own."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tempfile.mkdtemp(prefix="byline-full-")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        os.rmdir(folder)
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        yield Path(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=False)
        os.rmdir(folder)


def test_a_full_disk_is_one_sentence_and_the_next_fit_goes_on():
    expected = fitted(None).attribute(data(8, 2)).values
    with mounted("800k") as folder:
        with pytest.raises(OSError, match="no space left on the device; what is complete is kept") as caught:
            fitted(folder / "s")
        assert "\n" not in str(caught.value)
        assert not list(folder.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
        before = len(list(folder.rglob("c.*")))
        assert before > 10
        assert verify(folder / "s").whole
        assert (fitted(folder / "s").attribute(data(8, 2)).values == expected).all()


def test_a_read_only_store_is_read_and_an_incomplete_one_refused(tmp_path):
    expected = fitted(None).attribute(data(8, 2)).values
    with mounted("8m") as folder:
        fitted(folder / "s")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        assert (fitted(folder / "s").attribute(data(8, 2)).values == expected).all()
        with pytest.raises(OSError, match=r"cannot be written .* expected a complete store, or a place") as caught:
            fitted(folder / "s", masks=4)
        assert "\n" not in str(caught.value)
        with pytest.raises(OSError, match="cannot be written"):
            fitted(folder / "new")


@pytest.fixture
def bucket():
    import fsspec

    name = f"memory://byline-{os.getpid()}-{time.time_ns()}/store"
    yield name
    fsspec.filesystem("memory").rm(name.removeprefix("memory:/"), recursive=True)


@pytest.mark.parametrize("features", [byline.Exact(), byline.Factorized(8, dtype="int8")], ids=repr)
def test_a_url_is_as_good_as_a_folder(tmp_path, bucket, features):
    import zarr

    expected = fitted(None, features).attribute(data(8, 2)).values
    for place in (bucket, f"file://{tmp_path}/s"):
        assert (fitted(place, features).attribute(data(8, 2)).values == expected).all()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "write", None)
            again = fitted(place, features)
        assert (again.attribute(data(8, 2)).values == expected).all()
        assert verify(place).whole
        assert info(place)["writer"] is None
        assert gc(place)["files"] == []
        entry = next(iter(again.store.manifest.features.values()))
        array = next(iter(entry["arrays"].values()))
        found = zarr.open_array(f"{place}/arrays/{array['path']}", mode="r")
        assert found.shape == tuple(array["shape"])
    assert (tmp_path / "s" / "manifest.json").is_file()


def test_damage_behind_a_url_is_found_and_mended(bucket):
    import fsspec

    fitted(bucket, byline.Factorized(8))
    fs, root = fsspec.url_to_fs(bucket)
    file = next(name for name in fs.find(root) if name.endswith("c.2.0"))
    content = bytearray(fs.cat_file(file))
    content[5] ^= 4
    fs.pipe_file(file, bytes(content))
    with pytest.raises(ValueError, match="checksum"):
        fitted(bucket, byline.Factorized(8)).attribute(data(3, 2))
    (problem,) = repair(bucket).problems
    assert file.endswith(problem.file)
    fitted(bucket, byline.Factorized(8))
    assert verify(bucket).whole


def test_a_url_that_nothing_implements_is_one_sentence():
    with pytest.raises(ValueError, match="no fsspec implementation of nowhere:// here"):
        fitted("nowhere://bucket/x")


# two writers


def test_the_second_writer_is_told_who_has_the_store(tmp_path):
    fitted(tmp_path, masks=2)
    other = Lock(Store(tmp_path).files)
    other.acquire()
    with pytest.raises(BlockingIOError, match=rf"is being written by process {os.getpid()} on ") as caught:
        fitted(tmp_path)
    assert "\n" not in str(caught.value)
    # readers need no lock
    fitted(tmp_path, masks=2).attribute(data(3, 2))
    assert verify(tmp_path).whole
    assert info(tmp_path)["writer"]["pid"] == os.getpid()
    other.release()
    fitted(tmp_path)
    assert not (tmp_path / "lock").exists()


def test_a_dead_writers_lock_is_taken_over(tmp_path):
    lock = Lock(Store(tmp_path).files)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    for owner in (
        {"pid": child.pid, "host": os.uname().nodename, "started": "1"},
        # the number is in use again, by a process that began at another time
        {"pid": os.getpid(), "host": os.uname().nodename, "started": "1"},
        {"pid": 1, "host": "elsewhere", "heartbeat": time.time() - 1000},
    ):
        (tmp_path / "lock").write_text(json.dumps(owner))
        lock.acquire()
        lock.release()
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "heartbeat": time.time()}))
    with pytest.raises(BlockingIOError, match="process 1 on elsewhere"):
        lock.acquire()


def test_two_processes_on_one_store_never_corrupt_it(tmp_path, forks):
    expected = fitted(None, models=1).attribute(data(8, 2)).values
    codes, _ = forks([tmp_path / "s"] * 2)
    # both in turn, or one of them was told
    assert sorted(codes) in ([0, 0], [0, 3])
    assert verify(tmp_path / "s").whole
    assert (fitted(tmp_path / "s", models=1).attribute(data(8, 2)).values == expected).all()


# upkeep


def test_gc_removes_what_nothing_refers_to_and_nothing_else(tmp_path):
    before = fitted(tmp_path).attribute(data(8, 2)).values
    (tmp_path / "arrays" / "features" / "gone-output" / "rows").mkdir(parents=True)
    (tmp_path / "arrays" / "features" / "gone-output" / "rows" / "c.0.0").write_bytes(b"x" * 100)
    (tmp_path / "manifest.json.1-1.tmp").write_bytes(b"y" * 10)
    removed = json.loads(CliRunner().invoke(app, ["store", "gc", str(tmp_path), "--json"]).stdout)
    assert removed["bytes"] == 110
    assert len(removed["files"]) == 2
    assert verify(tmp_path).whole
    assert (fitted(tmp_path).attribute(data(8, 2)).values == before).all()


def test_upkeep_of_nothing_is_one_sentence(tmp_path):
    for command in ("info", "verify", "repair", "gc"):
        result = CliRunner().invoke(app, ["store", command, str(tmp_path / "none")])
        assert result.exit_code == 1
        assert "no store at" in result.output


@pytest.mark.parametrize("features", ["exact", "factorized:16", "nystrom:10", "low-rank:2", "adam:factorized:16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_an_estimate_knows_the_bytes_beforehand(tmp_path, features, dtype):
    from byline.cli_store import _features
    from byline.engines.estimate import estimate

    nets = [net(seed) for seed in range(2)]
    ensemble = byline.Dropout(byline.Independent(nets), masks=3)
    kind = _features(features, dtype)
    found = estimate(byline.Task(nets[0]), ensemble, data(), features=kind, batch_size=6)
    fitted(tmp_path, kind)
    chunks = sum(f.stat().st_size for f in tmp_path.rglob("c.*"))
    assert found.bytes == chunks
    assert (found.members, found.examples) == (6, 60)
    assert found.flops > 0
    assert found.seconds > 0


@pytest.mark.parametrize("features", [byline.Exact(), byline.LowRank(1), byline.LowRank(64), byline.Factorized(16)])
def test_an_estimate_counts_a_kernel_where_trak_forms_one(features):
    from byline.engines.estimate import estimate

    ensemble = byline.Independent([net(0)])
    found = estimate(byline.Task(net(0)), ensemble, data(), features=features)
    trak = byline.TRAK(byline.Task(net(0)), ensemble, features=features, damping=1.0, progress=False).fit(data())
    assert (found.kernel == 0) == trak._in_primal(trak._voters[0])


def test_estimates_on_the_command_line():
    result = CliRunner().invoke(app, ["store", "estimate", "digits-mlp", "--masks", "3", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["members"] == 3
    assert CliRunner().invoke(app, ["store", "estimate", "digits-mlp", "--features", "x"]).exit_code == 1
    assert CliRunner().invoke(app, ["store", "estimate"]).exit_code == 2
