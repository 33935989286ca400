"""Token classification: a class for every token.

``f``, ``ℓ`` and ``Q`` are the means of `byline.outputs.tokens` over the tokens whose label is not -100. Labels stand
where their tokens stand: nothing is shifted.
"""

from __future__ import annotations

from byline.outputs.masked_language_modeling import Aligned


class TokenClassification(Aligned):
    """Dicts with ``labels`` (B, T), or tuples ``(ids, …, labels)``."""

    name = "token-classification"
