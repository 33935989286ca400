"""What works, and how: small models of many families, measured, and docs/support.md made of it.

    python bench/support.py                      # measure all, write docs/support.md and docs/assets/support.json
    python bench/support.py --check              # exit with 1 if the page says something else than is measured now
    python bench/support.py --check --only BERT  # the same of some families

Of every family: `fit` and `attribute` of GradDot beside `torch.autograd.grad`, one example at a time and in the same
precision; how each parameter's gradients were had (`byline.engines.support.paths`); whether dropout masks run side by
side. Nothing is timed (that is paths.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset, default_collate

import byline
from byline.engines.support import LOOP, ONE_PASS, VMAP, grouped, paths
from byline.engines.workbench import Workbench
from common import ROOT
from paths import ConvNeXtBlock, LayerNorm2d, Rows, ViT

PAGE, KEPT = ROOT / "docs" / "support.md", ROOT / "docs" / "assets" / "support.json"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
TRAIN, TEST = 12, 4
WRONG = 1e-3


@dataclass(frozen=True)
class Family:
    """A small model, and its examples."""

    model: Callable[[], nn.Module]
    data: Callable[[int], Any]
    output: Any = "classification"
    collate: Callable[[list[Any]], Any] = default_collate
    plain: Callable[[nn.Module], nn.Module] = lambda model: model
    """The model that autograd is asked about, where it is another object than what byline is given."""
    train: bool = False
    """Left in train mode, as somebody forgets."""


# examples


def pictures(n: int, channels: int = 2, size: int = 8) -> TensorDataset:
    return TensorDataset(torch.randn(n, channels, size, size), torch.arange(n) % 3)


def large(n: int) -> TensorDataset:
    return TensorDataset(torch.randn(n, 3, 32, 32), torch.arange(n) % 10)


def pixels(n: int) -> Rows:
    return Rows({"pixel_values": torch.randn(n, 2, 8, 8), "labels": torch.arange(n) % 3})


def numbers(n: int) -> TensorDataset:
    return TensorDataset(torch.randn(n, 6), torch.arange(n) % 3)


def series(n: int) -> TensorDataset:
    return TensorDataset(torch.randn(n, 5, 8), torch.arange(n) % 3)


def tokens(n: int) -> TensorDataset:
    ids = torch.randint(11, (n, 7))
    return TensorDataset(ids[:, :-1], ids[:, 1:])


def ids(n: int) -> Rows:
    return Rows({"input_ids": torch.randint(13, (n, 6))})


def texts(n: int) -> list[dict[str, torch.Tensor]]:
    """Of different lengths."""
    return [{"input_ids": torch.randint(3, 30, (7 - i % 4,)), "labels": torch.tensor(i % 3)} for i in range(n)]


def padded(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Each batch to its own longest text."""
    rows = nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    return {
        "input_ids": rows,
        "attention_mask": (rows != 0).long(),
        "labels": torch.stack([i["labels"] for i in items]),
    }


def unmasked(items: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = padded(items)
    return batch["input_ids"], batch["labels"]


def to_translate(n: int) -> Rows:
    return Rows({
        "input_ids": torch.randint(3, 30, (n, 6)),
        "attention_mask": torch.ones(n, 6, dtype=torch.long),
        "labels": torch.randint(3, 30, (n, 4)),
    })  # fmt: skip


def clean(n: int) -> TensorDataset:
    return TensorDataset(torch.randn(n, 1, 6, 6))


def graphs(n: int) -> TensorDataset:
    edges = (torch.rand(n, 5, 5) < 0.5).float()
    return TensorDataset(torch.randn(n, 5, 4), edges, torch.arange(n) % 3)


def rows_with_bags(n: int) -> TensorDataset:
    return TensorDataset(torch.randn(n, 4), torch.randint(20, (n, 5)), torch.arange(n) % 2)


def pairs(n: int) -> TensorDataset:
    return TensorDataset(torch.randn(n, 4), torch.randn(n, 6))


# models


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3)
    )


