"""DVEMB, data value embeddings along a training run (Wang et al. 2024, arXiv 2412.09538, equation 2).

    DVEmb(z, i) = Σ_c v_cᵀ [mean over the steps of segment c of what is left of a push] w_c (-∇ℓ_c(i))
    v_C = ∇f(θ_C, z),   v_(c-1) = (I - w_c H_c / S)^S v_c,   H_c = Σ_j ∇ℓ_c(j) ∇ℓ_c(j)ᵀ

over the checkpoints c = 1 … C of a run: what a push of the weights during segment c still means at the end of training,
after every later step has pulled at it. w is the step size per example, S the number of optimizer steps of a segment.
Where a checkpoint stands for an epoch the steps are many, and ``(I - wH/S)^S`` is nearly ``exp(-wH)``; the explicit
``I - wH`` would blow up. Within a segment an example is met at an unknown step, so the mean over its steps is taken. H
acts on v through the gradients of the training examples alone, so all is done with kernels between checkpoints: no
vector of the parameters' size is kept per test example.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from byline.engines.local import Job, stream_rows
from byline.ensembles import Ensemble
from byline.ensembles.base import Member, check_count
from byline.features.base import Rows
from byline.methods.base import Attributor, Voter
from byline.methods.kernels import check_room
from byline.store import Stored
from byline.task import Task

_CURVATURES = ("fisher", "ggn")


class DVEmb(Attributor):
    """Influence along the checkpoints of each run, the mean over runs.

    Args:
        task: what is explained.
        ensemble: a ``Trajectory`` with ``weights``: the step sizes per example between the checkpoints. For batches of
            B examples under their mean loss, learning rate η and E epochs from one checkpoint to the next, it is η·E/B.
        steps: optimizer steps from one checkpoint to the next; None takes the limit of many.
        curvature: of the loss, summed over the training set: "fisher", the outer products of ∇ℓ (the paper's), or
            "ggn", ``∇f ∇fᵀ``, exact for the squared error and taken for regression alone.
        **options: the other arguments of every method (`Attributor`); ``damping`` has no meaning. Features must have
            one basis for all checkpoints: `Exact`, `Dense` or `Factorized` with its random basis.

    Raises:
        ValueError: an ensemble without step sizes, with masks, noise or adapters, or features with a basis per member.
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
        if made["kind"] == "nystrom" or made.get("basis") == "pca":
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

    def _check_size(self, n_train: int) -> None:
        check_room(n_train, self.features)

    def _prepare(self) -> None:
        self._runs: dict[str, list[Voter]] = {}
        by_run: dict[int, list[Voter]] = {}
        for voter in self._voters:
            by_run.setdefault(voter.member.run, []).append(voter)
        votes = []
        for chain in by_run.values():
            last = chain[-1]
            self._runs[last.member.identity("gradient")] = chain
            # the step sizes are inside what a run says: runs weigh the same
            votes.append(Voter(last.member, 1.0, last.residual, None))
        self._voters = votes

    def _votes(self, voter: Voter, job: Job, shared: set[str]) -> Iterator[tuple[int, int, Tensor]]:
        chain = self._runs[voter.member.identity("gradient")]
        for start, stop, rows in self._blocks(voter, job):
            yield start, stop, self._along(chain, rows)

    def _blocks(self, voter: Voter, job: Job) -> Iterator[tuple[int, int, Rows]]:
        """Test rows of the last checkpoint, a thousand at a time, each of which needs every kernel once."""
        held: list[Rows] = []
        first = 0
        for _, stop, rows in stream_rows(job, voter.member, self._state(voter), self._bench):
            held.append(rows)
            if stop - first >= 1024:
                yield first, stop, _joined(held)
                held, first = [], stop
        if held:
            yield first, first + sum(len(next(iter(rows.values()))) for rows in held), _joined(held)

    def _along(self, chain: list[Voter], rows: Rows) -> Tensor:
        """(B, n_train) what a run says."""
        total: Tensor | None = None
        pulls: list[tuple[Stored, Tensor]] = []
        for voter in reversed(chain):
            stored, weight = self._stored(voter), voter.member.weight
            if weight == 0:
                continue
            seen = self._cross(rows, stored)
            for other, pull in pulls:
                for a, b in self._chunks(other):
                    seen -= pull[:, a:b] @ self._cross(other.read(a, b), stored)
            kept, pull = self._segment(voter, stored, seen.double(), weight)
            scale = self._loss_scale(voter)
            said = kept if scale is None else kept * scale
            total = said if total is None else total + said
            pulls.append((stored, pull))
        assert total is not None
        return total

    def _segment(self, voter: Voter, stored: Stored, seen: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """What remains of the pushes of a segment, (B, n_train), and by how much of each stored row v is pulled.

        With U the rows of the curvature's root, K = U Uᵀ = E κ Eᵀ: a function of H acts on v as
        ``p(H) v = p(0) v - Uᵀ E [(p(0) - p(κ))/κ] Eᵀ U v``.
        """
        values, vectors, root = self._spectrum(voter, stored)
        along = (seen * root) @ vectors
        decay, mean = self._propagated(values, weight)
        safe = values.clamp_min(1e-300)
        pull = (along * torch.where(values > 0, (1 - decay) / safe, weight)) @ vectors.T * root
        lost = (along * torch.where(values > 0, (weight - mean) / safe, 0.0)) @ vectors.T * root
        parts = [(lost[:, a:b].float() @ self._cross(stored.read(a, b), stored)) for a, b in self._chunks(stored)]
        return (weight * seen).float() - torch.stack(parts).sum(0), pull.float()

    def _propagated(self, values: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """(I - wκ/S)^S, and w times its mean over the steps of the segment that come after a push."""
        safe = values.clamp_min(1e-300)
        if self.steps is None:
            decay = torch.exp(-weight * values)
            mean = torch.where(values > 0, -torch.expm1(-weight * values) / safe, weight)
        else:
            decay = (1 - weight * values / self.steps) ** self.steps
            mean = torch.where(values > 0, (1 - decay) / safe, weight)
        if not decay.isfinite().all() or float(decay.abs().max()) > 1e3:
            raise ValueError(
                f"a segment of steps={self.steps} with the step size {weight:.3g} per example diverges under the "
                "curvature; expected more steps, or steps=None"
            )
        return decay, mean

    def _spectrum(self, voter: Voter, stored: Stored) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues and vectors of the kernel of the curvature's root, and what rows are multiplied by in it."""
        key = f"dvemb-{voter.member.identity('gradient')}-{self.curvature}-{self._of}"
        scale = self._loss_scale(voter)
        root = torch.ones(self.n_train_).double()
        if scale is not None and self.curvature == "fisher":
            root = scale.double().abs()
        found = self.store.state(key)
        if found is None:
            gram = torch.cat([self._cross(stored.read(a, b), stored) for a, b in self._chunks(stored)])
            values, vectors = torch.linalg.eigh(gram.double() * root.unsqueeze(1) * root)
            found = {"values": values.clamp_min(0), "vectors": vectors.float()}
            self.store.put_state(key, found)
        return found["values"].double(), found["vectors"].double(), root

    def _self(self, voter: Voter) -> Tensor:
        chain = self._runs[voter.member.identity("gradient")]
        last = chain[-1]
        return torch.cat([self._along(chain, rows)[:, a:b].diagonal() for a, b, rows in self._own_rows(last)])

    def info(self) -> dict[str, Any]:
        """Adds the curvature and the steps."""
        return {**super().info(), "curvature": self.curvature, "steps": self.steps}


def _joined(rows: list[Rows]) -> Rows:
    return {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
