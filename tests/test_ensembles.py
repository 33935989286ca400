"""Members: masks, noise, checkpoints and adapters against autograd on models that are built to be the member."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import byline
import reference as ref
from architectures import arrays, vectors
from byline.engines.workbench import Workbench
from conftest import build

METHODS = {"TRAK": byline.TRAK, "GradDot": byline.GradDot, "GradCos": byline.GradCos}


def expected(method, tests, trains, damping=0.3):
    if method == "TRAK":
        return ref.trak(tests, trains, damping)
    return ref.mean({"GradDot": ref.graddot, "GradCos": ref.gradcos}[method], tests, trains)


class Drops(nn.Module):
    """A dropout site whose mask can be seen, and set: with ``mask`` it multiplies by that alone, in any mode."""

    def __init__(self, p, kind="module"):
        super().__init__()
        self.kind, self.p, self.mask, self.seen = kind, p, None, None
        self.module = {"module": nn.Dropout, "2d": nn.Dropout2d, "1d": nn.Dropout1d}.get(kind, nn.Identity)(p)

    def forward(self, x):
        if self.mask is not None:
            return x * self.mask
        if self.kind == "functional":
            out = F.dropout(x, self.p, self.training)
        elif self.kind == "functional2d":
            out = F.dropout2d(x, self.p, self.training)
        elif self.kind == "torch":
            out = torch.dropout(x, self.p, self.training)
        else:
            out = self.module(x)
        self.seen = (x.detach(), out.detach())
        return out


class Net(nn.Module):
    """Layers with dropout in between; nonzero activations before every site, so that the mask can be read off."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Attend(nn.Module):
    """Attention by F.scaled_dot_product_attention, causal or with a mask, whose dropped weights can be seen or set."""

    def __init__(self, p=0.4, causal=False):
        super().__init__()
        self.qkv, self.p, self.causal = nn.Linear(4, 24), p, causal
        self.mask, self.look, self.seen = None, False, None

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = q @ k.transpose(-1, -2) / 2
        if self.causal:
            weights = weights.masked_fill(torch.ones(x.shape[1], x.shape[1]).tril() == 0, float("-inf"))
        weights = weights.softmax(-1)
        if self.mask is not None:
            h = (weights * self.mask) @ v
        else:
            rate = self.p if self.training else 0.0
            if self.look:  # the identity as values shows the weights themselves
                eye = torch.eye(x.shape[1]).expand(len(x), 2, -1, -1)
                out = F.scaled_dot_product_attention(q, k, eye, dropout_p=rate, is_causal=self.causal)
                self.seen = (weights.detach(), out.detach())
                return torch.ones(len(x), 8)
            h = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=self.causal)
        return h.transpose(1, 2).flatten(2).mean(1)


class Multihead(nn.Module):
    """nn.MultiheadAttention with visible weights."""

    def __init__(self, p=0.4, batch_first=True):
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=p, batch_first=batch_first)
        self.batch_first, self.need_weights = batch_first, True
        self.mask, self.seen = None, None

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        if self.mask is not None:
            a = self.attention
            q, k, v = F.linear(h, a.in_proj_weight, a.in_proj_bias).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) / 2).softmax(-1) * self.mask
            return a.out_proj((weights @ v).transpose(1, 2).flatten(2)).mean(1)
        if not self.batch_first:
            h = h.transpose(0, 1)
        out, weights = self.attention(h, h, h, need_weights=self.need_weights, average_attn_weights=False)
        if self.need_weights:
            self.seen = weights.detach()
        return out.mean(1 if self.batch_first else 0)


