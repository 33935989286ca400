"""The page of scores: everything in it, nothing hostile gets through, and small enough to send."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
from typer.testing import CliRunner

import byline
from byline.cli import app
from byline.report import Shown, scores_page
from byline.report.scores import histogram, thumbnail
from byline.uses import shares

HOSTILE = '<img src=x onerror="alert(1)">'


def made(tests: int = 6, train: int = 40, stderr: bool = True) -> byline.Scores:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(tests, train))
    errors = np.full((tests, train), 0.8) if stderr else None
    return byline.Scores(values, errors, {"method": "TRAK", "members": 5, "ensemble": HOSTILE})


def pictures(n: int, side: int = 12) -> np.ndarray:
    return np.random.default_rng(1).random((n, side, side))


def test_every_test_example_has_its_two_sides(tmp_path):
    scores = made()
    train = Shown(pictures=pictures(40), labels=[f"{HOSTILE}{i % 3}" for i in range(40)], names=["n&m"] * 40)
    test = Shown(texts=[HOSTILE + "x" * 2000] * 6, labels=np.arange(6), predicted=np.arange(6))
    owned = shares(scores, np.array(["Ann", HOSTILE])[np.arange(40) % 2])
    ledger = byline.Ledger()
    ledger.add_flops("serving", 3e9)
    page = scores_page(
        scores,
        tmp_path / "deep" / "page.html",
        train=train,
        test=test,
        k=3,
        self_influence=np.arange(40),
        shares=owned,
        ledger=ledger,
        title=HOSTILE,
    ).read_text()
    assert page.count('<article class="example"') == 6
    top = scores.top(3)
    for row in range(6):
        part = page[page.index(f'id="test-{row}"') :].split("</article>")[0]
        shown = re.findall(r'<span class="score">([+-][^<]+)<small>', part)
        want = [*top.proponents.scores[row], *top.opponents.scores[row]]
        assert shown == [f"{score:+.3g}" for score in want]
        doubtful = sum(abs(score) <= 1.6 for score in want)
        assert part.count("perhaps 0") == part.count('class="unsure"') == doubtful
    assert HOSTILE not in page
    assert "&lt;img src=x" in page
    assert "n&amp;m" in page
    assert "3 GFLOP" in page
    assert "Whose work is in it" in page
    # nothing but what is in the file
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_rows_of_a_table_are_shown_as_text(tmp_path):
    rows = [{"colour": HOSTILE, "size": i} for i in range(40)]
    page = scores_page(made(), tmp_path / "page.html", train=Shown(rows=rows), test=Shown(rows=rows[:6])).read_text()
    assert "\nsize: 5</pre>" in page
    assert HOSTILE not in page


def test_scores_alone_are_enough(tmp_path):
    page = scores_page(made(stderr=False), tmp_path / "page.html", examples=2).read_text()
    assert page.count('<article class="example"') == 2
    assert "one member: no error" in page
    assert "perhaps 0</small>" not in page
    assert "Suspicious" not in page


def test_bars_hold_every_score():
    values = np.random.default_rng(0).normal(size=(50, 60))
    bars = histogram(values)
    assert sum(float(bar["title"].split(": ")[1].split(" %")[0]) for bar in bars) == pytest.approx(100, abs=2)
    assert max(bar["height"] for bar in bars) == 100
    assert [bar["sign"] for bar in bars].count("zero") == 1


def test_large_pictures_are_made_small():
    assert thumbnail(np.ones((3, 300, 200))).shape == (60, 40, 3)
    assert thumbnail(np.ones((28, 28))).shape == (28, 28)
    np.testing.assert_allclose(thumbnail(np.arange(128 * 128.0).reshape(128, 128))[0, 0], (0 + 1 + 128 + 129) / 4)


def test_five_hundred_test_examples_are_quick_and_small(tmp_path):
    scores = made(500, 5000)
    train = Shown(pictures=pictures(5000, 28), labels=np.arange(5000) % 10)
    test = Shown(pictures=pictures(500, 28), labels=np.arange(500) % 10)
    started = time.process_time()
    page = scores_page(scores, tmp_path / "page.html", train=train, test=test, examples=500)
    # random pixels cannot be compressed: pictures of things take a third of this
    assert page.stat().st_size < 10e6
    assert time.process_time() - started < 20


def test_what_has_another_length_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train.labels has 3 entries; the scores have 40"):
        scores_page(made(), tmp_path / "page.html", train=Shown(labels=[1, 2, 3]))
    with pytest.raises(ValueError, match="self_influence has 2 entries"):
        scores_page(made(), tmp_path / "page.html", self_influence=[1, 2])


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made().save("s.safetensors")
    (tmp_path / "shown_here.py").write_text(
        "from byline.report import Shown\n"
        "def shown():\n    return {'train': Shown(labels=list(range(40))), 'title': 'tunes'}\n"
        "wrong = {'training': 1}\n"
    )
    done = CliRunner().invoke(app, ["report", "s.safetensors", "--examples", "shown_here:shown", "-k", "2"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert "tunes" in page
    assert "byline report s.safetensors --examples shown_here:shown" in page
    for arguments, said in (
        (["no.safetensors"], "no scores at no.safetensors"),
        (["s.safetensors", "--examples", "shown_here"], "expected module:object"),
        (["s.safetensors", "--examples", "shown_here:nothing"], "has no nothing"),
        (["s.safetensors", "--examples", "shown_here:wrong"], "expected a dict with"),
    ):
        done = CliRunner().invoke(app, ["report", *arguments])
        assert done.exit_code == 1
        assert said in " ".join(done.output.split())


def test_it_opens_in_a_browser_on_a_phone_without_scrolling_sideways(tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("BYLINE_CI") == "1":
            pytest.fail("chromium is not installed, and BYLINE_CI=1 leaves nothing out")
        pytest.skip("needs chromium")
    train = Shown(pictures=pictures(40, 28), names=["a_very_long_name_" * 4] * 40, labels=["Ankle boot"] * 40)
    page = scores_page(made(), tmp_path / "page.html", train=train, test=Shown(pictures=pictures(6)))
    # a frame of a phone's width reports how wide its page is
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe src="{page.name}" width="360" height="700" id="f"></iframe><script>'
        "f.onload=()=>{document.title=f.contentDocument.documentElement.scrollWidth;document.body.append(document.title)}"
        "</script>"
    )
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command += ["--virtual-time-budget=5000", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    width = re.search(r"<title>(\d+)</title>", done.stdout)
    assert width, done.stdout[-500:]
    assert int(width[1]) <= 360
