"""DVEMB, data value embeddings along a training run (Wang et al. 2024, arXiv 2412.09538, equation 2).

    DVEmb(z, i) = Σ_c v_cᵀ [mean over the steps of segment c of what is left of a push] w_c (-∇ℓ_c(i))
    v_C = ∇f(θ_C, z),   v_(c-1) = (I - w_c H_c / S)^S v_c,   H_c = Σ_j ∇ℓ_c(j) ∇ℓ_c(j)ᵀ

over the checkpoints c = 1 … C of a run: what a push of the weights during segment c still means at the end of training,
after every later step has pulled at it. w is the step size per example, S the number of optimizer steps of a segment.
Where a checkpoint stands for an epoch the steps are many, and ``(I - wH/S)^S`` is nearly ``exp(-wH)``; the explicit
``I - wH`` would blow up. Within a segment an example is met at an unknown step, so the mean over its steps is taken.

With k columns of linear features and k below the number of training examples, v is kept as it is. Otherwise H acts on
it through the gradients of the training examples alone, so all is done with kernels between checkpoints: no vector of
the parameters' size is kept per test example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from byline.engines.local import Job, stream_rows
from byline.ensembles import Ensemble
from byline.ensembles.base import Member, check_count
from byline.features.base import Products, Rows
from byline.methods.base import Attributor, Voter
from byline.methods.kernels import check_room, kernel_bytes, primal
from byline.store import Stored
from byline.task import Task

_CURVATURES = ("fisher", "ggn")
_BLOCK = 1024  # test examples that go along a run together: each block needs every kernel once
_GROWTH = 1e3  # beyond it a segment is taken to diverge


class DVEmb(Attributor):
    """Influence along the checkpoints of each run, the mean over runs, with the standard error over runs.

    It is how f(z) at the end of a run of plain gradient descent changes with the weight of example i in the loss.
    Momentum, weight decay and an adaptive optimizer's steps per parameter are not followed: no checkpoint keeps them.

    Args:
        task: what is explained.
        ensemble: a ``Trajectory`` with ``weights``: the step sizes per example of the segment that a checkpoint stands
            for. For batches of B examples under their mean loss, learning rate η and E epochs a segment, it is η·E/B;
            with momentum μ, η·E/(B·(1-μ)) comes nearest. A checkpoint may stand at the start of its segment or, as
            one per epoch usually does, at its end. The last of a run is where f is taken; weight 0 gives it no
            segment, so that a checkpoint before every step and the final one, with ``steps=1``, follow a run exactly.
        steps: optimizer steps from one checkpoint to the next; None takes the limit of many.
        curvature: of the loss, summed over the training set: "fisher", the outer products of ∇ℓ (the paper's), or
            "ggn", ``∇f ∇fᵀ``, exact for the squared error and taken for regression alone.
        **options: the other arguments of every method (`Attributor`); ``damping`` has no meaning. Features must have
            one basis for all checkpoints: `Exact`, `Dense` or `Factorized` with its random basis.

    Raises:
        ValueError: an ensemble without step sizes, with masks, noise or adapters, or features with a basis per member;
            in ``fit``, steps too few for the step sizes.
    """

    needs_trajectory: ClassVar[bool] = True

    def __init__(
        self, task: Task, ensemble: Ensemble, *, steps: int | None = None, curvature: str = "fisher", **options: Any
    ):
        super().__init__(task, ensemble, **options)
        self.steps = None if steps is None else check_count(steps, "steps")
        if curvature not in _CURVATURES:
            raise ValueError(f"curvature is {curvature!r}; expected one of {list(_CURVATURES)}")
        if curvature == "ggn" and not (self.task.name == "regression" and self.task.loss_follows_output):
            raise ValueError("curvature is 'ggn', which DVEmb knows for regression alone; use curvature='fisher'")
        self.curvature = curvature
        made = self.features.describe()
        if made["kind"] in ("nystrom", "low-rank", "preconditioned", "principal") or made.get("basis") == "pca":
            raise ValueError(
                f"features is {self.features!r}, whose basis differs from checkpoint to checkpoint; DVEmb takes "
                "byline.Exact(), byline.Dense(...) or byline.Factorized(...) with basis='random'"
            )

    def _check_members(self, members: list[Member]) -> None:
        if any(member.changes for member in members):
            raise ValueError(
                "DVEmb follows a run from checkpoint to checkpoint, and masks, noise and adapters are drawn anew at "
                "each; expected a plain byline.Trajectory"
            )
        if not all(member.weighted for member in members):
            raise ValueError(
                "DVEmb needs the step sizes of a run: byline.Trajectory(runs, weights=[...]) with the learning rate "
                "times the epochs between two checkpoints over the batch size"
            )
        moved = {member.run for member in members if member.weight > 0}
        still = sorted({member.run for member in members} - moved)
        if still:
            raise ValueError(
                f"weights of run {still[0]} are all 0; DVEmb expects at least one step size above 0 in each"
            )

    def _check_size(self, n_train: int) -> None:
        if self._kernel_bytes(n_train):
            check_room(n_train, self.features)

    def _kernel_bytes(self, n_train: int) -> int:
        return 0 if self.features.linear else kernel_bytes(n_train)

    def _prepare(self) -> None:
        self._products = Products()
        found = {voter.member.identity("gradient"): voter for voter in self._voters}
        self._runs: dict[int, list[Voter]] = {}
        # members in the order of training: runs may share a checkpoint, and a voter stands for all its members
        for member in self.ensemble.members():
            voter = replace(found[member.identity("gradient")], member=member, weight=member.weight)
            self._runs.setdefault(member.run, []).append(voter)
        for chain in self._runs.values():
            for voter in chain:
                if voter.weight > 0:
                    self._check_steps(self._spectrum(voter)[0], voter)
        # the step sizes are inside what a run says: runs weigh the same
        self._voters = [replace(chain[-1], weight=1.0) for chain in self._runs.values()]

    def _check_steps(self, values: Tensor, voter: Voter) -> None:
        decay = _propagated(voter.weight * values, self.steps)[0]
        if not decay.isfinite().all() or float(decay.abs().max()) > _GROWTH:
            raise ValueError(
                f"steps is {self.steps}, too few for the step size {voter.weight:.3g} per example of "
                f"{voter.member.name}, which diverges under the curvature; expected more steps, or None"
            )

    def _votes(self, voter: Voter, job: Job, shared: set[str]) -> Iterator[tuple[int, int, Tensor]]:
        chain = self._runs[voter.member.run]
        for start, stop, rows in _blocks(stream_rows(job, voter.member, self._state(voter), self._bench)):
            yield start, stop, self._along(chain, rows)

    def _self(self, voter: Voter) -> Tensor:
        chain = self._runs[voter.member.run]
        return torch.cat([self._along(chain, rows)[:, a:b].diagonal() for a, b, rows in _blocks(self._own_rows(voter))])

    def _along(self, chain: list[Voter], rows: Rows) -> Tensor:
        """(B, n_train) what a run says."""
        steps = [voter for voter in reversed(chain) if voter.weight > 0]
        said = self._in_primal(steps, rows) if self._is_primal(steps[0]) else self._in_dual(steps, rows)
        total: Tensor | None = None
        for voter, part in zip(steps, said, strict=True):
            scale = self._loss_scale(voter)
            part = part if scale is None else part * scale
            total = part if total is None else total + part
        assert total is not None
        return total

    def _is_primal(self, voter: Voter) -> bool:
        return self.features.linear and self._stored(voter).columns < self.n_train_

    def _in_primal(self, steps: list[Voter], rows: Rows) -> Iterator[Tensor]:
        """(B, n_train) the pushes of each segment times what is left of them, from the last on."""
        v = rows["rows"].double()
        for voter in steps:
            stored = self._stored(voter)
            values, vectors, _ = self._spectrum(voter)
            decay, first, _ = _propagated(voter.weight * values, self.steps)
            self._count("serving", len(v), len(values) * (3 * len(values) + self.n_train_))
            along = v @ vectors
            push = ((along * first) @ vectors.T * voter.weight).float()
            v = (along * decay) @ vectors.T
            yield torch.cat([push @ stored.read(a, b)["rows"].to(push).T for a, b in self._chunks(stored)], 1)

    def _in_dual(self, steps: list[Voter], rows: Rows) -> Iterator[Tensor]:
        """The same. v is ∇f less what later segments have pulled: a combination of their stored rows.

        With U the rows of the curvature's root, K = U Uᵀ = E κ Eᵀ: a function of H acts on v as
        ``p(H) v = p(0) v - Uᵀ E [(p(0) - p(κ))/κ] Eᵀ U v``.
        """
        pulls: list[tuple[Stored, Tensor]] = []
        size, n = len(next(iter(rows.values()))), self.n_train_
        for voter in steps:
            stored, weight = self._stored(voter), voter.weight
            seen = self._cross(rows, stored)
            for other, pull in pulls:
                for a, b in self._chunks(other):
                    seen -= pull[:, a:b] @ self._cross(other.read(a, b), stored)
            values, vectors, root = self._spectrum(voter)
            _, first, second = _propagated(weight * values, self.steps)
            along = (seen.double() * root) @ vectors
            pull = ((along * first * weight) @ vectors.T * root).float()
            lost = ((along * second * weight**2) @ vectors.T * root).float()
            parts = [lost[:, a:b] @ self._cross(stored.read(a, b), stored) for a, b in self._chunks(stored)]
            self._count("serving", 1, (size + (len(pulls) + 1) * n) * n * stored.columns)
            self._count("serving", size, n * n * (len(pulls) + 4))
            yield weight * seen - torch.stack(parts).sum(0)
            pulls.append((stored, pull))

    def _spectrum(self, voter: Voter) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues and vectors of the curvature (k, k) or of its root's kernel (N, N); what scales rows to the root.

        All in float64; ``fit`` leaves them in the store.
        """
        stored, scale = self._stored(voter), self._loss_scale(voter)
        scaled = scale is not None and self.curvature == "fisher"
        root = scale.double().abs() if scaled and scale is not None else torch.ones(self.n_train_).double()
        form = "primal" if self._is_primal(voter) else "dual"
        key = f"dvemb-{voter.member.identity('gradient')}-{self.curvature}-{self._of}-{form}"
        found = self.store.state(key)
        if found is None:
            if self._is_primal(voter):
                gram = primal(self.features, stored, {}, root if scaled else None).double()
            else:
                gram = torch.cat([self._cross(stored.read(a, b), stored) for a, b in self._chunks(stored)]).double()
                gram *= root.unsqueeze(1) * root
            self._count("fitting", len(gram), self.n_train_ * stored.columns)
            values, vectors = torch.linalg.eigh(gram)
            found = {"values": values.clamp_min(0), "vectors": vectors.float()}
            self.store.put_state(key, found)
        return found["values"].double(), found["vectors"].double(), root

    def _count(self, phase: str, rows: int, each: float) -> None:
        """Tell the ledger of multiplications; eigendecompositions are not counted."""
        if self.ledger is not None:
            self.ledger.add_flops(phase, 2.0 * rows * each)

    def info(self) -> dict[str, Any]:
        """Adds the curvature and the steps."""
        return {**super().info(), "curvature": self.curvature, "steps": self.steps}


def _propagated(x: Tensor, steps: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of x = wκ: the decay (1 - x/S)^S of a segment, its mean φ = (1 - decay)/x over what follows each step, (1 - φ)/x.

    Near 0 by their series, where the differences would cancel.
    """
    if steps is None:
        gone, s = -torch.expm1(-x), 0.0
    else:
        s = 1 / steps
        slow = -torch.expm1(steps * torch.log1p(-(x * s).clamp_max(0.5)))
        gone = torch.where(x * s < 0.5, slow, 1 - (1 - x * s) ** steps)
    near = x < 1e-4
    safe = torch.where(near, 1.0, x)
    two, three = (1 - s) / 2, (1 - s) * (1 - 2 * s) / 6
    first = torch.where(near, 1 - x * two + x**2 * three, gone / safe)
    second = torch.where(near, two - x * three, (1 - first) / safe)
    return 1 - gone, first, second


def _blocks(batches: Iterable[tuple[int, int, Rows]]) -> Iterator[tuple[int, int, Rows]]:
    """Batches of rows joined to blocks."""
    held: list[Rows] = []
    first = last = 0
    for start, last, rows in batches:
        first = first if held else start
        held.append(rows)
        if last - first >= _BLOCK:
            yield first, last, _joined(held)
            held = []
    if held:
        yield first, last, _joined(held)


def _joined(rows: list[Rows]) -> Rows:
    """One batch of several, padded with zeros where their positions differ in number."""
    out: Rows = {}
    for name in rows[0]:
        parts = [part[name] for part in rows]
        widest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        padded = []
        for part in parts:
            missing = [(0, want - has) for want, has in zip(widest, part.shape[1:], strict=True)]
            padded.append(F.pad(part, [n for pair in reversed(missing) for n in pair]))
        out[name] = torch.cat(padded)
    return out
