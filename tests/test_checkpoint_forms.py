"""Checkpoints as training loops leave them: each form gives the scores of the state dict in it, or one sentence."""

from __future__ import annotations

import json
import logging
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

import byline


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


@pytest.fixture
def made():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(7, 4), torch.randint(0, 3, (7,)))
    return net(), net().state_dict(), data


def scores(model, checkpoint, data):
    ensemble = byline.Independent([checkpoint])
    return byline.GradDot(byline.Task(model), ensemble, progress=False).fit(data).attribute(data).values


def by_autograd(state, data):
    model = net()
    model.load_state_dict(state)
    rows = []
    for x, y in data:
        logits = model(x[None])[0]
        f = logits[y] - logits[torch.arange(3) != y].logsumexp(0)
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(f, list(model.parameters()))])
        rows.append((grad, float(torch.sigmoid(-f.detach()))))
    return np.array([[float(a @ b) * q for b, q in rows] for a, _ in rows])


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def adam(state):
    model = net()
    model.load_state_dict(state)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


FORMS = {
    "plain": lambda s: s,
    "model": lambda s: {"model": s, "optimizer": adam(s), "epoch": 3, "args": {"lr": 0.1}},
    "tutorial": lambda s: {"model_state_dict": s, "optimizer_state_dict": adam(s), "loss": torch.tensor(0.3)},
    "net": lambda s: {"net": s, "acc": 0.9},
    "lightning": lambda s: {"state_dict": prefixed(s, "model."), "optimizer_states": [adam(s)], "hparams": {}},
    "lightning-net": lambda s: {"state_dict": prefixed(s, "net."), "loops": {"fit_loop": {"state_dict": {}}}},
    "ddp": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "ddp-compiled": lambda s: {"model": prefixed(s, "_orig_mod.module.")},
    "compiled-inside": lambda s: {k.replace("0.", "0._orig_mod."): v for k, v in s.items()},
    "parallel-inside": lambda s: {k.replace("2.", "2.module."): v for k, v in s.items()},
    "fsdp": lambda s: prefixed(s, "_fsdp_wrapped_module."),
    "nested": lambda s: {"state": {"model": {"weights": s}}, "step": 4},
    "averaged": lambda s: {"n_averaged": torch.tensor(2), **prefixed(s, "module.")},
    "ema of another model": lambda s: {"model": s, "ema": {"decay": 0.9, "shadow": {"w": torch.zeros(3)}}},
    "ema that is the same": lambda s: {"model": s, "ema": prefixed(s, "module.")},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["", ".pt", ".ckpt", ".pth.tar"])
def test_the_state_dict_in_a_checkpoint_is_found(made, form, suffix, tmp_path):
    model, state, data = made
    checkpoint = FORMS[form](state)
    if suffix:
        torch.save(checkpoint, tmp_path / f"c{suffix}")
        checkpoint = tmp_path / f"c{suffix}"
    np.testing.assert_allclose(scores(model, checkpoint, data), by_autograd(state, data), rtol=1e-4, atol=1e-6)


def test_arrays_and_modules_and_other_dtypes(made):
    model, state, data = made
    expected = by_autograd(state, data)
    arrays = {k: v.numpy() for k, v in state.items()}
    inner = net()
    inner.load_state_dict(state)
    for checkpoint in (arrays, {"params": arrays}, inner, {"model": inner}, nn.DataParallel(inner)):
        np.testing.assert_allclose(scores(model, checkpoint, data), expected, rtol=1e-4, atol=1e-6)
    half = {k: v.bfloat16() for k, v in state.items()}
    expected = by_autograd({k: v.float() for k, v in half.items()}, data)
    np.testing.assert_allclose(scores(model, half, data), expected, rtol=1e-4, atol=1e-6)


def test_what_was_taken_is_logged(made, caplog):
    model, state, data = made
    with caplog.at_level(logging.INFO, "byline"):
        scores(model, {"model": prefixed(state, "module."), "epoch": 2}, data)
    assert (
        "checkpoint 0: of the dict, its entry ['model'], 'module.0.weight' read as '0.weight' is taken" in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, "byline"):
        scores(model, state, data)
        assert "checkpoint" not in caplog.text
        scores(model, {k: v.double() for k, v in state.items()}, data)
    assert "the task's model rounds its weights (float64 in float32)" in caplog.text


def test_two_entries_that_fit_are_asked_about(made, tmp_path):
    model, state, data = made
    torch.save({"model": state, "ema": prefixed(net().state_dict(), "module."), "epoch": 3}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"several entries that fit .*\['model'\] and \['ema'\]; expected one of them"):
        scores(model, tmp_path / "two.pt", data)


def test_parts_with_an_index(made, tmp_path):
    model, state, data = made
    expected = by_autograd(state, data)
    for form, save in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        folder = tmp_path / form
        folder.mkdir()
        keys = sorted(state)
        places = {key: f"part-{i % 2}-{form}" for i, key in enumerate(keys)}
        for part in set(places.values()):
            save({k: state[k] for k in keys if places[k] == part}, folder / part)
        index = folder / f"{form}.index.json"
        index.write_text(json.dumps({"weight_map": places}))
        for path in (folder, str(folder), index):
            np.testing.assert_allclose(scores(model, path, data), expected, rtol=1e-4, atol=1e-6)
        (folder / places[keys[0]]).unlink()
        with pytest.raises(FileNotFoundError, match=rf"no file .*{places[keys[0]]}, which {index.name} names"):
            scores(model, folder, data)
        index.write_text(json.dumps({"weight_map": {"0.weight": "../elsewhere.safetensors"}}))
        with pytest.raises(ValueError, match="names no files beside it"):
            scores(model, folder, data)
        index.write_text("[]")
        with pytest.raises(ValueError, match="is no index of weights"):
            scores(model, folder, data)


