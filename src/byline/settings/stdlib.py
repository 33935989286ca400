"""`stdlib-gpt`: a small GPT on the functions of Python's own standard library, and which of them taught it what.

Needs no file and no network: the sources are those of the interpreter that runs, so another version of Python gives
other data. The tokens are byte-level BPE, learnt on the training functions by `tokenizers`.
"""

from __future__ import annotations

import ast
import os
import platform
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from byline.features import Factorized
from byline.settings.base import BankRecipe, Data, Setting, widened
from byline.settings.corpus import SEQUENCES, Corpus, Owner, packed
from byline.settings.transformer import Bigrams, Decoder, sample

TRAIN, TEST = 1000, 100
WIDTH = 64
LENGTH, VOCABULARY = 96, 512
LINES = range(3, 41)
"""Lines that a function may have, its docstring left out."""
PAD, START, END = range(3)
SPECIAL = ("<pad>", "<start>", "<end>")
# tests and examples repeat themselves, tables are data, and what others bring is no part of the library
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo",
             "encodings", "ensurepip", "__phello__", "pydoc_data"}  # fmt: skip


@dataclass(frozen=True)
class Function:
    """A function of the library: its source without docstring and common indentation, and where it stands."""

    text: str
    module: str
    name: str
    file: str
    first: int
    last: int

    def owner(self) -> Owner:
        """Plain data."""
        return {"module": self.module, "title": self.name, "file": self.file, "first": self.first, "last": self.last}


@dataclass(frozen=True)
class Code:
    """Functions as sequences, and the tokenizer they were written with."""

    corpus: Corpus
    tokenizer: Any
    train: Sequence[Function]
    test: Sequence[Function]


def library() -> Path:
    """The folder of the standard library's sources."""
    return Path(os.__file__).parent


def functions(folder: Path) -> Iterator[Function]:
    """The functions and methods of a library, file by file; files that do not parse are left out.

    Args:
        folder: its root.
    """
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if _LEFT_OUT.isdisjoint(inside.parts):
            try:
                text = path.read_text(encoding="utf-8")
                yield from functions_of(text, inside.as_posix())
            except (SyntaxError, ValueError):
                continue


def functions_of(text: str, file: str) -> Iterator[Function]:
    """The functions of one source file whose length is in `LINES`, in their order; those inside another belong to it.

    Args:
        text: the source.
        file: its path inside the library.
    """
    lines = text.splitlines()
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def walk(nodes: Sequence[ast.stmt], prefix: str) -> Iterator[Function]:
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                kept = list(range(node.lineno, node.end_lineno + 1))
                if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1:
                    first = node.body[0]
                    spoken = range(first.lineno, (first.end_lineno or first.lineno) + 1)
                    kept = [line for line in kept if line not in spoken]
                body = textwrap.dedent("\n".join(lines[line - 1] for line in kept)).strip()
                if len(kept) in LINES:
                    yield Function(body, module, prefix + node.name, file, node.lineno, node.end_lineno)

    yield from walk(ast.parse(text).body, "")


def learn_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE tokenizer; the same texts give the same tokens.

    Args:
        texts: what it is learnt on.
        vocabulary: tokens in all.

    Raises:
        ModuleNotFoundError: If the package tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "stdlib-gpt learns its tokens with the package tokenizers, which is not installed: pip install 'byline[hf]'"
        ) from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a function, from its start to its end token."""
    return [START, *tokenizer.encode(text).ids, END]


def read(folder: Path, train: int = TRAIN, test: int = TEST) -> Code:
    """Functions drawn at random from a library, no two of the same text.

    Args:
        folder: root of the library.
        train: number of training functions.
        test: number of test functions.

    Raises:
        ModuleNotFoundError: If the package tokenizers is not installed.
        ValueError: If there are fewer functions.
    """
    distinct = {function.text: function for function in functions(folder)}
    found = list(distinct.values())
    if len(found) < train + test:
        raise ValueError(f"{folder} has {len(found)} functions of {LINES[0]} to {LINES[-1]} lines; expected "
                         f"{train + test}: does this Python come without its sources?")  # fmt: skip
    chosen = [found[i] for i in np.random.default_rng(0).permutation(len(found))[: train + test]]
    tokenizer = learn_tokenizer([function.text for function in chosen[:train]])
    ids = [encode(tokenizer, function.text) for function in chosen]
    owners = [function.owner() for function in chosen]
    source = f"The functions are those of the standard library of {platform.python_implementation()} "
    corpus = Corpus(
        ids[:train],
        ids[train:],
        owners[:train],
        owners[train:],
        vocabulary=tokenizer.get_vocab_size(),
        source=f"{source}{platform.python_version()}.",
    )
    return Code(corpus, tokenizer, chosen[:train], chosen[train:])


@cache
def code(train: int = TRAIN, test: int = TEST) -> Code:
    """The functions of this interpreter's library, read once; see `read`."""
    return read(library(), train, test)


