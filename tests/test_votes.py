"""Votes: their mean is what `attribute` gives, and their intervals are those of a mean of independent members."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
from byline.evaluate.settled import settled
from byline.votes import Votes


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).eval()


def examples(seed: int, count: int) -> TensorDataset:
    torch.manual_seed(seed)
    return TensorDataset(torch.randn(count, 6), torch.arange(count) % 3)


MODELS = [net(seed) for seed in range(3)]
ENSEMBLES = {
    "independent": byline.Independent(MODELS),
    "dropout": byline.Dropout(byline.Independent(MODELS[:2]), masks=2),
    "one model's masks": byline.Dropout(byline.Independent(MODELS[:1]), masks=4),
    "weighted run": byline.Trajectory([MODELS[:2], MODELS[1:]], weights=[[0.1, 0.3], [0.2, 0.1]]),
}


@pytest.mark.parametrize("method", [byline.TRAK, byline.GradDot, byline.TracIn, byline.Influence, byline.TrackStar])
@pytest.mark.parametrize("ensemble", ENSEMBLES.values(), ids=ENSEMBLES)
def test_their_mean_is_what_attribute_gives(method, ensemble):
    task = byline.Task(MODELS[0])
    attributor = method(task, ensemble, batch_size=7, progress=False).fit(examples(0, 40))
    scores, votes = attributor.attribute(examples(1, 9)), attributor.votes(examples(1, 9))
    scale = np.abs(scores.values).max()
    assert votes.shape == (9, 40)
    np.testing.assert_allclose(votes.mean() / scale, scores.values / scale, atol=2e-6)
    np.testing.assert_allclose(votes.mean(tests=np.array([2, 5])), votes.mean()[[2, 5]])


def test_forward_only_masks_are_one_vote():
    ensemble = byline.Dropout(byline.Independent(MODELS), masks=4, forward_only=True)
    attributor = byline.TRAK(byline.Task(MODELS[0]), ensemble, progress=False).fit(examples(0, 40))
    votes = attributor.votes(examples(1, 9))
    assert len(votes) == 3
    np.testing.assert_allclose(votes.mean(), attributor.attribute(examples(1, 9)).values, rtol=1e-4, atol=1e-6)


def test_masks_of_a_model_are_drawn_together():
    attributor = byline.GradDot(byline.Task(MODELS[0]), ENSEMBLES["dropout"], progress=False).fit(examples(0, 40))
    votes = attributor.votes(examples(1, 3))
    assert votes.units.tolist() == [0, 0, 1, 1]
    assert all((row[0], row[2]) == (row[1], row[3]) for row in votes.draws(20, 0))
    alone = byline.GradDot(byline.Task(MODELS[0]), ENSEMBLES["one model's masks"], progress=False).fit(examples(0, 40))
    assert alone.votes(examples(1, 3)).units.tolist() == [0, 1, 2, 3]


def made(values, models=None) -> Votes:
    values = np.asarray(values, np.float32)
    return Votes(values, np.ones(len(values)), None, np.arange(len(values)) if models is None else np.array(models))


def test_the_standard_error_is_that_of_the_mean():
    votes = made(np.random.default_rng(0).normal(size=(8, 3, 200)))
    want = votes.values.std(0, ddof=1) / 8**0.5
    got = np.stack([votes.mean(counts) for counts in votes.draws(4000, 0)]).std(0)
    np.testing.assert_allclose(got, want, rtol=0.08)
    np.testing.assert_allclose(votes.scores().stderr, want, rtol=0.35)


def test_an_interval_of_a_sum_covers_its_truth():
    """Members with a common part per column: the interval of a row's sum must know that errors hang together."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        common = rng.normal(size=(12, 1, 1))
        votes = made(1.0 + common + 0.1 * rng.normal(size=(12, 1, 30)))
        found = votes.bootstrap(lambda scores: scores.mean(1), seed=1)
        held += bool(found.low[0] <= 1 <= found.high[0])
    assert 165 <= held <= 198


def test_one_vote_has_no_interval():
    found = made(np.ones((1, 2, 3))).bootstrap(lambda scores: scores.sum(1))
    assert found.value.tolist() == [3, 3]
    assert np.isnan(found.low).all()
    assert not found.distinct.any()


def test_how_many_are_needed_is_what_it_takes():
    """Votes = signal + noise: the reliability foretold for m members is what ensembles of m agree by."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(1, 30, 400))
    votes = made(signal + 2 * rng.normal(size=(6, 30, 400)))
    found = settled(votes, 0.8)
    assert found.agreement == pytest.approx(0.2, abs=0.03)
    assert not found.enough
    assert 14 <= found.needed <= 19

    def ensemble(seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(size=(found.needed, 30, 400))
        return (signal + 2 * noise).mean(0)

    from byline.evaluate.lds import spearman

    assert spearman(ensemble(1), ensemble(2)).mean() == pytest.approx(0.8, abs=0.04)


def test_votes_without_agreement_never_settle():
    found = settled(made(np.stack([np.arange(12.0).reshape(1, 12), -np.arange(12.0).reshape(1, 12)])))
    assert found.needed is None
    assert found.reliability == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda v: settled(made(v.values[:1])), "votes holds 1; agreement needs at least 2"),
        (lambda v: settled(v, 1.0), "target is 1.0"),
        (lambda v: v.mean([1, 2]), r"counts has shape \(2,\); expected \(3,\)"),
        (lambda v: v.bootstrap(np.sum, draws=0), "draws is 0"),
        (lambda v: v.bootstrap(np.sum, confidence=1), "confidence=1"),
    ],
)
def test_arguments_out_of_range_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(made(np.zeros((3, 2, 4))))


def test_self_influence_with_its_error_is_that_of_the_diagonal():
    train = examples(0, 40)
    attributor = byline.GradDot(byline.Task(MODELS[0]), ENSEMBLES["independent"], progress=False).fit(train)
    values, errors = attributor.self_influence(stderr=True)
    scores = attributor.attribute(train)
    np.testing.assert_allclose(values, np.diag(scores.values), rtol=1e-4)
    np.testing.assert_allclose(errors, np.diag(scores.stderr), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "exact"),
    [(byline.TRAK, True), (byline.GradDot, True), (byline.Influence, True), (byline.GradCos, False)],
)
def test_a_kernel_leaves_the_residual_out(method, exact):
    train = examples(0, 40)
    task = byline.Task(MODELS[0])
    attributor = method(task, byline.Independent(MODELS[:1]), progress=False).fit(train)
    votes, q = attributor.votes(examples(1, 9)), task.residual(MODELS[0], train.tensors).numpy()
    want = votes.mean() / q if exact else votes.mean()
    np.testing.assert_allclose(votes.kernel(), want, rtol=1e-3, atol=1e-5 * np.abs(want).max())
