"""What `fit` costs against the plain forward and backward pass, on models as people bring them.

    python bench/paths.py                            # every model, medians of five runs
    python bench/paths.py --before ../earlier/src    # the same beside another version, in alternating runs
    python bench/paths.py --json paths.json

The plain pass is PyTorch's: batches of the same size, the mean loss, gradients of all parameters. `fit` makes
`Factorized(1024)` rows of every example; its calibration, which costs the same for any number of examples, is timed
apart on the first three batches and left out. Ratios of medians, CPU time, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

BATCH = 64


class Rows(Dataset):
    """Dict batches, as Hugging Face's models take them."""

    def __init__(self, columns: dict[str, torch.Tensor]):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: column[i] for name, column in self.columns.items()}


def mlp() -> tuple[nn.Module, str, Any, int]:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(64, 10),
    )  # fmt: skip
    return model, "classification", TensorDataset(torch.rand(20_000, 784), torch.arange(20_000) % 10), 256


def bert() -> tuple[nn.Module, str, Any, int]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512
    )
    lengths = 16 + torch.arange(1024) % 48
    mask = (torch.arange(64) < lengths.unsqueeze(1)).long()
    ids = torch.randint(1, 1000, (1024, 64)) * mask
    data = Rows({"input_ids": ids, "attention_mask": mask, "labels": torch.arange(1024) % 2})
    return BertForSequenceClassification(config), "classification", data, BATCH


class LayerNorm2d(nn.LayerNorm):
    """ConvNeXt's, over the channels of a picture."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, two linear layers, a layer scale."""

    def __init__(self, d: int):
        super().__init__()
        self.mix, self.norm = nn.Conv2d(d, d, 7, padding=3, groups=d), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.gamma = nn.Parameter(torch.full((d,), 1e-1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.mix(x).permute(0, 2, 3, 1))
        h = self.gamma * self.down(F.gelu(self.up(h)))
        return x + h.permute(0, 3, 1, 2)


def convnext() -> tuple[nn.Module, str, Any, int]:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 4, 4), LayerNorm2d(32), ConvNeXtBlock(32), ConvNeXtBlock(32), LayerNorm2d(32),
        nn.Conv2d(32, 64, 2, 2), ConvNeXtBlock(64), ConvNeXtBlock(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.LayerNorm(64), nn.Linear(64, 10),
    )  # fmt: skip
    return model, "classification", TensorDataset(torch.randn(512, 3, 32, 32), torch.arange(512) % 10), BATCH


class ViT(nn.Module):
    """As tutorials write it: a class token, a table of positions, torch's own encoder."""

    def __init__(self, d: int = 96, depth: int = 4):
        super().__init__()
        self.patch = nn.Conv2d(3, d, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, 65, d) * 0.02)
        layer = nn.TransformerEncoderLayer(d, 4, 4 * d, 0.1, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls.expand(len(h), -1, -1), h], 1) + self.pos
        return self.head(self.norm(self.blocks(h)[:, 0]))


def vit() -> tuple[nn.Module, str, Any, int]:
    return ViT(), "classification", TensorDataset(torch.randn(512, 3, 32, 32), torch.arange(512) % 10), BATCH


def gpt() -> tuple[nn.Module, str, Any, int]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=512, n_positions=64, n_embd=128, n_layer=4, n_head=4, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config), "language-modeling", Rows({"input_ids": torch.randint(0, 512, (1024, 64))}), BATCH


MODELS: dict[str, Callable[[], tuple[nn.Module, str, Any, int]]] = {
    "fashion-mlp": mlp, "BERT": bert, "ConvNeXt": convnext, "ViT": vit, "GPT-2": gpt,
}  # fmt: skip


def plain(task: Any, model: nn.Module, data: Any, size: int) -> float:
    """CPU seconds of a forward and backward pass over the data, as training would run them."""
    from byline import batches

    parameters = [p for p in model.parameters() if p.requires_grad]
    start = time.process_time()
    for a, b in batches.spans(len(data), size):
        torch.autograd.grad(task.loss(model, batches.fetch(data, a, b)).mean(), parameters, allow_unused=True)
    return time.process_time() - start


def once(name: str) -> dict[str, float]:
    """One run of one model by the version that is imported."""
    import byline

    torch.manual_seed(0)
    model, output, data, size = MODELS[name]()
    task = byline.Task(model.eval(), output)

    def fit(ensemble: Any, part: Any) -> float:
        at = byline.GradDot(task, ensemble, features=byline.Factorized(1024), batch_size=size, progress=False)
        start = time.process_time()
        at.fit(part)
        return time.process_time() - start

    def timed(ensemble: Any) -> float:
        # calibration costs the same for any number of examples
        few = torch.utils.data.Subset(data, range(size))
        return (fit(ensemble, data) - fit(ensemble, few)) / (len(data) - size) * len(data)

    base = byline.Independent([model])
    fit(base, torch.utils.data.Subset(data, range(size)))
    plain(task, model, data, size)
    costs = {"plain": plain(task, model, data, size), "fit": timed(base)}
    if any(isinstance(m, nn.Dropout) for m in model.modules()):
        try:
            costs["masks"] = timed(byline.Dropout(base, masks=3, p=0.1)) / 3
        except Exception as error:
            print(f"{name}: three masks: {type(error).__name__}", file=sys.stderr)
    return costs


def measured(name: str, source: str | None) -> dict[str, float]:
    """The same in a process of its own, of another version where its source is given."""
    env = {**os.environ, **({"PYTHONPATH": source} if source else {})}
    done = subprocess.run(
        [sys.executable, __file__, "--once", name], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", help="the src folder of another version, to run beside this one")
    parser.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--once", choices=list(MODELS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.once:
        print(json.dumps(once(args.once)))
        return
    versions = {"now": None, **({"before": args.before} if args.before else {})}
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'model':14}{'version':10}{'fit / plain':>13}{'a mask / plain':>16}")
    for name in args.only:
        runs: dict[str, list[dict[str, float]]] = {version: [] for version in versions}
        for _ in range(args.runs):
            for version, source in versions.items():
                runs[version].append(measured(name, source))
        for version, own in runs.items():
            ratios = {
                kind: statistics.median(run[kind] / run["plain"] for run in own)
                for kind in ("fit", "masks")
                if all(kind in run for run in own)
            }
            found.setdefault(name, {})[version] = ratios
            shown = [f"{ratios[k]:.2f}" if k in ratios else "–" for k in ("fit", "masks")]
            print(f"{name:14}{version:10}{shown[0]:>13}{shown[1]:>16}", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
