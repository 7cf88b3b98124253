"""Sequence parallelism: ranks that share a row exchange their slices of it for heads, and back.

Outside attention a rank computes its own tokens with all heads; inside it computes all tokens of the row with
its share of the heads (Ulysses, arXiv 2309.14509). In between lie two all-to-alls, whose backward passes are
all-to-alls, too. So the gradients of the ranks add up to that of the whole row, as those of ranks with rows
of their own add up to that of all rows: ZeRO and the scaling of the loss know nothing of it.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_to_all_single_autograd

from common.data.types import SharedReads
from common.runtime.distributed import sequence_group


def row_of_slices(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """[1, H, n, d], this rank's slice with all heads -> [1, H' / ranks, ranks · n, d], the row with its own.

    Heads that do not divide by the ranks are repeated until they do (H'): key heads may be fewer than ranks.
    """
    heads, tokens, width = x.shape[1:]
    repeats = math.lcm(heads, ranks) // heads
    by_rank = x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).reshape(ranks, -1)
    of_slices = _exchanged(by_rank).view(ranks, -1, tokens, width)
    return of_slices.transpose(0, 1).reshape(1, -1, ranks * tokens, width)


def slice_of_row(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """[1, ranks · n, H / ranks, d], the row with this rank's heads -> [1, n, H, d], its slice with all."""
    tokens, heads, width = x.shape[1] // ranks, x.shape[2], x.shape[3]
    of_heads = _exchanged(x.reshape(ranks, -1)).view(ranks, tokens, heads, width)
    return of_heads.transpose(0, 1).reshape(1, tokens, -1, width)


def own_heads(per_head: torch.Tensor, ranks: int) -> torch.Tensor:
    """[H] -> [H / ranks], of the heads that this rank computes."""
    return per_head.chunk(ranks)[dist.get_rank(sequence_group())]


def _exchanged(x: torch.Tensor) -> torch.Tensor:
    """[ranks, m], what goes to each rank -> [ranks, m], what came from each. Carries the gradient."""
    return all_to_all_single_autograd(x, None, None, sequence_group())


def reads_of_group(values: torch.Tensor, reads: SharedReads | None) -> torch.Tensor:
    """What this rank needs of what all of its group have read. values: [R], read by this rank; all that is
    needed where ranks do not share rows (None). Carries the gradient."""
    if reads is None:
        return values
    ranks = dist.get_world_size(sequence_group())
    to_each = F.pad(values, (0, reads.length - len(values))).expand(ranks, -1)
    return _exchanged(to_each.contiguous()).flatten().index_select(0, reads.own)
