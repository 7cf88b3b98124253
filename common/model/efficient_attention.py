"""Packed attention in one call for what flash attention does not take: fp32, dropout, heads of any width.

The kernel is the memory-efficient one behind torch's SDPA, which takes the bounds of documents as well. It is
an operator of our own, since torch's derivative of it forgets windows, derives no shapes with them, and keeps
numbers of all documents at the length of the longest. While a call runs, these are there: in the forward pass
4 bytes, in the backward pass 4 (d + 1), for each document, head and token of the longest document.

A document has as many queries as keys: where it has fewer, the kernel's backward pass is wrong with windows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CAUSAL = 1
"""The kernel's number for a mask by which tokens see those before them and themselves."""
ALIGNED = 32
"""The kernel pads sums of each document and head to a multiple of so many."""


@torch.library.custom_op("rlhf::efficient_attention", mutates_args=())
def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, window: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Causal attention within each document: query [N, H, d], key [N, G, d], value [N, G, v]; G divides H,
    and 8 the widths.

    bounds: int32 [D + 1]; longest: most of a document; window: tokens that each sees, itself among them (0:
    all); dropout: of weights. Returns [N, H, v]; for the backward pass fp32 [N, H], the logarithm of each sum
    of weights, and where random numbers began, two int64 on the host.
    """
    groups = query.shape[1] // key.shape[1]
    out, sums, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
        query[None], _repeated(key, groups), _repeated(value, groups), None, bounds, bounds, longest, longest,
        dropout, CAUSAL, True, scale=scale, window_size=window or None,
    )  # fmt: skip
    document, within = _places(bounds, len(query))
    if not dropout:  # then they are not set, and not on the host
        seed, offset = torch.zeros(2, dtype=torch.int64).unbind()
    return out[0], sums[document, :, within], seed.clone(), offset.clone()


@efficient_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length, heads = query.shape[:2]
    begun = torch.empty((), dtype=torch.int64, device="cpu"), torch.empty((), dtype=torch.int64, device="cpu")
    sums = query.new_empty(length, heads, dtype=torch.float32)
    return query.new_empty(length, heads, value.shape[-1]), sums, *begun


@torch.library.custom_op("rlhf::efficient_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, out: Tensor, sums: Tensor,
    seed: Tensor, offset: Tensor, longest: int, scale: float, window: int, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value."""
    groups = query.shape[1] // key.shape[1]
    document, within = _places(bounds, len(query))
    rows = -(-longest // ALIGNED) * ALIGNED
    # infinity where a document has no token: its weights are 0
    padded = sums.new_full((len(bounds) - 1, query.shape[1], rows), float("inf"))
    padded[document, :, within] = sums
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        grad[None], query[None], _repeated(key, groups), _repeated(value, groups), None, out[None], bounds,
        bounds, longest, longest, padded, dropout, seed, offset, CAUSAL, False, scale=scale,
        window_size=window or None,
    )  # fmt: skip
    return dq[0], *(x[0].unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, bounds, ctx.longest, ctx.scale, ctx.window, ctx.dropout = inputs
    ctx.save_for_backward(*tensors, bounds, *output)


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    found = _backward(grad, *ctx.saved_tensors, ctx.longest, ctx.scale, ctx.window, ctx.dropout)
    return *found, None, None, None, None, None


torch.library.register_autograd(efficient_attention, _differentiate, setup_context=_keep)


def _repeated(heads: Tensor, groups: int) -> Tensor:
    """[1, N, H, d] of [N, G, d]: the kernel knows no shared heads."""
    return heads.repeat_interleave(groups, 1)[None]


def _places(bounds: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """int64 [N] twice: each token's document, and its place in there."""
    document = torch.repeat_interleave(bounds.diff(), output_size=length)
    return document, torch.arange(length, device=bounds.device) - bounds[document]
