"""Asking a service, with the standard library alone."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from byline.scores import Ranked, Ranking


class ServiceError(RuntimeError):
    """The service refused a request; ``status`` is HTTP's."""

    def __init__(self, status: int, sentence: str):
        super().__init__(f"{status}: {sentence}")
        self.status = status


class Client:
    """A byline service.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        token: its bearer token, if it has one.
        timeout: seconds for one answer.
        retries: how often to ask again where the service is busy (429, 503), after the time that it names.

    Raises:
        ValueError: the URL is no http(s) one.
    """

    def __init__(self, url: str, token: str | None = None, *, timeout: float = 60.0, retries: int = 3):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {url!r}; expected such as http://127.0.0.1:8000")
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self._parts, self._token = parts, token
        self._local = threading.local()

    def top(self, examples: Any, k: int = 10) -> Ranking:
        """The strongest proponents and opponents of each example.

        Args:
            examples: a list of items as the training set's, or a dataset: tensors, arrays, numbers, and tuples, lists
                and dicts of them.
            k: how many of either.

        Returns:
            as `Attributor.top` does.
        """
        info = self.info()
        most, parts = int(info["limits"]["batch"]), []
        items = [examples[i] for i in range(len(examples))]
        for start in range(0, len(items), most):
            parts += self.attribute(items[start : start + most], k, metadata=False)
        proponents, opponents = (
            Ranked(
                np.array([[row["index"] for row in part[side]] for part in parts], np.int64),
                np.array([[_number(row["score"]) for row in part[side]] for part in parts], np.float32),
                np.array([[_number(row["stderr"]) for row in part[side]] for part in parts], np.float32),
            )
            for side in ("proponents", "opponents")
        )
        told = {key: info[key] for key in ("method", "ensemble", "members", "features", "rows")}
        return Ranking(proponents, opponents, told, int(info["n_train"]))

    def attribute(self, examples: Any, k: int = 10, *, metadata: bool = True) -> list[dict[str, Any]]:
        """The same as plain data, with the training examples' metadata: a dict per example."""
        ask = {"examples": [encode(examples[i]) for i in range(len(examples))], "k": k, "metadata": metadata}
        found: list[dict[str, Any]] = self._ask("POST", "/v1/attribute", ask)["results"]
        return found

    def example(self, index: int) -> Any:
        """The metadata of a training example."""
        return self._ask("GET", f"/v1/examples/{int(index)}")["metadata"]

    def info(self) -> dict[str, Any]:
        """What is served: the method, the number of training examples, the form of an example, the limits."""
        found: dict[str, Any] = self._ask("GET", "/v1/info")
        return found

    def healthy(self) -> bool:
        """Whether it is there and answers."""
        try:
            return bool(self._ask("GET", "/healthz", retries=0)["status"] == "ok")
        except (OSError, ServiceError, http.client.HTTPException):
            return False

    def close(self) -> None:
        """Close this thread's connection."""
        connection = self._local.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def _ask(self, method: str, path: str, content: Any = None, retries: int | None = None) -> Any:
        body = None if content is None else json.dumps(content, allow_nan=False).encode()
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        left = self.retries if retries is None else retries
        while True:
            status, wait, data = self._once(method, self._parts.path.rstrip("/") + path, body, headers)
            if status not in (429, 503) or left == 0:
                break
            left -= 1
            time.sleep(min(30.0, float(wait) if wait.isdigit() else 1.0))
        try:
            found = json.loads(data)
        except ValueError:
            raise ServiceError(status, "the answer is no JSON; is this a byline service?") from None
        if status != 200:
            raise ServiceError(status, str(found.get("error", found) if isinstance(found, dict) else found))
        return found

    def _once(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, str, bytes]:
        """One request; once more on a new connection where the service had closed the old one meanwhile."""
        for fresh in (False, True):
            connection: Any = getattr(self._local, "connection", None)
            kept = connection is not None and not fresh
            if not kept:
                made = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
                connection = self._local.connection = made(
                    str(self._parts.hostname), self._parts.port, timeout=self.timeout
                )
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.headers.get("Retry-After", ""), answer.read()
            except (ConnectionError, http.client.BadStatusLine, http.client.CannotSendRequest):
                self.close()
                if not kept:
                    raise
            except BaseException:
                self.close()
                raise
        raise AssertionError("a fresh connection either answers or raises")


def encode(item: Any) -> Any:
    """An item of a dataset as JSON; tensors and arrays as their bytes."""
    if isinstance(item, Mapping):
        return {str(key): encode(value) for key, value in item.items()}
    if isinstance(item, tuple | list):
        return [encode(part) for part in item]
    if hasattr(item, "detach"):
        item = item.detach().cpu()
        item = (item.float() if str(item.dtype) == "torch.bfloat16" else item).numpy()
    if isinstance(item, np.ndarray | np.generic):
        array = np.asarray(item)
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        return {
            "base64": base64.b64encode(little.tobytes()).decode(),
            "dtype": array.dtype.name,
            "shape": list(array.shape),
        }
    return item


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
