"""TRACKSTAR's normalisation (Chang et al. 2024, arXiv 2410.17413, section 3), the mean over members.

    TrackStar(z, i) = ⟨G(∇f(z)), G(-∇ℓ(i))⟩,   G(g) = R^(-1/2) g / ‖R^(-1/2) g‖,   R = Σ_j ∇ℓ(j) ∇ℓ(j)ᵀ + λI

λ = damping × mean_j ‖∇ℓ(j)‖²: a cosine between gradients after the second moment of the training gradients has been
divided out, so that neither examples with long gradients nor directions that all examples share decide everything. The
paper's correction by the optimizer's second moments is left out, for a checkpoint does not keep them, and so is its
mixing of R with the second moment of the evaluation set: R is that of the training set alone. With `Factorized`
features it is the paper's two-sided projection.

In the dual, with r the stored rows (∇ℓ over its scale s, so that small s costs no digits) and x = (K + λI)⁻¹ k_z:

    g_zᵀ R⁻¹ r_i = (k(z, i) - Σ_j x_j s_j k(j, i))/λ,   ‖R^(-1/2) g_z‖² = (k(z, z) - k_zᵀ x)/λ

which divides differences by λ: with gradients in float32, damping below about 1e-5 leaves few digits in either form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from byline.features.base import Rows
from byline.methods import scan
from byline.methods.base import Prepare, Scorer, Voter
from byline.methods.ridge import Ridge
from byline.methods.streaming import Query


class TrackStar(Ridge):
    """Cosines of preconditioned gradients, under any ensemble, from -1 to 1; 0 where a gradient is 0.

    ``damping="auto"`` is the rule of TRAK on the training gradients: R leaves as many directions free. A large damping
    gives GradCos. ``self_influence()`` is the preconditioned cosine of ∇f(i) and -∇ℓ(i), so that where one is a
    multiple of the other it is 1 (the loss pulls the output up), -1 or 0, and ranks nothing.

    Attributes:
        damping_: relative damping per member, as given or as chosen by ``"auto"``, after ``fit``.
    """

    train_side = "loss"

    def _check_size(self, n_train: int) -> None:
        super()._check_size(n_train)
        if self.damping == 0 and not self.features.linear:
            raise ValueError(f"damping is 0; TrackStar with {self.features!r} expects a number above 0")

    def _prepare(self) -> None:
        super()._prepare()
        self._gram_of: tuple[str, Tensor] | None = None
        self._lengths: dict[str, Tensor] = {}

    def _sent(self) -> dict[str, Any]:
        return {**super()._sent(), "_gram_of": None}

    def _scales(self, voter: Voter) -> Tensor | None:
        return self._loss_scale(voter)

    def _query(self, voter: Voter) -> Prepare:
        stored, scale = self._stored(voter), self._loss_scale(voter)
        factor, _ = self._factor(voter)
        key = voter.member.identity("gradient")
        if key not in self._lengths:
            found = [_solved(factor, rows.T).square().sum(0) for rows in self._vectors(voter, 4096)]
            self._lengths[key] = _inverse_root(torch.cat(found))
        each = self._lengths[key] if scale is None else self._lengths[key] * scale.sign()
        state = self._state(voter)

        def prepare(rows: Rows) -> Query:
            white = _solved(factor, self.features.vectors(rows, state).T)
            whole = torch.linalg.solve_triangular(factor.T, white, upper=True).T.contiguous()
            test, vectors = _inverse_root(white.square().sum(0)).unsqueeze(1), scan.Vectors(whole)
            if self.ledger is not None:
                columns = (self._width(voter) or stored.columns) + self.n_train_
                self.ledger.add_flops("serving", 2.0 * len(whole) * self.n_train_ * columns)

            def against(train: Any, a: int, b: int) -> Tensor:
                cosines = (scan.dots(vectors, train, self.features, state) * test * each[a:b]).float()
                # rounding alone leads beyond a cosine's range, but for the parts of one example (`byline.tokens`)
                return cosines.clamp_(-1, 1) if cosines.shape[1] == b - a else cosines

            return Query.of({"rows": whole}, against)

        return prepare

    def _warm(self) -> None:
        super()._warm()
        for voter in self._voters:
            if self._in_primal(voter):
                self._query(voter)

    def _scorer(self, voter: Voter) -> Scorer:
        if self._in_primal(voter):
            return super()._scorer(voter)
        train, whiten = self._whitened(voter)

        def scorer(rows: Rows) -> Tensor:
            dots, norms = whiten(rows)
            if self.ledger is not None:
                self.ledger.add_flops("serving", 2.0 * dots.numel() * (self._stored(voter).columns + len(train)))
            # rounding alone leads beyond a cosine's range
            return (dots * _inverse_root(norms).unsqueeze(1) * train).clamp(-1, 1).float()

        return scorer

    def _whitened(self, voter: Voter) -> tuple[Tensor, Callable[[Rows], tuple[Tensor, Tensor]]]:
        """What each training example is multiplied by, and what turns rows into R⁻¹-products and squared norms."""
        stored, scale = self._stored(voter), self._loss_scale(voter)
        factor, ridge = self._factor(voter)
        sign = torch.ones(self.n_train_) if scale is None else scale.sign()
        if self._in_primal(voter):
            state = self._state(voter)

            def in_primal(rows: Rows) -> tuple[Tensor, Tensor]:
                white = _solved(factor, self.features.vectors(rows, state).T)
                whole = torch.linalg.solve_triangular(factor.T, white, upper=True)
                return torch.cat([own.double() @ whole for own in self._vectors(voter)]).T, white.square().sum(0)

            norms = torch.cat([_solved(factor, rows.T).square().sum(0) for rows in self._vectors(voter)])
            return sign * _inverse_root(norms), in_primal
        if ridge == 0:
            raise ValueError("damping is 0; TrackStar with more columns than examples expects a number above 0")
        weights = torch.ones(self.n_train_) if scale is None else scale

        def norms_of(rows: Rows, cross: Tensor) -> Tensor:
            own = self.features.diagonal(rows, rows).double()
            return ((own - _solved(factor, cross.T).square().sum(0)) / ridge).clamp_min(0)

        def in_dual(rows: Rows) -> tuple[Tensor, Tensor]:
            plain = self._cross(rows, stored)
            cross = plain * weights
            # of rows themselves, not of rows times their scale: a scale near 0 would leave nothing but rounding
            solved = torch.cholesky_solve(cross.double().T, factor).T
            dots = (plain.double() - solved @ self._scaled_gram(voter)) / ridge
            return dots, norms_of(rows, cross)

        found = []
        for a, b in self._chunks(stored):
            rows = stored.read(a, b)
            found.append(norms_of(rows, self._cross(rows, stored) * weights))
        return sign * _inverse_root(torch.cat(found)), in_dual

    def _scaled_gram(self, voter: Voter) -> Tensor:
        """(n_train, n_train) diag(scale) · kernel of the stored rows, in float64."""
        key = voter.member.identity("gradient")
        if self._gram_of is None or self._gram_of[0] != key:
            stored, scale = self._stored(voter), self._loss_scale(voter)
            gram = torch.cat([self._cross(stored.read(a, b), stored) for a, b in self._chunks(stored)]).double()
            self._gram_of = key, gram if scale is None else gram.mul_(scale.unsqueeze(1))
        return self._gram_of[1]

    def _self(self, voter: Voter) -> Tensor:
        train, whiten = self._whitened(voter)
        parts = []
        for a, b, rows in self._own_rows(voter):
            dots, norms = whiten(rows)
            parts.append(dots[:, a:b].diagonal() * _inverse_root(norms) * train[a:b])
        return torch.cat(parts).clamp(-1, 1).float()


def _solved(factor: Tensor, columns: Tensor) -> Tensor:
    """L⁻¹ of columns, in float64."""
    return torch.linalg.solve_triangular(factor, columns.double(), upper=False)


def _inverse_root(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares.clamp_min(1e-300).rsqrt(), 0.0)
