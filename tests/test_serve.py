"""The service in this process: answers against the library, what it tells, and what it refuses."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import byline
from byline.serve import Limits, Served, load
from serving import N, attributor, examples, needs_extra, served

needs_extra()

from fastapi.testclient import TestClient  # noqa: E402

from byline.serve.app import create_app  # noqa: E402
from byline.serve.client import encode  # noqa: E402
from byline.serve.decode import Template  # noqa: E402
from byline.serve.logs import JsonFormatter  # noqa: E402
from byline.serve.server import serve  # noqa: E402

URL = "http://localhost"


@pytest.fixture(scope="module")
def ready() -> Served:
    return served().ready()


@pytest.fixture(scope="module")
def client(ready):
    with TestClient(create_app(ready, Limits(batch=8, k=20, body=50_000)), base_url=URL) as made:
        yield made


def plain(data: TensorDataset) -> list[Any]:
    return [[x.tolist(), int(y)] for x, y in data]


def check(found: dict[str, Any], want: byline.scores.TopRow) -> None:
    for side in ("proponents", "opponents"):
        ranked = getattr(want, side)
        assert [row["index"] for row in found[side]] == ranked.indices.tolist()
        np.testing.assert_allclose([row["score"] for row in found[side]], ranked.scores, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose([row["stderr"] for row in found[side]], ranked.stderr, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", ["plain", "binary"])
def test_answers_are_those_of_the_library(client, ready, form):
    tests = examples(7, 1)
    sent = plain(tests) if form == "plain" else [encode(tests[i]) for i in range(7)]
    answer = client.post("/v1/attribute", json={"examples": sent, "k": 5})
    assert answer.status_code == 200, answer.text
    want = ready.attributor.attribute(tests).top(5)
    for found, row in zip(answer.json()["results"], want, strict=True):
        check(found, row)
        for side in ("proponents", "opponents"):
            for each in found[side]:
                assert each["metadata"]["name"] == f"row {each['index']}"


def test_metadata_only_where_it_is_wanted(client):
    answer = client.post("/v1/attribute", json={"examples": plain(examples(1, 1)), "metadata": False}).json()
    assert all(row["metadata"] is None for row in answer["results"][0]["proponents"])
    assert len(answer["results"][0]["proponents"]) == 10


def test_a_training_example(client):
    assert client.get("/v1/examples/3").json() == {"index": 3, "metadata": {"name": "row 3", "owner": None}}
    assert client.get("/v1/examples/0").status_code == 200  # a lone surrogate in its metadata
    assert client.get(f"/v1/examples/{N}").status_code == 404
    for odd in ("-1", "x", "1.5", "9" * 40, "%00"):
        assert client.get(f"/v1/examples/{odd}").status_code in (404, 422)


def test_info_tells_what_is_served(client):
    info = client.get("/v1/info").json()
    assert (info["method"], info["members"], info["n_train"], info["rows"]) == ("TRAK", 2, N, "float32")
    assert info["example"] == [{"dtype": "float32", "shape": [5]}, {"dtype": "int64", "shape": []}]
    assert info["limits"]["k"] == 20


def test_health_metrics_and_openapi(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    client.post("/v1/attribute", json={"examples": plain(examples(2, 1))})
    text = client.get("/metrics").text
    assert 'byline_requests_total{route="/v1/attribute",status="200"}' in text
    assert f"byline_train_examples {N}.0" in text
    assert "byline_queue_examples 0.0" in text
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) >= {"/v1/attribute", "/v1/examples/{index}", "/v1/info", "/healthz", "/metrics"}
    schema = document["paths"]["/v1/attribute"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith("/Attribution")
    assert document["components"]["schemas"]["Binary"]["required"] == ["base64", "dtype", "shape"]


def test_what_a_query_costs_is_measured(client, ready):
    before = client.get("/v1/info").json()["cost"]
    client.post("/v1/attribute", json={"examples": plain(examples(4, 1))})
    cost, ledger = client.get("/v1/info").json()["cost"], client.app.state.worker.ledger
    assert cost["queries"] == before["queries"] + 4
    assert cost["seconds"] * cost["queries"] == pytest.approx(ledger.serving.seconds)
    assert cost["wall"] * cost["queries"] == pytest.approx(ledger.serving.wall)
    assert min(cost["seconds"], cost["wall"]) > 0
    assert cost["store_bytes"] == ready.attributor.store.nbytes() > 0
    text = client.get("/metrics").text
    for name, key in (("query_cpu_seconds", "seconds"), ("query_seconds", "wall"), ("store_bytes", "store_bytes")):
        line = next(line for line in text.splitlines() if line.startswith(f"byline_{name} "))
        assert float(line.split()[1]) == pytest.approx(cost[key])


X, Y = [0.1, 0.2, 0.3, 0.4, 0.5], 1
BAD = [
    ("[", 400, "no JSON"),
    ("", 422, "body"),
    ("null", 422, "body"),
    ("[]", 422, "body"),
    ('"\\ud800"', 422, "body"),
    ('{"examples": []}', 422, "at least 1"),
    (json.dumps({"examples": [[X, Y]] * 9}), 422, "at most 8"),
    (json.dumps({"examples": [[X, Y]], "k": 0}), 422, "k: "),
    (json.dumps({"examples": [[X, Y]], "k": 21}), 422, "k: "),
    (json.dumps({"examples": [[X, Y]], "k": True}), 422, "k: "),
    (json.dumps({"examples": [[X, Y]], "k": "5"}), 422, "k: "),
    (json.dumps({"examples": [[X, Y]], "extra": 1}), 422, "extra"),
    (json.dumps({"examples": [[X[:4], Y]]}), 422, "shape [4]; expected [5]"),
    (json.dumps({"examples": [[[*X[:4], [1]], Y]]}), 422, "no regular array"),
    (json.dumps({"examples": [[X]]}), 422, "array of 2 parts"),
    (json.dumps({"examples": [X]}), 422, "array of 2 parts"),
    (json.dumps({"examples": [{"x": X}]}), 422, "array of 2 parts"),
    (json.dumps({"examples": [["abcde", Y]]}), 422, "a text; expected numbers"),
    (json.dumps({"examples": [[list("abcde"), Y]]}), 422, "else than numbers"),
    (json.dumps({"examples": [[[None] * 5, Y]]}), 422, "else than numbers"),
    (json.dumps({"examples": [[X, 1.5]]}), 422, "whole numbers"),
    (json.dumps({"examples": [[X, True]]}), 422, "whole numbers"),
    (json.dumps({"examples": [[X, 2**63]]}), 422, "outside int64"),
    (json.dumps({"examples": [[X, 10**30]]}), 422, "else than numbers"),
    (json.dumps({"examples": [[X, 7]]}), 422, "label 7 is out of range"),
    (json.dumps({"examples": [[X, Y], [X, -1]]}), 422, "examples[1]"),
    (json.dumps({"examples": [[[1e300, *X[1:]], Y]]}), 422, "no finite float32"),
    (json.dumps({"examples": [[[3e38] * 5, Y]]}), 422, "examples[0]"),
    ('{"examples": [[[NaN, 0, 0, 0, 0], 1]]}', 422, "no finite float32"),
    ('{"examples": [[[1e999, 0, 0, 0, 0], 1]]}', 422, "no finite float32"),
    ('{"examples": ' + "[" * 20000 + "]" * 20000 + "}", 400, ""),
    (json.dumps({"examples": [[{"base64": "AAAA", "dtype": "float32", "shape": [5]}, Y]]}), 422, "3 bytes"),
    (json.dumps({"examples": [[{"base64": "!", "dtype": "float32", "shape": [5]}, Y]]}), 422, "no base64"),
    (json.dumps({"examples": [[{"base64": "é", "dtype": "float32", "shape": [5]}, Y]]}), 422, "no base64"),
    (json.dumps({"examples": [[{"base64": "", "dtype": "object", "shape": [0]}, Y]]}), 422, "expected base64"),
    (json.dumps({"examples": [[{"base64": "", "dtype": "float32", "shape": [0, 2**31 - 1]}, Y]]}), 422, "shape"),
    (json.dumps({"examples": [[{"base64": "", "dtype": "float32", "shape": [2**40]}, Y]]}), 422, "expected base64"),
    (json.dumps({"examples": [[{"base64": "gASVCQAAAAAAAACMBW9zLg==", "dtype": "O", "shape": [5]}, Y]]}), 422, ""),
]


@pytest.mark.parametrize(("body", "status", "says"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_is_malformed_is_refused_in_a_sentence(client, body, status, says):
    answer = client.post("/v1/attribute", content=body.encode(), headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]
    assert client.post("/v1/attribute", json={"examples": [[X, Y]]}).status_code == 200


def test_other_content_types_and_methods(client):
    body = json.dumps({"examples": [[X, Y]]})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/octet-stream", ""):
        assert client.post("/v1/attribute", content=body, headers={"Content-Type": kind}).status_code == 415
    assert client.get("/v1/attribute").status_code == 405
    assert client.get("/nothing").json() == {"error": "Not Found"}


def test_a_large_body_is_refused_however_it_is_announced(client):
    answer = client.post("/v1/attribute", content=b"x" * 50_001, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413

    def parts():
        for _ in range(60):
            yield b" " * 1000

    answer = client.post("/v1/attribute", content=parts(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_other_hosts_are_refused_without_a_token(client):
    for host in ("evil.example", "localhost.evil.example", "evil.example:80", "", "[::2]"):
        assert client.get("/v1/info", headers={"Host": host}).status_code == 421
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
        assert client.get("/v1/info", headers={"Host": host}).status_code == 200


def test_the_token(ready):
    app = create_app(ready, token="correct-horse")
    with TestClient(app, base_url="http://anything.example") as client:
        for odd in (
            "",
            "correct-horse",
            "Bearer",
            "Bearer wrong-horses",
            "Bearer correct-horsee",
            "Basic correct-horse",
        ):
            answer = client.get("/v1/info", headers={"Authorization": odd})
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        good = {"Authorization": "Bearer correct-horse"}
        assert client.get("/v1/info", headers=good).status_code == 200
        assert client.get("/openapi.json").status_code == 401
        assert client.get("/openapi.json", headers=good).json()["security"] == [{"bearer": []}]
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("token", ["", "short", "with blank", "ümläut-token", "new\nline-token"])
def test_tokens_that_are_none(ready, token):
    with pytest.raises(ValueError, match="token is too short or has odd characters"):
        create_app(ready, token=token)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_off_localhost_needs_a_token(host, monkeypatch):
    monkeypatch.delenv("BYLINE_TOKEN", raising=False)
    with pytest.raises(ValueError, match="there is no token"):
        serve(None, "serving:served", host=host, port=0)


def test_a_host_that_is_none():
    with pytest.raises(ValueError, match="no address of this machine"):
        serve(None, "serving:served", host="nowhere.invalid", port=0)


def test_answers_do_not_wait_for_acknowledgements():
    import socket

    from byline.serve.server import _address, _listen

    with _listen(_address("127.0.0.1", 0), "127.0.0.1", 0) as made:
        # what asyncio looks at before it turns Nagle's algorithm off
        assert made.proto == socket.IPPROTO_TCP


# what waits


def test_a_full_queue_is_429_and_a_slow_answer_503(ready, monkeypatch):
    import threading

    release, begun = threading.Event(), threading.Event()
    real = ready.attributor.top

    def held(*arguments):
        begun.set()
        release.wait(20)
        return real(*arguments)

    monkeypatch.setattr(ready.attributor, "top", held)
    app = create_app(ready, Limits(batch=1, queue=1, seconds=0.4))
    body = {"examples": [[X, Y]]}
    with TestClient(app, base_url=URL) as client:
        first = threading.Thread(target=lambda: answers.append(client.post("/v1/attribute", json=body)))
        answers: list[Any] = []
        first.start()
        assert begun.wait(10)
        second = threading.Thread(target=lambda: answers.append(client.post("/v1/attribute", json=body)))
        second.start()
        while app.state.worker.waiting == 0 and second.is_alive():
            pass
        third = client.post("/v1/attribute", json=body)
        first.join(10)
        second.join(10)
        assert third.status_code == 429
        assert third.headers["Retry-After"] == "1"
        assert [answer.status_code for answer in answers] == [503, 503]
        assert all(answer.headers["Retry-After"] == "1" for answer in answers)
        assert client.get("/healthz").status_code == 200
        release.set()
        monkeypatch.setattr(ready.attributor, "top", real)
        for _ in range(50):
            if client.post("/v1/attribute", json=body).status_code == 200:
                break
        else:
            pytest.fail("the service did not come back")


def test_requests_are_scored_together_and_answered_apart(ready):
    from byline.serve.worker import Refused, Worker

    worker = Worker(ready.attributor, Limits(batch=16))
    tests = examples(6, 1)
    asks = [worker.submit([tests[i], tests[i + 1]], 3 + i) for i in (0, 2, 4)]
    bad = worker.submit([(torch.zeros(5), torch.tensor(9))], 2)
    # before the worker begins: an attributor serves one thread at a time
    want = ready.attributor.attribute(tests)
    worker.start()
    for i, ask in zip((0, 2, 4), asks, strict=True):
        for place, (proponents, opponents) in enumerate(ask.result(30)):
            row = want.top(3 + i)[i + place]
            np.testing.assert_array_equal(proponents.indices, row.proponents.indices)
            np.testing.assert_array_equal(opponents.indices, row.opponents.indices)
    with pytest.raises(Refused, match="label 9 is out of range"):
        bad.result(30)
    worker.stop()
    assert worker.batches[0] == 7
    assert not worker.alive


def test_a_failure_of_the_service_is_a_500_that_tells_nothing(ready, monkeypatch, caplog):
    def broken(*_):
        raise OSError("disk /secret/place is gone")

    monkeypatch.setattr(ready.attributor, "top", broken)
    with TestClient(create_app(ready), base_url=URL) as client:
        answer = client.post("/v1/attribute", json={"examples": [[X, Y]]})
        assert answer.status_code == 500
        assert "secret" not in answer.text
    assert "secret" in caplog.text


# what is served


@pytest.mark.parametrize(("rows", "tolerance"), [("float16", 2e-3), ("int8", 3e-2), ("store", 1e-5)])
def test_rows_in_memory(ready, rows, tolerance):
    want = ready.attributor.attribute(examples(1, 1))
    with TestClient(create_app(ready, rows=rows), base_url=URL) as client:
        assert client.get("/v1/info").json()["rows"] == rows
        found = client.post("/v1/attribute", json={"examples": plain(examples(1, 1))}).json()["results"][0]
    for row in found["proponents"]:
        assert abs(row["score"] - want.values[0, row["index"]]) < tolerance * np.abs(want.values).max()
    ready.attributor.hold("float32")


def test_one_member_has_no_standard_error():
    made = attributor()
    one = byline.GradDot(made.task, byline.Independent([made.task.model]), progress=False)
    ready = Served(one, examples(N, 0)).ready()
    with TestClient(create_app(ready), base_url=URL) as client:
        found = client.post("/v1/attribute", json={"examples": plain(examples(1, 1))}).json()["results"][0]
    assert all(row["stderr"] is None and row["metadata"] is None for row in found["proponents"])


def test_a_decode_of_its_own():
    def decode(value):
        if not isinstance(value, str):
            raise ValueError("example is no text")
        return torch.tensor([float(len(value)), 0, 0, 0, 0]), torch.tensor(0)

    ready = Served(attributor(), examples(N, 0), decode=decode, metadata=lambda i: i * 2).ready()
    with TestClient(create_app(ready), base_url=URL) as client:
        found = client.post("/v1/attribute", json={"examples": ["abc"], "k": 1}).json()["results"][0]
        assert found["proponents"][0]["metadata"] == 2 * found["proponents"][0]["index"]
        assert client.post("/v1/attribute", json={"examples": [3]}).json()["error"] == "examples[0] is no text"


def test_forms_of_items():
    class Texts:
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return {"ids": torch.arange(3 + i % 5), "weight": 0.5, "on": True, "n": i, "name": "a", "a": np.zeros(2)}

    template = Template(Texts())
    assert template.describe()["ids"] == {"dtype": "int64", "shape": [None]}
    item = template({"ids": [1, 2, 3, 4], "weight": 1, "on": False, "n": 3, "name": "b", "a": [1, 2.5]})
    assert item["ids"].tolist() == [1, 2, 3, 4]
    assert item["weight"] == 1.0
    assert isinstance(item["a"], np.ndarray)
    for key, value in (("ids", []), ("ids", [0] * 1000), ("on", 1), ("n", 1.0), ("n", 2**70), ("weight", True),
                       ("weight", 10**400), ("name", 3), ("a", [[1, 2]]), ("a", [True, False])):  # fmt: skip
        with pytest.raises(ValueError, match="example"):
            template({**item, "ids": [1], "a": [1, 2], key: value})
    with pytest.raises(ValueError, match="an object with the keys"):
        template({"ids": [1]})
    with pytest.raises(TypeError, match="expected decode="):
        Template([(object(), 1)])


def test_what_can_be_served(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_to_serve.py").write_text(
        "import serving\n"
        "served = serving.served\n"
        "fitted = serving.attributor().fit(serving.examples(9, 0))\n"
        "unfitted = serving.attributor()\n"
        "number = 3\n"
        "def with_store(store): return serving.served(store)\n"
        "class inner: served = serving.served()\n"
    )
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    for name in ("served", "inner.served", "with_store"):
        assert load(f"mine_to_serve:{name}", tmp_path / name).ready(tmp_path / name).attributor.n_train_ == N
        assert (tmp_path / name / "manifest.json").is_file()
    assert load("mine_to_serve:fitted").ready().attributor.n_train_ == 9
    for spec, says in (
        ("mine_to_serve", "expected module:object"),
        (":x", "expected module:object"),
        ("no_such_module:x", "importing no_such_module fails"),
        ("mine_to_serve:nothing", "has no nothing"),
        ("mine_to_serve:number", "expected a byline.serve.Served"),
        ("mine_to_serve:unfitted", "train_set is missing"),
    ):
        with pytest.raises(ValueError, match=says):
            load(spec)
    with pytest.raises(ValueError, match="the attributor has its own"):
        load("mine_to_serve:with_store", tmp_path / "a").ready(tmp_path / "b")


def test_served_refuses(ready):
    with pytest.raises(TypeError, match="attributor is a int"):
        Served(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="decode is a str"):
        Served(ready.attributor, decode="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="metadata has 2 entries; expected one per training example, 60"):
        Served(attributor(), examples(N, 0), metadata=["a", "b"]).ready()
    for name in ("body", "batch", "k", "seconds", "queue"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            Limits(**{name: 0})


def test_logs_are_one_object_a_line():
    record = logging.makeLogRecord(
        {"msg": "a\nb %s", "args": ("c",), "levelname": "INFO", "name": "byline", "path": "/é\x1b[2J"}
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert line.isascii()
    assert json.loads(line) | {"time": ""} == {
        "time": "", "level": "info", "logger": "byline", "message": "a\nb c", "path": "/é\x1b[2J",
    }  # fmt: skip


def test_importing_byline_needs_nothing_of_the_extra():
    code = (
        "import sys, byline; byline.Client('http://localhost'); byline.serve.Served\n"
        "assert not {'fastapi', 'uvicorn', 'prometheus_client'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ValueError, match="url is"):
        byline.Client("ftp://x")
