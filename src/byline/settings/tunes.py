"""`tunes-transformer`: the paper's MAESTRO + Music Transformer (arXiv 2405.17293), on folk tunes and chorales.

The tunes of three printed collections and Bach's chorale melodies, both inside the package music21, as tokens of ABC
notation; a small Music Transformer. On a folder of MIDI files, such as MAESTRO, it is the paper's own setting.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from byline.features import Factorized
from byline.settings import midi
from byline.settings.base import BankRecipe, Data, Setting, widened
from byline.settings.corpus import SEQUENCES, Corpus, Owner, packed
from byline.settings.notation import Melody, NotationError, is_heading, read_abc, read_musicxml, to_abc
from byline.settings.transformer import Bigrams, Decoder, sample

TRAIN, TEST = 1000, 100
WIDTH = 64
LENGTH = 96
"""Tokens of a tune that are read: a first strain of eight bars and the turn into the second."""
CHORALES = 0.1
"""The share of chorales among the melodies."""
RARE = 10
PAD, START, END = range(3)
SPECIAL = ("", "<start>", "<end>")

COLLECTIONS = {
    "oneills1850": "O'Neill's Music of Ireland",
    "ryansMammoth": "Ryan's Mammoth Collection",
    "airdsAirs": "Aird's Airs",
    "bach": "Bach's chorales",
}
_DANCES = ("slip jig", "single jig", "double jig", "jig", "reel", "hornpipe", "strathspey", "march", "waltz", "polka",
           "minuet", "quick step", "clog", "air", "chorale")  # fmt: skip


@dataclass(frozen=True)
class Tunes:
    """Tunes as sequences, and the words that their tokens stand for."""

    corpus: Corpus
    words: tuple[str, ...]

    def encode(self, tokens: Sequence[str], end: bool = False) -> list[int]:
        """Ids of a melody's tokens, after the start token.

        Raises:
            ValueError: If there is no such token.
        """
        places = {word: place for place, word in enumerate(self.words)}
        unknown = [token for token in tokens if token not in places]
        if unknown:
            raise ValueError(f"token {unknown[0]!r} is in none of the tunes; expected some of {len(places)} tokens")
        return [START, *(places[token] for token in tokens), *([END] if end else [])]

    def decode(self, ids: Sequence[int]) -> list[str]:
        """The tokens of a melody; start, end and padding are left out."""
        return [self.words[i] for i in ids if i >= len(SPECIAL)]


def corpus_folder() -> Path:
    """Where music21 keeps its corpus; music21 itself is not imported.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    found = importlib.util.find_spec("music21")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "tunes-transformer reads the tunes inside the package music21, which is not installed: "
            "pip install 'byline[music]', or name a folder of MIDI files with --data"
        )
    folder = Path(found.origin).parent / "corpus"
    missing = [name for name in COLLECTIONS if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: this music21 comes without its corpus")
    return folder


def melodies(folder: Path, collection: str, files: Sequence[Path] | None = None) -> Iterator[Melody]:
    """The melodies of a collection, in the order of its files.

    Args:
        folder: of music21's corpus.
        collection: a key of `COLLECTIONS`.
        files: of the collection; all when left out.
    """
    if collection == "bach":
        for path in sorted((folder / collection).glob("*.mxl")) if files is None else files:
            try:
                yield read_musicxml(path)
            except NotationError:
                continue
        return
    for path in sorted((folder / collection).glob("*.abc")) if files is None else files:
        yield from read_abc(path.read_bytes().decode("utf-8", "replace"), path.name)


def family(melody: Melody) -> str:
    """The kind of dance: what the collection says, else what the title says, else nothing."""
    for text in (melody.rhythm.replace("slipjig", "slip jig"), melody.title.lower()):
        found = next((dance for dance in _DANCES if re.search(rf"\b{dance}s?\b", text)), None)
        if found is not None:
            return found
    return ""


def read(folder: Path, train: int = TRAIN, test: int = TEST, rare: int = RARE) -> Tunes:
    """Melodies drawn at random from all collections, no two alike in their first `LENGTH` tokens.

    Args:
        folder: of music21's corpus.
        train: number of training melodies.
        test: number of test melodies.
        rare: a melody with a token that fewer melodies have is left out.

    Raises:
        ValueError: If there are fewer.
    """
    rng = np.random.default_rng(0)
    chorales = round((train + test) * CHORALES)
    known: dict[str, list[tuple[Melody, str]]] = {"tunes": [], "chorales": []}
    for name in COLLECTIONS:
        if name != "bach":
            known["tunes"] += [(melody, name) for melody in melodies(folder, name)]
    files = sorted((folder / "bach").glob("*.mxl"))
    # a quarter more than wanted: some are sung twice, or have no soprano
    files = [files[i] for i in rng.permutation(len(files))[: chorales * 5 // 4 + 5]]
    known["chorales"] = [(melody, "bach") for melody in melodies(folder, "bach", files)]
    counts = Counter(token for part in known.values() for melody, _ in part for token in set(_cut(melody)))
    chosen = []
    for name, count in (("tunes", train + test - chorales), ("chorales", chorales)):
        distinct = {tuple(_cut(melody)): (melody, of) for melody, of in reversed(known[name])}
        common = [found for tokens, found in distinct.items() if min(counts[token] for token in tokens) >= rare]
        if len(common) < count:
            raise ValueError(f"{folder} has {len(common)} {name} that can be used; expected {count}")
        chosen += [common[i] for i in rng.permutation(len(common))[:count]]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    words = (*SPECIAL, *sorted({token for melody, _ in chosen for token in _cut(melody)}))
    tunes = Tunes(Corpus((), (), (), (), len(words), ""), words)
    ids = [tunes.encode(_cut(melody), end=len(melody.tokens) < LENGTH) for melody, _ in chosen]
    owners = [_owner(melody, of) for melody, of in chosen]
    version = importlib.metadata.version("music21")
    source = f"The melodies are those of music21 {version}, {len(words)} tokens of ABC notation."
    return Tunes(Corpus(ids[:train], ids[train:], owners[:train], owners[train:], len(words), source), words)


def _cut(melody: Melody) -> list[str]:
    return melody.tokens[:LENGTH]


def _owner(melody: Melody, collection: str) -> Owner:
    return {
        "collection": COLLECTIONS[collection],
        "title": melody.title,
        "family": family(melody),
        "number": melody.number,
        "file": f"{collection}/{melody.file}",
    }


@cache
def tunes(train: int = TRAIN, test: int = TEST) -> Tunes:
    """The tunes of this machine, read once; see `read`."""
    return read(corpus_folder(), train, test)


def load(train: int = TRAIN, test: int = TEST) -> Data:
    """The data from this machine."""
    return tunes(train, test).corpus.data(LENGTH)


def build(train: int = TRAIN, test: int = TEST, width: int = WIDTH) -> nn.Module:
    """A Music Transformer: two blocks of relative attention, dropout 0.1."""
    words = len(tunes(train, test).words)
    return Decoder(words, LENGTH, width=width, layers=2, heads=4, hidden=2 * width, dropout=0.1, relative=True)


def bigrams(train: int = TRAIN, test: int = TEST) -> nn.Module:
    """What the token alone says of the next."""
    return Bigrams(len(tunes(train, test).words))


def shortened(setting: Setting, width: int = 32) -> Setting:
    """A fifth of the tunes, few epochs, a narrow model."""
    sizes = {"train": 200, "test": 40}
    return replace(
        setting,
        load=partial(load, **sizes),
        build=partial(build, **sizes, width=width),
        width=width,
        simplest=partial(bigrams, **sizes),
        owners=partial(owners, **sizes),
        texts=partial(texts, **sizes),
        read_text=partial(read_text, train=sizes["train"], test=sizes["test"]),
        source=partial(source, **sizes),
        recipe=replace(setting.recipe, epochs=4),
        bank_recipe=BankRecipe(subsets=10, seeds=2),
        features=partial(Factorized, 512),
    )


def owners(train: int = TRAIN, test: int = TEST) -> tuple[Sequence[Owner], Sequence[Owner]]:
    """Collection, title, family, number and file of each training and test tune."""
    corpus = tunes(train, test).corpus
    return corpus.train_owners, corpus.test_owners


def texts(train: int = TRAIN, test: int = TEST) -> tuple[Sequence[str], Sequence[str]]:
    """Each training and test tune as ABC, as much of it as the model reads."""
    found = tunes(train, test)
    parts = [
        [to_abc(found.decode(ids[: LENGTH + 1]), str(owner["title"])) for ids, owner in zip(part, whose, strict=True)]
        for part, whose in (
            (found.corpus.train, found.corpus.train_owners),
            (found.corpus.test, found.corpus.test_owners),
        )
    ]
    return parts[0], parts[1]


def read_text(text: str, train: int = TRAIN, test: int = TEST) -> Any:
    """A tune in ABC notation as an example.

    Raises:
        ValueError: If it cannot be read as one voice, or has a token that is in none of the tunes.
    """
    melody = next(read_abc(text if text.lstrip().startswith("X:") else f"X:1\n{text}"), None)
    if melody is None:
        raise ValueError("the text is no tune of one voice in ABC notation")
    return packed([tunes(train, test).encode(_cut(melody), end=len(melody.tokens) < LENGTH)], LENGTH)[0]


def source(train: int = TRAIN, test: int = TEST) -> str:
    """Where the data came from."""
    return tunes(train, test).corpus.source


def on_folder(setting: Setting, folder: Path) -> Setting:
    """The setting on the MIDI files of a folder, at the paper's size; see `byline.settings.midi`."""
    return midi.setting(setting, folder)


def at_width(setting: Setting, width: int) -> Setting:
    """The setting with another number of units per token; a multiple of the heads.

    Raises:
        ValueError: If it is none.
    """
    if width % 8:
        raise ValueError(f"width is {width}; expected a multiple of 8, the heads of a transformer")
    short: Callable[..., Setting] = setting.shortened or shortened
    return widened(setting, width, shortened=partial(short, width=width))


def generate(
    model: Decoder,
    words: Sequence[str],
    start: Sequence[str] = (),
    *,
    seed: int = 0,
    temperature: float = 0.8,
    title: str = "",
) -> tuple[list[int], str]:
    """A tune that a trained model makes up; ``packed([ids], LENGTH)`` makes a test set of it, to be attributed.

    Args:
        model: trained on tunes, in eval mode.
        words: what its tokens stand for, `Tunes.words`.
        start: tokens to begin with, such as ``("M:6/8", "K:G", "L:1/8")``.
        seed: of the draws.
        temperature: below 1 the likely becomes likelier.
        title: of the tune, for the ABC text.

    Returns:
        its token ids, from the start token on, and the tune as ABC text.

    Raises:
        ValueError: If a token of ``start`` is none of the words.
    """
    tunes = Tunes(Corpus((), (), (), (), len(words), ""), tuple(words))
    headings = [place for place, word in enumerate(words) if is_heading(word)]

    def forbid(ids: list[int]) -> list[int]:
        # no tune has padding or a second start in it, nor metre, key and unit anywhere but at its head
        return [PAD, START, *(headings if len(ids) > 3 else ())]

    ids = sample(model, tunes.encode(start), stop=END, temperature=temperature, seed=seed, forbid=forbid)
    return ids, to_abc(tunes.decode(ids), title)


tunes_transformer = Setting(
    name="tunes-transformer",
    description=f"A small Music Transformer on {TRAIN} folk tunes and chorales, {TEST} to explain (needs music21).",
    load=load,
    build=build,
    owners=owners,
    texts=texts,
    read_text=read_text,
    source=source,
    shortened=shortened,
    on_folder=on_folder,
    width=WIDTH,
    at_width=at_width,
    simplest=bigrams,
    **SEQUENCES,
)

__all__ = ["Tunes", "generate", "read", "tunes", "tunes_transformer"]
