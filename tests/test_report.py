"""The report: one file, offline, safe with hostile text, honest in words, and really drawn."""

from __future__ import annotations

import base64
import os
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byline import report
from byline.evaluate.savings import add_savings
from byline.report.picture import data_uri, png
from byline.report.plots import figures, pareto_front
from byline.report.words import percent, verdict

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"


def make_row(kind: str, models: int, members: int, lds: float, cost: float, **more: Any) -> dict[str, Any]:
    return {
        "name": f"{kind} {models}×{members}",
        "kind": kind,
        "models": models,
        "members": members,
        "lds": lds,
        "interval": [lds - 0.02, lds + 0.03],
        "training": {"flops": cost, "seconds": cost / 1e9},
        "fitting": {"flops": cost / 10, "seconds": cost / 1e10},
        "serving": {"flops": cost / 1000, "seconds": cost / 1e12},
        "space": int(cost / 1e4),
        **more,
    }


def make_result(text: str = "Ankle boot") -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def found(sign: int) -> list[dict[str, Any]]:
        return [
            {
                "index": i,
                "label": text,
                "image": rng.normal(size=(8, 8)).tolist(),
                "score": sign * 1.5,
                "stderr": 0.2 if i else None,
            }
            for i in range(3)
        ]

    rows = [
        make_row("independent", 1, 1, 0.25, 1e10),
        make_row("independent", 5, 5, 0.37, 5e10),
        make_row("independent", 25, 25, 0.42, 25e10),
        make_row("dropout", 1, 10, 0.38, 1e10),
        make_row("trajectory", 1, 10, 0.49, 0.3e10),
        make_row("lora", 1, 4, 0.2, 1.1e10, name=text),
        make_row("something new", 1, 1, 0.3, 1e10),
    ]
    return {
        "setting": {"name": text, "description": text, "n_train": 5000, "n_test": 500},
        "bank": {"subsets": 50, "fraction": 0.5, "seeds": 2, "ceiling": 0.76},
        "rows": add_savings(rows),
        "examples": [
            {
                "index": 3,
                "label": text,
                "predicted": text,
                "image": rng.normal(size=(8, 8)).tolist(),
                "ensemble": text,
                "proponents": found(1),
                "opponents": found(-1),
            },
            {"index": 4, "label": text, "text": text, "proponents": [], "opponents": []},
        ],
        "notes": [text],
        "environment": {"python": "3.11", text: text},
        "command": f"byline demo --out {text}",
    }


