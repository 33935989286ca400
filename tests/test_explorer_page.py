"""The explorer in a real Chromium: by keyboard, on a phone, with 200 000 rows, without its server, with hostile texts.

``BYLINE_SHOTS=folder`` keeps screenshots of what was done.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
from browser import Browser, Page
from byline.report import Shown
from byline.serve import Limits, Served
from serving import in_thread, needs_extra

needs_extra()

HOSTILE = "</script><script>window.owned=1</script><img src=x onerror=window.owned=1>\"'&\u202e\x1b[2J{{7*7}}"
N, TESTS, SIDE = 300, 12, 8
PHONE = (390, 844)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


def shot(page: Page, name: str) -> None:
    folder = os.environ.get("BYLINE_SHOTS")
    if folder:
        time.sleep(0.3)
        page.shot(Path(folder) / f"{name}.png")


def pictures(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    values = torch.rand(n, SIDE, SIDE, generator=generator) * 0.4
    for label in range(3):
        values[labels == label, label * 2 : label * 2 + 2] += 0.6
    return TensorDataset(values, labels)


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    data = pictures(N, 0)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    return made.eval()


def read(data: bytes) -> Any:
    from byline.uses.own import picture

    return torch.from_numpy(picture(data, SIDE, SIDE, "L")).float() / 255, torch.tensor(0)


def of_pictures(text: str = "band {}", members: int = 4) -> Served:
    made = model()
    ensemble = byline.Dropout(byline.Independent([made]), masks=members)
    method = byline.TRAK(byline.Task(made), ensemble, features=byline.Factorized(64), progress=False)
    return Served(
        method,
        pictures(N, 0),
        test_set=pictures(TESTS, 1),
        train=Shown(
            labels=[text.format(i % 3) for i in range(N)],
            names=[f"{text.format('')}{i}.png" for i in range(N)],
            owners=[f"{text.format('')} owner {i % 7}" for i in range(N)],
        ),
        test=Shown(labels=[text.format(i % 3) for i in range(TESTS)], predicted=[text.format(0)] * TESTS),
        metadata=[{text.format("note"): text.format(i)} for i in range(N)],
        classes=[text.format(i) for i in range(3)],
        upload=read,
        takes="image",
        title=text.format("all"),
    ).ready()


@pytest.fixture(scope="module")
def url():
    with in_thread(of_pictures(), Limits(body=60_000)) as (client, _):
        yield client.url


def opened(browser: Browser, url: str, **options: Any) -> Page:
    page = browser.open(url, **options)
    page.until(
        "document.querySelectorAll('#up .row img').length > 0 && document.querySelectorAll('#tests .row img').length"
    )
    return page


def focused(page: Page) -> str:
    return str(page.run("document.activeElement.id"))


def tab(page: Page, to: str, most: int = 40) -> None:
    """Press the tabulator until an element has the focus."""
    for _ in range(most):
        page.key("Tab")
        if focused(page) == to:
            return
    raise AssertionError(f"{to} is not reached by the tabulator")


def test_by_keyboard_alone(browser, url):
    page = opened(browser, url)
    assert page.text("#h-question") == "Test example 0"
    page.key("Tab")
    assert page.run("document.activeElement.textContent") == "Skip to the answer"
    # pick another example
    tab(page, "tests")
    page.key("ArrowDown", "ArrowDown", "Enter")
    page.until("document.querySelector('#h-question').innerText === 'Test example 2'")
    page.until("document.querySelector('#question').ariaBusy === 'false'")
    assert "test example 2" in page.text("#told").lower()
    assert page.run("document.querySelector('#tests [aria-selected=true]').id") == "tests-2"
    # select the second proponent, and see what would change
    tab(page, "up")
    page.key("ArrowDown")
    active = page.run(
        "document.getElementById(document.querySelector('#up').getAttribute('aria-activedescendant')).ariaLabel"
    )
    assert "training example" in active
    assert "owner" in active
    assert "±" in active
    page.key(" ")
    page.until("document.querySelector('#chosen-change strong')")
    assert page.text("#chosen-count") == "1 selected"
    assert "→" in page.text("#chosen-change") or "would change" in page.text("#chosen-change")
    shot(page, "keyboard-selected")
    # follow it to what it influences, and from there to a test example
    page.key("Enter")
    page.until("document.querySelectorAll('#moved button').length > 3")
    assert page.run("document.querySelector('#one').open")
    shot(page, "keyboard-followed")
    page.key("Escape")
    page.until("!document.querySelector('#one').open")
    assert focused(page) == "up"
    page.key("Enter")
    page.until("document.querySelectorAll('#moved button').length > 3")
    assert focused(page) == "one-close"
    page.key("Tab", "Tab")
    name = page.run("document.activeElement.ariaLabel")
    assert name.startswith("test example")
    page.key("Enter")
    wanted = name.split(",")[0].capitalize()
    page.until(f"document.querySelector('#h-question').innerText === {json.dumps(wanted)}")
    # the selection stays; it is told anew what would change
    page.until("document.querySelector('#chosen-change strong')")
    # End and Home go through the whole list, of which only a few rows are there
    tab(page, "up")
    page.key("End")
    count = int(page.run("document.querySelector('#up .row').getAttribute('aria-setsize')"))
    assert page.run("document.querySelector('#up').getAttribute('aria-activedescendant')") == f"up-{count - 1}"
    assert page.run("document.querySelectorAll('#up .row').length") < 40
    page.key("Home", "PageDown")
    place = int(page.run("document.querySelector('#up').getAttribute('aria-activedescendant')").split("-")[1])
    assert 3 <= place < 20
    assert page.problems() == []


def test_every_control_has_a_name_and_a_size_to_hit(browser, url):
    page = opened(browser, url)
    page.run("document.querySelector('#own').open = true")
    nameless = page.run(
        """[...document.querySelectorAll('button, input, select, textarea, [role=listbox], img')].filter((e) =>
        e.offsetParent && !(e.ariaLabel || e.getAttribute('aria-labelledby') || e.labels?.length ||
        e.alt !== undefined || e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    small = page.run(
        """[...document.querySelectorAll('button, select, .row, summary')].filter((e) => e.offsetParent &&
        e.getBoundingClientRect().height < 24).map((e) => e.outerHTML)"""
    )
    assert small == []
    assert page.run("document.documentElement.lang") == "en"
    assert page.run("document.querySelectorAll('h1').length") == 1
    assert page.run("document.querySelectorAll('[role=listbox] > [role=presentation] > [role=option]').length") > 3


def contrast(page: Page) -> list[str]:
    """Texts whose contrast with their background is less than 4.5 to 1."""
    found: list[str] = page.run(
        """(() => {
        const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
          .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
          return .2126 * r + .7152 * g + .0722 * b; };
        const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
          if (c.startsWith('rgb(')) return c; } return 'rgb(255, 255, 255)'; };
        return [...document.querySelectorAll('h1, h2, h3, p, small, label span, dt, dd, button, strong')].filter((e) =>
          e.offsetParent && e.innerText.trim() && !e.closest('.unsure')).filter((e) => {
          const a = light(getComputedStyle(e).color), b = light(ground(e));
          return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5; })
          .map((e) => e.outerHTML.slice(0, 200)); })()"""
    )
    return found


@pytest.mark.parametrize("dark", [False, True])
def test_texts_can_be_read_in_either_light(browser, url, dark):
    page = opened(browser, url, dark=dark)
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(22, 23, 26)" if dark else "rgb(255, 255, 255)")
    assert contrast(page) == []
    shot(page, f"desk-{'dark' if dark else 'light'}")


def test_on_a_phone(browser, url):
    page = opened(browser, url, width=PHONE[0], height=PHONE[1])
    shot(page, "phone")

    def wide() -> int:
        return int(page.run("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"))

    assert wide() == PHONE[0]
    page.run("document.querySelector('#up .box').click()")
    page.until("document.querySelector('#chosen-change strong')")
    assert wide() == PHONE[0]
    page.run("document.querySelector('#own').open = true; document.querySelector('#answer').scrollIntoView()")
    assert wide() == PHONE[0]
    shot(page, "phone-answer")
    # all of a row is inside it
    outside = page.run(
        """[...document.querySelectorAll('#up .row > *')].filter((e) => e.offsetParent &&
        (e.getBoundingClientRect().right > document.querySelector('#up').getBoundingClientRect().right + 1))
        .map((e) => e.outerHTML)"""
    )
    assert outside == []
    assert page.run("document.querySelector('#up .row .what').getBoundingClientRect().width") > 90
    assert page.run("document.querySelector('#up .row .error').getBoundingClientRect().width") > 150
    page.run("document.querySelector('#up .what').click()")
    page.until("document.querySelectorAll('#moved button').length > 3")
    assert page.run("document.querySelector('#one').scrollWidth <= document.querySelector('#one').clientWidth")
    assert page.run("document.querySelector('#one').getBoundingClientRect().width") <= PHONE[0]
    shot(page, "phone-followed")
    page.click("#one-close")
    page.until("!document.querySelector('#one').open")
    assert page.problems() == []


def change_to(page: Page, field: str, value: str) -> None:
    page.run(
        f"(() => {{ const e = document.querySelector('{field}'); "
        f"if (e.type === 'checkbox') e.checked = {json.dumps(value)} !== ''; else e.value = {json.dumps(value)}; "
        "e.dispatchEvent(new Event('change')); e.dispatchEvent(new Event('input')); })()"
    )


def labels_of(page: Page, side: str) -> list[str]:
    return list(page.run(f"[...document.querySelectorAll('#{side} .row')].map((row) => row.ariaLabel)"))


def test_filters(browser, url):
    page = opened(browser, url)
    every = page.text("#count-up"), page.text("#count-down")
    change_to(page, "#label", "1")
    found = labels_of(page, "up") + labels_of(page, "down")
    assert found
    assert all("label band 1" in one for one in found)
    assert " of " in page.text("#count-up")
    change_to(page, "#owner", "2")
    found = labels_of(page, "up") + labels_of(page, "down")
    assert found
    assert all("label band 1" in one and "owner 2" in one for one in found)
    change_to(page, "#sign", "up")
    assert page.run("document.querySelector('#side-down').hidden && !document.querySelector('#side-up').hidden")
    change_to(page, "#sure", "on")
    assert not any("not told from zero" in one for one in labels_of(page, "up"))
    page.click("#reset")
    assert (page.text("#count-up"), page.text("#count-down")) == every
    # what is not told from zero is said so, in words and in the picture
    page.run("document.querySelector('#up').scrollTop = 1e9")
    page.until("document.querySelector('#up .unsure')")
    row = page.run("document.querySelector('#up .unsure').innerText")
    assert "perhaps 0" in row
    assert page.run("document.querySelector('#up .unsure .hole') !== null")
    change_to(page, "#test-label", "2")
    assert all("label band 2" in one for one in labels_of(page, "tests"))
    change_to(page, "#test-label", "")
    change_to(page, "#wrong", "on")
    assert all("label band 0" not in one for one in labels_of(page, "tests"))
    assert page.problems() == []


def test_select_all_listed_and_what_would_change(browser, url):
    page = opened(browser, url)
    change_to(page, "#owner", "3")
    page.click("#select-all")
    page.until("document.querySelector('#chosen-change strong')")
    count = sum(i % 7 == 3 for i in range(N))
    assert page.text("#chosen-count") == f"{count} selected"
    # the same as the service says of the same
    said = page.run(
        """fetch('/v1/explore/change', {method: 'POST', headers: {'Content-Type': 'application/json'}, body:
        JSON.stringify({question: {test: 0}, removed: [...Array(300).keys()].filter((i) => i % 7 === 3)})})
        .then((answer) => answer.json())"""
    )
    told = float(page.text("#chosen-change strong").replace("\u2212", "-"))
    assert told == pytest.approx(said["change"], rel=0.006)
    page.click("#clear")
    assert page.text("#chosen-count") == "Nothing selected"


def exported(page: Page, button: str) -> str:
    page.run(
        "URL.createObjectURL = (blob) => { window.saved = blob.text(); return '#'; };"
        "HTMLAnchorElement.prototype.click = function () { window.called = this.download; }; window.saved = null"
    )
    page.click(button)
    page.until("window.saved !== null")
    return str(page.run("window.saved"))


def test_what_was_selected_is_taken_home(browser, url):
    page = opened(browser, url)
    page.run("document.querySelectorAll('#up .box')[0].click(); document.querySelectorAll('#down .box')[1].click()")
    page.until("document.querySelector('#chosen-change strong')")
    rows = list(csv.DictReader(io.StringIO(exported(page, "#csv"), newline="")))
    assert page.run("window.called") == "selected.csv"
    found = json.loads(exported(page, "#json"))
    assert list(rows[0]) == ["index", "name", "label", "owner", "score", "stderr", "told_from_zero"]
    assert [int(row["index"]) for row in rows] == [row["index"] for row in found["selected"]]
    assert found["selected"][0]["score"] > 0 > found["selected"][1]["score"]
    for row in found["selected"]:
        assert row["name"] == f"band {row['index']}.png"
        assert row["owner"] == f"band  owner {row['index'] % 7}"
    assert found["predicted_change"] == pytest.approx(-sum(row["score"] for row in found["selected"]), rel=1e-4)
    assert found["question"] == {"test": 0}


def png(side: int, noise: bool = False) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 255, (side, side)) if noise else np.zeros((side, side))
    Image.fromarray(values.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_an_example_of_ones_own(browser, url, tmp_path):
    page = opened(browser, url)
    page.run("document.querySelector('#own').open = true")

    def bring(name: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        page.files("#upload-file", tmp_path / name)
        page.click("#upload button[type=submit]")

    page.click("#upload button[type=submit]")
    page.until("document.querySelector('#upload-refusal').innerText.includes('Choose a file')")
    bring("notes.txt", b"no picture")
    page.until("document.querySelector('#upload-refusal').innerText.includes('expected a picture')")
    bring("fake.png", b"no picture either")
    page.until("document.querySelector('#upload-refusal').innerText.includes('no picture that can be read')")
    shot(page, "refused")
    assert page.text("#h-question") == "Test example 0"
    bring("large.png", png(300, noise=True))
    page.until("document.querySelector('#upload-refusal').innerText.includes('at most')")
    bring("<img src=x onerror=window.owned=1>.png", png(9))
    page.until("document.querySelector('#h-question').innerText === '<img src=x onerror=window.owned=1>.png'")
    assert page.text("#upload-refusal") == ""
    assert "the model says band" in page.text("#question-words")
    assert page.run("document.querySelector('#question-look img').naturalWidth") == SIDE
    assert focused(page) == "answer"
    shot(page, "brought")
    # why not another label?
    before = page.run("document.querySelector('#up .row').ariaLabel")
    other = page.run("[...document.querySelectorAll('#explained option')].find((one) => !one.selected).value")
    change_to(page, "#explained", other)
    page.until(f"document.querySelector('#up .row')?.ariaLabel !== {json.dumps(before)}")
    # as JSON
    page.run("document.querySelector('#upload-file').value = ''")
    for text, says in (("[1,", "no JSON"), ("[[1, 2], 0]", "expected [8, 8]"), ("[1]", "expected an array of 2 parts")):
        page.run(f"document.querySelector('#upload-json').value = {json.dumps(text)}")
        page.click("#upload button[type=submit]")
        page.until(f"document.querySelector('#upload-refusal').innerText.includes({json.dumps(says)})")
    page.run("document.querySelector('#upload-json').value = JSON.stringify([Array(8).fill(Array(8).fill(.5)), 1])")
    page.click("#upload button[type=submit]")
    page.until("document.querySelector('#h-question').innerText === 'Your example'")
    assert page.run("window.owned") is None
    assert [one for one in page.problems() if "422" not in one] == []


def test_hostile_texts_are_texts(browser):
    with in_thread(of_pictures(HOSTILE.replace("{{7*7}}", "{{{{7*7}}}}") + "{}")) as (client, _):
        page = opened(browser, client.url)
        page.run("document.querySelector('#up .what').click()")
        page.until("document.querySelectorAll('#moved button').length > 3")
        shown = page.run("document.body.textContent")
        for part in (HOSTILE + "all", HOSTILE + "0"):
            assert part in shown
        assert page.run("document.title").startswith("</script>")
        page.click("#one-select")
        page.click("#one-close")
        text = exported(page, "#csv")
        assert next(csv.DictReader(io.StringIO(text, newline="")))["label"].startswith(HOSTILE)
        assert page.run("window.owned") is None
        assert page.run("document.querySelectorAll('script').length") == 1
        assert page.run("document.querySelectorAll('[onerror]').length") == 0
        shot(page, "hostile")
        page.size(*PHONE)
        page.until("document.querySelectorAll('#up .row').length > 0")
        assert page.run("document.documentElement.scrollWidth") == PHONE[0]
        assert page.problems() == []


def test_formulas_are_no_formulas_in_a_spreadsheet(browser):
    with in_thread(of_pictures("=HYPERLINK(1)&{}")) as (client, _):
        page = opened(browser, client.url)
        page.run("document.querySelector('#up .box').click()")
        row = next(csv.DictReader(io.StringIO(exported(page, "#csv"), newline="")))
        assert row["label"].startswith("'=HYPERLINK")
        assert float(row["score"]) > 0


def test_when_the_server_goes_away(browser):
    ready = of_pictures()
    with in_thread(ready) as (client, _):
        page = opened(browser, client.url)
        port = int(client.url.rsplit(":", 1)[1])
        client.close()
    # nobody has to touch the page for it to notice
    page.until("!document.querySelector('#away').hidden")
    assert "does not answer" in page.text("#away")
    assert page.run("document.querySelector('#away').role") == "alert"
    # what was there is there, and what is asked meanwhile is answered later
    assert page.text("#h-question") == "Test example 0"
    page.run("document.querySelectorAll('#tests .row')[3].click()")
    page.run("document.querySelector('#up .box').click()")
    shot(page, "away")
    with in_thread(ready, port=port):
        page.until("document.querySelector('#away').hidden")
        page.until("document.querySelector('#h-question').innerText === 'Test example 3'")
        page.until("document.querySelector('#chosen-change strong')")
        assert page.text("#refusal") == ""
        assert "ready" not in page.text("#told")
        page.run("window.mine = 1")
    page.until("!document.querySelector('#away').hidden")
    # another training set behind the same address: the page begins anew
    with in_thread(other(), port=port):
        page.until(
            "document.querySelector('#away').hidden && window.mine === undefined && document.querySelector('#up .row')"
        )
        assert "40" in page.text("#facts")


def other() -> Served:
    made = model()
    method = byline.GradDot(byline.Task(made), byline.Independent([made]), progress=False)
    return Served(method, pictures(40, 5)).ready()


def test_one_member_and_no_test_set_and_no_names(browser):
    with in_thread(other()) as (client, _):
        page = opened(browser, client.url)
        assert page.text("#h-question") == "Training example 0"
        assert page.run("document.querySelector('#sure-field').hidden")
        assert "±" not in page.text("#up")
        page.run("document.querySelector('#up .box').click()")
        page.until("document.querySelector('#chosen-change strong')")
        assert "one member: no error" in page.text("#chosen-change")
        assert "know no scale" in page.text("#chosen-change")
        assert page.problems() == []


def test_the_token_is_asked_for(browser):
    with in_thread(other(), token="correct-horse") as (client, _):
        page = browser.open(client.url)
        page.until("!document.querySelector('#token').hidden")
        for given in ("wrong-horse", "correct-horse"):
            page.run(f"document.querySelector('#token-value').value = '{given}'")
            page.click("#token button")
            if given[0] == "w":
                page.until("document.querySelector('#token-note').innerText.includes('not the token')")
        page.until("document.querySelectorAll('#up .row img').length > 0")
        assert page.run("document.querySelector('#token').hidden")


def many(n: int) -> Served:
    torch.manual_seed(0)
    made = nn.Linear(5, 3).eval()
    ensemble = byline.WeightNoise(byline.Independent([made]), draws=2)
    method = byline.GradDot(byline.Task(made), ensemble, features=byline.Factorized(8), batch_size=8192, progress=False)
    data = TensorDataset(torch.randn(n, 5), torch.randint(0, 3, (n,)))
    shown = Shown(names=[f"row {i}" for i in range(n)], owners=[f"owner {i % 1000}" for i in range(n)])
    return Served(method, data, test_set=TensorDataset(*(t[:50] for t in data.tensors)), train=shown).ready()


def test_two_hundred_thousand_training_examples(browser):
    n = 200_000
    with in_thread(many(n)) as (client, _):
        page = browser.open(client.url)
        page.until("document.querySelectorAll('#up .row .snippet').length > 0")
        counts = [int("".join(c for c in page.text(f"#count-{side}") if c.isdigit())) for side in ("up", "down")]
        assert sum(counts) > 0.99 * n
        assert page.run("document.querySelectorAll('*').length") < 1500
        # far down, by the scroll bar and by key, the right rows are there at once
        page.run("document.querySelector('#up').scrollTop = document.querySelector('#up').scrollHeight / 2")
        page.until("Number(document.querySelector('#up .row').getAttribute('aria-posinset')) > 1000")
        middle = int(page.run("document.querySelector('#up .row').getAttribute('aria-posinset')"))
        assert middle == pytest.approx(counts[0] / 2, rel=0.01)
        page.run("document.querySelector('#up').focus()")
        page.key("End")
        page.until(f"document.querySelector('#up-{counts[0] - 1} .snippet')")
        inside = page.run(
            f"(() => {{ const a = document.querySelector('#up-{counts[0] - 1}').getBoundingClientRect(), "
            "b = document.querySelector('#up').getBoundingClientRect(); "
            "return a.bottom <= b.bottom + 2 && a.top >= b.top; })()"
        )
        assert inside
        seconds = page.run(
            """(() => { const begun = performance.now(), e = document.querySelector('#owner-text');
            e.value = 'owner 77'; e.dispatchEvent(new Event('input'));
            document.querySelector('#up .row').getBoundingClientRect();
            return (performance.now() - begun) / 1000; })()"""
        )
        assert seconds < 1
        assert all("owner 77" in one for one in labels_of(page, "up"))
        page.click("#select-all")
        page.until("document.querySelector('#chosen-change strong')")
        assert page.text("#chosen-count") == f"{grouped(11 * n // 1000)} selected"
        begun = time.monotonic()
        page.run("document.querySelectorAll('#tests .row')[2].click()")
        page.until("document.querySelector('#h-question').innerText === 'Test example 2' && "
                   "document.querySelector('#question').ariaBusy === 'false'")  # fmt: skip
        assert time.monotonic() - begun < 5
        rows = list(csv.DictReader(io.StringIO(exported(page, "#csv"), newline="")))
        assert len(rows) == 11 * n // 1000
        assert rows[-1]["name"] == f"row {rows[-1]['index']}"
        shot(page, "many")
        assert page.problems() == []


def grouped(count: int) -> str:
    return f"{count:,}".replace(",", "\u202f")
