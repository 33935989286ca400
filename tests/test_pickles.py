"""Several threads, processes and copies: each answers as the one attributor in one thread does, to the bit."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import byline
from byline.features.base import Products
from byline.guards import Lock
from byline.ledger import Ledger
from byline.methods.registry import make, methods
from test_accidents import data, ensemble, net


def fitted(kind="plain", method="trak", **options):
    model = net()
    members = (
        byline.Trajectory([[model, net(1)]], weights=[[0.01, 0.01]]) if method == "dvemb" else ensemble(kind, model)
    )
    return make(method, byline.Task(model), members, progress=False, **options).fit(data(12, 1))


def scores(attributor, seed=2):
    found = attributor.attribute(data(4, seed))
    return found.values.tobytes(), found.stderr.tobytes()


# threads


@pytest.mark.parametrize("kind", ["plain", "masks", "noise", "lora"])
def test_threads_ask_and_one_of_them_refits(kind):
    attributor = fitted(kind, "grad-cos")
    expected = [scores(attributor, seed) for seed in range(4)]
    ranked = attributor.top(data(4, 0), 3).proponents.scores.tobytes()

    def ask(number):
        if number % 5 == 4:
            attributor.fit(data(12, 1))
        if number % 5 == 3:
            return attributor.top(data(4, 0), 3).proponents.scores.tobytes() == ranked
        return scores(attributor, number % 4) == expected[number % 4]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(20)))


def public(cls):
    for name, value in inspect.getmembers(cls):
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            yield name, value.fget if isinstance(value, property) else value


@pytest.mark.parametrize("info", methods(), ids=lambda info: info.name)
def test_every_public_call_takes_its_turn(info):
    for name, function in public(info.cls):
        assert getattr(function, "_is_whole", False), name


def test_a_method_of_ones_own_takes_its_turn_too():
    class Mine(byline.GradDot):
        def twice(self, test_set):
            """Public, and new."""
            self.count = getattr(self, "count", 0) + 1
            if test_set is None:
                raise ValueError("half of it")
            return 2 * self.attribute(test_set).values

    model = net()
    attributor = Mine(byline.Task(model), byline.Independent([model]), progress=False).fit(data(12, 1))
    assert type(attributor) is Mine
    assert (attributor.twice(data(3, 2)) == 2 * attributor.attribute(data(3, 2)).values).all()
    assert Mine.twice.__doc__ == "Public, and new."
    assert list(inspect.signature(Mine.twice).parameters) == ["self", "test_set"]
    with pytest.raises(ValueError, match="half"):
        attributor.twice(None)
    assert attributor.count == 1


def test_fit_returns_the_attributor_itself():
    attributor = fitted()
    assert attributor.fit(data(8, 3)) is attributor
    assert attributor.add_members(byline.Independent([net(4)])) is attributor


def test_a_ledger_of_several_threads_books_time_once():
    ledger, ready = Ledger(), threading.Barrier(3)

    def work(phase):
        with ledger.phase(phase):
            ready.wait()
            time.sleep(0.05)
            ready.wait()
        for _ in range(2000):
            ledger.add_flops(phase, 1)

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(phase,)) for phase in ("fitting", "serving", "serving")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.total.wall <= time.perf_counter() - began
    assert (ledger.fitting.flops, ledger.serving.flops) == (2000, 4000)
    assert not ledger._open
    assert copy.deepcopy(ledger) == ledger == pickle.loads(pickle.dumps(ledger))


def test_products_of_several_threads_are_counted_once():
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    products = Products({"b"}, limit=10 * 60)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: products(a, b, (f"a{n % 20}", "b/0/5")), range(400)))
    assert all((one == a @ b.T).all() for one in found)
    assert products.used == 60 * len(products._kept) <= 600


def test_a_lock_in_a_forked_process_is_free():
    lock = Lock()
    held, done = threading.Event(), threading.Event()

    def hold():
        with lock():
            held.set()
            done.wait(10)

    threading.Thread(target=hold, daemon=True).start()
    held.wait(10)
    pid = os.fork()
    if not pid:
        os._exit(0 if lock().acquire(timeout=2) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    done.set()


# copies

WAYS = {"pickle": lambda a: pickle.loads(pickle.dumps(a)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("info", [info for info in methods() if not info.dear], ids=lambda info: info.name)
def test_a_copy_answers_alike(tmp_path, info, place, way):
    attributor = fitted(method=info.name, store=None if place == "memory" else tmp_path)
    before, own = scores(attributor), attributor.self_influence()
    other = WAYS[way](attributor)
    assert scores(other) == before
    assert (other.self_influence() == own).all()
    # a copy goes its own way
    if place == "memory" and info.name != "dvemb":
        other.add_members(byline.Independent([net(5)]))
        assert (len(other.ensemble), len(attributor.ensemble)) == (3, 2)
        other.fit(data(7, 3))
    assert scores(attributor) == before


@pytest.mark.parametrize("kind", ["plain", "masks", "noise", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_held_is_held_in_a_copy(kind, dtype):
    attributor = fitted(kind, "grad-dot", features=byline.Factorized(16))
    attributor.hold(dtype)
    before = attributor.top(data(4, 2), 3).proponents.scores
    other = pickle.loads(pickle.dumps(attributor))
    assert other._resident
    assert (other.top(data(4, 2), 3).proponents.scores == before).all()


def test_one_that_is_not_fitted_is_copied_too():
    model = net()
    attributor = byline.TRAK(byline.Task(model), byline.Independent([model]), damping=0.3, progress=False)
    expected = scores(copy.deepcopy(attributor).fit(data(12, 1)))
    assert scores(pickle.loads(pickle.dumps(attributor)).fit(data(12, 1))) == expected


def test_a_copy_whose_store_is_gone_says_so(tmp_path):
    attributor = fitted(store=tmp_path / "here")
    packed = pickle.dumps(attributor)
    shutil.rmtree(tmp_path / "here")
    with pytest.raises(ValueError, match=r"here.*does not hold that.*expected a store that this process reaches"):
        pickle.loads(packed)
    fitted(store=tmp_path / "here", features=byline.Nystrom(3))
    with pytest.raises(ValueError, match="does not hold that"):
        pickle.loads(packed)


class Scored(Dataset):
    """Asks an attributor in the workers of a loader."""

    def __init__(self, attributor):
        self.attributor, self.items = attributor, data(4, 2)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return torch.from_numpy(self.attributor.attribute(self.items[index : index + 1]).values[0])


def asked(attributor, out):
    out.put(attributor.attribute(data(4, 2)).values)


def test_other_processes(tmp_path):
    attributor = fitted("masks", store=tmp_path)
    expected = attributor.attribute(data(4, 2)).values
    loader = DataLoader(Scored(attributor), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    np.testing.assert_allclose(torch.cat(list(loader)).numpy(), expected, rtol=1e-4, atol=1e-6)
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=asked, args=(fitted("masks"), out))
    process.start()
    assert (out.get(timeout=60) == expected).all()
    process.join(10)
