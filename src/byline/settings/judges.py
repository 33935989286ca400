"""The measures of a grid: how each judges a cell, and what stands beside it for comparison."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.utils.data import TensorDataset

from byline.evaluate.bank import Bank, read, write
from byline.evaluate.detection import class_detection
from byline.evaluate.lds import lds, lds_difference, partial_lds
from byline.evaluate.loo import leave_one_out, leave_one_out_subsets
from byline.evaluate.mislabel import flip_labels, mislabel_detection
from byline.evaluate.overlap import topk_overlap
from byline.evaluate.removal import brittleness, removal_curve
from byline.evaluate.retraining import retrain
from byline.scores import Scores
from byline.settings import controls
from byline.settings.base import Setting
from byline.settings.bench import made_with
from byline.settings.workshop import Workshop
from byline.uses.mislabels import held_out_losses

if TYPE_CHECKING:
    from byline.settings.grid import Cell

FLIPPED = 0.1
TOP = 10
FOLDS = 5
LEVEL = 0.95


class Judge(ABC):
    """One measure."""

    name: ClassVar[str]
    title: ClassVar[str]
    says: ClassVar[str]
    """What is measured, in a sentence."""
    asked: ClassVar[bool] = False
    """Whether it is measured only when named: each cell needs models of its own, or it is about another measure."""
    banks: ClassVar[bool] = False
    """Whether it needs the setting's bank."""
    labels: ClassVar[bool] = False
    """Whether it needs a label per example."""
    chance: ClassVar[float] = 0.0
    """What says nothing scores: where the heat map starts."""

    @abstractmethod
    def __call__(self, cell: Cell, flipped: Cell | None, scores: Scores, bank: Bank | None) -> dict[str, Any] | None:
        """Mean and interval of a cell; None where it is not measured."""

    def across(self, cells: list[dict[str, Any]]) -> None:  # noqa: B027 - most judge a cell by itself
        """What can only be said when all cells are there."""

    def baselines(self, shop: Workshop, flipped: Workshop | None) -> list[dict[str, Any]]:
        """What does without attribution, in the same measure."""
        return []

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {"name": self.name, "title": self.title, "says": self.says, "chance": self.chance}


class LDSJudge(Judge):
    """The linear datamodeling score."""

    name, title = "lds", "LDS"
    says = "Rank correlation of the scores with what retraining on random halves did (linear datamodeling score)."
    banks = True

    def __call__(self, cell: Cell, flipped: Cell | None, scores: Scores, bank: Bank | None) -> dict[str, Any]:
        """Against the bank."""
        assert bank is not None
        self.bank = bank
        found = lds(scores, bank, confidence=LEVEL)
        return _figure(found)

    def across(self, cells: list[dict[str, Any]]) -> None:
        """What an ensemble adds to one model's scores, on the same resamples."""
        done = [cell for cell in cells if not cell["refused"]]
        ones = {
            cell["method"]: cell["_scores"] for cell in done if cell["kind"] == "independent" and cell["models"] == 1
        }
        for cell in done:
            one = ones.get(cell["method"])
            if one is not None and cell["_scores"] is not one and cell["measures"].get(self.name):
                gain = lds_difference(cell["_scores"], one, self.bank, confidence=LEVEL)
                low, high = gain.interval
                cell["measures"][self.name]["gain"] = {"mean": gain.mean, "low": low, "high": high}


