"""Every kind of adapter that PEFT puts into layers, against autograd on the model that PEFT loads; or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import byline
import reference as ref
from byline.ensembles.lora import Adapter

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.ln = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.fc1, self.fc2, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc2(self.ln(torch.tanh(self.fc1(self.emb(x).mean(1)))))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def examples(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randint(11, (n, 5), generator=generator), torch.randint(3, (n,), generator=generator))


TRAIN, TEST = examples(8, 1), examples(3, 2)
FC = ["fc1", "fc2"]


def lora(**options):
    return lambda: peft.LoraConfig(**{"r": 2, "target_modules": FC, "init_lora_weights": False, **options})


KINDS = {
    "dora": lora(use_dora=True),
    "dora of an embedding": lora(use_dora=True, target_modules=["emb", "fc1"]),
    "rslora": lora(use_rslora=True),
    "bias all": lora(bias="all"),
    "bias lora_only": lora(bias="lora_only"),
    "lora_bias": lora(lora_bias=True),
    "modules_to_save": lora(modules_to_save=["head"]),
    "patterns": lora(rank_pattern={"fc2": 3}, alpha_pattern={"fc1": 7}),
    "tokens": lora(target_modules=["fc1"], trainable_token_indices={"emb": [1, 3]}),
    "target_parameters": lora(target_modules=["fc1"], target_parameters=["fc2.weight"]),
    "olora": lora(init_lora_weights="olora"),
    "pissa": lora(init_lora_weights="pissa"),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=FC, init_lora_weights=False),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=FC, init_weights=False),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=FC, init_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=FC, feedforward_modules=["fc2"], init_ia3_weights=False),
    "oft": lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=FC, init_weights=False),
    "boft": lambda: peft.BOFTConfig(boft_block_size=2, target_modules=FC, init_weights=False),
    "hra": lambda: peft.HRAConfig(r=2, target_modules=FC, init_weights=False),
    "c3a": lambda: peft.C3AConfig(block_size=2, target_modules=FC, init_weights=False),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=5, target_modules=FC, init_weights=False),
    "layer norm": lambda: peft.LNTuningConfig(target_modules=["ln"]),
    "trainable tokens": lambda: peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 2]),
}


def trained(net, config, name="default"):
    """A PEFT model whose adapter is not as it was initialised, the same in every call."""
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(net), config, adapter_name=name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def scores(net, adapter, **options):
    ensemble = byline.LoRA(byline.Independent([net]), [[adapter]])
    return byline.GradDot(byline.Task(net, **options), ensemble, progress=False).fit(TRAIN).attribute(TEST).values


def by_hand(model):
    return ref.graddot(*(ref.side(model, data, ref.classification) for data in (TEST, TRAIN)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_autograd_on_the_model_that_peft_loads(net, tmp_path, kind):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = trained(net, KINDS[kind]())
    model.save_pretrained(tmp_path)
    expected = by_hand(peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path, is_trainable=True).eval())
    for adapter in (tmp_path, model):
        # what the task chooses is of the base, and says nothing about adapters
        for options in ({}, {"params": "fc1.*"}):
            ref.assert_close(scores(net, adapter, **options), expected, 1e-4)
    again = byline.LoRA(byline.Independent([net]), [[model]]).save(tmp_path / "again")[0][0]
    ref.assert_close(scores(net, again), expected, 1e-4)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_name_and_one_of_several(net):
    ref.assert_close(scores(net, trained(net, lora()(), "mine")), by_hand(trained(net, lora()(), "mine")), 1e-4)
    several = trained(net, lora()(), "one")
    several.add_adapter("two", lora(r=3)())
    expected = by_hand(several)
    ref.assert_close(scores(net, Adapter.of(several, "one")), expected, 1e-4)
    several.set_adapter("two")
    ref.assert_close(scores(net, Adapter.of(several, "two")), by_hand(several.eval()), 1e-4)
    with pytest.raises(
        ValueError, match=r"holds the adapters 'one', 'two'; expected one: take .*Adapter.of\(model, 'one'"
    ):
        scores(net, several)
    with pytest.raises(ValueError, match="no adapter 'three' in the PEFT model; there are 'one', 'two'"):
        Adapter.of(several, "three")


@pytest.mark.filterwarnings("ignore")
def test_merged_adapters_are_refused(net):
    model = trained(net, lora()())
    model.merge_adapter()
    with pytest.raises(ValueError, match="an adapter that is merged into its weights; expected an unmerged one"):
        scores(net, model)
    with pytest.raises(ValueError, match=r"checkpoint 0 has an adapter that is merged"):
        byline.Independent([model])
    with pytest.raises(ValueError, match=r"has an adapter merged into its weights .* call unmerge_adapter\(\)"):
        byline.Task(model)
    model.unmerge_adapter()
    ref.assert_close(scores(net, model), by_hand(model), 1e-4)
    with pytest.raises(TypeError, match=r"an adapter is a Net; expected .*merge_and_unload\(\) leaves none"):
        scores(net, model.merge_and_unload())


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_put_into_layers_or_repeated_is_refused(net, tmp_path):
    model = trained(net, lora(init_lora_weights="pissa_niter_4")())
    with pytest.raises(ValueError, match=r"'pissa_niter_4' .* cannot be repeated; save it with .*weight_conversion"):
        scores(net, model)
    for kind in ("PROMPT_TUNING", "VERA", "NONSENSE"):
        with pytest.raises(ValueError, match=f"peft_type is '{kind}', which byline.LoRA cannot put into"):
            scores(net, Adapter({"peft_type": kind}, {}))
    changed = copy.deepcopy(net)
    peft.get_peft_model(changed, lora()()).eval()
    with pytest.raises(ValueError, match=r"holds PEFT's layers already \(get_peft_model changes the model"):
        byline.GradDot(
            byline.Task(changed), byline.LoRA(byline.Independent([changed]), [[trained(net, lora()())]]), progress=False
        ).fit(TRAIN)


@pytest.mark.filterwarnings("ignore")
def test_a_converted_pissa_adapter_is_one_of_the_unchanged_base(net, tmp_path):
    model = peft.get_peft_model(copy.deepcopy(net), lora(init_lora_weights="pissa")()).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2)
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    expected = by_hand(peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "end", is_trainable=True).eval())
    ref.assert_close(scores(net, tmp_path / "end"), expected, 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("wide", r"fc1.lora_B.weight has shape \(9, 2\) instead of \(8, 2\)"),
        ("fewer", "keys that differ: fc2.lora_A"),
        ("more", "keys that differ: fc9.lora_A"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_any_work(net, change, said):
    good = Adapter.of(trained(net, lora()()))
    wide = Net()
    wide.fc1, wide.ln, wide.fc2 = nn.Linear(8, 9), nn.LayerNorm(9), nn.Linear(9, 8)
    other = {
        "wide": Adapter.of(trained(wide, lora()())),
        "fewer": Adapter(good.config, {k: v for k, v in good.tensors.items() if "fc2" not in k}),
        "more": Adapter(good.config, {**good.tensors, "fc9.lora_A.weight": torch.ones(2)}),
    }[change]
    calls: list[int] = []

    def loss(model, batch):
        calls.append(1)
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def fit(*adapters):
        ensemble = byline.LoRA(byline.Independent([net]), [adapters])
        byline.GradDot(byline.Task(net, loss=loss), ensemble, progress=False).fit(TRAIN)

    fit(good, good)
    assert calls
    calls.clear()
    with pytest.raises(ValueError, match=rf"adapter 1 of model 0 does not fit the task's model: {said}"):
        fit(good, other)
    assert not calls
