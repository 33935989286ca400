"""One's own pictures and tables, from files to a page; on file names and values that are hostile."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from byline.cli import app
from byline.uses import look_for_mislabels, read_images, read_table
from byline.uses.own import picture

if importlib.util.find_spec("PIL") is None and os.environ.get("BYLINE_CI") != "1":
    pytest.skip("needs Pillow", allow_module_level=True)

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Bright, dark and striped squares; four of them in the wrong folder."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    names = ["bright", "dark & <b>wide", "striped"]
    for i in range(120):
        truth = i % 3
        picture = rng.integers(0, 60, (20, 24), dtype=np.uint8)
        picture += np.uint8(150) if truth == 0 else np.uint8(0)
        if truth == 2:
            picture[::4] += np.uint8(150)
        given = (truth + 1) % 3 if i in (10, 40, 70, 101) else truth
        folder = root / names[given]
        folder.mkdir(exist_ok=True)
        name = f"{i:03d}.png" if i != 10 else "010<img src=x onerror=alert(1)>.png"
        Image.fromarray(picture).save(folder / name)
    (root / "notes.txt").write_text("no picture, and not in a class")
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    truth = rng.random(200) < 0.5
    frame = pd.DataFrame(
        {
            "height": np.where(truth, 3.0, -3.0) + rng.normal(size=200),
            "colour": np.where(rng.random(200) < 0.9, np.where(truth, "red", HOSTILE), None),
            "constant": 1,
            "id": [f"unique {i}" for i in range(200)],
            "member": truth,
        }
    )
    frame.loc[5, "height"] = np.nan
    given = np.where(truth, "yes", "no")
    given[[3, 50, 120]] = np.where(truth[[3, 50, 120]], "no", "yes")
    frame["answer"] = given
    path = tmp_path_factory.mktemp("table") / "answers.csv"
    frame.to_csv(path, index=False)
    return path


def test_pictures_in_the_wrong_folder_come_first(photos):
    data = read_images(photos, 16)
    assert data.inputs.shape == (120, 3, 16, 16)
    assert data.class_names == ["bright", "dark & <b>wide", "striped"]
    found = look_for_mislabels(data, rows=6, progress=False)
    wrong = {name for name in data.names if re.search(r"(010<|040|070|101)", name)}
    assert wrong <= {data.names[i] for i in found.index}


def test_wrong_rows_of_a_table_come_first(table):
    data = read_table(table, "answer")
    # a number, two colours and what stands for none, a constant, a truth value; never the column of unique words
    assert data.inputs.shape == (200, 1 + 3 + 1 + 2)
    assert data.inputs.isfinite().all()
    found = look_for_mislabels(data, rows=12, progress=False)
    assert {3, 50, 120} <= set(found.index.tolist())
    assert (found.suggested != found.given).all()


def run(*arguments: object):
    return CliRunner().invoke(app, ["mislabels", *map(str, arguments)])


def test_the_command_writes_a_table_and_a_page(photos, tmp_path):
    result = run(photos, "--out", tmp_path, "--rows", 8, "--size", 16, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert len(rows) == 8
    assert set(rows[0]) >= {"index", "name", "given_label", "suggested_label", "suspicion", "stderr", "evidence"}
    written = pd.read_csv(tmp_path / "mislabels.csv")
    assert written.name.tolist() == [row["name"] for row in rows]
    page = (tmp_path / "mislabels.html").read_text()
    assert page.count('<article class="example suspect"') == 8
    # 8 examples and 5 pieces of evidence each, inside the file
    assert page.count('src="data:image/png;base64,') == 8 * 6
    assert "<img src=x" not in page
    assert "010&lt;img src=x onerror=alert(1)&gt;.png" in page
    assert "<b>wide" not in page


def test_a_table_is_shown_by_its_cells(table, tmp_path):
    result = run(table, "--label", "answer", "--out", tmp_path, "--rows", 5)
    assert result.exit_code == 0, result.output
    assert "row 50" in result.stdout
    page = (tmp_path / "mislabels.html").read_text()
    assert "<dt>height</dt>" in page
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_of_other_countries(table, tmp_path, separator):
    other = tmp_path / "other.csv"
    pd.read_csv(table).to_csv(other, sep=separator, index=False)
    one, same = read_table(table, "answer"), read_table(other, "answer")
    assert torch.equal(one.inputs, same.inputs)
    assert torch.equal(one.labels, same.labels)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_decimal_commas_are_numbers(table, tmp_path, separator):
    other, frame = tmp_path / "other.csv", pd.read_csv(table)
    frame.to_csv(other, sep=separator, index=False, decimal=",")
    assert "," in other.read_text()
    one, same = read_table(table, "answer"), read_table(other, "answer")
    assert torch.equal(one.inputs, same.inputs)
    for place in (0, 5):  # row 5 has no height
        row = frame.iloc[[place]].to_csv(index=False, sep=separator, decimal=",")
        assert torch.allclose(same.encode(row.encode()), same.inputs[place])


def test_words_with_commas_stay_words(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("tags;income;mixed;x;y\n" + "1,2,3;12,345;1;1;a\n1,2;1,234;1,5;2,5;b\n4;999;unknown;3;a\n" * 4)
    data = read_table(other, "y")
    # three kinds of tags and of incomes (are they thousands?), three of what is mixed, and one number
    assert data.inputs.shape == (12, 3 + 3 + 3 + 1)
    row = data.encode(b"tags;income;mixed;x\n1,2;1,234;1,5;2,5\n")
    assert torch.equal(row, data.inputs[1])


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_row_is_read_as_the_table_is(table, separator):
    data = read_table(table, "answer")
    frame = pd.read_csv(table)
    # row 5 has no height
    for place in (0, 5, int(frame.colour.isna().to_numpy().argmax())):
        for nothing in ("", "NA", "null"):
            row = frame.iloc[[place]].to_csv(index=False, sep=separator, na_rep=nothing)
            assert torch.allclose(data.encode(row.encode()), data.inputs[place])


def test_a_picture_of_more_than_12_million_pixels_is_refused():
    from PIL import Image

    large = io.BytesIO()
    Image.new("1", (4001, 3000)).save(large, "PNG")
    with pytest.raises(ValueError, match="4001 × 3000 pixels; expected at most 12000000"):
        picture(large.getvalue(), 8, 8)


def test_numbers_without_end_are_refused(table, tmp_path):
    data, frame = read_table(table, "answer"), pd.read_csv(table)
    frame.loc[0, "height"] = 1e300
    with pytest.raises(ValueError, match="column 'height' has a number that is too large"):
        data.encode(frame.iloc[[0]].to_csv(index=False).encode())
    frame.to_csv(tmp_path / "large.csv", index=False)
    with pytest.raises(ValueError, match="column 'height' has a number that is too large"):
        read_table(tmp_path / "large.csv", "answer")


def test_results_stand_under_the_name_of_what_was_looked_at(photos, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(photos, "--rows", 2, "--size", 8, "--epochs", 1).exit_code == 0
    assert run(table, "--label", "answer", "--rows", 2, "--epochs", 1).exit_code == 0
    assert {path.parent.name for path in tmp_path.glob("runs/mislabels/*/mislabels.csv")} == {photos.name, "answers"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p, t: ["/no/such", "--label", "x"], "no file at /no/such"),
        (lambda p, t: [t], "name the column of labels with --label"),
        (lambda p, t: [p, "--label", "x"], "--label is for CSV files"),
        (lambda p, t: [t, "--label", "nothing"], "no column 'nothing'; there are height, colour"),
        (lambda p, t: [t, "--label", "colour"], "has no colour"),
        (lambda p, t: [t, "--label", "constant"], "has one class, '1'"),
        (lambda p, t: [t, "--label", "id"], "there is one example; expected at least 2"),
        (lambda p, t: [t.parent], "has no pictures in folders below it"),
        (lambda p, t: [p, "--size", "4"], "size is 4"),
    ],
)
def test_what_is_wrong_is_one_sentence(photos, table, change, said):
    result = run(*change(photos, table))
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_file_that_is_no_picture_is_named(photos, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    (copy / "striped" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    result = run(copy)
    assert result.exit_code == 1
    assert "broken.png is no picture that can be read" in " ".join(result.output.split()).replace("- ", "-")


def test_the_page_opens_without_an_error(photos, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("BYLINE_CI") == "1":
            pytest.fail("chromium is not installed, and BYLINE_CI=1 leaves nothing out")
        pytest.skip("needs chromium")
    assert run(photos, "--out", tmp_path, "--rows", 4).exit_code == 0
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "mislabels.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert done.stdout.count('class="example suspect"') == 4
    assert "Uncaught" not in done.stderr
