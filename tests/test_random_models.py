"""Random models, random shapes, random batch sizes: scores against plain autograd, one example at a time.

`random_models` has the grammar and the reference. A model that plain autograd can differentiate has the right scores,
or is refused in one sentence where the documentation says so; a batch size that happens to equal another size of the
model is nothing special. Here sixty models, always the same ones; more, and others each time, with::

    BYLINE_RANDOM_MODELS=2000 python -m pytest tests/test_random_models.py -k test_random_model
    PYTHONPATH=src:tests python tests/random_models.py --examples 5000 --seed 1   # does not stop at a failure

A failure prints its `Spec`; ``check(Spec(...))`` repeats it. Add it, made small, to ``KNOWN`` below.
"""

from __future__ import annotations

import functools
import os
import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from random_models import Finding, Spec, build, check, data, draw, far, reference, smaller

MANY = int(os.environ.get("BYLINE_RANDOM_MODELS", "0"))


def specs() -> st.SearchStrategy[Spec]:
    """A spec from each number: choices that are drawn one by one repeat each other, and would leave most pieces out."""
    return st.integers(0, 10**9).map(lambda seed: draw(random.Random(seed).choice))


@settings(
    max_examples=MANY or 60,
    derandomize=not MANY,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate],  # a spec is made smaller below, piece by piece, in seconds
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(specs())
def test_random_model(spec: Spec) -> None:
    try:
        check(spec)
    except Finding as finding:
        small, message = made_smaller(spec, str(finding))
        pytest.fail(f"{small}\n{message}\nmade smaller from {spec}", pytrace=False)


@functools.cache
def made_smaller(spec: Spec, message: str) -> tuple[Spec, str]:
    return smaller(spec, message, budget=20)


