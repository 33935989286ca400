"""What the explorer's page asks of the service: answers against the library, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset
from typer.testing import CliRunner

import byline
from byline.report import Shown
from byline.serve import Limits, Served
from serving import N, attributor, examples, models, needs_extra

needs_extra()

from fastapi.testclient import TestClient  # noqa: E402

from byline.cli import app as cli  # noqa: E402
from byline.serve import runs  # noqa: E402
from byline.serve.app import create_app  # noqa: E402
from byline.serve.decode import Template  # noqa: E402
from byline.serve.explore import Explorer  # noqa: E402
from byline.serve.gallery import Gallery, seen  # noqa: E402

URL = "http://localhost"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\ud800\x1b[2J"
TESTS = examples(7, 1)


def made(method: str = "TRAK", ensemble: Any = None, **options: Any) -> Any:
    first = models(3)
    options = {"features": byline.Factorized(16), "progress": False, **options}
    return getattr(byline, method)(byline.Task(first[0]), ensemble or byline.Independent(first), **options)


def serves(method: Any, **options: Any) -> Served:
    return Served(method, examples(N, 0), test_set=TESTS, **options).ready()


def numbers(packed: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["base64"]), packed["dtype"])


def file(data: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode()}


@pytest.fixture(scope="module")
def ready() -> Served:
    told = [{"name": f"row {i}", "owner": HOSTILE if i % 2 else None} for i in range(N)]
    return serves(made(), metadata=told, title=HOSTILE, classes=["cat", "dog", HOSTILE])


@pytest.fixture(scope="module")
def client(ready):
    with TestClient(create_app(ready, Limits(body=50_000)), base_url=URL) as found:
        yield found


DROPPED = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).eval()


def halves():
    return byline.CrossFit(models(4), byline.folds(N, 2, repeats=2))


WAYS = {
    "trak": lambda: made(damping=0.3),
    "trak, kernels": lambda: made(features=byline.Exact(), damping=0.3),
    "trak, masks": lambda: byline.TRAK(
        byline.Task(DROPPED), byline.Dropout(byline.Independent([DROPPED]), masks=4), features=byline.Factorized(16)
    ),
    "graddot": lambda: made("GradDot"),
    "gradcos": lambda: made("GradCos", features=byline.Exact()),
    "influence": lambda: made("Influence", solver="explicit", features=byline.Exact()),
    "tracin": lambda: made("TracIn"),
    "knn": lambda: byline.KNNShapley(byline.Task(models(1)[0]), byline.Independent(models(2)), k=3),
    "trak, out-of-sample": lambda: made(ensemble=halves(), damping=0.3, residual="out-of-sample"),
    "trak, leave-one-out": lambda: made(ensemble=halves(), damping=0.3, residual="leave-one-out"),
    "trak, sqrt, kernels": lambda: made(
        ensemble=halves(), features=byline.Exact(), damping=0.3, residual="sqrt", hessian="weighted"
    ),
    "one member": lambda: made(ensemble=byline.Independent(models(1))),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_scores_are_those_of_the_library(way):
    ready = serves(WAYS[way]())
    want = ready.attributor.attribute(TESTS)
    for rows in ("float32", "store"):
        with TestClient(create_app(ready, rows=rows), base_url=URL) as client:
            found = client.post("/v1/explore/scores", json={"test": 3}).json()
            moved = client.get("/v1/explore/influence/5").json()
        scale = np.abs(want.values).max()
        np.testing.assert_allclose(numbers(found["scores"]), want.values[3], rtol=1e-4, atol=1e-5 * scale)
        np.testing.assert_allclose(numbers(found["stderr"]), want.stderr[3], rtol=1e-3, atol=1e-5 * scale)
        np.testing.assert_allclose(numbers(moved["scores"]), want.values[:, 5], rtol=1e-4, atol=1e-5 * scale)
        np.testing.assert_allclose(numbers(moved["stderr"]), want.stderr[:, 5], rtol=1e-3, atol=1e-5 * scale)


def test_an_example_is_followed_to_as_many_as_there_is_room_for(monkeypatch):
    from byline.methods import streaming

    ready = serves(made("GradDot", batch_size=2))
    want = ready.attributor.attribute(TESTS)
    # a batch of two examples of 16 columns takes 128 bytes, and there are three members
    monkeypatch.setattr(streaming, "HELD", 3 * 200)
    values, errors = Explorer(ready).moved(9)
    assert len(values) == len(errors) == 4
    np.testing.assert_allclose(values, want.values[:4, 9], rtol=1e-4, atol=1e-6)


def test_what_is_slow_the_first_time_is_done_while_nothing_waits(ready):
    from byline.serve.worker import Worker

    worker, done = Worker(ready.attributor, Limits()), []

    def fails() -> None:
        raise ValueError("left out")

    worker.when_idle(lambda: done.append("spare"), fails, lambda: done.append("more"))
    first = worker.call(lambda: done.append("asked"))
    worker.start()
    first.result(10)
    assert worker.submit([TESTS[0]], 1).result(10)
    worker.stop()
    assert done[0] == "asked"
    assert worker.waiting == 0


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one member"])
def test_the_error_of_a_sum_of_one_is_that_of_its_score(way):
    ready = serves(WAYS[way]())
    said = Explorer(ready).said(TESTS[0])
    for place in (0, 7, 31):
        value, error, bound = said.total(np.array([place]))
        assert not bound
        np.testing.assert_allclose([value, error], [said.values[place], said.stderr[place]], rtol=1e-3, atol=1e-9)


def test_the_error_of_a_sum_is_the_spread_of_the_members_sums():
    ready = serves(made("GradDot"))
    places = np.array([3, 4, 9, 30])
    sums = ready.attributor.votes(TESTS).values[:, 2][:, places].sum(1)
    value, error, _ = Explorer(ready).said(TESTS[2]).total(places)
    assert value == pytest.approx(sums.mean(), rel=1e-4)
    assert error == pytest.approx(sums.std(ddof=1) / np.sqrt(len(sums)), rel=1e-3)


def test_the_error_of_a_sum_where_q_is_averaged_apart_is_the_infinitesimal_jackknife():
    ready = serves(made())
    places, votes = np.array([1, 2, 40, 41]), ready.attributor.votes(TESTS)
    kernels, residuals = votes.values[:, 2][:, places].astype(float), votes.residuals[:, places].astype(float)

    def total(weights: np.ndarray) -> float:
        share = weights / weights.sum()
        return float(((share @ kernels) * (share @ residuals)).sum())

    each, step = len(kernels), 1e-5
    # what a member's weight does to the sum, times the number of members, is its deviation to first order
    apart = [each * (total(np.ones(each) + step * np.eye(each)[m]) - total(np.ones(each))) / step for m in range(each)]
    want = np.sqrt(np.square(apart).sum() / (each * (each - 1)))
    value, error, bound = Explorer(ready).said(TESTS[2]).total(places)
    assert value == pytest.approx(total(np.ones(each)), rel=1e-4)
    assert error == pytest.approx(want, rel=1e-3)
    assert not bound


def test_masks_for_q_alone_on_one_model_give_a_bound():
    ensemble = byline.Dropout(byline.Independent([DROPPED]), masks=4, forward_only=True)
    ready = serves(byline.TRAK(byline.Task(DROPPED), ensemble, features=byline.Factorized(16), progress=False))
    said = Explorer(ready).said(TESTS[0])
    value, error, bound = said.total(np.array([3, 8]))
    assert bound
    assert error == pytest.approx(said.stderr[3] + said.stderr[8])
    assert value == pytest.approx(said.values[3] + said.values[8])


@pytest.mark.parametrize(("way", "unit"), [("trak", 1), ("influence", 1 / N), ("graddot", None)])
def test_what_removing_some_would_change(way, unit):
    ready = serves(WAYS[way]())
    want = ready.attributor.attribute(TESTS).values[4]
    with TestClient(create_app(ready), base_url=URL) as client:
        assert client.get("/v1/explore").json()["unit"] == unit
        # one that is named twice is removed once
        ask = {"question": {"test": 4}, "removed": [7, 2, 7, 11]}
        found = client.post("/v1/explore/change", json=ask).json()
        none = client.post("/v1/explore/change", json={**ask, "removed": []}).json()
    assert found["removed"] == 3
    assert found["change"] == pytest.approx(-want[[2, 7, 11]].sum() * (unit or 1), rel=1e-4)
    assert found["stderr"] > 0
    assert (none["change"], none["stderr"]) == (0, 0)


@pytest.mark.parametrize("method", ["TRAK", "Influence"])
def test_scores_by_the_root_of_the_residual_are_no_change_of_the_output(method):
    more = {} if method == "TRAK" else {"features": byline.Exact(), "solver": "explicit"}
    assert Explorer(serves(made(method, **more))).unit is not None
    assert Explorer(serves(made(method, residual="sqrt", **more))).unit is None


def test_another_model_or_method_is_another_service():
    from byline.serve.worker import Worker

    def identity(method: Any) -> str:
        return Worker(serves(method).attributor, Limits()).identity

    task, others = (
        byline.Task(models(1)[0], output=lambda model, batch: model(batch[0])[:, 0]),
        byline.Independent(models(3, seed=1)),
    )
    exact = {"features": byline.Exact(), "solver": "explicit"}
    made_so = [
        made(),
        made(damping=0.3),
        made(residual="sqrt"),
        made(hessian="weighted"),
        made(ensemble=others),
        made(features=byline.Factorized(8)),
        made("GradDot"),
        byline.TRAK(task, byline.Independent(models(3)), features=byline.Factorized(16), progress=False),
        made("Influence", **exact),
        made("Influence", curvature="fisher", **exact),
    ]
    found = [identity(method) for method in made_so]
    assert len(set(found)) == len(found)
    # and the same after a restart, however it is worked
    assert identity(made(batch_size=7)) == found[0]


def test_removing_from_a_linear_model_is_foretold():
    """Ridge regression, whose influence is exact: the sum of scores against fitting without them."""
    generator = torch.Generator().manual_seed(0)
    x, n = torch.randn(200, 4, generator=generator), 200
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.1 * torch.randn(200, generator=generator)

    def fitted(keep: torch.Tensor) -> nn.Linear:
        model = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.linalg.lstsq(x[keep], y[keep, None]).solution.T)
        return model.eval()

    every = torch.arange(n)
    model = fitted(every)
    task = byline.Task(model, output="regression")
    method = byline.Influence(
        task, byline.Independent([model]), features=byline.Exact(), solver="explicit", damping=1e-6, progress=False
    )
    data = TensorDataset(x, y)
    explorer = Explorer(Served(method, data).ready())
    removed = np.array([3, 50, 51])
    query = (torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor(0.0))
    foretold = -explorer.said(query).total(removed)[0] * explorer.unit
    keep = torch.tensor([i for i in range(n) if i not in removed])
    truth = float((fitted(keep)(query[0][None]) - model(query[0][None])).detach())
    assert foretold == pytest.approx(truth, rel=0.1)


def test_the_output_and_what_the_model_says(client, ready):
    found = client.post("/v1/explore/scores", json={"test": 2}).json()
    x, y = TESTS[2]
    logits = torch.stack([model(x[None])[0].detach() for model in models(3)])
    margins = [float(one[y] - torch.cat([one[:y], one[y + 1 :]]).logsumexp(0)) for one in logits]
    assert found["output"] == pytest.approx(np.mean(margins), rel=1e-4)
    assert found["predicted"] == ready.classes[int(logits.softmax(1).mean(0).argmax())]
    assert (found["label"], found["label_name"]) == (int(y), ready.classes[int(y)])


def test_another_label_is_explained(client, ready):
    x, y = TESTS[2]
    other = (int(y) + 1) % 3
    found = client.post("/v1/explore/scores", json={"test": 2, "label": other}).json()
    want = ready.attributor.attribute(TensorDataset(x[None], torch.tensor([other])))
    np.testing.assert_allclose(numbers(found["scores"]), want.values[0], rtol=1e-3, atol=1e-6)
    assert found["label_name"] == ready.classes[other]
    assert "out of range" in client.post("/v1/explore/scores", json={"test": 2, "label": 3}).json()["error"]


def test_what_is_brought_is_explained_as_what_the_model_says(client, ready):
    row = TESTS[0][0]
    text = "a,b,c,d,e\n" + ",".join(map(str, row.tolist()))
    found = client.post("/v1/explore/scores", json={"upload": file(text.encode())}).json()
    assert found["label_name"] == found["predicted"]
    want = ready.attributor.attribute(TensorDataset(row[None], torch.tensor([found["label"]])))
    np.testing.assert_allclose(numbers(found["scores"]), want.values[0], rtol=1e-3, atol=1e-6)
    same = client.post("/v1/explore/scores", json={"example": [row.tolist(), found["label"]]}).json()
    assert same["scores"] == found["scores"]


@pytest.mark.parametrize(("kind", "label"), [(torch.uint8, 300), (torch.int16, 70_000), (torch.int64, 3)])
def test_a_label_that_there_is_not_is_refused(kind, label):
    def narrow(n: int, seed: int) -> list[Any]:
        x, y = examples(n, seed).tensors
        return list(zip(x, y.to(kind), strict=True))

    def collate(items: list[Any]) -> Any:
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]).long()

    ready = Served(made(collate=collate), narrow(N, 0), test_set=narrow(3, 1)).ready()
    with TestClient(create_app(ready), base_url=URL) as client:
        answer = client.post("/v1/explore/scores", json={"test": 0, "label": label})
        assert (answer.status_code, "out of range" in answer.json()["error"]) == (422, True)
        assert client.post("/v1/explore/scores", json={"test": 0, "label": 2}).status_code == 200


@pytest.mark.parametrize("old", [torch.tensor(0, dtype=torch.uint8), np.uint8(0)])
def test_a_label_that_does_not_fit_its_type_is_refused(old):
    from byline.serve.page import _relabelled
    from byline.serve.worker import Refused

    assert int(_relabelled((0, old), 255)[1]) == 255
    with pytest.raises(Refused, match="256 is out of range"):
        _relabelled((0, old), 256)


X = [0.1, 0.2, 0.3, 0.4, 0.5]
BAD = [
    ("scores", {}, 422, "expected one of test, upload and example"),
    ("scores", {"test": 0, "example": [X, 1]}, 422, "expected one of test, upload and example"),
    ("scores", {"test": 7}, 404, "there are 7 examples"),
    ("scores", {"test": -1}, 422, "test"),
    ("scores", {"test": True}, 422, "test"),
    ("scores", {"test": 2**70}, 404, ""),
    ("scores", {"test": 0, "label": -1}, 422, "label"),
    ("scores", {"test": 0, "label": 99}, 422, "out of range"),
    ("scores", {"test": 0, "other": 1}, 422, "other"),
    ("scores", {"example": None}, 422, "null"),
    ("scores", {"example": [X[:4], 1]}, 422, "shape [4]; expected [5]"),
    ("scores", {"example": [X, 7]}, 422, "label 7 is out of range"),
    ("scores", {"example": [[3e38] * 5, 1]}, 422, "the example"),
    ("scores", {"upload": {"base64": "é"}}, 422, "no base64"),
    ("scores", {"upload": {"base64": "!"}}, 422, "no base64"),
    ("scores", {"upload": {}}, 422, "base64"),
    ("scores", {"upload": file(b"\x89PNG\r\n\x1a\n\xff\xfe")}, 422, "no CSV"),
    ("scores", {"upload": file(b"")}, 422, "0 lines"),
    ("scores", {"upload": file(b"1,2,3,4")}, 422, "4 values; expected 5"),
    ("scores", {"upload": file(b"1,2,3,4,<b>")}, 422, "something else than numbers"),
    ("scores", {"upload": file(b"1,2,3,4,nan")}, 422, "no finite"),
    ("scores", {"upload": file(b"1,2,3,4,5\n" * 3)}, 422, "3 lines"),
    ("change", {"question": {"test": 0}, "removed": [N]}, 404, "there are 60 training examples"),
    ("change", {"question": {"test": 0}, "removed": [-1]}, 422, "removed"),
    ("change", {"question": {"test": 0}, "removed": ["1"]}, 422, "removed"),
    ("change", {"question": {"test": 0}, "removed": [0] * (N + 1)}, 422, "removed has 61 places"),
    ("change", {"question": {}, "removed": []}, 422, "expected one of"),
    ("examples", {"of": "train", "places": [N]}, 404, "there are 60"),
    ("examples", {"of": "else", "places": [0]}, 422, "of"),
    ("examples", {"of": "train", "places": list(range(60)) * 4}, 422, "at most 200"),
    ("names", {"places": [N]}, 404, "there are 60"),
]


@pytest.mark.parametrize(("route", "body", "status", "says"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_is_malformed_is_refused_in_a_sentence(client, route, body, status, says):
    answer = client.post(f"/v1/explore/{route}", json=body)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]
    assert client.post("/v1/explore/scores", json={"test": 0}).status_code == 200


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float32])
def test_a_row_has_the_numbers_that_its_vector_has(kind):
    read = Template([(torch.tensor([1, 2, 3], dtype=kind), torch.tensor(1))]).row()
    row, label = read(b"a,b,c\n4, 5,6")
    assert (row.dtype, row.tolist(), int(label)) == (kind, [4, 5, 6], 0)
    if kind != torch.float32:
        with pytest.raises(ValueError, match="something else than whole numbers"):
            read(b"1,2,3.5")


@pytest.mark.parametrize("rest", ["a text", True, torch.tensor(True), torch.zeros(2), {"a": 0}])
def test_no_row_is_offered_where_the_rest_takes_no_number(rest):
    assert Template([(torch.zeros(3), rest)]).row() is None
    assert Template([(torch.zeros(3), 0.5)]).row() is not None
    assert Template([(torch.zeros(3, dtype=torch.bool), 0)]).row() is None


def test_pictures_are_read_two_at_a_time():
    from byline.serve.page import Upload, _uploaded

    running, most = [], []

    def read(data: bytes) -> None:
        running.append(data)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: _uploaded(Upload(base64=""), read), range(6)))
    assert max(most) <= 2


def test_what_is_too_large_is_refused(client):
    answer = client.post("/v1/explore/scores", json={"upload": file(b"1" * 60_000)})
    assert (answer.status_code, "larger than" in answer.json()["error"]) == (413, True)


@pytest.mark.parametrize("index", ["60", "-1", "x", "9" * 30])
def test_no_such_training_example(client, index):
    assert client.get(f"/v1/explore/influence/{index}").status_code in (404, 422)


# the page and who may have it


def test_the_page_and_its_assets(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    for name in ("explorer.js", "explorer.css", "report.css", "icon.svg"):
        assert f'"/assets/{name}"' in page.text
        found = client.get(f"/assets/{name}")
        assert (found.status_code, found.headers["x-content-type-options"]) == (200, "nosniff")
    for name in ("explorer.py", "nothing.js", "..%2fpage.py", "%2e%2e/page.py", "base.html.j2"):
        assert client.get(f"/assets/{name}").status_code == 404
    # longer than a file's name may be
    assert client.get(f"/assets/{'a' * 300}.css").status_code == 404
    # nothing from elsewhere, nothing inside that a strict policy would refuse
    text = page.text + client.get("/assets/explorer.js").text + client.get("/assets/explorer.css").text
    assert "https://" not in text
    assert "innerHTML" not in text
    assert " style=" not in page.text
    assert " on" + "click" not in page.text
    assert page.text.count("<script") == 1


def test_the_page_can_be_left_out(ready):
    with TestClient(create_app(ready, page=False), base_url=URL) as client:
        for path in ("/", "/assets/explorer.js", "/v1/explore"):
            assert client.get(path).status_code == 404
        assert client.get("/v1/info").status_code == 200


def test_the_page_asks_for_the_token_and_tells_nothing_before(ready):
    with TestClient(create_app(ready, token="correct-horse"), base_url="http://anything.example") as client:
        assert client.get("/").status_code == 200
        assert client.get("/assets/explorer.js").status_code == 200
        for path in ("/v1/explore", "/v1/explore/columns", "/v1/explore/influence/0", "/assetsx"):
            assert client.get(path).status_code == 401
        assert client.get("/v1/explore", headers={"Authorization": "Bearer correct-horse"}).status_code == 200


def test_other_hosts_get_no_page(client):
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 421
    assert client.get("/assets/explorer.js", headers={"Host": "evil.example"}).status_code == 421


def test_hostile_texts_travel_as_text(client):
    columns = client.get("/v1/explore/columns").json()["train"]
    assert columns["owners"]["values"] == ["", HOSTILE]
    assert numbers(columns["owners"]["codes"]).tolist() == [i % 2 for i in range(N)]
    assert HOSTILE in columns["labels"]["values"]
    one = client.post("/v1/explore/examples", json={"of": "train", "places": [1], "whole": True})
    assert one.headers["content-type"] == "application/json"
    assert one.json()["examples"][0]["owner"] == HOSTILE
    assert client.get("/v1/explore").json()["title"] == HOSTILE


# what examples look like


class Own(Dataset):
    """A dataset as torchvision's are."""

    def __init__(self) -> None:
        self.targets = [0, 2, 1, 1]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.full((3, 6, 6), float(index)), self.targets[index]


