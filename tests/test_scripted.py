"""Scripted and traced models, which take no hooks: the scores of the module they were made from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
import reference as ref


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3)).eval()


DATA = TensorDataset(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)
MADE: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "scripted": torch.jit.script,
    "traced": lambda model: torch.jit.trace(model, DATA.tensors[0]),
    "in part": lambda model: nn.Sequential(torch.jit.script(model[:2]), *model[2:]).eval(),
}


@pytest.mark.parametrize("how", MADE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scores_are_those_of_the_module_it_was_made_from(how: str) -> None:
    model = MADE[how](plain())
    side = ref.side(plain(), DATA, ref.classification)
    one = byline.Independent([model])
    found = byline.GradDot(byline.Task(model), one, progress=False, batch_size=5).fit(DATA).attribute(DATA)
    ref.assert_close(found.values, ref.graddot(side, side))
    states = [MADE[how](plain(seed)).state_dict() for seed in (0, 1)]
    found = byline.TRAK(byline.Task(model), byline.Independent(states), damping=0.3, progress=False).fit(DATA)
    sides = [ref.side(plain(seed), DATA, ref.classification) for seed in (0, 1)]
    ref.assert_close(found.attribute(DATA).values, ref.trak(sides, sides, 0.3), 1e-3)
    assert np.isfinite(found.self_influence()).all()
