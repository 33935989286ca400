"""What people do with scores, on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
from byline.uses import find_mislabels, out_of_sample_loss, select, shares
from byline.votes import Votes

CLASSES = 3


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, CLASSES))


@pytest.fixture(scope="module")
def blobs():
    """Three clouds, a tenth of whose labels is wrong, and models trained on them as they are."""
    torch.manual_seed(0)
    truth = torch.arange(180) % CLASSES
    x = torch.randn(180, 4) * 0.7 + 3 * torch.eye(4)[truth]
    given, flipped = byline.flip_labels(truth, 0.1, CLASSES)
    train = TensorDataset(x, torch.as_tensor(given))
    task = byline.Task(build().eval())
    trainer = byline.Trainer(build, byline.Recipe(lr=0.1, batch_size=20, epochs=15), task.loss)
    models = [trainer(train, seed) for seed in range(3)]
    attributor = byline.TRAK(task, byline.Independent(models), progress=False).fit(train)
    return attributor, truth.numpy(), given, flipped, trainer


# mislabels


def test_wrong_labels_come_first_with_the_right_ones_suggested(blobs):
    attributor, truth, given, flipped, _ = blobs
    found = find_mislabels(attributor, given, rows=18)
    assert byline.mislabel_detection(found.every, flipped).mean > 0.97
    hits = flipped[found.index]
    assert hits.mean() > 0.8
    assert (found.suggested[hits] == truth[found.index][hits]).mean() > 0.9
    assert (np.diff(found.suspicion) <= 0).all()
    assert (found.stderr > 0).all()
    np.testing.assert_array_equal(found.given, given[found.index])
    # evidence: other examples, which carry other labels where the label is wrong
    assert (found.evidence.indices != found.index[:, None]).all()
    assert (found.evidence.scores[hits] < 0).all()
    np.testing.assert_array_equal(found.evidence_labels, given[found.evidence.indices])


def test_scores_of_the_training_set_on_itself_say_the_same(blobs):
    attributor, _, given, _, _ = blobs
    one = find_mislabels(attributor, given, rows=10, loss=np.zeros(180))
    two = find_mislabels(attributor.attribute(attributor._train_set), given, rows=10)
    np.testing.assert_allclose(one.score, two.score, rtol=1e-3)
    np.testing.assert_array_equal(one.index, two.index)
    # what scores say of others carries their residuals, which evidence from an attributor leaves out
    assert (two.evidence.scores < 0).all()


def test_trusted_examples_tell_who_harms_them(blobs):
    attributor, _, given, flipped, _ = blobs
    torch.manual_seed(1)
    labels = torch.arange(60) % CLASSES
    trusted = TensorDataset(torch.randn(60, 4) * 0.7 + 3 * torch.eye(4)[labels], labels)
    found = find_mislabels(attributor.attribute(trusted), given, trusted=labels)
    assert byline.mislabel_detection(found.every, flipped).mean > 0.9
    hits = flipped[found.index]
    assert (found.suggested[hits] != found.given[hits]).mean() > 0.8


def test_the_loss_out_of_sample_is_of_models_that_did_not_see_the_example(blobs):
    attributor, _, given, flipped, trainer = blobs
    train = attributor._train_set
    loss = out_of_sample_loss(trainer, train, attributor.task, folds=3, progress=False)
    assert byline.mislabel_detection(loss, flipped).mean > 0.97
    seen: list[set[int]] = []

    def watched(subset, seed):
        seen.append(set(subset.indices))
        return build()

    out_of_sample_loss(watched, train, attributor.task, folds=4, progress=False)
    assert len(seen) == 4
    # every example is left out once, by the model that judges it
    assert all(sum(i not in one for one in seen) == 1 for i in range(180))
    with_it = find_mislabels(attributor, given, loss=loss)
    assert "the loss given" in with_it.source


def test_either_ranking_alone_may_be_asked_for(blobs):
    attributor, _, given, _, _ = blobs
    values, loss = attributor.self_influence(), np.random.default_rng(0).random(180)
    for by, want in (("score", values), ("loss", loss)):
        found = find_mislabels(attributor, given, loss=loss, by=by, rows=180, evidence=1)
        np.testing.assert_array_equal(found.index, np.argsort(-want, kind="stable"))
        np.testing.assert_array_equal(found.loss, loss[found.index])
    assert find_mislabels(attributor, given, loss=loss, by="loss", rows=1).source == "the loss given"


def test_the_table_has_a_row_each(blobs):
    attributor, _, given, _, _ = blobs
    found = find_mislabels(attributor, given, rows=7, evidence=4, names=["a", "b", "<b>c"])
    table = found.to_dataframe()
    assert list(table.columns) == [
        *("index", "suspicion", "score", "stderr", "loss"),
        *("given_label", "suggested_label", "support", "evidence"),
    ]
    assert len(table) == 7
    assert len(table.evidence[0]) == 4
    assert set(table.given_label) <= {"a", "b", "<b>c"}
    assert "7 of 180 training examples" in repr(found)


def test_labels_may_be_words(blobs):
    attributor, _, given, _, _ = blobs
    words = np.array(["cat", "dog", "eel"])[given]
    one, two = find_mislabels(attributor, given), find_mislabels(attributor, words.tolist())
    np.testing.assert_array_equal(one.index, two.index)
    np.testing.assert_array_equal(np.array(["cat", "dog", "eel"])[one.suggested], two.suggested)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": np.zeros(3)}, r"labels has shape \(3,\); expected \(180,\)"),
        ({"rows": 0}, "rows is 0"),
        ({"evidence": True}, "evidence is True"),
        ({"loss": np.zeros(4)}, r"loss has shape \(4,\); expected \(180,\) finite"),
        ({"by": "rank"}, "by is 'rank'"),
        ({"source": byline.Scores(np.random.default_rng(0).random((180, 180))), "by": "loss"}, "where there is a loss"),
        ({"names": ["a"]}, "labels: expected whole numbers from 0 to 0, the places in names"),
        ({"trusted": np.zeros(5)}, "self-influence takes none"),
        (
            {"source": byline.Scores(np.ones((5, 180)))},
            "5 test and 180 training examples; expected the training set on",
        ),
        ({"source": byline.Scores(np.eye(180))}, "every training example the same score, 1"),
    ],
)
def test_what_is_wrong_with_mislabels_is_named(blobs, change, said):
    attributor, _, given, _, _ = blobs
    with pytest.raises(ValueError, match=said):
        find_mislabels(**{"source": attributor, "labels": given, **change})


# shares


def votes_of(values: np.ndarray) -> Votes:
    values = np.asarray(values, np.float32)
    return Votes(values, np.ones(len(values)), None, np.arange(len(values)))


def test_shares_of_a_case_worked_by_hand():
    scores = np.array([[3.0, -1.0, 1.0, 1.0], [-1.0, -1.0, 0.0, 4.0]])
    owners = ["ann", "ann", "bob", "cleo"]
    assert shares(scores, owners).works.value.tolist() == [[0.5, 0.25, 0.25], [0, 0, 1]]
    np.testing.assert_allclose(shares(scores, owners, scheme="clipped").works.value[0], [0.6, 0.2, 0.2])
    assert shares(scores, owners, scheme="equal").catalogue.value.tolist() == [0.5, 0.25, 0.25]
    found = shares(scores, owners)
    assert found.contributions.value.tolist() == [[2, 1, 1], [-2, 0, 4]]
    assert found.catalogue.value.tolist() == [0.25, 0.125, 0.625]
    assert found.to_dataframe().owner.tolist() == ["cleo", "ann", "bob"]
    assert found.to_dataframe(0).owner.tolist()[0] == "ann"
    assert np.isnan(found.works.low).all()
    assert "cleo: 62.5 %" in repr(found)


def test_a_work_to_which_nobody_contributed_has_no_shares():
    found = shares(np.array([[-1.0, -2.0], [1.0, 1.0]]), ["a", "b"])
    assert found.works.value.tolist() == [[0, 0], [0.5, 0.5]]
    assert found.catalogue.value.tolist() == [0.5, 0.5]


def test_a_split_catalogue_gets_what_the_whole_got():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20, 60)) + 0.5
    whole = np.repeat(["a", "b", "c"], 20).astype(object)
    split = whole.copy()
    split[rng.permutation(20)[:7]] = "a, other name"
    for scheme in ("clipped", "equal"):
        one, two = shares(scores, whole, scheme=scheme), shares(scores, split, scheme=scheme)
        together = two.works.value[:, [i for i, owner in enumerate(two.owners) if owner.startswith("a")]].sum(1)
        np.testing.assert_allclose(together, one.works.value[:, 0], rtol=1e-5)
    # of net contributions that holds where no part is negative
    one, two = shares(np.abs(scores), whole), shares(np.abs(scores), split)
    together = two.works.value[:, :2].sum(1)
    np.testing.assert_allclose(together, one.works.value[:, 0], rtol=1e-5)


def test_intervals_hold_the_shares_of_the_truth():
    """Members are the truth and noise of their own: the intervals of shares cover those of the truth."""
    rng, inside = np.random.default_rng(0), []
    truth = np.array([[3.0, 1.0, 2.0, 2.0]])
    want = np.array([0.5, 0.25, 0.25])
    for _ in range(60):
        noisy = truth + 0.5 * rng.normal(size=(15, 1, 4))
        found = shares(votes_of(noisy), ["a", "a", "b", "c"])
        inside.append((found.works.low[0] <= want) & (want <= found.works.high[0]))
    assert 0.85 <= np.mean(inside) <= 0.99
    assert found.catalogue.low[0] < found.catalogue.value[0] < found.catalogue.high[0]


def test_owners_must_be_there():
    scores = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"owners has shape \(2,\); expected \(3,\)"):
        shares(scores, ["a", "b"])
    with pytest.raises(ValueError, match=r"training example 1 has none \(2 in all\)"):
        shares(scores, np.array(["a", None, ""], dtype=object))
    with pytest.raises(ValueError, match="scheme is 'fair'"):
        shares(scores, ["a", "b", "c"], scheme="fair")
    with pytest.raises(ValueError, match="not finite"):
        shares(np.full((1, 3), np.nan), ["a", "b", "c"])


# selection


def test_the_best_are_kept_and_the_worst_dropped_first():
    scores = np.array([[1.0, -2.0, 0.5, 3.0], [1.0, -2.0, 0.5, 1.0]])
    found = select(scores, 2)
    assert found.keep.tolist() == [3, 0]
    assert found.drop.tolist() == [1, 2]
    assert found.mask.tolist() == [True, False, False, True]
    assert select(scores, 0.25).keep.tolist() == [3]


def test_copies_are_kept_once():
    rng = np.random.default_rng(0)
    good = rng.normal(size=(12, 1)) + 1.5
    others = rng.normal(size=(12, 6)) + 0.8
    scores = np.concatenate([np.repeat(good, 10, axis=1), others], axis=1)
    assert set(select(scores, 5).keep.tolist()) <= set(range(10))
    diverse = select(scores, 5, diversity=0.9)
    assert sum(place < 10 for place in diverse.keep.tolist()) == 1
    assert diverse.keep[0] == 0


def test_groups_keep_their_shares_or_the_same():
    rng = np.random.default_rng(0)
    scores, groups = rng.normal(size=(5, 100)), np.repeat(["a", "b", "c"], [60, 35, 5])
    assert select(scores, 20, groups=groups, per_group="same").groups == {"a": 12, "b": 7, "c": 1}
    assert select(scores, 30, groups=groups, per_group="balanced").groups == {"a": 13, "b": 12, "c": 5}
    free = select(scores, 20, groups=groups)
    assert sum(free.groups.values()) == 20
    np.testing.assert_array_equal(free.keep, select(scores, 20).keep)
    same = select(scores, 20, groups=groups, per_group="same", diversity=0.5)
    assert len(set(same.keep.tolist())) == 20


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": 11}, "an int from 1 to the 10 training"),
        ({"budget": "half"}, "budget is 'half'"),
        ({"diversity": 2}, "diversity is 2"),
        ({"per_group": "same"}, "needs groups"),
        ({"per_group": "fair"}, "per_group is 'fair'"),
        ({"groups": [1, 2]}, r"groups has shape \(2,\)"),
        ({"scores": np.full((2, 10), np.inf)}, "finite"),
    ],
)
def test_what_is_wrong_with_a_selection_is_named(change, said):
    with pytest.raises(ValueError, match=said):
        select(**{"scores": np.ones((2, 10)), "budget": 3, **change})