def test_labels_and_pictures_are_found_in_the_items():
    gallery = Gallery(Own(), classes=["a", "b"])
    assert gallery.labels == ["a", "2", "b", "b"]
    assert gallery.one(1)["picture"].startswith("data:image/png;base64,")
    assert Gallery(Subset(Own(), [2, 0])).labels == ["1", "0"]
    data = TensorDataset(torch.zeros(4, 9), torch.tensor([[3], [1], [1], [0]]))
    assert Gallery(Subset(Subset(data, [0, 2, 3]), [2, 0])).labels == ["0", "3"]
    assert Gallery(TensorDataset(torch.zeros(4, 9))).labels is None
    assert Gallery(TensorDataset(torch.zeros(4, 9), torch.zeros(4))).labels is None
    assert Gallery([("a text", 1)]).one(0)["text"] == "a text"


@pytest.mark.parametrize(
    ("item", "key"),
    [
        ((torch.zeros(28, 28), 1), "picture"),
        (torch.zeros(1, 8, 8), "picture"),
        ({"image": np.zeros((9, 9, 3))}, "picture"),
        (("text", 0), "text"),
        ((torch.zeros(5), 0), "cells"),
        ((torch.zeros(2, 3, 4, 5), 0), None),
        ((torch.zeros(2, 2), 0), None),
        (3, None),
        ((), None),
    ],
)
def test_what_can_be_shown_of_an_item(item, key):
    found = seen(item)
    assert [name for name in ("picture", "text", "cells") if found[name] is not None and len(found[name])] == (
        [key] if key else []
    )


