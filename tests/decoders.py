"""A miniature of the transformers of the settings, and what its scores must be: one example at a time, by autograd."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset, default_collate

import byline
import reference as ref
from byline.engines.workbench import Workbench
from byline.settings.corpus import packed
from byline.settings.transformer import Decoder

VOCABULARY, LENGTH = 13, 7


def needs(*packages: str) -> None:
    """Skip a test where a package is missing; with BYLINE_CI=1 fail."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("BYLINE_CI") == "1":
        pytest.fail(f"{', '.join(missing)} is not installed, and BYLINE_CI=1 leaves nothing out", pytrace=False)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def miniature(relative: bool, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(VOCABULARY, LENGTH, width=8, layers=2, heads=2, hidden=6, dropout=0.2, relative=relative)
    for parameter in model.parameters():  # away from the zeros, ones and tiny embeddings they start from
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def sequences(count: int, seed: int = 1) -> TensorDataset:
    """Padded sequences of different lengths."""
    rng = np.random.default_rng(seed)
    return packed([rng.integers(1, VOCABULARY, rng.integers(3, LENGTH + 3)).tolist() for _ in range(count)], LENGTH)


def ensembles(task: byline.Task, model: nn.Module, data: TensorDataset) -> dict[str, Any]:
    plain = byline.Independent([model])
    later = {name: tensor * 1.1 for name, tensor in model.state_dict().items()}
    adapters = byline.train_lora(task, plain, data, adapters=2, rank=2, epochs=3, lr=0.05, progress=False)
    return {
        "independent": plain,
        "dropout": byline.Dropout(plain, masks=2, p=0.4),
        "forward-only": byline.Dropout(plain, masks=3, forward_only=True),
        "weight noise": byline.WeightNoise(plain, draws=2, scale=0.3),
        "trajectory": byline.Trajectory([[model.state_dict(), later]]),
        "LoRA": adapters,
    }


def side(task: byline.Task, member: Any, data: TensorDataset) -> ref.Side:
    """Per-example gradients of a member by autograd, on the model under its changes."""
    model = task.model
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    member.weights.into(model)
    rows: dict[str, list[np.ndarray]] = {"f": [], "l": [], "q": [], "v": []}
    with member.applied(model, "gradient") as changed:
        chosen = [p for name, p in changed.named_parameters() if p.requires_grad and member.selects(name)]
        for i in range(len(data)):
            f, loss, _ = ref.language_modeling(changed, default_collate([data[i]]))
            for key, value in (("f", f), ("l", loss)):
                grads = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
                full = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, grads, strict=True)]
                rows[key].append(torch.cat([g.flatten() for g in full]).double().numpy())
            rows["v"].append(f.item())
    with member.applied(model, "residual") as changed, torch.no_grad():
        rows["q"] = [float(ref.language_modeling(changed, default_collate([item]))[2]) for item in data]
    model.load_state_dict(kept)
    return ref.Side(*(np.array(rows[key]) for key in ("f", "l", "q", "v")))


def check_exactness(relative: bool, kind: str) -> None:
    """TRAK and Grad-Dot with exact features under an ensemble, held against `side`; projected ones come near."""
    model, train, test = miniature(relative), sequences(9), sequences(4, seed=2)
    task = byline.Task(model, output="language-modeling")
    ensemble = ensembles(task, model, train)[kind]
    check_fast(task, ensemble, train)
    trains = [side(task, member, train) for member in ensemble.members()]
    tests = [side(task, member, test) for member in ensemble.members()]
    expected = {"trak": ref.trak(tests, trains, 0.3)}
    methods: dict[str, Callable[..., Any]] = {"trak": byline.TRAK}
    if kind != "forward-only":
        expected["grad-dot"] = ref.mean(ref.graddot, tests, trains)
        methods["grad-dot"] = byline.GradDot
    # as many columns as the gradient has: the projection leaves every inner product as it is
    for name, features in (("trak", byline.Exact()), ("trak", byline.Factorized(4000)), ("grad-dot", byline.Exact())):
        if name in methods:
            made = methods[name](task, ensemble, features=features, damping=0.3, batch_size=4, progress=False)
            ref.assert_close(made.fit(train).attribute(test).values, expected[name], 2e-3)


def check_fast(task: byline.Task, ensemble: Any, data: TensorDataset) -> None:
    """No parameter of any member is left to per-example autograd."""
    bench = Workbench(task, data)
    for member in ensemble.members():
        with bench.active(member, "gradient") as active:
            capture = active.capture("output")
            assert capture.fast, (member.name, sorted(capture.fallback))


def check_padding_and_batches(relative: bool) -> None:
    """What stands beside or behind a sequence changes nothing."""
    model, data = miniature(relative), sequences(8)
    task = byline.Task(model, output="language-modeling")
    inputs, targets = data.tensors
    whole = task.output(model, (inputs, targets)).detach()
    for i in range(len(data)):
        keep = int((targets[i] >= 0).sum())
        alone = task.output(model, (inputs[i : i + 1, :keep], targets[i : i + 1, :keep]))
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-4, atol=1e-5)
    scores = [
        byline.TRAK(task, byline.Independent([model]), damping=0.3, batch_size=size, progress=False)
        .fit(data)
        .attribute(data)
        .values
        for size in (1, 3, 8)
    ]
    for other in scores[1:]:
        ref.assert_close(other, scores[0])
