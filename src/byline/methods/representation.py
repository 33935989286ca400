"""REPRESENTATION SIMILARITY, the baseline without gradients (Hanawa et al. 2021), the mean over members.

    cosine  ⟨h(z), h(i)⟩ / (‖h(z)‖ ‖h(i)‖)        dot  ⟨h(z), h(i)⟩        l2  -‖h(z) - h(i)‖²

h is the input of the last linear layer. The scores know nothing of labels, so the sign is that of likeness alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from byline.batches import Batch
from byline.ensembles import Ensemble
from byline.methods.base import Voter
from byline.methods.embedding import EmbeddingMethod
from byline.task import Task

_SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda a, b: F.normalize(a, dim=1) @ F.normalize(b, dim=1).T,
    "dot": lambda a, b: a @ b.T,
    "l2": lambda a, b: -torch.cdist(a, b).square(),
}


class RepresentationSimilarity(EmbeddingMethod):
    """How alike the model sees two examples.

    Args:
        task: what is explained; its output only serves to run the model.
        ensemble: who votes.
        similarity: "cosine", "dot" or "l2".
        **options: those of `EmbeddingMethod`.
    """

    def __init__(self, task: Task, ensemble: Ensemble, *, similarity: str = "cosine", **options: Any):
        if similarity not in _SIMILARITIES:
            raise ValueError(f"similarity is {similarity!r}; expected one of {list(_SIMILARITIES)}")
        self.similarity = similarity
        super().__init__(task, ensemble, **options)

    def _embedding_scorer(self, voter: Voter) -> Callable[[Tensor, Batch], Tensor]:
        train, likeness = self._train(voter), _SIMILARITIES[self.similarity]
        return lambda found, batch: likeness(found, train)
