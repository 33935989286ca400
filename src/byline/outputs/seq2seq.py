"""Sequence to sequence: the target's tokens are predicted from the source and from the target's tokens before them.

``f``, ``ℓ`` and ``Q`` are the means of `byline.outputs.tokens` over the target's tokens whose label is not -100. Labels
stand where the decoder's logits stand: what the decoder reads is shifted, by the model itself, and the labels are not.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from byline.outputs.prediction import head_of, is_encoder_decoder
from byline.outputs.tokens import Tokens


class Seq2Seq(Tokens):
    """Dicts of a source and ``labels``, or tuples ``(source, what the decoder reads, labels)``."""

    name = "seq2seq"
    expects = "the decoder's logits (batch, target tokens, vocabulary)"

    def check(self, model: nn.Module) -> None:
        """Refuse a decoder or an encoder alone."""
        found = head_of(model, "ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")
        if found is not None and not is_encoder_decoder(model):
            raise ValueError(
                f"model is a {found}, which is no encoder with a decoder; expected one such as "
                "T5ForConditionalGeneration"
            )

    def prepared(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any], target: Any) -> dict[str, Any]:
        """With what the decoder reads, made of the labels by the model where the batch does not bring it."""
        named = super().prepared(model, args, named, target)
        inside = [module for module in model.modules() if hasattr(module, "config")]
        if args or not inside or "decoder_input_ids" in named or "decoder_inputs_embeds" in named:
            return named
        if not isinstance(target, Tensor):
            return named
        made = next((m for m in inside if hasattr(m, "prepare_decoder_input_ids_from_labels")), None)
        if made is not None:
            shifted = made.prepare_decoder_input_ids_from_labels(labels=target)  # type: ignore[operator]
            return {**named, "decoder_input_ids": shifted}
        if "labels" in inspect.signature(inside[0].forward).parameters:
            return {**named, "labels": target}
        return named
