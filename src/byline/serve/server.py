"""Running the service: where it listens, and how it stops."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from byline.serve.app import create_app
from byline.serve.contract import Served, load
from byline.serve.limits import LOCAL, Limits, check_token

try:
    import uvicorn
except ImportError as error:
    raise ImportError(f"serving needs the extra: pip install 'byline[serve]' ({error})") from error

_log = logging.getLogger("byline.serve")
_GRACE = 5.0  # seconds beyond a request's own
_CONNECTIONS = 512


class Server(uvicorn.Server):
    """Says where it listens, and ends with code 0 when it was asked to stop."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            _log.info("serving", extra={"url": url, "pid": os.getpid()})

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Finish running requests on SIGTERM and SIGINT; a second one does not wait."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(
    store: str | os.PathLike[str] | None,
    task: str | Callable[[], Served],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    rows: str = "auto",
    limits: Limits | None = None,
    page: bool = True,
) -> None:
    """Fit on the store, listen, and answer until SIGTERM or SIGINT.

    Args:
        store: folder of the store; None for that of the attributor.
        task: ``module:object``, see `byline.serve.load`; or what makes a `Served`.
        host: where to listen; other hosts than localhost need a token.
        port: 0 takes a free one; the log says which.
        token: that requests must bear; ``BYLINE_TOKEN`` in the environment when left out.
        rows: what the training rows are kept as, see `create_app`.
        limits: of requests.
        page: also serve the explorer's page.

    Raises:
        ValueError: off localhost without a token, or what `byline.serve.load` and ``fit`` refuse.
        OSError: the port is taken.
    """
    token = check_token(token or os.environ.get("BYLINE_TOKEN") or None)
    address = _address(host, port)
    if token is None and not ipaddress.ip_address(address[1][0].partition("%")[0]).is_loopback:
        raise ValueError(
            f"host is {host}, which others can reach, and there is no token; set --token or BYLINE_TOKEN, or keep to "
            "127.0.0.1"
        )
    limits = limits or Limits()
    # taken before the long work, so that a port in use is told at once
    listening = _listen(address, host, port)
    with listening:
        served = load(task, store) if isinstance(task, str) else task()
        _log.info("fitting", extra={"store": str(store), "task": task if isinstance(task, str) else served.title})
        served.ready(store)
        app = create_app(served, limits, token=token, rows=rows, hosts=LOCAL, page=page)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=round(limits.seconds + _GRACE),
        )
        listening.listen(_CONNECTIONS)
        Server(config).run(sockets=[listening])
    _log.info("stopped")


def _address(host: str, port: int) -> tuple[int, Any]:
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host is {host!r}, which is no address of this machine: {error}") from None
    return family, where


def _listen(address: tuple[int, Any], host: str, port: int) -> socket.socket:
    # asyncio turns Nagle's algorithm off where a socket says that it is TCP; head and body of an answer are two writes,
    # and the second would wait for 40 ms
    made = socket.socket(address[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address[1])
    except OSError as error:
        made.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return made
