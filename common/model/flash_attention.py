"""Flash attention over sequences that lie end to end: torch's `varlen_attn`, whatever version is there.

Takes [N, heads, d] in half precision on a GPU; which tensors it takes, and which of its options this torch
has, is asked first. Packed rows (`attention.py`) and next tokens (`common/decoding/slots.py`) go through it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from common.notices import notice

HALF = (torch.bfloat16, torch.float16)
"""What flash attention takes."""

FLASH_MAX_HEAD_DIM = 256
"""Widest head that the flash kernels of torch accept."""


@cache
def _varlen_function() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@cache
def _varlen_keywords() -> frozenset[str]:
    function = _varlen_function()
    return frozenset() if function is None else frozenset(inspect.signature(function).parameters)


def flash_applies(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Flash attention takes half precision, equal head widths in steps of 8, and no dropout."""
    width = query.shape[-1]
    fits = width == value.shape[-1] and width % 8 == 0 and width <= FLASH_MAX_HEAD_DIM
    return query.is_cuda and query.dtype in HALF and fits and dropout == 0.0 and _has_varlen()


def _has_varlen() -> bool:
    """`window_size` and `scale` came with torch 2.11; without them causality is spelled differently."""
    return {"window_size", "scale"} <= _varlen_keywords()


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest: int,
    key_longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """[N, H, d]: causal attention of each sequence's queries [N, H, d], aligned with the last of its keys.

    key, value: [K, G, d]. bounds, key_bounds: int32 [D + 1], where sequences begin in queries and keys;
    longest, key_longest: tokens of one at most. scaling: of the scores (None: by d). window: each query sees
    itself and the `window - 1` keys before it (None: all).
    """
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _varlen_keywords():  # torch 2.12 and later insist on it
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    function = _varlen_function()
    assert function is not None
    out: torch.Tensor = function(
        query, key, value, bounds, key_bounds, longest, key_longest,
        scale=scaling, window_size=(_tokens_before(window, key_longest), 0), **options,
    )  # fmt: skip
    return out


def _tokens_before(window: int | None, keys: int) -> int:
    """Flash attention counts the tokens before the query; transformers counts the query as well."""
    return -1 if window is None or window > keys else window - 1


def reads_used_keys(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend_to_used_keys` takes such heads [..., d] on this device."""
    return flash_applies(query, value, 0.0) and _has_used_keys()


def _has_used_keys() -> bool:
    return {"seqused_k", "enable_gqa"} <= _varlen_keywords()


def attend_to_used_keys(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    used: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """[1, M, H, d]: one token of each of M sequences, from what its slot holds.

    query: [M, H, d]. keys, values: [S, G, capacity, d] with S at least M, of which sequence s sees the first
    `used[s]` of slot s (int32 [M]), its own token's the last. query_bounds, key_bounds: int32 [M + 1], where
    each begins in the queries, and in the slots end to end. Shapes do not depend on how much is used.
    """
    function = _varlen_function()
    assert function is not None
    capacity, width = keys.shape[2:]
    k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], width) for x in (keys, values))
    left = _tokens_before(window, capacity)
    # a token alone sees nothing behind it. Said without a right bound, the kernel reads the keys of a
    # key-value head once for all of its queries
    size = (-1, -1) if left < 0 else (left, 0)
    out = function(
        query, k, v, query_bounds, key_bounds, 1, capacity, scale=scaling, window_size=size,
        enable_gqa=query.shape[1] != k.shape[1], seqused_k=used,
    )  # fmt: skip
    return out[None]


def say_without_used_keys(device: torch.device, dtype: torch.dtype) -> None:
    """A notice where next tokens would go through flash attention with another torch."""
    if device.type == "cuda" and dtype in HALF and not _has_used_keys():
        notice(
            "next tokens are sampled with attention to as many keys as the longest response has",
            f"the varlen_attn of torch {torch.__version__} does not take seqused_k",
            "slower the more their lengths differ; torch 2.13 has it",
        )
