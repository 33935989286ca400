"""Faults of the past, a regression test each: the right scores, by autograd one example at a time, or one sentence."""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import byline
import reference as ref
from byline.engines.workbench import Workbench
from byline.ensembles.base import Ensemble


def vectors(n: int, *shape: int, classes: int = 3, seed: int = 1) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=g), torch.randint(classes, (), generator=g)) for _ in range(n)]


def ids(n: int, length: int, vocabulary: int = 11, classes: int = 3, seed: int = 1) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(vocabulary, (length,), generator=g), torch.randint(classes, (), generator=g)) for _ in range(n)
    ]


def net(d: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).eval()


def rows(model: nn.Module, items: list[Any], of: str = "output", values: Any = ref.classification) -> np.ndarray:
    return getattr(ref.side(model, items, values, own=True), of)


def by_hand(model: nn.Module, train: list[Any], test: list[Any], values: Any = ref.classification) -> np.ndarray:
    return rows(model, test, "output", values) @ -rows(model, train, "loss", values).T


def masked_by_hand(task: byline.Task, ensemble: Ensemble, train: list[Any], test: list[Any]) -> np.ndarray:
    """The mean over members, each on the model under its changes."""
    found = []
    for member in ensemble.members():
        model = copy.deepcopy(task.model)
        with member.applied(model, "gradient") as changed:
            found.append(by_hand(changed, train, test))
    return np.mean(found, 0)


def graddot(
    model: nn.Module, train: list[Any], test: list[Any], ensemble: Any = None, task: Any = None, **options: Any
):
    options = {"progress": False, **options}
    task = task or byline.Task(model)
    return byline.GradDot(task, ensemble or byline.Independent([model]), **options).fit(train).attribute(test).values


def verdict(model: nn.Module, data: list[Any], of: str = "output") -> Any:
    bench = Workbench(byline.Task(model), data)
    with bench.active(byline.Independent([model]).members()[0], "gradient") as active:
        return active.capture(of).verdict


# transformers


def bert(**options: Any) -> nn.Module:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=10,
        max_position_embeddings=9, num_labels=3, **options,
    )  # fmt: skip
    return t.BertForSequenceClassification(config).eval()


def texts(n: int, seed: int = 1) -> list[Any]:
    return [{"input_ids": x, "labels": y} for x, y in ids(n, 5, seed=seed)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [5, 64])
def test_several_masks_on_bert(batch_size):
    model = bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    ensemble = byline.Dropout(byline.Independent([model]), masks=3)
    train, test = texts(8), texts(3, 2)
    expected = masked_by_hand(byline.Task(model), ensemble, train, test)
    ref.assert_close(graddot(model, train, test, ensemble, batch_size=batch_size), expected, 1e-3)
    plain = by_hand(model, train, test)
    assert np.abs(expected - plain).max() > 0.01 * np.abs(plain).max()  # the masks do something


@pytest.mark.filterwarnings("ignore")
def test_positions_of_bert_need_no_autograd():
    model = bert()
    train, test = texts(7), texts(3, 2)
    seen = []
    handle = model.bert.embeddings.position_embeddings.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    model(input_ids=torch.zeros(4, 5, dtype=torch.long))
    handle.remove()
    assert seen[0][0] == 1  # looked up once for all examples
    assert not verdict(model, train).fallback
    ref.assert_close(graddot(model, train, test, batch_size=5), by_hand(model, train, test), 1e-3)