MODELS = {
    "module": lambda: (
        Net(nn.Linear(6, 9), nn.Tanh(), Drops(0.3), nn.Linear(9, 8), nn.Tanh(), Drops(0.5), nn.Linear(8, 3)),
        vectors(),
    ),
    "functional": lambda: (Net(nn.Linear(6, 9), nn.Tanh(), Drops(0.3, "functional"), nn.Linear(9, 3)), vectors()),
    "torch": lambda: (Net(nn.Linear(6, 9), nn.Tanh(), Drops(0.3, "torch"), nn.Linear(9, 3)), vectors()),
    "mixed": lambda: (
        Net(
            nn.Linear(6, 9),
            nn.Tanh(),
            Drops(0.3, "functional"),
            nn.Linear(9, 8),
            nn.Tanh(),
            Drops(0.2),
            nn.Linear(8, 3),
        ),
        vectors(),
    ),
    "2d": lambda: (
        Net(nn.Conv2d(2, 8, 3), nn.Tanh(), Drops(0.4, "2d"), nn.Flatten(), nn.Linear(72, 3)),
        arrays(2, 5, 5),
    ),
    "functional2d": lambda: (
        Net(nn.Conv2d(2, 8, 3), nn.Tanh(), Drops(0.4, "functional2d"), nn.Flatten(), nn.Linear(72, 3)),
        arrays(2, 5, 5),
    ),
    "1d": lambda: (Net(nn.Conv1d(2, 8, 3), nn.Tanh(), Drops(0.4, "1d"), nn.Flatten(), nn.Linear(24, 3)), arrays(2, 5)),
    "recurrent": lambda: (Net(nn.Linear(4, 5), Last(), Drops(0.4), nn.Linear(6, 3)), arrays(5, 4)),
    "attention": lambda: (Net(Attend(), nn.Linear(8, 3)), arrays(5, 4)),
    "attention-causal": lambda: (Net(Attend(causal=True), Drops(0.3), nn.Linear(8, 3)), arrays(5, 4)),
    "multihead": lambda: (Net(Multihead(), nn.Linear(8, 3)), arrays(5, 4)),
}


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


def dropout_model(name, seed=0, n=9):
    torch.manual_seed(seed)
    model, data = MODELS[name]()
    items = data(n + 4)
    return model.eval(), items[:n], items[n:]


def fixed(model, train, member):
    """A copy of the model whose sites multiply by the masks which they show for one example under byline."""
    task = byline.Task(copy.deepcopy(model))
    bench = Workbench(task, train)
    out = copy.deepcopy(model)
    with bench.active(member, "residual") as active, torch.no_grad():
        for part in active.model.modules():
            if isinstance(part, Attend):
                part.look = True
        active.model(train[0][0].unsqueeze(0) + 0.01)
        undropped = copy.deepcopy(model)
        for own, shown in zip(out.modules(), active.model.modules(), strict=True):
            if isinstance(own, Multihead):
                probe = next(m for m in undropped.modules() if isinstance(m, Multihead))
                probe(train[0][0].unsqueeze(0) + 0.01)
                own.mask = (shown.seen / probe.seen)[0]
            elif isinstance(own, Drops | Attend):
                before, after = shown.seen
                own.mask = torch.where(before == 0, 0, after / before)[0]
            if isinstance(own, Drops | Attend | Multihead):
                # a mask of ones and zeros over 1 - p
                levels = own.mask[own.mask != 0]
                own.mask = torch.where(own.mask != 0, levels.median(), 0.0).double()
                torch.testing.assert_close(levels, torch.full_like(levels, float(levels.median())))
    return out


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("p", [None, 0.6])
def test_a_mask_is_one_fixed_multiplication_for_all_examples(name, p):
    model, train, test = dropout_model(name)
    task = byline.Task(model)
    ensemble = byline.Dropout(byline.Independent([model]), masks=3, p=p, seed=5)
    members = [fixed(model, train, m) for m in ensemble.members()]
    for own in members:
        rates = [m for m in own.modules() if isinstance(m, Drops | Attend | Multihead)]
        for site in rates:
            rate = p if p is not None else (site.attention.dropout if isinstance(site, Multihead) else site.p)
            assert site.mask.max() == pytest.approx(1 / (1 - rate), rel=1e-4)
            assert (site.mask == 0).any()
    tests = [ref.side(m, test, ref.classification) for m in members]
    trains = [ref.side(m, train, ref.classification) for m in members]
    assert abs(tests[0].f - tests[1].f).max() > 1e-3, "two masks are the same"
    for method, kind in METHODS.items():
        attributor = kind(task, ensemble, damping=0.3, batch_size=4, progress=False).fit(train)
        ref.assert_close(attributor.attribute(test).values, expected(method, tests, trains))