class Residual(nn.Module):
    """Two convolutions with batch norm, around which the input goes as well."""

    def __init__(self, d: int):
        super().__init__()
        self.a, self.b = nn.Conv2d(d, d, 3, padding=1, bias=False), nn.Conv2d(d, d, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(d), nn.BatchNorm2d(d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.norm2(self.b(F.relu(self.norm1(self.a(x))))))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, Residual(6), Residual(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


class SqueezeExcite(nn.Module):
    """Channels weighed by what the whole picture says."""

    def __init__(self, d: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(d, 3, 1), nn.Conv2d(3, d, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.Hardswish(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), SqueezeExcite(6),
        nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 3),
    )  # fmt: skip


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 2, 2), LayerNorm2d(6), ConvNeXtBlock(6), LayerNorm2d(6), nn.Conv2d(6, 12, 2, 2),
        ConvNeXtBlock(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3),
    )  # fmt: skip


class Encoder(nn.Module):
    """torch's own, on series of vectors."""

    def __init__(self, batch_first: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(8, 3), batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layers(x if self.batch_first else x.transpose(0, 1))
        return self.head(h.mean(1 if self.batch_first else 0))


class Recurrent(nn.Module):
    """Returns its state beside the logits."""

    def __init__(self, kind: Any, **options: Any):
        super().__init__()
        self.emb, self.rnn, self.head = nn.Embedding(11, 6), kind(6, 8, batch_first=True, **options), nn.Linear(8, 11)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        h, state = self.rnn(self.emb(x))
        return self.head(h), state


class UNet(nn.Module):
    """Down, middle, up, a skip, and sines of the time that go through a layer of their own."""

    def __init__(self, d: int = 4):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2 * d))
        self.enter, self.down = nn.Conv2d(1, d, 3, padding=1), nn.Conv2d(d, 2 * d, 3, stride=2, padding=1)
        self.norm, self.middle = nn.GroupNorm(2, 2 * d), nn.Conv2d(2 * d, 2 * d, 3, padding=1)
        self.up, self.leave = nn.ConvTranspose2d(2 * d, d, 2, stride=2), nn.Conv2d(2 * d, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] * torch.exp(-torch.arange(4, device=t.device, dtype=x.dtype))
        a = F.silu(self.enter(x))
        h = F.silu(self.down(a)) + self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, :, None, None]
        h = F.silu(self.middle(self.norm(h)))
        return self.leave(torch.cat([self.up(h), a], 1))


class Graph(nn.Module):
    """Two rounds of messages over a dense adjacency, GIN's ε among the parameters."""

    def __init__(self, d: int = 8):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, d), nn.Linear(d, d), nn.Linear(d, 3)
        self.eps = nn.Parameter(torch.full((1,), 0.2))

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        adjacency = adjacency / adjacency.sum(-1, keepdim=True).clamp_min(1)
        h = torch.relu(self.first(adjacency @ x + (1 + self.eps) * x))
        h = torch.relu(self.second(adjacency @ h + (1 + self.eps) * h))
        return self.head(h.sum(1))


