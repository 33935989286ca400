"""The page that ``byline serve`` opens, and what it asks: routes under ``/v1/explore``."""

import asyncio
import base64
import binascii
import threading
from collections.abc import Callable
from pathlib import Path as Folder
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import APIRouter, Path, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from byline import report
from byline.serve.answers import Json, Problem, Unfit, problem, waited
from byline.serve.client import encode
from byline.serve.contract import Served
from byline.serve.decode import Template
from byline.serve.explore import Explorer, Said
from byline.serve.gallery import Gallery, drawn, seen
from byline.serve.limits import Limits
from byline.serve.worker import Refused, Worker

ASSETS = Folder(__file__).parent / "assets"
STYLE = Folder(report.__file__).parent / "assets" / "report.css"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# looked up by name alone, so that no name from outside ever becomes a path
_ASSETS = {path.name: path for path in (*ASSETS.iterdir(), STYLE) if path.suffix in KINDS}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    # the page of another version must not be shown to this one
    "Cache-Control": "no-cache",
}
# a picture takes a hundred times its file once it is decoded: no more at once than there is room for
_READING = threading.BoundedSemaphore(2)
_LISTED = 200  # examples that are described at once
_NAMED = 5000  # examples that are named at once
_CLASSES = 1000  # at most so many outputs to choose from


class Upload(BaseModel):
    """A file, as its bytes."""

    model_config = ConfigDict(extra="forbid")
    base64: str


class Question(BaseModel):
    """Which example is asked about: one of those known by place, a file, or an example as JSON."""

    model_config = ConfigDict(extra="forbid")
    test: Annotated[StrictInt, Field(ge=0)] | None = None
    upload: Upload | None = None
    example: Any = None
    label: Annotated[StrictInt, Field(ge=0, lt=2**31)] | None = Field(
        default=None, description="the class whose output is explained; the example's own when left out"
    )


class Removal(BaseModel):
    """Which training examples are taken out."""

    model_config = ConfigDict(extra="forbid")
    question: Question
    removed: list[Annotated[StrictInt, Field(ge=0, lt=2**63)]]


class Names(BaseModel):
    """Which training examples are named."""

    model_config = ConfigDict(extra="forbid")
    places: Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**63)]], Field(max_length=_NAMED)]


class Listing(BaseModel):
    """Which examples are described."""

    model_config = ConfigDict(extra="forbid")
    of: str = Field(pattern="^(train|test)$")
    places: Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**63)]], Field(max_length=_LISTED)]
    whole: bool = False


