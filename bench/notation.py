"""Which tokens for tunes: ABC's, or MIDI events by miditok? Lengths, vocabularies, and held-out bits per note.

The same tunes, cut after the same number of notes, written both ways; the same transformer trained on each. A
representation is the better one where the model spends fewer bits on a note, in shorter sequences.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import environment, median, save, table

FORMAT = 1
NOTES = 40


def first_notes(tokens: Sequence[str], count: int) -> list[str]:
    """A melody up to and with the length of its note number ``count``."""
    from byline.settings.notation import is_pitch

    seen, out = 0, []
    for token in tokens:
        seen += is_pitch(token)
        if seen > count:
            break
        out.append(token)
    return out


def events(tokens: Sequence[str], tokenizer: Any) -> list[int]:
    """Ids of the MIDI that music21 makes of a tune's notes, as they are written: it cannot play some repeats."""
    import music21
    import symusic

    from byline.settings.notation import to_abc

    read = music21.converter.parseData(to_abc(tokens), format="abc").parts[0].flatten()
    notes = music21.stream.Stream()
    for meter in list(read.getElementsByClass(music21.meter.TimeSignature))[:1]:
        notes.append(music21.meter.TimeSignature(meter.ratioString))
    for one in read.notesAndRests:
        made = music21.note.Note(one.pitch) if one.isNote else music21.note.Rest()
        made.quarterLength = one.quarterLength
        notes.append(made)
    with tempfile.NamedTemporaryFile(suffix=".mid") as file:
        notes.write("midi", file.name)
        score = symusic.Score(file.name)
    found = tokenizer(score)
    return list(found[0].ids if isinstance(found, list) else found.ids)


def written(tunes: list[list[str]]) -> dict[str, list[list[int]]]:
    """Name of the representation -> ids of each tune."""
    from miditok import REMI, MIDILike, TokenizerConfig

    config = TokenizerConfig(
        use_programs=False, use_chords=False, use_tempos=False, use_time_signatures=True, num_velocities=1
    )
    words = {word: i for i, word in enumerate(sorted({token for tune in tunes for token in tune}))}
    return {
        "ABC tokens": [[words[token] for token in tune] for tune in tunes],
        "REMI (miditok)": [events(tune, REMI(config)) for tune in tunes],
        "MIDI-like (miditok)": [events(tune, MIDILike(config)) for tune in tunes],
    }


def bits_per_note(ids: list[list[int]], notes: int, held_out: int, epochs: int) -> float:
    """What a transformer trained on the first sequences spends on the others, in bits per note."""
    import math

    import torch

    import byline
    from byline.settings.corpus import packed
    from byline.settings.transformer import Decoder
    from byline.training import Recipe, train_one

    # 0 is padding, 1 the start and 2 the end; only tokens that occur count
    known = {token: i + 3 for i, token in enumerate(sorted({token for tune in ids for token in tune}))}
    sequences = [[1, *(known[token] for token in tune), 2] for tune in ids]
    length = max(map(len, sequences)) - 1
    train, test = packed(sequences[held_out:], length), packed(sequences[:held_out], length)

    def build() -> torch.nn.Module:
        return Decoder(len(known) + 3, length, relative=True)

    task = byline.Task(build().eval(), output="language-modeling")
    recipe = Recipe("adamw", lr=3e-3, batch_size=32, epochs=epochs, schedule="linear", weight_decay=0.01)
    run = train_one(build, train, recipe, task_loss=task.loss)
    task.model.load_state_dict(run.state_dict)
    inputs, targets = test.tensors
    with torch.no_grad():
        loss = task.loss(task.model, (inputs, targets)) * (targets >= 0).sum(1)
    return float(loss.sum()) / math.log(2) / notes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  .venv/bin/python bench/notation.py --tunes 400 --epochs 10",
    )
    parser.add_argument("--tunes", type=int, default=400, help="how many, a fifth of them held out (%(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="of training; 0 leaves it out (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    import numpy as np

    from byline.settings.notation import is_pitch
    from byline.settings.tunes import COLLECTIONS, corpus_folder, melodies

    about = environment()
    folder, rng = corpus_folder(), np.random.default_rng(0)
    every = [melody for name in COLLECTIONS if name != "bach" for melody in melodies(folder, name)]
    chosen = [first_notes(every[i].tokens, NOTES) for i in rng.permutation(len(every))[: options.tunes]]
    held_out = max(1, options.tunes // 5)
    notes = [sum(map(is_pitch, tune)) for tune in chosen]
    figures = []
    for name, ids in written(chosen).items():
        lengths = [len(tune) / n for tune, n in zip(ids, notes, strict=True)]
        bits = bits_per_note(ids, sum(notes[:held_out]), held_out, options.epochs) if options.epochs else None
        used = len({token for tune in ids for token in tune})
        figures.append({"name": name, "per_note": median(lengths), "vocabulary": used, "bits": bits})
    header = ["tokens", "per note, median", "vocabulary", "held-out bits per note"]
    cells = [
        [f["name"], f"{f['per_note']:.2f}", str(f["vocabulary"]), "-" if f["bits"] is None else f"{f['bits']:.2f}"]
        for f in figures
    ]
    print(table(header, cells))
    save(options.json, {"format": FORMAT, "environment": about, "tunes": options.tunes, "figures": figures})


if __name__ == "__main__":
    main()
