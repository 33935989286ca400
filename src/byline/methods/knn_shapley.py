"""KNN-SHAPLEY (Jia et al. 2019, theorem 1), on embeddings, the mean over members.

With the training examples in the order α of their distance to z, and y the label of z,

    s(α_N) = 1[y(α_N) = y] / N
    s(α_i) = s(α_(i+1)) + (1[y(α_i) = y] - 1[y(α_(i+1)) = y]) / K · min(K, i) / i

is the Shapley value of each training example in the game whose worth is the share of the K nearest neighbours with the
label of z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from byline.batches import Batch
from byline.ensembles import Ensemble
from byline.ensembles.base import check_count
from byline.methods.base import Voter
from byline.methods.embedding import EmbeddingMethod, labels_of
from byline.task import Task


class KNNShapley(EmbeddingMethod):
    """Exact Shapley values of a nearest-neighbour classifier on the model's embeddings.

    The scores of a test example sum to the share of its k nearest neighbours that have its label. `self_influence`
    is the value of an example for itself as a test example, of which it is its own nearest neighbour.

    Args:
        task: a classification.
        ensemble: who votes.
        k: how many neighbours vote.
        **options: those of `EmbeddingMethod`.

    Raises:
        ValueError: the task is no classification.
    """

    def __init__(self, task: Task, ensemble: Ensemble, *, k: int = 5, **options: Any):
        self.k = check_count(k, "k")
        if task.name != "classification":
            raise ValueError(f"task has the output {task.name!r}; KNNShapley needs labels, output='classification'")
        super().__init__(task, ensemble, **options)

    def _embedding_scorer(self, voter: Voter) -> Callable[[Tensor, Batch], Tensor]:
        train, labels = self._train(voter), labels_of(self._targets(), "train_set")

        def scorer(found: Tensor, batch: Batch) -> Tensor:
            own = labels_of(self.task.targets(batch), "the batch")
            return shapley(torch.cdist(found, train), labels == own.unsqueeze(1), self.k)

        return scorer

    def info(self) -> dict[str, Any]:
        """Adds the number of neighbours."""
        return {**super().info(), "k": self.k}


def shapley(distances: Tensor, agree: Tensor, k: int) -> Tensor:
    """Shapley values (B, N) from distances (B, N) and whether labels agree (B, N); ties in the training set's order."""
    n = distances.shape[1]
    order = distances.argsort(dim=1, stable=True)
    same = agree.gather(1, order).double()
    place = torch.arange(1, n, dtype=torch.float64)
    steps = (same[:, :-1] - same[:, 1:]) / k * place.clamp_max(k) / place
    # a game of fewer players than neighbours never fills its k votes
    last = same[:, -1:] / max(k, n)
    values = torch.cat([last + steps.flip(1).cumsum(1).flip(1), last], 1)
    return torch.empty_like(values).scatter_(1, order, values).float()
