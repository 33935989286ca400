"""The LDS against scipy, against a bank whose datamodel is known, and against a simulated reliability."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, rankdata, spearmanr

import byline
from byline.evaluate.bank import Bank
from byline.evaluate.lds import lds, lds_difference, noise_ceiling, partial_lds


def masks(subsets, n_train, rng):
    chosen = np.zeros((subsets, n_train), dtype=bool)
    for row in chosen:
        row[rng.choice(n_train, n_train // 2, replace=False)] = True
    return chosen


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def bank(rng):
    return Bank(masks(30, 40, rng), rng.normal(size=(30, 2, 12)).astype(np.float32))


def test_each_example_equals_scipy(bank, rng):
    scores = np.round(rng.normal(size=(12, 40)))  # whole numbers: the sums are full of ties
    result = lds(scores, bank, bootstrap=0)
    sums = scores @ bank.subsets.T
    truth = bank.outputs.astype(np.float64).mean(1).T
    assert any(len(set(row)) < len(row) for row in sums)
    expected = [spearmanr(a, b).statistic for a, b in zip(sums, truth, strict=True)]
    np.testing.assert_allclose(result.per_example, expected, atol=1e-12)
    assert result.mean == pytest.approx(np.mean(expected))
    assert float(result) == result.mean
    assert np.isnan(result.interval).all()


def test_the_true_linear_datamodel_scores_one_and_its_negative_minus_one(rng):
    subsets, weights = masks(25, 40, rng), rng.normal(size=(8, 40))
    bank = Bank(subsets, np.repeat((weights @ subsets.T).T[:, None], 2, axis=1))
    assert lds(weights, bank).mean == pytest.approx(1)
    assert lds(weights, bank).interval == pytest.approx((1, 1), abs=1e-5)
    assert lds(weights, bank).ceiling == pytest.approx(1)
    assert lds(-weights, bank).mean == pytest.approx(-1)


def test_scores_arrays_and_tensors_are_the_same(bank, rng):
    values = rng.normal(size=(12, 40)).astype(np.float32)
    expected = lds(values, bank)
    for scores in (torch.from_numpy(values), SimpleNamespace(values=values)):
        assert lds(scores, bank).mean == expected.mean
        assert lds(scores, bank).interval == expected.interval


@pytest.mark.parametrize("reliability", [0.3, 0.7])
@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_the_ceiling_is_what_a_perfect_predictor_reaches(reliability, seeds, rng):
    """Truth of variance ρ, seed noise of variance 1 - ρ: who knows the truth meets the ceiling."""
    weights, subsets = rng.normal(size=(300, 200)), masks(60, 200, rng)
    truth = weights @ subsets.T
    truth = np.sqrt(reliability) * (truth - truth.mean(1, keepdims=True)) / truth.std(1, keepdims=True)
    noise = np.sqrt(1 - reliability) * rng.normal(size=(60, seeds, 300))
    bank = Bank(subsets, truth.T[:, None] + noise)
    result = lds(weights, bank, bootstrap=0)
    of_mean = seeds * reliability / (1 + (seeds - 1) * reliability)
    assert result.ceiling == pytest.approx(np.sqrt(of_mean), abs=0.025)
    assert result.mean == pytest.approx(result.ceiling, abs=0.025)
    half = seeds // 2
    assert result.split_half == pytest.approx(half * reliability / (1 + (half - 1) * reliability), abs=0.03)


def test_many_seeds_sample_the_halvings(rng):
    truth = rng.normal(size=(40, 1, 100))
    split_half, ceiling = noise_ceiling(Bank(masks(40, 10, rng), truth + rng.normal(size=(40, 10, 100))))
    assert split_half == pytest.approx(5 / 6, abs=0.03)  # five seeds: 1 / (1 + 1/5)
    assert ceiling == pytest.approx(np.sqrt(10 / 11), abs=0.02)


def test_one_seed_has_no_ceiling(bank, rng):
    result = lds(rng.normal(size=(12, 40)), Bank(bank.subsets, bank.outputs[:, :1]))
    assert np.isnan([result.ceiling, result.split_half]).all()
    assert "ceiling" not in repr(result)


def test_the_bootstrap_is_that_of_scipy(rng):
    """Ranks by matrix product equal ranking each resample anew."""
    from byline.evaluate.lds import _resample

    predicted, actual = np.round(2 * rng.normal(size=(6, 15))), rng.normal(size=(6, 15))
    got = _resample(predicted, actual, 40, np.random.default_rng(3))
    draws = np.random.default_rng(3)
    subset_counts = draws.multinomial(15, np.full(15, 1 / 15), 40)
    row_counts = draws.multinomial(6, np.full(6, 1 / 6), 40)
    for value, subsets, rows in zip(got, subset_counts, row_counts, strict=True):
        s, r = np.repeat(np.arange(15), subsets), np.repeat(np.arange(6), rows)
        expected = np.mean([spearmanr(predicted[i, s], actual[i, s]).statistic for i in r])
        assert value == pytest.approx(expected, abs=1e-4)


def test_the_interval_covers_the_true_value():
    """Of 100 banks of one process, about 95 intervals hold its true LDS; with 25 subsets a little fewer."""
    rng, values, intervals = np.random.default_rng(1), [], []
    weights = rng.normal(size=(40, 100))
    for _ in range(100):
        subsets = masks(25, 100, rng)
        outputs = (weights @ subsets.T).T + 8 * rng.normal(size=(25, 40))
        result = lds(weights, Bank(subsets, outputs[:, None]), bootstrap=200)
        values.append(result.mean)
        intervals.append(result.interval)
    low, high = np.array(intervals).T
    covered = np.mean((low <= np.mean(values)) & (np.mean(values) <= high))
    assert covered >= 0.85
    assert np.mean(high - low) < 0.5


def test_a_seed_fixes_the_interval(bank, rng):
    scores = rng.normal(size=(12, 40))
    assert lds(scores, bank, seed=1).interval == lds(scores, bank, seed=1).interval
    assert lds(scores, bank, seed=1).interval != lds(scores, bank, seed=2).interval
    narrow, wide = lds(scores, bank, confidence=0.5).interval, lds(scores, bank, confidence=0.99).interval
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_constant_rows_are_left_out_and_counted(bank, rng):
    scores = rng.normal(size=(12, 40))
    scores[3] = 0
    outputs = bank.outputs.copy()
    outputs[:, :, 5] = 1
    result = lds(scores, Bank(bank.subsets, outputs))
    assert np.flatnonzero(np.isnan(result.per_example)).tolist() == [3, 5]
    assert result.left_out == 2
    assert result.mean == pytest.approx(np.nanmean(result.per_example))
    assert np.isfinite([*result.interval, result.ceiling]).all()
    assert "2 constant test examples left out" in repr(result)
    nothing = lds(np.zeros((12, 40)), bank)
    assert np.isnan(nothing.mean)
    assert nothing.left_out == 12


def test_bad_input_gets_one_clear_error(bank):
    with pytest.raises(ValueError, match=r"scores: got shape \(40, 12\); .*\(12, 40\)"):
        lds(np.zeros((40, 12)), bank)
    bad = np.zeros((12, 40))
    bad[2, 7] = np.inf
    with pytest.raises(ValueError, match="test example 2, training example 7 is inf"):
        lds(bad, bank)
    with pytest.raises(ValueError, match="2 subsets"):
        lds(np.zeros((12, 40)), Bank(bank.subsets[:2], bank.outputs[:2]))
    with pytest.raises(ValueError, match=r"confidence=1\.5"):
        lds(np.zeros((12, 40)), bank, confidence=1.5)


def test_a_difference_is_that_of_the_means_on_the_same_resamples(rng):
    subsets, weights = masks(40, 40, rng), rng.normal(size=(30, 40))
    bank = Bank(subsets, np.repeat((weights @ subsets.T).T[:, None], 2, axis=1) + rng.normal(size=(40, 2, 30)))
    good, better = weights + rng.normal(size=weights.shape), weights + rng.normal(size=weights.shape) * 0.8
    found = lds_difference(better, good, bank)
    one, two = lds(better, bank), lds(good, bank)
    assert found.mean == pytest.approx(one.mean - two.mean)
    np.testing.assert_allclose(found.per_example, one.per_example - two.per_example)
    assert found.interval[0] < found.mean < found.interval[1]
    # what is hard for both cancels
    assert found.interval[1] - found.interval[0] < one.interval[1] - two.interval[0]
    back = lds_difference(good, better, bank)
    assert back.interval == pytest.approx((-found.interval[1], -found.interval[0]))
    same = lds_difference(good, good, bank)
    assert (same.mean, *same.interval) == (0, 0, 0)
    assert "LDS difference" in repr(found)


def test_the_interval_of_a_difference_covers_the_truth(rng):
    """Two scores of equal quality: the interval of their difference holds zero about as often as it says."""
    held = 0
    for _ in range(60):
        subsets, weights = masks(40, 30, rng), rng.normal(size=(20, 30))
        bank = Bank(subsets, (weights @ subsets.T).T[:, None] + 3 * rng.normal(size=(40, 1, 20)))
        one, two = (weights + rng.normal(size=weights.shape) for _ in range(2))
        low, high = lds_difference(one, two, bank, bootstrap=300).interval
        held += low <= 0 <= high
    assert 50 <= held <= 60


def test_a_baseline_of_another_shape_is_named(bank, rng):
    with pytest.raises(ValueError, match=r"baseline: got shape \(12, 39\)"):
        lds_difference(rng.normal(size=(12, 40)), rng.normal(size=(12, 39)), bank)
    with pytest.raises(ValueError, match="bootstrap=0: expected a whole number of at least 1"):
        lds_difference(rng.normal(size=(12, 40)), rng.normal(size=(12, 40)), bank, bootstrap=0)


def residual(of, given):
    """Ranks less what the others' ranks say of them, by least squares."""
    design = np.stack([np.ones(len(of)), *map(rankdata, given)], axis=1)
    x = rankdata(of)
    return x - design @ np.linalg.lstsq(design, x, rcond=None)[0]


