"""What TRAK and TrackStar share: a damped second moment of the rows per member, factorised once."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

from torch import Tensor, nn

from byline.features.base import Products
from byline.methods.base import Attributor, Voter, phase
from byline.methods.damping import auto
from byline.methods.kernels import check_room, dual, factorise, kernel_bytes, primal
from byline.task import chosen

_KEPT = 2**28  # bytes of factors that stay in memory


class Ridge(Attributor):
    """A method that solves against ``RᵀR + λI`` of a member's rows R, in the primal or the dual form.

    Attributes:
        damping_: relative damping per member, as given or as chosen by ``"auto"``, after ``fit``.
    """

    _kept_bytes = _KEPT

    def _prepare(self) -> None:
        self._factors: OrderedDict[str, tuple[Tensor, float]] = OrderedDict()
        self._chosen: dict[str, float] = {}
        self._widths: dict[str, int | None] = {}
        self._products = Products()

    @property
    def damping_(self) -> dict[str, float]:
        """Relative damping per member; ``"auto"`` looks at a member's kernel when it is first needed."""
        self._check_fitted()
        if self.damping == "auto":
            for voter in self._voters:
                if self._key(voter) not in self._chosen:
                    self._factor(voter)
        return {v.member.name: self._relative(self._key(v), None) for v in self._voters}

    def _key(self, voter: Voter) -> str:
        """What a factor depends on, besides the training set."""
        return voter.member.identity("gradient")

    def _relative(self, identity: str, gram: Tensor | None) -> float:
        if self.damping != "auto":
            return float(self.damping)
        if identity not in self._chosen:
            assert gram is not None
            self._chosen[identity] = auto(gram, self.n_train_, len(self._voters))
        return self._chosen[identity]

    def _check_size(self, n_train: int) -> None:
        if self._kernel_bytes(n_train):
            check_room(n_train, self.features)

    def _kernel_bytes(self, n_train: int) -> int:
        if self.features.linear:
            return 0
        model = self.task.model
        params = chosen(model, self.task.selects).values()
        least = self.features.least_width(tuple(p.shape) for p in params)
        if any(member.brings for member in self.ensemble.members()):
            # theirs are other parameters, and fewer
            least = None if least is None else 0
        elif least is not None and _has_look_ups(model, {id(p) for p in params}):
            least = None
        return kernel_bytes(n_train) if least is None or least >= n_train else 0

    def _width(self, voter: Voter) -> int | None:
        """Columns of a member's rows as vectors, if they are some."""
        key = voter.member.identity("gradient")
        if key not in self._widths:
            self._widths[key] = self.features.width(self._stored(voter).forms, self._state(voter))
        return self._widths[key]

    def _in_primal(self, voter: Voter) -> bool:
        width = self._width(voter)
        return width is not None and width < self.n_train_

    def _streams(self, voter: Voter) -> bool:
        return self._in_primal(voter)

    def _warm(self) -> None:
        voters = [voter for voter in self._voters if self._in_primal(voter)]
        # small beside the rows that are held, and each would cost a pass over all of them to make anew
        self._kept_bytes = max(_KEPT, sum(8 * (self._width(voter) or 0) ** 2 for voter in voters))
        for voter in voters:
            self._factor(voter)

    def _factor(self, voter: Voter) -> tuple[Tensor, float]:
        """Cholesky factor of the damped matrix and its λ; the last ones used are kept, up to 256 MB."""
        name, key = voter.member.name, self._key(voter)  # joined ensembles repeat names
        if key in self._factors:
            self._factors.move_to_end(key)
            return self._factors[key]
        with phase(self.ledger, "fitting"):
            stored, n = self._stored(voter), self.n_train_
            primal_form = self._in_primal(voter)
            scales = self._scales(voter)
            if primal_form:
                gram = primal(self.features, stored, self._state(voter), scales)
            else:
                gram = dual(self.features, stored, self._products)
                if scales is not None:
                    gram *= scales.unsqueeze(1) * scales
            # the trace is that of the dual kernel in either form: Σ_i ‖φ(i)‖²
            ridge = self._relative(key, gram) * float(gram.diagonal().double().sum()) / n
            factor = factorise(gram, ridge, name)
            if self.ledger is not None:
                product = 2 * n * len(factor) ** 2 if primal_form else n**2 * stored.columns
                self.ledger.add_flops("fitting", product + len(factor) ** 3 / 3)
        self._factors[key] = factor, ridge
        while len(self._factors) > 1 and sum(8 * f.numel() for f, _ in self._factors.values()) > self._kept_bytes:
            self._factors.popitem(last=False)
        return factor, ridge

    def _scales(self, voter: Voter) -> Tensor | None:
        """(n_train,) what stored rows are multiplied by in the second moment; None for 1."""
        return None

    def _sent(self) -> dict[str, Any]:
        return {**super()._sent(), "_factors": OrderedDict()}

    def _noted(self) -> dict[str, Any]:
        return dict(self._chosen)

    def _note(self, found: dict[str, Any]) -> None:
        self._chosen.update(found)

    def info(self) -> dict[str, Any]:
        """Adds the damping that was used."""
        chosen = [float(self.damping)] if self.damping != "auto" else sorted(self._chosen.values())
        return {
            **super().info(),
            "damping": self.damping,
            "damping_median": chosen[len(chosen) // 2] if chosen else None,
        }


def _has_look_ups(model: nn.Module, parameters: set[int]) -> bool:
    """Whether some of the parameters are an embedding's, and no other layer's."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    tables = (m.weight for m in model.modules() if isinstance(m, nn.Embedding))
    return any(id(table) in parameters and owners[id(table)] == 1 for table in tables)
