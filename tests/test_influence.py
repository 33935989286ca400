"""Influence functions: closed forms, dense oracles from torch.autograd, every solver under every ensemble."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import byline
import reference as ref
from byline.engines.workbench import Workbench
from byline.ensembles.base import Ensemble
from byline.features.blocks import Block
from byline.methods.curvature import CG, EKFAC, KFAC, SOLVERS, Arnoldi, Explicit, Layout, LiSSA
from byline.methods.curvature.kfac import turn
from conftest import build

# tight enough to be held against dense inverses
PRECISE = {
    "explicit": Explicit(),
    "cg": CG(1e-6),
    "lissa": LiSSA(5000, 1e-5),
    "arnoldi": Arnoldi(100, 100),
}


def scores(task, train, test, *members, **arguments):
    ensemble = byline.Independent(list(members) or [task.model])
    found = byline.Influence(task, ensemble, progress=False, **{"damping": 0.1, **arguments}).fit(train)
    return found.attribute(test).values


def pairs(x, y):
    return list(zip(x, y, strict=True))


@pytest.fixture(scope="module")
def mlp():
    """43 parameters, trained until its Hessian is nearly positive."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.randint(3, (30,))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[:24]), y[:24]) + 1e-2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    made = SimpleNamespace(model=model.eval(), train=pairs(x[:24], y[:24]), test=pairs(x[24:], y[24:]), x=x[:24])
    made.y, made.task = y[:24], byline.Task(model)
    made.sides = [ref.side(model, part, ref.classification) for part in (made.test, made.train)]
    return made


def flat_call(model, x):
    """Float64 logits as a function of one vector of all parameters, and that vector."""
    model = copy.deepcopy(model).double()
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def call(theta):
        parts = zip(named.items(), theta.split(sizes), strict=True)
        return functional_call(model, {name: part.view_as(p) for (name, p), part in parts}, (x.double(),))

    return call, torch.cat([p.detach().flatten() for p in named.values()])


def dense(model, x, y, curvature):
    """H over the parameters in order, by definition."""
    call, theta = flat_call(model, x)
    if curvature == "hessian":
        return hessian(lambda t: F.cross_entropy(call(t), y), theta).numpy()
    jacobian = jacrev(call)(theta)
    p = call(theta).softmax(-1)
    if curvature == "fisher":
        rows = torch.einsum("nc,ncp->np", p - F.one_hot(y, p.shape[1]), jacobian)
        return (rows.T @ rows / len(x)).numpy()
    middle = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return (torch.einsum("ncp,ncd,ndq->pq", jacobian, middle, jacobian) / len(x)).numpy()


def influence(matrix, test, train, damping):
    ridge = damping * np.trace(matrix) / len(matrix)
    return -test.output @ np.linalg.solve(matrix + ridge * np.eye(len(matrix)), train.loss.T)


# a linear model


@pytest.fixture(scope="module")
def linear():
    """Least squares solved exactly."""
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(40, 4)), rng.normal(size=(6, 4))
    y = x @ rng.normal(size=4) + 0.5 + 0.3 * rng.normal(size=40)
    model = nn.Linear(4, 1)
    full = np.c_[x, np.ones(40)]
    theta = np.linalg.lstsq(full, y, rcond=None)[0]
    model.weight.data, model.bias.data = torch.tensor(theta[None, :4]).float(), torch.tensor(theta[4:]).float()
    train, test = (pairs(torch.tensor(a).float(), torch.tensor(b).float()) for a, b in ((x, y), (z, np.zeros(6))))
    task = byline.Task(model.eval(), output="regression")
    return SimpleNamespace(
        task=task, train=train, test=test, full=full, y=y, z=np.c_[z, np.ones(6)], residual=y - full @ theta
    )


@pytest.mark.parametrize("solver", [*PRECISE.values(), "kfac", "ekfac"])
def test_linear_regression_has_a_closed_form(linear, solver):
    """∇f = x, -∇ℓ = (y - xθ) x, H = XᵀX/n; with one output K-FAC's factors are exact."""
    matrix = linear.full.T @ linear.full / 40
    ridge = 0.1 * np.trace(matrix) / 5
    expected = linear.z @ np.linalg.solve(matrix + ridge * np.eye(5), linear.full.T) * linear.residual
    ref.assert_close(scores(linear.task, linear.train, linear.test, solver=solver), expected, 1e-5)