def test_alpha_dropout_is_the_same_for_all_examples_and_keeps_its_form():
    model, train, _test = dropout_model("module")
    model.parts[2] = nn.AlphaDropout(0.4)
    model.parts[5] = nn.Identity()
    member = byline.Dropout(byline.Independent([model]), masks=1).members()[0]
    seen = {}
    bench = Workbench(byline.Task(model), train)
    x = torch.stack([x for x, _ in train])
    with bench.active(member, "gradient") as active, torch.no_grad():
        active.model.parts[2].register_forward_hook(lambda m, a, out: seen.update(x=a[0], out=out))
        active.model(x)
    q, low = 0.6, -1.7580993408473766
    a = (q + low**2 * q * 0.4) ** -0.5
    b = -a * 0.4 * low
    dropped = torch.isclose(seen["out"], torch.tensor(a * low + b))
    assert torch.equal(dropped, dropped[:1].expand_as(dropped))
    assert 0 < dropped[0].sum() < 9
    torch.testing.assert_close(seen["out"], torch.where(dropped, a * low + b, a * seen["x"] + b))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_masks_do_not_depend_on_place_or_batch(batch_first, need_weights):
    torch.manual_seed(0)
    attention = Multihead(0.5, batch_first)
    attention.need_weights = need_weights
    model = Net(attention, nn.Linear(8, 3)).eval()
    train = arrays(5, 4)(9)
    ensemble = byline.Dropout(byline.Independent([model]), masks=3)
    x = torch.stack([x for x, _ in train])
    bench = Workbench(byline.Task(model), train)
    outs = []
    for member in ensemble.members():
        with bench.active(member, "gradient") as active, torch.no_grad():
            whole = active.model(x)
            alone = torch.cat([active.model(x[i : i + 1]) for i in range(9)])
            torch.testing.assert_close(active.model(x.flip(0)).flip(0), whole)
        torch.testing.assert_close(alone, whole)
        outs.append(whole)
    plain = model(x).detach()
    assert all((o - plain).abs().max() > 1e-3 for o in outs)
    assert (outs[0] - outs[1]).abs().max() > 1e-3
    values = [
        byline.TRAK(byline.Task(model), ensemble, damping=0.3, batch_size=b, progress=False)
        .fit(train)
        .attribute(train)
        .values
        for b in (1, 7)
    ]
    ref.assert_close(values[0], values[1], 1e-5)


@pytest.mark.parametrize("name", ["module", "functional", "2d", "recurrent", "attention"])
@pytest.mark.parametrize("method", list(METHODS))
def test_batch_sizes_agree_and_two_fits_give_equal_bits(name, method):
    model, train, test = dropout_model(name, n=17)
    ensemble = byline.Dropout(byline.Independent([model]), masks=3, p=0.4)

    def values(batch_size):
        attributor = METHODS[method](
            byline.Task(model), ensemble, damping=0.3, batch_size=batch_size, progress=False
        ).fit(train)
        return attributor.attribute(test)

    found = {size: values(size) for size in (1, 7, 256)}
    for size in (1, 7):
        ref.assert_close(found[size].values, found[256].values, 1e-5)
        ref.assert_close(found[size].stderr, found[256].stderr, 1e-4)
    again = values(7)
    assert (again.values == found[7].values).all()
    assert (again.stderr == found[7].stderr).all()


@pytest.mark.parametrize("name", ["gru", "conv2d-groups", "embedding-padding", "gpt2-labels", "batch-norm-2d"])
def test_batch_sizes_agree_without_dropout(name):
    made = build(name, train=17)
    found = []
    for size in (1, 7, 256):
        attributor = byline.TRAK(
            made.task, byline.Independent([made.model]), damping=0.3, batch_size=size, progress=False
        )
        found.append(attributor.fit(made.train).attribute(made.test).values)
    ref.assert_close(found[0], found[2], 1e-5)
    ref.assert_close(found[1], found[2], 1e-5)


def test_masks_are_the_same_for_training_and_test_examples():
    """Attributing the training set to itself: GradDot with the output as its own loss is a symmetric kernel."""
    model, train, _ = dropout_model("module")

    def output(model, batch):
        return model(batch[0])[:, 0]

    task = byline.Task(model, output=output)
    ensemble = byline.Dropout(byline.Independent([model]), masks=2)
    attributor = byline.GradDot(task, ensemble, batch_size=4, progress=False).fit(train)
    values = attributor.attribute(train).values
    ref.assert_close(values, values.T, 1e-6)
    # a test set in another order and in other batches sees the same masks
    ref.assert_close(attributor.attribute(train[::-1]).values[::-1], values, 1e-6)


