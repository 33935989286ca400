"""Interrupts and errors in the middle of public calls: what was there before answers as before, to the bit."""

from __future__ import annotations

import copy
import errno
import os
import random
import sys
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import byline
from byline.methods.registry import make, methods
from byline.store import manifest as manifests
from byline.store import verify
from byline.store.files import Local, Memory
from byline.training import Recipe, Trainer

POINTS = int(os.environ.get("BYLINE_INTERRUPTS", "6"))
_TRACED = (os.path.dirname(byline.__file__), os.path.dirname(torch.__file__))


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    return list(zip(x, y, strict=True))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)).eval()


def ensemble(kind, model):
    base = byline.Independent([model])
    if kind == "masks":
        return byline.Dropout(base, masks=2)
    if kind == "noise":
        return byline.WeightNoise(base, draws=2)
    if kind == "lora":
        return byline.train_lora(byline.Task(model), base, data(6, 9), adapters=2, rank=1, epochs=1, progress=False)
    return byline.Independent([model, net(1)])


def made(model, kind="plain", store=None, method=byline.TRAK, members=None):
    members = ensemble(kind, model) if members is None else members
    found = method(byline.Task(model), members, damping=0.3, batch_size=4, store=store, progress=False)
    return found.fit(data(9, 1))


class Interrupt:
    """Counts the lines of byline and torch that run, and interrupts at one of them."""

    def __init__(self, at=None):
        self.at, self.count = at, 0

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *error):
        sys.settrace(None)

    def _call(self, frame, event, argument):
        file = frame.f_code.co_filename
        # a lock that torch takes for its devices would stay taken
        ours = file.startswith(_TRACED) and not any(f"/{kind}/" in file for kind in ("cuda", "mtia", "xpu", "mps"))
        return self._line if ours or file.endswith("contextlib.py") else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def points(work, seed):
    """Lines spread over all of what ``work`` runs, once it has run before."""
    work()
    with Interrupt() as seen:
        work()
    generator = random.Random(seed)
    return [generator.randrange(1, seen.count + 1) for _ in range(POINTS)]


def interrupted(work, at):
    """Whether the interrupt came through; in a destructor, Python swallows it."""
    try:
        with Interrupt(at):
            work()
    except KeyboardInterrupt:
        return True
    return False


