"""Savings at equal LDS, against cases whose answer is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byline.evaluate.savings import NaiveCurve, Outlay, add_savings


def naive(models: int, lds: float) -> Outlay:
    return Outlay(lds=lds, training=100.0 * models, serving=10.0 * models, space=4.0 * models, models=models)


CURVE = [naive(1, 0.2), naive(4, 0.4), naive(16, 0.5)]


def test_equal_lds_at_a_measured_size() -> None:
    saved = NaiveCurve(CURVE).saved(Outlay(lds=0.4, training=100, serving=30, space=4))
    assert saved.bound == "equal"
    assert saved.naive_models == pytest.approx(4)
    assert saved.training == pytest.approx(0.75)
    assert saved.serving == pytest.approx(0.25)
    assert saved.space == pytest.approx(0.75)


def test_between_sizes_the_curve_is_linear_in_log_models() -> None:
    # Half way from 0.2 to 0.4 is half way from log 1 to log 4: two models.
    saved = NaiveCurve(CURVE).saved(Outlay(lds=0.3, training=100, serving=20, space=16))
    assert saved.naive_models == pytest.approx(2)
    assert saved.training == pytest.approx(0.5)
    assert saved.serving == pytest.approx(0.0)
    assert saved.space == pytest.approx(-1.0)


def test_above_the_largest_naive_ensemble_is_a_lower_bound() -> None:
    saved = NaiveCurve(CURVE).saved(Outlay(lds=0.6, training=160, serving=16, space=64))
    assert saved.bound == "at least"
    assert saved.naive_models == 16
    assert saved.training == pytest.approx(0.9)
    assert saved.space == pytest.approx(0.0)


def test_below_one_model_is_said() -> None:
    saved = NaiveCurve(CURVE).saved(Outlay(lds=0.1, training=50, serving=10, space=4))
    assert saved.bound == "below"
    assert saved.naive_models == 1
    assert saved.training == pytest.approx(0.5)


def test_a_dip_is_averaged_away() -> None:
    curve = NaiveCurve([naive(1, 0.2), naive(4, 0.5), naive(16, 0.4)])
    assert list(curve.lds) == pytest.approx([0.2, 0.45, 0.45])
    # Level with the plateau, the fewest models that reach it; above it, the largest ensemble that was run.
    assert curve.models_for(0.45) == (pytest.approx(4.0), "equal")
    assert curve.models_for(0.46) == (16.0, "at least")


def test_the_naive_rows_save_nothing_against_themselves() -> None:
    curve = NaiveCurve(CURVE)
    for point in CURVE:
        saved = curve.saved(point)
        assert saved.bound == "equal"
        assert (saved.training, saved.serving, saved.space) == pytest.approx((0, 0, 0), abs=1e-9)


def test_a_resource_that_costs_nothing_has_no_percentage() -> None:
    free = [Outlay(lds=0.2, training=0, serving=1, space=1, models=1)]
    assert NaiveCurve(free).saved(Outlay(lds=0.2, training=5, serving=1, space=1)).training is None


def test_order_of_rows_does_not_matter() -> None:
    row = Outlay(lds=0.33, training=100, serving=20, space=16)
    assert NaiveCurve(CURVE).saved(row) == NaiveCurve(CURVE[::-1]).saved(row)


@pytest.mark.parametrize("points", [[], [naive(1, math.nan)]])
def test_useless_curves_are_refused(points: list[Outlay]) -> None:
    with pytest.raises(ValueError, match=r"naive|independently"):
        NaiveCurve(points)


@given(
    ldss=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    lds=st.floats(-0.5, 1.5),
    better=st.floats(0, 0.5),
)
def test_more_lds_never_saves_less(ldss: list[float], lds: float, better: float) -> None:
    curve = NaiveCurve([naive(2**i, value) for i, value in enumerate(ldss)])
    low = curve.saved(Outlay(lds=lds, training=100, serving=10, space=4))
    high = curve.saved(Outlay(lds=lds + better, training=100, serving=10, space=4))
    assert 1 <= low.naive_models <= high.naive_models + 1e-9
    assert low.training is not None
    assert high.training is not None
    assert low.training <= high.training + 1e-9


def test_rows_of_a_result_are_filled_in() -> None:
    def row(kind: str, models: int, lds: float) -> dict[str, object]:
        return {
            "kind": kind,
            "models": models,
            "lds": lds,
            "training": {"flops": 100.0 * models},
            "serving": {"flops": 10.0 * models},
            "space": 4 * models,
        }

    rows = [row("independent", 1, 0.2), row("independent", 4, 0.4), row("dropout", 1, 0.4)]
    done = add_savings(rows)
    assert done[0]["saved"] is None
    assert done[2]["saved"]["training"] == pytest.approx(0.75)
    assert "saved" not in rows[2]
    assert add_savings(rows[2:])[0]["saved"] is None
