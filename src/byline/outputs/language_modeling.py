"""Language modelling: each token is predicted from those before it.

``f``, ``ℓ`` and ``Q`` are the means of `byline.outputs.tokens` over the target tokens. Labels of a dict batch, and a
lone tensor of ids, are shifted: the logits at a token predict the token after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from byline import sequences
from byline.batches import Batch
from byline.outputs.base import with_target
from byline.outputs.prediction import head_of, is_encoder_decoder
from byline.outputs.tokens import Tokens


class LanguageModeling(Tokens):
    """Dicts as Hugging Face's, tuples ``(ids, targets)`` that are aligned already, or ids alone."""

    name = "language-modeling"
    expects = "logits (batch, tokens, vocabulary)"

    def check(self, model: nn.Module) -> None:
        """Refuse models whose labels are not the inputs shifted by one."""
        if is_encoder_decoder(model):
            raise ValueError(
                f"model is the encoder-decoder {type(model).__name__}, whose labels are those of its decoder; expected "
                'output="seq2seq", or a decoder such as GPT2LMHeadModel'
            )
        for kinds, output in (
            (("ForMaskedLM", "ForPreTraining"), "masked-language-modeling"),
            (("ForTokenClassification",), "token-classification"),
        ):
            found = head_of(model, *kinds)
            if found is not None:
                raise ValueError(
                    f"model is a {found}, which sees the whole text and whose labels stand where its logits do, and "
                    f'language-modeling shifts them by one; expected output="{output}"'
                )

    def prepared(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any], target: Any) -> dict[str, Any]:
        """With positions that padding does not move."""
        return sequences.placed(model, super().prepared(model, args, named, target))

    def placed(self, prediction: Tensor, target: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Shifted, but for a tuple."""
        if not isinstance(batch, Mapping) and target is not None:
            return prediction, target
        labels = self._own_labels(batch) if target is None else target
        logits, labels = prediction[:, :-1], labels[:, 1:]
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.shape == prediction.shape[:2]:
            # with padding on the left, it is a padding position that stands before the first token
            labels = labels.masked_fill(mask[:, :-1] == 0, sequences.IGNORED)
        return logits, labels

    def relabelled(self, batch: Batch, labels: Tensor) -> Batch:
        """Shifted back, but for a tuple."""
        _, _, target = self.split(batch)
        if not isinstance(batch, Mapping) and target is not None:
            return super().relabelled(batch, labels)
        ignored = sequences.IGNORED
        own = self._own_labels(batch) if target is None else target
        # the label of a token stands one place to its right, and the first token is never predicted
        shifted = torch.cat([labels.new_full((len(labels), 1), ignored), labels], 1).masked_fill(
            own == ignored, ignored
        )
        if isinstance(batch, Mapping):
            return with_target(batch, shifted)
        ids = batch if isinstance(batch, Tensor) else batch[0]
        return ids, torch.cat([shifted[:, 1:], shifted.new_full((len(ids), 1), ignored)], 1)

    @staticmethod
    def _own_labels(batch: Batch) -> Tensor:
        if isinstance(batch, Mapping):
            ids = batch["input_ids"]
            mask = batch.get("attention_mask")
            return ids if mask is None else ids.masked_fill(mask == 0, sequences.IGNORED)
        return batch[0] if isinstance(batch, tuple | list) else batch
