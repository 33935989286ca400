"""The setting stdlib-gpt: functions and where they stand, tokens, the GPT, and the comparison on it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import decoders
from byline import settings
from byline.settings import bench, stdlib
from byline.settings.base import BankRecipe
from byline.settings.rows import Row
from byline.settings.transformer import Decoder

SOURCE = '''\
import os


def short(): return 1


def plain(a,
          b=2):
    """A docstring.

    It is long.
    """
    # a comment stays
    return a + b


class Thing:
    """Not a function."""

    @property
    def size(self):
        def inner():
            return 2

        return inner()

    async def wait(self):
        """Only a docstring."""


if os:

    def conditional():
        x = 1
        return x
'''


def test_functions_come_with_their_place_and_without_docstring() -> None:
    found = list(stdlib.functions_of(SOURCE, "pack/__init__.py"))
    assert [(f.module, f.name, f.first, f.last) for f in found] == [
        ("pack", "plain", 7, 14),
        ("pack", "Thing.size", 21, 25),
    ]
    assert found[0].text == "def plain(a,\n          b=2):\n    # a comment stays\n    return a + b"
    assert found[1].text == "def size(self):\n    def inner():\n        return 2\n\n    return inner()"
    assert found[0].owner() == {"module": "pack", "title": "plain", "file": "pack/__init__.py", "first": 7, "last": 14}


def write_library(folder: Path, files: int = 12) -> Path:
    """A library of made-up functions, and what has to be passed over."""
    (folder / "test").mkdir(parents=True)
    for number in range(files):
        body = "\n".join(
            f"def f{number}_{i}(value, other={i}):\n    total = value + {number}\n    return total * other\n"
            for i in range(8)
        )
        (folder / f"m{number}.py").write_text(body)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "latin.py").write_bytes(b"# \xe9\ndef f():\n    a = 1\n    return a\n")
    (folder / "test" / "test_m.py").write_text("def left_out():\n    a = 1\n    return a\n")
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> stdlib.Code:
    decoders.needs("tokenizers")
    return stdlib.read(write_library(tmp_path_factory.mktemp("library")), 60, 8)


def test_the_data_are_distinct_functions_with_their_owners(few: stdlib.Code, tmp_path: Path) -> None:
    corpus = few.corpus
    assert (len(corpus.train), len(corpus.test)) == (60, 8)
    texts = [function.text for function in (*few.train, *few.test)]
    assert len(set(texts)) == 68
    assert not any("left_out" in text for text in texts)
    assert json.loads(json.dumps(corpus.train_owners))[0] == few.train[0].owner()
    assert platform.python_version() in corpus.source
    # what the ids say is the text, byte for byte
    for function, ids in zip(few.train, corpus.train, strict=True):
        assert (ids[0], ids[-1]) == (stdlib.START, stdlib.END)
        assert few.tokenizer.decode(ids[1:-1]) == function.text
    with pytest.raises(ValueError, match="has 96 functions of 3 to 40 lines; expected 508"):
        stdlib.read(write_library(tmp_path / "again"), 500, 8)


def test_every_function_is_where_its_owner_says(few: stdlib.Code) -> None:
    """On Python's own library: the lines hold the function, whatever was left out of its text."""
    checked = 0
    for name in ("bisect.py", "textwrap.py", "fractions.py"):
        text = (stdlib.library() / name).read_text(encoding="utf-8")
        lines = text.splitlines()
        for function in stdlib.functions_of(text, name):
            own = textwrap.dedent("\n".join(lines[function.first - 1 : function.last]))
            assert own.startswith(("def ", "async def "))
            assert f"{function.name.rpartition('.')[2]}(" in own.splitlines()[0]
            assert set(function.text.splitlines()) <= {line.rstrip() for line in own.splitlines()} | set(
                own.splitlines()
            )
            checked += 1
    assert checked > 30


