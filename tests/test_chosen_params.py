"""Which parameters count where one has several names, and models whose parameters have no gradient that could count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
import reference as ref


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.emb(x).mean(1))))


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mix, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.again = self.mix

    def forward(self, x):
        return self.out(self.again(torch.tanh(self.mix(self.emb(x).mean(1)))))


def examples(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randint(11, (n, 4), generator=generator), torch.randint(11, (n,), generator=generator))


TRAIN, TEST = examples(9, 1), examples(3, 2)


def by_hand(model, names):
    """GradDot of some parameters, by autograd one example at a time."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    found = ref.graddot(*(ref.side(model, data, ref.classification) for data in (TEST, TRAIN)))
    model.requires_grad_(True)
    return found


@pytest.mark.parametrize(
    ("make", "params", "names", "count"),
    [
        (Tied, "head.*", ["emb.weight", "head.bias"], 77),
        (Tied, "emb.*", ["emb.weight"], 66),
        (Tied, ["head.weight", "mix.bias"], ["emb.weight", "mix.bias"], 72),
        (Tied, lambda name: name.startswith("head"), ["emb.weight", "head.bias"], 77),
        (Shared, "again.*", ["mix.weight", "mix.bias"], 42),
        (Shared, ["again.weight", "out.*"], ["mix.weight", "out.weight", "out.bias"], 113),
    ],
)
def test_a_parameter_is_chosen_by_any_of_its_names(make, params, names, count):
    torch.manual_seed(0)
    model = make().eval()
    expected = by_hand(model, names)
    task = byline.Task(model, params=params)
    assert f"{count} attributed parameters" in repr(task)
    assert sum(p.numel() for p in task.chosen().values()) == count
    for at in (
        byline.GradDot(task, byline.Independent([model]), progress=False),
        byline.GradDot(byline.Task(model), byline.Independent([model]), params=params, progress=False),
    ):
        ref.assert_close(at.fit(TRAIN).attribute(TEST).values, expected, 1e-4)
    assert task.fingerprint() != byline.Task(model).fingerprint()


def test_a_pattern_among_several_that_matches_nothing_is_refused():
    model = Tied().eval()
    with pytest.raises(ValueError, match=r"params has 'haed\.\*', which matches no parameter .* such as 'emb.weight'"):
        byline.GradDot(byline.Task(model, params=["mix.*", "haed.*"]), byline.Independent([model]), progress=False).fit(
            TRAIN
        )


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.ones(6, dtype=torch.complex64)), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.fft.ifft(torch.fft.fft(x) * self.filter).real)


def test_complex_parameters_are_refused_unless_they_are_left_out():
    torch.manual_seed(0)
    model = Complex().eval()
    data = TensorDataset(torch.randn(6, 6), torch.arange(6) % 2)
    ensemble = byline.Independent([model])
    with pytest.raises(ValueError, match=r"parameter 'filter' is complex64; expected real ones"):
        byline.GradDot(byline.Task(model), ensemble, progress=False).fit(data)
    found = byline.GradDot(byline.Task(model, params="out.*"), ensemble, progress=False).fit(data).attribute(data)
    model.filter.requires_grad_(False)
    side = ref.side(model, data, ref.classification)
    ref.assert_close(found.values, ref.graddot(side, side), 1e-4)


@pytest.mark.filterwarnings("ignore")
def test_quantised_and_lazy_models_are_refused():
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear})
    with pytest.raises(ValueError, match=r"quantised layer \('0', Linear\), which has no gradient"):
        byline.Task(quantised)
    with pytest.raises(ValueError, match=r"parameter '0.weight' has no shape yet"):
        byline.Task(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precisions(dtype):
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8).to(dtype), nn.Linear(8, 3)

        def forward(self, x):
            return self.two(torch.tanh(self.one(x.to(dtype)).float()))

    model, data = Mixed().eval(), TensorDataset(torch.randn(8, 6), torch.arange(8) % 3)
    found = byline.GradDot(byline.Task(model), byline.Independent([model]), progress=False).fit(data).attribute(data)
    side = ref.side(model, data, ref.classification, own=True)
    ref.assert_close(found.values, ref.graddot(side, side), 3e-2)