def test_leave_one_out_by_refitting(linear):
    """Leaving i out changes f(z) by -Influence(z, i) / n, over 1 - leverage; the definition and its sign at once."""
    found = scores(linear.task, linear.train, linear.test, solver="explicit", damping=1e-7)
    whole = linear.z @ np.linalg.lstsq(linear.full, linear.y, rcond=None)[0]
    refitted = []
    for i in range(40):
        keep = np.arange(40) != i
        refitted.append(linear.z @ np.linalg.lstsq(linear.full[keep], linear.y[keep], rcond=None)[0] - whole)
    change = np.stack(refitted, 1)
    assert np.corrcoef(-found.ravel() / 40, change.ravel())[0, 1] > 0.99
    assert (np.sign(-found) == np.sign(change)).all()
    leverage = np.einsum("ni,ij,nj->n", linear.full, np.linalg.inv(linear.full.T @ linear.full), linear.full)
    ref.assert_close(-found / 40, change * (1 - leverage), 1e-3)


# dense oracles

DAMPING = {"ggn": 0.1, "fisher": 0.1, "hessian": 3.0}


@pytest.mark.parametrize("curvature", ["ggn", "fisher", "hessian"])
@pytest.mark.parametrize("solver", list(PRECISE))
def test_solvers_against_the_dense_inverse(mlp, solver, curvature):
    matrix = dense(mlp.model, mlp.x, mlp.y, curvature)
    # the series needs as many steps as λ goes into the largest eigenvalue
    damping = 3.0 if solver == "lissa" else DAMPING[curvature]
    expected = influence(matrix, *mlp.sides, damping)
    found = scores(mlp.task, mlp.train, mlp.test, solver=PRECISE[solver], curvature=curvature, damping=damping)
    ref.assert_close(found, expected, 1e-4)


def test_the_damping_is_told_apart_and_auto_is_a_tenth(mlp):
    auto = scores(mlp.task, mlp.train, mlp.test, solver="explicit", damping="auto")
    ref.assert_close(auto, scores(mlp.task, mlp.train, mlp.test, solver="explicit", damping=0.1), 1e-6)
    other = influence(dense(mlp.model, mlp.x, mlp.y, "ggn"), *mlp.sides, 0.2)
    assert np.abs(auto - other).max() > 1e-2 * np.abs(other).max()


@pytest.mark.parametrize("name", ["conv2d-groups", "tied-head", "gru", "one-linear-twice", "bare-parameters"])
@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_any_layer_has_curvature(name, curvature):
    """Groups, tied weights, embeddings and fallbacks: explicit, cg and arnoldi go through different code."""
    made = build(name)
    values = {"classification": ref.classification, "language-modeling": ref.language_modeling}[made.case.output]
    test, train = (ref.side(made.model, part, values) for part in (made.test, made.train))
    if curvature == "fisher":
        matrix = train.loss.T @ train.loss / len(made.train)
    else:
        matrix = sum(token_ggn(made.model, item, made.case.output) for item in made.train) / len(made.train)
    expected = influence(matrix, test, train, 0.3)
    for solver in (Explicit(), CG(1e-6, 500)):
        found = scores(made.task, made.train, made.test, solver=solver, curvature=curvature, damping=0.3)
        ref.assert_close(found, expected, 1e-3)


def token_ggn(model, item, output):
    """Σ_t w_t J_tᵀ (diag p - p pᵀ) J_t of one example, one logit at a time."""
    model = copy.deepcopy(model).double()
    batch = ref.double(torch.utils.data.default_collate([item]))
    inputs, named, _ = ref._pieces(batch)
    logits = ref._logits(model, inputs, named)[0]
    logits = logits.unsqueeze(0) if output == "classification" else logits
    params = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for row in logits:
        grads = [torch.autograd.grad(v, params, retain_graph=True, allow_unused=True) for v in row]
        parts = [[torch.zeros_like(p) if g is None else g for g, p in zip(one, params, strict=True)] for one in grads]
        j = torch.stack([torch.cat([g.flatten() for g in one]) for one in parts])
        p = row.detach().softmax(-1)
        total = total + j.T @ (torch.diag(p) - torch.outer(p, p)) @ j / len(logits)
    return total.numpy()