def test_other_seeds_models_and_numbers_have_other_masks_and_equal_ones_equal_masks():
    model, train, _ = dropout_model("module")

    def masks(ensemble):
        out = []
        for member in ensemble.members():
            sites = [m.mask for m in fixed(model, train, member).modules() if isinstance(m, Drops)]
            out.append(torch.cat([s.flatten() for s in sites]))
        return out

    two = byline.Independent([model, model])
    few, more = masks(byline.Dropout(two, masks=2)), masks(byline.Dropout(two, masks=4))
    assert torch.equal(few[0], more[0])
    assert torch.equal(few[1], more[1])
    assert torch.equal(few[2], more[4])
    for i in range(len(more)):
        assert not any(torch.equal(more[i], more[j]) for j in range(i))
    assert not torch.equal(masks(byline.Dropout(two, masks=1, seed=1))[0], more[0])


def test_rates_are_met_on_average():
    model = Net(nn.Linear(6, 4000), nn.Tanh(), Drops(0.3), nn.Linear(4000, 3)).eval()
    train = vectors()(3)
    for p, rate in ((None, 0.3), (0.7, 0.7)):
        member = byline.Dropout(byline.Independent([model]), masks=1, p=p).members()[0]
        mask = next(m.mask for m in fixed(model, train, member).modules() if isinstance(m, Drops))
        # five standard deviations of a fair draw
        assert abs(float((mask == 0).double().mean()) - rate) < 5 * (rate * (1 - rate) / 4000) ** 0.5


def test_forward_only_masks_q_alone():
    model, train, test = dropout_model("module")
    other, _, _ = dropout_model("module", seed=3)
    base = byline.Independent([model, other])
    ensemble = byline.Dropout(base, masks=3, forward_only=True)
    attributor = byline.TRAK(byline.Task(model), ensemble, damping=0.3, progress=False).fit(train)
    q = []
    for m in ensemble.members():
        own = fixed(model if m.model_index == 0 else other, train, m)
        own.load_state_dict((model if m.model_index == 0 else other).state_dict())
        q.append(ref.side(own, train, ref.classification).q)
    kernels = [
        ref.trak_kernel(ref.side(m, test, ref.classification), ref.side(m, train, ref.classification), 0.3)
        for m in (model, other)
    ]
    scores = attributor.attribute(test)
    ref.assert_close(scores.values, sum(kernels) / 2 * (sum(q) / 6))
    assert scores.info["members"] == 6
    with pytest.raises(ValueError, match="forward_only"):
        byline.GradDot(byline.Task(model), ensemble)


def test_forward_only_computes_one_set_of_features_per_trained_model(monkeypatch):
    model, train, _ = dropout_model("module")
    base = byline.Independent([model, dropout_model("module", seed=1)[0]])
    made = byline.TRAK(
        byline.Task(model), byline.Dropout(base, masks=5, forward_only=True), damping=1, progress=False
    ).fit(train)
    assert len(made.store.manifest.features) == 2
    full = byline.TRAK(byline.Task(model), byline.Dropout(base, masks=5), damping=1, progress=False).fit(train)
    assert len(full.store.manifest.features) == 10


def test_no_dropout_layer_is_refused():
    made = build("mlp")
    with pytest.raises(ValueError, match="no dropout layer"):
        byline.TRAK(made.task, byline.Dropout(byline.Independent([made.model])), progress=False).fit(made.train)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.0), nn.Linear(5, 3)).eval()
    with pytest.raises(ValueError, match="rate 0"):
        byline.TRAK(byline.Task(model), byline.Dropout(byline.Independent([model])), progress=False).fit(made.train)
    byline.TRAK(byline.Task(model), byline.Dropout(byline.Independent([model]), p=0.2), progress=False).fit(made.train)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_dropout_inside_a_fused_recurrent_layer_is_refused(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(4, 5, num_layers=2, dropout=0.2, batch_first=True)
            self.drop, self.head = nn.Dropout(0.1), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.drop(self.rnn(x)[0][:, -1]))

    model = Model().eval()
    with pytest.raises(ValueError, match=r"rnn \(\w+\) runs inside a fused kernel"):
        byline.TRAK(byline.Task(model), byline.Dropout(byline.Independent([model])), progress=False).fit(
            arrays(5, 4)(5)
        )


class Statement(nn.Module):
    """In-place dropout whose result is not assigned."""

    def __init__(self):
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(6, 40), nn.Dropout(0.5, inplace=True), nn.Linear(40, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x)) + 0
        self.drop(h)
        return self.b(h)


