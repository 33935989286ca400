"""What the service survives: clients that go away, malformed requests, crowds, kills, damage, and its own end.

Nothing here depends on how fast the machine is: what must have happened is waited for, with a deadline.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from byline.serve import Client, Limits, ServiceError
from byline.store import repair, verify
from serving import (
    Forks,
    Running,
    counted,
    examples,
    gated,
    in_thread,
    needs_extra,
    process,
    served,
    until,
    wait_for,
)
from test_store_faults import mounted

needs_extra()

import schemathesis  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

MALFORMED = int(os.environ.get("BYLINE_MALFORMED", "300"))
"""How many malformed requests; docs/serving.md says what ten thousand do."""
KILLS = int(os.environ.get("BYLINE_KILLS", "10"))
GOOD = [[0.1, 0.2, 0.3, 0.4, 0.5], 1]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with process(tmp_path_factory.mktemp("service") / "store", "serving:served") as (running, client):
        yield running, client


@pytest.fixture(scope="module")
def forks():
    made = Forks()
    yield made
    made.end()


@pytest.fixture(scope="module")
def expected():
    """What the service must say of three examples, by the library."""
    return served().ready().attributor.attribute(examples(3, 1)).top(5)


def agrees(results: list[dict[str, Any]], want: Any) -> bool:
    for found, row in zip(results, want, strict=True):
        for side in ("proponents", "opponents"):
            ranked = getattr(row, side)
            assert [each["index"] for each in found[side]] == ranked.indices.tolist()
            np.testing.assert_allclose([each["score"] for each in found[side]], ranked.scores, rtol=1e-4, atol=1e-6)
    return True


def connected(client: Client) -> socket.socket:
    parts = urlsplit(client.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def head(length: int) -> bytes:
    return (
        f"POST /v1/attribute HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}"
        "\r\n\r\n"
    ).encode()


def drop(sock: socket.socket) -> None:
    """Close with a reset, as a process that dies with unread data does."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def resident(running: Running) -> int:
    """Bytes of memory that a service holds."""
    for line in Path(f"/proc/{running.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def connections(running: Running) -> int:
    return sum(1 for file in Path(f"/proc/{running.pid}/fd").iterdir() if _is_socket(file))


def _is_socket(file: Path) -> bool:
    try:
        return os.readlink(file).startswith("socket:")
    except OSError:
        return False


# clients that go away


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_clients_that_go_away_mid_request_leave_nothing_behind(service, expected):
    running, client = service
    client.attribute(examples(3, 1), 5)
    before = connections(running)
    body = json.dumps({"examples": [GOOD]}).encode()
    whole = head(len(body)) + body
    gone = (b"", b"PO", whole[:40], head(len(body)), head(len(body)) + body[:5], whole[:-1], whole)
    told = counted(client, 'byline_requests_total{route="other",status="0"}')
    for closed in (socket.socket.close, drop):
        for sent in gone * 3:
            sock = connected(client)
            sock.sendall(sent)
            closed(sock)
    # the connections end, and the requests whose heads had arrived are noted as what they were
    wait_for(lambda: connections(running) <= before)
    wait_for(lambda: counted(client, 'byline_requests_total{route="other",status="0"}') >= told + 3)
    line = until(running, "request")
    while line["status"] != "disconnected":
        line = until(running, "request")
    wait_for(lambda: counted(client, "byline_queue_examples") == 0)
    assert agrees(client.attribute(examples(3, 1), 5), expected)


class Gate:
    """Holds an attributor's `top` until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, attributor: Any):
        self.begun, self.open, self.asked = threading.Event(), threading.Event(), []
        real = attributor.top

        def held(tests: Any, k: int) -> Any:
            self.asked.append(len(tests))
            self.begun.set()
            assert self.open.wait(60)
            return real(tests, k)

        monkeypatch.setattr(attributor, "top", held)


def test_a_client_that_goes_away_while_its_answer_is_computed(monkeypatch):
    """What has not begun is never begun; what has begun ends, and is nobody's."""
    made = served().ready()
    want = made.attributor.attribute(examples(3, 1)).top(5)
    gate = Gate(monkeypatch, made.attributor)
    body = json.dumps({"examples": [GOOD] * 2}).encode()
    with in_thread(made) as (client, app):
        first, second = connected(client), connected(client)
        first.sendall(head(len(body)) + body)
        assert gate.begun.wait(60)
        second.sendall(head(len(body)) + body)
        wait_for(lambda: app.state.worker.waiting == 2)
        second.close()
        left = 'byline_requests_total{route="/v1/attribute",status="499"}'
        wait_for(lambda: counted(client, left) == 1)
        drop(first)
        wait_for(lambda: counted(client, left) == 2)
        gate.open.set()
        assert agrees(client.attribute(examples(3, 1), 5), want)
        assert gate.asked == [2, 3]
        assert counted(client, "byline_queue_examples") == 0
        assert counted(client, "byline_examples_total") == 3


# malformed requests


def no_failure(status: int, data: bytes) -> None:
    assert status < 500, (status, data)
    if status >= 400:
        assert isinstance(json.loads(data)["error"], str)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@st.composite
def spoilt(draw: Any) -> bytes:
    """A good body with a few bytes changed, removed or put in."""
    body = bytearray(json.dumps({"examples": [GOOD, GOOD], "k": 3, "metadata": True}).encode())
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, max(0, len(body) - 1)))
        body[place : place + draw(st.integers(0, 9))] = draw(st.binary(max_size=4))
    return bytes(body)


