"""The first examples of a dataset, looked at before work starts: collated, and run through the model once.

What cannot work is said in one sentence that names the dataset, what its items are, what the model was called with and
what to do, rather than by whatever breaks first deep inside of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from byline import batches
from byline.batches import Batch
from byline.engines.workbench import Collate, naming
from byline.forms import describe, first_line, lists_of_numbers
from byline.task import ExampleError, Task

_FEW = 3
# a batch of examples may have so many rows, where masks run side by side
_ROWS = 1024
_HERE = str(Path(__file__).parent)
_MEMORY = (torch.OutOfMemoryError, MemoryError)


def check(
    task: Task,
    dataset: Any,
    name: str,
    collate: Collate = default_collate,
    *,
    model: nn.Module | None = None,
    batch_size: int = 256,
    of: str = "output",
    given: Any = None,
) -> None:
    """Refuse a dataset whose first batch cannot be made, or that the model does not take.

    Args:
        task: what is asked of the model.
        dataset: of `byline.batches.as_dataset`.
        name: what it is called in messages.
        collate: makes a batch of its items.
        model: the task's own, or a copy of it elsewhere.
        batch_size: examples of the first batch; a few of them are run.
        of: what is differentiated, "output" or "loss"; "nothing" to leave the model alone.
        given: what the caller passed for the dataset, whose ``collate_fn`` counts where it is a ``DataLoader``.

    Raises:
        ValueError: says what was expected.
    """
    collate = batches.collate_of(dataset, collate)
    batches.gather(dataset, list(range(min(len(dataset), batch_size))), collate, name)
    # spread over the dataset, which may be sorted
    last = len(dataset) - 1
    places = [0, last // 2, last]
    few = batches.gather(dataset, places, collate, name)
    if collate is not default_collate:
        _check_collate(dataset, places, collate, name, max(batch_size, _ROWS))
    _check_given(given, few, dataset, places, name)
    if not any(t.ndim for t in batches.tensors(few)):
        text = isinstance(dataset[0], str) or (isinstance(dataset[0], Mapping) and "text" in dataset[0])
        advice = "byline.hf.dataset(texts, tokenizer) for texts" if text else "tensors, or collate= that makes them"
        raise ValueError(
            f"{name} makes batches without a tensor that has a row per example, {describe(few)}; {name}[0] is "
            f"{describe(dataset[0])}; expected {advice}"
        )
    if of != "nothing":
        own = task.model if model is None else model
        device = next((p.device for p in own.parameters()), torch.device("cpu"))
        with naming(name, places):
            tried(task, own, batches.to(few, device), lambda batch: task.differentiate(own, batch, of), name, dataset)


def _check_collate(dataset: Any, places: list[int], collate: Collate, name: str, most: int) -> None:
    """Refuse a collate that is random, or whose batches cannot be told apart into examples."""

    def made(count: int) -> Batch:
        return batches.gather(dataset, places[:count], collate, name)

    if not batches.repeats(lambda: made(_FEW)):
        raise ValueError(
            f"collate gives another batch on a second call with {name}{places}; expected one that neither "
            "draws at random (augmentation, masked tokens) nor changes its items: do that once, in the dataset"
        )
    for where, count, fewer in _lengths(made(_FEW), made(_FEW - 1)):
        if (count, fewer) == (_FEW, _FEW - 1):
            continue
        if count != fewer:
            raise ValueError(
                f"the batch's {where} has {count} rows for {_FEW} examples of {name} and {fewer} for {_FEW - 1}; "
                "expected a row for each, first"
            )
        if 1 < count <= most:
            # of as many examples, it would be taken for one row of each
            raise ValueError(
                f"the batch's {where} has {count} rows for any number of examples of {name}; expected a row for each, "
                "first: give every example its own, or make what they share a buffer of the model"
            )


def _lengths(more: Batch, less: Batch, where: str = "") -> Iterator[tuple[str, int, int]]:
    """(where, rows, rows) of the same part of two batches."""
    place = where or "tensor"
    if isinstance(more, Tensor | np.ndarray) and isinstance(less, Tensor | np.ndarray):
        if more.ndim and less.ndim:
            yield place, len(more), len(less)
    elif isinstance(more, Mapping) and isinstance(less, Mapping):
        for key in more:
            if key in less:
                yield from _lengths(more[key], less[key], f"{where}[{key!r}]")
    elif isinstance(more, tuple | list) and isinstance(less, tuple | list):
        if batches.is_field(more) or len(more) != len(less):
            yield place, len(more), len(less)
        else:
            for i, (one, two) in enumerate(zip(more, less, strict=True)):
                yield from _lengths(one, two, f"{where}[{i}]")


def _check_given(given: Any, few: Batch, dataset: Any, places: list[int], name: str) -> None:
    """Refuse a loader whose own collate makes other batches than the one that counts."""
    own = given.collate_fn if isinstance(given, DataLoader) else None
    if own is None or own is default_collate:
        return
    if batches.digest_of(batches.gather(dataset, places, own, name)) != batches.digest_of(few):
        raise ValueError(
            f"{name} is a DataLoader whose collate_fn makes other batches than those of the training set; expected "
            "one and the same, as collate= or of both loaders"
        )


def tried(
    task: Task, model: nn.Module, batch: Batch, run: Callable[[Batch], Any], name: str, dataset: Any = None
) -> None:
    """Run a model on a batch without gradients, and say in a sentence what keeps it from that.

    Args:
        task: what is asked of the model.
        model: the task's, or a copy of it.
        batch: examples on its device.
        run: asks it.
        name: what the batch is of.
        dataset: what an example of it is shown from.

    Raises:
        ExampleError: something is wrong with one example.
        ValueError: anything else, but for a lack of memory.
    """

    def alone(batch: Batch) -> None:
        try:
            with torch.no_grad():
                run(batch)
        except (ExampleError, *_MEMORY):
            raise
        except Exception as error:
            # a forward pass may take gradients itself
            try:
                with torch.enable_grad():
                    run(batches.ordinary(batch))
            except Exception:
                raise error from None

    try:
        alone(batch)
    except (ExampleError, *_MEMORY):
        raise
    except Exception as error:
        item = "" if dataset is None else f"; {name}[0] is {describe(dataset[0])}"
        if isinstance(error, ValueError) and _is_own(error):
            if dataset is None:
                raise
            raise ValueError(f"{name}: {error}{item}") from error
        called = _Called(model)
        with called.watching():
            _succeeds(alone, batch)
        advice = _advice(task, model, alone, batch, error) or _default(model, called, error)
        what = f"{type(error).__name__}: {first_line(error)}"
        if called.inside:
            told = f"the model does not take {name}: {called.inside} raised {what}"
        else:
            told = f"what the task asks of a batch of {name}, {describe(batch)}, raised {what}"
        if dataset is not None and lists_of_numbers(dataset[0]):
            advice = (
                "tensors where it has lists of numbers: torch.tensor(...), with_format('torch') of a Hugging Face "
                "dataset, or byline.hf.dataset"
            )
        raise ValueError(f"{told}{item}; expected {advice}") from error


def _is_own(error: BaseException) -> bool:
    """Whether byline itself has raised an error, in words of its own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_HERE)


