"""KNN-SHAPLEY (Jia et al. 2019, theorem 1), on embeddings, the mean over members.

With the training examples in the order α of their distance to z, and y the label of z,

    s(α_N) = 1[y(α_N) = y] / max(K, N)
    s(α_i) = s(α_(i+1)) + (1[y(α_i) = y] - 1[y(α_(i+1)) = y]) / K · min(K, i) / i

is the Shapley value of each training example in the game whose worth is the share, of K votes, that the K nearest
neighbours give to the label of z. (The theorem has 1/N for K ≤ N; fewer examples than votes leave votes open.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from byline import batches
from byline.ensembles import Ensemble
from byline.ensembles.base import check_count
from byline.methods.base import Voter
from byline.methods.embedding import EmbeddingMethod, EmbeddingScorer
from byline.task import Task

_PAIRS = 2**22  # that are sorted at a time


class KNNShapley(EmbeddingMethod):
    """Exact Shapley values of a nearest-neighbour classifier on the model's embeddings, by Euclidean distance.

    The scores of a test example sum to the share of its k nearest neighbours that have its label. They depend on the
    order of the distances alone, and equal distances stand in the order of the training set.
    ``self_influence()`` is the value of an example for itself as a test example, whose nearest neighbour it is: low
    where its other neighbours have its label already, high where it stands alone among other labels.

    Args:
        task: a classification.
        ensemble: who votes.
        k: how many neighbours vote.
        **options: those of `EmbeddingMethod`.

    Raises:
        ValueError: the task is no classification, ``k`` is no int of at least 1, or what `EmbeddingMethod` refuses;
            while fitting, labels that are not one whole number per example.
    """

    with_targets = True

    def __init__(self, task: Task, ensemble: Ensemble, *, k: int = 5, **options: Any):
        super().__init__(task, ensemble, **options)
        if task.name != "classification":
            raise ValueError(f"task has the output {task.name!r}; KNNShapley needs labels, output='classification'")
        self.k = check_count(k, "k")

    def _embedding_scorer(self, voter: Voter) -> EmbeddingScorer:
        train, labels = self._embeddings(voter.member), self._targets()

        def scorer(found: Tensor, targets: Tensor | None) -> Tensor:
            assert targets is not None
            parts = []
            for start, stop in batches.spans(len(found), max(1, _PAIRS // len(train))):
                distances = torch.cdist(found[start:stop], train, compute_mode="donot_use_mm_for_euclid_dist")
                parts.append(shapley(distances, labels == targets[start:stop].unsqueeze(1), self.k))
            return torch.cat(parts)

        return scorer

    def _self(self, voter: Voter) -> Tensor:
        train, labels, scorer = self._embeddings(voter.member), self._targets(), self._embedding_scorer(voter)
        parts = [
            scorer(train[start:stop], labels[start:stop])[:, start:stop].diagonal()
            for start, stop in batches.spans(len(train), self.batch_size)
        ]
        return torch.cat(parts)

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
    last = same[:, -1:] / max(k, n)
    values = torch.cat([last + steps.flip(1).cumsum(1).flip(1), last], 1)
    return torch.empty_like(values).scatter_(1, order, values).float()
