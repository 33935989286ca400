"""Which training examples carry a wrong label, in the order in which to look at them.

Two kinds of evidence, ranked together:

- **self-influence**: how much training on an example itself moves the model's output on it. A label that nothing else
  in the training set supports must be learnt by heart (Koh & Liang 2017, section 5.4; Pruthi et al. 2020, section 4).
- **loss**: how badly the example's label fits what the model says of it, best of models that did not train on it
  (`out_of_sample_loss`; Northcutt et al. 2021, "Confident Learning").

The examples to look at are the strongest opponents of the given label: those whose gradients pull its output down. Q
is left out of it where a method has one (`byline.Votes.kernel`): it is near zero for the well-learnt examples that show
best what the label should be, and large for other wrong labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch.utils.data import Subset

from byline import batches
from byline.ensembles.base import check_count
from byline.evaluate.measure import labels_of
from byline.evaluate.retraining import model_of, train_each
from byline.methods.base import Attributor
from byline.progress import bar
from byline.scores import Ranked, Scores

if TYPE_CHECKING:
    import pandas as pd

    from byline.task import Task

Array = np.ndarray

_ROOM = 2**26  # numbers that votes may take in memory


@dataclass(frozen=True, eq=False)
class Mislabels:
    """Suspicious training examples, the most suspicious first.

    Attributes:
        index: (rows,) places in the training set.
        suspicion: (rows,) what they are ranked by: the share of training examples that are less suspicious, 0 to 1.
        score: (rows,) self-influence, or what the scores said; positive is suspicious.
        stderr: (rows,) its standard error over members; NaN where there is a single one.
        loss: (rows,) loss of the given label; NaN where there was none.
        given: (rows,) the labels as they are.
        suggested: (rows,) the labels that fit better: of classification the members' most probable other label, else
            the one that most of the evidence carries.
        support: (rows,) how much of what does not support the given label supports the suggested one: the share of
            the other labels' probability, or of the evidence by weight.
        evidence: The strongest opponents of each row, (rows, k).
        evidence_labels: (rows, k) their labels.
        every: (n_train,) the suspicion of all training examples, in the training set's order.
        source: What was ranked by, in words.
    """

    index: Array
    suspicion: Array
    score: Array
    stderr: Array
    loss: Array
    given: Array
    suggested: Array
    support: Array
    evidence: Ranked
    evidence_labels: Array
    every: Array = field(repr=False)
    source: str = ""

    def __len__(self) -> int:
        return len(self.index)

    def to_dataframe(self) -> pd.DataFrame:
        """A row each: index, suspicion, score, stderr, loss, given_label, suggested_label, support, evidence."""
        import pandas as pd

        return pd.DataFrame(
            {
                "index": self.index,
                "suspicion": self.suspicion,
                "score": self.score,
                "stderr": self.stderr,
                "loss": self.loss,
                "given_label": self.given,
                "suggested_label": self.suggested,
                "support": self.support,
                "evidence": self.evidence.indices.tolist(),
            }
        )

    def __repr__(self) -> str:
        lines = [f"Mislabels({len(self)} of {len(self.every)} training examples, by {self.source})"]
        for row in range(min(5, len(self))):
            error = "" if np.isnan(self.stderr[row]) else f" ± {self.stderr[row]:.2g}"
            lines.append(
                f"  {self.index[row]}: {self.given[row]}, perhaps {self.suggested[row]} "
                f"({self.support[row] * 100:.0f} % of what speaks against it); score {self.score[row]:.3g}{error}; "
                f"look at {', '.join(map(str, self.evidence.indices[row][:3]))}"
            )
        return "\n".join(lines)


def find_mislabels(
    source: Attributor | Scores | Array,
    labels: Any,
    *,
    rows: int = 50,
    evidence: int = 5,
    loss: Any = None,
    by: str = "both",
    trusted: Any = None,
    names: Sequence[str] | None = None,
) -> Mislabels:
    """Training examples whose labels are probably wrong.

    Args:
        source: One of

            - an attributor fitted on the training set as it is labelled: ranked by self-influence, with the mean
              members' loss where the task has labels and no ``loss`` is given;
            - `byline.Scores` (n_train, n_train) of the training set on itself: the same, from the diagonal;
            - `byline.Scores` (n_test, n_train) on examples whose labels are right, with ``trusted``: ranked by how much
              an example pushes the outputs of trusted examples down.
        labels: (n_train,) the labels as they are; whole numbers or strings.
        rows: How many examples to return, the most suspicious; evidence is gathered for these alone.
        evidence: How many opponents to give for each.
        loss: (n_train,) loss of each example, preferably of models that did not train on it (`out_of_sample_loss`).
        by: ``"both"`` ranks by the mean of the ranks by score and by loss (by score where there is none), ``"score"``
            and ``"loss"`` by one of them alone. Members that have not memorised, such as early checkpoints, rank best
            by loss; fully trained ones do not (docs/uses.md).
        trusted: (n_test,) labels of the trusted examples.
        names: What whole-number labels are called, in their order.

    Returns:
        A row per suspicious example.

    Raises:
        ValueError: Labels of another length, scores of a shape that is neither, or an argument out of range.
        RuntimeError: The attributor is not fitted.
    """
    if isinstance(source, Attributor):
        source._check_fitted()
        n = source.n_train_
    else:
        source = source if isinstance(source, Scores) else Scores(source)
        n = source.shape[1]
        if trusted is None and source.shape[0] != n:
            raise ValueError(
                f"source has scores for {source.shape[0]} test and {n} training examples; expected the training set on "
                "itself, or trusted= with the labels of the test examples"
            )
    given = labels_of(labels, n, "labels")
    check_count(rows, "rows")
    check_count(evidence, "evidence")
    if names is not None:
        given = _named(given, names, "labels")
    if isinstance(source, Attributor):
        if trusted is not None:
            raise ValueError("trusted is for scores on trusted examples; an attributor's self-influence takes none")
        score, stderr = source.self_influence(stderr=True)
        said = f"self-influence ({type(source).__name__}, {len(source.ensemble)} members)"
        if loss is None:
            loss, what = _members_loss(source), "the members' own loss"
        else:
            what = "the loss given"
    else:
        (score, stderr), what = _of_scores(source, trusted is not None), "the loss given"
        said = "harm to trusted examples" if trusted is not None else "the diagonal of the scores"
    if by not in ("both", "score", "loss") or (by == "loss" and loss is None):
        raise ValueError(f"by is {by!r}; expected 'both', 'score', or 'loss' where there is a loss")
    if by != "loss" and np.ptp(score) <= 1e-6 * np.abs(score).max():
        raise ValueError(
            f"source gives every training example the same score, {score[0]:.3g}: methods that normalise gradients say "
            "nothing of an example's influence on itself; use byline.TRAK, Influence, GradDot or KNNShapley"
        )
    ranks = rankdata(score)
    if loss is not None:
        loss = _loss(loss, n)
        if by != "score":
            ranks = rankdata(loss) if by == "loss" else rankdata(ranks + rankdata(loss))
            said = what if by == "loss" else f"{said} and {what}"
    suspicion = (ranks - 0.5) / n
    order = np.argsort(-suspicion, kind="stable")[: min(rows, n)]
    carried = given
    if isinstance(source, Attributor):
        found = _opponents(source, order, min(evidence, n - 1))
    elif trusted is None:
        found = _lowest(source.values[order], source.stderr[order], min(evidence, n - 1))
    else:
        told = labels_of(trusted, source.shape[0], "trusted")
        carried = told if names is None else _named(told, names, "trusted")
        # the trusted examples that each training example pushes down most
        found = _lowest(source.values[:, order].T, source.stderr[:, order].T, min(evidence, source.shape[0]))
    suggested, support = _vote(found, carried, given[order])
    if isinstance(source, Attributor) and source.task.name == "classification":
        suggested, support = source._as_whole(lambda made: _likely(made, order, given, suggested, support))
    return Mislabels(
        index=order,
        suspicion=suspicion[order],
        score=score[order],
        stderr=stderr[order],
        loss=np.full(len(order), np.nan) if loss is None else loss[order],
        given=given[order],
        suggested=suggested,
        support=support,
        evidence=found,
        evidence_labels=carried[found.indices],
        every=suspicion,
        source=said,
    )


def out_of_sample_loss(
    train_fn: Callable[..., Any],
    train_set: Any,
    task: Task,
    *,
    folds: int = 5,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> Array:
    """The loss of each training example under a model that did not train on it: the baseline, and a good one.

    Args:
        train_fn: As `byline.retrain` takes it: ``train_fn(subset_dataset, seed)`` giving a module or a state_dict, or a
            `byline.Trainer`.
        train_set: Any map-style torch Dataset.
        task: Whose loss is taken.
        folds: The training set is cut into so many parts; each is judged by a model trained on the others.
        seed: Of the cut and of the models.
        batch_size: Examples per batch.
        progress: Show a progress bar where stderr is a terminal.

    Returns:
        (n_train,) float64. It costs ``folds`` trainings on all but one part.

    Raises:
        ValueError: Fewer than 2 folds, or more than examples.
    """
    data = batches.as_dataset(train_set, "train_set")
    n = len(data)
    if not isinstance(folds, int) or isinstance(folds, bool) or not 2 <= folds <= n:
        raise ValueError(f"folds is {folds!r}; expected an int from 2 to the {n} training examples")
    fold = np.random.default_rng(seed).permutation(n) % folds
    with bar(folds, "out-of-sample loss", progress) as advance:
        seeds = [seed + f for f in range(folds)]
        return held_out_losses(train_fn, data, task, fold, seeds, batch_size, advance)[0]


def held_out_losses(
    train_fn: Any,
    data: Any,
    task: Task,
    fold: Array,
    seeds: Sequence[int],
    batch_size: int = 256,
    advance: Callable[[float], None] = lambda steps: None,
) -> tuple[Array, list[Any]]:
    """(n,) the loss of each example under the model that was trained on the other folds, and what was trained.

    Args:
        train_fn: As `byline.retrain` takes it.
        data: The examples.
        task: Whose loss is taken.
        fold: (n,) which part each example is in, from 0.
        seeds: Of the model that leaves out each part.
        batch_size: Examples per batch.
        advance: Is told of each model.
    """
    members = [(np.flatnonzero(fold != f), seed) for f, seed in enumerate(seeds)]
    out = np.empty(len(fold))
    trained = train_each(train_fn, data, members, advance)
    for f, one in enumerate(trained):
        model, places = model_of(task, one), np.flatnonzero(fold == f)
        for start, stop in batches.spans(len(places), batch_size):
            chosen = places[start:stop]
            with torch.no_grad():
                out[chosen] = task.loss(model, batches.gather(data, chosen.tolist())).cpu().numpy()
    return out, trained


def _of_scores(scores: Scores, trusted: bool) -> tuple[Array, Array]:
    if not np.isfinite(scores.values).all():
        raise ValueError("source has scores that are not finite")
    if not trusted:
        return np.diag(scores.values).astype(np.float64), np.diag(scores.stderr).astype(np.float64)
    # test examples share members, so their errors do not average out: the mean error is the safe one
    return -scores.values.mean(0, dtype=np.float64), scores.stderr.mean(0, dtype=np.float64)


def _members_loss(attributor: Attributor) -> Array | None:
    """(n_train,) the loss that the members' mean residual stands for; None where there is none."""
    task = attributor.task
    if task.name != "classification" or not getattr(attributor, "_voters", None):
        return None
    total = sum(voter.weight for voter in attributor._voters)
    if not total:
        return None
    wrong = sum(voter.weight / total * voter.residual.double() for voter in attributor._voters)
    return -torch.log1p(-torch.as_tensor(wrong).clamp(max=1 - 1e-12)).numpy()