# each was wrong, fell over or was refused, once
KNOWN = [
    # a parameter without dimensions
    Spec("vector", ("bare:temperature", "head"), output="callable:loss"),
    Spec("vector", ("head:scaled",), output="callable:margin"),
    # an example's own rows, as many as there are examples in the batch
    Spec("sequence", ("layout:examples", "pool:mean", "head"), t=4),
    Spec("picture", ("picture:loop", "out:mean", "head"), d=4),
    # positions first, as many as there are examples in the batch, or in the last one
    Spec("sequence", ("tokens:transposed", "pool:mean", "head"), d=4, t=4),
    Spec("sequence", ("tokens:transposed", "pool:mean", "head"), d=4, t=4, n=8, batch=8),
    Spec("sequence", ("tokens:contiguous", "pool:weighted", "head"), t=7, batch=7),
    Spec("sequence", ("encoder:second", "pool:mean", "head"), d=4, t=2, n=8, batch=2),
    Spec("sequence", ("encoder:second", "pool:mean", "head"), d=4, t=4, n=8, batch=8),
    # positions that are looked up once for all examples, as many as there are examples in the batch
    Spec("tokens", ("embed", "position:once", "pool:mean", "head"), t=4),
    Spec("tokens", ("embed", "position:halves", "pool:mean", "head"), t=4),
    Spec("ragged", ("embed", "position:halves", "pool:mean", "head"), t=7, n=30, seed=808),
    Spec("sequence", ("position:halves", "head"), output="language-modeling", t=4),
    # examples in another order, which three of them do not show
    Spec("vector", ("layout:flipped", "head"), d=4, t=2, seed=655),
    Spec("padded", ("embed", "tokens:by_length", "pool:first", "head")),
    Spec("left", ("embed", "tokens:by_length", "pool:first", "head"), seed=1),
    Spec("ragged", ("embed", "tokens:by_length", "pool:first", "head"), seed=2),
    Spec("masked", ("tokens:by_length", "pool:first", "head")),
    # layers that few examples, or few positions, go through
    Spec("sequence", ("route:gate_norm", "pool:last", "head"), seed=395),
    Spec("vector", ("subclass:doubled", "route:gate", "head"), output="callable:prior", d=8, batch=2, seed=460),
    Spec("vector", ("route:gate_examples", "head"), d=8, batch=8),
    Spec("sequence", ("route:gate_norm", "pool:mean", "head"), output="callable:prior", batch=1),
    Spec("ragged", ("embed", "route:experts", "pool:max", "head"), seed=702),
    Spec("vector", ("sequence:chunks", "route:experts", "gru:second", "pool:mean", "head"), seed=534),
    Spec("vector", ("frozen:bias", "route:experts", "head"), t=2, n=25, batch=3, members="two", seed=81),
    Spec("masked", ("tokens:valid", "pool:mean", "head"), output="callable:prior", seed=2),
    Spec("masked", ("pool:graph", "head"), output="callable:prior", seed=973),
    Spec("padded", ("embed:onehot", "route:top", "pool:last", "head"), output="callable:prior", d=6, seed=948),
    Spec("padded", ("embed:by_frequency", "head"), output="language-modeling", t=7, seed=878),
    # one module under two names, and an output that goes over the model's parameters
    Spec("vector", ("reuse:alias", "head"), output="callable:prior"),
    Spec("vector", ("reuse:nested", "head"), output="callable:prior"),
    # as many rows as something else has
    Spec("sequence", ("layout:expand", "pool:mean", "head"), batch=2),
    Spec("left", ("embed", "layout:last_first", "pool:max", "head"), t=4),
    Spec("left", ("embed:scaled", "layout:last_first", "inplace:mul", "head"), output="language-modeling"),
    # several masks, and layers whose rows are not the examples
    Spec("vector", ("layout:tiled", "dropout:module", "head"), members="masks2"),
    Spec("vector", ("layout:siamese", "dropout:module", "head"), members="masks2"),
    Spec("vector", ("layout:lead", "dropout:module", "head"), members="masks2"),
    Spec("vector", ("layout:halves", "dropout:module", "head"), members="masks2"),
    Spec("vector", ("layout:examples_one", "dropout:module", "head"), members="masks2"),
    Spec("vector", ("layout:stride", "dropout:module", "head:bare"), members="masks3", d=6),
    Spec("sequence", ("route:top", "pool:flatten", "dropout:module", "head"), members="masks2"),
    Spec("masked", ("pool:graph", "dropout:module", "head"), members="masks2"),
    Spec("vector", ("layout:expand", "dropout:module", "head"), members="masks3", n=30, dtype="float32", seed=309),
    Spec("picture", ("picture:siamese", "out:flatten", "dropout:module", "head"), members="masks3", n=12, batch=1),
    Spec(
        "tokens",
        ("embed:projected", "layout:last_first", "dropout:functional", "head"),
        output="language-modeling",
        t=4,
        n=25,
        batch=3,
        members="masks3",
        seed=924,
    ),
    # masks, and what training mode does to another module
    Spec("vector", ("weights:spectral", "dropout:module", "head"), members="masks2"),
    Spec(
        "ragged",
        ("bag:sum", "groupnorm", "weights:spectral", "dropout:functional", "head"),
        d=4,
        vocab=4,
        members="masks2",
        features="lowrank",
        seed=717,
    ),
    Spec("masked", ("position:rotated", "pool:first", "head")),
    Spec("sequence", ("position:bare2", "pool:mean", "head"), output="regression"),
    Spec("masked", ("position:bare2", "pool:last", "head")),
    # what is left to autograd, on positions
    Spec("sequence", ("subclass:clamped", "pool:last", "head")),
    Spec("sequence", ("hook:output", "pool:mean", "head"), d=4, t=5),
    Spec("sequence", ("inplace:relu", "pool:mean", "head")),
    Spec("padded", ("embed", "subclass:doubled", "pool:first", "head")),
    # a batch of one, changed in place: a layer's output is a view there, and beside others it is none
    Spec("sequence", ("mha", "inplace:relu", "pool:mean", "head"), d=4),
    Spec("sequence", ("mha", "inplace:relu", "pool:mean", "head"), d=4, batch=1),
    Spec("sequence", ("gru:second", "inplace:mul", "pool:mean", "head"), d=4, t=5),
    Spec("tokens", ("embed:pad", "mha:causal", "inplace:relu", "head"), output="language-modeling", d=2),
    Spec("left", ("embed", "layout:last_first", "inplace:mul", "head"), output="language-modeling"),
    Spec("sequence", ("weights:sum", "pool:last", "head")),
    Spec("sequence", ("weights:bias_too", "pool:flatten", "head")),
    # half precision: rounded otherwise beside others
    Spec("sequence", ("mha", "head"), output="language-modeling", d=8, dtype="bfloat16"),
    Spec("vector", ("inside:autocast", "head"), dtype="float32"),
    Spec(
        "tokens",
        ("bag:offsets", "act:tanh", "dropout:functional", "head"),
        d=8,
        classes=4,
        dtype="bfloat16",
        members="masks2",
        seed=145,
    ),
    Spec("sequence", ("tokens:batch_last", "head"), output="language-modeling", t=4, dtype="bfloat16", seed=581),
    Spec("vector", ("bare:prior", "head"), output="callable:loss", dtype="bfloat16"),
]


@pytest.mark.parametrize("spec", KNOWN, ids=lambda spec: "-".join((spec.inputs, *spec.pieces)))
def test_known(spec: Spec) -> None:
    check(spec)


def test_the_comparison_can_fail() -> None:
    spec = Spec("vector", ("linear", "act:tanh", "head"))
    model = build(spec)
    train, test = data(spec, model, 9, 1), data(spec, model, 4, 2)
    values, size = reference(spec, [model], train, test)["GradDot"]
    assert far(values, values, size, 1e-6) is None
    for wrong in (values * 1.01, -values, values.flip(1), values.roll(1, 0), values * torch.nan, values[:3]):
        assert far(wrong, values, size, 1e-3)