def of_residuals(x, y, *given):
    return pearsonr(residual(x, given), residual(y, given)).statistic


@pytest.mark.parametrize("several", [1, 3])
def test_the_partial_lds_is_the_correlation_of_what_baselines_leave_of_the_ranks(bank, rng, several):
    scores, *baselines = np.round(rng.normal(size=(1 + several, 12, 40)))
    baselines[-1] += baselines[0] + scores
    found = partial_lds(scores, baselines if several > 1 else baselines[0], bank, bootstrap=0)
    sums, *known = (x @ bank.subsets.T for x in (scores, *baselines))
    truth = bank.outputs.astype(np.float64).mean(1).T
    expected = [of_residuals(*rows) for rows in zip(sums, truth, *known, strict=True)]
    np.testing.assert_allclose(found.per_example, expected, atol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))
    assert repr(found).startswith("partial LDS ")
    again = partial_lds(scores, tuple(byline.Scores(b) for b in baselines[::-1]), bank, bootstrap=0)
    np.testing.assert_allclose(again.per_example, found.per_example, atol=1e-12)


def test_the_bootstrap_of_the_partial_lds_is_that_of_residuals(rng):
    from byline.evaluate.lds import _resample

    predicted, *given = np.round(2 * rng.normal(size=(3, 6, 15)))
    actual = rng.normal(size=(6, 15)) + given[0]
    got = _resample(predicted, actual, 40, np.random.default_rng(3), *given)
    draws = np.random.default_rng(3)
    subset_counts = draws.multinomial(15, np.full(15, 1 / 15), 40)
    row_counts = draws.multinomial(6, np.full(6, 1 / 6), 40)
    for value, subsets, rows in zip(got, subset_counts, row_counts, strict=True):
        s, r = np.repeat(np.arange(15), subsets), np.repeat(np.arange(6), rows)
        expected = np.mean([of_residuals(*(x[i, s] for x in (predicted, actual, *given))) for i in r])
        assert value == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("seeds", [2, 3])
