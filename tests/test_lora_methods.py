"""LoRA ensembles of a tiny GPT-2: every method, PEFT's format, shared weights, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import byline
import byline.engines.workbench
import language
import reference as ref
from byline.ensembles.lora import Adapter, inject, lora_targets
from byline.methods.registry import make, methods

hf = pytest.importorskip("byline.hf")


@pytest.fixture(scope="module")
def made():
    from types import SimpleNamespace

    tokenizer, models = language.tokenizer(), [language.gpt2(seed) for seed in (0, 1)]
    train = hf.dataset(language.texts(8), tokenizer)
    task, base = hf.task(models[0], tokenizer), byline.Independent(models)
    ensemble = byline.train_lora(
        task,
        base,
        train,
        adapters=2,
        rank=2,
        epochs=2,
        lr=0.02,
        batch_size=4,
        targets=["c_attn", "c_fc"],
        progress=False,
    )
    test = hf.dataset(language.texts(3, seed=1), tokenizer)
    return SimpleNamespace(models=models, task=task, base=base, train=train, test=test, ensemble=ensemble)


def loaded(model, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(model), folder, is_trainable=True).eval()


def sides(made, folders):
    own = [loaded(model, folder) for model, row in zip(made.models, folders, strict=True) for folder in row]
    return [
        [ref.side(model, data, ref.language_modeling, collate=data.collate_fn) for model in own]
        for data in (made.test, made.train)
    ]


@pytest.mark.parametrize("info", methods(), ids=lambda info: info.name)
def test_every_method_takes_a_lora_ensemble_of_a_language_model_or_says_why_not(made, info):
    options = {"batch_size": 4, "progress": False}
    if info.name == "lissa":
        options["damping"] = 10.0
    if "lora" not in info.ensembles or "labels" in info.needs:
        with pytest.raises((ValueError, TypeError), match=r"adapter|label|class|Trajectory"):
            make(info.name, made.task, made.ensemble, **options).fit(made.train).attribute(made.test)
        return
    values = make(info.name, made.task, made.ensemble, **options).fit(made.train).attribute(made.test).values
    assert values.shape == (3, 8)
    assert np.isfinite(values).all()
    assert np.ptp(values) > 0


def test_scores_from_adapters_that_peft_reads_equal_autograd(made, tmp_path):
    folders = made.ensemble.save(tmp_path)
    assert {p.name for p in folders[1][0].iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tests, trains = sides(made, folders)
    ensemble = byline.LoRA(made.base, folders)
    assert [a.digest() for row in ensemble.adapters for a in row] == [
        a.digest() for row in made.ensemble.adapters for a in row
    ]
    for method, expected in (
        (byline.GradDot, ref.mean(ref.graddot, tests, trains)),
        (byline.TRAK, ref.trak(tests, trains, 0.3)),
    ):
        found = method(made.task, ensemble, damping=0.3, progress=False).fit(made.train).attribute(made.test)
        ref.assert_close(found.values, expected, 1e-3)


def test_the_bases_weights_are_shared_and_left_as_they_were(made):
    model = made.models[0]
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    changed = inject(model, made.ensemble.adapters[0][0].config)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for n, p in changed.named_parameters() if "lora_" not in n} == own
    assert changed.lm_head.weight is changed.transformer.wte.weight
    assert all(("lora_" in n) == p.requires_grad for n, p in changed.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
    joint = byline.GradDot(made.task, made.ensemble + made.base, progress=False).fit(made.train)
    alone = byline.GradDot(made.task, made.base, progress=False).fit(made.train).attribute(made.test).values
    adapted = byline.GradDot(made.task, made.ensemble, progress=False).fit(made.train).attribute(made.test).values
    ref.assert_close(joint.attribute(made.test).values, (4 * adapted + 2 * alone) / 6)


def test_seeds_targets_and_collate_of_training(made):
    def one(**arguments):
        arguments = {"adapters": 2, "rank": 1, "epochs": 1, "batch_size": 4, "progress": False, **arguments}
        return byline.train_lora(made.task, byline.Independent(made.models[:1]), made.train, **arguments).adapters[0]

    a, b = one(seed=[5, 9], targets="c_fc"), one(seed=[9, 5], targets="c_fc")
    assert (a[0].digest(), a[1].digest()) == (b[1].digest(), b[0].digest())
    assert len({x.digest() for x in (*a, *one(seed=0, targets="c_fc"))}) == 4
    assert {name.split(".")[-3] for name in a[0].tensors} == {"c_fc"}
    assert one(targets="c_fc", alpha=3.0, dropout=0.2)[0].config["lora_alpha"] == 3.0
    assert lora_targets(made.models[0], None) == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert "lm_head" in lora_targets(made.models[0], ["lm_head"])
    for arguments, match in (
        ({"seed": [1]}, r"seed is \[1\]; expected 2 different ones"),
        ({"seed": [1, 1]}, "expected 2 different ones"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"lr": 0}, "lr is 0"),
        ({"alpha": -1}, "alpha is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"targets": ["q_proj"]}, r"targets names \['q_proj'\]"),
    ):
        with pytest.raises(ValueError, match=match):
            one(**arguments)


def test_an_adapter_of_another_base_is_refused(made, tmp_path):
    folders = made.ensemble.save(tmp_path)

    def fit(adapters, models=None, model=None):
        models = models or made.models[:1]
        task = hf.task(model or models[0])
        byline.GradDot(task, byline.LoRA(byline.Independent(models), adapters), progress=False).fit(made.train)

    fit([folders[0]])
    with pytest.raises(ValueError, match="adapter 0 of model 0 was trained on another base"):
        fit([folders[1]])
    llama = transformers_llama()
    with pytest.raises(ValueError, match=r"adapter 0 of model 0.* does not fit the task's model: Target modules"):
        fit([[stripped(folders[0][0])]], [llama], llama)
    wider = language.gpt2()
    config = dict(Adapter.load(folders[0][0]).config, r=3)
    with pytest.raises(ValueError, match=r"does not fit the task's model: .* has shape"):
        fit([[Adapter(config, Adapter.load(folders[0][0]).tensors)]], [wider], wider)
    with pytest.raises(ValueError, match=r"peft_type is 'PREFIX_TUNING', .*; expected one of ADALORA"):
        fit([[Adapter({**config, "peft_type": "PREFIX_TUNING"}, {})]])


def stripped(folder):
    """An adapter that does not know its base, as PEFT saves it."""
    found = Adapter.load(folder)
    return Adapter(found.config, found.tensors)


def transformers_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=19, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