def world(model):
    """What belongs to the user and must stay as it is."""
    return [
        [(n, p.detach().numpy().tobytes(), p.requires_grad, p.grad) for n, p in model.named_parameters()],
        [
            (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for n, m in model.named_modules()
        ],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 - whose state is that of the user
        random.getstate(),
        torch.nn.functional.dropout,
        torch.nn.functional.scaled_dot_product_attention,
        torch.is_grad_enabled(),
    ]


def answers(attributor):
    test = data(3, 2)
    found = attributor.attribute(test)
    best = attributor.top(test, 2).proponents
    arrays = [found.values, found.stderr, best.indices, best.scores, attributor.self_influence()]
    return [array.tobytes() for array in arrays]


CALLS = {
    "attribute": lambda a: a.attribute(data(3, 5)),
    "top": lambda a: a.top(data(3, 5), 2),
    "votes": lambda a: a.votes(data(3, 5)),
    "self_influence": lambda a: a.self_influence(),
    "hold": lambda a: a.hold("int8"),
}


@pytest.mark.parametrize("kind", ["plain", "masks", "noise", "lora"])
@pytest.mark.parametrize("call", sorted(CALLS))
def test_an_interrupted_question_changes_no_answer(kind, call):
    model = net()
    attributor = made(model, kind, method=byline.TRAK if kind == "plain" else byline.GradCos)
    before, mine = answers(attributor), world(model)
    spare = copy.deepcopy(attributor)
    for at in points(lambda: CALLS[call](copy.deepcopy(spare)), call + kind):
        came = interrupted(partial(CALLS[call], attributor), at)
        assert world(model) == mine
        if call == "hold" and not came:
            # held in int8, scores are others
            attributor = made(model, kind, method=type(attributor))
        assert answers(attributor) == before, at


@pytest.mark.parametrize("kind", ["plain", "masks", "noise", "lora"])
def test_an_interrupted_refit_leaves_the_first_fit_answering(kind):
    model = net()
    attributor = made(model, kind)
    first, mine = answers(attributor), world(model)
    other = data(8, 3)
    attributor.fit(other)
    second = answers(attributor)
    attributor.fit(data(9, 1))
    for at in points(lambda: attributor.fit(other).fit(data(9, 1)), kind):
        interrupted(lambda: attributor.fit(other).fit(data(9, 1)), at)
        found = answers(attributor)
        assert found in (first, second), at
        assert attributor.n_train_ == (9 if found == first else 8)
        assert world(model) == mine
        attributor.fit(data(9, 1))


@pytest.mark.parametrize("kind", ["plain", "masks", "noise"])
def test_an_interrupted_fit_into_a_folder_is_gone_on_with(tmp_path, kind):
    model = net()
    members = ensemble(kind, model)
    expected, mine = answers(made(model, kind, members=members)), world(model)
    folders = (tmp_path / f"whole {number}" for number in range(9))
    for number, at in enumerate(points(lambda: made(model, kind, next(folders), members=members), kind)):
        place = tmp_path / str(number)
        came = interrupted(lambda p=place: made(model, kind, p, members=members), at)
        assert not came or not (place / "lock").exists()
        assert world(model) == mine
        if (place / "manifest.json").exists():
            assert verify(place).whole
        assert answers(made(model, kind, place)) == expected, at


def test_interrupted_added_members_are_not_added():
    model = net()
    attributor = made(model)
    before = answers(attributor)
    more = byline.Independent([net(2)])
    with Interrupt() as seen:
        made(model).add_members(more)
    for number in range(POINTS):
        at = random.Random(number).randrange(1, seen.count)
        if interrupted(partial(attributor.add_members, more), at):
            assert answers(attributor) == before
            assert len(attributor.ensemble) == 2
        else:
            attributor = made(model)


def test_interrupted_training_leaves_the_model_and_the_random_numbers():
    model, task = net(), None
    task, mine = byline.Task(model), world(model)
    base = byline.Independent([model])

    def lora():
        return byline.train_lora(task, base, data(6, 9), adapters=1, rank=1, epochs=1, progress=False)

    def bank():
        trainer = Trainer(net, Recipe(lr=0.1, batch_size=4, epochs=1), task.loss, group=2)
        return byline.retrain(trainer, data(8, 1), test_set=data(3, 2), task=task, subsets=2, seeds=1, progress=False)

    adapters, outputs = lora().adapters[0][0].digest(), bank().outputs.tobytes()
    torch.set_rng_state(torch.tensor(mine[2], dtype=torch.uint8))
    for work in (lora, bank):
        for at in points(work, 0):
            interrupted(work, at)
            assert world(model) == mine
    assert lora().adapters[0][0].digest() == adapters
    assert bank().outputs.tobytes() == outputs
    assert world(model) == mine


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)

    def forward(self, input_ids):
        return self.head(torch.tanh(self.emb(input_ids).cumsum(1)))


def test_interrupted_tokens():
    model, generator = Words().eval(), torch.Generator().manual_seed(0)
    train = [{"input_ids": torch.randint(7, (5,), generator=generator)} for _ in range(4)]
    task = byline.Task(model, "language-modeling")
    attributor = byline.GradDot(task, byline.Independent([model]), progress=False).fit(train)

    def work():
        return byline.tokens(attributor, train[0], k=2)

    before, mine = work().values.tobytes(), world(model)
    for at in points(work, 0):
        interrupted(work, at)
        assert work().values.tobytes() == before
        assert world(model) == mine


@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize("features", [byline.Exact(), byline.Nystrom(3)], ids=repr)
def test_a_full_disk_at_any_write(tmp_path, monkeypatch, where, features):
    """The first fit is of nothing, the second of another dataset or of more members; each write fails once."""
    model, count = net(), [0, 0]
    kind = Memory if where == "memory" else Local
    write = kind.write

    def failing(self, key, *parts, **options):
        count[0] += 1
        if count[0] == count[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, key, *parts, **options)

    def fresh(place):
        return byline.TRAK(
            byline.Task(model),
            byline.Independent([model]),
            features=features,
            damping=0.3,
            batch_size=5,
            store=place,
            progress=False,
        )

    more = byline.Independent([net(1)])
    first = answers(fresh(None).fit(data(9, 1)))
    second = answers(fresh(None).fit(data(9, 1)).add_members(more))
    monkeypatch.setattr(kind, "write", failing)
    for at in range(1, 200, 2):
        place = None if where == "memory" else tmp_path / str(at)
        attributor = fresh(place)
        count[:] = 0, at
        try:
            attributor.fit(data(9, 1))
            failed = False
        except OSError:
            failed = True
        reached = count[0] < at
        count[1] = 0
        if failed:
            with pytest.raises(RuntimeError, match="not fitted"):
                attributor.attribute(data(3, 2))
            assert answers(attributor.fit(data(9, 1))) == first
        if not reached:
            assert answers(attributor) == first
            continue
        count[1] = at
        try:
            attributor.add_members(more)
        except OSError:
            count[1] = 0
            assert len(attributor.ensemble) == 1
            assert answers(attributor) == first
            attributor.add_members(more)
        count[1] = 0
        assert answers(attributor) == second
        if where == "folder":
            assert verify(place).whole
        if count[0] < at:
            break
    else:
        raise AssertionError("each write was to fail once")


