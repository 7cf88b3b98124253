"""Draws of tokens: the inverse of a cumulative distribution at uniform numbers of a request's own stream.

Takes logits and sampling parameters; returns tokens and their probabilities. No row's draw depends on
another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common.decoding.requests import SamplingParams

MOST_KEPT = 1024
"""Tokens of a row that top_p puts in order; nearly always it keeps fewer."""

DRAW_BLOCK = 64
"""Tokens whose probabilities are summed up before a draw looks into them."""


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """float64 [count] in [0, 1): the beginning of the stream that belongs to `key`."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(count)


class Drawn(NamedTuple):
    """tokens: int64 [M]. probabilities: fp32 [M], at the temperature before top_p and top_k. is_sure: bool
    [M], false where top_p would keep more tokens than were put in order."""

    tokens: torch.Tensor
    probabilities: torch.Tensor
    is_sure: torch.Tensor


def choose(
    logits: torch.Tensor, numbers: torch.Tensor, params: SamplingParams, most: int = MOST_KEPT
) -> Drawn:
    """A token for each row of logits [M, V], at a uniform number each.

    most: tokens that are put in order for top_p. A row that is not sure is drawn again with all of them.
    """
    scores = logits.float()
    if params.temperature not in (0, 1):
        scores = scores / params.temperature
    p = scores.softmax(1)
    is_sure = torch.ones(len(p), dtype=torch.bool, device=p.device)
    if params.temperature == 0:
        tokens = scores.argmax(1)
    else:
        kept, is_sure = _filtered(p, params, most)
        tokens = _inverse(kept, numbers)
    return Drawn(tokens, p.gather(1, tokens[:, None])[:, 0], is_sure)


def _filtered(p: torch.Tensor, params: SamplingParams, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [M, V] with those of the tokens left out set to 0, which need not sum to 1; is_sure [M].

    What is kept is told by the smallest probability that is, and of tokens that have just that one the first
    are: the others need no order.
    """
    limited = 0 < params.top_k < p.shape[1]
    is_sure = torch.ones(len(p), dtype=torch.bool, device=p.device)
    if not limited and params.top_p >= 1:
        return p, is_sure
    ordered = p.topk(min(params.top_k if limited else most, p.shape[1]), dim=1).values
    count = torch.full((len(p), 1), ordered.shape[1], device=p.device)
    if params.top_p < 1:
        # of what top_k leaves; a token is in while those before it are not enough
        wanted = params.top_p * (ordered if limited else p).sum(1, keepdim=True, dtype=torch.float64)
        sums = ordered.cumsum(1, dtype=torch.float64)
        count = (sums - ordered < wanted).sum(1, keepdim=True)
        if not limited and ordered.shape[1] < p.shape[1]:
            is_sure = sums[:, -1] >= wanted[:, 0]
    smallest = ordered.gather(1, (count - 1).clamp_min(0))  # 0 of numbers that are not finite
    is_last = p == smallest
    first = count - (p > smallest).sum(1, keepdim=True)
    left_out = (p < smallest) | (is_last & (is_last.cumsum(1, dtype=torch.int32) > first))
    return p.masked_fill(left_out, 0), is_sure


def _inverse(p: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """int64 [M]: the token in whose share of [0, 1) the number falls. p fp32 [M, V], need not sum to 1.

    Sums of blocks first, then one block's probabilities: a cumulative sum over everything, in float64, would
    take longer than the rest of the step. A token of probability 0 is never chosen.
    """
    blocks = F.pad(p, (0, -p.shape[1] % DRAW_BLOCK)).view(len(p), -1, DRAW_BLOCK)
    shares = blocks.sum(2)
    block, rest = _first_above(shares, shares.sum(1, dtype=torch.float64) * numbers)
    within, _ = _first_above(blocks[torch.arange(len(p), device=p.device), block], rest)
    return (block * DRAW_BLOCK + within).clamp_max(p.shape[1] - 1)  # of numbers that are not finite


def _first_above(shares: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row the first place where the running sum passes what is wanted, and how far that is into it."""
    sums = shares.cumsum(1, dtype=torch.float64)
    # rounding must not carry it to the very end, where only tokens of probability 0 might be left
    wanted = torch.minimum(wanted, sums[:, -1].nextafter(torch.zeros_like(wanted)))
    place = torch.searchsorted(sums, wanted[:, None], right=True).clamp_(max=shares.shape[1] - 1)
    before = (sums.gather(1, place) - shares.gather(1, place))[:, 0]
    return place[:, 0], (wanted - before).clamp_min(0)
