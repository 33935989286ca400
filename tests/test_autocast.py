"""Models that call torch.autocast inside: every solver near what it says of the same model in single precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
from byline.methods.influence import SOLVERS

torch.manual_seed(0)
TRAIN = TensorDataset(torch.randn(40, 6), torch.arange(40) % 3)
TEST = TensorDataset(torch.randn(4, 6), torch.arange(4) % 3)


class Mixed(nn.Module):
    def __init__(self, half: bool, back: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.parts = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.half, self.back = half, back

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            found = self.parts(x)
        return found.float() if self.back else found


def output(model, batch):
    return model(batch[0]).gather(1, batch[1].unsqueeze(1))[:, 0]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def scores(task, model, **options):
    at = byline.Influence(task, byline.Independent([model]), damping=1.0, progress=False, **options)
    return at.fit(TRAIN).attribute(TEST).values


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


# the Hessian of so small a model is not positive definite under any but the most patient of solvers
PAIRS = [(name, c) for name, s in SOLVERS.items() for c in s.curvatures if c != "hessian" or name == "arnoldi"]


@pytest.mark.parametrize(("solver", "curvature"), PAIRS)
@pytest.mark.parametrize("kind", ["named", "callable"])
def test_every_solver_is_near_single_precision(solver, curvature, kind):
    if kind == "callable" and curvature == "ggn":
        pytest.skip("a callable loss is no likelihood")
    found = []
    for model in (Mixed(True).eval(), Mixed(False).eval()):
        task = byline.Task(model) if kind == "named" else byline.Task(model, output, loss)
        found.append(scores(task, model, solver=solver, curvature=curvature))
    assert 0 < error(*found) < 3e-2


def test_the_dense_inverse_is_that_of_autograd():
    model = Mixed(True).eval()
    params = list(model.parameters())

    def rows(values):
        return torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=True)]) for v in values]
        )

    x, y = TRAIN.tensors
    logits = model(x).float()
    jacobian = rows(logits.flatten()).double().view(40, 3, -1)
    p = logits.detach().double().softmax(-1)
    hessian = sum(j.T @ (torch.diag(q) - torch.outer(q, q)) @ j for j, q in zip(jacobian, p, strict=True)) / 40
    hessian += hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    trained = rows(nn.functional.cross_entropy(logits, y, reduction="none")).double()
    z = model(TEST.tensors[0]).float().log_softmax(-1).gather(1, TEST.tensors[1].unsqueeze(1))[:, 0]
    tested = rows(z - torch.log1p(-z.exp())).double()
    expected = (tested @ torch.linalg.solve(hessian, -trained.T)).numpy()
    assert error(scores(byline.Task(model), model, solver="explicit"), expected) < 3e-2


@pytest.mark.parametrize("back", [False, True])
def test_layers_under_autocast_keep_their_rules(back):
    from byline.engines.workbench import Workbench

    model = Mixed(True, back).eval()
    bench = Workbench(byline.Task(model), TRAIN)
    with bench.active(byline.Independent([model]).members()[0], "gradient") as active:
        assert active.capture("output").fast
