"""What several test files share."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch

import byline
from architectures import BY_NAME, TEST, TRAIN, randomised

# the models are tiny: threads cost more than they bring
torch.set_num_threads(1)


def build(name: str, seed: int = 0, train: int = TRAIN, test: int = TEST) -> SimpleNamespace:
    """A case's model, examples and task."""
    case = BY_NAME[name]
    if case.needs and importlib.util.find_spec(case.needs) is None:
        if os.environ.get("BYLINE_CI") == "1":
            pytest.fail(f"{case.needs} is not installed, and BYLINE_CI=1 leaves nothing out")
        pytest.skip(f"needs {case.needs}")
    torch.manual_seed(seed)
    model = randomised(case.model()).eval()
    data = case.data(train + test)
    task = byline.Task(model, output=case.output, params=case.params)
    return SimpleNamespace(
        case=case, model=model, train=data[:train], test=data[train:], task=task, selects=task.selects
    )
