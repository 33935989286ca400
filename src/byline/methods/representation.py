"""REPRESENTATION SIMILARITY, the baseline without gradients (Hanawa et al. 2021, section 3), the mean over members.

    cosine  ⟨h(z), h(i)⟩ / (‖h(z)‖ ‖h(i)‖)        dot  ⟨h(z), h(i)⟩        l2  -‖h(z) - h(i)‖²

h is the input of the last linear layer. The scores know nothing of labels: high means alike, whichever way training on
the example pushes the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from byline import batches
from byline.ensembles import Ensemble
from byline.methods.base import Voter
from byline.methods.embedding import EmbeddingMethod, EmbeddingScorer
from byline.task import Task

_CHUNK = 4096  # training examples in float64 at a time


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def _l2(a: Tensor, b: Tensor) -> Tensor:
    return -(a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


_SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": _cosine, "dot": _dot, "l2": _l2}


class RepresentationSimilarity(EmbeddingMethod):
    """How alike the model sees two examples.

    ``self_influence()`` is an example's likeness to itself: 1 for "cosine" (0 where the embedding is 0), ‖h(i)‖² for
    "dot", 0 for "l2"; of the three only "dot" ranks anything.

    Args:
        task: what is explained; its output only serves to run the model.
        ensemble: who votes.
        similarity: "cosine", "dot" or "l2".
        **options: those of `EmbeddingMethod`.

    Raises:
        ValueError: another similarity, or what `EmbeddingMethod` refuses.
    """

    def __init__(self, task: Task, ensemble: Ensemble, *, similarity: str = "cosine", **options: Any):
        super().__init__(task, ensemble, **options)
        if not isinstance(similarity, str) or similarity not in _SIMILARITIES:
            raise ValueError(f"similarity is {similarity!r}; expected one of {list(_SIMILARITIES)}")
        self.similarity = similarity

    def _embedding_scorer(self, voter: Voter) -> EmbeddingScorer:
        train, likeness = self._embeddings(voter.member), _SIMILARITIES[self.similarity]

        def scorer(found: Tensor, _: Tensor | None) -> Tensor:
            # in float64, so that what is equal has a cosine of 1 and a distance of 0
            h = found.double()
            parts = [likeness(h, train[a:b].double()).float() for a, b in batches.spans(len(train), _CHUNK)]
            return torch.cat(parts, 1)

        return scorer

    def _self(self, voter: Voter) -> Tensor:
        squares = self._embeddings(voter.member).double().square().sum(1)
        if self.similarity == "l2":
            return torch.zeros_like(squares)
        return squares if self.similarity == "dot" else (squares > 0).double()

    def info(self) -> dict[str, Any]:
        """Adds the similarity."""
        return {**super().info(), "similarity": self.similarity}
