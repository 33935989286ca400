"""What each named output is, against torch's own losses and autograd; and what is refused as something else."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import byline
import reference as ref
from byline.methods.curvature import CG, EKFAC, Explicit

B, T, C = 4, 5, 3


class Given(nn.Module):
    """Returns what a function makes of its input."""

    def __init__(self, function=lambda x: x):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.function = function

    def forward(self, x, *rest, **named):
        return self.function(x * self.w)


def slopes(task, batch, z):
    """f, ℓ, Q, ∂f/∂z and ∂ℓ/∂z."""
    z.requires_grad_()
    f, loss, q = (g(task.model, batch) for g in (task.output, task.loss, task.residual))
    return f, loss, q, torch.autograd.grad(f.sum(), z)[0], torch.autograd.grad(loss.sum(), z)[0]


@pytest.mark.parametrize("shape", [(B,), (B, 1)])
@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float64])
def test_binary_is_bce_with_logits_and_the_margin_of_two_classes(shape, kind):
    task = byline.Task(Given().eval(), "binary")
    z, y = torch.randn(B, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    batch = (z.reshape(shape), y.to(kind).reshape(shape[::-1] if len(shape) == 1 else (B,)))
    f, loss, q, df, dl = slopes(task, (z, batch[1]), z)
    two = byline.Task(Given().eval())
    pair = (torch.stack([torch.zeros(B), z.detach()], 1).double(), y)
    torch.testing.assert_close(f.detach(), two.output(two.model, pair).detach())
    torch.testing.assert_close(
        loss.detach(), F.binary_cross_entropy_with_logits(z, y.double(), reduction="none").detach()
    )
    torch.testing.assert_close(q, two.residual(two.model, pair))
    torch.testing.assert_close(dl, -q * df)
    assert task.loss_follows_output
    torch.testing.assert_close(task.output(task.model, batch).detach(), f.detach())


@pytest.mark.parametrize("kind", [torch.long, torch.float64])
def test_multi_label_is_the_mean_bce_with_logits(kind):
    task = byline.Task(Given().eval(), "multi-label")
    z, y = torch.randn(B, C, dtype=torch.float64), torch.randint(2, (B, C))
    f, loss, q, _, _ = slopes(task, (z, y.to(kind)), z)
    torch.testing.assert_close(f, ((2 * y - 1) * z).mean(1))
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(z, y.double(), reduction="none").mean(1))
    p = torch.where(y == 1, z.sigmoid(), 1 - z.sigmoid())
    torch.testing.assert_close(q, (1 - p).mean(1).detach())


def test_multi_regression_is_the_mean_squared_error():
    task = byline.Task(Given().eval(), "multi-regression")
    z, y = torch.randn(B, C, dtype=torch.float64), torch.randn(B, C)
    f, loss, q, df, dl = slopes(task, (z, y), z)
    torch.testing.assert_close(loss, F.mse_loss(z, y.double(), reduction="none").mean(1) / 2)
    torch.testing.assert_close(f, -loss)
    torch.testing.assert_close(dl, -q[:, None] * df)
    assert task.loss_follows_output


@pytest.mark.parametrize("output", ["masked-language-modeling", "token-classification", "seq2seq"])
def test_aligned_outputs_are_means_over_labelled_tokens(output):
    task = byline.Task(Given().eval(), output)
    z, y = torch.randn(B, T, 7, dtype=torch.float64), torch.randint(7, (B, T))
    y[0, 1:] = y[2, ::2] = -100
    for batch in ((z, y), {"x": z, "labels": y}):
        rows = [F.cross_entropy(a, b, ignore_index=-100) for a, b in zip(z, y, strict=True)]
        torch.testing.assert_close(task.loss(task.model, batch), torch.stack(rows))
        for i in range(B):
            kept = y[i] != -100
            p = z[i][kept].softmax(-1).gather(1, y[i][kept, None])[:, 0]
            torch.testing.assert_close(task.output(task.model, batch)[i], (p / (1 - p)).log().mean())
            torch.testing.assert_close(task.residual(task.model, batch)[i], (1 - p).mean())
    with pytest.raises(ValueError, match="the labels are missing"):
        task.loss(task.model, {"x": z})
    with pytest.raises(byline.task.ExampleError, match="no target token"):
        task.loss(task.model, (z, y.masked_fill(torch.arange(B)[:, None] == 2, -100)))


# which tensor


Pair = namedtuple("Pair", "features logits")


@pytest.mark.parametrize(
    ("function", "output"),
    [
        (lambda x: (x,), "classification"),
        (lambda x: [x], "classification"),
        (lambda x: (x.sum(), x), "classification"),
        (lambda x: (None, x, torch.arange(len(x))), "classification"),
        (lambda x: (x, (x[:, :2], x)), "classification"),
        (lambda x: (torch.randn(len(x), 5, C), x), "classification"),
        (lambda x: (x[:, :1], x), "classification"),
        (lambda x: Pair(x[:, :2], x), "classification"),
        (lambda x: {"features": x[:, :2], "logits": x}, "classification"),
        (lambda x: SimpleNamespace(features=x[:, :2], logits=x), "classification"),
        (lambda x: (x[:, :2], x), "multi-label"),
    ],
)
def test_the_prediction_is_found_where_only_one_tensor_can_be_it(function, output):
    x = torch.randn(B, C)
    y = torch.tensor([0, 1, 2, 1]) if output == "classification" else torch.randint(2, (B, C))
    plain, among = byline.Task(Given().eval(), output), byline.Task(Given(function).eval(), output)
    assert torch.equal(plain.output(plain.model, (x, y)), among.output(among.model, (x, y)))


@pytest.mark.parametrize(
    ("function", "output", "message"),
    [
        (lambda x: (x[:, :2], x), "classification", r"shapes \(4, 2\), \(4, 3\), and more than one of them can be"),
        (lambda x: (x, x[:, :2]), "classification", "wrap the model in a module .* or pass output=lambda model, batch"),
        (lambda x: (x[:, 0], x[:, 1:2]), "regression", "more than one of them can be what regression expects"),
        (lambda x: (x[:, 0], x[:, 1:2]), "binary", "more than one of them can be what binary expects"),
        (lambda x: (x, x + 1), "multi-label", "more than one"),
        (lambda x: (x[:, :1], x.sum(1)), "classification", "none of them can be what classification expects"),
        (lambda x: (x.sum(), 3), "classification", "no floating tensor"),
        (lambda x: (), "classification", "no floating tensor"),
        (lambda x: {"hidden": x, "pooled": x}, "classification", r"gave a dict with hidden, pooled; expected a tensor"),
        (lambda x: "x", "classification", r"gave a str; expected a tensor or an object with .logits"),
    ],
)
def test_several_that_might_be_it_are_refused(function, output, message):
    y = torch.randint(2, (B, C)) if output == "multi-label" else torch.tensor([0, 1, 1, 0])
    task = byline.Task(Given(function).eval(), output)
    with pytest.raises(ValueError, match=message):
        task.output(task.model, (torch.randn(B, C), y))


def test_features_and_token_logits():
    ids = torch.randint(11, (B, T))
    logits, hidden = torch.randn(B, T, 11), torch.randn(B, T, 6)
    target = torch.randint(11, (B, T))
    for extra in (torch.randn(1, B, 6), torch.randn(2, B, 6), torch.randn(B, 4, T, T)):
        task = byline.Task(Given(lambda x, e=extra: (e, logits)).eval(), "language-modeling")
        want = F.cross_entropy(logits.mT, target, reduction="none").mean(1)
        torch.testing.assert_close(task.loss(task.model, (ids, target)), want)
    task = byline.Task(Given(lambda x: (hidden, logits)).eval(), "language-modeling")
    with pytest.raises(ValueError, match="more than one of them can be what language-modeling expects"):
        task.loss(task.model, (ids, target))


def test_features_beside_logits_are_refused_by_a_method():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = torch.tanh(self.body(x))
            return h, self.head(h)

    model = Both().eval()
    data = TensorDataset(torch.randn(9, 4), torch.randint(3, (9,)))
    with pytest.raises(ValueError, match=r"\(3, 6\), \(3, 3\), and more than one"):
        byline.GradDot(byline.Task(model), byline.Independent([model]), progress=False).fit(data)


# what is no logit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("output", "shape"),
    [("classification", (B, C)), ("masked-language-modeling", (B, T, 50)), ("language-modeling", (B, T, 50))],
)
def test_softmax_is_refused_and_log_softmax_is_not(output, shape, dtype):
    z = 3 * torch.randn(shape).to(dtype)
    y = torch.randint(shape[-1], shape[:-1])
    task = byline.Task(Given(lambda x: x.softmax(-1)).eval(), output)
    with pytest.raises(ValueError, match=f"the model gives probabilities .* and {output} expects logits: return what"):
        task.output(task.model, (z, y))
    plain, logs = (byline.Task(Given(g).eval(), output) for g in (lambda x: x, lambda x: x.log_softmax(-1)))
    if dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(
            plain.output(plain.model, (z, y)), logs.output(logs.model, (z, y)), rtol=1e-3, atol=1e-3
        )


def test_logits_that_look_a_little_like_probabilities_are_none():
    task = byline.Task(Given().eval())
    y = torch.tensor([0, 1])
    for rows in ([[0.5, 0.5], [0.4, 0.7]], [[0.5, 0.5], [1.5, -0.5]], [[0.0, 0.0], [0.0, 0.0]]):
        task.output(task.model, (torch.tensor(rows), y))
    task.output(task.model, (torch.tensor([[0.25, 0.75]]), y[:1]))  # one row is no evidence


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (nn.Sigmoid(), "a sigmoid"),
        (nn.Sequential(nn.Sigmoid(), nn.Flatten(0)), "a sigmoid"),
        (nn.Hardsigmoid(), "a hard sigmoid"),
    ],
)
def test_a_sigmoid_at_the_end_is_refused(last, words):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1), last).eval()
    data = TensorDataset(torch.randn(9, 4), torch.randint(2, (9,)).float())
    task = byline.Task(model, "binary")
    with pytest.raises(ValueError, match=f"the model ends in {words}, and binary expects logits"):
        byline.GradDot(task, byline.Independent([model]), progress=False).fit(data)
    many = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).eval()
    task = byline.Task(many, "multi-label")
    with pytest.raises(ValueError, match="the model ends in a sigmoid, and multi-label expects logits"):
        task.output(many, (torch.randn(9, 4), torch.randint(2, (9, 3))))


def test_logits_between_0_and_1_are_logits():
    model = nn.Sequential(nn.Linear(4, 1)).eval()
    model[0].weight.data.mul_(0.01)
    model[0].bias.data.fill_(0.5)
    task = byline.Task(model, "binary")
    x, y = torch.randn(9, 4), torch.randint(2, (9,))
    torch.testing.assert_close(task.output(model, (x, y)), (2 * y - 1) * model(x)[:, 0])


# targets of another kind


@pytest.mark.parametrize(
    ("output", "prediction", "target", "message"),
    [
        ("classification", (B, C), torch.eye(4)[:, :C], 'one-hot rows give their argmax.*output="multi-label"'),
        ("classification", (B, C), torch.eye(4)[:, :C].long(), r'labels have shape \(4, 3\).*"multi-label"'),
        ("classification", (B, 1), torch.zeros(B).long(), 'is it output="binary"'),
        ("classification", (B,), torch.zeros(B).long(), 'is it output="binary"'),
        ("classification", (B, T, C), torch.zeros(B, T).long(), 'is it output="token-classification"'),
        ("binary", (B, 2), torch.zeros(B).long(), 'two classes or more are output="classification"'),
        ("binary", (B,), torch.full((B,), 0.3), r"example 0 of the batch: target 0.3 is neither 0 nor 1"),
        ("binary", (B,), torch.tensor([1, -1, 1, 1]), r"example 1 of the batch: target -1 is neither"),
        ("multi-label", (B, C), torch.zeros(B).long(), r"labels are a torch.int64 tensor of shape \(4,\)"),
        ("multi-label", (B, C), torch.full((B, C), 2), "target 2 is neither 0 nor 1"),
        ("regression", (B, 2), torch.zeros(B, 2), 'output="multi-regression"'),
        ("multi-regression", (B,), torch.zeros(B), 'one number per example is output="regression"'),
        ("multi-regression", (B, 2), torch.zeros(B, 3), "expects both of one shape"),
        ("token-classification", (B, C), torch.zeros(B).long(), r"token-classification expects \(batch, tokens, class"),
    ],
)
def test_targets_of_another_output_are_refused_with_its_name(output, prediction, target, message):
    task = byline.Task(Given().eval(), output)
    with pytest.raises(ValueError, match=message):
        task.output(task.model, (torch.randn(prediction), target))


def test_an_output_is_given_as_an_instance():
    with pytest.raises(TypeError, match=r"output is the class Denoising; expected an instance, Denoising"):
        byline.Task(Given(), byline.Denoising)
    assert byline.Task(Given(), byline.Denoising(draws=2)).name == "denoising"


# curvature: the likelihood of an output against the Hessian of the loss, which they equal where the model is linear


@pytest.mark.parametrize("output", ["binary", "multi-label"])
def test_gauss_newton_of_a_linear_model_is_its_hessian(output):
    torch.manual_seed(1)
    width = 1 if output == "binary" else C
    model = nn.Linear(4, width).double().eval()
    data = TensorDataset(torch.randn(20, 4).double(), torch.randint(2, (20, width)).double())
    task = byline.Task(model, output)
    found = [
        byline.Influence(
            task, byline.Independent([model]), solver=solver, curvature=curvature, damping=0.1, progress=False
        )
        .fit(data)
        .attribute(data)
        .values
        for solver, curvature in (
            (Explicit(), "hessian"),
            (Explicit(), "ggn"),
            (CG(tolerance=1e-8), "ggn"),
        )
    ]
    ref.assert_close(found[1], found[0], 1e-4)
    ref.assert_close(found[2], found[0], 1e-4)


@pytest.mark.parametrize("output", ["binary", "multi-label", "token-classification"])
def test_drawn_labels_have_the_gauss_newton_matrix_as_second_moment(output):
    torch.manual_seed(1)
    width = {"binary": 1}.get(output, C)
    model = nn.Linear(3, width).double().eval()
    x = torch.randn(6, *([T] if output == "token-classification" else []), 3).double()
    y = torch.randint(C, (6, T)) if output == "token-classification" else torch.randint(2, (6, width)).double()
    if output == "token-classification":
        y[:, 0] = -100
    data = TensorDataset(x, y)
    task = byline.Task(model, output)
    scores = [
        byline.Influence(task, byline.Independent([model]), solver=solver, curvature="ggn", damping=1, progress=False)
        .fit(data)
        .attribute(data)
        .values
        for solver in (Explicit(), EKFAC(samples=400))
    ]
    # one layer: EK-FAC's eigenvalues are fitted in a Kronecker basis, close but not the same
    ref.assert_close(scores[1], scores[0], 0.2)


def test_what_has_no_likelihood_says_so():
    model = nn.Linear(4, 2).eval()
    task = byline.Task(model, "multi-regression")
    with pytest.raises(ValueError, match="output 'multi-regression' has none that is known"):
        byline.Influence(task, byline.Independent([model]), curvature="ggn")
    with pytest.raises(ValueError, match="the output 'multi-regression' is 1 throughout"):
        byline.TRAK(task, byline.Independent([model]), hessian="weighted")
    data = TensorDataset(torch.randn(12, 4), torch.randn(12, 2))
    found = byline.Influence(task, byline.Independent([model]), solver="explicit", damping=0.1, progress=False).fit(
        data
    )
    assert found.curvature == "hessian"
    # the Hessian of the loss is that of two separate regressions, each of half the weight
    x = torch.cat([data.tensors[0], torch.ones(12, 1)], 1).double()
    h = torch.block_diag(*[x.T @ x / 12 / 2] * 2)
    residual = (data.tensors[1] - model(data.tensors[0])).double().detach() / 2
    rows = (residual.unsqueeze(2) * x.unsqueeze(1)).flatten(1)
    expected = rows @ torch.linalg.solve(h + 0.1 * h.diagonal().mean() * torch.eye(10), rows.T)
    ref.assert_close(found.attribute(data).values, expected, 1e-3)


# denoising


class Denoiser(nn.Module):
    """Knows the time, a condition, and gives the input's shape back."""

    def __init__(self, d=6):
        super().__init__()
        self.inner, self.time, self.outer = nn.Linear(d, 8), nn.Embedding(20, 8), nn.Linear(8, d)

    def forward(self, x, timestep, condition=None):
        h = torch.tanh(self.inner(x.flatten(1)) + self.time(timestep))
        if condition is not None:
            h = h * condition[:, None]
        return self.outer(h).reshape(x.shape)