class Page(HTMLParser):
    """Collects every tag with its attributes, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report.render(make_result()))


def test_nothing_is_fetched(page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "poster"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base")
    policy = [meta for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy[0]["content"]


def test_it_is_accessible(page: Page) -> None:
    assert page.named("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.named("img"))
    assert all(header.get("scope") in ("row", "col") for header in page.named("th"))
    plots = [box for box in page.named("div") if box.get("class") == "plot"]
    assert len(plots) == 3
    assert all(box["role"] == "img" and "Pareto front" in box["aria-label"] for box in plots)
    assert len(page.named("h1")) == 1


def test_every_row_and_cost_is_there(page: Page) -> None:
    for row in make_result()["rows"]:
        assert row["name"] in page.text
        assert f"{row['lds']:.3f}" in page.text
    assert "≥ 98 % less" in page.text
    assert "more than 25 models" in page.text
    assert "less than 1 model" in page.text
    assert "byline demo --out" in page.text


def test_hostile_text_is_escaped() -> None:
    html = report.render(make_result(HOSTILE))
    assert "<script>alert(1)" not in html
    assert "<img src=x" not in html
    page = Page(html)
    assert len(page.named("script")) == 3
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in page.text
    # Plotly reads a little HTML in its texts, so it must get them escaped once more.
    hover = figures(make_result(HOSTILE)["rows"])[0]["figure"]["data"]
    assert not any("<img" in text for trace in hover for text in trace.get("hovertext", []))


def test_an_empty_comparison_still_renders() -> None:
    result = {**make_result(), "rows": [], "examples": [], "environment": {}, "notes": []}
    assert "Nothing was measured" in Page(report.render(result)).text


def test_size_and_atomic_write(tmp_path: Path) -> None:
    path = report.build(make_result(), tmp_path / "deep" / "report.html")
    assert path.stat().st_size < 10e6
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_pareto_front() -> None:
    points = [(1.0, 0.2), (2.0, 0.5), (2.0, 0.4), (3.0, 0.5), (4.0, 0.6)]
    assert pareto_front(points) == [0, 1, 4]
    assert pareto_front([]) == []


def test_a_row_that_costs_nothing_is_left_out_of_a_logarithmic_plot() -> None:
    rows = [{**make_row("dropout", 1, 10, 0.3, 1e9), "space": 0}]
    space = next(plot for plot in figures(rows) if plot["key"] == "space")
    assert space["figure"]["data"] == []


@pytest.mark.parametrize(
    ("saved", "bound", "text"),
    [
        (0.939, "equal", "93 % less"),
        (0.9999, "equal", "99.9 % less"),
        (0.8, "at least", "≥ 80 % less"),
        (-0.071, "equal", "8 % more"),
        (-0.2, "at least", "≤ 20 % more"),
        (-1.21, "equal", "2.3× as much"),
        (0.0, "equal", "the same"),
        (None, "equal", "–"),
    ],
)
def test_percentages_never_flatter(saved: float | None, bound: str, text: str) -> None:
    assert percent(saved, bound) == text


def test_the_verdict_says_what_was_measured() -> None:
    result = make_result()
    sentence = verdict(result)
    assert "trajectory 1×10 reaches an LDS of 0.490 against 0.420 for 25" in sentence
    assert "at least 98 % less training" in sentence
    assert "overlap" not in sentence
    for row in result["rows"]:
        row["interval"] = [0.1, 0.9]
    assert "no worse, not as better" in verdict(result)


def test_the_verdict_admits_defeat() -> None:
    rows = add_savings([make_row("independent", 5, 5, 0.4, 5e10), make_row("dropout", 1, 10, 0.3, 1e10)])
    sentence = verdict({**make_result(), "rows": rows})
    assert "no cheaper ensemble reaches" in sentence
    assert "which has a higher LDS" in sentence


def decode(data: bytes) -> np.ndarray:
    """Reads back what `png` writes: one IDAT chunk, filter 0."""
    width, height = struct.unpack(">II", data[16:24])
    channels = 3 if data[25] == 2 else 1
    start = data.index(b"IDAT")
    length = struct.unpack(">I", data[start - 4 : start])[0]
    lines = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + length]), np.uint8)
    return lines.reshape(height, 1 + width * channels)[:, 1:].reshape(height, width, channels)


def test_pictures_keep_their_pixels() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert np.array_equal(decode(png(grey))[:, :, 0], grey)
    colour = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    assert np.array_equal(decode(png(colour)), colour)
    assert np.array_equal(decode(png(colour.transpose(2, 0, 1))), colour)
    assert decode(png([[-1.0, 0.0, 1.0]]))[0, :, 0].tolist() == [0, 128, 255]
    assert base64.b64decode(data_uri(grey).split(",")[1]) == png(grey)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2), (0, 3)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a picture is"):
        png(np.zeros(shape))


def test_chromium_draws_the_plots(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("BYLINE_CI"):
            pytest.fail("chromium is missing, and BYLINE_CI asks for it")
        pytest.skip("chromium is not installed")
    path = report.build(make_result(HOSTILE), tmp_path / "report.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-component-update"]
    flags += ["--disable-background-networking", "--disable-sync", "--disable-quic"]
    flags += ["--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [chromium, *flags, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert len(re.findall(r'<svg class="main-svg"', done.stdout)) >= 3
    # Seven points in each of three plots, each with its error bar.
    assert done.stdout.count('class="point"') >= 21
    assert done.stdout.count('class="yerror"') >= 21
