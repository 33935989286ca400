"""What every method shares: fitting, attributing, and the mean over members."""

from __future__ import annotations

import functools
import inspect
import json
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate

from byline import arrivals, batches
from byline.engines.base import HERE, Engine, as_engine
from byline.engines.local import Job, member_key, stream_rows, write_features
from byline.engines.workbench import Collate, Workbench
from byline.ensembles.base import Ensemble, Member, as_ensemble, check_count
from byline.features import Exact, Features
from byline.features.base import Products, Rows, State
from byline.features.layers import rule_for
from byline.guards import Lock, kept_grad
from byline.ledger import Ledger
from byline.methods import residuals, scan, streaming
from byline.methods.mean import RunningMean
from byline.methods.streaming import Query
from byline.methods.voting import Block, Voting
from byline.progress import bar
from byline.scores import Ranking, Scores, check_k, matrix
from byline.store import Store, Stored, StoredRows
from byline.task import FINGERPRINTS, ParamFilter, Task, source_of
from byline.votes import Collected, Votes

Scorer = Callable[[Rows], Tensor]
"""Rows of a test batch -> (B, n_train) what one member says."""
Mean = TypeVar("Mean", RunningMean, Collected)
Made = TypeVar("Made", bound="Attributor")
T = TypeVar("T")
Prepare = Callable[[Rows], Query]
"""Rows of a test batch -> what is held of them while training examples pass by."""

# larger matrices of scores go to a memory-mapped file
_IN_MEMORY = 2**30


@dataclass
class Voter:
    """Members that share their gradients: one of them, and what all of them weigh."""

    member: Member
    weight: float
    residual: Tensor
    """(n_train,) the mean Q of these members, as it is."""
    residual_variance: Tensor | None
    """(n_train,) the squared standard error of the mean that scores carry; None for one member."""
    members: tuple[Member, ...] = ()
    """All of them."""
    made: Tensor | None = None
    """(n_train,) what scores carry in place of the mean Q; None for the mean itself."""
    counted: Tensor | None = None
    """(n_train,) bool: whether these members count in the mean of Q; None where all members do."""
    deviation: Tensor | None = None
    """(n_train,) where they count, their weight times Q less its mean over members; given with ``counted``."""


def _whole(method: Callable[..., Any]) -> Callable[..., Any]:
    """A public method that happens as a whole or not at all, and in one thread at a time."""

    @functools.wraps(method)
    def whole(self: Attributor, *args: Any, **kwargs: Any) -> Any:
        return self._as_whole(lambda made: method(made, *args, **kwargs))

    whole._is_whole = True  # type: ignore[attr-defined]
    return whole


def _guarded(cls: type[Made]) -> type[Made]:
    """A class all of whose own public methods and properties are wholes."""
    for name, value in list(vars(cls).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, property) and value.fget is not None:
            setattr(cls, name, property(_whole(value.fget), value.fset, value.fdel, value.__doc__))
        elif inspect.isfunction(value):
            setattr(cls, name, _whole(value))
    return cls


