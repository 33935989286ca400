"""Small models as data: each case is a model, examples and the named output. Every trainable parameter is to count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

TRAIN, TEST = 9, 4


@dataclass(frozen=True)
class Case:
    """One architecture."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[int], list[Any]]
    output: str = "classification"
    params: Any = None
    needs: str | None = None


def vectors(d: int = 6, classes: int = 3, form: str = "tuple"):
    def make(n: int) -> list[Any]:
        x, y = torch.randn(n, d), torch.randint(classes, (n,))
        return [_form(form, "x", a, b) for a, b in zip(x, y, strict=True)]

    return make


def arrays(*shape: int, classes: int = 3, form: str = "tuple"):
    def make(n: int) -> list[Any]:
        x, y = torch.randn(n, *shape), torch.randint(classes, (n,))
        return [_form(form, "x", a, b) for a, b in zip(x, y, strict=True)]

    return make


def ids(length: int = 5, vocabulary: int = 11, classes: int = 3, form: str = "tuple"):
    def make(n: int) -> list[Any]:
        x, y = torch.randint(vocabulary, (n, length)), torch.randint(classes, (n,))
        return [_form(form, "x", a, b) for a, b in zip(x, y, strict=True)]

    return make


def aligned(length: int = 5, vocabulary: int = 11):
    def make(n: int) -> list[Any]:
        x = torch.randint(vocabulary, (n, length + 1))
        return [(row[:-1], row[1:]) for row in x]

    return make


def padded(length: int = 6, vocabulary: int = 13, labels: bool = True):
    """Hugging Face's dicts: a right-padded attention mask, labels with -100 on the padding and on a prompt."""

    def make(n: int) -> list[Any]:
        out = []
        for i in range(n):
            x = torch.randint(1, vocabulary, (length,))
            keep = torch.ones(length, dtype=torch.long)
            keep[length - i % 3 :] = 0
            item = {"input_ids": x, "attention_mask": keep}
            if labels:
                item["labels"] = x.masked_fill(keep == 0, -100)
                item["labels"][: 1 + i % 2] = -100
            out.append(item)
        return out

    return make


def _form(form: str, name: str, x: Any, y: Any) -> Any:
    return {"tuple": (x, y), "list": [x, y], "dict": {name: x, "labels": y}}[form]


class Net(nn.Module):
    """Parts called one after the other; dict batches reach it by the name x."""

    def __init__(self, *parts: Any):
        super().__init__()
        self.parts = nn.ModuleList([p for p in parts if isinstance(p, nn.Module)])
        self.order = [p if not isinstance(p, nn.Module) else None for p in parts]

    def forward(self, x):
        modules = iter(self.parts)
        for function in self.order:
            x = next(modules)(x) if function is None else function(x)
        return x


def randomised(model: nn.Module) -> nn.Module:
    """Norms, biases and running statistics away from their trivial first values."""
    for p in model.parameters():
        if p.ndim < 2:
            p.data.add_(0.3 * torch.randn_like(p))
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.normal_()
        elif name.endswith("running_var"):
            b.uniform_(0.3, 3)
    return model


def flat(x):
    return x.flatten(1)


def pooled(x):
    return x.flatten(2).mean(2)


def over_tokens(x):
    return x.mean(1)


def conv(**arguments):
    """Channels 4 -> 8 in the middle."""
    return lambda: Net(
        nn.Conv2d(2, 4, 3, padding=1),
        torch.tanh,
        nn.Conv2d(4, 8, **arguments),
        torch.tanh,
        pooled,
        nn.Linear(8, 3),
    )


class TiedHead(nn.Module):
    """Embedding and output layer share their weight."""

    def __init__(self, vocabulary=11, d=6, bias=False):
        super().__init__()
        self.emb = nn.Embedding(vocabulary, d)
        self.mix = nn.Linear(d, d)
        self.head = nn.Linear(d, vocabulary, bias=bias)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.emb(x))))


