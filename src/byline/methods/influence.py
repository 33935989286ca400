"""INFLUENCE FUNCTIONS (Hampel 1974; Koh & Liang 2017, equation 2), the mean over members.

    Influence(z, i) = ∇f(z)ᵀ (H + λI)⁻¹ (-∇ℓ(i))

H is the mean over training examples of the curvature of ℓ, and there is no 1/n: leaving example i out changes f(z) by
about -Influence(z, i) / n. The inverse is applied once to each test gradient; scores are then products with the
training gradients that the store holds. RelatIF is Barshan, Brunet & Dziugaite 2020.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from byline import batches
from byline.engines.local import Job, stream_rows
from byline.engines.workbench import Active
from byline.ensembles.base import Ensemble, check_seed
from byline.features import Exact
from byline.features.base import Rows, State
from byline.methods import scan
from byline.methods.base import Attributor, Voter
from byline.methods.curvature import CURVATURES, SOLVERS, Problem, Solver
from byline.methods.curvature.base import Inverse, Quadratic
from byline.methods.curvature.explicit import Explicit, cholesky, solve
from byline.methods.streaming import Query
from byline.store import Stored
from byline.task import Task

AUTO_DAMPING = 0.1
PROJECTED_DAMPING = 1.0
"""Chosen on digits, cancer, diabetes and tunes; one matrix over all layers wants more than a layer of its own."""
_NUMBERS = 2**25  # of a block of flat gradients in memory
_NORMALIZATIONS = (None, "relatif", "theta-relatif")


class Rowed(NamedTuple):
    """How rows of features are read."""

    vectors: Callable[[Rows], Tensor]
    """Rows -> (B, P)."""
    products: Callable[[Tensor, Rows], Tensor]
    """(B, P) and N rows -> (B, N) inner products."""
    widest: int = 1
    """Numbers per pair of examples that stand in memory between the two factors of a block."""


class Influence(Attributor):
    """Influence functions under any ensemble.

    Dropout masks, noise and adapters are the member's own in the curvature, the training and the test gradients alike.

    Args:
        task: what is explained.
        ensemble: who votes; ``forward_only`` members are refused, for there is no Q to mask.
        solver: how ``(H + λI)⁻¹`` is applied: "explicit" (dense, small models), "cg", "lissa", "arnoldi", "datainf",
            "kfac", "ekfac"; or an instance such as ``byline.methods.curvature.CG(tolerance=1e-6)`` for its options.
        curvature: of the training loss, as a mean over training examples:

            - "ggn": generalised Gauss-Newton, ``Jᵀ (diag p - p pᵀ) J`` of the logits for cross-entropy (the mean over
              the target tokens for language modelling), ``∇f ∇fᵀ`` for regression. Named outputs with their own
              loss only. "kfac", "ekfac" and "datainf" take labels drawn by the model's prediction for it, seeded.
            - "fisher": the empirical Fisher, the second moment of ∇ℓ.
            - "hessian": of the loss itself; "explicit", "cg", "lissa" and "arnoldi" only. Where ``H + λI`` is not
              positive definite they refuse, but for "arnoldi", which drops the smallest eigenvalues of whatever sign.
            - "auto": "ggn" for named outputs with their own loss. For a callable output or loss, whose likelihood is
              not known, "hessian" with the solvers that have it and "fisher" with the others and with projections.
        damping: λ as a multiple of the mean eigenvalue tr(H)/P over all attributed parameters together, the same for
            every layer. "auto" is 0.1, the customary factor (of each layer's own mean eigenvalue, there). It was looked
            at on digits-mlp alone, where it is near the best for "ekfac"; elsewhere try others. Of projections it is 1.
        normalization: None; "relatif" divides by ``√(∇ℓ(i)ᵀ (H + λI)⁻¹ ∇ℓ(i))``, which the paper calls ℓ-RelatIF;
            "theta-relatif" divides by ``‖(H + λI)⁻¹ ∇ℓ(i)‖``, its θ-RelatIF. 0 where ∇ℓ(i) is 0. Either applies the
            inverse to every training gradient too.
        features: `Exact`. Other features are taken with ``solver="explicit", curvature="fisher"`` alone: then H is the
            second moment ``ΦᵀΦ/n`` of the projected loss gradients (and λ relative to its mean eigenvalue), which with
            `Factorized` is LoGra (Choe et al. 2024).
        seed: of drawn labels, of the starting vectors of "arnoldi" and of power iterations.
        **options: the other arguments of every method (`Attributor`): ``params``, ``store``, ``batch_size``, …; the
            store keeps the factors of the curvature too.
    """

    residuals: tuple[str, ...] = ("mean", "in-sample", "out-of-sample", "sqrt")

    def __init__(
        self,
        task: Task,
        ensemble: Ensemble,
        *,
        solver: str | Solver = "ekfac",
        curvature: str = "auto",
        damping: float | str = "auto",
        normalization: str | None = None,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(task, ensemble, damping=damping, **options)
        if not isinstance(solver, Solver):
            if not isinstance(solver, str) or solver not in SOLVERS:
                raise ValueError(f"solver is {solver!r}; expected one of {sorted(SOLVERS)} or an instance of a solver")
            solver = SOLVERS[solver]()
        if curvature not in (*CURVATURES, "auto"):
            raise ValueError(f"curvature is {curvature!r}; expected one of {[*CURVATURES, 'auto']}")
        if normalization not in _NORMALIZATIONS:
            raise ValueError(f"normalization is {normalization!r}; expected None, 'relatif' or 'theta-relatif'")
        self.solver, self.normalization = solver, normalization
        self.curvature = self._chosen() if curvature == "auto" else curvature
        if normalization is not None and self.residual != "mean":
            raise ValueError(
                f"residual is {self.residual!r} and normalization {normalization!r}, which leaves the sign of Q alone; "
                "expected one or the other"
            )
        self.seed = check_seed(seed)
        self._times_residual = normalization is None
        self._check_combination()

    def _chosen(self) -> str:
        """What "auto" stands for."""
        if not self._projected and self.task.has_likelihood:
            return "ggn"
        return "hessian" if "hessian" in self.solver.curvatures and not self._projected else "fisher"

    def _check_combination(self) -> None:
        solver, curvature = self.solver, self.curvature
        if curvature not in solver.curvatures:
            raise ValueError(
                f"curvature is {curvature!r}, which solver={solver.name!r} has no form of; expected one of "
                f"{list(solver.curvatures)}, or solver='cg'"
            )
        if curvature == "ggn" and not self.task.has_likelihood:
            what = "output is a callable" if self.task.name == "callable" else "loss is a callable"
            if not self.task.own_loss and self.task.name != "callable":
                what = f"output {self.task.name!r} has none that is known"
            raise ValueError(
                "curvature is 'ggn', which needs the likelihood of a named output with its own loss, and the task's "
                f"{what}; use curvature='fisher' or 'auto'"
            )
        projected = self.features.linear and isinstance(solver, Explicit) and curvature == "fisher"
        if not isinstance(self.features, Exact) and not projected:
            raise ValueError(
                f"features is {self.features!r}; Influence takes byline.Exact(), or features that are vectors "
                "(byline.Factorized, byline.Nystrom, byline.Dense, byline.Principal) with solver='explicit', "
                "curvature='fisher'"
            )

    # fitting

    def _check_model(self) -> None:
        super()._check_model()
        if not self._projected and not any(member.brings for member in self.ensemble.members()):
            # an adapter's parameters are counted once it is there
            self.solver.check(sum(p.numel() for p in self.task.chosen().values()))

    @property
    def _projected(self) -> bool:
        return not isinstance(self.features, Exact)

    def _prepare(self) -> None:
        for voter in self._voters:
            key = self._curvature_key(voter)
            if self.store.state(key) is not None:
                continue
            if self._projected:
                self.store.put_state(key, {"matrix": self._second_moment(voter)})
                continue
            with self._bench.active(voter.member, "gradient") as active:
                problem = self._problem(voter, active)
                self.solver.check(problem.layout.size)
                with self._counted("fitting"):
                    state = self.solver.fit(problem)
            _check_finite(state, voter)
            self.store.put_state(key, state)

    def _curvature_key(self, voter: Voter) -> str:
        made_of = [self.solver.name, self.solver.describe(), self.curvature, self.seed, self._of]
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
        return f"curvature-{voter.member.identity('gradient')}-{digest}"

    def _problem(self, voter: Voter, active: Active) -> Problem:
        job = self._job(self._train_set, "train_set", self._of)
        return Problem(voter.member.name, job, active, self.curvature, self.seed, self._state(voter))

    def _second_moment(self, voter: Voter) -> Tensor:
        """(k, k) ΦᵀΦ/n of the projected loss gradients."""
        stored, scale = self._stored(voter), self._loss_scale(voter)
        matrix: Tensor | None = None
        for start, stop in self._chunks(stored):
            rows = stored.read(start, stop)["rows"]
            rows = rows if scale is None else rows * scale[start:stop, None].to(rows)
            matrix = rows.T @ rows if matrix is None else matrix.addmm_(rows.T, rows)
        assert matrix is not None
        return matrix / self.n_train_

    @property
    def _damping(self) -> float:
        if self.damping != "auto":
            return float(self.damping)
        return PROJECTED_DAMPING if self._projected else AUTO_DAMPING

    @contextmanager
    def _counted(self, phase: str) -> Iterator[None]:
        """Tell the ledger what a solver takes, whatever its number of steps; eigendecompositions are not counted."""
        if self.ledger is None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.ledger.add_flops(phase, counter.get_total_flops())

    # scores

    def _applied(self, voter: Voter, active: Active) -> tuple[Rowed, Inverse]:
        """What reads rows as vectors, and what preconditions those."""
        state: State | None = self.store.state(self._curvature_key(voter))
        assert state is not None, "fit keeps the curvature of every member"
        if self._projected:
            matrix = state["matrix"]
            factor = cholesky(matrix, self._damping * float(matrix.diagonal().double().mean()))
            if factor is None:
                raise ValueError(f"damping is too small: the curvature of {voter.member.name} is singular")
            plain = Rowed(lambda rows: rows["rows"], lambda vectors, rows: vectors @ rows["rows"].T.to(vectors))
            return plain, lambda vectors: solve(factor, vectors)
        problem = self._problem(voter, active)
        inverse = self.solver.inverse(problem, state, self._damping)

        def checked(vectors: Tensor) -> Tensor:
            with self._counted("serving"):
                out = inverse(vectors)
            if not out.isfinite().all():
                raise ValueError(
                    f"solver={self.solver.name!r} gave numbers that are not finite for {voter.member.name}; "
                    "raise damping"
                )
            return out

        layout = problem.layout
        return Rowed(layout.of_rows, layout.products, max(part.shape[1] for part in layout.parts)), checked

    def _streams(self, voter: Voter) -> bool:
        return True

    def _votes(self, voter: Voter, job: Job, shared: set[str]) -> Iterator[tuple[int, int, Tensor]]:
        stored = self._stored(voter)
        for start, stop, query in self._queries(voter, job, shared):
            parts = [query.against(stored.read(a, b), a, b) for a, b in self._chunks(stored)]
            yield start, stop, torch.cat(parts, 1)

    def _queries(self, voter: Voter, job: Job, shared: set[str]) -> Generator[tuple[int, int, Query], None, None]:
        scale = self._vote_scale(voter)
        with self._bench.active(voter.member, "gradient") as active:
            read, inverse = self._applied(voter, active)
            factor = _factor(scale, self._normalizers(voter, active, read, inverse))
            for start, _, rows in stream_rows(job, voter.member, self._state(voter), self._bench, active):
                for part in _parts(rows, read.vectors):
                    stop = start + len(part)
                    yield start, stop, self._held(inverse(part), read, factor)
                    start = stop

    def _normalizers(self, voter: Voter, active: Active, read: Rowed, inverse: Inverse) -> Tensor | None:
        """(n_train,) what RelatIF divides by, computed once per fit."""
        if self.normalization is None:
            return None
        key = voter.member.identity("gradient")
        if key not in self._held_norms:
            quadratic = self._quadratic(voter, active)
            self._held_norms[key] = self._train_norms(self._stored(voter), read.vectors, inverse, quadratic)
        return self._held_norms[key]

    def _held(self, vectors: Tensor, read: Rowed, factor: Tensor | None) -> Query:
        """Preconditioned test gradients, to be multiplied with the stored ones."""
        if self.ledger is not None:
            self.ledger.add_flops("serving", 2.0 * vectors.numel() * self.n_train_)
        # small enough for the gradients of a slice, or for what stands between the two factors
        step = max(1, _NUMBERS // max(vectors.shape[1], read.widest * len(vectors)))
        held = scan.Vectors(vectors)

        def against(train: Any, a: int, b: int) -> Tensor:
            if isinstance(train, scan.Chunk):
                votes = train.dots(held)
            else:
                # the rows of one example may be several: those of its positions
                parts = batches.spans(len(next(iter(train.values()))), step)
                votes = torch.cat([read.products(vectors, {k: v[i:j] for k, v in train.items()}) for i, j in parts], 1)
            return votes if factor is None else votes * factor[a:b].to(votes)

        return Query.of({"rows": vectors}, against)

    def _quadratic(self, voter: Voter, active: Active) -> Quadratic | None:
        """``rᵀ (H + λI)⁻¹ r`` of rows, where the solver has a short way."""
        if self._projected:
            return None
        state = self.store.state(self._curvature_key(voter))
        assert state is not None, "fit keeps the curvature of every member"
        return self.solver.quadratic(self._problem(voter, active), state, self._damping)

    def _train_norms(
        self, stored: Stored, flat: Callable[[Rows], Tensor], inverse: Inverse, quadratic: Quadratic | None
    ) -> Tensor:
        """(n_train,) what RelatIF divides by, of the stored rows (∇f where the loss follows the output)."""
        out = []
        for a, b in self._chunks(stored):
            if self.normalization == "relatif" and quadratic is not None:
                out.append(quadratic(stored.read(a, b)).clamp_min(0).sqrt())
                continue
            for part in _parts(stored.read(a, b), flat):
                solved = inverse(part)
                if self.normalization == "relatif":
                    out.append((part * solved).sum(1).clamp_min(0).sqrt())
                else:
                    out.append(solved.norm(dim=1))
        return torch.cat(out)

    def _self(self, voter: Voter) -> Tensor:
        stored, scale = self._stored(voter), self._vote_scale(voter)
        with self._bench.active(voter.member, "gradient") as active:
            read, inverse = self._applied(voter, active)
            quadratic = self._quadratic(voter, active)
            factor = _factor(scale, self._normalizers(voter, active, read, inverse))
            dots = []
            if self._of == "output" and quadratic is not None:
                dots = [quadratic(stored.read(a, b)) for a, b in self._chunks(stored)]
            elif self._of == "output":
                for a, b in self._chunks(stored):
                    dots += [(part * inverse(part)).sum(1) for part in _parts(stored.read(a, b), read.vectors)]
            else:
                job = self._job(self._train_set, "train_set", "output")
                for start, stop, rows in stream_rows(job, voter.member, self._state(voter), self._bench, active):
                    solved = [inverse(part) for part in _parts(rows, read.vectors)]
                    others = _parts(stored.read(start, stop), read.vectors)
                    dots += [(x * y.to(x)).sum(1) for x, y in zip(solved, others, strict=True)]
        found = torch.cat(dots)
        return found if factor is None else found * factor.to(found)

    def info(self) -> dict[str, Any]:
        """Adds the solver, the curvature and the damping."""
        return {
            **super().info(),
            "solver": repr(self.solver),
            "curvature": self.curvature,
            "damping": self.damping,
            "damping_used": self._damping,
            "normalization": self.normalization,
        }


def _factor(scale: Tensor | None, norms: Tensor | None) -> Tensor | None:
    """(n_train,) what turns products with stored rows into scores."""
    if norms is None:
        return scale
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(1e-38), 0.0)
    # dividing Q ∇f by its own length leaves the sign of Q alone
    return inverse if scale is None else inverse * scale.sign().to(inverse)


def _parts(rows: Rows, flat: Callable[[Rows], Tensor]) -> Iterator[Tensor]:
    """Flat gradients of a batch, as many at a time as fit."""
    size = len(next(iter(rows.values())))
    first = flat({name: value[:1] for name, value in rows.items()})
    step = max(1, _NUMBERS // first.shape[1])
    for start in range(0, size, step):
        yield flat({name: value[start : start + step] for name, value in rows.items()})


def _check_finite(state: State, voter: Voter) -> None:
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(
                f"the curvature of {voter.member.name} is not finite ({name}); check the checkpoint's weights"
            )