class Table(nn.Module):
    """Numbers, and a bag of ids of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.numbers, self.head = nn.EmbeddingBag(20, 6, mode="mean"), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, bags: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.numbers(x) + self.bag(bags)))


class Experts(nn.Module):
    """Every token goes to the best of three experts, gathered from the whole batch."""

    def __init__(self, d: int = 6):
        super().__init__()
        self.emb, self.gate, self.head = nn.Embedding(11, d), nn.Linear(d, 3), nn.Linear(d, 11)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, 8), nn.ReLU(), nn.Linear(8, d)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.emb(x)
        weight = self.gate(h).softmax(-1)
        best = weight.argmax(-1)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            at = best == number
            if at.any():
                out[at] = expert(h[at]) * weight[at][:, number, None]
        return self.head(h + out)


class StateSpace(nn.Module):
    """A block of Mamba, by a loop: a causal depthwise convolution and a selective scan, gated."""

    def __init__(self, d: int = 6, state: int = 3):
        super().__init__()
        self.emb, self.norm = nn.Embedding(11, d), nn.RMSNorm(d)
        self.enter, self.conv = nn.Linear(d, 2 * d, bias=False), nn.Conv1d(d, d, 3, padding=2, groups=d)
        self.select, self.step = nn.Linear(d, 2 * state + 2, bias=False), nn.Linear(2, d)
        self.log_a = nn.Parameter(torch.log(torch.arange(1, state + 1.0)).repeat(d, 1))
        self.skip, self.leave = nn.Parameter(torch.ones(d)), nn.Linear(d, d, bias=False)
        self.last, self.head, self.state = nn.RMSNorm(d), nn.Linear(d, 11, bias=False), state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.emb(x)
        u, gate = self.enter(self.norm(h)).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        b, c, low = self.select(u).split([self.state, self.state, 2], -1)
        delta = F.softplus(self.step(low))
        decay = torch.exp(-delta.unsqueeze(-1) * self.log_a.exp())
        held, out = torch.zeros_like(decay[:, 0]), []
        for t in range(x.shape[1]):
            held = decay[:, t] * held + (delta[:, t] * u[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(1)
            out.append((held * c[:, t].unsqueeze(1)).sum(-1))
        y = torch.stack(out, 1) + self.skip * u
        return self.head(self.last(h + self.leave(y * F.silu(gate))))


def normed(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        wrap(nn.Linear(6, 16)), nn.Tanh(), wrap(nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 3)
    )


class FunctionalDropout(nn.Module):
    """F.dropout that asks for the module's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.dropout(torch.relu(self.a(x)), 0.1, self.training))


class Unmasked(nn.Module):
    """A mean over all positions, padding among them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(30, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.emb(x)).mean(1))


class Complex(nn.Module):
    """A layer of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 8, dtype=torch.cfloat)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x.to(torch.cfloat) @ self.weight).abs())