def test_in_place_dropout_works_in_place():
    torch.manual_seed(0)
    model, train = Statement().eval(), vectors()(5)
    x = torch.stack([x for x, _ in train])
    member = byline.Dropout(byline.Independent([model]), masks=1).members()[0]
    bench = Workbench(byline.Task(model), train)
    with bench.active(member, "gradient") as active, torch.no_grad():
        dropped = active.model(x)
    assert (dropped - model(x)).abs().max() > 1e-3, "in-place dropout is silently left off"


class Path(nn.Module):
    """Stochastic depth as timm writes it: random per example, by bernoulli_, in training mode alone."""

    def forward(self, x):
        if not self.training:
            return x
        keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(0.97)
        return x * keep / 0.97


def test_randomness_that_is_no_dropout_is_refused_under_masks():
    """It is on in training mode, so masks would not be all that differs between two calls."""
    data = vectors()(30)
    for seed in range(8):
        torch.manual_seed(seed)
        model = Net(nn.Linear(6, 9), nn.Tanh(), Path(), nn.Dropout(0.3), nn.Linear(9, 3)).eval()
        ensemble = byline.Dropout(byline.Independent([model]), masks=2)
        with pytest.raises(ValueError, match="random"):
            byline.TRAK(byline.Task(model), ensemble, damping=1, progress=False).fit(data)


class SwitchedOff(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 40), nn.Linear(40, 3)

    def forward(self, x):
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.5, training=False))


def test_functional_dropout_that_is_switched_off_is_no_site():
    model = SwitchedOff().eval()
    with pytest.raises(ValueError, match="dropout"):
        byline.TRAK(byline.Task(model), byline.Dropout(byline.Independent([model])), progress=False).fit(vectors()(5))


def test_dropout_with_an_output_that_calls_parts_of_the_model():
    """design.md: a callable output is any f(model, batch); it need not call the model as a whole, or only once."""
    model, train, test = dropout_model("module")

    def hidden(model, batch):
        h = model.parts[0](batch[0])
        for part in model.parts[1:6]:
            h = part(h)
        return h.square().sum(1)

    ensemble = byline.Dropout(byline.Independent([model]), masks=2)
    attributor = byline.GradDot(byline.Task(model, output=hidden), ensemble, batch_size=4, progress=False)
    members = [fixed(model, train, m) for m in ensemble.members()]
    values = ref.called(hidden)
    found = attributor.fit(train).attribute(test).values
    tests, trains = ([ref.side(m, part, values) for m in members] for part in (test, train))
    ref.assert_close(found, ref.mean(ref.graddot, tests, trains))


def test_dropout_with_an_output_that_calls_the_model_twice():
    model, train, test = dropout_model("module")

    def contrast(model, batch):
        return model(batch[0])[:, 0] - model(-batch[0])[:, 1]

    ensemble = byline.Dropout(byline.Independent([model]), masks=2)
    attributor = byline.GradDot(byline.Task(model, output=contrast), ensemble, batch_size=4, progress=False)
    members = [fixed(model, train, m) for m in ensemble.members()]
    tests, trains = ([ref.side(m, part, ref.called(contrast)) for m in members] for part in (test, train))
    ref.assert_close(attributor.fit(train).attribute(test).values, ref.mean(ref.graddot, tests, trains))


# weight noise, trajectories, joined


def test_weight_noise_multiplies_the_weights():
    made = build("mlp")
    ensemble = byline.WeightNoise(byline.Independent([made.model]), draws=3, scale=0.4, seed=2)
    bench = Workbench(made.task, made.train)
    noisy, original = [], made.model.state_dict()
    for member in ensemble.members():
        with bench.active(member, "gradient") as active:
            noisy.append(copy.deepcopy(active.model))
        assert all(torch.equal(v, original[k]) for k, v in bench.model.state_dict().items())
    factors = [
        torch.cat([(m.state_dict()[k] / original[k]).flatten() for k in original if original[k].ndim > 1]) - 1
        for m in noisy
    ]
    for f in factors:
        assert f.std() == pytest.approx(0.4, rel=0.35)
        assert abs(f.mean()) < 0.25
    assert abs(torch.corrcoef(torch.stack(factors))[0, 1]) < 0.5
    tests, trains = ([ref.side(m, part, ref.classification) for m in noisy] for part in (made.test, made.train))
    for method, kind in METHODS.items():
        scores = kind(made.task, ensemble, damping=0.3, progress=False).fit(made.train).attribute(made.test)
        ref.assert_close(scores.values, expected(method, tests, trains))


