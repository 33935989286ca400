"""Models that torch does not copy: weight_norm, spectral_norm, prune, what a forward pass leaves behind."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

import byline
import reference as ref
from byline.ensembles.copies import copied

torch.manual_seed(0)
TRAIN = TensorDataset(torch.randn(9, 4), torch.arange(9) % 3)
TEST = TensorDataset(torch.randn(3, 4), torch.arange(3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)
        nn.utils.weight_norm(self.lstm, "weight_hh_l0")

    def forward(self, x):
        return self.out(self.lstm(x.view(-1, 2, 2))[0][:, -1])


def plain():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def pruned():
    model = plain()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "weight", 0.2)
    prune.l1_unstructured(model[2], "bias", 1)
    return model


def spectral():
    model = plain()
    nn.utils.spectral_norm(model[0])
    return model


def normed():
    model = plain()
    nn.utils.weight_norm(model[0])
    nn.utils.weight_norm(model[2], dim=None)
    return model


class Remembering(nn.Module):
    """Keeps what the last pass gave, as models do that show their attention."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        self.hidden = torch.tanh(self.one(x))
        self.seen = [self.hidden]
        return self.two(self.hidden)


MODELS = [normed, spectral, pruned, Recurrent, Remembering]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("method", [byline.GradDot, byline.TRAK])
def test_scores_equal_autograd_on_the_model_itself(make, method):
    torch.manual_seed(1)
    models = [make().eval() for _ in range(2)]
    for model in models:
        model(TRAIN.tensors[0]).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(models[0])
    sides = [[ref.side(model, data, ref.classification, own=True) for model in models] for data in (TEST, TRAIN)]
    expected = ref.mean(ref.graddot, *sides) if method is byline.GradDot else ref.trak(*sides, 0.3)
    # the second member's weights are loaded into the copy of the first
    ensemble = byline.Independent([model.state_dict() for model in models])
    found = method(byline.Task(models[0]), ensemble, damping=0.3, progress=False).fit(TRAIN).attribute(TEST)
    ref.assert_close(found.values, expected, 1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [*MODELS, plain], ids=lambda make: make.__name__)
def test_a_copy_is_a_model_of_its_own(make):
    model = make().eval()
    x = TRAIN.tensors[0]
    before = model(x).detach()
    made = copied(copied(model))
    assert torch.equal(made(x), before)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)
    assert not torch.equal(made(x), before)


def test_script_modules_are_copied():
    for model in (torch.jit.script(plain()), torch.jit.trace(plain(), torch.ones(1, 4))):
        both = nn.Sequential(model, nn.Linear(3, 2))
        before = both(TRAIN.tensors[0]).detach()
        made = copied(both)
        assert all(p.is_leaf and p.requires_grad for p in made.parameters())
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()
        assert torch.equal(both(TRAIN.tensors[0]), before)


class Once(nn.Module):
    """Computes from a parameter when it is made, so that no gradient can come back to it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.log, self.out = nn.Parameter(torch.zeros(3)), nn.Linear(4, 3)
        self.scale = self.log.exp()

    def forward(self, x):
        return self.out(x) * self.scale


def test_what_was_computed_once_is_refused_in_one_sentence():
    model = Once().eval()
    with pytest.raises(ValueError, match=r"the model reads 'scale', which it computed from its parameters before"):
        byline.GradDot(byline.Task(model), byline.Independent([model]), progress=False).fit(TRAIN)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(x)

    def __deepcopy__(self, memo):
        return self


def test_what_cannot_be_copied_is_refused_in_one_sentence():
    model = plain()
    model[0].lock = threading.Lock()
    with pytest.raises(ValueError, match=r"the model cannot be copied \(its 0.lock\): cannot pickle .*; expected"):
        copied(model)
    with pytest.raises(ValueError, match=r"the very same ones \(out.weight, out.bias\)"):
        copied(Odd())


def test_new_weights_of_a_normed_model_need_a_build_function():
    from byline.training.ensembles import fresh

    with pytest.warns(FutureWarning):
        model = normed()
    with pytest.raises(ValueError, match=r"0 \(Linear\), 2 \(Linear\) cannot be initialised anew.*expected build="):
        fresh(model)