def test_who_knows_the_truth_meets_the_partial_ceiling_and_a_baseline_has_nothing_beyond_itself(seeds, rng):
    """A half of the truth is the baselines', half is not, and noise of equal variance hides both."""
    one, two, rest = rng.normal(size=(3, 300, 200)) * np.sqrt([0.5, 0.5, 1])[:, None, None]
    subsets, known = masks(60, 200, rng), [one, two]
    truth = (one + two + rest) @ subsets.T
    truth = (truth - truth.mean(1, keepdims=True)) / truth.std(1, keepdims=True)
    bank = Bank(subsets, truth.T[:, None] + rng.normal(size=(60, seeds, 300)))
    found = partial_lds(one + two + rest, known, bank, bootstrap=0)
    assert found.mean == pytest.approx(found.ceiling, abs=0.03)
    assert found.ceiling < lds(one + two + rest, bank, bootstrap=0).ceiling - 0.05
    for known_already in (known, [one, one, two]):
        itself = partial_lds(2 * one, known_already, bank)
        assert itself.mean == 0
        assert itself.interval == (0, 0)
        assert itself.left_out == 0
        again = partial_lds(one + two + rest, known_already, bank, bootstrap=0)
        assert again.mean == pytest.approx(found.mean, abs=1e-9)
        assert again.ceiling == pytest.approx(found.ceiling, abs=1e-9)
    assert partial_lds(rest, known, bank, bootstrap=0).mean == pytest.approx(found.mean, abs=0.05)
    other = partial_lds(rng.normal(size=(300, 200)), known, bank)
    assert other.interval[0] < 0 < other.interval[1]


