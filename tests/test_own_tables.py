"""Tables as people keep them: pandas, told how a file is written, says what is read of it when nobody tells."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from byline.cli import app
from byline.uses import read_table

EXAMPLES = int(os.environ.get("BYLINE_EXAMPLES", "50"))
many = settings(max_examples=EXAMPLES, derandomize=EXAMPLES == 50, deadline=None, print_blob=True)


def table(tmp_path: Path, cells: list[str], *, name: str = "x", separator: str = ",", labels: str = "ab") -> Path:
    """One column beside a plain number and the labels."""
    frame = pd.DataFrame({name: cells, "other": range(5, 5 + 2 * len(cells), 2)})
    frame["y"] = [labels[i % len(labels)] for i in range(len(cells))]
    path = tmp_path / "table.csv"
    frame.to_csv(path, index=False, sep=separator)
    return path


def standard(values: object) -> np.ndarray:
    numbers = pd.Series(values, dtype=float)
    numbers = numbers.fillna(numbers.median())
    return ((numbers - numbers.mean()) / (numbers.std(ddof=0) or 1)).to_numpy()


NUMBERS = np.round(np.random.default_rng(0).normal(0, 4000, 60), 2)


@pytest.mark.parametrize(
    ("written", "separator"),
    [
        (lambda v: f"{v:.2f}", ","),
        (lambda v: f"{v:.2f}%", ","),
        (lambda v: f"{v:.2f} %", ";"),
        (lambda v: f"${v:,.2f}" if v >= 0 else f"-${-v:,.2f}", ","),
        (lambda v: f"{v:,.2f}" if v >= 0 else f"({-v:,.2f})", ","),
        (lambda v: f"{v:,.2f} €".translate(str.maketrans(",.", ".,")), ";"),
        (lambda v: f"EUR {v:,.2f}".replace(",", "'"), "\t"),
        (lambda v: f"{v:,.2f}".replace(",", "\u202f").replace(".", ","), ","),
        (lambda v: f" {v:.2f} ".replace("-", "−"), "|"),
        (lambda v: f"{v:e}", ","),
    ],
)
@pytest.mark.parametrize("odd", [[], [""], [" ", "?"], ["NA", "n/a", "NaN", "-", "inf"], ["unknown", "see note"]])
def test_a_column_of_numbers_stays_one(tmp_path, written, separator, odd):
    cells = [written(value) for value in NUMBERS]
    cells[3 : 3 + len(odd)] = odd
    data = read_table(table(tmp_path, cells, separator=separator), "y")
    values = NUMBERS.copy()
    values[3 : 3 + len(odd)] = np.nan
    assert data.inputs.shape == (60, 2)
    np.testing.assert_allclose(data.inputs[:, 0], standard(values), rtol=1e-5, atol=1e-6)
    filled = [note for note in data.notes if "median" in note]
    assert len(filled) == bool(odd)
    assert all(f"'x' ({len(odd)}:" in note for note in filled)
    # an example of its own is read in the same way
    for place in (0, 3, 30):
        row = pd.DataFrame({"x": cells, "other": range(5, 125, 2)}).iloc[[place]].to_csv(index=False, sep=separator)
        if cells[place] not in ("unknown", "see note"):
            np.testing.assert_allclose(data.encode(row.encode()), data.inputs[place])


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([f"id {i}" for i in range(60)], "left out, as they have more than 50 different words: 'x' (60"),
        ([f"2024-{i % 12 + 1:02}-{i % 28 + 1:02}" for i in range(60)], "more than 50 different dates or times: 'x'"),
        (["2024-01-01", "2024-01-02"] * 30, "columns of dates or times, taken as words: 'x' (2"),
        ([""] * 60, "left out, as they have no cell filled: 'x'"),
        (["7"] * 60, "columns of one value, which tell nothing: 'x'"),
        ([str(i) for i in range(60)], "count or name the rows, learnt from as numbers (take them out"),
        ([f"name {i}" for i in range(40)], "columns of words that are others in every row, a value each: 'x'"),
        ([f"{i * 997:05}" for i in range(60)], "leading zeros, which are read as numbers: 'x' ('00000')"),
        (["NA", "DE", "FR"] * 20, "may stand for nothing, taken as words: 'NA' in 'x'"),
        (["", "DE", "FR"] * 20, "blank cells of columns of words, a value of its own: 'x' (20)"),
        (["de", "DE", "FR"] * 20, "words that are nearly the same, and are kept apart: 'DE' and 'de' in 'x'"),
        (["1", "2", "3", "B"] * 15, "columns of words, though most cells are numbers: 'x' (for cells such as 'B')"),
        ([f"{i * 7}{'%' * (i % 2)}" for i in range(60)], "as what stands beside their numbers differs: 'x' ("),
    ],
)
def test_what_is_done_with_a_column_is_said(tmp_path, cells, said):
    data = read_table(table(tmp_path, cells), "y")
    assert any(said in note for note in data.notes), data.notes
    left = "left out" in said or "more than 50" in said or "beside" in said
    assert ("1 other columns left out" in data.what) is left
    done = CliRunner().invoke(
        app, ["mislabels", str(tmp_path / "table.csv"), "--label", "y", "--out", str(tmp_path / "out"), "--epochs", "1"]
    )
    assert done.exit_code == 0, done.output
    assert said in done.output
    page = (tmp_path / "out" / "mislabels.html").read_text()
    assert said.replace("'", "&#39;") in page


def test_nothing_is_merged(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("code,y\n" + "01,1\n1,01\n1.0,1.0\n,NA\nmissing,None\nNA,nan\nb, nan\n" * 3)
    data = read_table(path, "y")
    assert data.class_names == sorted(["1", "01", "1.0", "NA", "None", "nan", " nan"])
    # seven words of a column that is not one of numbers, blank among them
    assert data.inputs.shape == (21, 7)
    assert (data.inputs.sum(1) == 1).all()
    assert len({tuple(row) for row in data.inputs.tolist()}) == 7
    said = " ".join(data.notes)
    assert "labels that may stand for none, taken as words: ' nan' (3), 'NA' (3), 'None' (3), 'nan' (3)" in said
    assert "'01' and '1' and '1.0'" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (b" \r\n\t\n", "it is empty"),
        (b"a,y\n", "has a header and no rows below it"),
        (b"a,y", "has a header and no rows below it"),
        (b"a,y\n1,p\n1\n2,q\n", "row 1 (the first below the header is row 0) has 1 cells and the header 2"),
        (b"a,y\n1,p\n2,q,r\n2,q,r\n", "row 1 (the first below the header is row 0) has 3 cells"),
        (b"a,y\n1,p\n2,\n3,\n", "row 1 has no y (2 in all)"),
        (b"a,y\n1,p\n2,p\n", "has one class, 'p'"),
        (b"a,y\n1,1.5\n2,2.5\n3,2.5\n4,3.5\n", "there is one example; expected at least 2 of each (2 of 3 classes"),
        (b"a,Y\n1,p\n2,q\n", "has no column 'y' (is it 'Y'?); there are a, Y"),
        (b"y,a,y\np,1,q\n", "has 2 columns 'y'; expected one"),
        (b"a,y\n1,p\n2,\0q\n", "1 NUL bytes, the first in line 3"),
        ("a,y\n1,p\n".encode("utf-16-le"), "NUL bytes"),
        (b'a,y\n1,p\n"2,q\n3,p\n', "a quote that opens in row 1 is never closed"),
        (b'a,y\n"1,p\n"2",q\n3,p\n', "row 0 may be several rows"),
        (b"PK\x03\x04nothing", "it is a zip file, as those of Excel"),
        (b"y\np\nq\np\nq\n", "has no column to learn 'y' from"),
        (b"a,y\n1e400,p\n2,q\n2,p\n2,q\n", "column 'a' has a number that is too large"),
    ],
)
def test_what_is_no_table_is_refused_in_a_sentence(tmp_path, content, says):
    (tmp_path / "table.csv").write_bytes(content)
    done = CliRunner().invoke(app, ["mislabels", str(tmp_path / "table.csv"), "--label", "y"])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert says in done.output


def test_the_columns_are_named_where_none_is(tmp_path):
    done = CliRunner().invoke(app, ["mislabels", str(table(tmp_path, ["1", "2"] * 4))])
    assert done.exit_code == 1
    assert "name the column of labels with --label; there are 'x', 'other', 'y'" in done.output


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"])
def test_files_of_other_programs(tmp_path, end, encoding):
    word = "\x81" if encoding == "latin-1" else "é"  # no letter of Windows-1252
    lines = ["größe,naïve,y", *[f"{i * i},{word}{i % 3},{i % 2}" for i in range(12)]]
    text = end.join([*lines[:5], "", *lines[5:], ",,", "", ""])
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(encoding))
    data = read_table(path, "y")
    want = pd.read_csv(io.StringIO("\n".join(lines)), dtype=str).drop(columns="y")
    assert data.rows.to_numpy().tolist() == want.to_numpy().tolist()
    assert list(data.rows.columns) == list(want.columns)
    said = " ".join(data.notes)
    assert ("no UTF-8 (byte " in said) is (encoding in ("cp1252", "latin-1"))
    assert "not counted as rows: 1" in said
    assert "no cell filled, left out: 1" in said


def test_large_cells_and_headers(tmp_path):
    path, limit = tmp_path / "table.csv", csv.field_size_limit()
    path.write_text("a,y," + "b" * 300_000 + "\n" + "".join(f"{i * i},{i % 2},{'w' * 200_000}\n" for i in range(8)))
    assert read_table(path, "y").inputs.shape == (8, 2)
    assert csv.field_size_limit() == limit


def test_columns_of_one_name_are_called_as_pandas_calls_them(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,a,,y,a.1,,a\n" + "1,2,3,p,4,5,6\n2,3,5,q,5,9,9\n" * 2)
    data = read_table(path, "y")
    assert list(data.rows.columns) == list(pd.read_csv(path).drop(columns="y").columns)
    assert any("same name" in note and "'a': 'a.2'" in note for note in data.notes)
    assert any("without a name" in note and "'Unnamed: 2'" in note for note in data.notes)


def test_numbers_that_name_the_rows_are_said(tmp_path):
    for name, said in (("customerID", True), ("id", True), ("order no", True), ("humid", False), ("casino", False)):
        cells = [str(i * i * 7919 % 100_003) for i in range(40)]
        notes = read_table(table(tmp_path, cells, name=name), "y").notes
        assert any("count or name the rows" in note for note in notes) is said, name


def test_a_separator_in_a_name_is_none(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("price, EUR;y;a,b\n" + "1,5;p;3\n2,5;q;4\n" * 3)
    assert list(read_table(path, "y").rows.columns) == ["price, EUR", "a,b"]
    path.write_text("sep=|\nprice;y,z|y\n" + "1|p\n2|q\n" * 3)
    assert list(read_table(path, "y").rows.columns) == ["price;y,z"]


# letters, and all that files are made of
CELLS = st.text(st.sampled_from("ab01é,;\t|\"'\n\r .-%\u00a0\u2028"), max_size=6)
LABELS = st.lists(
    st.sampled_from(
        ["1", "01", "1.0", "NA", "None", "nan", "null", "Yes", "yes ", "?", '"', "a,b", "x\ny", "é", "0", "-"]
    ),
    min_size=2,
    max_size=4,
    unique=True,
)


@st.composite
def files(draw: st.DrawFn) -> tuple[pd.DataFrame, bytes, dict[str, object]]:
    """A table of text, the file that pandas writes of it, and how pandas reads it."""
    names = draw(
        st.lists(CELLS.filter(str.strip), min_size=1, max_size=3, unique_by=lambda name: name.strip().casefold())
    )
    labels = draw(LABELS)
    rows = 2 * len(labels) + draw(st.integers(0, 4))
    frame = pd.DataFrame({name: draw(st.lists(CELLS, min_size=rows, max_size=rows)) for name in names}, dtype=object)
    if any(name.strip().casefold() == "y" for name in names) or names[0].lower().startswith("sep"):
        names = [f"c{name}" for name in names]
        frame.columns = names
    frame.insert(draw(st.integers(0, len(names))), "y", [labels[i % len(labels)] for i in range(rows)])
    separator = draw(st.sampled_from(",;\t|"))
    out = io.StringIO(newline="")
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    if any("\r" in cell or "\n" in cell for cell in [*frame.columns, *frame.to_numpy().ravel()]):
        quoting = csv.QUOTE_ALL  # the csv module puts no quotes around line ends that are not the file's
    frame.to_csv(out, index=False, sep=separator, lineterminator=end, quoting=quoting)
    text = out.getvalue() + draw(st.sampled_from(["", end, end + "  " + end]))
    return frame, text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))), {"sep": separator}


@many
@given(files())
def test_cells_are_those_that_pandas_reads(made):
    frame, content, how = made
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    want = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, encoding=encoding, **how)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        path.write_bytes(content)
        if all(not cell.strip() for cell in frame.drop(columns="y").to_numpy().ravel()):
            with pytest.raises(ValueError, match="no column to learn 'y' from"):
                read_table(path, "y")
            return
        data = read_table(path, "y")
    assert data.class_names == sorted(set(want["y"]))
    assert [data.class_names[label] for label in data.labels.tolist()] == want["y"].tolist() == frame["y"].tolist()
    others = want.drop(columns="y")
    assert list(data.rows.columns) == list(others.columns)
    assert data.rows.to_numpy().tolist() == others.to_numpy().tolist()
    assert data.inputs.isfinite().all()
    # a column that is not used is named
    used = data.what.endswith("left out)")
    assert used is any("columns left out" in note for note in data.notes)
    # rows that differ in a word differ as inputs, and a row by itself is the row in the table
    for place in range(len(frame)):
        row = frame.drop(columns="y").iloc[[place]].to_csv(index=False, quoting=csv.QUOTE_ALL, **how)
        np.testing.assert_allclose(data.encode(row.encode()), data.inputs[place], rtol=1e-6)


WAYS = [
    (",", ".", ""),
    (",", ".", ","),
    (";", ",", ""),
    (";", ",", "."),
    ("\t", ",", " "),
    ("\t", ".", "'"),
    ("|", ".", ""),
]


@st.composite
def numbers(draw: st.DrawFn) -> tuple[list[str], str, dict[str, object], str]:
    """Cells of numbers, what separates the columns, how pandas reads them, and the sign beside them."""
    separator, decimal, thousands = draw(st.sampled_from(WAYS))
    values = draw(st.lists(st.integers(-(10**9), 10**9), min_size=12, max_size=30, unique=True))
    unit = draw(st.sampled_from(["", "%", " €", "$"]))
    cells = []
    for value in values:
        text = f"{value / 100:,.2f}".replace(",", "_").replace(".", decimal).replace("_", thousands)
        cells.append(f"$ {text}" if unit == "$" else text + unit)
    missing = draw(st.lists(st.sampled_from(["", "NA", "?", "n/a", " ", "-"]), max_size=6))
    places = draw(st.lists(st.integers(0, len(cells) - 1), min_size=len(missing), max_size=len(missing), unique=True))
    for place, cell in zip(places, missing, strict=True):
        cells[place] = cell
    how = {"sep": separator, "decimal": decimal, "thousands": thousands or None}
    return cells, separator, how, unit.strip()


@many
@given(numbers())
@example((["1,234", "12,5", "-3,25", "0,125"] * 3, ";", {"sep": ";", "decimal": ",", "thousands": None}, ""))
def test_numbers_are_those_that_pandas_reads(made):
    cells, separator, how, unit = made
    bare = [cell.replace(unit, "").strip() if unit else cell for cell in cells]
    text = pd.DataFrame({"x": bare, "z": 0}).to_csv(index=False, sep=separator)
    want = pd.read_csv(io.StringIO(text), na_values=["NA", "?", "n/a", " ", "-"], **how)["x"]
    assert want.dtype == float
    with tempfile.TemporaryDirectory() as folder:
        data = read_table(table(Path(folder), cells, separator=separator), "y")
    assert data.inputs.shape == (len(cells), 2)
    np.testing.assert_allclose(data.inputs[:, 0], standard(want), rtol=1e-4, atol=1e-5)
    gaps = int(want.isna().sum())
    assert any(f"'x' ({gaps}:" in note for note in data.notes if "median" in note) is (gaps > 0)