def test_what_arnoldi_drops_is_what_is_outside_its_eigenvectors(mlp):
    matrix = dense(mlp.model, mlp.x, mlp.y, "ggn")
    values, vectors = np.linalg.eigh(matrix)
    values, vectors = values[-5:], vectors[:, -5:]
    ridge = 0.1 * np.trace(matrix) / len(matrix)
    test, train = mlp.sides
    expected = -(test.output @ vectors) / (values + ridge) @ (train.loss @ vectors).T
    found = scores(mlp.task, mlp.train, mlp.test, solver=Arnoldi(5, 40))
    ref.assert_close(found, expected, 1e-3)


def test_lissa_reaches_its_tolerance_with_the_default_damping(mlp):
    found = scores(mlp.task, mlp.train, mlp.test, solver="lissa", damping=0.1)
    ref.assert_close(found, influence(dense(mlp.model, mlp.x, mlp.y, "ggn"), *mlp.sides, 0.1), 1e-2)


def test_lissa_on_samples_comes_near_its_limit(mlp):
    expected = influence(dense(mlp.model, mlp.x, mlp.y, "ggn"), *mlp.sides, 5.0)
    scale = 3 * np.abs(np.linalg.eigvalsh(dense(mlp.model, mlp.x, mlp.y, "ggn"))).max()
    found = scores(mlp.task, mlp.train, mlp.test, solver=LiSSA(400, sample=8, scale=scale), damping=5.0)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.97
    # it saw samples: it cannot be exact
    assert np.abs(found - expected).max() > 1e-3 * np.abs(expected).max()


def test_datainf_against_its_formula(mlp):
    """(1/n) Σ (r rᵀ + λ)⁻¹ per layer, every inverse formed."""
    test, train = mlp.sides
    ridge = 0.1 * np.square(train.loss).sum() / len(train.loss) / 43
    expected = np.zeros((6, 24))
    for place in (slice(0, 25), slice(25, 43)):
        rows = train.loss[:, place]
        mean = np.mean([np.linalg.inv(np.outer(r, r) + ridge * np.eye(len(r))) for r in rows], 0)
        expected += -test.output[:, place] @ mean @ rows.T
    found = scores(mlp.task, mlp.train, mlp.test, solver="datainf", curvature="fisher")
    ref.assert_close(found, expected, 1e-4)


# Kronecker factors


def softmax_layer(n, seed=0):
    """A single layer of zero weights on Gaussian inputs: the label's distribution does not depend on the input."""
    torch.manual_seed(seed)
    x, y = torch.randn(n, 4) @ torch.randn(4, 4), torch.randint(3, (n,))
    model = nn.Linear(4, 3)
    model.weight.data.zero_()
    model.bias.data = torch.tensor([0.5, 0.0, -0.7])
    return byline.Task(model.eval()), pairs(x, y), x, y


@pytest.mark.parametrize("solver", [KFAC(samples=None), EKFAC(samples=None)])
def test_kfac_is_exact_where_the_factors_are_independent(solver):
    task, data, x, y = softmax_layer(40)
    side = ref.side(task.model, data, ref.classification)
    expected = influence(dense(task.model, x, y, "ggn"), side, side, 0.1)
    ref.assert_close(scores(task, data, data, solver=solver), expected, 1e-4)


@pytest.mark.parametrize("solver", [KFAC, EKFAC])
def test_drawn_labels_become_exact_as_examples_grow(solver):
    errors = []
    for n in (30, 3000):
        task, data, _, _ = softmax_layer(n)
        expected = scores(task, data, data[:10], solver=solver(samples=None))
        drawn = [scores(task, data, data[:10], solver=solver(), seed=seed) for seed in range(4)]
        errors.append(np.mean([np.abs(one - expected).max() for one in drawn]) / np.abs(expected).max())
    assert 0 < errors[1] < 0.1
    # a tenth is expected of a hundred times as many
    assert errors[1] < errors[0] / 3


def trace_of(task, data, solver, **arguments):
    attributor = byline.Influence(task, byline.Independent([task.model]), solver=solver, progress=False, **arguments)
    attributor.fit(data)
    state = attributor.store.state(attributor._curvature_key(attributor._voters[0]))
    return sum(float(v.double().sum()) for k, v in state.items() if k.endswith("/values"))


