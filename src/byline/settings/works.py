"""Works that a trained model makes up, and which training sequences taught it them, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import byline
from byline.features import Factorized
from byline.methods.base import Attributor
from byline.scores import Scores
from byline.sequences import padded
from byline.settings import stdlib, tunes
from byline.settings.base import Setting
from byline.settings.corpus import IGNORED
from byline.settings.workshop import StateDict, Workshop
from byline.uses import Shares, shares

CHECKPOINTS = 5
COLUMNS = 512
"""Fewer than training sequences, so that every position has a part of its own (`byline.tokens`)."""
_OWNER = {"tunes-transformer": "collection", "stdlib-gpt": "module"}
_STARTS = {"tunes-transformer": (("M:6/8", "K:G"), ("M:2/2", "K:D"), ("M:2/2", "K:A"), ("M:3/4", "K:G")),
           "stdlib-gpt": ("def read", "def get", "def is", "def __init__(self")}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    """A training sequence that taught a work.

    Attributes:
        index: Its place in the training set.
        about: What is known of its owner.
        tokens: What it says, token by token.
        score: Its score for the work, in the output's units.
        stderr: The score's standard error over members; NaN with one.
        parts: (tokens,) what each of its tokens adds to the score.
        taught: (tokens of the work,) its score for each token of the work; 0 for what no model predicts.
    """

    index: int
    about: dict[str, Any]
    tokens: list[str]
    score: float
    stderr: float
    parts: np.ndarray
    taught: np.ndarray

    @property
    def title(self) -> str:
        """What it is called."""
        return str(self.about.get("title") or f"no. {self.index}")


@dataclass(frozen=True, eq=False)
class Work:
    """What a model made up, token by token, and its sources, the strongest first."""

    tokens: list[str]
    seed: int
    sources: list[Source]


@dataclass(frozen=True, eq=False)
class Works:
    """Works of one model.

    Attributes:
        kind: "tune", "code" or "text".
        works: What was made up.
        owners: The shares of owners, per work and over all.
        owned_by: What an owner is: "collection" or "module".
        info: How the scores came about.
    """

    kind: str
    works: list[Work]
    owners: Shares
    owned_by: str
    info: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: works, their sources with score, error and the parts of tokens, and owners' shares."""

        def source(one: Source) -> dict[str, Any]:
            return {
                "index": one.index,
                "about": one.about,
                "score": one.score,
                "stderr": one.stderr if np.isfinite(one.stderr) else None,
                "tokens": one.tokens,
                "parts": [round(float(part), 8) for part in one.parts],
                "taught": [round(float(part), 8) for part in one.taught],
            }

        owners = self.owners.to_dataframe().itertuples()
        return {
            "kind": self.kind,
            "works": [
                {"seed": work.seed, "tokens": work.tokens, "sources": [source(one) for one in work.sources]}
                for work in self.works
            ],
            "owned_by": self.owned_by,
            "owners": [{"owner": str(row.owner), "share": float(row.share)} for row in owners],
            "info": {name: value for name, value in self.info.items() if isinstance(value, str | int | float)},
        }


def make_up(shop: Workshop, count: int = 4, *, k: int = 3, seed: int = 0) -> Works:
    """Lets a model of a setting make works up, and attributes them.

    The fully trained model of seed 0 writes; who taught it is asked of `CHECKPOINTS` early checkpoints of one short run
    (docs/grid.md says why), by TRAK on `Factorized` features.

    Args:
        shop: whose setting is "tunes-transformer" or "stdlib-gpt"; models that are not in its folder are trained.
        count: how many works.
        k: sources of each.
        seed: of the draws; work n has seed + n.

    Raises:
        ValueError: another setting, or a count or k below 1.
    """
    setting = shop.setting
    if setting.name not in _OWNER or setting.owners is None:
        raise ValueError(f"setting is {setting.name!r}; expected one of {', '.join(_OWNER)}")
    if count < 1 or k < 1:
        raise ValueError(f"count is {count} and k is {k}; expected both to be at least 1")
    model = setting.build()
    model.load_state_dict(shop.models(1)[0].state)
    write, words = _writer(setting, model.eval())
    made = [write(n, seed + n) for n in range(count)]
    attributor = _attributor(setting, shop.runs(1, CHECKPOINTS)[0].weights, shop.progress)
    shop.tell(f"{count} works made up; {attributor.n_train_} training sequences asked")
    works = [{"input_ids": torch.tensor(ids)} for ids in made]
    owner = _OWNER[setting.name]
    kind = "tune" if setting.name == "tunes-transformer" else "code"
    seeds = [seed + n for n in range(count)]
    return attributed(attributor, works, kind, owner, setting.owners()[0], words, seeds, k, shop.tell)


