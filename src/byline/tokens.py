"""Per-token attribution: for which token of a test sequence, which training sequences, and where in them.

On the test side, each explained token is an output of its own, f_t(z), the margin of that token alone; the output of
the whole sequence is the mean of its tokens'. On the training side, a sequence's gradient is the sum over its positions
of what flows through the model's layers there: for ``y_s = W x_s`` it is ``Σ_s g_s ⊗ x_s``, with g_s the gradient of
the sequence's own output or loss at y_s. Position s's part of a score is what its ``g_s ⊗ x_s`` alone would score. It
says through which position the example acts; the losses of later tokens are in it, because they look back.

Linear layers, embeddings and norms are split exactly, biases too. What has no position (a bare parameter, a layer that
only per-example autograd covers) is kept apart as ``rest``. Positions and rest add up to the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from byline import batches
from byline.features.base import Products, Rows
from byline.features.blocks import Block
from byline.methods.base import Attributor
from byline.methods.mean import RunningMean
from byline.scores import check_k

if TYPE_CHECKING:
    import pandas as pd

_IGNORED = -100


@dataclass(frozen=True)
class TokenScores:
    """Scores of P explained tokens, for n training sequences and their positions, T at most.

    Attributes:
        positions: (P,) places of the explained tokens in the test sequence.
        train: (n,) places of the training sequences in the training set, the strongest first.
        scores: (P, n) of whole training sequences: ``values`` over positions, and ``rest``.
        values: (P, n, T) of positions; NaN beyond a sequence's end.
        stderr: (P, n, T) their standard errors over members; NaN with one member.
        rest: (P, n) of what has no position.
        test_ids: (P,) the explained tokens.
        train_ids: per training sequence, its tokens.
        info: how the scores came about.
    """

    positions: np.ndarray
    train: np.ndarray
    scores: np.ndarray
    values: np.ndarray
    stderr: np.ndarray
    rest: np.ndarray
    test_ids: np.ndarray
    train_ids: list[np.ndarray]
    info: dict[str, Any] = field(default_factory=dict)

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """Long form: test_position, test_id, train, train_position, train_id, score, stderr.

        ``rest``, where there is any, stands at train_position -1.

        Args:
            tokenizer: adds the columns test_token and train_token, each token decoded alone.
        """
        import pandas as pd

        rows = []
        for p, position in enumerate(self.positions):
            for i, train in enumerate(self.train):
                ids = self.train_ids[i]
                test = (int(position), int(self.test_ids[p]), int(train))
                rows += [
                    (*test, s, int(ids[s]), float(self.values[p, i, s]), float(self.stderr[p, i, s]))
                    for s in range(len(ids))
                ]
                if self.rest[p, i]:
                    rows.append((*test, -1, -1, float(self.rest[p, i]), float("nan")))
        names = ["test_position", "test_id", "train", "train_position", "train_id", "score", "stderr"]
        frame = pd.DataFrame(rows, columns=names)
        if tokenizer is not None:
            frame["test_token"] = [tokenizer.decode([i]) for i in frame["test_id"]]
            frame["train_token"] = [tokenizer.decode([i]) if i >= 0 else "" for i in frame["train_id"]]
        return frame


def tokens(
    attributor: Attributor,
    sequence: Mapping[str, Any],
    positions: Sequence[int] | None = None,
    *,
    train: Sequence[int] | None = None,
    k: int = 5,
) -> TokenScores:
    """Which tokens of which training sequences made the model say the tokens of a sequence.

    Args:
        attributor: fitted, of a task with ``output="language-modeling"`` on dict batches, by a method whose score of a
            training example is linear in that example's gradient and needs no other example once it is fitted:
            `GradDot`, `GradCos`, `TracIn`, `Influence` without normalisation; `TRAK` and `TrackStar` with features of
            fewer columns than training examples.
        sequence: an item such as a dataset's: ``input_ids`` (T,), and ``labels`` (T,) with -100 where a token is no
            target (as `byline.hf.generated` masks the prompt).
        positions: the tokens to explain, by their place in the sequence; all targets by default. One forward and
            backward pass each.
        train: the training sequences to look into; by default the ``k`` strongest proponents of the explained tokens'
            mean.
        k: how many.

    Raises:
        RuntimeError: the attributor is not fitted.
        TypeError: it is none, or the sequence is no dict with ``input_ids``.
        ValueError: its method's scores have no parts per position, a position is no target, a place is not in the
            training set, or the attributor's ``collate`` drops labels.
    """
    _check(attributor)
    return attributor._as_whole(lambda made: _tokens(made, sequence, positions, train, k))


def _tokens(
    attributor: Attributor,
    sequence: Mapping[str, Any],
    positions: Sequence[int] | None,
    train: Sequence[int] | None,
    k: int,
) -> TokenScores:
    item, chosen = _targets(sequence, positions)
    data = [_only(item, position) for position in chosen]
    made = batches.gather(data[:1], [0], attributor.collate)
    if not isinstance(made, Mapping) or "labels" not in made:
        raise ValueError(
            "collate makes batches without labels, so that no token can be explained alone; expected it to keep "
            "the labels of items that have some"
        )
    if train is None:
        whole = attributor.attribute(data).values
        order = np.argsort(-whole.mean(0), kind="stable")[: check_k(min(k, attributor.n_train_), attributor.n_train_)]
    else:
        order = np.asarray(train, dtype=np.int64).reshape(-1)
        odd = [int(i) for i in order if not 0 <= i < attributor.n_train_]
        if odd or not len(order):
            raise ValueError(f"train is {order.tolist()}; expected places from 0 to {attributor.n_train_ - 1}")
    found = _Split(attributor, data).of([int(i) for i in order])
    longest = max(values.shape[1] for values, _, _ in found) - 1
    ids = [np.asarray(one) for _, _, one in found]

    def joined(which: int) -> np.ndarray:
        parts = [one[which][:, :-1] for one in found]
        return np.stack([np.pad(p, ((0, 0), (0, longest - p.shape[1])), constant_values=np.nan) for p in parts], 1)

    return TokenScores(
        np.array(chosen),
        order,
        np.stack([values.sum(1) for values, _, _ in found], 1),
        joined(0),
        joined(1),
        np.stack([values[:, -1] for values, _, _ in found], 1),
        np.array([int(item["input_ids"][position]) for position in chosen]),
        ids,
        attributor.info(),
    )


class _Split:
    """Training sequences in their positions, held against the same test tokens."""

    def __init__(self, attributor: Attributor, data: list[dict[str, Tensor]]):
        self.attributor, self.tests = attributor, len(data)
        self.job = attributor._job(data, "sequence", "output")

    def of(self, places: list[int]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per training sequence: scores (P, T + 1), the rest last, their standard errors, and tokens (T,)."""
        attributor = self.attributor
        attributor._products = Products()
        votes: list[list[Tensor]] = [[] for _ in places]
        ids: list[np.ndarray] = []
        for voter in attributor._voters:
            with closing(attributor._queries(voter, self.job, set())) as queries:
                held = [query for _, _, query in queries]
            state = attributor._state(voter)
            with attributor._bench.active(voter.member, "gradient") as active:
                capture = active.capture(attributor._of)
                for number, place in enumerate(places):
                    made = batches.gather(attributor._train_set, [place], attributor.collate)
                    batch = batches.to(made, attributor._bench.device)
                    length = batch["input_ids"].shape[1]
                    parts, rest = capture.positions(batch, attributor._of, length)
                    rows = [self._rows(blocks, state) for blocks in (parts, rest) if blocks]
                    said = [
                        torch.cat([query.against(part, place, place + 1) for query in held]).float() for part in rows
                    ]
                    if not rest:
                        said.append(said[0].new_zeros(self.tests, 1))
                    votes[number].append(torch.cat(said, 1))
                    if len(ids) <= number:
                        ids.append(batch["input_ids"][0].cpu().numpy())
        return [(*self._mean(votes[n], place), ids[n]) for n, place in enumerate(places)]

    def _rows(self, blocks: dict[str, Block], state: dict[str, Tensor]) -> Rows:
        return self.attributor.features.rows(blocks, state)

    def _mean(self, votes: list[Tensor], place: int) -> tuple[np.ndarray, np.ndarray]:
        """The mean over members and its standard error, formed as for whole examples."""
        attributor, shape = self.attributor, tuple(votes[0].shape)
        mean = RunningMean(lambda: np.zeros(shape, np.float32), attributor._with_residuals)
        for voter, vote in zip(attributor._voters, votes, strict=True):
            attributor._begin(mean, voter, slice(place, place + 1), shape[1])
            mean.add(0, shape[0], vote)
        return attributor._finish(mean, slice(place, place + 1))