def test_a_picture_that_cannot_be_drawn_is_left_out():
    bad = Shown(pictures=np.array([[[np.nan] * 5] * 5]))
    assert Gallery([0], bad).one(0)["picture"] is None


def test_rows_and_long_texts_are_cut_in_lists():
    frame = pd.DataFrame({f"c{i}": [HOSTILE] for i in range(100)})
    gallery = Gallery([0], Shown(rows=frame))
    assert len(gallery.one(0)["cells"]) == 4
    assert gallery.one(0, whole=True)["cells"][1] == ["c1", HOSTILE]
    assert len(Gallery([0], Shown(texts=["x" * 10**6])).one(0, whole=True)["text"]) == 20_001


def test_served_refuses_what_cannot_be_shown():
    method = attributor()
    for options, error, says in (
        ({"train": 3}, TypeError, "train is a int; expected a byline.report.Shown"),
        ({"test": Shown()}, ValueError, "no test_set"),
        ({"takes": "sound"}, ValueError, "takes is 'sound'"),
        ({"upload": 3}, TypeError, "upload is a int"),
        ({"test_set": iter([])}, TypeError, "test_set is a"),
    ):
        with pytest.raises(error, match=says):
            Served(method, examples(N, 0), **options)
    with pytest.raises(ValueError, match=r"train\.owners has 2 entries; the scores have 60"):
        Served(method, examples(N, 0), train=Shown(owners=["a", "b"])).ready()
    with pytest.raises(ValueError, match=r"test\.names has 2 entries; the scores have 7"):
        Served(method, examples(N, 0), test_set=TESTS, test=Shown(names=["a", "b"])).ready()