def test_one_drawn_label_says_much_of_a_model_that_has_memorised():
    """Drawn from p itself, the trace is off by 18 % on average here; as byline draws them, by 4 %."""
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    model = nn.Linear(4, 3).eval()
    model.weight.data.mul_(20)
    data, task = pairs(x, model(x).argmax(1)), byline.Task(model)
    assert float(model(x).detach().softmax(1).amax(1).median()) > 0.99
    exact = np.trace(dense(model, x, torch.stack([y for _, y in data]), "ggn"))
    errors = [abs(trace_of(task, data, "ekfac", seed=seed) / exact - 1) for seed in range(6)]
    assert 0 < np.mean(errors) < 0.08
    assert trace_of(task, data, EKFAC(samples=None)) == pytest.approx(exact, rel=1e-4)


def test_drawn_tokens_have_the_curvature_of_their_mean():
    """The mean over T tokens: the cross terms cancel, and 1/T of the GGN is left to make up for."""
    made = build("tied-head")
    exact = sum(np.trace(token_ggn(made.model, item, "language-modeling")) for item in made.train) / len(made.train)
    assert trace_of(made.task, made.train, EKFAC(samples=100)) == pytest.approx(exact, rel=0.1)


def blockwise(mlp, solver):
    """Each block's (n, n) approximation, and the gradients' own second moment, in the layout of the solver."""
    attributor = byline.Influence(
        mlp.task, byline.Independent([mlp.model]), solver=solver, curvature="fisher", damping=0.1, progress=False
    ).fit(mlp.train)
    voter = attributor._voters[0]
    state = attributor.store.state(attributor._curvature_key(voter))
    with attributor._bench.active(voter.member, "gradient") as active:
        problem = attributor._problem(voter, active)
        rows = problem.layout.of_blocks(active.capture("loss")(next(problem.batches()), "loss")[2])
        for part in problem.layout.parts:
            own = rows[:, part.start : part.stop]
            moment = own.T @ own / len(own)
            identity = torch.eye(own.shape[1]).view(-1, *part.shape)
            basis = turn(identity, state, part.name).flatten(1)
            yield moment, basis, state[f"{part.name}/values"].flatten()


def test_ekfac_is_the_best_diagonal_in_kfacs_basis(mlp):
    kfac, ekfac = list(blockwise(mlp, "kfac")), list(blockwise(mlp, "ekfac"))
    assert len(kfac) == 2
    for (moment, basis, values), (_, same, corrected) in zip(kfac, ekfac, strict=True):
        torch.testing.assert_close(basis, same)
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)
        torch.testing.assert_close(corrected, (basis.T @ moment @ basis).diagonal(), atol=1e-6, rtol=1e-4)
        errors = [float((basis @ torch.diag(v) @ basis.T - moment).norm()) for v in (values, corrected)]
        assert errors[1] < 0.999 * errors[0]
        assert float(corrected.sum()) == pytest.approx(float(moment.trace()), rel=1e-4)


@pytest.mark.parametrize(
    "name", ["conv2d-groups", "tied-head-bias", "one-linear-twice", "bare-parameters", "layer-norm-2d"]
)
def test_ekfac_keeps_the_trace_of_every_block(name):
    """Embeddings, groups, positions, norms and fallbacks."""
    made = build(name)
    found = list(blockwise(SimpleNamespace(task=made.task, model=made.model, train=made.train), "ekfac"))
    assert sum(len(basis) for _, basis, _ in found) == sum(p.numel() for p in made.model.parameters())
    for moment, basis, values in found:
        torch.testing.assert_close(values, (basis.T @ moment @ basis).diagonal(), atol=1e-6, rtol=1e-3)


def test_small_blocks_without_factors_are_dense():
    """A norm alone is attributed: its block is H itself, and the score exact."""
    made = build("layer-norm-2d")
    task = byline.Task(made.model, params="parts.0.weight")
    sides = [ref.side(made.model, part, ref.classification, task.selects) for part in (made.test, made.train)]
    matrix = sides[1].loss.T @ sides[1].loss / len(made.train)
    for solver in ("kfac", "ekfac"):
        found = scores(task, made.train, made.test, solver=solver, curvature="fisher")
        ref.assert_close(found, influence(matrix, *sides, 0.1), 1e-3)


