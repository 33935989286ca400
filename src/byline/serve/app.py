"""The HTTP interface: FastAPI, with every answer and every refusal in the OpenAPI."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

import byline
from byline.scores import Ranked
from byline.serve.contract import Served
from byline.serve.decode import BINARY, Template
from byline.serve.limits import LOCAL, Guard, Limits, check_token
from byline.serve.worker import Full, Refused, Worker

try:
    from fastapi import FastAPI, Path, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import Response
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt
    from starlette.exceptions import HTTPException

    from byline.serve.answers import RETRY, Json, Problem, Unfit, problem, waited
    from byline.serve.page import explorer_routes
except ImportError as error:
    raise ImportError(f"serving needs the extra: pip install 'byline[serve]' ({error})") from error

_log = logging.getLogger("byline.serve")


class Influence(BaseModel):
    """A training example and how much it pushed the output up (a proponent) or down (an opponent)."""

    index: int = Field(description="its place in the training set")
    score: float | None
    stderr: float | None = Field(description="standard error over members; null where there is a single one")
    metadata: Any = None


class Result(BaseModel):
    """The strongest training examples for one example."""

    proponents: list[Influence]
    opponents: list[Influence]


class Attribution(BaseModel):
    """One result per example, in order."""

    results: list[Result]


class Example(BaseModel):
    """A training example."""

    index: int
    metadata: Any = None


class Health(BaseModel):
    """Whether the service can answer."""

    status: str


class Info(BaseModel):
    """What is served."""

    title: str
    byline: str
    method: str
    ensemble: str
    members: int
    features: str | None
    damping: float | str | None
    n_train: int
    rows: str = Field(description="what the training rows are kept as: float32, float16, int8, or store")
    cost: dict[str, float | None] = Field(
        description="queries scored so far, CPU seconds and seconds on the clock of one, bytes of the store"
    )
    example: Any = Field(description="the form of an example")
    limits: dict[str, float]


class Metrics:
    """Prometheus metrics in a registry of their own."""

    def __init__(self, worker: Worker, served: Served, resident: int):
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("byline_requests", "Requests by route and status", ["route", "status"], **made)
        self.seconds = Histogram(
            "byline_request_seconds",
            "Time from a request to its answer",
            ["route"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            **made,
        )
        self.examples = Counter("byline_examples", "Examples attributed", **made)
        Gauge("byline_queue_examples", "Examples that wait", **made).set_function(lambda: worker.waiting)
        Gauge("byline_train_examples", "Training examples", **made).set(served.attributor.n_train_)
        Gauge("byline_resident_bytes", "Training rows in memory", **made).set(resident)
        for key, unit, what in (
            ("seconds", "query_cpu_seconds", "CPU seconds of scoring an example, the mean since the start"),
            ("wall", "query_seconds", "Seconds of scoring an example, without waiting, the mean since the start"),
            ("store_bytes", "store_bytes", "Bytes of the store"),
        ):
            Gauge(f"byline_{unit}", what, **made).set_function(partial(_part, worker, key))

    def observe(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)


def create_app(
    served: Served,
    limits: Limits | None = None,
    *,
    token: str | None = None,
    rows: str = "auto",
    hosts: tuple[str, ...] | None = LOCAL,
    page: bool = True,
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        served: fitted already (`Served.ready`).
        limits: of requests.
        token: that requests must bear.
        rows: "float32", "float16" or "int8" keep the training rows in memory, "store" leaves them where they are;
            "auto" keeps float32 where that takes no more than half of the memory.
        hosts: names under which it may be asked where there is no token; None for all.
        page: also serve the explorer's page and what it asks.
    """
    limits = limits or Limits()
    attributor = served.attributor
    attributor._check_fitted()
    kept, resident = _hold(served, rows)
    k_most = min(limits.k, attributor.n_train_)
    template: Callable[[Any], Any]
    form: Any = "see the service's own documentation"
    schema: dict[str, Any] = {}
    if served.decode is None:
        template = Template(attributor._train_set)
        form, schema = template.describe(), template.schema()
    else:
        template = served.decode
    worker = Worker(attributor, limits)
    metrics = Metrics(worker, served, resident)

    class Ask(BaseModel):
        """Examples to attribute."""

        model_config = ConfigDict(extra="forbid", title="Ask")
        examples: Annotated[
            list[Any], Field(min_length=1, max_length=limits.batch, json_schema_extra={"items": schema})
        ]
        k: Annotated[StrictInt, Field(ge=1, le=k_most)] = min(10, k_most)
        metadata: StrictBool = True

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    refusals: dict[int | str, Any] = {
        code: {"model": Problem, "description": what}
        for code, what in (
            (400, "no JSON"),
            (401, "no token, or a wrong one"),
            (408, "the request did not arrive in time"),
            (413, "too large"),
            (421, "another Host"),
            (422, "not what is expected"),
        )
    }
    busy: dict[int | str, Any] = {
        415: {"model": Problem, "description": "another content type"},
        429: {"model": Problem, "description": "too many requests wait"},
        503: {"model": Problem, "description": "took too long, or stopping"},
    }
    app = FastAPI(
        title=served.title,
        version=byline.__version__,
        description="Which training examples made the model say that, and how sure that answer is.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        default_response_class=Json,
        responses=refusals,
    )
    app.state.worker, app.state.metrics, app.state.limits, app.state.served = worker, metrics, limits, served
    app.add_middleware(Guard, limits=limits, token=check_token(token), hosts=hosts, observe=metrics.observe)
    if page:
        app.include_router(explorer_routes(served, worker, limits, template, form))

    @app.post("/v1/attribute", response_model=Attribution, responses=busy)
    async def attribute(ask: Ask, request: Request) -> Response:
        """The strongest proponents and opponents of each example."""
        items = []
        for place, value in enumerate(ask.examples):
            try:
                items.append(template(value))
            except RecursionError:
                return problem(422, f"examples[{place}] is nested too deeply")
            except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
                return problem(422, str(error).replace("example", f"examples[{place}]", 1)[:500])
        found = await waited(request, worker.submit(items, ask.k), limits)
        metrics.examples.inc(len(items))
        about = served.about if ask.metadata else None
        return Json({"results": [{"proponents": _rows(a, about), "opponents": _rows(b, about)} for a, b in found]})

    @app.get("/v1/examples/{index}", response_model=Example, responses={404: {"model": Problem}})
    async def example(index: Annotated[int, Path(ge=0, le=2**63 - 1)]) -> Response:
        """A training example's metadata."""
        if index >= attributor.n_train_:
            return problem(404, f"there are {attributor.n_train_} training examples")
        return Json({"index": index, "metadata": served.about(index)})

    @app.get("/v1/info", response_model=Info)
    async def info() -> Response:
        """What is served, and what an example looks like."""
        known = attributor.info()
        return Json(
            {
                "title": served.title,
                "byline": byline.__version__,
                "method": known["method"],
                "ensemble": known["ensemble"],
                "members": known["members"],
                "features": known.get("features"),
                "damping": known.get("damping"),
                "n_train": attributor.n_train_,
                "rows": kept,
                "cost": worker.cost(),
                "example": form,
                "limits": {**vars(limits), "k": k_most},
            }
        )

    @app.get("/healthz", response_model=Health, responses={503: {"model": Health}})
    async def healthz() -> Response:
        """Whether the service can answer."""
        return Json({"status": "ok"}) if worker.alive else Json({"status": "stopping"}, status_code=503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RequestValidationError)
    async def unfit(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return problem(400, "the body is no JSON")
        place = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
        return problem(422, f"{place or 'the body'}: {first['msg']}"[:500])

    @app.exception_handler(Unfit)
    async def unfitting(_: Request, error: Unfit) -> Response:
        return problem(error.status, error.sentence, error.headers)

    @app.exception_handler(Refused)
    async def model_refused(_: Request, error: Refused) -> Response:
        return problem(422, str(error))

    @app.exception_handler(Full)
    async def full(_: Request, __: Full) -> Response:
        return problem(429, "too many requests wait; try again", {"Retry-After": RETRY})

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    _with_binary(app, token is not None)
    return app


def _hold(served: Served, rows: str) -> tuple[str, int]:
    """Keep the training rows in memory, as asked or as they fit; as what, and how many bytes."""
    attributor = served.attributor
    if rows == "auto":
        need = 4 * attributor.n_train_ * attributor.columns()
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**33
        rows = "float32" if need <= have / 2 else "store"
        if rows == "store":
            _log.warning("rows stay in the store", extra={"bytes": need, "memory": have, "hint": "rows=int8"})
    if rows == "store":
        return rows, 0
    resident = attributor.hold(rows)
    return (rows if resident else "store"), resident


def _part(worker: Worker, key: str) -> float:
    return worker.cost()[key]


def _rows(ranked: Ranked, about: Callable[[int], Any] | None) -> list[dict[str, Any]]:
    return [
        {
            "index": int(index),
            "score": float(score),
            "stderr": float(error),
            "metadata": None if about is None else about(int(index)),
        }
        for index, score, error in zip(ranked.indices, ranked.scores, ranked.stderr, strict=True)
    ]


def _with_binary(app: FastAPI, with_token: bool) -> None:
    """Add to the OpenAPI what FastAPI cannot know: tensors as bytes, and the token."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            parts = document.setdefault("components", {})
            parts.setdefault("schemas", {})["Binary"] = BINARY
            if with_token:
                parts["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"bearer": []}]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