# what `byline serve RUN` opens


def test_a_run_of_a_setting_is_served(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"setting": {"name": "digits-mlp"}, "command": "byline demo"}))
    ready = runs.of_run(tmp_path).ready(tmp_path / runs.STORE)
    with TestClient(create_app(ready), base_url=URL) as client:
        about = client.get("/v1/explore").json()
        assert (about["n_train"], about["n_test"], about["takes"], about["classes"][3]) == (1000, 200, "image", "3")
        one = client.post("/v1/explore/examples", json={"of": "test", "places": [0]}).json()["examples"][0]
        assert one["picture"].startswith("data:image/png")
        assert one["predicted"] in about["classes"]
        found = client.post("/v1/explore/scores", json={"upload": file(drawn(ready.test_set[0][0].numpy()))}).json()
        again = client.post("/v1/explore/scores", json={"test": 0, "label": found["label"]}).json()
    # the picture that was drawn of an example is that example, to the rounding of its pixels
    assert np.corrcoef(numbers(found["scores"]), numbers(again["scores"]))[0, 1] > 0.999
    # the run that was made is found again
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == 1
    runs.of_run(tmp_path).ready(tmp_path / runs.STORE)
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == 1


def drawn(values: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.round(values.reshape(8, 8) * 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def quiet(monkeypatch):
    """The command's log would go on to a stream that ends with the test."""
    monkeypatch.setattr("byline.serve.logs.configure", lambda: None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "holds neither results.json nor grid.json"),
        ("[", "is no result of a setting"),
        ("{}", "is no result of a setting"),
        ('{"setting": {"name": "nothing"}}', "is of the setting 'nothing'; there are digits-mlp"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path, quiet, content, says):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    done = CliRunner().invoke(cli, ["serve", str(tmp_path), "--port", "0"])
    assert done.exit_code == 1
    assert says in done.output.replace("\n", " ")


def test_options_that_do_not_go_together(tmp_path, quiet):
    for options, says in (
        (["--task", "a:b", "--data", "x"], "expected one of them"),
        (["--label", "x"], "--label is for the CSV file"),
        (["--data", str(tmp_path / "no.csv")], "name the column of labels"),
        (["--data", str(tmp_path), "--label", "x"], "--label is for CSV files"),
    ):
        done = CliRunner().invoke(cli, ["serve", str(tmp_path / "run"), "--port", "0", *options])
        assert done.exit_code == 1
        assert says in done.output.replace("\n", " ")


def test_the_help_has_examples():
    text = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for part in ("byline serve runs/demo", "--data photos/", "--task my_project:served", "--no-page"):
        assert part in text


def test_a_table_is_served_and_rows_are_brought(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.random(120) < 0.5
    frame = pd.DataFrame(
        {
            "size": np.where(truth, 2.0, -2.0) + rng.normal(size=120),
            "colour": np.where(truth, "red", HOSTILE.replace("\ud800", "")),
            "id": [f"u{i}" for i in range(120)],
            "kind": np.where(truth, "one", "two"),
        }
    )
    frame.to_csv(tmp_path / "own.csv", index=False)
    ready = runs.of_files(tmp_path / "own.csv", "kind", tmp_path / "run").ready(tmp_path / "run" / runs.STORE)
    kept = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    runs.of_files(tmp_path / "own.csv", "kind", tmp_path / "run").ready(tmp_path / "run" / runs.STORE)
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == kept
    with TestClient(create_app(ready), base_url=URL) as client:
        one = client.post("/v1/explore/examples", json={"of": "train", "places": [0]}).json()["examples"][0]
        assert [name for name, _ in one["cells"]] == ["size", "colour", "id"]
        # a row of the table, brought as a file, is that row
        place = int(one["name"].removeprefix("row "))
        text = frame.drop(columns="kind").iloc[[place]].to_csv(index=False)
        found = client.post("/v1/explore/scores", json={"upload": file(text.encode())}).json()
        item = ready.attributor._train_set[0]
        want = client.post("/v1/explore/scores", json={"example": [item[0].tolist(), found["label"]]}).json()
        np.testing.assert_allclose(numbers(found["scores"]), numbers(want["scores"]), rtol=1e-3, atol=1e-6)
        for text, says in (
            ("size,colour\n1,green", "column 'colour' has 'green', which no row of the table has"),
            ("size,colour\nbig,red", "column 'size' has 'big'; expected a number"),
            ("size\n1", "no column 'colour'"),
            ("size,colour\n1,red\n2,red", "2 rows"),
            ("size,colour", "0 rows"),
            ("", "no CSV"),
        ):
            answer = client.post("/v1/explore/scores", json={"upload": file(text.encode())})
            assert answer.status_code == 422
            assert says in answer.json()["error"], answer.text
        assert client.post("/v1/explore/scores", json={"upload": file(b"size,colour\n,red")}).status_code == 200


def test_pictures_are_served_and_brought(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "photos" / ("dark" if i % 2 else "bright & <b>wide")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 90, (20, 30), dtype=np.uint8) + np.uint8(0 if i % 2 else 150)).save(
            folder / f"{i}<img src=x onerror=alert(1)>.png".replace("/", "")
        )
    ready = runs.of_files(tmp_path / "photos", None, tmp_path / "run").ready(tmp_path / "run" / runs.STORE)
    with TestClient(create_app(ready), base_url=URL) as client:
        about = client.get("/v1/explore").json()
        assert (about["n_train"], about["n_test"], about["takes"]) == (32, 8, "image")
        data = next((tmp_path / "photos" / "dark").iterdir()).read_bytes()
        found = client.post("/v1/explore/scores", json={"upload": file(data)}).json()
        assert found["label_name"] == found["predicted"] == "dark"
        for wrong, says in (
            (b"hello", "no picture"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
            (data[: len(data) // 2], "damaged"),
            (b"", "no picture"),
        ):
            answer = client.post("/v1/explore/scores", json={"upload": file(wrong)})
            assert answer.status_code == 422
            assert says in answer.json()["error"], answer.text


def test_a_picture_of_too_many_pixels_is_refused(monkeypatch):
    from byline.uses import own

    monkeypatch.setattr(own, "_PIXELS", 50)
    with pytest.raises(ValueError, match="8 × 8 pixels; expected at most 50"):
        own.picture(drawn(np.zeros(64)), 4, 4)
