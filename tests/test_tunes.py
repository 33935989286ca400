"""The setting tunes-transformer: notation, data, the relative transformer, MIDI folders, and the comparison on it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import decoders
from byline import report, settings
from byline.settings import bench, grid, midi, notation, tunes
from byline.settings.base import BankRecipe
from byline.settings.corpus import packed
from byline.settings.rows import Row
from byline.settings.transformer import Decoder, by_distance, sample

JIG = """% a comment
X: 7
T:The Tester
T:another name
R:double jig
M:6/8
L:1/8
Z:somebody
K:Edor % Dorian
"Em"E2B {c}.BAB|~B3 (3(EFG) [Ac]2|: !trill!d>e f-|f/2g3/4 z2 ^c'=B,:|
|:G2 G2 (GA)|[1 B6 :|[2 B4-B2 ||
"""


def test_a_tune_is_read_token_by_token() -> None:
    (tune,) = notation.read_abc(JIG, "jigs.abc")
    assert (tune.title, tune.number, tune.rhythm, tune.file) == ("The Tester", "7", "double jig", "jigs.abc")
    assert tune.tokens[:3] == ["M:6/8", "K:Edor", "L:1/8"]
    assert " ".join(tune.tokens[3:]) == (
        "E 2 B B A B | B 3 (3 E F G A 2 |: d > e f - | f 1/2 g 3/4 z 2 ^c' =B, :: "
        "G 2 G 2 G A | [1 B 6 :| [2 B 4 - B 2 ||"
    )


def test_the_commonest_note_is_the_unit_so_that_notation_does_not_matter() -> None:
    eighths = "X:1\nM:2/2\nL:1/8\nK:G\nGABc d2e2|g4 G4|]\n"
    sixteenths = "X:1\nM:2/2\nL:1/16\nK:G\nG2A2B2c2 d4e4|g8 G8|]\n"
    by_default = "X:1\nM:2/2\nK:G\nGABc d2e2|g4 G4|]\n"
    one, two, three = (next(notation.read_abc(text)).tokens for text in (eighths, sixteenths, by_default))
    assert one == two == three
    assert one[:4] == ["M:2/2", "K:G", "L:1/8", "G"]
    # below three quarters of a whole note to the bar, the standard's default is a sixteenth
    assert next(notation.read_abc("X:1\nM:2/4\nK:G\nGABc GABc|\n")).tokens[2] == "L:1/16"


@pytest.mark.parametrize(
    ("music", "problem"),
    [
        ("K:G\nV:1\nGAB|\n", "several voices"),
        ("K:G\n[V:1] GAB|\n", "field"),
        ("K:H\nGAB|\n", "key"),
        ("K:G\nGAB @ c|\n", "'@ c|"),
        ("K:G\n|]\n", "no notes"),
        ("K:G\nG99 A|\n", "length"),
    ],
)
def test_what_is_no_single_melody_is_left_out(music: str, problem: str) -> None:
    text = f"X:1\nM:4/4\nL:1/8\n{music}"
    with pytest.raises(notation.NotationError, match=problem):
        notation.read_tune(text)
    assert list(notation.read_abc(text)) == []


def test_a_change_of_key_ends_the_melody() -> None:
    tune = notation.read_tune("X:1\nM:4/4\nL:1/8\nK:G\nGABc|\nK:D\ndefg|\n")
    assert tune.tokens[3:] == ["G", "A", "B", "c", "|"]


@pytest.mark.parametrize(
    ("key", "raised"),
    [
        ("C", {}),
        ("G", {"F": 1}),
        ("Em", {"F": 1}),
        ("Ador", {"F": 1}),
        ("Amix", {"F": 1, "C": 1}),
        ("Bphr", {"F": 1}),
        ("Eb", {"B": -1, "E": -1, "A": -1}),
        ("F#m", {"F": 1, "C": 1, "G": 1}),
        ("Flyd", {}),
    ],
)
def test_key_signatures(key: str, raised: dict[str, int]) -> None:
    assert notation.signature(key) == raised


def test_abc_text_reads_back_as_the_same_tokens() -> None:
    (tune,) = notation.read_abc(JIG)
    text = notation.to_abc(tune.tokens, "A\nb", number=3)
    assert text.startswith("X:3\nT:A b\nM:6/8\nL:1/8\nK:Edor\n")
    assert notation.read_tune(text).tokens == tune.tokens


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few files of each collection of music21's corpus."""
    decoders.needs("music21")
    whole, part = tunes.corpus_folder(), tmp_path_factory.mktemp("corpus")
    for name in tunes.COLLECTIONS:
        (part / name).mkdir()
        files = sorted((whole / name).glob("*.mxl" if name == "bach" else "*.abc"))
        for file in files[: {"oneills1850": 2, "airdsAirs": 1}.get(name, 24)]:
            shutil.copy(file, part / name)
    return part


@pytest.fixture(scope="module")
def few(corpus: Path) -> tunes.Tunes:
    return tunes.read(corpus, 60, 8, rare=2)


def sounds(score: Any) -> list[tuple[int, Fraction]]:
    """MIDI pitch and quarters of each note, the first of a chord; a tie's notes stay apart."""
    notes = [note for note in score.flatten().notes if not note.duration.isGrace]
    return [(note.pitches[0].midi, Fraction(note.duration.quarterLength)) for note in notes]


def test_melodies_sound_as_music21_reads_them(corpus: Path) -> None:
    import music21

    checked = 0
    for path in sorted((corpus / "airdsAirs").glob("*.abc"))[:1]:
        parts = path.read_text().split("\n\n")
        for part in [p for p in parts if p.startswith("X:")][1:9:2]:
            tune = notation.read_tune(part)
            ours = music21.converter.parseData(notation.to_abc(tune.tokens), format="abc")
            # of the original only what both read: no chords, no text between the notes
            theirs = music21.converter.parseData(re.sub(r"(?m)^%%.*\n", "", part), format="abc")
            assert sounds(ours) == sounds(theirs), tune.title
            checked += 1
    assert checked == 4
    for path in sorted((corpus / "bach").glob("*.mxl"))[:2]:
        try:
            tune = notation.read_musicxml(path)
        except notation.NotationError:
            continue
        ours = music21.converter.parseData(notation.to_abc(tune.tokens), format="abc")
        soprano = next(p for p in music21.converter.parse(path).parts if str(p.partName).lower().startswith("sopr"))
        assert sounds(ours) == sounds(soprano), tune.title
        checked += 1
    assert checked > 4


def test_the_data_are_distinct_melodies_with_their_owners(few: tunes.Tunes) -> None:
    corpus = few.corpus
    assert (len(corpus.train), len(corpus.test)) == (60, 8)
    assert len({tuple(ids) for ids in (*corpus.train, *corpus.test)}) == 68
    owners = [*corpus.train_owners, *corpus.test_owners]
    assert sum(owner["collection"] == "Bach's chorales" for owner in owners) == 7
    assert len({owner["collection"] for owner in owners}) == 4
    assert all(owner["title"] and owner["file"] for owner in owners)
    assert {owner["family"] for owner in owners} >= {"chorale", "reel"}
    inputs, targets = corpus.data(tunes.LENGTH)[0].tensors
    assert inputs.shape == targets.shape == (60, tunes.LENGTH)
    assert bool((inputs[:, 0] == tunes.START).all())
    for row, ids in enumerate(corpus.train):
        kept = targets[row] >= 0
        assert targets[row][kept].tolist() == ids[1 : tunes.LENGTH + 1]
        assert inputs[row, 1:][kept[:-1]].tolist()[: len(ids) - 2] == ids[1 : kept.sum()]
        assert few.encode(few.decode(ids))[: len(ids)] == ids[: len(ids) - (ids[-1] == tunes.END)]
    assert "music21" in corpus.source
    with pytest.raises(ValueError, match="none of the tunes"):
        few.encode(["M:7/13"])


def test_the_same_tunes_are_drawn_again_and_too_few_are_refused(corpus: Path, few: tunes.Tunes) -> None:
    assert tunes.read(corpus, 60, 8, rare=2) == few
    with pytest.raises(ValueError, match=r"has \d+ tunes that can be used; expected"):
        tunes.read(corpus, 6000, 8)


def test_sequences_without_a_target_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 1 tokens"):
        packed([[1, 2], [1]], 4)


def test_without_music21_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"byline\[music\]"):
        tunes.corpus_folder()


# the model


def test_scores_by_distance_are_those_of_the_definition() -> None:
    """Huang et al. 2018, equation 3: query t meets the embedding of its distance to key s."""
    torch.manual_seed(0)
    q, e = torch.randn(2, 3, 5, 4), torch.randn(7, 4)  # embeddings of the distances 6, 5, …, 0
    found = by_distance(q @ e.T)
    for t in range(5):
        for s in range(t + 1):
            torch.testing.assert_close(found[..., t, s], q[..., t, :] @ e[6 - (t - s)])


def test_attention_looks_back_only_and_by_distance() -> None:
    model = decoders.miniature(relative=True)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    other = ids.clone()
    other[0, 4] = 9
    torch.testing.assert_close(model(ids)[:, :4], model(other)[:, :4])
    assert not torch.allclose(model(ids)[:, 4:], model(other)[:, 4:])
    # without the embeddings of distances, order means nothing to a single layer
    one = Decoder(13, 7, width=8, layers=1, heads=2, hidden=6, relative=True).eval()
    turned = torch.tensor([[2, 1, 3]])
    assert not torch.allclose(one(ids[:, :3])[0, 2], one(turned)[0, 2])
    torch.nn.init.zeros_(one.blocks[0].attention.distance.weight)
    torch.testing.assert_close(one(ids[:, :3])[0, 2], one(turned)[0, 2])


def test_sequences_beyond_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="8 tokens; expected at most the model's 7"):
        decoders.miniature(relative=True)(torch.ones(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="multiple of the 3 heads"):
        Decoder(5, 5, width=8, heads=3)


KINDS = ("independent", "dropout", "forward-only", "weight noise", "trajectory", "LoRA")


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_per_example_autograd(kind: str) -> None:
    decoders.check_exactness(True, kind)


def test_padding_and_batches_change_nothing() -> None:
    decoders.check_padding_and_batches(True)


def test_masks_reach_every_dropout_layer() -> None:
    model = decoders.miniature(relative=True)
    found = sum(isinstance(module, torch.nn.Dropout) for module in model.modules())
    assert found == 1 + 2 * 3


# tunes made up


def test_a_made_up_tune_is_seeded_and_reads_as_music(few: tunes.Tunes) -> None:
    torch.manual_seed(0)
    model = Decoder(len(few.words), tunes.LENGTH, width=16, layers=1, heads=2, hidden=16, relative=True).eval()
    start = ("M:6/8", "K:G", "L:1/8")
    state = torch.get_rng_state()
    ids, text = tunes.generate(model, few.words, start, seed=3, title="Made up")
    assert torch.equal(state, torch.get_rng_state())
    assert (ids, text) == tunes.generate(model, few.words, start, seed=3, title="Made up")
    assert ids != tunes.generate(model, few.words, start, seed=4)[0]
    assert ids[0] == tunes.START
    assert not {tunes.PAD, tunes.END} & set(ids)
    assert text.startswith("X:1\nT:Made up\nM:6/8\nL:1/8\nK:G\n")
    assert len(ids) <= tunes.LENGTH
    # cold enough, the likeliest token wins
    cold = sample(model, [1], stop=2, temperature=1e-4, most=2)
    assert cold[1] == int(model(torch.tensor([[1]]))[0, 0].argmax())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"start": []}, "start has 0 tokens"),
        ({"start": [1], "most": 99}, "most is 99"),
        ({"start": [1], "temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        sample(decoders.miniature(relative=True), stop=2, **arguments)


# the comparison


@pytest.fixture
def small(few: tunes.Tunes, monkeypatch: pytest.MonkeyPatch) -> settings.Setting:
    monkeypatch.setattr(tunes, "tunes", lambda train=0, test=0: few)
    full = settings.get("tunes-transformer")
    recipe = replace(full.recipe, epochs=2, batch_size=16)
    return replace(full, build=lambda: tunes.build(width=8), recipe=recipe, shortened=None)


ROWS = (
    Row("independent", 1),
    Row("dropout", 1, 2, {"p": 0.1}),
    Row("forward-only", 1, 2, {"p": 0.1}),
    Row("lora", 1, 1, {"rank": 2, "epochs": 1, "lr": 1e-3}),
    Row("trajectory", 1, 2),
)
BANK = BankRecipe(subsets=3, fraction=0.5, seeds=1)


def test_the_comparison_runs_and_resumes(small: settings.Setting, tmp_path: Path) -> None:
    said: list[str] = []
    result = bench.run(small, tmp_path, rows=ROWS, bank_recipe=BANK, command="byline bench", tell=said.append)
    assert [row["kind"] for row in result["rows"]] == [row.kind for row in ROWS]
    assert all(row["training"]["flops"] > 0 and row["space"] > 0 for row in result["rows"])
    assert any("music21" in note for note in result["notes"])
    assert any("Factorized" in note for note in result["notes"])
    assert "tunes-transformer" in report.build(result, tmp_path / "report.html").read_text()
    first = result["owners"][0]
    assert first["title"] == small.owners()[1][0]["title"]
    assert first["proponents"][0]["title"] == small.owners()[0][first["proponents"][0]["index"]]["title"]
    again = bench.run(small, tmp_path, rows=ROWS, bank_recipe=BANK, command="byline bench", tell=said.append)
    assert again["rows"] == result["rows"]
    assert sum("found" in sentence for sentence in said) >= 2


def test_a_grid_leaves_out_measures_of_labels(small: settings.Setting, tmp_path: Path) -> None:
    options = {"ensembles": ["independent-1"], "bank_recipe": BANK, "queries": 4}
    result = grid.run(small, tmp_path, method_names=["trak", "grad-cos", "representer"], **options)
    assert [measure["name"] for measure in result["measures"]] == ["lds", "overlap"]
    refused = {cell["method"]: cell["refused"] for cell in result["cells"]}
    assert refused["trak"] is refused["grad-cos"] is None
    assert refused["representer"]
    with pytest.raises(ValueError, match="mislabel needs one label per example"):
        grid.run(small, tmp_path, measures=["lds", "mislabel"], **options)


def test_the_short_form_is_smaller() -> None:
    full = settings.get("tunes-transformer")
    setting, bank = bench.form(full, True, None)
    assert setting.recipe.epochs < full.recipe.epochs
    assert bank.subsets < full.bank_recipe.subsets
    assert bench.form(full, False, None) == (full, full.bank_recipe)
    assert bench.form(full, True, BANK)[1] == BANK


# a folder of MIDI


def write_midi(folder: Path, files: int = 3, notes: int = 150) -> None:
    import symusic

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        score = symusic.Score(480)
        for low in (60, 40):
            track = symusic.Track()
            for i in range(notes):
                pitch = low + (i * (number + 3)) % 12
                track.notes.append(symusic.Note(time=i * 240, duration=200, pitch=pitch, velocity=70 + number))
            score.tracks.append(track)
        score.dump_midi(str(folder / f"piece {number}.mid"))


def test_a_folder_of_midi_gives_the_papers_size(tmp_path: Path) -> None:
    decoders.needs("miditok", "symusic")
    write_midi(tmp_path / "2004")
    setting = settings.get("tunes-transformer").variant(tmp_path)
    inputs, targets = setting.train_set.tensors
    assert inputs.shape[1] == targets.shape[1] == 256
    train, test = setting.owners()
    assert {owner["title"] for owner in train} == {"piece 1", "piece 2"}
    assert {owner["title"] for owner in test} == {"piece 0"}
    assert train[0]["file"].startswith("2004/")
    # every event of a file is in exactly one of its windows
    corpus, tokenizer = midi.read(tmp_path), midi._tokenizer()
    own = sorted((o["first"], ids[1:]) for ids, o in zip(corpus.test, corpus.test_owners, strict=True))
    joined = [i for _, ids in own for i in ids]
    assert joined == [*midi.events(tmp_path / "2004" / "piece 0.mid", tokenizer), tokenizer["EOS_None"]]
    assert sum(tokenizer[int(i)].startswith("NoteOn") for i in joined) == 300
    with torch.device("meta"):
        model = setting.build()
    assert len(model.blocks) == 6
    assert model.blocks[0].attention.heads == 8
    assert model.tokens.embedding_dim == 512
    assert model.blocks[0].network[0].out_features == 1024
    assert (setting.recipe.optimizer, setting.recipe.lr, setting.recipe.epochs) == ("adam", 1e-4, 20)
    narrow = setting.variant(width=16)
    short = narrow.shortened(narrow)
    assert short.build().tokens.embedding_dim == short.width == 16
    assert short.variant(width=24).build().tokens.embedding_dim == 24
    assert len(short.simplest().table.weight) == short.build().tokens.num_embeddings
    assert short.task().output(short.build().eval(), short.test_set[:2]).isfinite().all()


def test_what_is_no_folder_of_midi_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = settings.get("tunes-transformer")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        setting.variant(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has 0 MIDI files"):
        setting.variant(tmp_path)
    for name in ("a.mid", "b.midi"):
        (tmp_path / name).write_bytes(b"not MIDI at all")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "miditok", None)
        with pytest.raises(ModuleNotFoundError, match=r"byline\[music\]"):
            setting.variant(tmp_path)
    decoders.needs("miditok", "symusic")
    with pytest.raises(ValueError, match=r"(a.mid|b.midi) cannot be read as MIDI"):
        _ = setting.variant(tmp_path).train_set


def test_a_width_is_kept_by_the_short_form_and_a_multiple_of_the_heads(small: settings.Setting) -> None:
    wide = settings.get("tunes-transformer").variant(width=24)
    for setting in (wide, wide.shortened(wide)):
        assert setting.build().tokens.embedding_dim == 24
    with pytest.raises(ValueError, match="width is 12; expected a multiple of 8"):
        settings.get("tunes-transformer").variant(width=12)


def test_owners_are_plain_data(few: tunes.Tunes, small: settings.Setting) -> None:
    train, test = small.owners()
    assert json.loads(json.dumps([*train, *test])) == [*few.corpus.train_owners, *few.corpus.test_owners]


def test_a_tune_that_somebody_brings_is_read_as_its_own_text_is(few: tunes.Tunes, small: settings.Setting) -> None:
    assert small.texts is not None
    assert small.read_text is not None
    texts, _ = small.texts()
    assert len(texts) == 60
    inputs, targets = small.train_set.tensors
    whole = [place for place, ids in enumerate(few.corpus.train) if ids[-1] == tunes.END and len(ids) < tunes.LENGTH]
    assert len(whole) > 5
    for place in whole:
        ids, wanted = small.read_text(texts[place])
        assert torch.equal(ids, inputs[place])
        assert torch.equal(wanted, targets[place])
    # the line of its number may be left out
    assert torch.equal(small.read_text(texts[whole[0]].split("\n", 1)[1])[0], inputs[whole[0]])
    odd = re.sub(r"M:\S+", "M:7/8", texts[whole[0]])
    for text, problem in (("", "no tune"), ("<script>", "no tune"), (odd, "none of the tunes")):
        with pytest.raises(ValueError, match=problem):
            small.read_text(text)