SCHEDULE = (1 - torch.linspace(0.01, 0.3, 20)).cumprod(0)


def spied(model, task, batch):
    """The noisy examples, timesteps, and f of one evaluation."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda m, args, named: seen.append(args or (named["x"], named["timestep"])), with_kwargs=True
    )
    value = task.output(model, batch).detach()
    handle.remove()
    return torch.stack([s[0] for s in seen], 1), torch.stack([s[1] for s in seen], 1), value


def test_denoising_draws_belong_to_the_example():
    torch.manual_seed(0)
    model, x = Denoiser().eval(), torch.randn(7, 6)
    task = byline.Task(model, byline.Denoising(SCHEDULE, draws=5, seed=3))
    noisy, times, f = spied(model, task, x)
    order = torch.tensor([4, 2, 4, 0])
    again, same, g = spied(model, task, (x[order],))
    assert torch.equal(times[order], same)
    torch.testing.assert_close(noisy[order], again, rtol=0, atol=1e-6)
    torch.testing.assert_close(f[order], g)
    assert (times.sort(1).values // 4 == torch.arange(5)).all(), "one timestep in each fifth of the schedule"
    other, moved, _ = spied(model, byline.Task(model, byline.Denoising(SCHEDULE, draws=5, seed=4)), x)
    assert not torch.equal(moved, times)
    assert not torch.allclose(other, noisy)


def test_denoising_noise_is_standard_normal_and_independent():
    model = Denoiser(400).eval()
    x = torch.randn(50, 400)
    task = byline.Task(model, byline.Denoising(SCHEDULE, draws=4))
    noisy, times, _ = spied(model, task, x)
    alpha = SCHEDULE[times].unsqueeze(-1)
    noise = (noisy - alpha.sqrt() * x.unsqueeze(1)) / (1 - alpha).sqrt()
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.var()) - 1) < 0.02
    assert abs(float((noise**4).mean()) - 3) < 0.1
    rows = noise.flatten(0, 1)
    between = (rows @ rows.T / 400 - torch.eye(200)).abs()
    assert float(between.max()) < 0.35, "two draws, or two examples, have noise in common"
    along = torch.corrcoef(rows.T) - torch.eye(400)
    assert float(along.abs().max()) < 0.4
    assert len(times.unique()) == 20


@pytest.mark.parametrize("predicts", ["noise", "sample", "velocity"])
@pytest.mark.parametrize("explains", ["loss", "square"])
def test_denoising_is_the_mean_squared_error_over_draws(predicts, explains):
    torch.manual_seed(0)
    model, x, c = Denoiser().eval(), torch.randn(7, 2, 3), torch.randn(7)
    task = byline.Task(model, byline.Denoising(SCHEDULE, draws=3, predicts=predicts, explains=explains))
    for batch in ((x, c), {"x": x, "condition": c}):
        noisy, times, f = spied(model, task, batch)
        losses, squares = [], []
        for j in range(3):
            a = SCHEDULE[times[:, j]].view(-1, 1, 1)
            noise = (noisy[:, j] - a.sqrt() * x) / (1 - a).sqrt()
            wanted = {"noise": noise, "sample": x, "velocity": a.sqrt() * noise - (1 - a).sqrt() * x}[predicts]
            said = model(noisy[:, j], times[:, j], c)
            losses.append(F.mse_loss(said, wanted, reduction="none").flatten(1).mean(1))
            squares.append(said.square().flatten(1).mean(1))
        loss = torch.stack(losses).mean(0)
        torch.testing.assert_close(task.loss(model, batch), loss, rtol=1e-4, atol=1e-5)
        want = -loss if explains == "loss" else torch.stack(squares).mean(0)
        torch.testing.assert_close(f, want.detach(), rtol=1e-4, atol=1e-5)
    assert task.loss_follows_output == (explains == "loss")
    assert (task.residual(model, (x, c)) == 1).all()


def test_denoising_of_a_model_as_diffusers_has_them():
    plain = Denoiser().eval()

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain

        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            assert class_labels is not None
            return SimpleNamespace(sample=self.inner(sample, timestep, class_labels.float()))

    x, c = torch.randn(4, 6), torch.randint(3, (4,))
    named, task = Named().eval(), byline.Denoising(SCHEDULE, draws=2)
    found = byline.Task(named, task).output(named, {"sample": x, "class_labels": c})
    assert torch.equal(found, byline.Task(plain, task).output(plain, (x, c.float())))


def test_denoising_is_told_apart_in_a_store_and_refuses_what_it_cannot_read():
    model = Denoiser().eval()
    tasks = [
        byline.Task(model, byline.Denoising(**options))
        for options in ({}, {"draws": 2}, {"seed": 1}, {"schedule": SCHEDULE}, {"explains": "square"})
    ]
    assert len({str(t.fingerprint()) for t in tasks}) == 5
    for arguments, message in (
        ({"draws": 0}, "draws is 0; expected an int of at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"schedule": [0.5, 1.5]}, "expected one ᾱ between 0 and 1 per timestep"),
        ({"schedule": [0.1, 0.9]}, "schedule rises"),
        ({"predicts": "noises"}, "predicts is 'noises'; expected one of 'noise', 'sample', 'velocity'"),
        ({"explains": "f"}, "explains is 'f'"),
    ):
        with pytest.raises(ValueError, match=message):
            byline.Denoising(**arguments)
    task = byline.Task(model, byline.Denoising(SCHEDULE))
    for batch, message in (
        (torch.randint(4, (3, 6)), r"the batch's first part is a torch.int64 tensor.* clean examples, floating"),
        ({"a": torch.randn(3, 6)}, "the batch's x or x0 or sample"),
    ):
        with pytest.raises(ValueError, match=message):
            task.output(model, batch)
    wide = byline.Task(Given(lambda x: torch.cat([x, x], 1)).eval(), byline.Denoising(SCHEDULE))
    with pytest.raises(ValueError, match=r"shape \(3, 12\) for noisy examples \(3, 6\)"):
        wide.output(wide.model, torch.randn(3, 6))
    with pytest.raises(ValueError, match="forward takes none of t, timestep"):
        wide.output(wide.model, {"x": torch.randn(3, 6)})
