"""The ledger counts what it should, once."""

from __future__ import annotations

import json

import pytest
import torch

from byline.ledger import Cost, Ledger, count_flops, human_bytes, human_flops, human_seconds


def burn() -> None:
    sum(i * i for i in range(20000))


def test_flops_of_a_matrix_product_are_exact() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_flops_of_a_backward_are_twice_the_forward() -> None:
    layer = torch.nn.Linear(8, 4)
    x = torch.ones(2, 8, requires_grad=True)
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 2 * 8 * 4


def test_phases_measure_time_and_keep_apart() -> None:
    ledger = Ledger()
    with ledger.phase("fitting"):
        burn()
    assert ledger.fitting.seconds > 0
    assert ledger.fitting.wall > 0
    assert ledger.training == Cost()
    assert ledger.serving == Cost()


def test_nested_phases_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("byline.ledger.time.process_time", lambda: next(clock))
    ledger = Ledger()
    with ledger.phase("fitting"), ledger.phase("serving"):
        pass
    assert (ledger.fitting.seconds, ledger.serving.seconds) == (1.0 + 4.0, 2.0)


def test_a_phase_inside_itself_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("byline.ledger.time.process_time", lambda: next(clock))
    ledger = Ledger()
    with ledger.phase("fitting"), ledger.phase("fitting"):
        pass
    assert ledger.fitting.seconds == 7.0


def test_time_is_booked_when_the_block_fails() -> None:
    ledger = Ledger()

    def fails() -> None:
        with ledger.phase("training"):
            burn()
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fails()
    assert ledger.training.seconds > 0
    assert not ledger._open


def test_round_trip_and_sum() -> None:
    ledger = Ledger()
    ledger.add_flops("training", 2e9)
    ledger.add_bytes("fitting", 1_500_000)
    ledger.add_seconds("serving", 0.25)
    again = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    assert again == ledger
    assert (ledger + again).total == ledger.total.scaled(2)
    assert repr(ledger) == (
        "Ledger(training: 2 GFLOP, 0 s, 0 B; fitting: 0 FLOP, 0 s, 1.5 MB; serving: 0 FLOP, 250 ms, 0 B)"
    )
    assert repr(Ledger()) == "Ledger(nothing yet)"


def test_unknown_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown phase 'test'"):
        Ledger().add_flops("test", 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 FLOP"),
        (999, "999 FLOP"),
        (999.9, "1 kFLOP"),
        (1.234e9, "1.23 GFLOP"),
        (12.34e9, "12.3 GFLOP"),
        (100e9, "100 GFLOP"),
        (999.7e9, "1 TFLOP"),
        (5e21, "5000 EFLOP"),
    ],
)
def test_human_flops(value: float, text: str) -> None:
    assert human_flops(value) == text


def test_human_units() -> None:
    assert human_bytes(0) == "0 B"
    assert human_bytes(4_300_000) == "4.3 MB"
    assert human_seconds(0.00025) == "250 µs"
    assert human_seconds(0.012) == "12 ms"
    assert human_seconds(0.9999) == "1 s"
    assert human_seconds(90) == "90 s"
    assert human_seconds(300) == "5 min"
    assert human_seconds(9000) == "2.5 h"
