"""Work in this process: features and residuals of members, batch by batch, into a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from byline import batches
from byline.engines.workbench import Active, Collate, Workbench, naming
from byline.ensembles.base import Member
from byline.ensembles.dropout import MaskChange
from byline.features.base import Features, Rows, State
from byline.features.blocks import Block, Flat, Lookup, Outer
from byline.features.capture import Capture
from byline.features.layers import is_finite
from byline.ledger import Ledger, count_flops
from byline.progress import bar
from byline.store import Store
from byline.task import Task

# side by side, masks share the overhead of each operation; beyond this many rows there is none left to share
_TILED_ROWS = 1024


@dataclass
class Job:
    """What is needed to turn examples into rows."""

    task: Task
    features: Features
    dataset: Any
    name: str
    """What the dataset is called in messages."""
    batch_size: int
    of: str
    """"output" or "loss"."""
    collate: Collate = default_collate
    ledger: Ledger | None = None
    progress: bool = True

    def batch(self, start: int, stop: int, device: torch.device) -> Any:
        """Examples on the device."""
        if stop > len(self.dataset):
            raise IndexError(stop)
        if self.collate is default_collate:
            found = batches.fetch(self.dataset, start, stop)
        else:
            found = batches.gather(self.dataset, list(range(start, stop)), self.collate)
        return batches.to(found, device)

    def spans(self) -> list[tuple[int, int]]:
        """The batches."""
        return batches.spans(len(self.dataset), self.batch_size)


def write_features(job: Job, members: Sequence[Member], store: Store, bench: Workbench) -> None:
    """Compute what the store lacks: features, outputs and residuals of every member, each distinct one once."""
    distinct = {m.identity("gradient"): m for m in reversed(members)}
    missing = [m for i, m in reversed(distinct.items()) if store.features(_key(job, i)) is None]
    found = [m for m in distinct.values() if m not in missing]
    if found:
        _verify(job, found[-1], store, bench)
    groups = _groups(missing, job, bench)
    with bar(len(missing) * len(job.spans()), "features", job.progress) as advance:
        for group in groups:
            _write_group(job, group, store, bench, advance)
    _write_residuals(job, members, store, bench)


def _verify(job: Job, member: Member, store: Store, bench: Workbench) -> None:
    """Refuse a store whose numbers the model no longer gives: its code can change without a trace in its structure."""
    kept = store.vector(job.of, member.identity("gradient"))
    if kept is None:
        return
    size = min(8, len(job.dataset))
    batch = job.batch(0, size, bench.device)
    with bench.active(member, "gradient") as active, torch.no_grad(), naming(job.name, range(size)):
        value = job.task.differentiate(active.model, batch, job.of)[0].cpu().to(kept.dtype)
    odd = (~torch.isclose(value, kept[:size], rtol=1e-3, atol=1e-3, equal_nan=True)).nonzero()
    if len(odd):
        i = int(odd[0, 0])
        raise ValueError(
            f"store {store.path or 'in memory'} was made by another model or collate: the {job.of} of "
            f"{job.name}[{i}] is {float(value[i]):.6g} here and {float(kept[i]):.6g} in the store. Use another folder, "
            "or delete this one"
        )


def member_key(identity: str, of: str) -> str:
    """The store's name for the gradients of a member: of its output, or of its loss."""
    return f"{identity}-{of}"


def _key(job: Job, identity: str) -> str:
    return member_key(identity, job.of)


def _groups(members: Sequence[Member], job: Job, bench: Workbench) -> list[list[Member]]:
    """Members that differ in the mask alone run side by side, where a batch is small enough for that to pay."""
    room = max(1, _TILED_ROWS // min(job.batch_size, len(job.dataset)))
    groups: list[list[Member]] = []
    previous: tuple[Any, ...] | None = None
    for member in members:
        chain = member.chain("gradient")
        signature: tuple[Any, ...] | None = None
        if chain and isinstance(chain[-1], MaskChange) and not any(isinstance(c, MaskChange) for c in chain[:-1]):
            mask = chain[-1]
            before = [str(change.spec()) for change in chain[:-1]]
            signature = (member.weights.digest(), *before, mask.seed, mask.model_index, mask.p)
        if signature is not None and signature == previous and len(groups[-1]) < room:
            groups[-1].append(member)
        else:
            groups.append([member])
        previous = signature
    return groups


def _write_group(job: Job, group: list[Member], store: Store, bench: Workbench, advance: Callable[..., None]) -> None:
    states = [learn(job, member, store, bench) for member in group]
    with bench.active(group[0], "gradient") as alone:
        tiled = len(group) > 1 and alone.tiles and alone.capture(job.of).fast
    if not tiled:
        for member, state in zip(group, states, strict=True):
            with bench.active(member, "gradient") as active:
                _write(job, [member], [state], active, store, bench, advance)
        return
    with bench.active(group[0], "gradient", beside=group[1:]) as active:
        _write(job, group, states, active, store, bench, advance)


def _write(
    job: Job,
    group: list[Member],
    states: list[State],
    active: Active,
    store: Store,
    bench: Workbench,
    advance: Callable[..., None],
) -> None:
    n, copies = len(job.dataset), len(group)
    values, residuals = torch.empty(copies, n), torch.empty(copies, n)
    keys = [_key(job, m.identity("gradient")) for m in group]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(store.writing(k, m.name, n, job.batch_size)) for k, m in zip(keys, group, strict=True)
        ]
        capture = active.capture(job.of)
        for start, stop in job.spans():
            batch = job.batch(start, stop, bench.device)
            size = stop - start
            if copies > 1:
                batch = batches.tile(batch, copies)
            value, residual, blocks = _checked(job, capture, batch, range(start, stop))
            if start == 0 and job.ledger is not None:
                job.ledger.add_flops("fitting", _row_flops(job, capture, batch, states[0]) * n / size)
            values[:, start:stop] = value.view(copies, size)
            residuals[:, start:stop] = residual.view(copies, size)
            for copy, (writer, state) in enumerate(zip(writers, states, strict=True)):
                own = blocks if copies == 1 else {k: _cut(b, copy * size, size) for k, b in blocks.items()}
                writer.append(start, job.features.rows(own, state))
            advance(copies, f"features of {group[0].name}" + (f" and {copies - 1} more" if copies > 1 else ""))
    for copy, member in enumerate(group):
        identity = member.identity("gradient")
        store.put_vector("residual", identity, residuals[copy], member.name, flush=False)
        store.put_vector(job.of, identity, values[copy], member.name)