class Towers(nn.Module):
    """Two encoders, whose examples are each other's negatives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.normalize(self.a(x), dim=1), F.normalize(self.b(y), dim=1)


def negatives_of_the_batch(model: nn.Module, batch: Any) -> torch.Tensor:
    u, v = model(*batch)
    return -F.cross_entropy(10 * u @ v.T, torch.arange(len(u)), reduction="none")


NEGATIVES = F.normalize(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), dim=1)


def negatives_of_all(model: nn.Module, batch: Any) -> torch.Tensor:
    u, v = model(*batch)
    return 10 * (u * v).sum(1) - (10 * u @ NEGATIVES.T).logsumexp(1)


def of_transformers(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return make


BERT = {
    "vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip
GPT2 = {
    "vocab_size": 13, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
LLAMA = {
    "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 8, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
gpt2 = of_transformers("GPT2LMHeadModel", "GPT2Config", **GPT2)
llama = of_transformers("LlamaForCausalLM", "LlamaConfig", **LLAMA)


def adapted(*targets: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(
            llama(), LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)
        )

    return make


def compiled() -> nn.Module:
    return torch.compile(mlp())  # type: ignore[return-value]


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})


DENOISING = byline.Denoising((1 - torch.linspace(0.01, 0.2, 30)).cumprod(0), draws=3)
SPECTRAL = nn.utils.parametrizations.spectral_norm

FAMILIES: dict[str, Family] = {
    "MLP": Family(mlp, numbers),
    "ResNet, batch norm in eval mode": Family(resnet, pictures),
    "MobileNet": Family(mobilenet, pictures),
    "ConvNeXt": Family(convnext, pictures),
    "ViT by hand: class token, nn.TransformerEncoder": Family(lambda: ViT(16, 2), large),
    "ViT (transformers)": Family(
        of_transformers(
            "ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, num_channels=2, hidden_size=12,
            num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3,
        ),
        pixels,
    ),
    "BERT (transformers)": Family(
        of_transformers("BertForSequenceClassification", "BertConfig", **BERT), texts, collate=padded
    ),
    "DistilBERT (transformers)": Family(
        of_transformers(
            "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=30, dim=12, n_layers=2, n_heads=2,
            hidden_dim=16, max_position_embeddings=16, num_labels=3,
        ),
        texts, collate=padded,
    ),
    "GPT-2 (transformers)": Family(gpt2, ids, "language-modeling"),
    "Llama (transformers)": Family(llama, ids, "language-modeling"),
    "T5 (transformers)": Family(
        of_transformers(
            "T5ForConditionalGeneration", "T5Config", vocab_size=30, d_model=12, d_kv=6, d_ff=16, num_layers=2,
            num_heads=2, decoder_start_token_id=0,
        ),
        to_translate, "seq2seq",
    ),
    "LoRA adapter (PEFT)": Family(adapted("q_proj", "v_proj"), ids, "language-modeling"),
    "DoRA adapter (PEFT)": Family(adapted("q_proj", use_dora=True), ids, "language-modeling"),
    "nn.TransformerEncoder, batch first": Family(lambda: Encoder(True), series),
    "nn.TransformerEncoder, sequence first": Family(lambda: Encoder(False), series),
    "GRU": Family(lambda: Recurrent(nn.GRU), tokens, "language-modeling"),
    "LSTM": Family(lambda: Recurrent(nn.LSTM), tokens, "language-modeling"),
    "LSTM of two layers, dropout between them": Family(
        lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.1), tokens, "language-modeling"
    ),
    "State-space model (a block of Mamba)": Family(StateSpace, tokens, "language-modeling"),
    "Mixture of experts": Family(Experts, tokens, "language-modeling"),
    "U-Net, denoising": Family(UNet, clean, DENOISING),
    "Graph network, dense adjacency": Family(Graph, graphs),
    "Table with nn.EmbeddingBag": Family(Table, rows_with_bags),
    "Contrastive, against fixed negatives": Family(Towers, pairs, negatives_of_all),
    "weight_norm (parametrization)": Family(normed(nn.utils.parametrizations.weight_norm), numbers),
    "spectral_norm (parametrization)": Family(normed(SPECTRAL), numbers),
    "Functional dropout": Family(FunctionalDropout, numbers),
    "torch.compile": Family(compiled, numbers, plain=lambda model: model._orig_mod),
    "torch.jit.script": Family(lambda: torch.jit.script(mlp()), numbers),
    "nn.DataParallel": Family(lambda: nn.DataParallel(mlp()), numbers),
    "Batch norm in train mode": Family(resnet, pictures, train=True),
    "Padding that the model does not mask": Family(Unmasked, texts, collate=unmasked),
    "Contrastive, negatives from the batch": Family(Towers, pairs, negatives_of_the_batch),
    "Quantised": Family(quantised, numbers),
    "Complex parameters": Family(Complex, numbers),
}  # fmt: skip


# measuring


def by_autograd(task: byline.Task, model: nn.Module, data: Any, collate: Any, of: str) -> np.ndarray:
    """Rows of gradients, one example after the other, of torch alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(data)):
        value = getattr(task, of)(model, collate([data[i]])).sum()
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        rows.append(torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in pairs]).numpy())
    return np.stack(rows).astype(np.float64)


