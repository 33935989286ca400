"""What every route answers with: JSON that cannot fail, one sentence where it refuses, and waiting for the worker."""

from __future__ import annotations

import asyncio
import json
import math
from concurrent.futures import Future
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from byline.serve.limits import Limits

RETRY = "1"  # seconds


class Problem(BaseModel):
    """A refusal, in one sentence."""

    error: str


class Unfit(Exception):
    """A refusal: a status and a sentence."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None):
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers


class Json(JSONResponse):
    """JSON in ASCII, with null for what is not finite: it cannot fail on what a request or a store holds."""

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return json.dumps(_finite(content), allow_nan=False, separators=(",", ":"), default=str).encode()


def problem(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    """A refusal."""
    return Json({"error": sentence}, status_code=status, headers=headers)


async def waited(request: Request, future: Future[Any], limits: Limits) -> Any:
    """What the worker gives, unless it takes too long or the client leaves; what has not begun is never begun then.

    Raises:
        Unfit: 503 where it takes too long, 499 where nobody waits any more.
    """
    waiting = asyncio.wrap_future(future)
    leaving = asyncio.ensure_future(_left(request))
    try:
        both: set[asyncio.Future[Any]] = {waiting, leaving}
        await asyncio.wait(both, timeout=limits.seconds, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            if leaving.done():
                raise Unfit(499, "the client has left")
            late = f"no answer within {limits.seconds:g} s; ask for fewer examples, or try again"
            raise Unfit(503, late, {"Retry-After": RETRY})
        return waiting.result()
    finally:
        leaving.cancel()
        if not future.done():
            future.cancel()
            waiting.cancel()


async def _left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return value