# compiled, scripted, traced, wrapped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["whole", "part", "in place"])
def test_compiled_models(part):
    plain = net()
    train, test = vectors(9, 4), vectors(3, 4, seed=2)
    expected = by_hand(plain, train, test)
    torch._dynamo.reset()
    if part == "whole":
        model = torch.compile(plain, backend="eager")
    elif part == "part":
        model = nn.Sequential(torch.compile(plain[:2], backend="eager"), plain[2], plain[3]).eval()
    else:
        model = copy.deepcopy(plain)
        model.compile(backend="eager")
    model(torch.randn(4, 4))  # a form that was compiled before anyone hooks
    # as many as were compiled, others, and one alone
    for count, batch_size in ((9, 4), (9, 5), (9, 64)):
        ref.assert_close(graddot(model, train[:count], test[:1], batch_size=batch_size), expected[:1], 1e-4)
        ref.assert_close(graddot(model, train[:count], test, batch_size=batch_size), expected, 1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.filterwarnings("ignore")
def test_scripted_and_traced_models(how):
    plain = net()
    model = torch.jit.script(plain) if how == "script" else torch.jit.trace(plain, torch.randn(2, 4))
    train, test = vectors(9, 4), vectors(3, 4, seed=2)
    with pytest.raises(ValueError, match="scripted or traced"):
        graddot(model, train, test, byline.Dropout(byline.Independent([model]), masks=2))
    ref.assert_close(graddot(model, train, test, batch_size=4), by_hand(plain, train, test), 1e-4)


class Distributed(nn.parallel.DistributedDataParallel):
    """Without a group of processes to belong to."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        Distributed,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    ],
    ids=["data parallel", "distributed", "compiled", "both"],
)
def test_wrapped_models_are_those_inside(wrap, caplog):
    plain = net()
    train, test = vectors(9, 4), vectors(3, 4, seed=2)
    expected = by_hand(plain, train, test)
    wrapped = wrap(plain).eval()
    with caplog.at_level(logging.INFO, "byline"):
        task = byline.Task(wrapped, params="0.*")
    assert task.model is plain
    assert caplog.text.count("the model inside") == 1
    assert list(task.chosen()) == ["0.weight", "0.bias"]
    assert list(byline.Task(plain).with_model(wrapped).chosen()) == list(byline.Task(plain).chosen())
    assert byline.Task(wrapped).fingerprint() == byline.Task(plain).fingerprint()
    ref.assert_close(graddot(wrapped, train, test, byline.Independent([wrapped])), expected, 1e-4)
    ref.assert_close(graddot(wrapped, train, test, byline.Independent([wrapped.state_dict()])), expected, 1e-4)


# gradients that are off


OFF = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize("off", OFF)
def test_calls_under_no_grad(off):
    model, train, test = net(), vectors(9, 4), vectors(3, 4, seed=2)
    expected = by_hand(model, train, test)
    at = byline.GradDot(byline.Task(model), byline.Independent([model]), progress=False).fit(train)
    with OFF[off]():
        ref.assert_close(at.attribute(test).values, expected, 1e-4)
        ref.assert_close(graddot(model, train, test), expected, 1e-4)
        assert not torch.is_grad_enabled()
        # examples, and a model, that are made there
        inside, other = [(x.clone(), y.clone()) for x, y in train], copy.deepcopy(model)
        ref.assert_close(graddot(model, inside, test), expected, 1e-4)
        ref.assert_close(graddot(other, train, test), expected, 1e-4)


@pytest.mark.parametrize("off", OFF)
def test_a_model_that_runs_without_gradients_is_refused(off):
    class Off(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = net()

        def forward(self, x):
            with OFF[off]():
                return self.inside(x)

    with pytest.raises(ValueError, match=r"does not depend on any attributed parameter by a gradient.*no_grad") as said:
        graddot(Off().eval(), vectors(9, 4), vectors(3, 4))
    assert "\n" not in str(said.value)


# layers of one's own


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Channels(nn.LayerNorm):
    """By hand."""

    def forward(self, x):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight[:, None, None] + self.bias[:, None, None]


@pytest.mark.parametrize("norm", [LayerNorm2d, Channels])
def test_layer_norms_of_channels_need_no_autograd(norm):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, 2), norm(4), nn.Conv2d(4, 3, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(27, 3)
    ).eval()
    train, test = vectors(8, 2, 6, 6), vectors(3, 2, 6, 6, seed=2)
    assert not verdict(model, train).fallback
    for batch_size in (3, 4, 8):
        ref.assert_close(graddot(model, train, test, batch_size=batch_size), by_hand(model, train, test), 1e-4)


class OwnNorm(nn.Module):
    """Statistics of the batch while training, as any batch norm of one's own."""

    def __init__(self, d):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(d) + 0.5)
        self.register_buffer("mean", torch.randn(d))

    def forward(self, x):
        if not self.training:
            return (x - self.mean) * self.scale
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return (x - x.mean(0)) * self.scale


class Tempered(nn.Module):
    """A temperature that was fitted after training."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x) if self.training else self.body(x) / 4


def while_training(name: str) -> nn.Module:
    torch.manual_seed(0)
    spectral = nn.utils.parametrizations.spectral_norm
    first = spectral(nn.Linear(4, 8)) if name == "spectral norm" else nn.Linear(4, 8)
    norm = [OwnNorm(8)] if name == "own norm" else []
    model = nn.Sequential(first, *norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
    return (Tempered(model) if name == "temperature" else model).eval()


class Masked(nn.Module):
    """The model, with its only dropout's mask written in."""

    def __init__(self, model, keep):
        super().__init__()
        self.model, self.keep = model, keep

    def forward(self, x):
        drop = next(m for m in self.model.modules() if isinstance(m, nn.Dropout))
        handle = drop.register_forward_hook(lambda m, args, out: args[0] * self.keep)
        try:
            return self.model(x)
        finally:
            handle.remove()