def _check(attributor: Attributor) -> None:
    if not isinstance(attributor, Attributor):
        raise TypeError(f"attributor is a {type(attributor).__name__}; expected one such as byline.GradDot(...)")
    attributor._check_fitted()
    if attributor.task.name != "language-modeling":
        raise ValueError(f"the task's output is {attributor.task.name!r}; byline.tokens expects 'language-modeling'")
    name = type(attributor).__name__
    if getattr(attributor, "normalization", None) is not None:
        raise ValueError(f"{name} has normalization={attributor.normalization!r}; byline.tokens expects None")  # type: ignore[attr-defined]
    if not all(attributor._streams(voter) for voter in attributor._voters):
        raise ValueError(
            f"{name} with {attributor.features!r} scores all training examples together, so that no position has a "
            "part of its own; expected features=byline.Factorized(dim) with fewer columns than training examples, or "
            "another method such as byline.GradDot"
        )


def _targets(sequence: Mapping[str, Any], positions: Sequence[int] | None) -> tuple[dict[str, Tensor], list[int]]:
    """The sequence with labels, and the places to explain."""
    if not isinstance(sequence, Mapping) or "input_ids" not in sequence:
        raise TypeError(
            f"sequence is a {type(sequence).__name__}; expected an item with input_ids, as a dataset gives it"
        )
    item = {name: torch.as_tensor(value) for name, value in sequence.items()}
    ids = item["input_ids"]
    if ids.ndim != 1:
        raise ValueError(f"sequence has input_ids of shape {tuple(ids.shape)}; expected one sequence, (T,)")
    labels = item.get("labels", ids.clone())
    if "attention_mask" in item:
        labels = labels.masked_fill(item["attention_mask"] == 0, _IGNORED)
    item["labels"] = labels
    possible = [t for t in range(1, len(ids)) if int(labels[t]) != _IGNORED]
    chosen = possible if positions is None else [int(p) for p in positions]
    odd = [p for p in chosen if p not in possible]
    if odd or not chosen:
        raise ValueError(f"positions is {chosen}; expected targets of the sequence, among {possible[:12]}")
    return item, chosen


def _only(item: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    """The sequence with one target."""
    labels = torch.full_like(item["labels"], _IGNORED)
    labels[position] = item["labels"][position]
    return {**item, "labels": labels}