def _checked(job: Job, capture: Capture, batch: Any, indices: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Block]]:
    with naming(job.name, indices):
        value, residual, blocks = capture(batch, job.of)
    total = sum(float(b.grad.sum() if isinstance(b, Flat) else b.right.sum()) for b in blocks.values())
    total += sum(float(b.left.sum()) for b in blocks.values() if isinstance(b, Outer))
    total += float(value.sum()) + float(residual.sum())
    if total != total or total in (float("inf"), float("-inf")):
        finite = torch.stack([is_finite(b) for b in blocks.values()] + [value.isfinite(), residual.isfinite()]).all(0)
        if not finite.all():
            position = indices[int((~finite).nonzero()[0, 0]) % len(indices)]
            raise ValueError(
                f"{job.name}[{position}] has a NaN or infinite gradient or output; expected finite numbers "
                "(check that example, and the checkpoint's weights)"
            )
    return value, residual, blocks


def _row_flops(job: Job, capture: Capture, batch: Any, state: State) -> int:
    """What turning a batch into rows takes."""
    return count_flops(lambda: job.features.rows(capture(batch, job.of)[2], state))


def _cut(block: Block, start: int, size: int) -> Block:
    """One member's part of a batch that held several."""
    place = slice(start, start + size)
    if isinstance(block, Flat):
        return Flat(block.params, block.grad[place])
    if isinstance(block, Lookup):
        return Lookup(block.params, block.ids[place], block.right[place], block.n)
    return Outer(block.params, block.left[place], block.right[place])


def learn(job: Job, member: Member, store: Store, bench: Workbench) -> State:
    """What the features learn from the training set for a member, from the store if it is there."""
    key = _key(job, member.identity("gradient"))
    found = store.state(key)
    if found is not None:
        return found
    n = len(job.dataset)

    def passes(indices: list[int] | None) -> Iterator[dict[str, Block]]:
        with bench.active(member, "gradient") as active:
            capture = active.capture(job.of)
            chosen = list(range(n)) if indices is None else indices
            for start, stop in batches.spans(len(chosen), job.batch_size):
                part = chosen[start:stop]
                batch = batches.to(batches.gather(job.dataset, part, job.collate), bench.device)
                yield _checked(job, capture, batch, part)[2]

    state = job.features.learn(passes, n)
    store.put_state(key, state)
    return state


def _write_residuals(job: Job, members: Sequence[Member], store: Store, bench: Workbench) -> None:
    """Q of members whose gradients come from another configuration (forward-only): forward passes alone."""
    distinct = {m.identity("residual"): m for m in reversed(members)}
    missing = [m for i, m in reversed(distinct.items()) if store.vector("residual", i) is None]
    n = len(job.dataset)
    with bar(len(missing), "residuals", job.progress) as advance:
        for member in missing:
            residuals = torch.empty(n)
            with bench.active(member, "residual") as active:
                for start, stop in job.spans():
                    batch = job.batch(start, stop, bench.device)
                    with naming(job.name, range(start, stop)):
                        residuals[start:stop] = job.task.residual(active.model, batch)
                    if start == 0 and job.ledger is not None:
                        flops = count_flops(partial(job.task.residual, active.model, batch))
                        job.ledger.add_flops("fitting", flops * n / (stop - start))
            bad = (~residuals.isfinite()).nonzero()
            if len(bad):
                raise ValueError(f"{job.name}[{int(bad[0, 0])}] has a NaN or infinite output; expected finite numbers")
            store.put_vector("residual", member.identity("residual"), residuals, member.name)
            advance(1, f"residuals of {member.name}")


def stream_rows(
    job: Job, member: Member, state: State, bench: Workbench, active: Active | None = None
) -> Iterator[tuple[int, int, Rows]]:
    """(start, stop, rows) of a dataset that is not kept: test examples, or training examples from their other side.

    Pass ``active`` where the member is on the workbench already: its changes must not be applied twice.
    """
    with bench.active(member, "gradient") if active is None else nullcontext(active) as active:
        capture = active.capture(job.of)
        for start, stop in job.spans():
            batch = job.batch(start, stop, bench.device)
            _, _, blocks = _checked(job, capture, batch, range(start, stop))
            if start == 0 and job.ledger is not None:
                job.ledger.add_flops(
                    "serving", _row_flops(job, capture, batch, state) * len(job.dataset) / (stop - start)
                )
            yield start, stop, job.features.rows(blocks, state)
