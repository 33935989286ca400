"""The notebooks run from top to bottom, hold what they claim, and are stored with their results, small."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MOST = 300_000
"""Bytes that a notebook may have, pictures and all."""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One kernel for all: most of a short notebook's time is the start of Python and torch."""
    absent = [name for name in ("nbclient", "ipykernel", "matplotlib") if importlib.util.find_spec(name) is None]
    if absent:
        assert os.environ.get("BYLINE_CI") != "1", f"{absent[0]} is not installed"
        pytest.skip(f"needs {absent[0]}: pip install 'byline[notebooks]'")
    from jupyter_client.manager import AsyncKernelManager

    manager = AsyncKernelManager(kernel_name="python3", transport="ipc")
    manager.ip = str(tmp_path_factory.mktemp("kernel") / "k")
    yield manager
    from nbclient.util import run_sync

    run_sync(manager.shutdown_kernel)(now=True)


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_stored(path: Path) -> None:
    book = json.loads(path.read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert path.stat().st_size < MOST
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any(output["output_type"] in ("display_data", "execute_result", "stream") for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_runs(path: Path, kernel: Any, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    if path.stem == "text" and importlib.util.find_spec("tokenizers") is None and os.environ.get("BYLINE_CI") != "1":
        pytest.skip("needs tokenizers: pip install 'byline[hf]'")
    book = nbformat.read(path, as_version=4)
    book.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # nothing of the notebook before
    # raises where a cell does; the last of each asserts what its text claims
    NotebookClient(book, km=kernel, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
