"""The automatic damping leaves the effective dimension that it says, however the spectrum is found."""

from __future__ import annotations

import pytest
import torch

from byline.methods.damping import EXAMPLES_PER_FREEDOM, auto


def kernel(n: int, rank: int) -> torch.Tensor:
    torch.manual_seed(0)
    rows = torch.randn(n, rank) * torch.arange(1, rank + 1) ** -0.5
    return rows @ rows.T


def freedom(gram: torch.Tensor, relative: float) -> float:
    values = torch.linalg.eigvalsh(gram.double()).clamp_min(0)
    return float((values / (values + relative * values.sum() / len(gram))).sum())


@pytest.mark.parametrize(("n", "tolerance"), [(300, 1e-6), (900, 0.06), (2200, 0.06)])
@pytest.mark.parametrize("members", [1, 16])
def test_leaves_the_freedom_it_says(n: int, tolerance: float, members: int) -> None:
    gram = kernel(n, n)
    expected = members**0.25 * n / EXAMPLES_PER_FREEDOM
    assert freedom(gram, auto(gram, n, members)) == pytest.approx(expected, rel=tolerance)


def test_scale_does_not_matter_and_more_than_sixteen_members_change_nothing() -> None:
    gram = kernel(200, 200)
    assert auto(gram * 1e6, 200) == pytest.approx(auto(gram, 200), rel=1e-4)
    assert auto(gram, 200, 50) == auto(gram, 200, 16) < auto(gram, 200, 1)


def test_few_columns_are_half_free_at_most() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4000, 20)
    found = auto(rows.T @ rows, 4000)
    values = torch.linalg.eigvalsh((rows.T @ rows).double())
    assert float((values / (values + found * values.sum() / 4000)).sum()) == pytest.approx(10, rel=1e-4)


def test_a_kernel_of_zeros_gets_a_number() -> None:
    assert auto(torch.zeros(5, 5), 5) == 1.0
