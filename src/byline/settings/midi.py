"""A folder of MIDI files, such as MAESTRO's, as sequences: `tunes-transformer --data FOLDER` at the paper's size.

Performances become events (note on, note off, time, velocity: Oore et al. 2018, arXiv 1808.03715, as the Music
Transformer reads them) by miditok, and are cut into windows. Test windows come from files of their own.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from byline.features import Factorized
from byline.settings.base import BankRecipe, Setting
from byline.settings.corpus import Corpus, Owner
from byline.settings.transformer import Bigrams, Decoder
from byline.training import Recipe

LENGTH = 256
TRAIN, TEST = 5000, 178
"""Windows at most; a folder with fewer gives what it has."""
HELD_OUT = 10
"""Every tenth file is a test file."""
WIDTH, LAYERS, HEADS, HIDDEN = 512, 6, 8, 1024


def _tokenizer() -> Any:
    """Miditok's events; one class, so that two machines number the tokens alike.

    Raises:
        ModuleNotFoundError: If miditok is not installed.
    """
    try:
        from miditok import MIDILike, TokenizerConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a folder of MIDI files is read with miditok, and {error.name} is not installed: "
            "pip install 'byline[music]'"
        ) from None
    return MIDILike(TokenizerConfig(use_programs=False, use_chords=False, use_tempos=False, use_time_signatures=False))


def files_of(folder: Path) -> list[Path]:
    """The MIDI files of a folder and of those in it, sorted.

    Raises:
        FileNotFoundError: If it is no folder, or has fewer than two.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected one with MIDI files")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".mid", ".midi"))
    if len(found) < 2:
        raise FileNotFoundError(
            f"{folder} has {len(found)} MIDI files (.mid, .midi); expected at least 2, one of them to test on"
        )
    return found


def events(path: Path, tokenizer: Any) -> list[int]:
    """Token ids of a file, the notes of all its pitched tracks together.

    Raises:
        ValueError: If it is no MIDI file, or has no notes.
    """
    import symusic

    try:
        score: Any = symusic.Score(str(path))
    except Exception as error:  # symusic raises bare C++ exceptions
        raise ValueError(f"{path} cannot be read as MIDI ({str(error).strip()})") from None
    tracks = [track for track in score.tracks if not track.is_drum]
    for track in tracks[1:]:
        tracks[0].notes.extend(track.notes)
    if not tracks or not tracks[0].notes:
        raise ValueError(f"{path} has no notes; expected a MIDI file of pitched instruments")
    tracks[0].notes.sort()
    score.tracks = tracks[:1]
    return list(tokenizer(score)[0].ids)


def windows(path: Path, root: Path, tokenizer: Any, length: int) -> Iterator[tuple[list[int], Owner]]:
    """Consecutive windows of a file, a start token before each, and where they come from."""
    ids = events(path, tokenizer)
    for number, first in enumerate(range(0, len(ids), length)):
        part = ids[first : first + length]
        ends = [tokenizer["EOS_None"]] if first + length >= len(ids) else []
        owner: Owner = {
            "collection": path.parent.name,
            "title": path.stem,
            "number": number,
            "file": path.relative_to(root).as_posix(),
            "first": first,
        }
        yield [tokenizer["BOS_None"], *part, *ends], owner


@cache
def read(folder: Path, train: int = TRAIN, test: int = TEST, length: int = LENGTH) -> Corpus:
    """Windows of the files of a folder, drawn at random where there are more than wanted.

    Args:
        folder: of MIDI files.
        train: training windows at most.
        test: test windows at most.
        length: tokens of a window.

    Raises:
        FileNotFoundError: If there are fewer than two files.
        ModuleNotFoundError: If miditok is not installed.
        ValueError: If a file is no MIDI file.
    """
    found, tokenizer, rng = files_of(folder), _tokenizer(), np.random.default_rng(0)
    held_out = set(found[:: max(2, min(HELD_OUT, len(found)))])

    def drawn(files: Iterable[Path], most: int) -> tuple[list[list[int]], list[Owner]]:
        every = [window for path in files for window in windows(path, folder, tokenizer, length)]
        kept = [every[i] for i in rng.permutation(len(every))[:most]]
        return [ids for ids, _ in kept], [owner for _, owner in kept]

    train_ids, train_owners = drawn((path for path in found if path not in held_out), train)
    test_ids, test_owners = drawn(sorted(held_out), test)
    version = importlib.metadata.version("miditok")
    return Corpus(
        train_ids,
        test_ids,
        train_owners,
        test_owners,
        vocabulary=len(tokenizer),
        source=f"The windows are those of {len(found)} MIDI files in {folder}, events of miditok {version}.",
    )


def setting(base: Setting, folder: Path) -> Setting:
    """The paper's Music Transformer on a folder: 6 layers, 8 heads, width 512, length 256, Adam 1e-4, 20 epochs."""

    def build(width: int = WIDTH) -> nn.Module:
        return Decoder(read(folder).vocabulary, LENGTH, width, LAYERS, HEADS, HIDDEN * width // WIDTH, 0.1, True)

    files_of(folder)
    _tokenizer()
    return replace(
        base,
        description=f"The paper's Music Transformer on the MIDI files in {folder}.",
        load=lambda: read(folder).data(LENGTH),
        build=build,
        width=WIDTH,
        simplest=lambda: Bigrams(read(folder).vocabulary),
        owners=lambda: (read(folder).train_owners, read(folder).test_owners),
        texts=None,
        read_text=None,
        source=lambda: read(folder).source,
        recipe=Recipe(optimizer="adam", lr=1e-4, batch_size=32, epochs=20),
        shortened=partial(shortened, folder=folder),
    )


def shortened(base: Setting, folder: Path, width: int = 32) -> Setting:
    """The same files, few of their windows, and a narrow model."""
    few = {"train": 200, "test": 20, "length": 64}

    def build(width: int = width) -> nn.Module:
        return Decoder(read(folder, **few).vocabulary, few["length"], width, 2, 4, 2 * width, 0.1, True)

    return replace(
        base,
        load=lambda: read(folder, **few).data(few["length"]),
        build=build,
        width=width,
        simplest=lambda: Bigrams(read(folder, **few).vocabulary),
        owners=lambda: (read(folder, **few).train_owners, read(folder, **few).test_owners),
        source=lambda: read(folder, **few).source,
        recipe=replace(base.recipe, epochs=2, lr=1e-3),
        bank_recipe=BankRecipe(subsets=4, seeds=2),
        features=partial(Factorized, 512),
    )