def test_tokens_do_not_depend_on_threads_or_hashes() -> None:
    decoders.needs("tokenizers")
    # tokenizers alone, for the sake of a quick start: the call is that of learn_tokenizer
    code = textwrap.dedent(
        """
        import ast, hashlib, os, pathlib, sys
        source = pathlib.Path(sys.argv[1]).read_text()
        node = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "learn_tokenizer")
        names = {"Any": object, "Sequence": list, "VOCABULARY": 0, "SPECIAL": ("<pad>", "<start>", "<end>")}
        exec(compile(ast.Module([node], []), "stdlib", "exec"), names)
        texts = (pathlib.Path(os.__file__).parent / "argparse.py").read_text().split("def ")
        print(hashlib.sha256(names["learn_tokenizer"](texts, 400).to_str().encode()).hexdigest())
        """
    ).replace("list, ", "__import__('typing').Sequence, ")
    said = set()
    for threads, hashes in (("1", "1"), ("4", "2")):
        variables = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": hashes}
        command = [sys.executable, "-c", code, stdlib.__file__]
        said.add(subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout)
    assert len(said) == 1


def test_without_tokenizers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"byline\[hf\]"):
        stdlib.learn_tokenizer(["a"])


@pytest.mark.parametrize("kind", ["independent", "dropout", "LoRA"])
def test_scores_equal_per_example_autograd(kind: str) -> None:
    decoders.check_exactness(False, kind)


def test_padding_and_batches_change_nothing() -> None:
    decoders.check_padding_and_batches(False)


def test_a_made_up_function_is_seeded(few: stdlib.Code) -> None:
    torch.manual_seed(0)
    vocabulary = few.corpus.vocabulary
    model = Decoder(vocabulary, stdlib.LENGTH, width=16, layers=1, heads=2, hidden=16).eval()
    said = stdlib.generate(model, few.tokenizer, "def f", seed=1)
    assert said.startswith("def f")
    assert said == stdlib.generate(model, few.tokenizer, "def f", seed=1)
    assert said != stdlib.generate(model, few.tokenizer, "def f", seed=2)


def test_the_comparison_runs(few: stdlib.Code, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stdlib, "code", lambda train=0, test=0: few)
    full = settings.get("stdlib-gpt")
    small = replace(
        full,
        build=lambda: stdlib.build(few.corpus.vocabulary, width=8),
        recipe=replace(full.recipe, epochs=1, batch_size=16),
    )
    rows = (Row("independent", 1), Row("forward-only", 1, 2, {"p": 0.1}))
    result = bench.run(small, tmp_path, rows=rows, bank_recipe=BankRecipe(subsets=3, fraction=0.5, seeds=1))
    assert [row["name"] for row in result["rows"]] == ["independent 1", "forward-only 1×2"]
    assert any("standard library" in note for note in result["notes"])


def test_the_short_form_and_the_width() -> None:
    full = settings.get("stdlib-gpt")
    setting, bank = bench.form(full, True, None)
    assert setting.recipe.epochs < full.recipe.epochs
    assert bank.subsets < full.bank_recipe.subsets
    assert full.variant(width=16).build().tokens.embedding_dim == 16
    with pytest.raises(ValueError, match="width is 10; expected a multiple of 4"):
        full.variant(width=10)
    with pytest.raises(ValueError, match="--data is for settings"):
        full.variant(Path("."))


def test_a_function_that_somebody_brings_is_read_as_the_librarys_are(
    few: stdlib.Code, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdlib, "code", lambda train=0, test=0: few)
    inputs, targets = stdlib.load()[0].tensors
    texts, _ = stdlib.texts()
    for place, function in enumerate(few.train):
        ids, wanted = stdlib.read_text(f"\n{function.text}\n")
        assert torch.equal(ids, inputs[place])
        assert torch.equal(wanted, targets[place])
        # as much as the model reads
        assert function.text.startswith(texts[place])
    with pytest.raises(ValueError, match="the text is empty"):
        stdlib.read_text(" \n")