class _Called:
    """Which module of a model was called, and with what, when it raised an error."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.open: list[tuple[str, nn.Module, str]] = []

    @property
    def inside(self) -> str:
        """The model's call and the innermost one in it; "" where the model did not raise the error."""
        if not self.open:
            return ""
        _, model, given = self.open[0]
        said = f"{type(model).__name__} was called with ({given})"
        if len(self.open) > 1:
            name, layer, given = self.open[-1]
            shown = repr(layer).splitlines()[0][:80] if not list(layer.children()) else type(layer).__name__
            said += f" and its {name}, {shown}, with ({given}), which"
        else:
            said += " and"
        return said

    @contextmanager
    def watching(self) -> Iterator[None]:
        """For as long as the context lasts."""
        handles: list[Any] = []
        try:
            for name, module in self.model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [describe(value) for value in args]
            given += [f"{key}={describe(value)}" for key, value in kwargs.items() if value is not None]
            self.open.append((name, module, ", ".join(given[:6])))

        return note

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self.open.pop()


def _succeeds(run: Callable[[Batch], None], batch: Batch) -> bool:
    try:
        run(batch)
    except _MEMORY:
        raise
    except Exception:
        return False
    return True


def _advice(task: Task, model: nn.Module, run: Callable[[Batch], None], batch: Batch, error: Exception) -> str:
    """What to do: the first of the usual repairs under which the batch runs, or what the error points to."""
    target = task.targets(batch)
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    kind = str(own).removeprefix("torch.")

    def inputs(change: Callable[[Tensor], Tensor]) -> Callable[[Batch], Batch]:
        return lambda batch: batches.map_tensors(batch, lambda t: t if t is target else change(t))

    def cast(t: Tensor) -> Tensor:
        return t.to(own) if t.is_floating_point() else t

    repairs: list[tuple[str, Callable[[Batch], Batch]]] = [
        (f"inputs of {kind}: x.to(torch.{kind})", inputs(cast)),
        (f"inputs of {kind}: x.to(torch.{kind})", inputs(lambda t: t.to(own))),
        ("inputs of integers: x.long()", inputs(lambda t: t.long())),
        ("channels first: x.permute(2, 0, 1)", inputs(lambda t: cast(t).permute(0, 3, 1, 2) if t.ndim == 4 else t)),
        (f"channels first, in {kind}: x.permute(2, 0, 1).to(torch.{kind})",
         inputs(lambda t: t.to(own).permute(0, 3, 1, 2) if t.ndim == 4 else t)),
        ("a dimension for the channel: x.unsqueeze(0)", inputs(lambda t: cast(t).unsqueeze(1) if t.ndim == 3 else t)),
        (f"a dimension for the channel, in {kind}: x.unsqueeze(0).to(torch.{kind})",
         inputs(lambda t: t.to(own).unsqueeze(1) if t.ndim == 3 else t)),
        ("flat inputs: x.flatten()", inputs(lambda t: cast(t).flatten(1) if t.ndim > 2 else t)),
        (f"flat inputs in {kind}: x.flatten().to(torch.{kind})",
         inputs(lambda t: t.to(own).flatten(1) if t.ndim > 2 else t)),
    ]  # fmt: skip
    # what the model was not made for, and then whatever else it does not take
    for dropped, rest in _without(batch, error, run):
        for after, change in (("", lambda b: b), *repairs):
            if _succeeds(run, change(rest)):
                first = f"examples without {dropped}" if dropped else ""
                return " and ".join(part for part in (first, after) if part)
    if _strings(batch):
        return "numbers where it has strings: labels as ints, text as tokens (byline.hf.dataset)"
    if isinstance(error, IndexError):
        rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
        ids = [t for t in batches.tensors(batch) if t is not target and not t.is_floating_point() and t.numel()]
        if rows and ids:
            longest = max((t.shape[1] for t in ids if t.ndim > 1), default=1)
            return (
                f"numbers and lengths below those of the model's embeddings ({', '.join(map(str, rows))} rows), where "
                f"the batch has numbers up to {max(int(t.max()) for t in ids)} and a length of {longest}"
            )
    return ""