almost = st.fixed_dictionaries(
    {"examples": st.lists(st.tuples(json_values, json_values) | json_values, max_size=3)},
    optional={"k": json_values, "metadata": json_values},
)
bodies = (
    st.binary(max_size=400)
    | json_values.map(lambda value: json.dumps(value).encode())
    | almost.map(lambda value: json.dumps(value).encode())
    | spoilt()
)
KINDS = st.sampled_from(
    [*["application/json"] * 8, "application/json; charset=\xff", "text/plain", "", "application/xml"]
)


class Memory:
    """That a service's memory does not grow with the number of requests."""

    def __init__(self, running: Running, warm: int):
        self.running, self.warm, self.sent, self.first = running, warm, 0, 0

    def note(self) -> None:
        self.sent += 1
        if self.sent == self.warm:
            self.first = resident(self.running)

    def check(self) -> None:
        """Not by more than what allocators keep, and not by a kilobyte a request."""
        grown = resident(self.running) - self.first
        assert grown < 2**24, f"{grown / 1e6:.1f} MB more after {self.sent - self.warm} requests"


def settings_of(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_malformed_requests(service, expected):
    """By the OpenAPI, as bodies, and as bytes: no 5xx, no hang (60 s are the deadline of each), memory flat."""
    running, client = service
    count = -(-MALFORMED // 3)
    memory = Memory(running, min(200, MALFORMED // 3))
    parts = urlsplit(client.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)

    @settings_of(count)
    @given(bodies, KINDS)
    def with_bodies(body: bytes, kind: str) -> None:
        connection.request("POST", "/v1/attribute", body, {"Content-Type": kind.encode("latin-1")})
        answer = connection.getresponse()
        no_failure(answer.status, answer.read())
        memory.note()

    @settings_of(count)
    @given(st.binary(max_size=300), st.sampled_from([b"", head(50), head(10**30), head(3)[:-2], b"GET / HTTP/1.1\r\n"]))
    def with_bytes(tail: bytes, start: bytes) -> None:
        with connected(client) as sock:
            # it may have answered and closed before all is sent
            with suppress(ConnectionError, BrokenPipeError):
                sock.sendall(start + tail)
                sock.shutdown(socket.SHUT_WR)
            answer = b""
            with suppress(ConnectionError):
                while got := sock.recv(65536):
                    answer += got
        assert not answer.startswith(b"HTTP/1.1 5"), answer
        memory.note()

    document = client._ask("GET", "/openapi.json")
    schema = schemathesis.openapi.from_dict(document)
    judged = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
    modes = schemathesis.GenerationMode
    # most to where there is most to get wrong
    paths = {("/v1/attribute", "POST"): count * 3 // 4, ("/v1/examples/{index}", "GET"): count // 4 + 1}

    with_bodies()
    with_bytes()
    for (path, method), share in paths.items():
        operation = schema[path][method]

        @settings_of(share)
        @given(operation.as_strategy(modes.NEGATIVE) | operation.as_strategy(modes.POSITIVE))
        def with_schema(case: Any) -> None:
            answer = case.call(base_url=client.url, timeout=60)
            no_failure(answer.status_code, answer.content)
            case.validate_response(answer, checks=judged)
            memory.note()

        with_schema()
    assert memory.sent >= MALFORMED * 0.95
    memory.check()
    assert running.poll() is None
    assert agrees(client.attribute(examples(3, 1), 5), expected)


# crowds


def test_many_clients_at_once_get_their_own_answers(service):
    _, client = service
    tests = examples(48, 5)
    want = served().ready().attributor.attribute(tests).top(5)
    answers: dict[int, Any] = {}

    def ask(first: int) -> None:
        for place in range(first, len(tests), 16):
            answers[place] = client.attribute([tests[place]], 5)
        client.close()

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(answers) == list(range(len(tests)))
    for place, found in answers.items():
        assert agrees(found, [want[place]])


def test_a_full_queue_is_told_and_asking_again_is_answered(monkeypatch):
    made = served().ready()
    want = made.attributor.attribute(examples(3, 1)).top(5)
    gate = Gate(monkeypatch, made.attributor)
    with in_thread(made, Limits(batch=3, queue=3)) as (client, app), ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.attribute, examples(3, 1), 5)
        assert gate.begun.wait(60)
        second = pool.submit(client.attribute, examples(3, 1), 5)
        wait_for(lambda: app.state.worker.waiting == 3)
        with pytest.raises(ServiceError, match="429: too many requests wait") as caught:
            Client(client.url, retries=0).attribute(examples(3, 1), 5)
        assert caught.value.status == 429
        patient = pool.submit(Client(client.url, timeout=60, retries=100).attribute, examples(3, 1), 5)
        refused = 'byline_requests_total{route="/v1/attribute",status="429"}'
        wait_for(lambda: counted(client, refused) >= 2)
        gate.open.set()
        for asked in (first, second, patient):
            assert agrees(asked.result(60), want)


def test_what_takes_too_long_is_503_and_the_next_is_answered(monkeypatch):
    made = served().ready()
    want = made.attributor.attribute(examples(3, 1)).top(5)
    gate = Gate(monkeypatch, made.attributor)
    with in_thread(made, Limits(seconds=2)) as (client, _):
        with pytest.raises(ServiceError, match="no answer within 2 s") as caught:
            Client(client.url, retries=0).attribute(examples(3, 1), 5)
        assert caught.value.status == 503
        gate.open.set()
        assert agrees(Client(client.url, retries=100).attribute(examples(3, 1), 5), want)


# kills


def test_a_kill_at_any_moment_of_the_start_costs_nothing(tmp_path, forks, expected):
    """At random calls of the start, from reading its options to listening; half of them meet a store that was begun."""
    whole = forks(tmp_path / "whole")
    assert agrees(whole.answer["results"], expected), whole.other
    length, generator, stages = whole.answer["passed"], random.Random(0), set()
    folder = tmp_path / "store"
    for kill in range(KILLS):
        killed = forks(folder, kill=generator.randrange(1, length))
        assert (killed.code, killed.answer) == (-signal.SIGKILL, None)
        begun = (folder / "manifest.json").exists()
        if begun:
            report = verify(folder)
            assert report.whole, report.problems
            stages.add("unfinished" if report.unfinished else "finished")
        else:
            stages.add("nothing yet")
        if kill % 2:
            again = forks(folder)
            assert again.code == 0, (again.other, again.log)
            assert agrees(again.answer["results"], expected)
            assert verify(folder).whole
            assert not verify(folder).unfinished
            shutil.rmtree(folder)
    assert len(stages) > 1, f"all kills fell into one stage: {stages}"


# places and damage


def test_a_store_on_a_read_only_path_is_served_and_an_unfinished_one_refused(tmp_path, forks, expected):
    with mounted("8m") as disk:
        served(disk / "store").ready(disk / "store")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with process(disk / "store", "serving:served") as (running, client):
            assert agrees(client.attribute(examples(3, 1), 5), expected)
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 0
        # as if the disk had been made read-only while the store was being made
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        shutil.copytree(disk / "store", disk / "unfinished" / "store")
        shutil.rmtree(disk / "unfinished" / "store" / "arrays" / "output")
        repair(disk / "unfinished" / "store")
        (disk / "unfinished" / "log-of-a-fork").symlink_to(tmp_path / "log")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "cannot be written" in forks(disk / "unfinished" / "store").sentence()


FILES = {
    "manifest": "manifest.json",
    "zarr.json": "arrays/features/*/rows/zarr.json",
    "rows": "arrays/features/*/rows/c.0.0",
    "residual": "arrays/residual/*/c.0",
    "output": "arrays/output/*/c.0",
    "state": "arrays/state/*/*/c.*",
}


def named(file: Path, store: Path) -> str:
    """A chunk as the store names it."""
    return f"chunk {file.name[2:]} of {str(file.parent.relative_to(store)).removeprefix('arrays/')}"


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("kind", FILES)
def test_damage_is_one_sentence_or_changes_nothing(tmp_path, forks, expected, kind, how):
    store = tmp_path / "store"
    served(store).ready(store)
    found = sorted(store.glob(FILES[kind]))
    if not found:
        pytest.skip(f"these features keep no {kind}")
    content = bytearray(found[0].read_bytes())
    if how == "missing":
        found[0].unlink()
    else:
        content[len(content) // 2] ^= 1
        found[0].write_bytes(content if how == "flipped" else content[: len(content) // 2])
    start = forks(store)
    if start.code == 0:
        # what it does not read does not matter, and what is missing is computed again
        assert kind in ("zarr.json", "output") or how == "missing"
        assert agrees(start.answer["results"], expected)
    else:
        sentence = start.sentence()
        assert named(found[0], store) in sentence or found[0].name in sentence
        assert start.answer is None


def test_rows_that_are_damaged_while_they_are_served_from_the_store(tmp_path, forks):
    """The request fails with a 500 that tells nothing, and the log names the file: never a wrong number."""
    store = tmp_path / "store"
    served(store).ready(store)
    file = sorted(store.glob(FILES["rows"]))[0]
    content = bytearray(file.read_bytes())
    content[9] ^= 1
    file.write_bytes(content)
    start = forks(store, "--rows", "store")
    assert start.answer is not None
    assert start.answer["error"] == "500: the service failed; its log says why"
    assert any(named(file, store) in line.get("traceback", "") for line in start.log)


def test_a_newer_manifest_and_whatever_else_cannot_be_served_is_one_sentence(tmp_path, forks):
    store = tmp_path / "store"
    served(store).ready(store)
    for task, options, says in (
        ("serving:another_model", (), "was made for"),
        ("serving:nothing", (), "has no nothing"),
        ("no_such_module:x", (), "importing no_such_module fails"),
        ("serving:served", ("--rows", "int4"), "dtype is 'int4'"),
        ("serving:served", ("--host", "0.0.0.0"), "there is no token"),
        ("serving:served", ("--token", "short"), "token is too short"),
    ):
        sentence = forks(store, *options, task=task).sentence()
        assert says in sentence, sentence
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}" in forks(store, "--port", port).sentence()
    manifest = store / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    assert "has format 99; this byline reads up to 2: upgrade it" in forks(store).sentence()


# its own end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_what_was_accepted(tmp_path, monkeypatch, number):
    gate = tmp_path / "gate"
    gate.touch()
    monkeypatch.setenv("BYLINE_TEST_GATE", str(gate))
    want = gated().ready().attributor.attribute(examples(3, 1)).top(5)
    options = ("--max-batch", "3")
    with (
        process(tmp_path / "store", "serving:gated", *options, BYLINE_TEST_GATE=str(gate)) as (running, client),
        ThreadPoolExecutor(2) as pool,
    ):
        gate.unlink()
        asked = [pool.submit(client.attribute, examples(3, 1), 5) for _ in range(2)]
        # one is at the model, one waits for it
        wait_for((tmp_path / "begun").exists)
        wait_for(lambda: counted(client, "byline_queue_examples") == 3)
        running.send_signal(number)
        wait_for(lambda: _refuses(client))
        assert running.poll() is None
        gate.touch()
        for each in asked:
            assert agrees(each.result(60), want)
        assert running.wait(60) == 0
        assert json.loads(running.rest()[-1])["message"] == "stopped"


def _refuses(client: Client) -> bool:
    try:
        connected(client).close()
    except ConnectionRefusedError:
        return True
    return False
