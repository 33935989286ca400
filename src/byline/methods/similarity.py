"""GRAD-DOT and GRAD-COS (Charpiat et al. 2019).

    GradDot(z, i) = ⟨∇f(z), -∇ℓ(i)⟩          GradCos(z, i) = the same over ‖∇f(z)‖ ‖∇ℓ(i)‖

and the mean over members.
"""

from __future__ import annotations

import torch
from torch import Tensor

from byline.features.base import Rows
from byline.methods.base import Attributor, Scorer, Voter


class GradDot(Attributor):
    """Inner products of the output's gradient with the negated loss gradient, under any ensemble."""

    def _scorer(self, voter: Voter) -> Scorer:
        stored, scale = self._stored(voter), self._loss_scale(voter)

        def scorer(rows: Rows) -> Tensor:
            self._count(rows, stored.columns)
            dots = self._cross(rows, stored)
            return dots if scale is None else dots * scale

        return scorer

    def _self(self, voter: Voter) -> Tensor:
        pairs, scale = self._pairs(voter), self._loss_scale(voter)
        return pairs if scale is None else pairs * scale

    def _count(self, rows: Rows, columns: int) -> None:
        if self.ledger is not None:
            examples = len(next(iter(rows.values())))
            self.ledger.add_flops("serving", 2.0 * examples * self.n_train_ * columns)


class GradCos(GradDot):
    """Cosines between the output's gradient and the negated loss gradient; 0 where one of them is 0."""

    def _scorer(self, voter: Voter) -> Scorer:
        stored, scale = self._stored(voter), self._loss_scale(voter)
        train = _inverse_root(self._norms(stored))
        # normalising Q ∇f leaves its sign alone, and 0 where there is no gradient
        train = train if scale is None else train * scale.sign()

        def scorer(rows: Rows) -> Tensor:
            self._count(rows, stored.columns)
            test = _inverse_root(self.features.diagonal(rows, rows))
            return self._cross(rows, stored) * test.unsqueeze(1) * train

        return scorer

    def _self(self, voter: Voter) -> Tensor:
        scale = self._loss_scale(voter)
        norms = self._norms(self._stored(voter))
        if scale is not None:
            return torch.where(norms > 0, scale.sign(), 0.0)
        return self._pairs(voter) * _inverse_root(norms) * _inverse_root(self._output_norms(voter))

    def _output_norms(self, voter: Voter) -> Tensor:
        """(n_train,) squared norms of ∇f at the training examples, where the store holds ∇ℓ."""
        return torch.cat([self.features.diagonal(rows, rows) for _, _, rows in self._own_rows(voter)])


def _inverse_root(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares.clamp_min(1e-45).rsqrt(), 0.0)