@pytest.fixture
def run():
    """Two runs of two checkpoints."""
    made = build("mlp")
    torch.manual_seed(7)
    models = [copy.deepcopy(made.model) for _ in range(4)]
    for model in models[1:]:
        for p in model.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    made.models = models
    made.tests, made.trains = (
        [ref.side(m, part, ref.classification) for m in models] for part in (made.test, made.train)
    )
    return made


@pytest.mark.parametrize("method", list(METHODS))
def test_a_trajectory_is_the_plain_mean_of_its_checkpoints(run, method):
    a, b, c, d = run.models
    ensemble = byline.Trajectory([[a, b], [c, d]])
    found = METHODS[method](run.task, ensemble, damping=0.3, progress=False).fit(run.train).attribute(run.test)
    ref.assert_close(found.values, expected(method, run.tests, run.trains))


@pytest.mark.parametrize("weights", [[0.1, 0.02], [[0.1, 0.02], [0.3, 0.0]]])
def test_tracin_sums_step_sizes_over_a_run_and_means_over_runs(run, weights):
    a, b, c, d = run.models
    ensemble = byline.Trajectory([[a, b], [c, d]], weights=weights)
    eta = weights[0] + weights[1] if isinstance(weights[0], list) else weights * 2
    dots = [ref.graddot(x, y) for x, y in zip(run.tests, run.trains, strict=True)]
    total = sum(e * k for e, k in zip(eta, dots, strict=True)) / 2
    attributor = byline.TracIn(run.task, ensemble, progress=False).fit(run.train)
    ref.assert_close(attributor.attribute(run.test).values, total)
    mean = sum(e * k for e, k in zip(eta, dots, strict=True)) / sum(eta)
    plain = byline.GradDot(run.task, ensemble, progress=False).fit(run.train).attribute(run.test).values
    ref.assert_close(plain, mean)
    own = [ref.graddot(x, x) for x in run.trains]
    expected_self = sum(e * k for e, k in zip(eta, own, strict=True)).diagonal() / 2
    ref.assert_close(attributor.self_influence(), expected_self)


def test_tracin_counts_equal_checkpoints_each(run):
    """A run that stood still: the sum has a term per checkpoint all the same."""
    a = run.models[0]
    found = byline.TracIn(run.task, byline.Trajectory([[a, a]], weights=[0.1, 0.2]), progress=False)
    ref.assert_close(found.fit(run.train).attribute(run.test).values, 0.3 * ref.graddot(run.tests[0], run.trains[0]))


def test_tracin_without_weights_is_graddot(run):
    ensemble = byline.Trajectory([run.models[:2]])
    one, two = (kind(run.task, ensemble, progress=False).fit(run.train) for kind in (byline.TracIn, byline.GradDot))
    assert (one.attribute(run.test).values == two.attribute(run.test).values).all()


