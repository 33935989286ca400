"""GRAD-DOT and GRAD-COS (Charpiat et al. 2019).

    GradDot(z, i) = ⟨∇f(z), -∇ℓ(i)⟩          GradCos(z, i) = the same over ‖∇f(z)‖ ‖∇ℓ(i)‖

and the mean over members.
"""

from __future__ import annotations

import torch
from torch import Tensor

from byline.features.base import Rows
from byline.methods.base import Attributor, Prepare, Voter
from byline.methods.streaming import Query


class GradDot(Attributor):
    """Inner products of the output's gradient with the negated loss gradient, under any ensemble."""

    residuals: tuple[str, ...] = ("mean", "in-sample", "out-of-sample", "sqrt")
    _times_residual = True

    def _streams(self, voter: Voter) -> bool:
        return True

    def _query(self, voter: Voter) -> Prepare:
        columns, scale = self._stored(voter).columns, self._vote_scale(voter)

        def prepare(rows: Rows) -> Query:
            self._count(rows, columns)
            dots = self._dots(rows)
            return Query.of(rows, lambda train, a, b: dots(train) if scale is None else dots(train) * scale[a:b])

        return prepare

    def _self(self, voter: Voter) -> Tensor:
        pairs, scale = self._pairs(voter), self._vote_scale(voter)
        return pairs if scale is None else pairs * scale

    def _count(self, rows: Rows, columns: int) -> None:
        if self.ledger is not None:
            examples = len(next(iter(rows.values())))
            self.ledger.add_flops("serving", 2.0 * examples * self.n_train_ * columns)


class GradCos(GradDot):
    """Cosines between the output's gradient and the negated loss gradient; 0 where one of them is 0."""

    residuals = ("mean",)  # of Q, its sign alone is left
    _times_residual = False

    def _query(self, voter: Voter) -> Prepare:
        columns, scale = self._stored(voter).columns, self._loss_scale(voter)
        each = _inverse_root(self._kept_norms(voter))
        # normalising Q ∇f leaves its sign alone, and 0 where there is no gradient
        each = each if scale is None else each * scale.sign()

        def prepare(rows: Rows) -> Query:
            self._count(rows, columns)
            dots, test = self._dots(rows), _inverse_root(self.features.diagonal(rows, rows)).unsqueeze(1)
            return Query.of(rows, lambda train, a, b: dots(train) * test * each[a:b])

        return prepare

    def _warm(self) -> None:
        for voter in self._voters:
            self._kept_norms(voter)

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