def masks_of(ensemble: Ensemble, width: int, of: str = "gradient") -> list[torch.Tensor]:
    """What each member multiplies by."""
    found = []
    for member in ensemble.members():
        probe = nn.Sequential(nn.Identity(), nn.Dropout(0.3)).eval()
        with member.applied(probe, of) as changed:
            found.append(changed(torch.ones(1, width))[0].clone())
    return found


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("name", ["own norm", "spectral norm", "temperature"])
def test_masks_switch_on_dropout_alone(name, forward_only):
    model = while_training(name)
    train, test = vectors(9, 4), vectors(3, 4, seed=2)
    ensemble = byline.Dropout(byline.Independent([model]), masks=3, forward_only=forward_only)
    keeps = masks_of(ensemble, 8, "residual")
    assert all((keep == 0).any() and (keep > 1).any() for keep in keeps)
    sides = [[ref.side(Masked(copy.deepcopy(model), k), items, ref.classification, own=True) for k in keeps]
             for items in (test, train)]  # fmt: skip
    if forward_only:
        # gradients from the model without masks
        plain = [ref.side(copy.deepcopy(model), items, ref.classification, own=True) for items in (test, train)]
        kernel = ref.trak_kernel(plain[0], plain[1], 0.3)
        expected = kernel * np.mean([s.q for s in sides[1]], 0)
    else:
        expected = ref.trak(sides[0], sides[1], 0.3)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for batch_size in (1, 4, 64):
        task = byline.Task(model)
        at = byline.TRAK(
            task, ensemble, damping=0.3, features=byline.Exact(), residual="mean", batch_size=batch_size, progress=False
        )
        ref.assert_close(at.fit(train).attribute(test).values, expected, 1e-3)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# what examples have to do with each other


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.emb(x)).mean(1))


def padded(items: list[Any]) -> Any:
    longest = max(len(x) for x, _ in items)
    return torch.stack([F.pad(x, (0, longest - len(x))) for x, _ in items]), torch.stack([y for _, y in items])


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_padding_that_changes_the_output_is_refused(batch_size):
    torch.manual_seed(0)
    data = [(x[: 2 + (7 * i) % 9], y) for i, (x, y) in enumerate(ids(30, 12))]
    with pytest.raises(ValueError, match=r"depends on the other examples in its batch: train_set\[\d+\]"):
        graddot(Mean().eval(), data, data[:3], collate=padded, batch_size=batch_size)


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 10, 0.0), 1, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.enc(self.emb(x).transpose(0, 1)).mean(0))


class Positions(nn.Module):
    """As nanoGPT: looked up once, (T,), or sliced from the table."""

    def __init__(self, table, how):
        super().__init__()
        self.emb, self.pos, self.how = nn.Embedding(11, 8), nn.Embedding(table, 8), how
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        t = x.shape[1]
        pos = self.pos(torch.arange(t)) if self.how == "lookup" else self.pos.weight[:t]
        return self.head(torch.tanh(self.mix(self.emb(x) + pos)).mean(1))


class Table(nn.Module):
    """A bare table of positions, longer than the sequences."""

    def __init__(self, table, leading):
        super().__init__()
        self.pos = nn.Parameter(torch.randn(*[1] * leading, table, 8))
        self.emb, self.head, self.leading = nn.Embedding(11, 8), nn.Linear(8, 3), leading

    def forward(self, x):
        pos = self.pos[:, : x.shape[1]] if self.leading else self.pos[: x.shape[1]]
        return self.head(torch.tanh(self.emb(x) + pos).mean(1))


