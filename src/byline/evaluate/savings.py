"""Savings at equal efficacy: what an ensemble costs against the naive one *of equal LDS*.

Comparing two ensembles of equal size says little, because they are not equally good. So the naive rows
(independently trained models) are read as a curve, LDS against the number of models, and each other row is
compared with the naive ensemble that would have had the same LDS. That ensemble, I* models, is mostly not a
whole number and was mostly not run: its LDS is interpolated, linearly in log I between the rows that were
run, and its costs are I* times what one model costs. Beyond the largest naive ensemble that was run nothing
is extrapolated: a saving there is a lower bound, and is called that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

RESOURCES: tuple[str, ...] = ("training", "serving", "space")

Bound = Literal["equal", "at least", "below"]


@dataclass(frozen=True)
class Outlay:
    """An ensemble's LDS and what it costs: training FLOPs, serving FLOPs per query, bytes kept."""

    lds: float
    training: float
    serving: float
    space: float
    models: int = 1

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Outlay:
        """From a row of a comparison's result."""
        return cls(
            lds=row["lds"],
            training=row["training"]["flops"],
            serving=row["serving"]["flops"],
            space=row["space"],
            models=row["models"],
        )


@dataclass(frozen=True)
class Saved:
    """Fractions saved against the naive ensemble of equal LDS.

    Attributes:
        training: of training FLOPs; 0.8 is "80 % less", a negative number is "more". None where the naive
            ensemble itself costs nothing, so that a fraction means nothing.
        serving: of serving FLOPs per query.
        space: of bytes kept.
        naive_models: I*, the size of the naive ensemble compared with.
        bound: `equal`: that ensemble has the row's LDS. `at least`: no naive ensemble that was run reaches
            the row's LDS, so the comparison is with the largest, and the saving at equal LDS is at least
            this. `below`: the row is worse than the smallest naive ensemble (one model, as a rule), which is
            what it is compared with; a saving here buys less efficacy and is not one at equal LDS.
    """

    training: float | None
    serving: float | None
    space: float | None
    naive_models: float
    bound: Bound

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class NaiveCurve:
    """LDS and cost of the naive ensemble as a function of its number of models.

    Args:
        points: the naive rows. Repeated sizes are averaged.

    The LDS is made to rise with the number of models (isotonic regression, weighting each row equally), since
    measured values need not; the costs are straight lines through the origin, by least squares.
    """

    def __init__(self, points: Iterable[Outlay]) -> None:
        from sklearn.isotonic import IsotonicRegression

        given = sorted(points, key=lambda point: point.models)
        if not given:
            raise ValueError("savings need at least one row of independently trained models to compare with")
        if given[0].models < 1 or not all(math.isfinite(point.lds) for point in given):
            raise ValueError("a naive row needs at least one model and a finite LDS")
        sizes = np.array([point.models for point in given], dtype=float)
        fitted = IsotonicRegression().fit(np.log(sizes), [point.lds for point in given])
        self.models = np.unique(sizes)
        self.lds = np.asarray(fitted.predict(np.log(self.models)), dtype=float)
        self.per_model = {
            name: float(sizes @ [getattr(point, name) for point in given] / (sizes @ sizes)) for name in RESOURCES
        }

    def lds_at(self, models: float) -> float:
        """LDS of that many models, between the smallest and the largest ensemble that was run."""
        return float(np.interp(math.log(models), np.log(self.models), self.lds))

    def models_for(self, lds: float) -> tuple[float, Bound]:
        """The fewest models whose LDS is `lds`, and in which sense it is that.

        On a flat stretch of the curve the fewest are taken: that makes the savings smaller, not larger.
        """
        tolerance = 1e-9  # a naive row must find itself, whatever the regression's rounding did
        reached = np.flatnonzero(self.lds >= lds - tolerance)
        if not len(reached):
            return float(self.models[-1]), "at least"
        above = int(reached[0])
        if above == 0:
            return float(self.models[0]), "below" if lds < self.lds[0] - tolerance else "equal"
        left, right = np.log(self.models[above - 1 : above + 1])
        low, high = self.lds[above - 1 : above + 1]
        return float(math.exp(left + min((lds - low) / (high - low), 1.0) * (right - left))), "equal"

    def saved(self, row: Outlay) -> Saved:
        """What `row` saves against the naive ensemble of its LDS."""
        if not math.isfinite(row.lds):
            raise ValueError(f"LDS must be finite, got {row.lds}")
        models, bound = self.models_for(row.lds)

        def fraction(name: str) -> float | None:
            naive = models * self.per_model[name]
            return 1.0 - getattr(row, name) / naive if naive > 0 else None

        return Saved(fraction("training"), fraction("serving"), fraction("space"), models, bound)


def add_savings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of a comparison with `saved` filled in; for the naive rows themselves it is None."""
    naive = [Outlay.from_row(row) for row in rows if row["kind"] == "independent"]
    if not naive:
        return [{**row, "saved": None} for row in rows]
    curve = NaiveCurve(naive)
    return [
        {
            **row,
            "saved": None if row["kind"] == "independent" else curve.saved(Outlay.from_row(row)).to_dict(),
        }
        for row in rows
    ]
