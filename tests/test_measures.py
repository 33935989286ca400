"""Measures against known answers: closed forms, hand-made cases, and what chance gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm, pearsonr, spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from torch.utils.data import TensorDataset

import byline
from byline.evaluate.loo import _resample_pearson
from byline.evaluate.measure import Measure, mean_interval, percentile
from byline.evaluate.mislabel import _resample


class Ridge:
    """Least squares with a little ridge: retraining is a closed form, and so is what one example does."""

    def __init__(self, n: int = 30, tests: int = 6, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.x, self.z = rng.normal(size=(n, 3)), rng.normal(size=(tests, 3))
        self.y = self.x @ [1.0, -2.0, 0.5] + rng.normal(size=n)
        self.train_set = TensorDataset(torch.tensor(self.x).float(), torch.tensor(self.y).float())
        self.test_set = TensorDataset(torch.tensor(self.z).float(), torch.zeros(tests))
        self.model = nn.Linear(3, 1, bias=False).eval()
        self.task = byline.Task(self.model, output="regression")

    def solve(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.linalg.solve(x.T @ x + 1e-3 * np.eye(3), x.T @ y)

    def train(self, dataset: Any, seed: int) -> dict[str, torch.Tensor]:
        x, y = (np.stack([np.asarray(item[j]) for item in dataset]).astype(float) for j in (0, 1))
        return {"weight": torch.tensor(self.solve(x, y)).float()[None]}

    def effects(self) -> np.ndarray:
        """(tests, n) f(z; all) - f(z; all but i), by refitting."""
        whole = self.z @ self.solve(self.x, self.y)
        keep = ~np.eye(len(self.x), dtype=bool)
        return np.stack([whole - self.z @ self.solve(self.x[k], self.y[k]) for k in keep], 1)


def test_leave_one_out_is_one_for_the_truth_and_nearly_so_for_influence() -> None:
    case = Ridge()
    masks = byline.leave_one_out_subsets(30, np.arange(0, 30, 2))
    assert masks.sum() == 16 * 30 - 15
    bank = byline.retrain(
        case.train, case.train_set, test_set=case.test_set, task=case.task, subsets=masks, seeds=1, progress=False
    )
    truth = case.effects()
    assert byline.leave_one_out(truth, bank, bootstrap=0).mean == pytest.approx(1.0)
    assert byline.leave_one_out(-truth, bank, bootstrap=0).mean == pytest.approx(-1.0)
    with torch.no_grad():
        case.model.weight.copy_(torch.tensor(case.solve(case.x, case.y))[None])
    influence = byline.Influence(
        case.task, byline.Independent([case.model]), solver="explicit", damping=1e-6, progress=False
    )
    scores = influence.fit(case.train_set).attribute(case.test_set)
    found = byline.leave_one_out(scores, bank)
    assert found.mean > 0.98
    assert found.interval[0] > 0.9
    assert found.per_example.shape == (6,)
    assert byline.leave_one_out(np.random.default_rng(0).normal(size=(6, 30)), bank, bootstrap=0).mean < 0.6


def test_leave_one_out_is_that_of_the_textbook() -> None:
    """What a ridge regression loses without one example: zᵀ A⁻¹ x e / (1 - h), its leverage h and residual e."""
    case = Ridge()
    inverse = np.linalg.inv(case.x.T @ case.x + 1e-3 * np.eye(3))
    residual = case.y - case.x @ case.solve(case.x, case.y)
    leverage = np.einsum("ij,jk,ik->i", case.x, inverse, case.x)
    closed = case.z @ inverse @ case.x.T * residual / (1 - leverage)
    np.testing.assert_allclose(case.effects(), closed, atol=1e-10)
    bank = byline.retrain(
        case.train,
        case.train_set,
        test_set=case.test_set,
        task=case.task,
        subsets=byline.leave_one_out_subsets(30, np.arange(30)),
        seeds=1,
        progress=False,
    )
    np.testing.assert_allclose((bank.outputs[:1] - bank.outputs[1:])[:, 0].T, closed, atol=1e-5)
    for correlation in ("spearman", "pearson"):
        right = byline.leave_one_out(closed, bank, correlation=correlation, bootstrap=100)
        assert right.mean == pytest.approx(1, abs=1e-3)
        assert right.interval == pytest.approx((1, 1), abs=2e-3)
        assert byline.leave_one_out(-closed, bank, correlation=correlation, bootstrap=0).mean == pytest.approx(
            -right.mean
        )
    # to first order the leverage is left out, which costs a little and no more
    first_order = case.z @ inverse @ case.x.T * residual
    assert 0.95 < byline.leave_one_out(first_order, bank, correlation="pearson", bootstrap=0).mean < 1


def noisy_bank(rng: np.random.Generator, removed: int, seeds: int, tests: int, noise: float) -> tuple[Any, Any]:
    """Effects known, outputs that show them through the noise of the seeds."""
    effects = rng.normal(size=(tests, removed))
    outputs = np.concatenate([np.zeros((1, tests)), -effects.T])[:, None] + noise * rng.normal(
        size=(1 + removed, seeds, tests)
    )
    return effects, byline.Bank(byline.leave_one_out_subsets(removed, np.arange(removed)), outputs)


def test_leave_one_out_meets_its_ceiling() -> None:
    """Effects of variance 1, noise of variance 2 over 4 seeds: the mean is 2/3 truth, and who knows it meets √(2/3)."""
    effects, bank = noisy_bank(np.random.default_rng(0), 60, 4, 200, np.sqrt(2.0))
    for correlation in ("spearman", "pearson"):
        found = byline.leave_one_out(effects, bank, correlation=correlation, bootstrap=0)
        assert found.details["ceiling"] == pytest.approx(np.sqrt(2 / 3), abs=0.03)
        assert found.mean == pytest.approx(found.details["ceiling"], abs=0.03)
        assert found.details["split_half"] == pytest.approx(1 / 2, abs=0.04)
    assert np.isnan(byline.leave_one_out(effects, bank.with_seeds(1), bootstrap=0).details["ceiling"])


def test_leave_one_out_and_its_resamples_are_those_of_scipy() -> None:
    rng = np.random.default_rng(4)
    effects, bank = noisy_bank(rng, 12, 2, 5, 1.0)
    scores = np.round(2 * effects + rng.normal(size=effects.shape))  # with ties
    measured = (bank.outputs[0].mean(0) - bank.outputs[1:].mean(1)).T
    for correlation, reference in (("spearman", spearmanr), ("pearson", pearsonr)):
        each = [reference(a, b).statistic for a, b in zip(scores, measured, strict=True)]
        found = byline.leave_one_out(scores, bank, correlation=correlation, bootstrap=0)
        np.testing.assert_allclose(found.per_example, each, atol=1e-6)
    drawn = _resample_pearson(scores, measured, 20, np.random.default_rng(3))
    again = np.random.default_rng(3)
    columns, rows = again.multinomial(12, np.full(12, 1 / 12), 20), again.multinomial(5, np.full(5, 1 / 5), 20)
    for value, column, row in zip(drawn, columns, rows, strict=True):
        s, r = np.repeat(np.arange(12), column), np.repeat(np.arange(5), row)
        assert value == pytest.approx(np.mean([pearsonr(scores[i, s], measured[i, s]).statistic for i in r]), abs=1e-6)


def test_leave_one_out_of_a_constant_row_is_left_out() -> None:
    effects, bank = noisy_bank(np.random.default_rng(0), 10, 1, 4, 0.1)
    effects[2] = 1.3
    for correlation in ("spearman", "pearson"):
        found = byline.leave_one_out(effects, bank, correlation=correlation, bootstrap=50)
        assert np.flatnonzero(np.isnan(found.per_example)).tolist() == [2]
        assert found.left_out == 1
        assert "3 of 4 examples" in repr(found)
        assert np.isfinite(found.interval).all()


def test_leave_one_out_intervals_cover() -> None:
    """Of banks of one process about 95 in 100 intervals hold its mean; with 25 removed a little fewer."""
    rng, values, intervals = np.random.default_rng(1), [], []
    for _ in range(60):
        effects, bank = noisy_bank(rng, 25, 1, 30, 1.0)
        found = byline.leave_one_out(effects, bank, bootstrap=200)
        values.append(found.mean)
        intervals.append(found.interval)
    low, high = np.array(intervals).T
    assert np.mean((low <= np.mean(values)) & (np.mean(values) <= high)) >= 0.85
    assert np.mean(high - low) < 0.3


def test_leave_one_out_names_a_bank_of_other_subsets() -> None:
    bank = byline.Bank(np.eye(4, 6, dtype=bool), np.zeros((4, 1, 2)))
    with pytest.raises(ValueError, match="expected the whole set"):
        byline.leave_one_out(np.zeros((2, 6)), bank)
    twice = byline.Bank(byline.leave_one_out_subsets(6, [0, 1, 2])[[0, 1, 2, 3, 3]], np.zeros((5, 1, 2)))
    with pytest.raises(ValueError, match=r"4 lack one example \(3 different ones\)"):
        byline.leave_one_out(np.zeros((2, 6)), twice)
    with pytest.raises(ValueError, match="distinct places"):
        byline.leave_one_out_subsets(5, [1, 1])


def test_mislabels_by_hand() -> None:
    # three flipped; of the 3 × 4 pairs one is the wrong way round, and one is a tie
    suspicion = np.array([9.0, 8.0, 3.0, 3.0, 4.0, 1.0, 0.0])
    flipped = np.array([True, True, True, False, False, False, False])
    found = byline.mislabel_detection(suspicion, flipped)
    assert found.mean == pytest.approx((12 - 1 - 0.5) / 12)
    assert np.nanmean(found.per_example) == pytest.approx(found.mean)
    assert found.per_example[2] == pytest.approx((2 + 0.5) / 4)
    assert np.isnan(found.per_example[3:]).all()
    assert byline.mislabel_detection(suspicion, [0, 1, 2], bootstrap=0).mean == found.mean
    checked, share = found.details["checked"], found.details["found"]
    assert share[-1] == 1
    assert share[list(checked).index(0.3)] == pytest.approx(2 / 3)  # two of seven looked at


def test_perfect_reversed_and_undecided_suspicion() -> None:
    flipped = np.arange(20) < 5
    perfect = byline.mislabel_detection(flipped * 2.0, flipped)
    assert perfect.mean == perfect.details["average_precision"] == 1.0
    assert perfect.interval == perfect.details["average_precision_interval"] == (1.0, 1.0)
    assert perfect.left_out == 15
    assert "5 of 20 examples" in repr(perfect)
    checked, found = perfect.details["checked"], perfect.details["found"]
    np.testing.assert_allclose(found, np.minimum(checked * 4, 1))  # five in twenty: four times the share checked
    np.testing.assert_allclose(perfect.details["found_interval"], [found, found])
    backwards = byline.mislabel_detection(flipped * -2.0, flipped, bootstrap=0)
    assert backwards.mean == 0.0
    np.testing.assert_allclose(backwards.details["found"], np.maximum(0, 1 - (1 - checked) * 4))
    # where all are equally suspicious, their order in the training set must not help
    undecided = byline.mislabel_detection(np.zeros(20), flipped)
    assert undecided.mean == 0.5
    np.testing.assert_allclose(undecided.details["found"], checked)


def test_the_interval_covers_the_auc_of_two_gaussians() -> None:
    """Flipped ones a standard deviation more suspicious: the AUC is Φ(1/√2)."""
    rng, inside = np.random.default_rng(5), 0
    flipped = np.arange(200) < 40
    for _ in range(100):
        found = byline.mislabel_detection(rng.normal(size=200) + flipped, flipped, bootstrap=200)
        inside += found.interval[0] <= norm.cdf(np.sqrt(0.5)) <= found.interval[1]
    assert 88 <= inside <= 100


def test_suspicion_comes_as_array_tensor_or_scores() -> None:
    rng = np.random.default_rng(2)
    array, flipped = rng.normal(size=50).astype(np.float32), np.arange(50) % 7 == 0
    expected = byline.mislabel_detection(array, flipped)
    assert byline.mislabel_detection(torch.from_numpy(array), torch.from_numpy(flipped)).interval == expected.interval
    scores = rng.normal(size=(4, 50)).astype(np.float32)
    expected = byline.mislabel_detection(-scores.astype(float).mean(0), flipped)
    for given in (scores, torch.from_numpy(scores), byline.Scores(scores)):
        assert byline.mislabel_detection(given, np.flatnonzero(flipped)).mean == expected.mean


def test_suspicion_of_scores_is_what_pushes_trusted_outputs_down() -> None:
    scores = np.array([[1.0, -2.0, 0.5], [1.0, -4.0, 0.5]])
    assert byline.mislabel_detection(scores, [1], bootstrap=0).mean == 1.0
    assert byline.mislabel_detection(byline.Scores(-scores), [1], bootstrap=0).mean == 0.0


def test_resamples_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    mask = rng.random(60) < 0.3
    array = np.round(rng.normal(size=60) + mask, 1)  # with ties
    drawn = _resample(array, mask, 5, np.random.default_rng(1))
    again = np.random.default_rng(1)
    counts = np.zeros((5, 60), dtype=int)
    for part in (mask, ~mask):
        counts[:, part] = again.multinomial(part.sum(), np.full(part.sum(), 1 / part.sum()), 5)
    for i in range(5):
        places = np.repeat(np.arange(60), counts[i])
        assert drawn[0][i] == pytest.approx(roc_auc_score(mask[places], array[places]))
        assert drawn[1][i] == pytest.approx(average_precision_score(mask[places], array[places]))


def test_noise_finds_nothing_and_its_interval_says_so() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(40):
        flipped = byline.flip_labels(np.zeros(300, dtype=int), 0.1, 10, seed)[1]
        found = byline.mislabel_detection(rng.normal(size=300), flipped, bootstrap=200)
        inside += found.interval[0] <= 0.5 <= found.interval[1]
    assert 32 <= inside <= 40


def test_flipped_labels_are_another_class_and_depend_on_the_seed_alone() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 200)
    new, flipped = byline.flip_labels(labels, 0.25, 4, seed=5)
    np.testing.assert_array_equal(new != labels, flipped)
    assert flipped.sum() == 50
    many = byline.flip_labels(np.zeros(10_000, dtype=int), 0.9, 4)[0]  # each other class as likely
    np.testing.assert_allclose(np.bincount(many, minlength=4) / 10_000, [0.1, 0.3, 0.3, 0.3], atol=0.02)
    np.testing.assert_array_equal(byline.flip_labels(new, 0.25, 4, seed=5)[1], flipped)
    assert (byline.flip_labels(labels, 0.25, 4, seed=6)[1] != flipped).any()


def test_overlap_by_hand() -> None:
    a = np.array([[5.0, 4, 3, 2, 1], [1, 2, 3, 4, 5]])
    b = np.array([[5.0, 1, 4, 2, 3], [5, 4, 3, 2, 1]])
    found = byline.topk_overlap(a, b, 2)
    np.testing.assert_allclose(found.per_example, [0.5, 0.0])
    assert found.details["chance"] == pytest.approx(0.4)
    np.testing.assert_allclose(byline.topk_overlap(a, b, 2, sign="opponents").per_example, [0.5, 0.0])
    assert byline.topk_overlap(a, a, 3).mean == 1.0
    # both name places 0, 1 first; last come 3, 4 here and 2, 3 there
    c, d = np.array([[5.0, 4, 3, 2, 1]]), np.array([[5.0, 4, 1, 2, 3]])
    assert byline.topk_overlap(c, d, 2).mean == 1.0
    assert byline.topk_overlap(c, d, 2, sign="opponents").mean == 0.5
    assert byline.topk_overlap(byline.Scores(a), torch.from_numpy(b), 2).mean == found.mean
    rng = np.random.default_rng(0)
    chance = byline.topk_overlap(rng.normal(size=(400, 50)), rng.normal(size=(400, 50)), 5)
    assert chance.interval[0] <= chance.details["chance"] == 0.1 <= chance.interval[1]


def test_class_and_subclass_by_hand() -> None:
    scores = np.array([[9.0, 8, 7, 6], [1, 2, 3, 4]])
    train, test = np.array([0, 1, 0, 1]), np.array([0, 1])
    found = byline.class_detection(scores, train, test, k=2)
    np.testing.assert_allclose(found.per_example, [0.5, 0.5])
    assert found.details["chance"] == 0.5
    assert byline.class_detection(scores, train, test, k=1).mean == 1.0
    # merged class A holds subclasses 0 and 1, B holds 2: within A alone, subclass 1 is named last
    subclasses, merged = np.array([0, 0, 1, 2]), np.array([0, 0, 0, 1])
    inside = byline.subclass_detection(scores, subclasses, np.array([0, 1]), merged, np.array([0, 0]), k=2)
    np.testing.assert_allclose(inside.per_example, [1.0, 0.5])
    assert inside.details["chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_class_rankings_are_those_of_scikit_learn_and_chance_is_chance() -> None:
    rng = np.random.default_rng(1)
    train, test = rng.integers(0, 3, 90), rng.integers(0, 3, 80)
    scores = rng.normal(size=(80, 90))
    found = byline.class_detection(scores, train, test)
    assert found.mean == pytest.approx(found.details["chance"], abs=0.06)
    assert found.details["roc_auc"] == pytest.approx(0.5, abs=0.04)
    expected = np.mean([average_precision_score(train == t, row) for t, row in zip(test, scores, strict=True)])
    assert found.details["average_precision"] == pytest.approx(expected)
    same = test[:, None] == train[None]
    told = byline.class_detection(scores + 10 * same, train, test)
    assert told.mean == 1.0
    assert [told.details[name] for name in ("average_precision", "roc_auc")] == pytest.approx([1, 1])
    assert byline.class_detection(scores - 10 * same, train, test).mean == 0.0
    # scores that know the merged class and nothing more are at chance once its members compete alone
    classes, of_test = train % 2, test % 2
    coarse = scores + 10 * (of_test[:, None] == classes[None])
    both = byline.subclass_detection(coarse, train, test)
    alone = byline.subclass_detection(coarse, train, test, classes, of_test)
    assert both.mean > both.details["chance"] + 0.2
    in_class = np.array([np.mean(train[classes == c] == t) for c, t in zip(of_test, test, strict=True)])
    assert alone.details["chance"] == pytest.approx(in_class.mean())
    assert alone.mean == pytest.approx(in_class.mean(), abs=0.06)
    assert "merged class" in alone.protocol


def test_class_detection_intervals_cover_chance() -> None:
    inside = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = byline.class_detection(
            rng.normal(size=(15, 30)), rng.integers(0, 3, 30), rng.integers(0, 3, 15), 5, bootstrap=200
        )
        inside += found.interval[0] <= found.details["chance"] <= found.interval[1]
    assert 35 <= inside <= 40


def test_a_class_without_training_examples_is_left_out() -> None:
    found = byline.class_detection(np.eye(3), [0, 0, 1], [0, 1, 7], 1)
    np.testing.assert_allclose(found.per_example, [1, 0, np.nan])
    assert found.mean == 0.5
    assert found.left_out == 1


class Votes:
    """A model whose margin on any input is (positive - negative training labels in sight): the nearest-mean toy.

    Label 1 votes for class 1 and 0 for class 0, so how many votes must go to turn a prediction is known.
    """

    def __init__(self, ones: int = 12, zeros: int = 7) -> None:
        self.labels = np.array([1] * ones + [0] * zeros)
        self.train_set = TensorDataset(torch.zeros(len(self.labels), 1), torch.tensor(self.labels))
        self.test_set = TensorDataset(torch.zeros(3, 1), torch.tensor([1, 1, 0]))
        self.task = byline.Task(nn.Linear(1, 2).eval())
        self.calls = 0

    def train(self, dataset: Any, seed: int) -> dict[str, torch.Tensor]:
        self.calls += 1
        labels = np.array([int(item[1]) for item in dataset])
        lead = float((labels == 1).sum() - (labels == 0).sum())
        return {"weight": torch.zeros(2, 1), "bias": torch.tensor([0.0, lead])}

    def scores(self) -> np.ndarray:
        """Ones are proponents of class 1, zeros of class 0; earlier ones a little stronger."""
        sign = np.where(self.labels == 1, 1.0, -1.0) * np.linspace(1.1, 1, len(self.labels))
        return np.stack([sign, sign, -sign])


def run(case: Votes, measure: Callable[..., Measure], **options: Any) -> Measure:
    options = {"sizes": [2, 4, 5, 6], "examples": 3, "seeds": 1, "progress": False, **options}
    return measure(
        options.pop("scores", case.scores()),
        case.train,
        case.train_set,
        test_set=case.test_set,
        task=case.task,
        **options,
    )


def test_brittleness_knows_how_many_must_go() -> None:
    # a lead of 5: taking 5 away leaves 0, which is no longer ahead; the third test example was wrong to begin with
    found = run(Votes(), byline.brittleness)
    np.testing.assert_allclose(found.per_example, [5, 5, np.nan])
    assert found.details["turned"] == [0.0, 0.0, 1.0, 1.0]
    assert found.mean == 1.0
    unturned = run(Votes(), byline.brittleness, scores=-Votes().scores())
    assert np.isnan(unturned.per_example).all()
    assert unturned.left_out == found.left_out == 1  # the wrong one alone: those that do not turn count
    assert unturned.mean == 0.0
    assert unturned.interval == (0.0, 0.0)
    assert found.details["right"].tolist() == [True, True, False]
    np.testing.assert_allclose(found.details["lead"][:, 0], [5, 3, 1, 0, -1], atol=1e-5)
    assert found.details["control"][0] == 0.0


class Shares(Votes):
    """Three classes whose probabilities are their shares of the training labels."""

    def __init__(self) -> None:
        self.labels = np.array([0] * 8 + [1] * 6 + [2] * 6)
        self.train_set = TensorDataset(torch.zeros(20, 1), torch.tensor(self.labels))
        self.test_set = TensorDataset(torch.zeros(2, 1), torch.tensor([0, 0]))
        self.task = byline.Task(nn.Linear(1, 3).eval())

    def train(self, dataset: Any, seed: int) -> dict[str, torch.Tensor]:
        counts = torch.bincount(torch.tensor([int(item[1]) for item in dataset]), minlength=3)
        return {"weight": torch.zeros(3, 1), "bias": counts.float().log()}

    def scores(self) -> np.ndarray:
        return np.stack([np.where(self.labels == 0, 1.0, -1.0)] * 2)


def test_a_right_prediction_may_have_a_negative_margin() -> None:
    """Eight of twenty: p = 0.4, so the margin is negative from the start, and yet two may go before it turns."""
    case = Shares()
    found = run(case, byline.brittleness, sizes=[1, 2, 3], examples=2)
    np.testing.assert_allclose(found.per_example, [2, 2])  # six against six is no longer ahead
    assert found.details["turned"] == [0.0, 1.0, 1.0]
    margins = run(case, byline.removal_curve, sizes=[1], examples=2)
    assert margins.details["moved"][0, 0] == pytest.approx(np.log(8 / 12) - np.log(7 / 12), abs=1e-5)


class Means:
    """Nearest class mean on a line, which is a linear model: ten zeros at -1, six ones and four zeros at 1."""

    def __init__(self) -> None:
        x = torch.tensor([-1.0] * 10 + [1.0] * 10)
        self.train_set = TensorDataset(x[:, None], torch.tensor([0] * 10 + [1] * 6 + [0] * 4))
        self.test_set = TensorDataset(torch.tensor([[0.5], [-2.0]]), torch.tensor([1, 0]))
        self.task = byline.Task(nn.Linear(1, 2).eval())

    def train(self, dataset: Any, seed: int) -> dict[str, torch.Tensor]:
        x, y = (torch.stack([torch.as_tensor(item[j]) for item in dataset]).reshape(-1) for j in (0, 1))
        means = torch.stack([x[y == 0].mean(), x[y == 1].mean()])
        return {"weight": 2 * means[:, None], "bias": -(means**2)}


def test_brittleness_of_nearest_means() -> None:
    """Zeros at -1 (10) and at 1 (4) have their mean at -3/7; the boundary to the ones at 1 is at 2/7.

    Without k of the zeros at -1 their mean is (4 - (10 - k)) / (14 - k) and the boundary half-way from there to 1. It
    passes 1/2 when that mean reaches 0, at k = 6: those zeros are what holds x = 1/2 on the side of the ones.
    """
    case = Means()
    scores = np.zeros((2, 20))
    scores[0, :10] = 1
    scores[1, :10] = 1
    found = byline.brittleness(
        scores,
        case.train,
        case.train_set,
        test_set=case.test_set,
        task=case.task,
        sizes=range(4, 10),
        seeds=1,
        progress=False,
    )
    assert found.details["sizes"] == [4, 5, 6, 7, 8, 9]
    np.testing.assert_allclose(found.per_example, [6, np.nan])  # at -2 it stays a zero whatever goes
    assert found.details["turned"] == [0, 0, 0.5, 0.5, 0.5, 0.5]
    assert found.mean == 0.5
    means = (np.arange(4, 10) - 6) / (14 - np.arange(4, 10))
    ahead = -((0.5 - 1) ** 2) + (0.5 - np.r_[-3 / 7, means]) ** 2
    np.testing.assert_allclose(found.details["lead"][:, 0], ahead, atol=1e-5)


def test_removal_and_addition_move_the_output_by_what_is_known() -> None:
    case = Votes()
    found = run(case, byline.removal_curve)
    # each proponent of class 1 is worth one of its margin
    np.testing.assert_allclose(found.details["moved"][:, 0], [2, 4, 5, 6], atol=1e-5)
    np.testing.assert_allclose(found.details["moved"][:, 2], [2, 4, 5, 6], atol=1e-5)
    np.testing.assert_allclose(found.per_example, found.details["moved"][-1] - found.details["control"][-1])
    assert found.mean > 0
    control = found.details["control"]
    np.testing.assert_allclose(control[:, 0], -control[:, 2], atol=1e-5)  # what lifts one label lowers the other
    assert found.details["moved_means"] == pytest.approx([2, 4, 5, 6], abs=1e-5)
    assert found.details["moved_intervals"][-1] == pytest.approx((6, 6), abs=1e-5)
    assert found.details["control_means"] == pytest.approx(control.mean(1))
    assert found.details["means"][-1] == found.mean
    assert found.details["intervals"][-1] == found.interval
    places = run(case, byline.removal_curve, examples=np.array([2, 0]))
    assert places.details["examples"] == [2, 0]
    np.testing.assert_allclose(places.per_example, found.per_example[[2, 0]], atol=1e-5)
    opponents = run(case, byline.removal_curve, side="opponents")
    np.testing.assert_allclose(opponents.details["moved"][:, 0], [2, 4, 5, 6], atol=1e-5)
    added = run(case, byline.removal_curve, direction="add", sizes=[2], base=0.4)
    np.testing.assert_allclose(added.details["moved"][0], [2, 2, 2], atol=1e-5)
    backwards = run(case, byline.removal_curve, scores=-case.scores())
    assert backwards.mean < 0


def test_removal_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = run(Votes(), byline.removal_curve, path=tmp_path / "whole.safetensors", sizes=[1, 2, 3, 4, 5, 6, 7, 8, 9])
    case = Votes()
    case.group = 10  # type: ignore[attr-defined]
    stopped = Votes()

    def train(dataset: Any, seed: int) -> dict[str, torch.Tensor]:
        if stopped.calls == 30:
            raise KeyboardInterrupt
        return Votes.train(stopped, dataset, seed)

    path = tmp_path / "stopped.safetensors"
    options = {"path": path, "sizes": [1, 2, 3, 4, 5, 6, 7, 8, 9]}
    stopped.train = train  # type: ignore[method-assign]
    train.__qualname__ = train.__module__ = "train"
    with pytest.raises(KeyboardInterrupt):
        run(stopped, byline.removal_curve, **options)
    before, stopped.calls = stopped.calls, 0
    again = run(stopped, byline.removal_curve, **options)
    assert before == 30
    assert stopped.calls == 37 - 25  # 1 + 9 × 3 + 9 models, the first part of 25 is kept
    np.testing.assert_array_equal(again.details["moved"], whole.details["moved"])


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3))


def test_trained_in_batches_a_killed_measure_resumes_to_equal_bits(tmp_path: Path) -> None:
    """Sets of several sizes, through a trainer that stacks models of one size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(46, 4, generator=generator)
    y = x[:, :3].argmax(1)
    train_set, test_set = TensorDataset(x[:40], y[:40]), TensorDataset(x[40:], y[40:])
    task = byline.Task(small_net().eval())
    trainer = byline.Trainer(small_net, byline.Recipe(lr=0.3, batch_size=8, epochs=6), task.loss, group=4)
    trained: list[int] = []

    class Killed:
        group, describe = trainer.group, trainer.describe

        def __init__(self, parts: float) -> None:
            self.parts = parts

        def many(self, train_set: Any, subsets: Any, seeds: list[int]) -> Any:
            if self.parts <= 0:
                raise KeyboardInterrupt
            self.parts -= 1
            trained.extend(seeds)
            return trainer.many(train_set, subsets, seeds)

    scores = np.random.default_rng(0).normal(size=(6, 40))

    def measured(measure: Callable[..., Measure], train_fn: Any, **options: Any) -> Measure:
        options = {"sizes": [3, 8], "examples": [3, 5, 0], "seeds": 2, "progress": False, **options}
        return measure(scores, train_fn, train_set, test_set=test_set, task=task, **options)

    for measure, key in ((byline.removal_curve, "moved"), (byline.brittleness, "lead")):
        expected = measured(measure, trainer)
        path = tmp_path / f"{key}.safetensors"
        trained.clear()
        with pytest.raises(KeyboardInterrupt):
            measured(measure, Killed(2), path=path)
        assert np.isfinite(expected.interval).all()
        resumed = measured(measure, Killed(3), path=path)
        assert len(trained) == len(set(trained)) == 2 * (1 + 2 * 3 + 2)  # 18 models in parts of 4, none of them twice
        np.testing.assert_array_equal(resumed.details[key], expected.details[key])
        np.testing.assert_array_equal(resumed.per_example, expected.per_example)
        assert resumed.interval == expected.interval
        again = measured(measure, Killed(0), path=path)  # nothing left to train
        np.testing.assert_array_equal(again.details[key], expected.details[key])
        with pytest.raises(ValueError, match="was made with subsets"):
            measured(measure, Killed(0), path=path, sizes=[4, 8])