def test_drawn_labels_do_not_depend_on_the_batch_size_but_on_the_seed(mlp):
    one = scores(mlp.task, mlp.train, mlp.test, solver="ekfac", batch_size=24)
    ref.assert_close(scores(mlp.task, mlp.train, mlp.test, solver="ekfac", batch_size=5), one, 1e-4)
    other = scores(mlp.task, mlp.train, mlp.test, solver="ekfac", seed=1)
    assert np.abs(other - one).max() > 1e-3 * np.abs(one).max()


@pytest.mark.parametrize("name", ["conv2d-groups", "gpt2-labels", "tied-linears", "gru", "conv1d-of-transformers"])
def test_layouts_go_to_parameters_and_back(name):
    made = build(name)
    bench = Workbench(made.task, made.train)
    with bench.active(byline.Independent([made.model]).members()[0], "gradient") as active:
        capture = active.capture("loss")
        blocks: dict[str, Block] = capture(bench.probe, "loss")[2]
        layout = Layout(blocks, {n: p.shape for n, p in capture.params.items()})
        vectors = layout.of_blocks(blocks)
        params = layout.to_params(vectors)
        assert set(params) == {n for n, p in made.model.named_parameters() if p.requires_grad}
        for block in blocks.values():
            for param, part in zip(block.params, block.split(), strict=True):
                torch.testing.assert_close(params[param].flatten(1), part)
        assert (layout.from_params(params) == vectors).all()


# ensembles


class Only(Ensemble):
    """One member of another ensemble."""

    def __init__(self, member):
        self.member = member

    def members(self):
        return [self.member]


@pytest.fixture(scope="module")
def voters():
    """A model with dropout and every kind of ensemble of two members."""
    pytest.importorskip("peft")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3)).eval()
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    made = build("mlp", train=12)
    made.task, one = byline.Task(model), byline.Independent([model])
    lora = byline.train_lora(
        made.task, one, made.train, adapters=2, rank=2, epochs=2, lr=0.05, batch_size=8, progress=False
    )
    made.ensembles = {
        "independent": byline.Independent([model, other]),
        "dropout": byline.Dropout(one, masks=2),
        "lora": lora,
        "noise": byline.WeightNoise(one, draws=2),
        "trajectory": byline.Trajectory([[model, other]]),
    }
    return made


@pytest.mark.parametrize("kind", ["independent", "dropout", "lora", "noise", "trajectory"])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_every_solver_under_every_ensemble_is_the_mean_of_its_members(voters, solver, kind):
    def run(ensemble):
        chosen = LiSSA(200, sample=None) if solver == "lissa" else solver
        attributor = byline.Influence(voters.task, ensemble, solver=chosen, damping=3.0, progress=False)
        return attributor.fit(voters.train).attribute(voters.test)

    found = run(voters.ensembles[kind])
    assert found.values.shape == (len(voters.test), 12)
    assert np.isfinite(found.values).all()
    each = [run(Only(member)).values for member in voters.ensembles[kind].members()]
    assert np.abs(each[0] - each[1]).max() > 1e-3 * np.abs(each[0]).max()
    ref.assert_close(found.values, np.mean(each, 0), 1e-3)
    ref.assert_close(found.stderr, np.abs(each[0] - each[1]) / 2, 1e-3)


