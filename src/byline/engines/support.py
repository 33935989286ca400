"""How the gradients of a model's parameters are had: in one pass, or by per-example autograd."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from byline import arrivals, batches
from byline.engines.workbench import Collate, Workbench, naming
from byline.ensembles.base import Ensemble, as_ensemble
from byline.ensembles.independent import Independent
from byline.features.capture import Capture
from byline.features.layers import is_plain
from byline.task import Task

ONE_PASS = "one pass"
VMAP = "vmap"
LOOP = "one by one"
_EXAMPLES = 8


def paths(
    task: Task,
    dataset: Any,
    *,
    ensemble: Ensemble | None = None,
    collate: Collate = default_collate,
    of: str = "output",
) -> list[dict[str, Any]]:
    """Find out of every attributed parameter how `fit` comes by its per-example gradients.

    What `fit` finds out before it starts, and what then holds in a batch of eight examples.

    Args:
        task: whose model is looked at, in eval mode.
        dataset: the training set; a few of its examples are looked at.
        ensemble: whose first member is looked at; the task's own model by default.
        collate: makes a batch of a list of items.
        of: whose gradient: "output" or "loss".

    Returns:
        For each parameter a dict: ``parameter``, its name; ``layer``, the type of what holds it; ``size``, how many
        numbers it is; ``way``: "one pass" (with all others), "vmap" (per-example autograd, the examples of a batch
        together) or "one by one" (a pass per example); and ``how``, in words.

    Raises:
        ValueError: what `fit` refuses of the model.
    """
    if of not in ("output", "loss"):
        raise ValueError(f'of is {of!r}; expected "output" or "loss"')
    training = next((name or "the model" for name, module in task.model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(f"{training} is in train mode; call model.eval() before attribution")
    data = batches.as_dataset(dataset, "dataset")
    arrivals.check(task, data, "dataset", collate, of=of)
    ensemble = Independent([task.model]) if ensemble is None else as_ensemble(ensemble)
    if not all(member.brings for member in ensemble.members()):
        task.chosen()
    ensemble.validate(task.model)
    bench = Workbench(task, data, collate)
    indices = sorted({round(i * (len(data) - 1) / (_EXAMPLES - 1)) for i in range(_EXAMPLES)})
    batch = batches.to(batches.gather(data, indices, collate), bench.device)
    with bench.active(ensemble.members()[0], "gradient") as active:
        capture = active.capture(of)
        with naming("dataset", indices):
            late = capture.ruled(batch, of)[3]
            capture(batch, of)
        holders = _holders(active.model)
        return [
            {"parameter": name, "layer": holders[id(p)], "size": p.numel(), **_way(capture, name, late)}
            for name, p in capture.params.items()
        ]


def grouped(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `paths` found, one dict for all parameters of one name in layers of one type that are had alike."""
    out: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in found:
        key = (one["layer"], one["parameter"].rpartition(".")[2], one["way"], one["how"])
        empty = dict(zip(("layer", "parameter", "way", "how"), key, strict=True)) | {"size": 0}
        out.setdefault(key, empty)["size"] += one["size"]
    return list(out.values())


def _way(capture: Capture, name: str, late: Collection[str]) -> dict[str, str]:
    verdict = capture.verdict
    if name in capture.fallback or name in late:
        way = VMAP if capture.vectorised else LOOP
        seen = "no rule gives its gradients" if name in capture.fallback else "its rule does not hold in every batch"
        return {"way": way, "how": seen}
    if name in verdict.forms:
        return {"way": ONE_PASS, "how": "a copy of it for each example"}
    sites = {key: site for key, site in capture.sites.items() if name in site.slots.values()}
    if not sites.keys().isdisjoint(verdict.spread):
        return {"way": ONE_PASS, "how": "what it gives, which is the same for all examples, repeated for each"}
    if any(site.module is None for site in sites.values()):
        return {"way": ONE_PASS, "how": "the rule of linear layers, for a weight used without its module"}
    if not sites.keys().isdisjoint(verdict.rules):
        return {"way": ONE_PASS, "how": "the rule of a scale, found by trying"}
    theorem = all(site.module is not None and is_plain(site.module, site.rule) for site in sites.values())
    return {"way": ONE_PASS, "how": "its layer's rule" + ("" if theorem else ", its rows added up in every batch")}


def _holders(model: nn.Module) -> dict[int, str]:
    """By a parameter's ``id``, the type of the module that holds it."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        holder = module
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            # …parametrizations.weight, whose numbers make up the weight of the layer two levels up
            holder = model.get_submodule(name.rpartition("parametrizations")[0].rstrip("."))
        kind = holder.original_name if isinstance(holder, torch.jit.ScriptModule) else type(holder).__name__
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), kind)
    return found
