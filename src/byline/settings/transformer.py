"""A small decoder-only transformer, with relative attention (Music Transformer) or learned positions (GPT).

Written so that every parameter is one that a fast rule covers and every dropout is a module: relative attention's
embeddings of distances are the weight of a linear layer on the queries, and positions are looked up for each example.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal self-attention of several heads.

    Args:
        width: of the tokens' vectors.
        heads: must divide the width.
        length: positions at most.
        dropout: on the attention weights.
        relative: score each pair by its distance too, ``q_t · (k_s + e_{t-s})`` (Huang et al. 2018, Music Transformer,
            arXiv 1809.04281), the embeddings e shared by the heads (as in Shaw et al. 2018, arXiv 1803.02155).
    """

    def __init__(self, width: int, heads: int, length: int, dropout: float, relative: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.distance = nn.Linear(width // heads, length, bias=False) if relative else None
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to the same shape."""
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q = q * q.shape[-1] ** -0.5  # here, and not on the T·T scores
        scores = q @ k.transpose(-2, -1)
        if self.distance is not None:
            scores = scores + by_distance(self.distance(q))
        future = torch.full((t, t), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        weights = self.drop((scores + future).softmax(-1))
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, width))


def by_distance(scores: Tensor) -> Tensor:
    """Scores by distance, (..., T, L) with the largest distance first, as scores by key, (..., T, T).

    Entry (t, s) of the result is entry (t, L-1-(t-s)) of ``scores``; where s > t it means nothing. The "skewing" of
    Huang et al. 2018: a column more and another shape, instead of T·T look-ups.
    """
    t = scores.shape[-2]
    padded = F.pad(scores[..., scores.shape[-1] - t :], (1, 0))
    return padded.reshape(*scores.shape[:-2], t + 1, t)[..., 1:, :]


class Block(nn.Module):
    """Attention and a two-layer network, each on a normalised copy of what it adds to."""

    def __init__(self, width: int, heads: int, hidden: int, length: int, dropout: float, relative: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, length, dropout, relative)
        self.network = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop, self.drop_too = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to the same shape."""
        x = x + self.drop(self.attention(self.first(x)))
        return x + self.drop_too(self.network(self.second(x)))


class Decoder(nn.Module):
    """Token ids (B, T) to logits (B, T, vocabulary); T at most ``length``.

    Args:
        vocabulary: number of tokens.
        length: positions at most.
        width: of the tokens' vectors.
        layers: number of blocks.
        heads: of attention; must divide the width.
        hidden: units between the two layers of a block's network.
        dropout: rate of every dropout layer.
        relative: relative attention and no other positions; otherwise a learned vector per position.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        hidden: int = 128,
        dropout: float = 0.1,
        relative: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}; expected a multiple of the {heads} heads")
        self.length = length
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = None if relative else nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, length, dropout, relative) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the token after each."""
        if ids.shape[1] > self.length:
            raise ValueError(f"a sequence of {ids.shape[1]} tokens; expected at most the model's {self.length}")
        x = self.tokens(ids)
        if self.places is not None:
            x = x + self.places(torch.arange(ids.shape[1], device=ids.device).expand(ids.shape))
        return self.head(self.norm(self.blocks(self.drop(x))))


class Bigrams(nn.Module):
    """Token ids (B, T) to logits (B, T, vocabulary) that depend on the token alone: a table, all zeros to begin with.

    Args:
        vocabulary: number of tokens.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All tokens as likely after each."""
        nn.init.zeros_(self.table.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the token after each."""
        return self.table(ids)


@torch.no_grad()
def sample(
    model: Decoder,
    start: list[int],
    *,
    stop: int,
    most: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    forbid: Callable[[list[int]], list[int]] | None = None,
) -> list[int]:
    """Tokens drawn one after the other from what the model says comes next.

    Args:
        model: in eval mode.
        start: the first tokens, at least one.
        stop: the token that ends a sequence; it is not part of the result.
        most: tokens in all, at most the model's length, which is the default.
        temperature: divides the logits; below 1 the likely becomes likelier.
        seed: of the draws; the caller's random state is left alone.
        forbid: ``forbid(tokens so far)`` names tokens that may not come next.

    Returns:
        the tokens, those of ``start`` included.

    Raises:
        ValueError: no start, a temperature that is not above 0, or a start or ``most`` beyond the model's length.
    """
    most = model.length if most is None else most
    if not start or len(start) > most or most > model.length:
        raise ValueError(
            f"start has {len(start)} tokens and most is {most}; expected 1 ≤ start ≤ most ≤ {model.length}, the "
            "model's length"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}; expected a number above 0")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(start)
    while len(tokens) < most:
        logits = model(torch.tensor([tokens]))[0, -1].double().cpu() / temperature
        if forbid is not None:
            logits[forbid(tokens)] = float("-inf")
        token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        if token == stop:
            break
        tokens.append(token)
    return tokens
