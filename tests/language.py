"""A tiny tokenizer and tiny language models, made on the spot."""

from __future__ import annotations

import torch

from architectures import randomised

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "over", "mat", "tree", "house"]
WORDS += ["and", "then"]
PROMPTS = ["the cat", "a dog ran", "the bird"]


def texts(n: int, seed: int = 0) -> list[str]:
    """Sentences of their own lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + i % 5 for i in range(n)]
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (k,), generator=generator)) for k in lengths]


def tokenizer():
    """Words as tokens, with padding and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def gpt2(seed: int = 0, vocabulary: int = 19, room: int = 16, dropout: float = 0.0):
    """A GPT-2 of a few hundred parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = GPT2Config(vocab_size=vocabulary, n_positions=room, n_embd=8, n_layer=1, n_head=2, **rates, **special)
    return randomised(GPT2LMHeadModel(config)).eval()


def with_adapter(model, *targets: str, seed: int = 1, **arguments):
    """A PEFT model whose adapter is not the identity."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=2,
        target_modules=list(targets) or ["c_attn", "c_fc"],
        init_lora_weights=False,
        fan_in_fan_out=True,
        **arguments,
    )
    return get_peft_model(model, config).eval()