def _opponents(attributor: Attributor, order: Array, k: int) -> Ranked:
    """The training examples that pull the outputs of others down most, but for the residual."""
    # votes of all members side by side: as many rows at a time as memory allows, for each pass reads the store once
    step = max(1, _ROOM // (len(attributor._voters) * attributor.n_train_))
    spans = batches.spans(len(order), step)
    parts = (attributor.votes(Subset(attributor._train_set, order[a:b].tolist())) for a, b in spans)
    kernels = np.concatenate([part.kernel() for part in parts])
    errors = np.full_like(kernels, np.nan)
    return _lowest(kernels, errors, k)


def _lowest(values: Array, errors: Array, k: int) -> Ranked:
    return Scores(np.ascontiguousarray(values), np.ascontiguousarray(errors)).top(k).opponents


def _likely(
    attributor: Attributor, order: Array, given: Array, suggested: Array, support: Array
) -> tuple[Array, Array]:
    """The members' most probable label other than the one given, and its share of the others' probability."""
    data, bench, task = attributor._train_set, attributor._bench, attributor.task
    members = attributor.ensemble.members()
    total: torch.Tensor | None = None
    for member in members:
        with bench.active(member, "residual") as active, torch.no_grad():
            parts = []
            for start, stop in batches.spans(len(order), attributor.batch_size):
                batch = batches.gather(data, order[start:stop].tolist(), attributor.collate)
                parts.append(task.natural(active.model, batches.to(batch, bench.device))[0][:, 0].softmax(1).cpu())
        found = torch.cat(parts).double() / len(members)
        total = found if total is None else total + found
    assert total is not None
    targets = _targets(attributor)
    own = torch.as_tensor([targets[i] for i in order])
    others = total.scatter(1, own[:, None], 0.0)
    best, left = others.argmax(1), others.sum(1)
    # what a class is called in the labels that were given, which need not be the task's numbers
    called = dict(zip(targets, given.tolist(), strict=True))
    for row, label in enumerate(best.tolist()):
        if label in called and float(left[row]) > 0:
            suggested[row], support[row] = called[label], float(others[row, label] / left[row])
    return suggested, support


def _targets(attributor: Attributor) -> list[int]:
    """(n_train,) the task's labels of the training examples."""
    data, out = attributor._train_set, []
    for start, stop in batches.spans(len(data), 1024):
        batch = batches.gather(data, list(range(start, stop)), attributor.collate)
        out += torch.as_tensor(attributor.task.targets(batch)).flatten().tolist()
    return out


def _vote(found: Ranked, labels: Array, given: Array) -> tuple[Array, Array]:
    """The label that the evidence carries by weight, other than the given one, and its share of the weight."""
    suggested, support = given.copy(), np.zeros(len(given))
    for row, (places, scores) in enumerate(zip(found.indices, found.scores, strict=True)):
        weights: dict[Any, float] = {}
        for label, score in zip(labels[places].tolist(), scores.tolist(), strict=True):
            if score < 0:
                weights[label] = weights.get(label, 0.0) - score
        others = {label: weight for label, weight in weights.items() if label != given[row]}
        if others:
            best = max(others, key=lambda label: others[label])
            suggested[row], support[row] = best, others[best] / sum(weights.values())
    return suggested, support


def _named(labels: Array, names: Sequence[str], name: str) -> Array:
    called = np.array([str(each) for each in names], dtype=object)
    if labels.dtype.kind not in "iu" or (len(labels) and not 0 <= labels.min() <= labels.max() < len(called)):
        raise ValueError(f"{name}: expected whole numbers from 0 to {len(called) - 1}, the places in names")
    return called[labels]


def _loss(loss: Any, n: int) -> Array:
    found = loss.detach().cpu().numpy() if isinstance(loss, torch.Tensor) else np.asarray(loss)
    if found.shape != (n,) or not np.isfinite(found).all():
        raise ValueError(f"loss has shape {found.shape}; expected ({n},) finite numbers")
    return found.astype(np.float64)
