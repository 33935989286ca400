"""A row's ensemble, made of the parts in a run folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from byline.ensembles import Dropout, Ensemble, Independent, LoRA, Trajectory, WeightNoise
from byline.ledger import Cost
from byline.settings.rows import Row
from byline.settings.workshop import Trained, Workshop


def ensemble_of(
    shop: Workshop, row: Row, models: Sequence[Trained], stepped: bool = False
) -> tuple[Ensemble, Cost, int]:
    """The members of a row, what training them cost, and the bytes of weights they keep.

    Args:
        shop: whose runs and adapters are taken or made.
        row: which ensemble.
        models: trained models, at least as many as the row has.
        stepped: weight the checkpoints of a run by the step sizes that led to them.
    """
    if row.kind == "trajectory":
        runs = shop.runs(row.models, row.each)
        weights = sum(_bytes(state) for one in runs for state in one.weights)
        steps = [shop.step_sizes(row.each)] * len(runs) if stepped else None
        return Trajectory([list(one.weights) for one in runs], weights=steps), _sum(one.cost for one in runs), weights
    used = models[: row.models]
    base, cost = Independent([model.state for model in used]), _sum(model.cost for model in used)
    weights = sum(_bytes(model.state) for model in used)
    if row.kind == "independent":
        return base, cost, weights
    if row.kind == "weight noise":
        return WeightNoise(base, draws=row.each, **row.options), cost, weights
    if row.kind == "lora":
        adapters, extra = shop.adapters(used, row.each, row.options)
        small = sum(_bytes(adapter.tensors) for of_model in adapters for adapter in of_model)
        return LoRA(base, adapters=adapters), cost + extra, weights + small
    return Dropout(base, masks=row.each, forward_only=row.kind == "forward-only", **row.options), cost, weights


def models_needed(rows: Iterable[Row]) -> int:
    """How many fully trained models the rows share."""
    return max((row.models for row in rows if row.kind != "trajectory"), default=0)


def _sum(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def _bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