class BeyondJudge(Judge):
    """The partial LDS given what never saw trained weights."""

    name, title = "beyond", "Partial LDS"
    says = (
        "Rank correlation of the scores with what retraining on random halves did, beyond what is foretold by scores "
        "that never saw trained weights; those are below the LDS. It has a scale of its own."
    )
    banks = asked = True
    known: Mapping[str, np.ndarray] | None = None
    bank: Bank

    def __call__(self, cell: Cell, flipped: Cell | None, scores: Scores, bank: Bank | None) -> dict[str, Any] | None:
        """Against the bank; None where it has too few subsets."""
        assert bank is not None
        if self.known is None:
            self.bank, self.known = bank, self._kept(cell, len(bank.subsets) // 4)
        if not self.known:
            return None
        found = partial_lds(scores, list(self.known.values()), bank, confidence=LEVEL)
        ceiling = found.ceiling if np.isfinite(found.ceiling) else None
        return {**_figure(found), "ceiling": ceiling}

    def _kept(self, cell: Cell, most: int) -> dict[str, np.ndarray]:
        """As much as a bank allows to be known: found, or made and kept."""
        shop, queries, made = cell.shop, cell.queries, {}
        test_set = torch.utils.data.Subset(shop.setting.test_set, range(queries))
        for title, make in list(controls.every(shop.setting, test_set).items())[:most]:
            key = shop.key(part="control", title=title, queries=queries, **made_with(shop.setting))
            path = shop.folder / "controls" / f"{key}.safetensors"
            if not path.exists():
                shop.tell(f"{title}: scores to be known")
                write(path, {"scores": np.ascontiguousarray(make())}, {"title": title})
            made[title] = read(path)[0]["scores"]
        return made

    def baselines(self, shop: Workshop, flipped: Workshop | None) -> list[dict[str, Any]]:
        """The LDS of what is taken as known."""
        return [
            {
                "measure": LDSJudge.name,
                "title": title,
                "note": "never saw trained weights",
                **_figure(lds(values, self.bank, confidence=LEVEL)),
            }
            for title, values in (self.known or {}).items()
        ]


class MislabelJudge(Judge):
    """Flipped labels found by self-influence."""

    name, title, chance, labels = "mislabel", "Mislabels, ROC-AUC", 0.5, True
    says = (
        f"ROC-AUC of finding the {FLIPPED * 100:g} % of training labels that were flipped, by self-influence under "
        "models trained on the flipped labels."
    )
    too_dear = ("influence-cg", "influence-lissa")

    def __call__(self, cell: Cell, flipped: Cell | None, scores: Scores, bank: Bank | None) -> dict[str, Any] | None:
        """Not where the curvature would be solved for each training example by iteration."""
        assert flipped is not None
        if cell.info.name in self.too_dear:
            return None
        try:
            suspicion = flipped.suspicion()
        except (ValueError, TypeError, NotImplementedError):
            return None
        found = mislabel_detection(suspicion, mask_of(flipped.shop.setting))
        return {**_figure(found), "average_precision": float(found.details["average_precision"])}

    def baselines(self, shop: Workshop, flipped: Workshop | None) -> list[dict[str, Any]]:
        """The loss of each training example: under models that saw it, and under models that did not."""
        assert flipped is not None
        setting = flipped.setting
        lines = []
        for title, losses, flops in (
            ("loss in the sample, 1 model", *in_sample(flipped, 1)),
            (f"loss out of the sample, {FOLDS} folds", *out_of_sample(flipped)),
        ):
            found = mislabel_detection(losses, mask_of(setting))
            lines.append(
                {
                    "measure": self.name,
                    "title": title,
                    "flops": flops,
                    **_figure(found),
                    "average_precision": float(found.details["average_precision"]),
                }
            )
        return lines


class ClassJudge(Judge):
    """The identical-class test."""

    name, title, labels = "class", "Same class", True
    says = f"Share of the {TOP} strongest proponents that have the test example's label."

    def __call__(self, cell: Cell, flipped: Cell | None, scores: Scores, bank: Bank | None) -> dict[str, Any]:
        """Against the labels."""
        setting = cell.shop.setting
        train, test = labels_of(setting.train_set), labels_of(setting.test_set)
        return _figure(class_detection(scores, train, test[: len(scores.values)], k=TOP))


class OverlapJudge(Judge):
    """Agreement with the naive ensemble of most models."""

    name, title = "overlap", "Top-10 overlap"
    says = f"Share of the {TOP} strongest proponents that the same method also names under most independent models."

    def __call__(self, cell: Cell, flipped: Cell | None, scores: Scores, bank: Bank | None) -> dict[str, Any] | None:
        """Filled in by `across`."""
        return None

    def across(self, cells: list[dict[str, Any]]) -> None:
        """Each cell against its method's largest naive ensemble."""
        for done in cells:
            naive = [
                c for c in cells if c["method"] == done["method"] and c["kind"] == "independent" and "_scores" in c
            ]
            if not naive or "_scores" not in done:
                continue
            best = max(naive, key=lambda c: c["models"])
            if best is not done:
                done["measures"][self.name] = _figure(topk_overlap(done["_scores"], best["_scores"], TOP))


class LOOJudge(Judge):
    """Leave-one-out correlation."""

    name, title = "loo", "Leave-one-out"
    removed, seeds = 50, 8
    says = (
        f"Rank correlation of the scores of {removed} training examples with what retraining without each of them did."
    )
    asked = True

    def __call__(self, cell: Cell, flipped: Cell | None, scores: Scores, bank: Bank | None) -> dict[str, Any]:
        """Against a bank of its own, shared by all cells."""
        setting, folder = cell.shop.setting, cell.shop.folder
        n = len(setting.train_set)
        chosen = np.random.default_rng(0).choice(n, min(self.removed, n), replace=False)
        own = retrain(
            setting.trainer(),
            setting.train_set,
            test_set=setting.test_set,
            task=setting.task(),
            subsets=leave_one_out_subsets(n, chosen),
            seeds=self.seeds,
            path=folder / f"loo-{cell.shop.key(part='loo', seeds=self.seeds, removed=self.removed)}.safetensors",
            progress=cell.progress,
            engine=cell.shop.engine,
        )
        own = Bank(own.subsets, own.outputs[:, :, : len(scores.values)], own.metadata)
        return _figure(leave_one_out(scores, own))


class _Removing(Judge):
    """Retraining without what the scores say is strongest."""

    share = 0.02
    asked = True
    curve: ClassVar[Callable[..., Any]]

    def __call__(self, cell: Cell, flipped: Cell | None, scores: Scores, bank: Bank | None) -> dict[str, Any]:
        """Ten test examples, two models each."""
        setting = cell.shop.setting
        size = max(1, round(self.share * len(setting.train_set)))
        found = type(self).curve(
            scores,
            setting.trainer(),
            setting.train_set,
            test_set=setting.test_set,
            task=setting.task(),
            sizes=[size],
            examples=10,
            seeds=2,
            path=cell.shop.folder / self.name / f"{cell.key}.safetensors",
            progress=cell.progress,
        )
        return _figure(found)


class RemovalJudge(_Removing):
    """Removing the strongest proponents."""

    name, title = "removal", "Removal"
    curve = staticmethod(removal_curve)
    says = (
        f"Fall of the test output when the {_Removing.share * 100:g} % of the training set with the strongest scores "
        "are removed and the model trained again, beyond the fall when as many random examples are."
    )


class BrittlenessJudge(_Removing):
    """Predictions turned by removing few examples."""

    name, title, labels = "brittleness", "Brittleness", True
    curve = staticmethod(brittleness)
    says = (
        f"Share of test examples that were right whose prediction turns when the {_Removing.share * 100:g} % of the "
        "training set with the strongest scores are removed."
    )


JUDGES: dict[str, type[Judge]] = {
    judge.name: judge
    for judge in (
        LDSJudge,
        BeyondJudge,
        MislabelJudge,
        ClassJudge,
        OverlapJudge,
        LOOJudge,
        RemovalJudge,
        BrittlenessJudge,
    )
}
"""Every measure, by its name on the command line."""


def _figure(found: Any) -> dict[str, Any]:
    low, high = found.interval
    figures = {"mean": float(found.mean), "low": float(low), "high": float(high)}
    return {key: value if np.isfinite(value) else None for key, value in figures.items()}


# the flipped labels, and the losses that do without attribution


def relabelled(setting: Setting, fraction: float = FLIPPED, seed: int = 0) -> Setting:
    """The setting with a share of its training labels flipped to other classes."""

    def load() -> tuple[Any, Any]:
        x, y = setting.train_set.tensors
        flipped, _ = flip_labels(y.numpy(), fraction, len(setting.class_names), seed)
        return TensorDataset(x, torch.from_numpy(np.asarray(flipped))), setting.test_set

    return replace(setting, name=f"{setting.name}, {fraction * 100:g} % of labels flipped", load=load)


def mask_of(flipped: Setting, fraction: float = FLIPPED, seed: int = 0) -> np.ndarray:
    """(n_train,) which labels `relabelled` flipped: known from the draw alone."""
    labels = labels_of(flipped.train_set)
    return flip_labels(labels, fraction, len(flipped.class_names), seed)[1]


def labels_of(dataset: Any) -> np.ndarray:
    """(n,) the labels of a dataset of (input, label)."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1].numpy()
    return np.array([int(dataset[i][-1]) for i in range(len(dataset))])


def in_sample(shop: Workshop, models: int) -> tuple[np.ndarray, float]:
    """(n_train,) the mean loss of each training example under fully trained models, and their training FLOPs."""
    trained = shop.models(models)
    losses = [_losses(shop.setting, one.state, shop.setting.train_set) for one in trained]
    return np.mean(losses, 0), sum(one.cost.flops for one in trained)


def out_of_sample(shop: Workshop, folds: int = FOLDS) -> tuple[np.ndarray, float]:
    """(n_train,) the loss of each training example under a model trained on the other folds, and the FLOPs of all."""
    setting = shop.setting
    n = len(setting.train_set)
    fold = np.random.default_rng(0).permutation(n) % folds
    seeds = [1000 + f for f in range(folds)]
    losses, runs = held_out_losses(setting.trainer(), setting.train_set, setting.task(), fold, seeds)
    return losses, sum(run.flops for run in runs)


def _losses(setting: Setting, state: dict[str, torch.Tensor], dataset: Any) -> np.ndarray:
    model = setting.build().eval()
    model.load_state_dict(state)
    task = setting.task(model)
    with torch.no_grad():
        parts = [task.loss(model, tuple(t[i : i + 256] for t in dataset.tensors)) for i in range(0, len(dataset), 256)]
    return torch.cat(parts).numpy()