def test_what_a_baseline_explains_in_full_is_left_out(rng):
    subsets, weights = masks(25, 40, rng), rng.normal(size=(8, 40))
    bank = Bank(subsets, np.repeat((weights @ subsets.T).T[:, None], 2, axis=1))
    scores = rng.normal(size=(8, 40))
    assert np.isnan(partial_lds(scores, weights, bank).mean)
    assert partial_lds(scores, weights, bank).left_out == 8
    one = np.concatenate([weights[:1], rng.normal(size=(7, 40))])
    found = partial_lds(weights, one, bank)
    assert found.mean == pytest.approx(1)
    assert "1 constant or fully explained test examples left out" in repr(found)


@pytest.mark.parametrize(("subsets", "baselines"), [(16, 1), (16, 4), (50, 12)])
@pytest.mark.parametrize("useless", [True, False])
def test_the_partial_ceiling_makes_up_for_what_baselines_explain_by_chance(subsets, baselines, useless, rng):
    weights = rng.normal(size=(baselines + 1, 400, 200))
    chosen = masks(subsets, 200, rng)
    truth = (weights[0] if useless else weights.sum(0)) @ chosen.T
    truth = (truth - truth.mean(1, keepdims=True)) / truth.std(1, keepdims=True)
    bank = Bank(chosen, truth.T[:, None] + rng.normal(size=(subsets, 3, 400)))
    perfect = weights[0] if useless else weights.sum(0)
    found = partial_lds(perfect, list(weights[1:]), bank, bootstrap=0)
    assert found.mean < found.ceiling + 0.02
    assert found.mean == pytest.approx(found.ceiling, abs=0.08)


def test_as_many_baselines_as_are_let_through_keep_all_within_one(rng):
    bank = Bank(masks(20, 40, rng), rng.normal(size=(20, 2, 12)))
    scores, *baselines = rng.normal(size=(6, 12, 40))
    found = partial_lds(scores, baselines, bank)
    assert np.abs(found.per_example).max() <= 1
    assert -1 <= found.interval[0] < found.mean < found.interval[1] <= 1
    tiny = Bank(bank.subsets[:4], bank.outputs[:4])
    assert np.abs(partial_lds(scores, baselines[0], tiny, bootstrap=0).per_example).max() <= 1