def test_dropout_of_a_trajectory_has_masks_of_its_own_for_each_checkpoint():
    models = [dropout_model("module", seed=s)[0] for s in range(2)]
    _, train, test = dropout_model("module")
    ensemble = byline.Dropout(byline.Trajectory([models], weights=[0.5, 0.1]), masks=2)
    members = ensemble.members()
    assert len(members) == 4
    own = [fixed(models[i // 2], train, m) for i, m in enumerate(members)]
    for f, i in zip(own, range(4), strict=True):
        f.load_state_dict(models[i // 2].state_dict())
    assert not torch.equal(own[0].parts[2].mask, own[2].parts[2].mask)
    tests, trains = ([ref.side(m, part, ref.classification) for m in own] for part in (test, train))
    dots = [ref.graddot(x, y) for x, y in zip(tests, trains, strict=True)]
    found = byline.TracIn(byline.Task(models[0]), ensemble, progress=False).fit(train).attribute(test).values
    ref.assert_close(found, 0.5 * (dots[0] + dots[1]) / 2 + 0.1 * (dots[2] + dots[3]) / 2)


def test_weight_noise_of_a_trajectory(run):
    ensemble = byline.WeightNoise(byline.Trajectory([run.models[:2]]), draws=2, scale=0.2)
    bench = Workbench(run.task, run.train)
    noisy = []
    for member in ensemble.members():
        with bench.active(member, "gradient") as active:
            noisy.append(copy.deepcopy(active.model))
    tests, trains = ([ref.side(m, part, ref.classification) for m in noisy] for part in (run.test, run.train))
    found = byline.TRAK(run.task, ensemble, damping=0.3, progress=False).fit(run.train).attribute(run.test)
    ref.assert_close(found.values, ref.trak(tests, trains, 0.3))


@pytest.mark.parametrize("form", ["module", "state_dict", "safetensors", "pt"])
def test_checkpoints_in_every_form(run, form, tmp_path):
    from safetensors.torch import save_file

    out = []
    for i, model in enumerate(run.models[:2]):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        path = tmp_path / f"{i}.{form}"
        if form == "safetensors":
            save_file(state, path)
        elif form == "pt":
            torch.save(state, path)
        out.append({"module": model, "state_dict": state}.get(form, path))
    found = byline.TRAK(run.task, byline.Independent(out), damping=0.3, progress=False).fit(run.train)
    ref.assert_close(found.attribute(run.test).values, ref.trak(run.tests[:2], run.trains[:2], 0.3))


def test_tied_weights_in_safetensors(tmp_path):
    from safetensors.torch import save_model

    made = build("tied-head")
    save_model(made.model, tmp_path / "tied.safetensors")
    found = byline.GradDot(made.task, byline.Independent([tmp_path / "tied.safetensors"]), progress=False)
    side = ref.side(made.model, made.train, ref.language_modeling)
    ref.assert_close(found.fit(made.train).attribute(made.train).values, ref.graddot(side, side))


def test_joined_ensembles_are_the_mean_of_all_their_members(run):
    a, b, c, _ = run.models
    ensemble = byline.Independent([a]) + byline.Independent([b, c])
    found = byline.TRAK(run.task, ensemble, damping=0.3, progress=False).fit(run.train).attribute(run.test)
    ref.assert_close(found.values, ref.trak(run.tests[:3], run.trains[:3], 0.3))


# LoRA


@pytest.fixture
def lora():
    pytest.importorskip("peft")
    made = build("mlp", train=16)
    made.ensemble = byline.train_lora(
        made.task,
        byline.Independent([made.model]),
        made.train,
        adapters=2,
        rank=2,
        epochs=2,
        lr=0.05,
        batch_size=8,
        progress=False,
    )
    return made


def with_peft(model, folder):
    """The model with an adapter loaded by PEFT itself, its adapter weights trainable."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(model), folder, is_trainable=True).eval()


def named(model, batch):
    return ref.classification(model, batch)


@pytest.mark.parametrize("method", list(METHODS))
def test_lora_members_are_the_gradients_of_the_adapter_alone(lora, tmp_path, method):
    members = []
    for i, adapter in enumerate(lora.ensemble.adapters[0]):
        adapter.save(tmp_path / str(i))
        members.append(with_peft(lora.model, tmp_path / str(i)))
    assert all("lora_" in n for n, p in members[0].named_parameters() if p.requires_grad)
    tests, trains = ([ref.side(m, part, named) for m in members] for part in (lora.test, lora.train))
    found = METHODS[method](lora.task, lora.ensemble, damping=0.3, progress=False).fit(lora.train)
    ref.assert_close(found.attribute(lora.test).values, expected(method, tests, trains))
    loaded = byline.LoRA(byline.Independent([lora.model]), [[tmp_path / "0", str(tmp_path / "1")]])
    again = METHODS[method](lora.task, loaded, damping=0.3, progress=False).fit(lora.train)
    assert (again.attribute(lora.test).values == found.attribute(lora.test).values).all()


def test_lora_takes_adapters_that_peft_saved(lora, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["parts.0", "parts.4"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(lora.model), config)
    model.save_pretrained(tmp_path)
    found = byline.GradDot(lora.task, byline.LoRA(byline.Independent([lora.model]), [[tmp_path]]), progress=False).fit(
        lora.train
    )
    own = with_peft(lora.model, tmp_path)
    tests, trains = (ref.side(own, part, named) for part in (lora.test, lora.train))
    ref.assert_close(found.attribute(lora.test).values, ref.graddot(tests, trains))


def test_training_adapters_is_seeded_changes_nothing_else_and_lowers_the_loss(lora):
    before = {k: v.clone() for k, v in lora.model.state_dict().items()}
    state = torch.random.get_rng_state()
    again = byline.train_lora(
        lora.task,
        byline.Independent([lora.model]),
        lora.train,
        adapters=2,
        rank=2,
        epochs=2,
        lr=0.05,
        batch_size=8,
        progress=False,
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in lora.model.state_dict().items())
    one, two = lora.ensemble.adapters[0]
    assert again.adapters[0][0].digest() == one.digest() != two.digest()
    bench = Workbench(lora.task, lora.train)
    x = torch.stack([x for x, _ in lora.train])
    y = torch.stack([y for _, y in lora.train])
    for member in lora.ensemble.members():
        with bench.active(member, "gradient") as active, torch.no_grad():
            assert F.cross_entropy(active.model(x), y) < F.cross_entropy(lora.model(x), y)


def test_dropout_of_lora(tmp_path):
    pytest.importorskip("peft")
    model, train, test = dropout_model("module", n=16)
    task = byline.Task(model)
    adapters = byline.train_lora(
        task,
        byline.Independent([model]),
        train,
        adapters=2,
        rank=2,
        epochs=2,
        lr=0.05,
        batch_size=8,
        progress=False,
    )
    ensemble = byline.Dropout(adapters, masks=2, p=0.3)
    members = ensemble.members()
    own = []
    for i, member in enumerate(members):
        adapter = adapters.adapters[0][i // 2]
        adapter.save(tmp_path / str(i))
        injected = with_peft(model, tmp_path / str(i))
        bench = Workbench(task, train)
        with bench.active(member, "residual") as active, torch.no_grad():
            active.model(train[0][0].unsqueeze(0) + 0.01)
            seen = [m.seen for m in active.model.modules() if isinstance(m, Drops)]
        for site, (_x, out) in zip((m for m in injected.modules() if isinstance(m, Drops)), seen, strict=True):
            site.mask = torch.where(out[0] == 0, 0.0, 1 / 0.7).double()
        own.append(injected)
    tests, trains = ([ref.side(m, part, named) for m in own] for part in (test, train))
    found = byline.TRAK(task, ensemble, damping=0.3, progress=False).fit(train).attribute(test)
    ref.assert_close(found.values, ref.trak(tests, trains, 0.3))


def test_dropout_of_adapters_with_different_layers():
    """One adapter brings a dropout layer of its own, the other none: each has its own sites."""
    peft = pytest.importorskip("peft")
    model, train, test = dropout_model("module", n=8)
    import tempfile

    rows = []
    for targets, rate in ((["parts.0"], 0.2), (["parts.0", "parts.3"], 0.2)):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, lora_dropout=rate, target_modules=targets, init_lora_weights=False)
        folder = tempfile.mkdtemp()
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
        rows.append(folder)
    base = byline.Independent([model])
    joint = byline.Dropout(byline.LoRA(base, [rows]), masks=1)
    scores = byline.GradDot(byline.Task(model), joint, progress=False).fit(train).attribute(test).values
    assert scores.shape == (4, 8)


def test_lora_on_gpt2_and_language_modeling(tmp_path):
    pytest.importorskip("peft")
    made = build("gpt2-labels")
    ensemble = byline.train_lora(
        made.task,
        byline.Independent([made.model]),
        made.train,
        adapters=1,
        rank=2,
        epochs=2,
        lr=0.01,
        progress=False,
    )
    ensemble.adapters[0][0].save(tmp_path)
    own = with_peft(made.model, tmp_path)
    tests, trains = (ref.side(own, part, ref.language_modeling) for part in (made.test, made.train))
    found = byline.GradDot(made.task, ensemble, progress=False).fit(made.train).attribute(made.test)
    ref.assert_close(found.values, ref.graddot(tests, trains))


def test_an_adapter_for_another_model_is_refused(lora, tmp_path):
    lora.ensemble.adapters[0][0].save(tmp_path)
    other = build("one-linear-twice")
    with pytest.raises(ValueError, match=r"parts|target|adapter"):
        byline.GradDot(other.task, byline.LoRA(byline.Independent([other.model]), [[tmp_path]]), progress=False).fit(
            other.train
        )


@pytest.mark.parametrize("arguments", [{"masks": 0}, {"masks": 2.5}, {"p": 1.0}, {"p": -0.1}, {"seed": -1}])
def test_arguments_of_dropout_are_checked(arguments):
    made = build("mlp")
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is .*expected"):
        byline.Dropout(byline.Independent([made.model]), **arguments)