class Experts(nn.Module):
    """Tokens are routed; an expert may get as many tokens as there are examples."""

    def __init__(self):
        super().__init__()
        self.emb, self.gate, self.head = nn.Embedding(11, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x):
        flat = self.emb(x).reshape(-1, 8)
        weight = self.gate(flat).softmax(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            i = (weight.argmax(-1) == e).nonzero()[:, 0]
            if len(i):
                out = out.index_add(0, i, torch.tanh(expert(flat[i])) * weight[i, e : e + 1])
        return self.head((flat + out).view(*x.shape, 8).mean(1))


class Loop(nn.Module):
    """A layer that is called example by example."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.stack([torch.tanh(self.inner(row)) for row in x]))


@pytest.mark.parametrize(
    ("build", "length", "sizes"),
    [
        pytest.param(SequenceFirst, 5, (4, 5, 6), id="encoder, sequence first"),
        pytest.param(lambda: Positions(5, "lookup"), 5, (4, 5, 6), id="positions looked up once"),
        pytest.param(lambda: Positions(9, "lookup"), 5, (4, 5, 9), id="a longer table"),
        pytest.param(lambda: Positions(9, "slice"), 5, (4, 5, 9), id="a longer table, sliced"),
        pytest.param(lambda: Table(9, 0), 5, (4, 5, 9), id="a bare table, sliced"),
        pytest.param(lambda: Table(9, 1), 5, (1, 5, 9), id="a bare table of one, sliced"),
        pytest.param(Experts, 4, (1, 2, 3, 4, 5, 6, 7, 8, 12), id="experts"),
    ],
)
def test_sizes_that_happen_to_be_equal(build, length, sizes):
    torch.manual_seed(0)
    model = build().eval()
    train, test = ids(12, length), ids(3, length, seed=2)
    expected = by_hand(model, train, test)
    for batch_size in sizes:
        ref.assert_close(graddot(model, train, test, batch_size=batch_size), expected, 1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_a_layer_that_is_called_example_by_example(batch_size):
    torch.manual_seed(0)
    model, train, test = Loop().eval(), vectors(9, 4), vectors(4, 4, seed=2)
    ref.assert_close(graddot(model, train, test, batch_size=batch_size), by_hand(model, train, test), 1e-4)


class ByLength(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.rnn = nn.Linear(4, 6), nn.GRU(6, 5, batch_first=True)
        self.mid, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x, lengths):
        order = lengths.argsort(descending=True, stable=True)
        h = torch.tanh(self.inner(x[order]))
        packed = nn.utils.rnn.pack_padded_sequence(h, lengths[order].cpu(), batch_first=True)
        h = torch.tanh(self.mid(self.rnn(packed)[1][-1]))
        return self.head(h[order.argsort()])


def test_sorting_by_length_where_the_first_middle_and_last_are_equally_long():
    torch.manual_seed(0)

    def data(n, seed):
        out = []
        for i, (x, y) in enumerate(vectors(n, 6, 4, seed=seed)):
            length = 6 if i in (0, (n - 1) // 2, n - 1) else 2 + i % 5
            x[length:] = 0
            out.append((x, torch.tensor(length), y))
        return out

    model, train, test = ByLength().eval(), data(20, 1), data(7, 2)
    expected = by_hand(model, train, test)
    for batch_size in (6, 20):
        ref.assert_close(graddot(model, train, test, batch_size=batch_size), expected, 1e-3)


# parameters


class Positive(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x * self.weight.clamp(min=0)


class Bounded(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.clamp(-1, 1), self.bias)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("kind", ["scale", "linear"])
def test_weights_that_are_clamped_in_one_of_the_members(kind, order):
    torch.manual_seed(0)
    first = [nn.Linear(4, 6), Positive(6)] if kind == "scale" else [Bounded(4, 6)]
    one = nn.Sequential(*first, nn.Tanh(), nn.Linear(6, 3)).eval()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[1].weight[:3].fill_(-0.5) if kind == "scale" else other[0].weight.mul_(5)
    models, train, test = [one, other], vectors(9, 4), vectors(3, 4, seed=2)
    expected = np.mean([by_hand(m, train, test) for m in models], 0)
    ensemble = byline.Independent([models[i] for i in order])
    ref.assert_close(graddot(one, train, test, ensemble), expected, 1e-4)


@pytest.mark.parametrize("layer", ["einsum", "bilinear", "transposed convolution"])
def test_autograd_of_what_has_no_rule_runs_under_vmap(layer, caplog):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.odd: Any = {
                "einsum": lambda: nn.ParameterList([torch.randn(6, 6)]),
                "bilinear": lambda: nn.Bilinear(6, 6, 6),
                "transposed convolution": lambda: nn.ConvTranspose1d(1, 1, 1),
            }[layer]()

        def forward(self, x):
            h = torch.tanh(self.a(x))
            if layer == "einsum":
                h = torch.einsum("bi,ij->bj", h, self.odd[0])
            elif layer == "bilinear":
                h = self.odd(h, h)
            else:
                h = self.odd(h.unsqueeze(1)).squeeze(1)
            return self.b(torch.tanh(h))

    torch.manual_seed(0)
    model, train, test = Odd().eval(), vectors(9, 4), vectors(3, 4, seed=2)
    with caplog.at_level(logging.INFO, "byline"):
        found = graddot(model, train, test, batch_size=4)
    assert "one example at a time" not in caplog.text
    assert verdict(model, train).fallback
    ref.assert_close(found, by_hand(model, train, test), 1e-4)


@pytest.mark.parametrize("place", ["inside", "logits"])
def test_a_parameter_without_dimensions(place):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = net(), nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            return self.body(x * self.scale) if place == "inside" else self.body(x) * self.scale

    model, train, test = Scaled().eval(), vectors(9, 4), vectors(3, 4, seed=2)
    for batch_size in (1, 4, 9):
        ref.assert_close(graddot(model, train, test, batch_size=batch_size), by_hand(model, train, test), 1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
@pytest.mark.parametrize("change", ["mul", "add", "relu", "index"])
def test_an_output_that_is_a_view_is_changed_in_place(change, batch_size):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.a(x.unsqueeze(1))[:, 0]  # of a (B, 1, d) matmul torch gives a view
            h = {
                "mul": lambda: h.mul_(1.7),
                "add": lambda: h.add_(x[:, :1]),
                "relu": lambda: F.relu_(h),
                "index": lambda: h.__setitem__((slice(None), 0), 0.5) or h,
            }[change]()
            return self.b(torch.tanh(h))

    torch.manual_seed(0)
    model, train, test = InPlace().eval(), vectors(9, 4), vectors(3, 4, seed=2)
    ref.assert_close(graddot(model, train, test, batch_size=batch_size), by_hand(model, train, test), 1e-4)


def test_an_output_over_the_parameters_of_a_module_with_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.again = self.a

        def forward(self, x):
            return self.head(torch.tanh(self.again(torch.tanh(self.a(x)))))

    def penalised(model, batch):
        decay = sum(p.square().sum() for p in model.parameters())
        return model(batch[0]).gather(1, batch[1][:, None])[:, 0] - 0.3 * decay

    torch.manual_seed(0)
    model, train, test = Twice().eval(), vectors(9, 4), vectors(3, 4, seed=2)
    expected = by_hand(model, train, test, ref.called(penalised))
    for batch_size in (1, 4, 9):
        found = graddot(model, train, test, task=byline.Task(model, penalised), batch_size=batch_size)
        ref.assert_close(found, expected, 1e-4)


def test_the_reference_can_fail():
    model, train, test = net(), vectors(9, 4), vectors(3, 4, seed=2)
    expected = by_hand(model, train, test)
    with contextlib.suppress(AssertionError):
        ref.assert_close(graddot(model, train, [test[1], test[0], test[2]]), expected, 1e-2)
        pytest.fail("the order of the examples is not seen")


# what a model says without gradients


class Padded(nn.Module):
    """torch's encoder, which runs a fused kernel on padded batches where gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
        self.emb, self.enc, self.head = nn.Embedding(11, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x, keep):
        return self.head(self.enc(self.emb(x), src_key_padding_mask=~keep).mean(1))


def test_residuals_are_of_the_forward_pass_that_is_differentiated():
    model = Padded().eval()
    x, keep = torch.randint(11, (5, 6)), torch.arange(6) < torch.tensor([2, 3, 6, 4, 2]).unsqueeze(1)
    task, batch = byline.Task(model), (x, keep, torch.tensor([0, 1, 2, 0, 1]))
    assert torch.equal(task.residual(model, batch), task.differentiate(model, batch, "output")[1])
    with torch.no_grad():
        fused = torch.sigmoid(-byline.task.margin(model(x, keep), batch[2]))
    assert not torch.allclose(fused, task.residual(model, batch), atol=1e-3), "the kernel that this is about is gone"


class Force(nn.Module):
    """A prediction that is itself a gradient, as of physicists' networks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0][:, :1]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_models_whose_forward_pass_takes_gradients(batch_size):
    model = Force().eval()
    g = torch.Generator().manual_seed(1)
    train, test = ([(torch.randn(4, generator=g), torch.randn((), generator=g)) for _ in range(n)] for n in (8, 3))
    found = graddot(model, train, test, task=byline.Task(model, "regression"), batch_size=batch_size)
    ref.assert_close(found, by_hand(model, train, test, ref.regression), 1e-4)