def test_a_baseline_that_is_constant_for_an_example_says_nothing_of_it(bank, rng):
    scores, one, two = rng.normal(size=(3, 12, 40))
    two[3] = 0
    found = partial_lds(scores, [one, two], bank)
    assert found.left_out == 0
    assert found.per_example[3] == pytest.approx(partial_lds(scores, one, bank).per_example[3])
    np.testing.assert_allclose(
        partial_lds(scores, np.zeros((12, 40)), bank).per_example, lds(scores, bank).per_example, atol=1e-12
    )
    scores[5] = 0
    assert np.flatnonzero(np.isnan(partial_lds(scores, [one, two], bank).per_example)).tolist() == [5]


def test_left_out_examples_are_in_no_interval(bank, rng):
    scores, given = rng.normal(size=(2, 12, 40))
    bank = Bank(bank.subsets, bank.outputs + ((scores + given) @ bank.subsets.T).T[:, None])
    scores[0] = 0
    found = partial_lds(scores, given, bank, seed=4)
    alone = Bank(bank.subsets, bank.outputs[:, :, 1:])
    expected = partial_lds(scores[1:], given[1:], alone, seed=4)
    assert found.left_out == 1
    assert (found.mean, found.interval) == (pytest.approx(expected.mean), pytest.approx(expected.interval, abs=1e-6))
    assert found.ceiling == pytest.approx(
        np.sqrt((lds(scores, bank).ceiling ** 2 - share(given[1:], alone)) / (1 - share(given[1:], alone)))
    )


def share(given, bank):
    """Of the bank's ranks that a baseline explains, adjusted (Ezekiel 1930)."""
    squares = lds(given, bank, bootstrap=0).per_example ** 2
    return np.mean(1 - (1 - squares) * (len(bank.subsets) - 1) / (len(bank.subsets) - 2))


def test_the_difference_of_two_partial_lds_is_on_the_same_resamples(bank, rng):
    one, two, three, four = rng.normal(size=(4, 12, 40))
    found = lds_difference(one, two, bank, given=[three, four])
    first, second = (partial_lds(x, [three, four], bank) for x in (one, two))
    np.testing.assert_allclose(found.per_example, first.per_example - second.per_example, atol=1e-12)
    assert found.mean == pytest.approx(first.mean - second.mean)
    assert found.interval[0] < found.mean < found.interval[1]
    near = lds_difference(one, one + 1e-3 * two, bank, given=three)
    assert near.interval[1] - near.interval[0] < 0.3 * (found.interval[1] - found.interval[0])
    same = lds_difference(three, three, bank, given=[three, four])
    assert (same.mean, same.interval) == (0, (0, 0))
    with pytest.raises(ValueError, match=r"given\[1\]: got shape"):
        lds_difference(one, two, bank, given=[three, four[:3]])


def test_the_partial_lds_names_a_bad_baseline(bank):
    scores = np.zeros((12, 40))
    with pytest.raises(ValueError, match=r"baselines: got shape \(40, 12\); .*\(12, 40\)"):
        partial_lds(scores, np.zeros((40, 12)), bank)
    with pytest.raises(ValueError, match=r"baselines\[1\]: got shape \(40, 12\); .*\(12, 40\)"):
        partial_lds(scores, [scores, np.zeros((40, 12))], bank)
    for many in (0, 8):
        with pytest.raises(ValueError, match=f"baselines: got {many} for a bank of 30 subsets; expected at least one"):
            partial_lds(scores, [scores] * many, bank)
    row = scores[0]
    for odd in (None, row, scores[None], np.full((12, 40), None), scores * 1j, "linear", {}):
        for given, name in (([scores, odd], r"baselines\[1\]"), (odd, "baselines"), ([odd], r"baselines(\[0\])?")):
            with pytest.raises(ValueError, match=f"^{name}: got "):
                partial_lds(scores, given, bank)
    with pytest.raises(ValueError, match=r"^baselines: got a list that is no matrix"):
        partial_lds(scores, [[1, 2], [3]], bank)
    with pytest.raises(ValueError, match="bank is a ndarray; expected a"):
        partial_lds(scores, bank, scores)
    with pytest.raises(ValueError, match="bootstrap"):
        partial_lds(scores, scores.tolist(), bank, bootstrap=-1)