def load(train: int = TRAIN, test: int = TEST) -> Data:
    """The data from this interpreter."""
    return code(train, test).corpus.data(LENGTH)


def build(vocabulary: int = VOCABULARY, width: int = WIDTH) -> nn.Module:
    """A GPT of two blocks, dropout 0.1."""
    return Decoder(vocabulary, LENGTH, width=width, layers=2, heads=4, hidden=2 * width, dropout=0.1)


def owners(train: int = TRAIN, test: int = TEST) -> tuple[Sequence[Owner], Sequence[Owner]]:
    """Module, name, file and lines of each training and test function."""
    corpus = code(train, test).corpus
    return corpus.train_owners, corpus.test_owners


def texts(train: int = TRAIN, test: int = TEST) -> tuple[Sequence[str], Sequence[str]]:
    """As much of each training and test function as the model reads."""
    found = code(train, test)
    parts = [
        [found.tokenizer.decode(ids[1 : LENGTH + 1]).rstrip() for ids in part]
        for part in (found.corpus.train, found.corpus.test)
    ]
    return parts[0], parts[1]


def read_text(text: str, train: int = TRAIN, test: int = TEST) -> Any:
    """A function's source as an example.

    Raises:
        ValueError: If there is none.
    """
    if not text.strip():
        raise ValueError("the text is empty; expected the source of a function")
    return packed([encode(code(train, test).tokenizer, text.strip())], LENGTH)[0]


def source(train: int = TRAIN, test: int = TEST) -> str:
    """Where the data came from."""
    return code(train, test).corpus.source


def shortened(setting: Setting, width: int = 32) -> Setting:
    """A fifth of the functions, few epochs, a narrow model."""
    sizes = {"train": 200, "test": 40}
    return replace(
        setting,
        load=partial(load, **sizes),
        build=partial(build, width=width),
        width=width,
        owners=partial(owners, **sizes),
        texts=partial(texts, **sizes),
        read_text=partial(read_text, train=sizes["train"], test=sizes["test"]),
        source=partial(source, **sizes),
        recipe=replace(setting.recipe, epochs=4),
        bank_recipe=BankRecipe(subsets=10, seeds=2),
        features=partial(Factorized, 512),
    )


def at_width(setting: Setting, width: int) -> Setting:
    """The setting with another number of units per token; a multiple of the heads.

    Raises:
        ValueError: If it is none.
    """
    if width % 4:
        raise ValueError(f"width is {width}; expected a multiple of 4, the heads of this transformer")
    return widened(setting, width, shortened=partial(shortened, width=width))


def write(model: Decoder, tokenizer: Any, start: str = "def ", *, seed: int = 0, temperature: float = 0.8) -> list[int]:
    """Token ids of a function that a trained model makes up, from the start token on.

    Args:
        model: trained on functions, in eval mode.
        tokenizer: `Code.tokenizer`.
        start: its first characters.
        seed: of the draws.
        temperature: below 1 the likely becomes likelier.
    """
    return sample(
        model,
        encode(tokenizer, start)[:-1],
        stop=END,
        temperature=temperature,
        seed=seed,
        forbid=lambda ids: [PAD, START],
    )


def generate(model: Decoder, tokenizer: Any, start: str = "def ", *, seed: int = 0, temperature: float = 0.8) -> str:
    """The text of what `write` makes up, with the same arguments."""
    return str(tokenizer.decode(write(model, tokenizer, start, seed=seed, temperature=temperature)))


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; together they are the function's."""
    return [str(tokenizer.decode([i])) for i in ids]


stdlib_gpt = Setting(
    name="stdlib-gpt",
    description=f"A small GPT on {TRAIN} functions of Python's standard library, {TEST} to explain.",
    load=load,
    build=build,
    owners=owners,
    texts=texts,
    read_text=read_text,
    source=source,
    shortened=shortened,
    width=WIDTH,
    at_width=at_width,
    simplest=partial(Bigrams, VOCABULARY),
    **SEQUENCES,
)