def test_given_subsets_are_retrained_as_they_are() -> None:
    case = Votes()
    masks = np.ones((3, 19), dtype=bool)
    masks[1, :4] = False
    masks[2, 12:] = False
    options = {"test_set": case.test_set, "task": case.task, "seeds": 1, "progress": False}
    bank = byline.retrain(case.train, case.train_set, subsets=masks, **options)
    np.testing.assert_allclose(bank.outputs[:, 0, 0], [5, 1, 12], atol=1e-5)
    other = byline.retrain(case.train, case.train_set, subsets=masks[[0, 2, 1]], **options)
    assert other.metadata["subsets"] != bank.metadata["subsets"]
    assert bank.metadata["fraction"] is None
    np.testing.assert_array_equal(bank.subsets, masks)
    masks[0, 0] = False
    assert bank.subsets[0].all()  # what the bank holds is its own
    counted = byline.retrain(case.train, case.train_set, subsets=np.int64(2), **options)
    assert counted.metadata["subsets"] == 2
    for bad, message in (
        (masks[:, :5], r"expected bool \(subsets, 19\)"),
        (masks.astype(int), "got int64"),
        (masks & False, "number 0 is empty"),
        (masks.tolist(), "subsets: got list; expected"),
        (torch.from_numpy(masks), "subsets: got Tensor; expected"),
        (2.5, r"subsets: got 2\.5; expected"),
        (True, "subsets: got True; expected"),
    ):
        with pytest.raises(ValueError, match=message):
            byline.retrain(case.train, case.train_set, subsets=bad, **options)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: byline.mislabel_detection(np.zeros(4), np.zeros(4, dtype=bool)), "flipped: 0 of 4"),
    (lambda: byline.mislabel_detection(np.zeros(4), np.zeros(3, dtype=bool)), r"flipped has shape \(3,\)"),
    (lambda: byline.mislabel_detection(np.array([1, np.nan]), [0]), "expected .* finite"),
    (lambda: byline.mislabel_detection(np.zeros(4), [9]), "places from 0 to 3"),
    (lambda: byline.flip_labels(np.zeros(4, dtype=int), 0.0, 3), "flips 0 of 4"),
    (lambda: byline.flip_labels(np.full(4, 7), 0.5, 3), "classes is 3"),
    (lambda: byline.topk_overlap(np.zeros((2, 3)), np.zeros((2, 4))), "expected the same"),
    (lambda: byline.topk_overlap(np.zeros((2, 3)), np.zeros((2, 3)), 4), "k is 4"),
    (lambda: byline.topk_overlap(np.zeros((2, 3)), np.zeros((2, 3)), 2, sign="top"), "sign is 'top'"),
    (lambda: byline.class_detection(np.zeros((2, 3)), [0, 1], [0, 1]), r"train_labels has shape \(2,\)"),
    (lambda: byline.class_detection(np.full((1, 2), np.inf), [0, 1], [0]), "expected finite numbers"),
    (lambda: byline.class_detection(np.zeros((1, 2)), [0, 1], [0], k=0), "k is 0"),
    (lambda: byline.subclass_detection(np.zeros((1, 2)), [0, 1], [0], [0, 0]), "expected both"),
    (lambda: byline.class_detection(np.zeros((1, 2)), [0, 1], [0], 1, confidence=1), "confidence=1"),
    (lambda: run(Votes(), byline.removal_curve, sizes=[99]), "whole numbers from 1 to 18"),
    (lambda: run(Votes(), byline.removal_curve, direction="both"), "direction is 'both'"),
    (lambda: run(Votes(), byline.removal_curve, side="both"), "side is 'both'"),
    (lambda: run(Votes(), byline.removal_curve, examples=[7]), "examples is"),
    (lambda: run(Votes(), byline.removal_curve, direction="add", base=1.0), "base is 1.0"),
    (lambda: run(Votes(), byline.removal_curve, sizes=[1.5]), r"sizes is \[1\.5\]"),
    (lambda: run(Votes(), byline.removal_curve, sizes=[]), r"sizes is \[\]"),
    (lambda: run(Votes(), byline.brittleness, sizes=3), "sizes is 3"),
    (lambda: run(Votes(), byline.removal_curve, examples=-1), "examples is -1"),
    (lambda: run(Votes(), byline.removal_curve, examples=np.array([True, False, True])), "examples is array"),
    (lambda: run(Votes(), byline.removal_curve, scores=np.zeros((3, 7))), r"scores: got \(3, 7\); .*\(3, 19\)"),
    (lambda: run(Votes(), byline.brittleness, scores=np.full((3, 19), np.nan)), "scores: test example 0"),
    (lambda: run(Votes(), byline.removal_curve, seeds=0), "seeds=0"),
    (lambda: byline.mislabel_detection(np.array(["a", "b"]), [0]), "suspicion: got <U1"),
    (lambda: byline.flip_labels(np.zeros(4, dtype=int), float("nan"), 3), "fraction=nan"),
    (lambda: byline.topk_overlap(np.zeros((0, 3)), np.zeros((0, 3)), 1), r"a has shape \(0, 3\)"),
    (lambda: byline.topk_overlap(np.zeros((1, 2)), np.full((1, 2), None), 1), "b has dtype object"),
    (lambda: byline.topk_overlap(np.eye(2), np.eye(2), 1, bootstrap=2.5), r"bootstrap=2\.5"),  # type: ignore[arg-type]
    (lambda: byline.class_detection(np.eye(2), [0, np.nan], [0, 1], 1), "train_labels: number 1 is nan"),
    (lambda: byline.leave_one_out(np.eye(2), noisy_bank(np.random.default_rng(0), 4, 1, 2, 0)[1]), r"got \(2, 2\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_one_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_brittleness_needs_a_classification() -> None:
    case = Ridge()
    with pytest.raises(ValueError, match="needs 'classification'"):
        byline.brittleness(
            np.zeros((6, 30)), case.train, case.train_set, test_set=case.test_set, task=case.task, sizes=[2]
        )


def test_intervals_are_percentiles_of_seeded_resamples() -> None:
    assert percentile(np.arange(101.0), 0.95) == pytest.approx((2.5, 97.5))
    assert percentile(np.arange(101.0), 0.5) == pytest.approx((25, 75))
    assert np.isnan(percentile(np.empty(0), 0.95)).all()
    values = np.random.default_rng(0).normal(size=400)
    mean, (low, high) = mean_interval(values, 2000, 0.95, 0)
    assert mean == values.mean()
    half = 1.96 * values.std() / 20  # of 400, by the normal approximation
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.01)
    assert (
        mean_interval(values, 50, 0.95, 1) == mean_interval(values, 50, 0.95, 1) != mean_interval(values, 50, 0.95, 2)
    )


def test_a_measure_says_what_it_is() -> None:
    found = byline.topk_overlap(np.eye(3), np.eye(3), 1)
    assert float(found) == 1.0
    assert repr(found).startswith("top-1 overlap 1.000, 95 % interval")
    assert found.protocol
    assert found.source
    assert found.left_out == 0
