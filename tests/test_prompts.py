"""Prompts and texts under tokenizers that put something before a text, after it, both or nothing."""

from __future__ import annotations

import pytest

import language

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("byline.hf")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "cat", "sat", "here", "a", "dog"]


def tokenizer(template, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokens = [(w, WORDS.index(w)) for w in ("<s>", "</s>") if w in template]
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


TEMPLATES = ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A </s> </s>", "</s> $A"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", ["sat here", "sat", "<s> sat </s>"])
@pytest.mark.parametrize("prompt", ["the cat", "the", "</s> the", "<s>"])
def test_a_prompt_and_its_text_are_one_text(template, text, prompt):
    made = tokenizer(template)
    row = hf.dataset([text], made, prompts=[prompt])[0]
    assert row["input_ids"].tolist() == made(f"{prompt} {text}")["input_ids"]
    # the text and what ends it are the targets
    ending = template.partition("$A")[2].split()
    targets = [token for token in row["labels"].tolist() if token != -100]
    assert targets == [WORDS.index(w) for w in [*text.split(), *ending]]


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_prompt_is_no_more_than_a_text(template):
    made = tokenizer(template)
    plain, asked = hf.dataset(["the cat"], made), hf.dataset(["the cat"], made, prompts=[""])
    assert plain.ids[0].tolist() == asked.ids[0].tolist() == made("the cat")["input_ids"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_continuation_follows_its_prompt_directly(template):
    made = tokenizer(template)
    found = hf.generated(language.gpt2(vocabulary=len(WORDS)), made, ["the cat", "a"], max_new_tokens=3)
    head = [WORDS.index(w) for w in template.partition("$A")[0].split()]
    for prompt, ids, labels in zip(["the cat", "a"], found.ids, found.labels, strict=True):
        before = head + [WORDS.index(w) for w in prompt.split()]
        assert ids[: len(before)].tolist() == before
        assert (labels == -100).tolist() == [True] * len(before) + [False] * (len(ids) - len(before))


def test_an_empty_prompt_needs_something_to_begin_with():
    model = language.gpt2(vocabulary=len(WORDS))
    assert hf.generated(model, tokenizer("<s> $A </s>"), [""], max_new_tokens=2).ids[0][0] == 1
    with pytest.raises(ValueError, match=r"prompts\[0\] is empty; expected at least one token"):
        hf.generated(model, tokenizer("$A </s>"), [""], max_new_tokens=2)


def test_a_vocabulary_of_special_tokens_alone():
    """Nothing tells the frame from the text but which tokens may end one."""
    made = tokenizer("<s> $A </s>", additional_special_tokens=WORDS[4:])
    assert hf.dataset(["sat"], made, prompts=["the"]).ids[0].tolist() == [1, 4, 6, 2]