def _default(model: nn.Module, called: _Called, error: Exception) -> str:
    """What to do where no usual repair helps."""
    if called.inside and isinstance(error, RuntimeError):
        return "inputs of a shape, dtype and device that this layer takes"
    try:
        taken = ", ".join(list(inspect.signature(model.forward).parameters)[:6])
    except (TypeError, ValueError):
        taken = "of its forward"
    return (
        f"(*inputs, label) in the order of the model's arguments ({taken}), a dict with their names and "
        "'labels', or collate= that makes such batches"
    )


def _without(batch: Batch, error: Exception, run: Callable[[Batch], None]) -> Iterator[tuple[str, Batch]]:
    """The batch, and the batch without what a model may not be made for; and what that is."""
    yield "", batch
    if isinstance(batch, Mapping):
        rest, dropped = dict(batch), []
        for _ in range(len(batch)):
            named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if named is None or named[1] not in rest:
                break
            dropped.append(repr(named[1]))
            del rest[named[1]]
            try:
                run(rest)
                break
            except Exception as other:
                error = other
        if dropped:
            yield ", ".join(dropped), rest
        strange = [key for key, value in rest.items() if not isinstance(value, Tensor)]
        if strange:
            yield ", ".join(map(repr, strange)), {k: v for k, v in rest.items() if k not in strange}
    elif isinstance(batch, tuple | list):
        kept = [part for part in batch if isinstance(part, Tensor)]
        if len(kept) < len(batch):
            strange = [describe(part) for part in batch if not isinstance(part, Tensor)]
            yield f"what is no tensor ({', '.join(strange)})", tuple(kept)


def _strings(batch: Batch) -> bool:
    if isinstance(batch, Mapping):
        return any(_strings(value) for value in batch.values())
    if isinstance(batch, tuple | list):
        return any(_strings(value) for value in batch)
    return isinstance(batch, str)
