"""Tasks: outputs, losses and residuals against formulas, and the ways a batch may look."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

import byline
import reference as ref
from architectures import padded
from byline import batches
from conftest import build


class Given(nn.Module):
    """The input is the output."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x, *rest, **named):
        return x * self.w


def test_classification_by_hand():
    task = byline.Task(Given().eval())
    p = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05]], dtype=torch.float64)
    y = torch.tensor([1, 1])
    own = torch.tensor([0.2, 0.9], dtype=torch.float64)
    for batch in ((p.log() + 3, y), [p.log(), y], {"x": p.log(), "labels": y}, (p.log(), y.unsqueeze(1))):
        torch.testing.assert_close(task.output(task.model, batch), (own / (1 - own)).log())
        torch.testing.assert_close(task.loss(task.model, batch), -own.log())
        torch.testing.assert_close(task.residual(task.model, batch), 1 - own)


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
def test_the_target_of_a_dict_is_found_by_its_usual_names(key):
    task = byline.Task(Given().eval())
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    torch.testing.assert_close(task.loss(task.model, {"x": x, key: y}), F.cross_entropy(x, y, reduction="none"))


def test_extreme_logits_stay_finite():
    task = byline.Task(Given().eval())
    x = torch.tensor([[300.0, -300.0], [-300.0, 300.0], [0.0, 1e4]], requires_grad=True)
    batch = (x, torch.tensor([0, 0, 1]))
    f = task.output(task.model, batch)
    torch.testing.assert_close(f, torch.tensor([600.0, -600.0, 1e4]))
    torch.testing.assert_close(task.loss(task.model, batch), F.cross_entropy(*batch, reduction="none"))
    torch.testing.assert_close(task.residual(task.model, batch), torch.tensor([0.0, 1.0, 0.0]))
    (g,) = torch.autograd.grad(f.sum(), x)
    torch.testing.assert_close(g, torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]))


def test_regression_by_hand():
    task = byline.Task(Given().eval(), output="regression")
    x, y = torch.tensor([1.0, 3.0]), torch.tensor([2.0, -1.0])
    for a, b in ((x, y), (x[:, None], y), (x[:, None], y[:, None]), (x, y[:, None])):
        assert task.output(task.model, (a, b)).tolist() == [1, 3]
        assert task.loss(task.model, (a, b)).tolist() == [0.5, 8]
        assert task.residual(task.model, (a, b)).tolist() == [1, -4]


@pytest.mark.parametrize("labels", [True, False])
def test_language_modeling_of_a_dict_is_shifted_as_hugging_face_does(labels):
    made = build("gpt2-labels")
    items = padded(labels=labels)(6)
    batch = default_collate(items)
    expected = [ref.language_modeling(made.model, default_collate([i])) for i in items]
    for found, which in ((made.task.output, 0), (made.task.loss, 1), (made.task.residual, 2)):
        want = torch.stack([e[which].detach() for e in expected])
        torch.testing.assert_close(found(made.model, batch).detach(), want, rtol=1e-4, atol=1e-5)
    if labels:
        for i, item in enumerate(items):
            hf = made.model(**default_collate([item])).loss
            torch.testing.assert_close(made.task.loss(made.model, batch)[i], hf, rtol=1e-4, atol=1e-5)


def test_language_modeling_of_a_tuple_is_aligned_already():
    made = build("tied-head")
    ids, targets = default_collate(made.train)
    targets = targets.clone()
    targets[0, :3] = -100
    logits = made.model(ids)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    mean = nll.view(targets.shape).sum(1) / (targets != -100).sum(1)
    torch.testing.assert_close(made.task.loss(made.model, (ids, targets)), mean)