class Masked(nn.Module):
    """A fixed multiplication where a dropout layer was."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return x * self.mask


def fixed_models(voters):
    """The members of the dropout ensemble as models of their own, their masks written into them."""
    out = []
    for member in voters.ensembles["dropout"].members():
        bench = Workbench(voters.task, voters.train)
        with bench.active(member, "gradient") as active, torch.no_grad():
            mask = active.model[2](torch.ones(1, 5))[0].clone()
        assert 0 < int((mask == 0).sum()) < 5
        fixed = copy.deepcopy(voters.task.model)
        fixed[2] = Masked(mask).eval()
        out.append(fixed)
    return out


@pytest.mark.parametrize("solver", ["explicit", "cg", "arnoldi"])
def test_masks_are_tied_between_curvature_training_and_test_gradients(voters, solver):
    x, y = (torch.stack(part) for part in zip(*voters.train, strict=True))
    expected = []
    for fixed in fixed_models(voters):
        sides = [ref.side(fixed, part, ref.classification) for part in (voters.test, voters.train)]
        expected.append(influence(dense(fixed, x, y, "ggn"), *sides, 0.1))
    found = byline.Influence(
        voters.task, voters.ensembles["dropout"], solver=PRECISE[solver], damping=0.1, progress=False
    ).fit(voters.train)
    ref.assert_close(found.attribute(voters.test).values, np.mean(expected, 0), 1e-3)


@pytest.mark.parametrize("solver", ["kfac", "ekfac", "datainf"])
def test_masks_are_tied_layer_by_layer_and_in_drawn_labels(voters, solver):
    votes = [scores(byline.Task(m), voters.train, voters.test, solver=solver) for m in fixed_models(voters)]
    found = byline.Influence(
        voters.task, voters.ensembles["dropout"], solver=solver, damping=0.1, progress=False
    ).fit(voters.train)  # fmt: skip
    ref.assert_close(found.attribute(voters.test).values, np.mean(votes, 0), 1e-3)


def test_forward_only_is_refused(voters):
    ensemble = byline.Dropout(byline.Independent([voters.task.model]), masks=2, forward_only=True)
    with pytest.raises(ValueError, match="forward_only=True masks TRAK's Q alone, and Influence has no Q"):
        byline.Influence(voters.task, ensemble)


# variants


@pytest.mark.parametrize("normalization", ["relatif", "theta-relatif"])
def test_relatif(mlp, normalization):
    matrix = dense(mlp.model, mlp.x, mlp.y, "ggn")
    test, train = mlp.sides
    solved = np.linalg.solve(matrix + 0.1 * np.trace(matrix) / 43 * np.eye(43), train.loss.T)
    length = {"relatif": np.sqrt((train.loss.T * solved).sum(0)), "theta-relatif": np.linalg.norm(solved, axis=0)}
    for solver in ("explicit", CG(1e-6)):
        found = scores(mlp.task, mlp.train, mlp.test, solver=solver, normalization=normalization)
        ref.assert_close(found, -test.output @ solved / length[normalization], 1e-3)


def smooth(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1, reduction="none")


@pytest.mark.parametrize("normalization", [None, "relatif", "theta-relatif"])
@pytest.mark.parametrize("loss", [None, smooth])
@pytest.mark.parametrize("solver", ["ekfac", "kfac", "datainf", "explicit"])
def test_self_influence_is_the_diagonal(voters, solver, loss, normalization):
    """With a loss of its own the store holds ∇ℓ, and ∇f is taken again."""
    attributor = byline.Influence(
        byline.Task(voters.task.model, loss=loss), voters.ensembles["dropout"], solver=solver, damping=3.0,
        curvature="fisher", normalization=normalization, progress=False, batch_size=5,
    ).fit(voters.train)  # fmt: skip
    diagonal = attributor.attribute(voters.train).values.diagonal()
    ref.assert_close(attributor.self_influence(), diagonal, 1e-3)


def test_a_callable_output_takes_the_fisher(mlp):
    def logit(model, batch):
        return model(batch[0]).gather(1, batch[1].unsqueeze(1)).squeeze(1)

    task = byline.Task(mlp.model, output=logit)
    sides = [ref.side(mlp.model, part, ref.called(logit)) for part in (mlp.test, mlp.train)]
    expected = influence(sides[1].loss.T @ sides[1].loss / 24, *sides, 0.1)
    ref.assert_close(scores(task, mlp.train, mlp.test, solver="explicit", curvature="fisher"), expected, 1e-4)


def test_projected_features_at_full_width_are_the_explicit_fisher(mlp):
    """LoGra: at full width the projection is the identity; narrower, a mean eigenvalue of its own."""
    arguments = {"solver": "explicit", "curvature": "fisher"}
    exact = scores(mlp.task, mlp.train, mlp.test, **arguments)
    wide = scores(mlp.task, mlp.train, mlp.test, features=byline.Factorized(10**4), **arguments)
    ref.assert_close(wide, exact, 1e-3)
    narrow = scores(mlp.task, mlp.train, mlp.test, features=byline.Factorized(12), **arguments)
    one, usual = (
        scores(mlp.task, mlp.train, mlp.test, features=byline.Factorized(12), **{**arguments, "damping": damping})
        for damping in (1.0, "auto")
    )
    assert np.array_equal(one, usual)
    assert narrow.shape == exact.shape
    assert np.isfinite(narrow).all()


def test_the_store_keeps_the_curvature(mlp, tmp_path, monkeypatch):
    def run(**arguments):
        ensemble = byline.Independent([mlp.model])
        attributor = byline.Influence(mlp.task, ensemble, store=tmp_path, progress=False, **arguments).fit(mlp.train)
        return attributor.attribute(mlp.test).values

    first, other = run(damping=0.1), run(damping=1.0, solver="kfac")
    monkeypatch.setattr(EKFAC, "fit", lambda *_: pytest.fail("the curvature was fitted again"))
    assert (run(damping=0.1) == first).all()
    # λ is no part of what is kept, and one solver's factors are not another's
    assert np.abs(run(damping=1.0) - first).max() > 0
    assert np.abs(run(damping=1.0) - other).max() > 0
    few, many = (run(solver=Arnoldi(top, 40)) for top in (2, 20))
    assert np.abs(few - many).max() > 1e-2 * np.abs(many).max()


def test_info_says_how_and_a_ledger_counts(mlp):
    ledger = byline.Ledger()
    ensemble = byline.Independent([mlp.model])
    attributor = byline.Influence(mlp.task, ensemble, solver=CG(0.01), ledger=ledger, progress=False).fit(mlp.train)
    info = attributor.attribute(mlp.test).info
    assert info["solver"] == "CG(tolerance=0.01, iterations=200)"
    assert info["curvature"] == "ggn"
    assert info["damping_used"] == 0.1
    # what fitting takes beyond the features, and every step of the solver
    plain, cheap = byline.Ledger(), byline.Ledger()
    byline.GradDot(mlp.task, ensemble, ledger=plain, progress=False).fit(mlp.train)
    assert ledger["fitting"].flops > plain["fitting"].flops
    byline.Influence(mlp.task, ensemble, solver=CG(0.5), ledger=cheap, progress=False).fit(mlp.train).attribute(
        mlp.test
    )
    assert ledger["serving"].flops > cheap["serving"].flops > 0


# bad input


def test_diverging_lissa_is_refused(mlp):
    largest = np.linalg.eigvalsh(dense(mlp.model, mlp.x, mlp.y, "ggn")).max()
    with pytest.raises(ValueError, match=r'solver="lissa" diverges on model 0 .* raise damping or LiSSA\(scale=...\)'):
        scores(mlp.task, mlp.train, mlp.test, solver=LiSSA(scale=0.3 * largest))


@pytest.mark.parametrize("solver", [CG(1e-6, iterations=2), LiSSA(iterations=3)])
def test_stopping_early_warns_of_the_residual(mlp, solver):
    with pytest.warns(UserWarning, match=r"stopped after \d steps at a relative residual of"):
        scores(mlp.task, mlp.train, mlp.test, solver=solver)


def test_cg_that_loses_its_way_is_refused():
    """Products that are not symmetric, as rounding makes those of a singular matrix, let the residual grow."""
    turn = torch.tensor([[0.0, 5.0], [-5.0, 0.0]])
    problem = SimpleNamespace(
        name="model 0", curvature="ggn", products=lambda v: v + v @ turn, ridge=lambda trace, damping: 0.0
    )
    inverse = CG(iterations=20).inverse(problem, {"trace": torch.tensor(1.0)}, 0.0)
    with pytest.raises(ValueError, match=r'"cg" does not converge on model 0: its relative residual .* raise damping'):
        inverse(torch.ones(1, 2))


def test_converging_does_not_warn(mlp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores(mlp.task, mlp.train, mlp.test, solver="cg")


@pytest.mark.parametrize("solver", ["explicit", "cg", Arnoldi(43, 43), LiSSA(20000)])
def test_an_indefinite_hessian_is_refused(solver):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    data = pairs(3 * torch.randn(20, 4), torch.randint(3, (20,)))
    x, y = (torch.stack(part) for part in zip(*data, strict=True))
    values = np.linalg.eigvalsh(dense(model, x, y, "hessian"))
    assert values.sum() > 0 > values[0] + 1e-3 * values.mean()
    with pytest.raises(ValueError, match=r'(not positive definite|diverges).*(curvature="ggn"|solver="cg")'):
        scores(byline.Task(model), data, data, solver=solver, curvature="hessian", damping=1e-3)


@pytest.mark.parametrize("solver", ["kfac", "ekfac", "datainf", "explicit"])
def test_no_damping_of_a_singular_curvature_is_refused(solver):
    made = build("mlp", train=3)
    with pytest.raises(ValueError, match=r"damping (is too small|above 0)|raise damping"):
        scores(made.task, made.train, made.test, solver=solver, damping=0.0, curvature="fisher")


def test_explicit_refuses_large_models_before_any_work(monkeypatch):
    model = nn.Linear(100, 60).eval()
    data = pairs(torch.randn(4, 100), torch.randint(60, (4,)))
    monkeypatch.setattr(byline.methods.base, "write_features", lambda *_: pytest.fail("features were computed"))
    with pytest.raises(ValueError, match=r"6,060 parameters, more than its limit of 5,000; use solver=\"ekfac\""):
        scores(byline.Task(model), data, data, solver="explicit")


@pytest.mark.parametrize("task", [{"output": lambda m, b: m(b[0])[:, 0]}, {"loss": smooth}])
def test_ggn_without_a_likelihood_is_refused(mlp, task):
    with pytest.raises(ValueError, match=r"curvature is 'ggn', which needs the likelihood .* use curvature='fisher'"):
        byline.Influence(byline.Task(mlp.model, **task), byline.Independent([mlp.model]), curvature="ggn")


def test_curvature_is_chosen_by_what_is_known_of_the_loss(mlp):
    def chosen(task, **arguments):
        return byline.Influence(task, byline.Independent([mlp.model]), **arguments).info()["curvature"]

    known, smoothed = byline.Task(mlp.model), byline.Task(mlp.model, loss=smooth)
    assert {chosen(known, solver=name) for name in SOLVERS} == {"ggn"}
    assert [chosen(smoothed, solver=s) for s in ("explicit", "cg", "lissa", "arnoldi")] == ["hessian"] * 4
    assert [chosen(smoothed, solver=s) for s in ("ekfac", "kfac", "datainf")] == ["fisher"] * 3
    assert chosen(known, solver="explicit", features=byline.Factorized(8)) == "fisher"


@pytest.mark.parametrize("solver", ["explicit", "cg", "lissa"])
def test_a_callable_form_of_a_named_loss_gives_the_same_on_a_convex_model(linear, solver):
    def loss(model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square() / 2

    def output(model, batch):
        return model(batch[0])[:, 0]

    called = byline.Task(linear.task.model, output=output, loss=loss)
    named = scores(linear.task, linear.train, linear.test, solver="explicit")
    ref.assert_close(scores(called, linear.train, linear.test, solver=solver), named, 5e-3)


def test_an_indefinite_hessian_of_a_callable_loss_points_to_the_fisher(mlp):
    task = byline.Task(mlp.model, output=lambda m, b: m(b[0])[:, 0])
    with pytest.raises(
        ValueError, match=r'not positive definite.* or take curvature="fisher", which is never negative'
    ):
        scores(task, mlp.train, mlp.test, solver="explicit", damping=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "newton"}, "solver is 'newton'; expected one of"),
        ({"curvature": "gauss"}, "curvature is 'gauss'; expected one of"),
        ({"normalization": "l2"}, "normalization is 'l2'; expected None"),
        ({"solver": "ekfac", "curvature": "hessian"}, "curvature is 'hessian', which solver='ekfac' has no form of"),
        ({"solver": "datainf", "curvature": "hessian"}, "has no form of"),
        ({"features": byline.Factorized(8)}, "Influence takes byline.Exact()"),
        (
            {"features": byline.Factorized(8), "solver": "explicit", "curvature": "ggn"},
            "Influence takes byline.Exact()",
        ),
        ({"damping": -1}, "damping is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_arguments_are_checked(mlp, arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        byline.Influence(mlp.task, byline.Independent([mlp.model]), **arguments)