def test_a_manifest_that_cannot_be_written_claims_nothing(tmp_path, monkeypatch):
    model = net()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    attributor = byline.GradDot(byline.Task(model), byline.Independent([model]), store=tmp_path, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "dump", full)
        with pytest.raises(OSError, match="no space left"):
            attributor.fit(data(9, 1))
    assert attributor.fit(data(8, 3)).n_train_ == 8


class Bad(Dataset):
    """An example that cannot be read, once."""

    def __init__(self, n, seed, bad):
        self.items, self.bad, self.armed = data(n, seed), bad, False

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if self.armed and index == self.bad:
            raise OSError("the disk is gone")
        return self.items[index]


@pytest.mark.parametrize("method", [byline.TRAK, byline.Influence, byline.KNNShapley, byline.RepresenterPoints])
def test_a_dataset_that_fails_half_way(method):
    model = net()
    attributor = method(byline.Task(model), byline.Independent([model, net(1)]), batch_size=4, progress=False)
    attributor.fit(data(9, 1))
    before = answers(attributor)
    other = Bad(20, 3, 13)
    other.armed = True
    for call in (attributor.fit, attributor.attribute, attributor.votes, lambda d: attributor.top(d, 2)):
        with pytest.raises(OSError, match="gone"):
            call(other)
        assert answers(attributor) == before
        assert attributor.n_train_ == 9
    other.armed = False
    alone = method(byline.Task(model), byline.Independent([model, net(1)]), batch_size=4, progress=False).fit(other)
    assert answers(attributor.fit(other)) == answers(alone)


def doubled(items):
    x, y = zip(*items, strict=True)
    return torch.stack(x) * 2, torch.stack(y)


def shifted(items):
    x, y = zip(*items, strict=True)
    return torch.stack(x) + 1, torch.stack(y)


class Own(Dataset):
    def __init__(self, items, collate):
        self.items = items
        if collate is not None:
            self.collate_fn = collate

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def sets():
    return {
        "plain": data(9, 1),
        "own doubled": Own(data(9, 1), doubled),
        "own shifted": Own(data(9, 1), shifted),
        "loaded doubled": DataLoader(data(9, 1), batch_size=3, collate_fn=doubled),
        "loaded shifted": DataLoader(data(8, 3), batch_size=3, collate_fn=shifted),
        "other": data(8, 3),
    }


@pytest.mark.parametrize("second", sorted(sets()))
@pytest.mark.parametrize("first", sorted(sets()))
def test_what_a_dataset_brings_goes_with_it(first, second):
    model = net()

    def fresh():
        return byline.GradDot(byline.Task(model), byline.Independent([model]), progress=False)

    given = sets()
    alone = fresh().fit(given[second])
    again = fresh().fit(given[first])
    again.fit(given[second])
    assert answers(again) == answers(alone)
    # test sets too, and members that are added later
    for attributor in (alone, again):
        # asked with another collate than it was fitted with, it may refuse
        with suppress(ValueError):
            attributor.attribute(given[first])
    assert (again.attribute(given[second]).values == alone.attribute(given[second]).values).all()
    assert (again.attribute(given[second]).values.diagonal() == again.self_influence()).all() or np.allclose(
        again.attribute(given[second]).values.diagonal(), again.self_influence(), rtol=1e-4
    )
    more = byline.Independent([net(1)])
    both = byline.GradDot(byline.Task(model), byline.Independent([model, net(1)]), progress=False).fit(given[second])
    assert answers(again.add_members(more)) == answers(both)


@pytest.mark.parametrize("info", [info for info in methods() if not info.dear], ids=lambda info: info.name)
def test_no_public_call_moves_random_numbers(info):
    model = net()
    members = byline.Independent([model])
    if info.name == "dvemb":
        members = byline.Trajectory([[model, net(1)]], weights=[[0.01, 0.01]])
    elif "dropout" in info.ensembles:
        members = byline.Dropout(members, masks=2) + ensemble("lora", model)
    mine = world(model)
    attributor = make(info.name, byline.Task(model), members, progress=False)
    attributor.fit(data(9, 1))
    attributor.attribute(data(3, 2))
    attributor.top(data(3, 2), 2)
    attributor.votes(data(3, 2))
    attributor.hold()
    attributor.self_influence()
    assert world(model) == mine