def measure(name: str) -> dict[str, Any]:
    """Everything about one family."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.model()
    with torch.no_grad():
        for p in model.parameters():
            # nothing at its initial zeros and ones, where a mistake would not show
            p.add_(0.1 * torch.randn_like(p))
    model.train(family.train)
    data = family.data(TRAIN + TEST)
    train, test = torch.utils.data.Subset(data, range(TRAIN)), torch.utils.data.Subset(data, range(TRAIN, TRAIN + TEST))
    options: dict[str, Any] = {"collate": family.collate, "batch_size": 5, "progress": False}
    try:
        task = byline.Task(model, family.output)
        one = byline.Independent([model])
        scores = byline.GradDot(task, one, **options).fit(train).attribute(test).values
        found = paths(task, train, collate=family.collate)
    except (ValueError, TypeError) as error:
        return {"refused": str(error).splitlines()[0]}
    plain = family.plain(model)
    beside = byline.Task(plain, family.output)
    outputs = by_autograd(beside, plain, test, family.collate, "output")
    expected = -outputs @ by_autograd(beside, plain, train, family.collate, "loss").T
    error = float(np.abs(scores - expected).max() / np.abs(expected).max())
    shares = {way: sum(p["size"] for p in found if p["way"] == way) for way in (ONE_PASS, VMAP, LOOP)}
    return {
        "error": error,
        "numbers": shares,
        "masks": masks(task, train, family),
        "slow": slow(found),
        "layers": grouped(found),
    }


def masks(task: byline.Task, train: Any, family: Family) -> str:
    """Whether dropout masks of this model run side by side, one after the other, not at all, or it has no dropout."""
    ensemble = byline.Dropout(byline.Independent([task.model]), masks=3)
    try:
        ensemble.validate(task.model)
        with Workbench(task, train, family.collate).active(ensemble.members()[0], "gradient") as active:
            side_by_side = active.tiles and active.capture("output").fast
    except ValueError as error:
        said = str(error).splitlines()[0]
        return "no dropout" if "no dropout layer" in said or "rate 0" in said else f"refused: {said}"
    return "side by side" if side_by_side else "one after the other"


# the page


def bound(error: float) -> str:
    """An error rounded up to a power of ten: what holds on other machines as well."""
    return f"10{str(math.ceil(math.log10(max(error, 1e-7)))).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def verdict(one: dict[str, Any]) -> str:
    """The ways in a few words, the largest share first."""
    if "refused" in one:
        return "refused"
    whole = sum(one["numbers"].values())
    ways = sorted(((n, way) for way, n in one["numbers"].items() if n), reverse=True)
    if len(ways) == 1:
        return f"**{ways[0][1]}**" if ways[0][1] == ONE_PASS else ways[0][1]
    return ", ".join(f"{share(n, whole)} {way}" for n, way in ways)


def share(part: int, whole: int) -> str:
    """Per cent, never 0 or 100 of what is neither."""
    return f"{min(max(round(100 * part / whole), 1), 99) if 0 < part < whole else round(100 * part / whole)} %"


def slow(found: list[dict[str, Any]]) -> list[str]:
    """Which layers' parameters are not had in one pass; by name too, where others of their type are."""
    fast = {p["layer"] for p in found if p["way"] == ONE_PASS}
    said: dict[str, None] = {}
    for part in found:
        if part["way"] != ONE_PASS:
            held = [step for step in part["parameter"].split(".")[:-1] if not step.isdigit()]
            said[f"`{part['layer']}`" + (f" ({held[-1]})" if held and part["layer"] in fast else "")] = None
    return list(said)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def measured_part(found: dict[str, dict[str, Any]]) -> str:
    """What stands between the markers."""
    lines = [
        "| family | parameters | layers not in one pass | dropout masks | largest error |",
        "| --- | --- | --- | --- | --- |",
    ]
    refused = {name: one for name, one in found.items() if "refused" in one}
    works = {name: one for name, one in found.items() if "refused" not in one}
    for name, one in works.items():
        kind = one["masks"].partition(":")[0]
        lines.append(
            f"| {name} | {verdict(one)} | {', '.join(one['slow']) or '–'} | {kind} | ≤ {bound(one['error'])} |"
        )
    lines += ["", "## What is refused", "", "| what | the sentence |", "| --- | --- |"]
    lines += [f"| {name} | {cell(one['refused'])} |" for name, one in refused.items()]
    lines += [
        f"| {name}, under `byline.Dropout` alone | {cell(one['masks'].partition(': ')[2])} |"
        for name, one in works.items()
        if one["masks"].startswith("refused")
    ]
    lines += ["", "## Layer by layer", "", "In which families a type of layer is had how; then each family.", ""]
    lines += by_layer(works)
    for name, one in works.items():
        lines += [f'<details markdown="1"><summary>{name}</summary>', ""]
        lines += ["| layer | parameter | numbers | way | how |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| `{p['layer']}` | `{p['parameter']}` | {p['size']} | {p['way']} | {p['how']} |" for p in one["layers"]
        ]
        lines += ["", "</details>", ""]
    return "\n".join(lines).rstrip()


