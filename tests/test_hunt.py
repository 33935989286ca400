"""Shortcuts on models that look as if they could be taken: scores against autograd one example at a time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint as home
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import byline
from byline.features.layouts import Weights
from byline.swaps import uncheckpointed

D = 4


def rows(model: nn.Module, output: Callable[[Any, Any], Tensor], items: Tensor) -> Tensor:
    """(N, parameters) gradients by plain backward passes, which know nothing of byline."""
    found = []
    for item in items:
        model.zero_grad()
        output(model, [item[None]]).sum().backward()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        found.append(torch.cat([part.flatten() for part in parts]).clone())
    model.zero_grad()
    return torch.stack(found)


def said(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def check(model: nn.Module, items: Tensor, batch_size: int = 8) -> None:
    model.double().eval()
    gradients = rows(model, said, items)
    task = byline.Task(model, output=said, loss=said)
    attributor = byline.GradDot(
        task, byline.Independent([copy.deepcopy(model)]), features=byline.Exact(), batch_size=batch_size, progress=False
    )
    scores = attributor.fit(TensorDataset(items)).attribute(TensorDataset(items)).values
    torch.testing.assert_close(torch.as_tensor(scores).double(), -gradients @ gradients.T, rtol=1e-4, atol=1e-5)


# which example a row belongs to, decided by numbers after a batch in which they were in order


def _by_product(places: Tensor, h: Tensor) -> Tensor:
    return (places[:, :, None] * h).sum(1)


def _by_where(places: Tensor, h: Tensor) -> Tensor:
    return torch.where(places[:, :, None] > 0, h, 0.0).sum(1)


def _by_maximum(places: Tensor, h: Tensor) -> Tensor:
    return h.expand(len(h), *h.shape).masked_fill(places[:, :, None] == 0, -9).amax(1)


def _by_lookup(places: Tensor, h: Tensor) -> Tensor:
    return F.embedding(places.argmax(1), h)


def _by_attention(places: Tensor, h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h[None], h[None], h[None], attn_mask=(places - 1)[None] * 1e9)[0]


class Sorting(nn.Module):
    """Sorts the examples for a layer, and puts them back."""

    def __init__(self, moved: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.moved = moved
        self.first, self.second, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        places = F.one_hot(x[:, 0].argsort(stable=True), len(x)).to(x)
        h = self.moved(places, self.first(x).tanh())
        return self.last(self.moved(places.T, self.second(h).tanh()))[:, 0]


class Experts(nn.Module):
    """Sends examples to slots of experts by the gates, so that both factors of every product have a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(D, D), nn.Linear(D, 2), nn.Linear(D, 1)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = F.one_hot((x[:, 0] > 0).long(), 2)
        slots = F.one_hot((chosen.cumsum(0) - 1).clamp(min=0), len(x))
        gates = (chosen[..., None] * slots) * self.gate(x).softmax(-1)[..., None]
        sent = torch.einsum("nec,nd->ecd", gates, self.first(x).tanh())
        done = torch.stack([expert(one).tanh() for expert, one in zip(self.experts, sent, strict=True)])
        return self.last(torch.einsum("nec,ecd->nd", gates, done))[:, 0]


def _in_order_at_first() -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(40, D, dtype=torch.float64)
    x[:, 0] = torch.randint(-2, 3, (40,))
    x[:8, 0] = 0  # the first batch, and those that are looked at before
    x[[19, 39], 0] = 0
    return x


