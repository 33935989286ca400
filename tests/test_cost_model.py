"""The cost model against what is counted and what is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
from byline.engines.model import Layer, Workload

N, BATCH, COLUMNS, MASKS = 70, 16, 60, 4
LAYERS = (Layer("0.weight", 16, 10, first=True), Layer("3.weight", 8, 16), Layer("5.weight", 3, 8, bias=False))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)
    ).eval()


class Words(nn.Module):
    """Linear layers at five positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 20, bias=False), nn.Linear(20, 3)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x))).mean(1)


def examples(*shape: int) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(*shape), torch.arange(shape[0]) % 3)


def attributor(model, ensemble=None, **options):
    options = {"features": byline.Factorized(COLUMNS), "batch_size": BATCH, "damping": 1.0, **options}
    return byline.TRAK(byline.Task(model), ensemble or byline.Independent([model]), progress=False, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("forward_only", [False, True])
def test_bytes_and_files_are_those_of_a_store(tmp_path, dtype, members, forward_only):
    ensemble = byline.Independent([mlp()])
    if members > 1 or forward_only:
        ensemble = byline.Dropout(ensemble, masks=members, forward_only=forward_only)
    features = byline.Factorized(COLUMNS, dtype=dtype)
    attributor(mlp(), ensemble, features=features, store=tmp_path).fit(examples(N, 10))
    own, more = (1, members) if forward_only else (members, 0)
    expected = Workload(LAYERS, N, COLUMNS, own, more, dtype, BATCH)
    found = list(tmp_path.rglob("c.*"))
    assert sum(file.stat().st_size for file in found) == expected.store_bytes
    assert len([file for file in found if "state" not in file.parts]) == expected.files


@pytest.mark.parametrize(
    ("model", "shape", "layers"),
    [
        (mlp, (N, 10), LAYERS),
        (Words, (N, 5, 6), (Layer("one.weight", 20, 6, 5, bias=False, first=True), Layer("two.weight", 3, 20, 5))),
    ],
    ids=["mlp", "positions"],
)
def test_flops_are_those_of_the_ledger(model, shape, layers):
    ledger, tests = byline.Ledger(), 8
    made = attributor(model().eval(), ledger=ledger).fit(examples(*shape))
    expected = Workload(layers, N, COLUMNS, batch_size=BATCH)
    assert ledger.fitting.flops == pytest.approx(expected.fit_flops, rel=1e-6)
    made.attribute(examples(tests, *shape[1:]))
    assert ledger.fitting.flops == pytest.approx(expected.fit_flops + expected.solve_flops, rel=1e-6)
    assert ledger.serving.flops == pytest.approx(tests * expected.query_flops, rel=1e-6)


def test_forward_only_members_cost_a_forward_pass_each():
    ledger = byline.Ledger()
    ensemble = byline.Dropout(byline.Independent([mlp()]), masks=MASKS, forward_only=True)
    attributor(mlp(), ensemble, ledger=ledger).fit(examples(N, 10))
    expected = Workload(LAYERS, N, COLUMNS, 1, MASKS, batch_size=BATCH)
    assert ledger.fitting.flops == pytest.approx(expected.fit_flops, rel=1e-6)


def test_layers_without_columns_cost_no_projection():
    layers = tuple(Layer(f"{number:02}", 512, 512, positions=64) for number in range(20))
    work = Workload(layers, examples=100, columns=10)
    share = sum(o > 0 for o, _ in work.sides)
    assert 0 < share < 20
    # of one column: both factors, and their product
    assert work.project_flops == share * 2 * 64 * (512 + 513 + 1)


def test_columns_are_those_of_the_features():
    made = attributor(mlp()).fit(examples(N, 10))
    assert made.columns() == Workload(LAYERS, N, COLUMNS).kept


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"examples": 0}, "examples is 0"),
        ({"columns": True}, "columns is True"),
        ({"members": -1}, "members is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"forward_only": -1}, "forward_only is -1"),
        ({"layers": ()}, "layers is empty"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'"),
    ],
)
def test_bad_sizes_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        Workload(**{"layers": LAYERS, "examples": 10, "columns": 4, **options})