def explorer_routes(
    served: Served, worker: Worker, limits: Limits, template: Callable[[Any], Any], form: Any
) -> APIRouter:
    """The page, its assets, and what it asks.

    Args:
        served: fitted.
        worker: scores.
        limits: of requests.
        template: makes an item of an example as JSON.
        form: of an example, in short.
    """
    attributor = served.attributor
    explorer = Explorer(served)
    told = None if callable(served.metadata) else served.metadata
    about = None if served.metadata is None else served.about
    train = Gallery(attributor._train_set, served.train, served.classes, about, told)
    own = served.test_set is None
    test = train if own else Gallery(served.test_set, served.test, served.classes)
    upload, takes = served.upload, served.takes
    if upload is None and served.decode is None and isinstance(template, Template):
        upload, takes = template.row(), "row"
    classified = attributor.task.name == "classification" and _labelled(attributor._train_set[0])
    outputs = explorer.classes() if classified else 0
    classes = min(_CLASSES, outputs)
    refusals: dict[int | str, Any] = {429: {"model": Problem}, 503: {"model": Problem}}
    routes = APIRouter(include_in_schema=True)
    # the first of everything takes longest: nobody should have to wait for it
    worker.when_idle(lambda: explorer.said(explorer.known[0]))
    waited_for: list[bool] = []

    def item_of(question: Question) -> Any:
        """The example that is asked about, under the label whose output is explained."""
        given = [name for name in ("test", "upload", "example") if name in question.model_fields_set]
        if len(given) != 1:
            raise Unfit(422, f"the question has {given}; expected one of test, upload and example")
        if question.test is not None:
            if question.test >= test.n:
                raise Unfit(404, f"there are {test.n} examples to explain")
            item = test.dataset[question.test]
        elif question.upload is not None:
            item = _uploaded(question.upload, upload)
        else:
            try:
                item = template(question.example)
            except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
                raise Unfit(422, str(error)[:500]) from None
        if question.label is not None and not classified:
            raise Unfit(422, "label is given, and the outputs of this model are not those of classes")
        if question.label is None:
            return item
        if question.label >= outputs:
            raise Unfit(422, f"label is {question.label}, which is out of range; expected one below {outputs}")
        try:
            return _relabelled(item, question.label)
        except Refused as error:
            raise Unfit(422, str(error)) from None

    async def asked(question: Question, request: Request) -> tuple[Any, Said]:
        """The item, and what is said of it."""
        item = await asyncio.to_thread(item_of, question)

        def work() -> tuple[Any, Said]:
            chosen = item
            try:
                if question.upload is not None and question.label is None and classified:
                    # nobody said what it is: what the model makes of it is explained
                    chosen = _relabelled(item, explorer.predict(item) or 0)
                return chosen, explorer.said(chosen)
            except Refused:
                raise
            except Exception as error:
                why = worker.reason([chosen], error)
                if isinstance(why, Refused):
                    why = Refused(str(why).replace("examples[0]", "the example"))
                raise why from None

        return await waited(request, worker.call(work), limits)

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return _asset("explorer.html")

    @routes.get("/assets/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        return _asset(name)

    @routes.get("/v1/explore")
    async def about_all() -> Response:
        """What there is to explore."""
        known = attributor.info()
        if not waited_for:
            # somebody looks: while they do, what following an example needs is made, member by member
            waited_for.append(True)
            worker.when_idle(*[explorer.prepare] * len(attributor._voters))
        return Json(
            {
                "title": served.title,
                "method": known["method"],
                "members": known["members"],
                "n_train": train.n,
                "n_test": test.n,
                "known": len(explorer.known),
                "own": own,
                "output": _words(attributor.task.name),
                "classified": classified,
                "classes": [train.name(label) for label in range(classes)],
                "unit": explorer.unit,
                "takes": takes if upload is not None else None,
                "form": form,
                "largest": limits.body,
                "identity": worker.identity,
            }
        )

    @routes.get("/v1/explore/columns")
    async def columns() -> Response:
        """Labels and owners of all training examples, and labels of the examples to explain."""
        # texts of many examples take a while to sort
        found = await asyncio.to_thread(lambda: {"train": train.columns, "test": test.columns})
        return Json(found)

    @routes.post("/v1/explore/examples")
    async def examples(listing: Listing) -> Response:
        """Examples as they are shown."""
        gallery = train if listing.of == "train" else test
        if any(place >= gallery.n for place in listing.places):
            return problem(404, f"there are {gallery.n} examples of this kind")
        found = await asyncio.to_thread(lambda: [gallery.one(place, listing.whole) for place in listing.places])
        return Json({"examples": found})

    @routes.post("/v1/explore/names")
    async def names(asked_for: Names) -> Response:
        """What training examples are called; null where they have no names."""
        if any(place >= train.n for place in asked_for.places):
            return problem(404, f"there are {train.n} training examples")
        return Json({"names": [train.called(place) for place in asked_for.places]})

    @routes.post("/v1/explore/scores", responses=refusals)
    async def scores(question: Question, request: Request) -> Response:
        """The score of every training example, with its standard error."""
        item, said = await asked(question, request)
        label = int(item[1]) if classified and _labelled(item) else None
        return Json(
            {
                "scores": encode(said.values),
                "stderr": encode(said.stderr),
                "output": said.output,
                "predicted": None if said.predicted is None else train.name(said.predicted),
                "label": label,
                "label_name": None if label is None else train.name(label),
                "shown": drawn(seen(item), True) if question.test is None else test.one(question.test, True),
            }
        )

    @routes.post("/v1/explore/change", responses=refusals)
    async def change(removal: Removal, request: Request) -> Response:
        """The predicted change of the output when some training examples are taken out, to first order."""
        if len(removal.removed) > train.n:
            return problem(422, f"removed has {len(removal.removed)} places; there are {train.n} training examples")
        places = np.unique(np.array(removal.removed, np.int64))
        if len(places) and places[-1] >= train.n:
            return problem(404, f"there are {train.n} training examples")
        _, said = await asked(removal.question, request)
        total, error, bound = said.total(places)
        unit = explorer.unit or 1.0
        return Json(
            {"removed": len(places), "change": -total * unit, "stderr": error * unit, "bound": bound,
             "output": said.output}
        )  # fmt: skip

    @routes.get("/v1/explore/influence/{index}", responses=refusals)
    async def influence(index: Annotated[int, Path(ge=0, le=2**63 - 1)], request: Request) -> Response:
        """What a training example does to each of the known examples."""
        if index >= train.n:
            return problem(404, f"there are {train.n} training examples")
        values, errors = await waited(request, worker.call(lambda: explorer.moved(index)), limits)
        return Json({"index": index, "scores": encode(values), "stderr": encode(errors)})

    return routes


def _asset(name: str) -> Response:
    # the page looks as reports do
    path = _ASSETS.get(name)
    if path is None:
        return problem(404, "Not Found")
    return Response(path.read_bytes(), media_type=KINDS[path.suffix], headers=HEADERS)


def _uploaded(given: Upload, read: Callable[[bytes], Any] | None) -> Any:
    if read is None:
        raise Unfit(422, "no file can be read here; give the example as JSON")
    try:
        data = base64.b64decode(given.base64.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError, ValueError):
        raise Unfit(422, "upload.base64 is no base64") from None
    try:
        with _READING:
            return read(data)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, OSError) as error:
        sentence = str(error).splitlines()[0][:500] if str(error) else "it cannot be read"
        raise Unfit(422, sentence) from None


def _labelled(item: Any) -> bool:
    """Whether an item is an input and the number of its class."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        return False
    label = item[1]
    if isinstance(label, torch.Tensor):
        return label.numel() == 1 and not label.is_floating_point() and label.dtype != torch.bool
    return isinstance(label, int | np.integer) and not isinstance(label, bool)


def _relabelled(item: Any, label: int) -> Any:
    if not _labelled(item):
        raise Refused("the example has no label that could be another one")
    old = item[1]
    most = _most(old)
    if label > most:
        raise Refused(f"the label {label} is out of range; the example's own are at most {most}")
    made = torch.full_like(old, label) if isinstance(old, torch.Tensor) else type(old)(label)
    return type(item)([item[0], made])


def _most(label: Any) -> int:
    """The largest number that a label of this type can be."""
    if isinstance(label, torch.Tensor):
        return torch.iinfo(label.dtype).max
    return int(np.iinfo(type(label)).max) if isinstance(label, np.integer) else 2**63 - 1


def _words(name: str) -> str:
    return {
        "classification": "log p/(1-p) of the label",
        "binary": "log p/(1-p) of the label",
        "multi-label": "the mean margin of the labels",
        "regression": "the prediction",
        "multi-regression": "minus half the mean squared error",
        "language-modeling": "the mean token margin",
        "masked-language-modeling": "the mean token margin",
        "token-classification": "the mean token margin",
        "seq2seq": "the mean token margin",
    }.get(name, "the output")