def test_callables():
    model = Given().eval()
    task = byline.Task(model, output=lambda m, b: m(b[0]).sum(1))
    batch = (torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([0, 1]))
    assert task.output(model, batch).tolist() == [3, -1]
    assert task.loss(model, batch).tolist() == [-3, 1]
    torch.testing.assert_close(task.residual(model, batch), torch.tensor([-3.0, 1.0]).sigmoid())
    task = byline.Task(model, output=lambda m, b: m(b[0]).sum(1), loss=lambda m, b: m(b[0]).max(1)[0])
    assert task.loss(model, batch).tolist() == [2, 0]
    value, _ = task.differentiate(model, batch, "loss")
    assert value.tolist() == [-2, 0]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, {"parts.0.weight", "parts.0.bias", "parts.1.weight"}),
        ("parts.0.*", {"parts.0.weight", "parts.0.bias"}),
        (["*.bias", "parts.1.*"], {"parts.0.bias", "parts.1.weight"}),
        (lambda name: name.endswith("weight"), {"parts.0.weight", "parts.1.weight"}),
        ((p for p in ["*.bias"]), {"parts.0.bias"}),
    ],
)
def test_params_choose(params, expected):
    task = byline.Task(nn.Linear(2, 2).eval(), params=params)
    names = ["parts.0.weight", "parts.0.bias", "parts.1.weight"]
    assert {n for n in names if task.selects(n)} == expected
    assert {n for n in names if task.selects(n)} == expected, "the second time differs"


def test_arguments_are_checked():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"model is a dict; expected a torch.nn.Module"):
        byline.Task({})
    with pytest.raises(ValueError, match="output is 'clasification'; expected one of"):
        byline.Task(model, output="clasification")
    with pytest.raises(TypeError, match="output is a int"):
        byline.Task(model, output=3)
    with pytest.raises(TypeError, match="loss is a str"):
        byline.Task(model, loss="cross_entropy")


def test_fingerprints_tell_tasks_apart():
    model = nn.Linear(2, 2)
    one = byline.Task(model).fingerprint()
    assert one == byline.Task(nn.Linear(2, 2)).fingerprint()
    others = [
        byline.Task(nn.Linear(2, 3)),
        byline.Task(model, output="regression"),
        byline.Task(model, params="weight"),
        byline.Task(model, loss=lambda m, b: m(b[0]).sum(1)),
        byline.Task(model, residual=lambda m, b: m(b[0]).sum(1)),
    ]
    prints = [str(t.fingerprint()) for t in others]
    assert len({str(one), *prints}) == 6


def test_batches_of_every_shape():
    x, y = torch.arange(6.0).view(3, 2), torch.tensor([5, 6, 7])
    for batch in ((x, y), [x, y], {"b": x, "a": y}, {"a": (x, [y])}):
        assert batches.size(batch) == 3
        part = batches.take(batch, 1, 3)
        assert type(part) is type(batch)
        assert batches.size(part) == 2
        assert all(torch.equal(a, b[1:3]) for a, b in zip(batches.tensors(part), batches.tensors(batch), strict=True))
        tiled = batches.tile(batch, 2)
        for a, b in zip(batches.tensors(tiled), batches.tensors(batch), strict=True):
            assert torch.equal(a, torch.cat([b, b]))
    with pytest.raises(ValueError, match="its size cannot be told"):
        batches.size(("a", torch.tensor(3)))


def test_dataset_fingerprints_see_every_value_and_nothing_else():
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    data = list(zip(x, y, strict=True))
    one = batches.fingerprint(data)
    assert one == batches.fingerprint([(a.clone(), b.clone()) for a, b in data])
    changed = [list(data) for _ in range(4)]
    changed[0][2] = (data[2][0] + 1e-3, data[2][1])
    changed[1][3] = (data[3][0], torch.tensor(0))
    changed[2] = data[::-1]
    changed[3] = data[:3]
    assert len({one, *(batches.fingerprint(c) for c in changed)}) == 5
    assert batches.fingerprint([{"a": x, "b": "word"}]) != batches.fingerprint([{"a": x, "b": "ward"}])


def test_a_task_of_another_model_asks_the_same_of_other_parameters():
    wide, narrow = (nn.Sequential(nn.Linear(3, w), nn.ReLU(), nn.Linear(w, 2)).eval() for w in (8, 4))
    task = byline.Task(wide, loss=lambda model, batch: model(batch[0])[:, 0], params="2.*")
    other = task.with_model(narrow)
    assert (task.model, other.model) == (wide, narrow)
    batch = (torch.randn(5, 3), torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(other.loss(other.model, batch), narrow(batch[0])[:, 0])
    assert not other.selects("0.weight")
    with pytest.raises(TypeError, match="model is a dict; expected a torch"):
        task.with_model({})