class Rolling(nn.Module):
    """Moves all examples by one place where the first of them says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        moves = (x[:1, 0] > 0).to(x)
        h = self.first(x).tanh()
        h = self.second((1 - moves) * h + moves * h.roll(1, 0)).tanh()
        return self.last((1 - moves) * h + moves * h.roll(-1, 0))[:, 0]


def test_examples_that_are_moved_in_later_batches():
    torch.manual_seed(1)
    items = _in_order_at_first()
    items[[16, 24], 0] = 1
    check(Rolling(), items)


@pytest.mark.parametrize("moved", [_by_product, _by_where, _by_maximum, _by_lookup, _by_attention])
def test_examples_that_are_sorted_in_later_batches(moved):
    torch.manual_seed(1)
    check(Sorting(moved), _in_order_at_first())


def test_experts_that_get_other_examples_in_later_batches():
    torch.manual_seed(1)
    check(Experts(), _in_order_at_first())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(D, D), nn.Parameter(torch.rand(D)), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = (x > 0).to(x)
        h = (self.first(x[:, None]).tanh() * self.scale * kept[:, :, None]).sum(1)
        return self.last((h[:, :, None] @ h[:, None]).softmax(-1).sum(2) / (1 + h.norm(dim=1)[:, None]))[:, 0]


def test_what_keeps_examples_apart_is_seen_once(monkeypatch):
    seen = []
    made = Weights.__init__
    monkeypatch.setattr(Weights, "__init__", lambda self, *args: (seen.append(1), made(self, *args))[1])
    torch.manual_seed(1)
    check(Plain(), torch.randn(400, D, dtype=torch.float64))
    # a hundred batches, of which every sixteenth is looked at again
    assert len(seen) < 40


class TimeFirst(nn.Module):
    """Flattens (time, examples), so that the example varies fastest along the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 1)
        self.beside = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        h = self.second(self.first(x.transpose(0, 1).reshape(t * n, D)).tanh()).view(t, n, D)
        return (self.last(h.tanh().sum(0)) + self.beside(x.sum(1)))[:, 0]


def test_gradients_of_zero_prove_nothing_for_the_next_checkpoint():
    torch.manual_seed(0)
    models = [TimeFirst().double().eval() for _ in range(2)]
    nn.init.zeros_(models[0].last.weight)
    items = torch.randn(24, 3, D, dtype=torch.float64)
    found = [rows(model, said, items) for model in models]
    expected = -sum(gradients @ gradients.T for gradients in found) / 2
    task = byline.Task(models[0], output=said, loss=said)
    method = byline.GradDot(
        task, byline.Independent(models), features=byline.Exact(), batch_size=8, progress=False
    ).fit(TensorDataset(items))
    scores = torch.as_tensor(method.attribute(TensorDataset(items)).values).double()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


# parts that are computed again in the backward pass


class Checkpointed(nn.Module):
    def __init__(self, way: bool | None, functional: bool = False):
        super().__init__()
        self.way, self.functional = way, functional
        self.first, self.second, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 1)
        self.drop, self.after = nn.Dropout(0.3), nn.Dropout(0.3)

    def part(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return (F.dropout(h, 0.3, self.training) if self.functional else self.drop(h)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        h = self.part(x) if self.way is None else checkpoint(self.part, x, use_reentrant=self.way)
        return self.last(self.after(self.second(h)).tanh())[:, 0]


@pytest.mark.parametrize("way", [True, False])
def test_a_checkpointed_part_has_gradients(way):
    torch.manual_seed(1)
    check(Checkpointed(way), torch.randn(12, D, dtype=torch.float64))


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("way", [True, False])
def test_masks_inside_a_checkpointed_part_are_those_of_the_forward_pass(way, functional):
    items = TensorDataset(torch.randn(12, D))
    found = []
    for own in (way, None):
        torch.manual_seed(1)
        model = Checkpointed(own, functional).eval()
        task = byline.Task(model, output=said, loss=said)
        ensemble = byline.Dropout(byline.Independent([copy.deepcopy(model)]), masks=3, p=0.4)
        method = byline.GradDot(task, ensemble, features=byline.Exact(), batch_size=5, progress=False).fit(items)
        found.append(torch.as_tensor(method.attribute(items).values))
    torch.testing.assert_close(*found)


def test_checkpointing_is_as_it_was_afterwards_and_in_other_threads():
    apply, generator = home.CheckpointFunction.apply, home._checkpoint_without_reentrant_generator
    again: list[bool] = []

    def part(x: Tensor) -> Tensor:
        again.append(torch.is_grad_enabled())
        return x.sin()

    def run() -> None:
        checkpoint(part, torch.ones(2, requires_grad=True), use_reentrant=True).sum().backward()

    with uncheckpointed(reentrant=True), uncheckpointed(reentrant=False):
        run()
        assert again == [True]
        other = threading.Thread(target=run)
        other.start()
        other.join()
        assert again == [True, False, True]
    assert home.CheckpointFunction.apply == apply
    assert home._checkpoint_without_reentrant_generator is generator
