"""Masked language modelling: hidden tokens are predicted from the text around them.

``f``, ``ℓ`` and ``Q`` are the means of `byline.outputs.tokens` over the tokens whose label is not -100. Labels stand
where the masked tokens stand: nothing is shifted.
"""

from __future__ import annotations

from torch import nn

from byline.outputs.prediction import head_of, is_encoder_decoder
from byline.outputs.tokens import Tokens


class Aligned(Tokens):
    """Dicts with ``labels``, or tuples ``(ids, …, labels)``; the masks are the data set's, drawn once."""

    def check(self, model: nn.Module) -> None:
        """Refuse models whose labels are shifted."""
        if is_encoder_decoder(model):
            raise ValueError(
                f"model is the encoder-decoder {type(model).__name__}, whose labels are those of its decoder; expected "
                'output="seq2seq"'
            )
        found = head_of(model, "ForCausalLM", "LMHeadModel")
        if found is not None:
            raise ValueError(
                f"model is a {found}, which predicts the token after each, and {self.name} does not shift its labels; "
                'expected output="language-modeling"'
            )


class MaskedLanguageModeling(Aligned):
    """Dicts with ``labels``, or tuples ``(ids, …, labels)``; the masks are the data set's, drawn once."""

    name = "masked-language-modeling"
    expects = "logits (batch, tokens, vocabulary)"
