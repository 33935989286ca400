"""Hugging Face: tasks, datasets, generated samples, and checkpoints along a Trainer's run."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import byline
import language
import reference as ref

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("byline.hf")


@pytest.fixture
def made():
    from types import SimpleNamespace

    tokenizer = language.tokenizer()
    model = language.gpt2()
    return SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        task=hf.task(model, tokenizer),
        train=hf.dataset(language.texts(8), tokenizer, model=model),
        test=hf.dataset(language.texts(3, seed=1), tokenizer),
    )


def side(model, data):
    return ref.side(model, data, ref.language_modeling, collate=data.collate_fn)


@pytest.mark.parametrize("adapted", [False, True])
def test_scores_of_a_model_and_its_texts(made, adapted):
    model = language.with_adapter(made.model) if adapted else made.model
    task = hf.task(model, made.tokenizer)
    found = byline.GradDot(task, byline.Independent([model]), batch_size=3, progress=False).fit(made.train)
    expected = ref.graddot(side(model, made.test), side(model, made.train))
    ref.assert_close(found.attribute(made.test).values, expected, 5e-4)
    part = found.attribute(Subset(made.test, [2, 0]))
    ref.assert_close(part.values, expected[[2, 0]], 5e-4)
    count = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad)
    assert f"{count:,} attributed" in repr(task)
    assert adapted == all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_an_adapter_loaded_for_inference_is_attributed(made, tmp_path):
    from peft import PeftModel

    own = language.with_adapter(copy.deepcopy(made.model))
    own.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(made.model), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    found = [
        byline.GradDot(hf.task(m), byline.Independent([m]), progress=False).fit(made.train).attribute(made.test).values
        for m in (own, loaded)
    ]
    assert (found[0] == found[1]).all()


def test_texts_are_cut_prompted_and_padded(made):
    plain = hf.dataset(["the cat sat on", "a dog"], made.tokenizer, 3)
    assert [len(i["input_ids"]) for i in plain] == [3, 2]
    batch = plain.collate_fn([plain[0], plain[1]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"][1].tolist() == [-100, int(plain.ids[1][1]), -100]
    assert batch["input_ids"][1, 2] == made.tokenizer.pad_token_id
    asked = hf.dataset(["sat on"], made.tokenizer, prompts=["the cat"])
    assert asked.ids[0].tolist() == hf.dataset(["the cat sat on"], made.tokenizer).ids[0].tolist()
    assert (asked.labels[0] == -100).tolist() == [True, True, False, False]


def test_generated_samples_have_the_generated_tokens_as_targets(made):
    one = hf.generated(made.model, made.tokenizer, language.PROMPTS, seed=3, max_new_tokens=5)
    alone = hf.generated(made.model, made.tokenizer, language.PROMPTS[:1], seed=3, max_new_tokens=5)
    other = hf.generated(made.model, made.tokenizer, language.PROMPTS, seed=4, max_new_tokens=5)
    assert torch.equal(one.ids[0], alone.ids[0])
    assert any(not torch.equal(a, b) for a, b in zip(one.ids, other.ids, strict=True))
    for prompt, ids, labels, text in zip(language.PROMPTS, one.ids, one.labels, one.texts, strict=True):
        before = len(prompt.split())
        assert made.tokenizer.decode(ids[:before]) == prompt
        assert (labels[:before] == -100).all()
        assert torch.equal(labels[before:], ids[before:])
        assert 1 <= len(ids) - before <= 5
        assert made.tokenizer.decode(ids[before:]) == text
    scores = byline.GradDot(made.task, byline.Independent([made.model]), progress=False).fit(made.train)
    ref.assert_close(
        scores.attribute(one).values, ref.graddot(side(made.model, one), side(made.model, made.train)), 5e-4
    )


def test_what_does_not_fit_is_refused(made):
    small = language.gpt2(vocabulary=12)
    with pytest.raises(ValueError, match="tokenizer has tokens up to 18, and the model's vocabulary ends at 11"):
        hf.task(small, made.tokenizer)
    with pytest.raises(ValueError, match="tokenizer has tokens up to 18"):
        hf.dataset(["a cat"], made.tokenizer, model=small)
    with pytest.raises(TypeError, match="model is a Linear; expected a causal language model"):
        hf.task(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="without a language-modelling head"):
        hf.task(made.model.transformer)
    config = transformers.T5Config(vocab_size=19, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        hf.task(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(TypeError, match="texts is one string"):
        hf.dataset("a cat", made.tokenizer)
    with pytest.raises(TypeError, match=r"texts\[1\] is a int"):
        hf.dataset(["a cat", 3], made.tokenizer)
    with pytest.raises(ValueError, match=r"texts\[1\] leaves no token to predict"):
        hf.dataset(["a cat", "dog"], made.tokenizer)
    with pytest.raises(ValueError, match=r"texts\[0\] leaves no token to predict.*max_length=2"):
        hf.dataset(["sat"], made.tokenizer, 2, prompts=["the cat"])
    with pytest.raises(ValueError, match="prompts has 1 strings; expected one per text, 2"):
        hf.dataset(["sat", "ran"], made.tokenizer, prompts=["the cat"])
    with pytest.raises(ValueError, match=r"prompts\[1\] has 3 tokens, which with max_new_tokens=14 .* context of 16"):
        hf.generated(made.model, made.tokenizer, ["the cat", "the cat sat"], max_new_tokens=14)
    long = hf.dataset(["the cat", " ".join(["cat"] * 17)], made.tokenizer)
    with pytest.raises(ValueError, match=r"train_set\[1\]: is 17 tokens long .* context is 16"):
        byline.GradDot(made.task, byline.Independent([made.model]), progress=False).fit(long)


def trained(model, data, folder, checkpoints, **arguments):
    pytest.importorskip("accelerate")
    arguments = {"max_steps": 6, "per_device_train_batch_size": len(data), "learning_rate": 1e-3, **arguments}
    settings = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, optim="sgd",
        max_grad_norm=0, weight_decay=0, logging_strategy="no", lr_scheduler_type="linear", **arguments,
    )  # fmt: skip
    transformers.Trainer(
        model, settings, train_dataset=data, data_collator=data.collate_fn, callbacks=[checkpoints]
    ).train()
    return model.eval()


@pytest.mark.parametrize("adapted", [False, True])
def test_tracin_over_recorded_checkpoints_says_what_training_did(made, adapted, tmp_path):
    """Plain gradient descent with small steps: a test output moves by the sum of the scores of all examples."""
    data = hf.dataset([t for t in language.texts(40) if len(t.split()) == 5], made.tokenizer)
    model = language.with_adapter(made.model) if adapted else made.model
    task = hf.task(model, made.tokenizer)
    before = side(model, made.test).f
    checkpoints = hf.Checkpoints(tmp_path / "run", every=2, first=True)
    trained(model, data, tmp_path / "out", checkpoints)
    assert checkpoints.steps == [0, 2, 4, 6]
    # a linear schedule from 1e-3 to 0 in six steps, two of them to a segment
    expected = [0, (6 + 5) / 6, (4 + 3) / 6, (2 + 1) / 6]
    np.testing.assert_allclose(checkpoints.weights, np.array(expected) * 1e-3 / len(data), rtol=1e-6)
    found = byline.TracIn(task, checkpoints.trajectory(), progress=False).fit(data).attribute(made.test)
    moved = side(model, made.test).f - before
    ref.assert_close(found.values.sum(1), moved, 0.03)
    from safetensors.torch import load_file

    kept = [load_file(path) for path in checkpoints.paths]
    assert all(("lora_" in name) == adapted for name in kept[-1])
    own = dict(model.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in kept[-1].items())
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    again = hf.Checkpoints.load(tmp_path / "run")
    assert (again.paths, again.steps, again.weights) == (checkpoints.paths, checkpoints.steps, checkpoints.weights)
    embedded = byline.DVEmb(task, again.trajectory(), features=byline.Dense(32), progress=False).fit(data)
    assert np.isfinite(embedded.attribute(made.test).values).all()


def test_frozen_weights_that_a_checkpoint_leaves_out_are_the_tasks_own(made, tmp_path):
    """Also after a member that had other ones."""
    from safetensors.torch import save_file

    model = language.with_adapter(made.model)
    task = hf.task(model)
    partial = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    save_file(partial, tmp_path / "partial.safetensors")
    other = {n: v + 0.1 for n, v in model.state_dict().items()}
    joint = byline.Independent([other, tmp_path / "partial.safetensors"])
    sides = []
    for state in (other, model.state_dict()):
        own = copy.deepcopy(model)
        own.load_state_dict(state)
        sides.append((side(own, made.test), side(own, made.train)))
    expected = np.mean([ref.graddot(a, b) for a, b in sides], 0)
    found = byline.GradDot(task, joint, progress=False).fit(made.train).attribute(made.test)
    ref.assert_close(found.values, expected, 5e-4)
    del partial[next(iter(partial))]
    with pytest.raises(ValueError, match="does not fit the task's model; keys missing"):
        byline.GradDot(task, byline.Independent([partial]), progress=False).fit(made.train)


def test_checkpoints_per_epoch_and_their_arguments(made, tmp_path):
    checkpoints = hf.Checkpoints(tmp_path)
    arguments = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    trained(made.model, made.train, tmp_path / "out", checkpoints, **arguments)
    assert checkpoints.steps == [2, 4]
    with pytest.raises(ValueError, match="every is 0"):
        hf.Checkpoints(tmp_path, every=0)
    with pytest.raises(FileNotFoundError, match=r"no checkpoints.json in"):
        hf.Checkpoints.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no checkpoint was recorded"):
        hf.Checkpoints(tmp_path).trajectory()