def test_folders(made, tmp_path):
    model, state, data = made
    expected = by_autograd(state, data)
    folder = tmp_path / "run" / "checkpoint-500"
    folder.mkdir(parents=True)
    torch.save(adam(state), folder / "optimizer.pt")
    torch.save({}, folder / "scheduler.pt")
    with pytest.raises(ValueError, match=r"has no weights; expected model.safetensors"):
        byline.Independent([folder])
    torch.save(state, folder / "pytorch_model.bin")
    np.testing.assert_allclose(scores(model, folder, data), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"holds checkpoints \(checkpoint-500\) and no weights of its own"):
        byline.Independent([tmp_path / "run"])
    own = tmp_path / "own"
    own.mkdir()
    torch.save(state, own / "best.pt")
    np.testing.assert_allclose(scores(model, own, data), expected, rtol=1e-4, atol=1e-6)
    torch.save(state, own / "last.pt")
    with pytest.raises(ValueError, match=r"several files of weights \(best.pt, last.pt\) and no index"):
        byline.Independent([own])


def test_an_adapter_is_sent_to_lora(made, tmp_path):
    peft = pytest.importorskip("peft")
    model, _, data = made
    adapted = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"], r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    for path in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match=r"is a PEFT adapter, not a trained model; expected byline.LoRA"):
            byline.Independent([path])
    with pytest.raises(ValueError, match=r"for which there is byline.LoRA"):
        scores(model, peft.get_peft_model_state_dict(adapted), data)


def test_what_does_not_fit_is_refused(made, tmp_path):
    model, state, data = made
    with pytest.raises(ValueError, match=r"checkpoint 0 \(its entry \['net'\]\) does not fit .* missing: 2.bias"):
        scores(model, {"net": {k: v for k, v in state.items() if k != "2.bias"}, "epoch": 1}, data)
    beside = {**prefixed(state, "model."), "loss.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=r"those under 'model.' fit: pass {k.removeprefix\('model.'\)"):
        scores(model, {"state_dict": beside}, data)
    with pytest.raises(ValueError, match=r"of another kind of number: 0.weight torch.int8 instead of torch.float32"):
        scores(model, {**state, "0.weight": torch.zeros(5, 4, dtype=torch.int8)}, data)
    with pytest.raises(ValueError, match=r"without numbers \(on the meta device\): 0.weight"):
        scores(model, {**state, "0.weight": torch.zeros(5, 4, device="meta")}, data)
    with pytest.raises(ValueError, match=r"holds no state_dict \(its entries are 'epoch', 'lr'\)"):
        byline.Independent([{"epoch": 1, "lr": 0.1}])
    with pytest.raises(ValueError, match="holds no state_dict"):
        byline.Independent([{"0.weight": [[1.0]]}])
    torch.save({"model": state, "args": Namespace(lr=0.1)}, tmp_path / "args.pt")
    with pytest.raises(
        ValueError, match=r"because it holds a argparse.Namespace, .* load it and pass model.state_dict"
    ):
        scores(model, tmp_path / "args.pt", data)
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678abc")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        scores(model, tmp_path / "damaged.safetensors", data)


def test_tied_weights(made):
    """Under either of their names, or both; but not as two."""
    _, _, data = made
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    model[2].weight = model[0].weight
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = scores(model, state, data)
    for name in ("0.weight", "2.weight"):
        one = {f"module.{k}": v for k, v in state.items() if k != name}
        np.testing.assert_array_equal(scores(model, one, data), expected)
    state["2.weight"] += 1
    with pytest.raises(ValueError, match=r"one weight in the model and two in the checkpoint: 0.weight and 2.weight"):
        scores(model, state, data)


def test_a_wrapped_model_takes_plain_checkpoints(made):
    _, state, data = made
    found = scores(nn.Sequential(net()).eval(), state, data)
    np.testing.assert_allclose(found, by_autograd(state, data), rtol=1e-4, atol=1e-6)


def test_a_file_that_is_written_anew_after_fit(made, tmp_path):
    """Rows of the old weights are never set against those of the new ones."""
    model, state, data = made
    other = net().state_dict()
    save_file(state, tmp_path / "c.safetensors")
    both = byline.Independent([tmp_path / "c.safetensors", other])
    found = byline.GradDot(byline.Task(model), both, progress=False).fit(data)
    before = found.attribute(data).values
    save_file(state, tmp_path / "c.safetensors")
    assert (found.attribute(data).values == before).all()
    save_file(other, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint 0: .* has changed since it was first read"):
        found.attribute(data)
    np.testing.assert_allclose(
        scores(model, tmp_path / "c.safetensors", data), by_autograd(other, data), rtol=1e-4, atol=1e-6
    )
    single = byline.GradDot(byline.Task(model), byline.Independent([tmp_path / "c.safetensors"]), progress=False)
    before = single.fit(data).attribute(data).values
    (tmp_path / "c.safetensors").unlink()
    assert (single.attribute(data).values == before).all()