class Twice(nn.Module):
    """One Linear called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.b(torch.tanh(self.a(x)))))))


class TiedLinears(nn.Module):
    """Two Linears with one weight and two biases."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Position(nn.Module):
    """Bare parameters: a position embedding and a class token."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.position = nn.Parameter(torch.randn(5, 6))
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.cat([self.token.expand(len(x), -1, -1), self.emb(x) + self.position], 1)
        return self.head(torch.tanh(self.mix(h)).mean(1))


class Recurrent(nn.Module):
    """GRU or LSTM."""

    def __init__(self, kind, batch_first=True):
        super().__init__()
        self.rnn, self.head = kind(4, 5, batch_first=batch_first), nn.Linear(5, 3)
        self.batch_first = batch_first

    def forward(self, x):
        if not self.batch_first:
            x = x.transpose(0, 1)
        h = self.rnn(x)[0]
        return self.head(h[:, -1] if self.batch_first else h[-1])


class Attention(nn.Module):
    """MultiheadAttention."""

    def __init__(self, batch_first, need_weights):
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 3)
        self.batch_first, self.need_weights = batch_first, need_weights

    def forward(self, x):
        h = self.inner(x)
        if not self.batch_first:
            h = h.transpose(0, 1)
        h = self.attention(h, h, h, need_weights=self.need_weights)[0]
        return self.head(h.mean(1 if self.batch_first else 0))


class Encoder(nn.Module):
    """A TransformerEncoderLayer, batch first or second."""

    def __init__(self, batch_first, norm_first=False):
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 10, 0.0, batch_first=batch_first, norm_first=norm_first)
        self.head = nn.Linear(8, 3)
        self.batch_first = batch_first

    def forward(self, x):
        h = self.inner(x)
        if not self.batch_first:
            return self.head(self.layer(h.transpose(0, 1)).mean(0))
        return self.head(self.layer(h).mean(1))


class SequenceFirst(nn.Module):
    """Ruled layers on (T, B, d), with T equal to the number of examples that calibration looks at."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.norm(self.a(x.transpose(0, 1))))
        return self.b(h).mean(0)


class Functional(nn.Module):
    """A weight of its own, and a Linear's weight, both used through F.linear."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6) / 2)
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(F.linear(x, self.weight))
        # called as a module and used functionally: the rule alone sees half of the gradient
        h = torch.tanh(self.inner(h)) + F.linear(h, self.inner.weight)
        return self.head(h)


class MyLinear(nn.Linear):
    """A subclass whose forward is not that of its parent."""

    def forward(self, x):
        return super().forward(x) * self.bias.exp()


class Unused(nn.Module):
    """A layer that is never called."""

    def __init__(self):
        super().__init__()
        self.a, self.never, self.b = nn.Linear(6, 5), nn.Linear(7, 7), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class InPlace(nn.Module):
    """In-place operations on the outputs of ruled layers."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b, self.c = (
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Linear(4, 5),
            nn.Linear(5, 3),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.bn(self.a(x))).flatten(2).mean(2)
        h = self.relu(self.b(h))
        out = self.c(h)
        out += 1
        return out


class MultiInput(nn.Module):
    """Two named inputs, a tuple as output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Embedding(11, 5), nn.Linear(5, 3)

    def forward(self, x, words):
        h = self.b(words)
        # of the two, only one can be logits of classes
        return self.head(torch.tanh(self.a(x) + h.mean(1))), h


def two_inputs(form):
    def make(n):
        x, w, y = torch.randn(n, 6), torch.randint(11, (n, 4)), torch.randint(3, (n,))
        if form == "tuple":
            return list(zip(x, w, y, strict=True))
        return [{"words": b, "x": a, "labels": c} for a, b, c in zip(x, w, y, strict=True)]

    return make


class SortedByKey(nn.Module):
    """Sorts its batch inside and undoes it, as code for packed sequences does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        h = torch.tanh(self.a(x[order]))
        return self.b(h[order.argsort()])