def attributed(
    attributor: Attributor,
    works: Sequence[Mapping[str, Any]],
    kind: str,
    owned_by: str,
    abouts: Sequence[Mapping[str, Any]],
    words: Callable[[Sequence[int]], list[str]],
    seeds: Sequence[int],
    k: int,
    tell: Callable[[str], None],
) -> Works:
    """Works with the sources of each, and the shares of owners in them.

    Args:
        attributor: fitted.
        works: test examples, as `byline.tokens` takes them.
        kind: as of `Works`.
        owned_by: the entry of ``abouts`` that names an owner.
        abouts: what is known of each training sequence.
        words: ids to the text of each token.
        seeds: of the draws, one per work.
        k: sources of each.
        tell: gets a sentence about each work.
    """
    votes, scores = attributor.votes(works), attributor.attribute(works)
    found = []
    for n, (work, seed) in enumerate(zip(works, seeds, strict=True)):
        sources = sources_of(attributor, work, scores, n, k, abouts, words)
        found.append(Work(words(work["input_ids"].tolist()), seed, sources))
        tell(f"{n + 1} of {len(works)}: {sources[0].title} leads")
    owned = shares(votes, [str(about[owned_by]) for about in abouts])
    return Works(kind, found, owned, owned_by, scores.info)


def sources_of(
    attributor: Attributor,
    work: Mapping[str, Any],
    scores: Scores,
    row: int,
    k: int,
    abouts: Sequence[Mapping[str, Any]],
    words: Callable[[Sequence[int]], list[str]],
) -> list[Source]:
    """The strongest proponents of a work, token by token.

    Args:
        attributor: fitted.
        work: a test example, as `byline.tokens` takes it.
        scores: of all works.
        row: the work's among them.
        k: how many.
        abouts: what is known of each training sequence.
        words: ids to the text of each token.
    """
    order = np.argsort(-scores.values[row], kind="stable")[:k]
    split = byline.tokens(attributor, work, train=[int(i) for i in order])
    sources = []
    for place, index in enumerate(split.train):
        taught = np.zeros(len(work["input_ids"]))
        taught[split.positions] = split.scores[:, place] / len(split.positions)
        length = len(split.train_ids[place])
        sources.append(
            Source(
                int(index),
                dict(abouts[index]),
                words(split.train_ids[place].tolist()),
                float(scores.values[row, index]),
                float(scores.stderr[row, index]),
                split.values[:, place, :length].mean(0),
                taught,
            )
        )
    return sources


def _writer(
    setting: Setting, model: Any
) -> tuple[Callable[[int, int], list[int]], Callable[[Sequence[int]], list[str]]]:
    """What makes up the ids of a work, start token first, and what tells their words."""
    assert setting.owners is not None
    size = {"train": len(setting.train_set), "test": len(setting.test_set)}
    if setting.name == "tunes-transformer":
        names = tunes.tunes(**size).words

        def tune(n: int, seed: int) -> list[int]:
            known = [start for start in _STARTS[setting.name] if all(word in names for word in start)] or [()]
            return tunes.generate(model, names, known[n % len(known)], seed=seed)[0]

        return tune, lambda ids: [names[i] for i in ids]
    tokenizer = stdlib.code(**size).tokenizer

    def function(n: int, seed: int) -> list[int]:
        starts = _STARTS[setting.name]
        return stdlib.write(model, tokenizer, str(starts[n % len(starts)]), seed=seed)

    return function, lambda ids: stdlib.pieces(tokenizer, ids)


def _attributor(setting: Setting, checkpoints: Sequence[StateDict], progress: bool) -> Attributor:
    """TRAK of sequences as dicts, fitted."""
    named = [{f"decoder.{name}": tensor for name, tensor in state.items()} for state in checkpoints]
    columns = min(COLUMNS, (len(setting.train_set) - 1) // 8 * 8)
    attributor = byline.TRAK(
        byline.Task(_Named(setting.build()).eval(), output="language-modeling"),
        byline.Trajectory([named]),
        features=Factorized(columns, "pca"),
        batch_size=setting.batch_size,
        progress=progress,
    )
    return attributor.fit(_Sequences(setting))


class _Named(nn.Module):
    """A decoder that is called as transformers' models are."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        # causal, and padded on the right: no token sees the padding
        return SimpleNamespace(logits=self.decoder(input_ids))


class _Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The training sequences of a setting as dicts; the last token of a full one is left out."""

    def __init__(self, setting: Setting) -> None:
        self.data = setting.train_set

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, targets = self.data[index]
        return {"input_ids": inputs[: int((targets != IGNORED).sum())]}

    def collate_fn(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Padded on the right, with a mask, and with the labels where items have some."""
        return padded(items)