@_guarded
class Attributor(ABC):
    """A method on a task and an ensemble.

    Several threads may use one: they take turns. A public call that fails, or is interrupted, leaves it as it was. A
    fitted one can be pickled and copied; a copy opens the same ``store``, or has its own where that is in memory.

    Args:
        task: what is explained.
        ensemble: who votes.
        features: how gradients become rows; `Exact` by default.
        damping: λ relative to the mean squared norm of the rows, or ``"auto"``. Methods without curvature ignore it.
        params: which parameters count, instead of the task's own choice (see `byline.Task`).
        residual: whose Q scores carry, and what is made of it, where a method has one (TRAK, and those that take the
            training gradient of a named output for what it is, ``-∇ℓ = Q ∇f``):

            - "auto": "mean".
            - "mean": that of every member, as it is; under `byline.CrossFit` the mean of those that were trained on
              the example and of those that were not, which `docs/frontier-theory.md` derives.
            - "in-sample", "out-of-sample": of the members that were, or were not, trained on the example.
            - "leave-one-out" (TRAK alone): what Q would be had the member not been trained on the example, to first
              order, from the leverage of the example in the member's own kernel; no training.
            - "sqrt": ``sign(Q) √|Q|`` of every member, for classifiers that have learnt their training set by heart.
        store: a folder in which everything computed is kept and found again; None keeps it in memory.
        batch_size: examples per batch; scores do not depend on it beyond rounding.
        collate: makes a batch of a list of items; the training set's own ``collate_fn`` where it has one (as
            `byline.hf.dataset` does), torch's default otherwise.
        device: where to work; the device of the task's model by default. GPUs are untested.
        ledger: is told what fitting and serving cost.
        progress: show a progress bar where stderr is a terminal.
        engine: where the work is done: in this process by default, ``"ray"`` or `byline.engines.Ray`, which needs a
            ``store`` that its workers reach.

    Attributes:
        n_train_: number of training examples, after ``fit``.
    """

    residuals: tuple[str, ...] = ("mean",)
    """What the method takes as ``residual=`` beside "auto"."""
    train_side: ClassVar[str] = "loss"
    """Whose gradient is taken at the training example: "output", or "loss" for -∇ℓ."""
    _differentiates: ClassVar[bool] = True

    def __init__(
        self,
        task: Task,
        ensemble: Ensemble,
        *,
        features: Features | None = None,
        damping: float | str = "auto",
        params: ParamFilter | None = None,
        residual: str = "auto",
        store: str | Path | None = None,
        batch_size: int = 256,
        collate: Collate | None = None,
        device: Any = None,
        ledger: Ledger | None = None,
        progress: bool = True,
        engine: str | Engine | None = None,
    ):
        if not isinstance(task, Task):
            raise TypeError(f"task is a {type(task).__name__}; expected a byline.Task")
        if features is not None and not isinstance(features, Features):
            raise TypeError(f"features is a {type(features).__name__}; expected one such as byline.Exact()")
        if damping != "auto" and (
            not isinstance(damping, int | float) or isinstance(damping, bool) or not 0 <= damping < float("inf")
        ):
            raise ValueError(f"damping is {damping!r}; expected 'auto' or a finite number of at least 0")
        if residual not in ("auto", *self.residuals):
            known = ", ".join(map(repr, ("auto", *self.residuals)))
            raise ValueError(f"residual is {residual!r}; {type(self).__name__} takes {known}")
        self.task = task if params is None else task.choosing(params)
        self.ensemble = as_ensemble(ensemble)
        self.features = Exact() if features is None else features
        self.damping = damping
        self.residual = "mean" if residual == "auto" else residual
        self.batch_size = check_count(batch_size, "batch_size")
        self.collate = collate
        self.device = device
        self.ledger = ledger
        self.progress = progress
        self.engine = as_engine(engine)
        self.store = Store(store)
        self.engine.check(self.store)
        self._train_set: Any = None
        self._lock = Lock()
        self._check_members(self.ensemble.members())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _guarded(cls)

    def _as_whole(self: Made, work: Callable[[Made], T]) -> T:
        """Have something done by a stand-in, and become it when all of it is done."""
        with self._lock(), kept_grad(), torch.inference_mode(False), torch.enable_grad():
            made = object.__new__(type(self))
            kinds = (dict, list, set, OrderedDict)
            vars(made).update({k: v.copy() if type(v) in kinds else v for k, v in vars(self).items()})
            found = work(made)
            # one step: no interrupt can come in the middle of it
            self.__dict__ = made.__dict__
        return self if found is made else found  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        with self._lock():
            held = next((chunk.dtype for rows in self._held_rows() for chunk in rows.chunks), None)
            own = {"store": self.store, "engine": self.engine, "ledger": self.ledger, "_held_as": held}
            return {**self._sent(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = state.pop("_held_as")
        vars(self).update(state, _lock=Lock())
        if self._train_set is None:
            return
        if self.store.manifest.made_for != self._made_for:
            raise ValueError(
                f"the attributor was fitted on {self.store}, which does not hold that here (another machine, another "
                "process's memory, or a folder that was deleted?); expected a store that this process reaches"
            )
        self._let_go()
        self._bench = Workbench(self.task, self._train_set, self.collate, self.device)
        self._products = Products()
        if held is not None:
            self.hold(held)

    def _held_rows(self) -> Iterable[scan.Resident]:
        return self._resident.values() if self._train_set is not None else ()

    # the public face

    @property
    def collate(self) -> Collate:
        """What makes a batch: what was given, else what the training set brings, else torch's default."""
        own = self._collate_given or self._collate_brought
        return default_collate if own is None else own

    @collate.setter
    def collate(self, given: Collate | None) -> None:
        self._collate_given = None if given is default_collate else given
        self._collate_brought: Collate | None = None

    def fit(self, train_set: Any) -> Attributor:
        """Compute what the training set's side needs; what the store holds already is not computed again.

        Args:
            train_set: any map-style torch Dataset.

        Raises:
            ValueError, TypeError: anything that cannot work, in one sentence, before long work starts.
        """
        data = batches.as_dataset(train_set, "train_set")
        return self._fit(data, _brought(train_set, data))

    def _fit(self: Made, data: Any, brought: Collate | None) -> Made:
        self._collate_brought = brought
        self._check_model()
        self._check_size(len(data))
        self._check_residual(len(data))
        arrivals.check(self.task, data, "train_set", self.collate, batch_size=self.batch_size, of=self._asked(self._of))
        with phase(self.ledger, "fitting"):
            made_for = json.loads(json.dumps(self._fingerprints(data)))
            if self.store.place is None and self.store.manifest.made_for not in ({}, made_for):
                # what is in memory serves one configuration, and is not in the way of another
                self.store = Store(None)
            with self.store.session():
                self.store.claim(made_for)
                self._made_for = made_for
                self._train_set, self.n_train_ = data, len(data)
                self._bench = Workbench(self.task, data, self.collate, self.device)
                self._let_go()
                self._write()
                self._voters = self._gather()
                self._choose_residuals()
                self._prepare()
            found = {id(m.weights): m.weights for m in self.ensemble.members()}
            self._weights = [(weights, weights.digest()) for weights in found.values()]
        return self

    def _fingerprints(self, data: Any) -> dict[str, Any]:
        """All that the numbers in the store depend on, as far as it can be seen."""
        places = sorted({0, (len(data) - 1) // 2, len(data) - 1})
        sample = batches.gather(data, places, self.collate)
        rules = (rule_for(module) for module in self.task.model.modules())
        own = {source_of(rule) for rule in rules if rule is not None and not rule.__module__.startswith("byline.")}
        return {
            "fingerprints": FINGERPRINTS,
            "task": self.task.fingerprint(),
            "dataset": {"length": len(data), "sha256": batches.fingerprint(data)},
            "collate": {"code": source_of(self.collate), "sample": batches.digest_of(sample)},
            "features": self._kept(),
            **({"rules": sorted(own)} if own else {}),
        }

    def add_members(self, ensemble: Ensemble) -> Attributor:
        """Add members to a fitted attributor; only theirs is computed."""
        self.ensemble = self.ensemble + ensemble
        self._check_members(self.ensemble.members())
        return self._again()

    def _again(self: Made) -> Made:
        """Fit as before, if it was fitted: on the same training set and what came with it."""
        return self if self._train_set is None else self._fit(self._train_set, self._collate_brought)

    def attribute(self, test_set: Any) -> Scores:
        """Score every training example for every test example.

        Args:
            test_set: any map-style torch Dataset of batches like the training set's.

        Returns:
            scores (n_test, n_train) with standard errors over members.
        """
        self._check_fitted()
        data = self._arrived(test_set)
        job = self._test_job(test_set, data)
        shape = (len(data), self.n_train_)
        folder = None if self.store.path is None else self.store.path / "scores"
        mean = RunningMean(lambda: matrix(shape, _IN_MEMORY, folder), self._with_residuals)
        with phase(self.ledger, "serving"):
            values, stderr = self._finish(self._vote(mean, job))
        return Scores(values, stderr, self.info())

    def votes(self, test_set: Any) -> Votes:
        """What each member says, apart: for intervals of ranks, sums and shares (`byline.Votes`).

        Args:
            test_set: any map-style torch Dataset of batches like the training set's.

        Returns:
            votes (members, n_test, n_train), of which the mean is what `attribute` gives; in a memory-mapped file
            where they are large.
        """
        self._check_fitted()
        data = self._arrived(test_set)
        folder = None if self.store.path is None else self.store.path / "scores"
        shape = (len(data), self.n_train_)
        count = len(self._voters)
        room = matrix((count * shape[0], shape[1]), _IN_MEMORY, folder).reshape(count, *shape)
        found = Collected(room, self._with_residuals)
        with phase(self.ledger, "serving"):
            self._vote(found, self._test_job(test_set, data))
        models = [voter.member.weights.digest() for voter in self._voters]
        carried = None
        if self._times_residual and self._of == "output":
            carried = torch.stack([self._q(voter) for voter in self._voters]).numpy()
        counted = [voter.counted for voter in self._voters if voter.counted is not None]
        only = torch.stack(counted).numpy() if counted and self._with_residuals else None
        return found.votes(models, self._scale(), carried, self.info(), only)

    def top(self, test_set: Any, k: int = 10) -> Ranking:
        """The strongest proponents and opponents of every test example, without a matrix (n_test, n_train).

        The same as ``attribute(test_set).top(k)`` to rounding, ties in the training set's order. What members hold of
        the test examples stays in memory while the training examples pass by once, chunk by chunk. Methods that need
        all training examples at once (TRAK and TrackStar without fewer columns than examples, DVEmb, those on
        embeddings, Random) take the test examples in blocks instead.

        Args:
            test_set: any map-style torch Dataset of batches like the training set's.
            k: how many of either, at most n_train.

        Returns:
            indices, scores and standard errors, each (n_test, k).

        Raises:
            ValueError: ``k`` is no int from 1 to n_train.
            RuntimeError: the attributor is not fitted.
        """
        self._check_fitted()
        k = check_k(k, self.n_train_)
        data = self._arrived(test_set)
        with phase(self.ledger, "serving"):
            found = streaming.top(self, self._test_job(test_set, data), k)
        return Ranking(*found, self.info(), self.n_train_)

    def hold(self, dtype: str = "float32") -> int:
        """Keep what `top` needs of the training set in memory, as a service does.

        Args:
            dtype: of the rows: "float32", "float16", or "int8" with a scale per row. Scores change by the rounding of
                the rows. Rows of `Exact` features stay in the store, and so does whatever does not stream.

        Returns:
            bytes of rows in memory.

        Raises:
            ValueError: another dtype.
        """
        self._check_fitted()
        scan.check_dtype(dtype)
        self._resident, self._held_states = {}, {}
        for voter in self._voters:
            if self._streams(voter):
                self._held_states[voter.member.identity("gradient")] = self._state(voter)
        if self.columns():
            places = streaming.spans(self, self._voters, resident=True)
            for voter in self._voters:
                stored, key = self._stored(voter), voter.member.identity("gradient")
                self._resident[key] = scan.Resident.load((stored.read(a, b)["rows"] for a, b in places), dtype)
        self._warm()
        return sum(rows.nbytes for rows in self._resident.values())

    def columns(self) -> int:
        """Numbers per training example, over all members, that `hold` would keep; 0 where it keeps none."""
        self._check_fitted()
        if not self.features.linear or not all(self._streams(voter) for voter in self._voters):
            return 0
        return sum(self._stored(voter).columns for voter in self._voters)

    @overload
    def self_influence(self) -> np.ndarray: ...
    @overload
    def self_influence(self, stderr: Literal[True]) -> tuple[np.ndarray, np.ndarray]: ...
    def self_influence(self, stderr: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """The score of every training example for itself, (n_train,): ``attribute(train_set)``'s diagonal.

        Args:
            stderr: also give its standard error over members, (n_train,).
        """
        self._check_fitted()
        mean = RunningMean(lambda: np.zeros((1, self.n_train_), np.float32), self._with_residuals)
        with phase(self.ledger, "serving"):
            values, errors = self._finish(self._vote(mean, None))
        return (values[0], errors[0]) if stderr else values[0]

    def info(self) -> dict[str, Any]:
        """How scores come about, for their record."""
        return {
            "method": type(self).__name__,
            "ensemble": repr(self.ensemble),
            "members": len(self.ensemble),
            "features": repr(self.features),
            **({"residual": self.residual} if self.residual != "mean" else {}),
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.task!r}, {self.ensemble!r}, features={self.features!r})"

    # what a method says

    _resident: dict[str, scan.Resident]
    _held_states: dict[str, State]
    _held_norms: dict[str, Tensor]
    """What is kept in memory of the store, by member: rows, what features learnt, squared norms."""

    _common: Tensor | None = None
    """(n_train,) the mean Q over the members that count, where not all do."""

    _with_residuals = False
    """Whether members vote on Q and on the kernel apart (TRAK)."""

    _times_residual = False
    """Whether a vote on a training example is a kernel times its residual."""

    def _streams(self, voter: Voter) -> bool:
        """Whether what a member says of a training example needs no other training example once it is fitted."""
        return False

    def _query(self, voter: Voter) -> Prepare:
        """What one member makes of a batch of test rows, where it streams."""
        raise NotImplementedError

    def _queries(self, voter: Voter, job: Job, shared: set[str]) -> Generator[tuple[int, int, Query], None, None]:
        """(start, stop, query) of one member, test batch by test batch, where it streams."""
        prepare = self._query(voter)
        for start, stop, rows in stream_rows(job, voter.member, self._state(voter), self._bench):
            yield start, stop, prepare(self._keyed(rows, voter, shared))

    def _reader(self, voter: Voter) -> Callable[[int, int], Any]:
        """What queries are held against: rows of training examples."""
        held = self._resident.get(voter.member.identity("gradient"))
        return self._stored(voter).read if held is None else held.read

    def _warm(self) -> None:  # noqa: B027 - most methods have nothing more to keep
        """Keep whatever else queries share."""

    def _scorer(self, voter: Voter) -> Scorer:
        """What one member says of a batch of test rows."""
        prepare, stored = self._query(voter), self._stored(voter)

        def scorer(rows: Rows) -> Tensor:
            query = prepare(rows)
            return torch.cat([query.against(stored.read(a, b), a, b) for a, b in self._chunks(stored)], 1)

        return scorer

    def _votes(self, voter: Voter, job: Job, shared: set[str]) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, scores) of one member, test batch by test batch."""
        scorer = self._scorer(voter)
        for start, stop, rows in stream_rows(job, voter.member, self._state(voter), self._bench):
            yield start, stop, scorer(self._keyed(rows, voter, shared))

    def _vote(self, mean: Mean, job: Job | None) -> Mean:
        """Take the mean of what all members say of test examples, or of the training examples for themselves."""
        shared = self._shared()
        self._products = Products(shared)
        voting = Voting(self, job, shared)
        pieces = voting.pieces(self.engine.processes())
        # alone, a piece would wait for another process for nothing
        engine = self.engine if len(pieces) > 1 else HERE
        begun: set[int] = set()

        def take(number: int, blocks: Iterable[Block]) -> None:
            place = pieces[number][0]
            if place not in begun:
                begun.add(place)
                self._begin(mean, self._voters[place])
            for start, stop, votes in blocks:
                mean.add(start, stop, votes)

        steps = int(sum(voting.steps(piece) for piece in pieces))
        with bar(steps, "scores" if job else "self-influence", self.progress) as advance:
            engine.run(voting, [pieces], take, advance, ordered=True)
        return mean

    def _begin(self, mean: RunningMean | Collected, voter: Voter, place: slice = slice(None), width: int = 0) -> None:
        """A member's turn in a mean over members of the training examples at ``place``.

        Args:
            mean: is told.
            voter: the member.
            place: which training examples its blocks are about.
            width: columns of a block where they are parts of one training example; 0 where they are examples.
        """
        found = [self._q(voter), voter.counted, voter.deviation]
        parts = [None if t is None else t[place].expand(width) if width else t[place] for t in found]
        assert parts[0] is not None
        mean.begin(voter.weight, parts[0], parts[1], parts[2])

    def _let_go(self) -> None:
        """Keep nothing of the store in memory."""
        self._resident, self._held_states, self._held_norms = {}, {}, {}

    def _sent(self) -> dict[str, Any]:
        """The attributes of a copy in another process, which makes for itself what it has of its own."""
        of_this_process = ("_lock", "store", "engine", "ledger", "_bench", "_products")
        own = (*of_this_process, "_resident", "_held_states", "_held_norms")
        return {name: value for name, value in vars(self).items() if name not in own}

    def _noted(self) -> dict[str, Any]:
        """What a copy has found out while it scored, and `info` tells."""
        return {}

    def _note(self, found: dict[str, Any]) -> None:  # noqa: B027 - most methods find out nothing
        """Take over what a copy has noted."""

    @abstractmethod
    def _self(self, voter: Voter) -> Tensor:
        """(n_train,) what one member says of the training examples' scores for themselves."""

    def _kept(self) -> dict[str, Any]:
        """JSON of what the store keeps per example."""
        return self.features.describe()

    def _write(self) -> None:
        """Compute what the store lacks of the training set."""
        job = self._job(self._train_set, "train_set", self._of)
        beside = self._kernel_bytes(len(self._train_set))
        write_features(job, self.ensemble.members(), self.store, self._bench, self.engine, beside)

    def _prepare(self) -> None:  # noqa: B027 - most methods need nothing more
        """Whatever fitting does beyond the features."""

    def _scale(self) -> float:
        """What the weighted mean over members is multiplied by."""
        return 1.0

    def _finish(self, mean: RunningMean, place: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Scores and standard errors of the training examples at ``place``, when all members have voted."""
        return mean.mean(), mean.stderr()

    def _check_size(self, n_train: int) -> None:  # noqa: B027 - most methods stream
        """Refuse a training set that is too large for the method and its features."""

    def _kernel_bytes(self, n_train: int) -> int:
        """What the method holds in memory of all pairs of training examples."""
        return 0

    # pieces for the methods

    def _asked(self, of: str) -> str:
        """What the first batch is tried with (`byline.arrivals.check`)."""
        return of if self._differentiates else "nothing"

    def _arrived(self, test_set: Any) -> Any:
        """A test set whose first batch has been tried."""
        data = batches.as_dataset(test_set, "test_set")
        model, of = self._bench.model, self._asked("output")
        arrivals.check(
            self.task, data, "test_set", self.collate, model=model, batch_size=self.batch_size, of=of, given=test_set
        )
        return data

    @property
    def _of(self) -> str:
        # where -∇ℓ = Q ∇f, one stored gradient serves every method
        return "output" if self.train_side == "output" or self.task.loss_follows_output else "loss"

    def _q(self, voter: Voter) -> Tensor:
        """(n_train,) what scores carry of these members' Q."""
        if self._common is not None and not self._with_residuals:
            return self._common
        return voter.residual if voter.made is None else voter.made

    def _vote_scale(self, voter: Voter) -> Tensor | None:
        """(n_train,) what products with stored rows are multiplied by to become votes; None for nothing."""
        return None if self._loss_scale(voter) is None else self._q(voter)

    def _choose_residuals(self) -> None:
        """Whose Q counts, where not everybody's does."""
        self._common = None
        if self.residual == "sqrt":
            for voter in self._voters:
                voter.made, voter.residual_variance = averaged(voter.members, residuals.root(self._residuals_of(voter)))
        if self.residual not in ("in-sample", "out-of-sample"):
            return
        unseen = torch.stack([voter.member.unseen(self.n_train_) for voter in self._voters])
        counted = unseen if self.residual == "out-of-sample" else ~unseen
        weights = torch.tensor([voter.weight for voter in self._voters]).unsqueeze(1) * counted
        every = torch.stack([voter.residual for voter in self._voters])
        self._common = (weights * every).sum(0) / weights.sum(0)
        for voter, own, weight in zip(self._voters, counted, weights, strict=True):
            voter.counted, voter.deviation = own, weight * (voter.residual - self._common)

    def _loss_scale(self, voter: Voter) -> Tensor | None:
        """(n_train,) what stored rows are multiplied by to become -∇ℓ; None if they are that already."""
        return voter.residual if self.train_side == "loss" and self._of == "output" else None

    def _stored(self, voter: Voter) -> Stored:
        found = self.store.features(member_key(voter.member.identity("gradient"), self._of))
        assert found is not None, "fit writes the features of every member"
        return found

    def _state(self, voter: Voter) -> State:
        """What the features learnt from the training set for a member."""
        key = voter.member.identity("gradient")
        found = self._held_states.get(key) or self.store.state(member_key(key, self._of))
        assert found is not None, "fit keeps what the features learnt"
        return found

    def _chunks(self, stored: Stored, size: int = 1024) -> list[tuple[int, int]]:
        """Spans of whole chunks."""
        return stored.spans(size)

    def _vectors(self, voter: Voter, size: int = 1024) -> Iterator[Tensor]:
        """The rows of the training set as vectors, some at a time."""
        stored, state = self._stored(voter), self._state(voter)
        for start, stop in self._chunks(stored, size):
            yield self.features.vectors(stored.read(start, stop), state)

    def _dots(self, rows: Rows) -> Callable[[Any], Tensor]:
        """The kernel of test rows against rows of training examples, read from the store or resident."""
        vectors = scan.Vectors(rows["rows"]) if self.features.linear else None

        def dots(train: Any) -> Tensor:
            if isinstance(train, scan.Chunk):
                assert vectors is not None, "only linear rows are held"
                return train.dots(vectors)
            return self.features.kernel(rows, train, self._products)

        return dots

    def _cross(self, rows: Rows, stored: Stored) -> Tensor:
        """(B, n_train) the kernel of test rows against a member's stored rows, chunk by chunk."""
        parts = [
            self.features.kernel(rows, stored.read(start, stop), self._products) for start, stop in self._chunks(stored)
        ]
        return torch.cat(parts, 1)

    def _norms(self, stored: Stored) -> Tensor:
        """(n_train,) squared norms of a member's stored rows."""
        parts = []
        for start, stop in self._chunks(stored):
            rows = stored.read(start, stop)
            parts.append(self.features.diagonal(rows, rows))
        return torch.cat(parts)

    def _kept_norms(self, voter: Voter) -> Tensor:
        """(n_train,) the same, computed once per fit."""
        key = voter.member.identity("gradient")
        if key not in self._held_norms:
            self._held_norms[key] = self._norms(self._stored(voter))
        return self._held_norms[key]

    def _pairs(self, voter: Voter) -> Tensor:
        """(n_train,) inner products ⟨∇f(i), stored(i)⟩ of each training example's two sides."""
        stored = self._stored(voter)
        if self._of == "output":
            return self._norms(stored)
        own = self._own_rows(voter)
        return torch.cat([self.features.diagonal(rows, stored.read(start, stop)) for start, stop, rows in own])

    def _own_rows(self, voter: Voter) -> Iterator[tuple[int, int, Rows]]:
        """(start, stop, rows) of ∇f at the training examples: stored, or taken anew where the store holds ∇ℓ."""
        if self._of != "output":
            job = self._job(self._train_set, "train_set", "output")
            yield from stream_rows(job, voter.member, self._state(voter), self._bench)
            return
        stored = self._stored(voter)
        for start, stop in self._chunks(stored):
            yield start, stop, stored.read(start, stop)

    def _job(self, data: Any, name: str, of: str) -> Job:
        return Job(
            self.task,
            self.features,
            data,
            name,
            self.batch_size,
            of,
            self.collate,
            self.ledger,
            self.progress,
        )

    def _test_job(self, given: Any, data: Any) -> Job:
        """The job of a test set, which may bring a collate of its own."""
        job = self._job(data, "test_set", "output")
        brought = _brought(given, data)
        # parts of the training set come as that did
        again = not isinstance(given, DataLoader) and _whole_of(data) is _whole_of(self._train_set)
        return job if self._collate_given is not None or brought is None or again else replace(job, collate=brought)

    def _gather(self) -> list[Voter]:
        """Members grouped by their gradients and what they were trained on, with the residuals that the store holds."""
        groups: dict[tuple[str, bytes | None], list[Member]] = {}
        for member in self.ensemble.members():
            seen = None if member.trained_on is None else member.trained_on.tobytes()
            groups.setdefault((member.identity("gradient"), seen), []).append(member)
        voters = []
        for members in groups.values():
            voter = Voter(members[0], sum(m.weight for m in members), torch.empty(0), None, tuple(members))
            voter.residual, voter.residual_variance = averaged(members, self._residuals_of(voter))
            voters.append(voter)
        return voters

    def _residuals_of(self, voter: Voter) -> Tensor:
        """(members, n_train) the Q of each of these members."""
        found = [self.store.vector("residual", m.identity("residual")) for m in voter.members]
        return torch.stack([r for r in found if r is not None])

    def _shared(self) -> set[str]:
        """Digests of stored arrays that several members have."""
        if self.features.linear:
            return set()
        counts = Counter(d for voter in self._voters for d in set(self._stored(voter).digests.values()))
        return {digest for digest, count in counts.items() if count > 1}

    def _keyed(self, rows: Rows, voter: Voter, shared: set[str]) -> Rows:
        """Test rows with the content of those factors named whose training side several members share."""
        if not shared:
            return rows
        out = StoredRows(rows)
        digests = self._stored(voter).digests
        out.keys_of = {name: batches.digest_of(value) for name, value in rows.items() if digests.get(name) in shared}
        return out

    def _check_members(self, members: list[Member]) -> None:
        if self.train_side == "loss" and any(m.gradient_changes is not None for m in members):
            raise ValueError(
                f"forward_only=True masks TRAK's Q alone, and {type(self).__name__} has no Q: its gradient at the "
                "training example carries the residual; use forward_only=False"
            )

    def _check_residual(self, n_train: int) -> None:
        """Refuse members that do not know the training set's examples, and a Q that they cannot give."""
        members = self.ensemble.members()
        for member in members:
            member.check_positions(n_train)
        if self.residual in ("sqrt", "in-sample", "out-of-sample") and self._of != "output":
            raise ValueError(
                f"residual is {self.residual!r}, which {type(self).__name__} can give where the loss is that of a "
                "named output whose gradient is Q times the output's (classification, regression); expected 'auto'"
            )
        if self.residual not in ("in-sample", "out-of-sample"):
            return
        unseen = torch.stack([member.unseen(n_train) for member in members if member.weight > 0])
        lacking = ~(unseen if self.residual == "out-of-sample" else ~unseen).any(0)
        if bool(lacking.any()):
            which = "left out by no member" if self.residual == "out-of-sample" else "trained on by no member"
            raise ValueError(
                f"residual is {self.residual!r}, and {int(lacking.sum())} of {n_train} training examples are {which} "
                f"(the first is {int(lacking.nonzero()[0])}); expected an ensemble such as "
                "byline.CrossFit(checkpoints, byline.folds(n_train))"
            )

    def _check_model(self) -> None:
        for name, module in self.task.model.named_modules():
            if module.training:
                raise ValueError(
                    f"the model is in train mode{f' (in {name})' if name else ''}; call model.eval() before attribution"
                )
        if self._differentiates and not all(member.brings for member in self.ensemble.members()):
            self.task.chosen()
        self.ensemble.validate(self.task.model)
        for weights in {id(m.weights): m.weights for m in self.ensemble.members()}.values():
            weights.check(self.task.model)

    def _check_fitted(self) -> None:
        if self._train_set is None:
            raise RuntimeError(f"this {type(self).__name__} is not fitted; call fit(train_set) first")
        for weights, digest in self._weights:
            if weights.digest() != digest:
                raise ValueError(
                    f"{weights.name}: {weights.source} was overwritten after fit; expected the weights of the fit: "
                    "call fit again, or keep each checkpoint under a name of its own"
                )


def _whole_of(data: Any) -> Any:
    while isinstance(data, Subset):
        data = data.dataset
    return data


def _brought(given: Any, data: Any) -> Collate | None:
    """The collate of a dataset, of the `DataLoader` that it came in or its own; None for torch's default."""
    loaded = given.collate_fn if isinstance(given, DataLoader) else None
    found = batches.collate_of(data, default_collate if loaded is None else loaded)
    return None if found is default_collate else found


def averaged(members: Sequence[Member], values: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weighted mean of (members, n) values, and the squared standard error of it; None for one member."""
    weights = torch.tensor([m.weight for m in members])
    total = float(weights.sum())
    share = weights / total if total else torch.full_like(weights, 1 / len(weights))
    mean = (share.unsqueeze(1) * values).sum(0)
    if len(members) < 2:
        return mean, None
    squares = float(share.square().sum())
    spread = (share.unsqueeze(1) * (values - mean).square()).sum(0)
    return mean, spread * squares / max(1 - squares, 1e-12)


class phase:
    """A ledger's phase, or nothing without a ledger."""

    def __init__(self, ledger: Ledger | None, phase: str):
        self._context = None if ledger is None else ledger.phase(phase)

    def __enter__(self) -> None:
        if self._context is not None:
            self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*error)
