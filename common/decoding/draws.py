"""Draws of tokens: the inverse of a cumulative distribution at uniform numbers of a request's own stream.

Takes logits and sampling parameters; returns tokens and their probabilities. No row's draw depends on
another.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from common.decoding.requests import SamplingParams

DRAW_BLOCK = 64
"""Tokens whose probabilities are summed up before a draw looks into them."""


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """float64 [count] in [0, 1): the beginning of the stream that belongs to `key`."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(count)


def choose(
    logits: torch.Tensor, numbers: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [M] and their probabilities fp32 [M], from logits [M, V] and a uniform number each.

    The probabilities are those of the distribution at the temperature before top_p and top_k.
    """
    scores = logits.float()
    if params.temperature not in (0, 1):
        scores = scores / params.temperature
    p = scores.softmax(1)
    tokens = scores.argmax(1) if params.temperature == 0 else _inverse(_filtered(p, params), numbers)
    return tokens, p.gather(1, tokens[:, None])[:, 0]


def _filtered(p: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities [M, V] with those of the tokens left out set to 0; they need not sum to 1."""
    limited = 0 < params.top_k < p.shape[1]
    if not limited and params.top_p >= 1:
        return p
    ordered, ids = p.sort(dim=1, descending=True, stable=True)
    if limited:
        ordered[:, params.top_k :] = 0
    if params.top_p < 1:
        # of what top_k leaves; a token is in while those before it are not enough
        wanted = params.top_p * ordered.sum(1, keepdim=True, dtype=torch.float64)
        ordered[ordered.cumsum(1, dtype=torch.float64) - ordered >= wanted] = 0
    return torch.zeros_like(p).scatter_(1, ids, ordered)


def _inverse(p: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """int64 [M]: the token in whose share of [0, 1) the number falls. p fp32 [M, V], need not sum to 1.

    Sums of blocks first, then one block's probabilities: a cumulative sum over everything, in float64, would
    take longer than the rest of the step. A token of probability 0 is never chosen.
    """
    blocks = F.pad(p, (0, -p.shape[1] % DRAW_BLOCK)).view(len(p), -1, DRAW_BLOCK)
    shares = blocks.sum(2)
    block, rest = _first_above(shares, shares.sum(1, dtype=torch.float64) * numbers)
    within, _ = _first_above(blocks[torch.arange(len(p), device=p.device), block], rest)
    return block * DRAW_BLOCK + within


def _first_above(shares: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row the first place where the running sum passes what is wanted, and how far that is into it."""
    sums = shares.cumsum(1, dtype=torch.float64)
    # rounding must not carry it to the very end, where only tokens of probability 0 might be left
    wanted = torch.minimum(wanted, sums[:, -1].nextafter(torch.zeros_like(wanted)))
    place = torch.searchsorted(sums, wanted[:, None], right=True).clamp_(max=shares.shape[1] - 1)
    before = (sums.gather(1, place) - shares.gather(1, place))[:, 0]
    return place[:, 0], (wanted - before).clamp_min(0)