def by_layer(works: dict[str, dict[str, Any]]) -> list[str]:
    """A table of all types of layers, over the families."""
    ways: dict[str, dict[str, dict[str, None]]] = {}
    for name, one in works.items():
        for part in one["layers"]:
            ways.setdefault(part["layer"], {}).setdefault(part["way"], {})[name] = None
    lines = ["| layer | in one pass, families | vmap, in | one by one, in |", "| --- | --- | --- | --- |"]
    for layer in sorted(ways, key=str.lower):
        fast = str(len(ways[layer][ONE_PASS])) if ONE_PASS in ways[layer] else "–"
        slow = [", ".join(ways[layer].get(way, {})) or "–" for way in (VMAP, LOOP)]
        lines.append(f"| `{layer}` | {fast} | {slow[0]} | {slow[1]} |")
    return [*lines, ""]


def facts(one: dict[str, Any]) -> Any:
    """What must not change unsaid: all but the exact error, and numbers inside of sentences."""
    if "refused" in one:
        return re.sub(r"-?\d+(\.\d+)?(e[-+]\d+)?", "0", one["refused"])
    return one["numbers"], one["masks"], one["slow"], one["layers"]


def differences(found: dict[str, dict[str, Any]], kept: dict[str, dict[str, Any]]) -> list[str]:
    """What is measured otherwise than it was kept, in a sentence for each family."""
    said = []
    for name, one in found.items():
        other = kept.get(name)
        if other is None:
            said.append(f"{name} is not on the page")
        elif facts(one) != facts(other):
            said.append(
                f"{name} was {other.get('refused') or verdict(other)}, and is {one.get('refused') or verdict(one)}"
            )
        elif "error" in one and one["error"] > 10 * max(other["error"], 1e-6):
            said.append(f"{name} had an error of {other['error']:.1e}, and has {one['error']:.1e}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is another")
    parser.add_argument("--only", nargs="*", help="families whose names begin so (with --check)", default=None)
    parser.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=KEPT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None and not args.check:
        raise SystemExit("--only is for --check: the page is of all families")
    names = [n for n in FAMILIES if args.only is None or any(n.startswith(start) for start in args.only)]
    if not names:
        raise SystemExit(f"--only is {args.only}; expected beginnings of {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    found = {}
    for name in names:
        found[name] = one = measure(name)
        print(f"{name:50} {one.get('refused') or (verdict(one) + ', ' + one['masks'])}", file=sys.stderr, flush=True)
    wrong = [name for name, one in found.items() if not one.get("error", 0.0) <= WRONG]
    if wrong:
        raise SystemExit(f"other scores than autograd's: {', '.join(wrong)}")
    text = args.page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    middle, _, after = rest.partition(END)
    if not args.check:
        args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part = measured_part(found)
        args.page.write_text(f"{before}{BEGIN}\n{part}\n{END}{after}", encoding="utf-8")
        return
    kept = json.loads(args.json.read_text(encoding="utf-8"))
    problems = differences(found, kept)
    problems += [f"{name} is on the page alone" for name in kept if name not in FAMILIES]
    if middle.strip() != measured_part(kept):
        problems.append(f"{args.page.name} does not say what {args.json.name} holds")
    if problems:
        raise SystemExit("; ".join(problems) + ": run python bench/support.py")


if __name__ == "__main__":
    main()