def sorted_at_first(n):
    """The first examples, which calibration sees, are in the model's own order already; the later ones are not."""
    data = vectors()(n)
    for i, (x, _) in enumerate(data):
        x[0] = float(i) if i < 4 else float(n - i) / 10
    return data


class Experts(nn.Module):
    """Each example goes to one of two experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 5)
        for number, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0) == bool(number)
            if chosen.any():
                h = h.index_put((chosen.nonzero()[:, 0],), expert(x[chosen]))
        return self.head(torch.tanh(h))


def one_expert_at_first(n):
    data = vectors()(n)
    for i, (x, _) in enumerate(data):
        x[0] = 1.0 if i < 4 else (-1.0) ** i
    return data


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def llama(**arguments):
    """RMSNorm, rotary positions, grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **arguments}))


def qwen3():
    """Norms of queries and keys, head by head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=4))


def gemma2():
    """Embeddings scaled by √d, tied with the head; norms of weight 1 + w; logits capped."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=4))


SMALL = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def peft(base, *targets: str, **arguments):
    """A PEFT model as it is: the adapter's weights are the trainable ones."""

    def make():
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **arguments)
        return get_peft_model(base(), config)

    return make


class OwnRMSNorm(nn.Module):
    """A norm that no rule knows by its class."""

    def __init__(self, d, extra=0.0, power=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.extra, self.power = extra, power

    def forward(self, x):
        normal = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        return normal * (self.extra + self.weight) ** self.power


class Gated(nn.Module):
    """A vector weight on a module that wants two tensors."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.norm = nn.LayerNorm(d)
        self.inner = self.Gate(d)

    class Gate(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(d))

        def forward(self, x, gate):
            return x * self.weight * gate.sigmoid()

    def forward(self, x):
        return self.inner(self.norm(x), x) * self.weight


def conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    return Net(Conv1D(5, 6), torch.tanh, Conv1D(3, 5))


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def mlp(d=6, h=5, classes=3):
    return Net(nn.Linear(d, h), torch.tanh, nn.Linear(h, h), torch.relu, nn.Linear(h, classes))


CASES = [
    Case("mlp", mlp, vectors()),
    Case("mlp-list", mlp, vectors(form="list")),
    Case("mlp-dict", mlp, vectors(form="dict")),
    Case("mlp-without-bias", lambda: Net(nn.Linear(6, 5, bias=False), torch.tanh, nn.Linear(5, 3)), vectors()),
    Case("tokens-mlp", lambda: Net(nn.Linear(4, 5), torch.tanh, nn.Linear(5, 3), over_tokens), arrays(7, 4)),
    Case(
        "conv1d",
        lambda: Net(
            nn.Conv1d(2, 4, 3, stride=2, padding=1),
            torch.tanh,
            nn.Conv1d(4, 6, 2, dilation=2, groups=2),
            pooled,
            nn.Linear(6, 3),
        ),
        arrays(2, 11),
    ),
    Case(
        "conv1d-same-circular",
        lambda: Net(nn.Conv1d(2, 4, 4, padding="same", padding_mode="circular"), torch.tanh, pooled, nn.Linear(4, 3)),
        arrays(2, 9),
    ),
    Case(
        "conv2d-stride-dilation",
        conv(kernel_size=(3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)),
        arrays(2, 7, 6),
    ),
    Case("conv2d-groups", conv(kernel_size=3, groups=2, padding=1), arrays(2, 6, 5, form="dict")),
    Case("conv2d-depthwise", conv(kernel_size=3, groups=4, bias=False), arrays(2, 6, 5)),
    Case("conv2d-circular", conv(kernel_size=3, padding=(2, 1), padding_mode="circular"), arrays(2, 5, 6)),
    Case("conv2d-reflect", conv(kernel_size=3, padding=(2, 1), padding_mode="reflect"), arrays(2, 5, 6)),
    Case(
        "conv2d-replicate-groups",
        conv(kernel_size=3, padding=2, padding_mode="replicate", groups=2, stride=2),
        arrays(2, 5, 6),
    ),
    Case("conv2d-same", conv(kernel_size=(4, 3), padding="same", dilation=(1, 2)), arrays(2, 6, 6)),
    Case("conv2d-valid", conv(kernel_size=2, padding="valid"), arrays(2, 6, 6)),
    Case("conv2d-1x1-large-map", lambda: Net(nn.Conv2d(2, 3, 1), torch.tanh, pooled, nn.Linear(3, 3)), arrays(2, 9, 9)),
    Case("conv3d", lambda: Net(nn.Conv3d(1, 2, 2), torch.tanh, pooled, nn.Linear(2, 3)), arrays(1, 3, 4, 3)),
    Case(
        "conv-transpose",
        lambda: Net(nn.ConvTranspose2d(2, 4, 3, stride=2), torch.tanh, pooled, nn.Linear(4, 3)),
        arrays(2, 4, 4),
    ),
    Case(
        "embedding-padding",
        lambda: Net(nn.Embedding(11, 6, padding_idx=2), over_tokens, torch.tanh, nn.Linear(6, 3)),
        ids(),
    ),
    Case(
        "embedding-long",
        lambda: Net(nn.Embedding(4, 3), over_tokens, torch.tanh, nn.Linear(3, 3)),
        ids(12, 4, form="dict"),
    ),
    Case(
        "embedding-by-frequency",
        lambda: Net(nn.Embedding(4, 3, scale_grad_by_freq=True), over_tokens, nn.Linear(3, 3)),
        ids(6, 4),
    ),
    Case(
        "layer-norm",
        lambda: Net(nn.Linear(4, 6), nn.LayerNorm(6), torch.tanh, nn.Linear(6, 3), over_tokens),
        arrays(5, 4),
    ),
    Case("layer-norm-2d", lambda: Net(nn.LayerNorm((5, 4)), torch.tanh, flat, nn.Linear(20, 3)), arrays(5, 4)),
    Case(
        "group-norm",
        lambda: Net(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), torch.tanh, pooled, nn.Linear(6, 3)),
        arrays(2, 5, 5),
    ),
    Case(
        "rms-norm", lambda: Net(nn.Linear(4, 6), nn.RMSNorm(6), torch.tanh, nn.Linear(6, 3), over_tokens), arrays(5, 4)
    ),
    Case("rms-norm-eps", lambda: Net(nn.RMSNorm((5, 4), eps=0.1), flat, nn.Linear(20, 3)), arrays(5, 4)),
    Case(
        "instance-norm",
        lambda: Net(nn.InstanceNorm2d(2, affine=True), torch.tanh, pooled, nn.Linear(2, 3)),
        arrays(2, 5, 5),
    ),
    Case("batch-norm", lambda: Net(nn.Linear(6, 5), nn.BatchNorm1d(5), torch.tanh, nn.Linear(5, 3)), vectors()),
    Case(
        "batch-norm-2d",
        lambda: Net(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), torch.relu, pooled, nn.Linear(4, 3)),
        arrays(2, 5, 5),
    ),
    Case("batch-norm-3d-input", lambda: Net(nn.BatchNorm1d(2), torch.tanh, flat, nn.Linear(14, 3)), arrays(2, 7)),
    Case("conv1d-of-transformers", conv1d_of_transformers, vectors(), needs="transformers"),
    Case("gpt2-labels", gpt2, padded(), "language-modeling", needs="transformers"),
    Case("gpt2-attention-mask", gpt2, padded(labels=False), "language-modeling", needs="transformers"),
    Case("llama", llama, padded(), "language-modeling", needs="transformers"),
    Case("llama-tied", lambda: llama(tie_word_embeddings=True), padded(), "language-modeling", needs="transformers"),
    Case("qwen3", qwen3, padded(labels=False), "language-modeling", needs="transformers"),
    Case("gemma2", gemma2, padded(), "language-modeling", needs="transformers"),
    Case("peft-gpt2", peft(gpt2, "c_attn", "c_fc"), padded(), "language-modeling", needs="peft"),
    Case("peft-llama", peft(llama, "q_proj", "v_proj", "down_proj"), padded(), "language-modeling", needs="peft"),
    Case("peft-dora", peft(llama, "q_proj", use_dora=True), padded(), "language-modeling", needs="peft"),
    Case("peft-embedding", peft(gpt2, "wte", "c_fc"), padded(), "language-modeling", needs="peft"),
    Case("own-rms-norm", lambda: Net(nn.Linear(4, 6), OwnRMSNorm(6), nn.Linear(6, 3), over_tokens), arrays(5, 4)),
    Case("own-rms-norm-plus-one", lambda: Net(OwnRMSNorm(4, 1.0), nn.Linear(4, 3), over_tokens), arrays(5, 4)),
    Case("own-rms-norm-squared", lambda: Net(OwnRMSNorm(4, power=2), nn.Linear(4, 3), over_tokens), arrays(5, 4)),
    Case("gated", lambda: Net(nn.Linear(4, 6), Gated(6), nn.Linear(6, 3), over_tokens), arrays(5, 4)),
    Case("prelu", lambda: Net(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3), over_tokens), arrays(5, 4)),
    Case("tied-head", TiedHead, aligned(), "language-modeling"),
    Case("tied-head-bias", lambda: TiedHead(bias=True), aligned(), "language-modeling"),
    Case("one-linear-twice", Twice, vectors()),
    Case("tied-linears", TiedLinears, vectors()),
    Case("bare-parameters", Position, ids()),
    Case("gru", lambda: Recurrent(nn.GRU), arrays(5, 4)),
    Case("lstm-sequence-first", lambda: Recurrent(nn.LSTM, False), arrays(5, 4)),
    Case("attention", lambda: Attention(True, True), arrays(5, 4)),
    Case("attention-sequence-first", lambda: Attention(False, False), arrays(3, 4)),
    Case("encoder", lambda: Encoder(True, norm_first=True), arrays(5, 4)),
    Case("encoder-sequence-first", lambda: Encoder(False), arrays(3, 4)),
    Case("sequence-first", SequenceFirst, arrays(3, 4)),
    Case("functional", Functional, vectors()),
    Case("subclass", lambda: Net(MyLinear(6, 5), torch.tanh, nn.Linear(5, 3)), vectors()),
    Case(
        "weight-norm",
        lambda: Net(parametrizations.weight_norm(nn.Linear(6, 5)), torch.tanh, nn.Linear(5, 3)),
        vectors(),
    ),
    Case("in-place", InPlace, arrays(2, 5, 5)),
    Case("unused", Unused, vectors()),
    Case("frozen", lambda: frozen(Twice(), "b.weight", "c.bias"), vectors()),
    Case(
        "frozen-biases",
        lambda: frozen(conv(kernel_size=3, groups=2)(), "parts.0.bias", "parts.1.weight"),
        arrays(2, 6, 6),
    ),
    Case(
        "params-filter",
        lambda: Net(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), torch.tanh, pooled, nn.Linear(4, 3)),
        arrays(2, 5, 5),
        params=["parts.1.*", "*.2.weight"],
    ),
    Case("two-inputs", MultiInput, two_inputs("tuple")),
    Case("two-inputs-dict", MultiInput, two_inputs("dict")),
    Case(
        "regression",
        lambda: Net(nn.Linear(6, 5), torch.tanh, nn.Linear(5, 1)),
        lambda n: [(torch.randn(6), torch.randn(())) for _ in range(n)],
        "regression",
    ),
    Case(
        "regression-column-dict",
        lambda: Net(nn.Linear(6, 5), torch.tanh, nn.Linear(5, 1)),
        lambda n: [{"x": torch.randn(6), "labels": torch.randn(1)} for _ in range(n)],
        "regression",
    ),
    Case("sorts-its-batch", SortedByKey, sorted_at_first),
    Case("experts", Experts, one_expert_at_first),
]
BY_NAME = {case.name: case for case in CASES}
