"""Ray: the same bits as in process, whoever is lost on the way."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import byline
import byline.engines.local
import byline.methods.voting
from byline.engines import Ray
from byline.engines.local import member_key
from byline.store import Store
from byline.training import Recipe, Trainer

HAVE = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAVE and os.environ.get("BYLINE_CI") != "1", reason="needs ray")


@pytest.fixture(scope="module")
def cluster():
    """A machine of two cores, to which others can be added; all of it in processes of this one."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    # without these a lost machine is missed after half a minute
    impatient = {"health_check_period_ms": 200, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 5}
    small = {"object_store_memory": 200 * 2**20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "_system_config": impatient, **small})
    # workers unpickle what is defined here by value: they need not find the tests
    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    ray.init(address=made.address, logging_level="error", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def engine(cluster):
    return Ray(workers=2)


class Watched(Dataset):
    """Notes which process reads which example, and does something before it."""

    def __init__(self, folder: Path, length: int = 48, before: Any = None):
        torch.manual_seed(1)
        self.x, self.y = torch.randn(length, 6), torch.arange(length) % 3
        self.log, self.before, self.driver = folder / "reads", before, os.getpid()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        if os.getpid() != self.driver:
            if self.before is not None:
                self.before(index)
            with open(self.log, "a") as file:
                file.write(f"{index}\n")
        return self.x[index], self.y[index]

    def reads(self) -> list[int]:
        """Examples as other processes read them."""
        return list(map(int, self.log.read_text().split()))


def eventually(holds: Any, seconds: float = 60) -> None:
    """Wait for something that another process or thread does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class Kill:
    """Kills, once, the process that meets an example, as soon as some chunk is in the store."""

    def __init__(self, folder: Path, index: int, key: str, chunk: int):
        self.marker, self.store = folder / "happened", folder / "there"
        self.index, self.key, self.chunk = index, key, chunk

    def __call__(self, index: int) -> None:
        if index == self.index and not self.marker.exists():
            # chunks are written in the background: without this the one before may or may not be finished
            eventually(self.written)
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def written(self) -> bool:
        return self.chunk not in (Store(self.store).missing(self.key) or [self.chunk])


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).eval()


def examples(seed: int, count: int = 48) -> TensorDataset:
    torch.manual_seed(seed)
    return TensorDataset(torch.randn(count, 6), torch.arange(count) % 3)


def masks(forward_only: bool = False) -> byline.Ensemble:
    return byline.Dropout(byline.Independent([net(0), net(1)]), masks=2, forward_only=forward_only)


def made(method=byline.TRAK, ensemble=None, **options: Any):
    options = {"batch_size": 8, "progress": False, **options}
    return method(byline.Task(net()), masks() if ensemble is None else ensemble, **options)


def content(folder: Path) -> dict[str, bytes]:
    """Every number of a store; what a killed writer had not finished counts for nothing, and `gc` takes it away."""
    files = Store(folder).files
    return {key: files.read(key) for key, _ in files.walk("arrays") if not key.endswith(".tmp")}


# what is refused


def test_the_store_must_be_shared():
    pytest.importorskip("ray")
    for store, said in ((None, "store is None"), ("memory://x", "only one process sees")):
        with pytest.raises(ValueError, match=said):
            made(store=store, engine="ray")


def test_an_unknown_engine_is_named():
    with pytest.raises(ValueError, match=r"engine is 'dask'; expected None \(this process\), 'ray'"):
        made(engine="dask")


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"byline\[ray\]"):
        made(store=tmp_path, engine="ray")


@needs_ray
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"cpus": True}, "cpus is True"),
        ({"retries": -1}, "retries is -1"),
        ({"gpus": -1}, "gpus is -1"),
        ({"address": 6379}, "address is 6379"),
    ],
)
def test_options_out_of_range_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        Ray(**options)


# the same bits


@needs_ray
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (byline.TRAK, {"features": byline.Exact()}),
        (byline.TRAK, {"features": byline.Nystrom(6)}),
        (byline.TRAK, {"ensemble": "forward-only"}),
        (byline.TRAK, {"hessian": "weighted", "residual": "leave-one-out"}),
        (byline.GradCos, {"features": byline.Factorized(6, "pca")}),
        (byline.Influence, {"solver": "ekfac"}),
        (byline.TrackStar, {}),
        (byline.RepresentationSimilarity, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(map(str, value.values())) or "plain",
)
def test_the_bits_are_those_of_one_process(engine, tmp_path, method, options):
    options = dict(options)
    if options.pop("ensemble", None):
        options["ensemble"] = masks(forward_only=True)
    train, test = examples(0), examples(1, 10)
    here = made(method, store=tmp_path / "here", **options).fit(train)
    there = made(method, store=tmp_path / "there", engine=engine, **options).fit(train)
    assert content(tmp_path / "here") == content(tmp_path / "there")
    one, two = here.attribute(test), there.attribute(test)
    assert one.values.tobytes() == two.values.tobytes()
    assert one.stderr.tobytes() == two.stderr.tobytes()
    assert one.info == two.info


@needs_ray
def test_only_what_is_missing_is_computed(engine, tmp_path):
    train = Watched(tmp_path)
    ensemble = byline.Independent([net(0)])
    made(ensemble=ensemble, store=tmp_path / "s", engine=engine).fit(train)
    assert sorted(set(train.reads())) == list(range(48))
    train.log.unlink()
    made(ensemble=ensemble, store=tmp_path / "s", engine=engine).fit(train)
    assert not train.log.exists()


@needs_ray
def test_the_ledger_counts_what_others_did(engine, tmp_path):
    ledgers = [byline.Ledger(), byline.Ledger()]
    for ledger, where in zip(ledgers, (None, engine), strict=True):
        attributor = made(store=tmp_path / str(where is None), engine=where, ledger=ledger).fit(examples(0))
        attributor.attribute(examples(1, 10))
    one, two = ledgers
    assert two.fitting.flops == pytest.approx(one.fitting.flops, rel=1e-9)
    assert two.serving.flops == pytest.approx(one.serving.flops, rel=1e-9)
    assert two.fitting.seconds > 0


@needs_ray
def test_a_worker_uses_its_share_of_the_cores(engine, tmp_path):
    threads = tmp_path / "threads"

    def note(index: int) -> None:
        with open(threads, "a") as file:
            file.write(f"{torch.get_num_threads()}\n")

    made(store=tmp_path / "s", engine=engine).fit(Watched(tmp_path, before=note))
    assert set(threads.read_text().split()) == {"1"}
    threads.unlink()
    made(store=tmp_path / "t", engine=Ray(workers=1)).fit(Watched(tmp_path, before=note))
    assert set(threads.read_text().split()) == {"2"}


@needs_ray
@pytest.mark.parametrize("ask", [byline.TRAK.attribute, byline.TRAK.self_influence], ids=["attribute", "self"])
def test_scores_are_made_by_others_in_the_order_of_one_process(engine, tmp_path, monkeypatch, ask):
    # three ranges of test examples for each of four members, none of which may vote before the one ahead of it
    monkeypatch.setattr(byline.methods.voting, "_SPAN", 16)
    train, test = examples(0), Watched(tmp_path)
    arguments = (test,) if ask is byline.TRAK.attribute else ()
    here = made(store=tmp_path / "s").fit(train)
    there = made(store=tmp_path / "s", engine=engine).fit(train)
    one, two = ask(here, *arguments), ask(there, *arguments)
    if arguments:
        assert sorted(test.reads()) == sorted(list(range(48)) * 4)
        assert one.stderr.tobytes() == two.stderr.tobytes()
        one, two = one.values, two.values
    assert one.tobytes() == two.tobytes()
    assert here.damping_ == there.damping_


def test_a_run_of_checkpoints_is_followed_from_any_range_of_test_examples(tmp_path, monkeypatch):
    """What an engine's processes are given: pieces that begin in the middle of the test set."""
    monkeypatch.setattr(byline.methods.voting, "_SPAN", 16)
    runs = byline.Trajectory([[net(0), net(1)]], weights=[[0.01, 0.01]])
    attributor = made(byline.DVEmb, runs, damping=0.1).fit(examples(0))
    whole = attributor.attribute(examples(1)).values
    monkeypatch.setattr(byline.methods.dvemb, "_BLOCK", 16)
    monkeypatch.setattr(type(attributor.engine), "processes", lambda self: 2)
    torch.testing.assert_close(torch.from_numpy(attributor.attribute(examples(1)).values), torch.from_numpy(whole))


# training


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def trainer(group: int = 3) -> Trainer:
    return Trainer(lambda: net().train(), Recipe(lr=0.1, batch_size=8, epochs=2), loss, group=group)


def retrained(path: Path, **options: Any) -> byline.Bank:
    options = {"train_fn": trainer(), "train_set": examples(0), **options}
    return byline.retrain(
        test_set=examples(1, 10), task=byline.Task(net()), subsets=4, seeds=2, path=path, progress=False, **options
    )


@needs_ray
def test_models_are_those_of_one_process(engine):
    options = {"task_loss": loss, "seeds": range(7), "group": 3, "checkpoints": [1]}
    here = byline.train_many(trainer().build, examples(0), trainer().recipe, **options)
    there = byline.train_many(trainer().build, examples(0), trainer().recipe, **options, engine=engine)
    for one, two in zip(here, there, strict=True):
        assert (one.seed, one.losses, one.cost.flops) == (two.seed, two.losses, two.cost.flops)
        assert all(torch.equal(one.state_dict[k], two.state_dict[k]) for k in one.state_dict)
        assert all(torch.equal(one.checkpoints[1][k], two.checkpoints[1][k]) for k in one.checkpoints[1])


@needs_ray
def test_a_bank_is_that_of_one_process(engine, tmp_path):
    here, there = retrained(tmp_path / "a.safetensors"), retrained(tmp_path / "b.safetensors", engine=engine)
    assert here.outputs.tobytes() == there.outputs.tobytes()
    assert here.metadata["cost"]["flops"] == there.metadata["cost"]["flops"] > 0
    assert not (tmp_path / "b.safetensors.parts").exists()


@needs_ray
def test_a_bank_goes_on_with_the_parts_that_are_missing(engine, tmp_path):
    """The second part fails; what was complete before is not trained again, in process or elsewhere."""
    here = retrained(tmp_path / "a.safetensors", train_fn=Halting(tmp_path, None))
    with pytest.raises(ZeroDivisionError):
        retrained(tmp_path / "b.safetensors", train_fn=Halting(tmp_path, 5), engine=engine)
    kept = len(list((tmp_path / "b.safetensors.parts").glob("*.safetensors")))
    (tmp_path / "trained").unlink()
    there = retrained(tmp_path / "b.safetensors", train_fn=Halting(tmp_path, None), engine=engine)
    assert len((tmp_path / "trained").read_text().split()) == 8 - 2 * kept
    assert here.outputs.tobytes() == there.outputs.tobytes()


class Halting:
    """Trains one model at a time, in parts of two, until one fails."""

    group = 2

    def __init__(self, folder: Path, fails: int | None):
        self.folder, self.fails = folder, fails

    def describe(self):
        return "halting"

    def many(self, train_set, subsets, seeds):
        if self.fails is not None and len(self.trained()) >= self.fails:
            raise ZeroDivisionError("on purpose")
        with open(self.folder / "trained", "a") as file:
            file.write("".join(f"{seed}\n" for seed in seeds))
        return trainer().many(train_set, subsets, seeds)

    def trained(self) -> list[str]:
        log = self.folder / "trained"
        return log.read_text().split() if log.exists() else []


# what goes wrong


@needs_ray
def test_a_bad_example_is_named_as_in_process(engine, tmp_path):
    x, y = examples(0).tensors
    x = x.clone()
    x[37] = float("nan")
    with pytest.raises(ValueError, match=r"train_set\[37\] has a NaN or infinite") as raised:
        made(store=tmp_path / "s", engine=engine).fit(TensorDataset(x, y))
    assert type(raised.value) is ValueError


@needs_ray
def test_what_cannot_be_sent_is_one_sentence(engine, tmp_path):
    train = Watched(tmp_path)
    train.lock = threading.Lock()
    with pytest.raises(ValueError, match="can be pickled"):
        made(store=tmp_path / "s", engine=engine).fit(train)


@needs_ray
def test_a_killed_worker_costs_its_unfinished_chunks_alone(engine, tmp_path, monkeypatch, caplog):
    # one member, six chunks of eight, two pieces of three; the second chunk of the second piece kills
    monkeypatch.setattr(byline.engines.local, "_PIECES", 1)
    ensemble = byline.Independent([net(0)])
    made(ensemble=ensemble, store=tmp_path / "here").fit(Watched(tmp_path))
    key = member_key(ensemble.members()[0].identity("gradient"), "output")
    train = Watched(tmp_path, before=Kill(tmp_path, 35, key, 3))
    there = made(ensemble=ensemble, store=tmp_path / "there", engine=engine).fit(train)
    assert (tmp_path / "happened").exists()
    assert "lost a worker" in caplog.text
    assert content(tmp_path / "here") == content(tmp_path / "there")
    reads = train.reads()
    # a process looks at some examples before it trusts the model, and again at one of some chunks, alone
    probes = {0, 23, 47} | {i * 47 // 15 for i in range(16)} | {8 * c + (c * 7919 + 13) % 8 for c in range(6)}
    assert len(probes) < 24
    for index in set(range(48)) - probes:
        # 32 to 34 were read before the kill, and again
        assert reads.count(index) == (2 if index in (32, 33, 34) else 1), index
    assert there.n_train_ == 48


@needs_ray
def test_a_piece_that_kills_every_worker_ends_the_run(cluster, tmp_path):
    def fatal(index: int) -> None:
        if index == 35:
            os.kill(os.getpid(), signal.SIGKILL)

    train = Watched(tmp_path, before=fatal)
    with pytest.raises(RuntimeError, match="Ray lost 2 workers on the same piece"):
        made(store=tmp_path / "s", engine=Ray(workers=2, retries=1)).fit(train)
    # what was complete is found by the next run
    train.before = None
    train.log.unlink()
    made(store=tmp_path / "s", engine=Ray(workers=2)).fit(train)
    assert len(train.reads()) < 2 * 48


@needs_ray
def test_a_lost_machine_costs_its_unfinished_chunks_alone(cluster, tmp_path):
    import ray

    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    lost = node.node_id

    marker = tmp_path / "happened"

    def hang(index: int) -> None:
        import ray

        if ray.get_runtime_context().get_node_id() == lost:
            marker.touch()
            time.sleep(600)
        # or the others might have done all before a process of that machine has even started
        eventually(marker.exists)

    def remove() -> None:
        eventually(marker.exists)
        cluster.remove_node(node, allow_graceful=False)

    train = Watched(tmp_path, before=hang)
    made(store=tmp_path / "here").fit(Watched(tmp_path))  # reads of this process are not noted
    remover = threading.Thread(target=remove)
    remover.start()
    made(store=tmp_path / "there", engine=Ray(workers=3)).fit(train)
    remover.join(60)
    eventually(lambda: len([n for n in ray.nodes() if n["Alive"]]) == 1)
    assert content(tmp_path / "here") == content(tmp_path / "there")
