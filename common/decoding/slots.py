"""Attention of sequences that are decoded side by side, from a cache with a slot for each of them.

`decoding_attention` is registered with transformers under the name "decoding". It takes what an attention
module gives for one flat sequence and, through the model's forward arguments, a `DecodingStep`: which slots
go on by a token, and which prompts follow them. It writes keys and values into the `SlotCache` and returns
[1, N, H, d]. Whole prompts go through `packed_attention`. Next tokens read the keys of their slot: on CUDA in
half precision by flash attention, which is told on the device how many there are; elsewhere in chunks of
slots whose lengths the host knows. It neither chooses tokens nor fills free slots.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from common.model.attention import (
    DECODING,
    Scores,
    packed_attention,
    refuse_unsupported,
    softmax_with_sinks,
    switched_to,
)
from common.model.flash_attention import attend_to_used_keys, reads_used_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel


class SlotCache:
    """Keys and values of sequences decoded side by side, of every layer; sequence s fills slot s from 0 on.

    slots, capacity: how many sequences, and tokens of each. A layer's tensors [slots, G, capacity, d] are
    made when it first writes, for its own widths. On the CPU half precision is kept in fp32, in which
    attention is computed there. Elsewhere the heads of a token lie side by side, as flash attention reads
    them.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self._layers: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def of_layer(
        self, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept for the attention `module`, which writes like `key` and `value` [1, G, N, d]."""
        if module not in self._layers:
            # zeros: what was never written is read with weight 0. Memory is taken when it is written
            self._layers[module] = (self._empty(key), self._empty(value))
        return self._layers[module]

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        _, groups, _, width = like.shape
        if like.device.type == "cpu":
            return torch.zeros((self.slots, groups, self.capacity, width), dtype=torch.float32)
        return like.new_zeros((self.slots, self.capacity, groups, width)).transpose(1, 2)

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Let the first `length` tokens of the slots `targets` be those of `source`."""
        self._move(list(targets), [source] * len(targets), length)

    def rearrange(self, order: Sequence[int], length: int) -> None:
        """Slot s gets the first `length` tokens of what was in slot `order[s]`. order: a permutation."""
        moved = [slot for slot, before in enumerate(order) if slot != before]
        self._move(moved, [order[slot] for slot in moved], length)

    def _move(self, slots: list[int], before: list[int], length: int) -> None:
        tensors = [cached for layer in self._layers.values() for cached in layer]
        if not slots or not tensors:
            return
        places = torch.tensor([slots, before]).to(tensors[0].device, non_blocking=True)
        for cached in tensors:
            cached[places[0], :, :length] = cached[places[1], :, :length]


@dataclass
class DecodingStep:
    """What one forward pass of a decoder computes: a next token of M sequences, then whole prompts.

    cache: where keys and values go. slots, positions: int64 [W], where in it each of the pass's first W
    tokens goes: the next tokens of the slots 0 to M - 1, then prompts. lengths: int32 [M], keys that each
    next token sees. query_bounds, key_bounds: int32 [M + 1], where the tokens of each slot begin, in the pass
    and in the cache. chunks: (begin, end, length): slots that are computed together where the host has to
    know how far keys are read; empty where it may not matter. prompts: cu_seqlens, int32 [D + 1], of what
    follows the slots, of which the longest has `longest` tokens; None without any.
    """

    cache: SlotCache
    slots: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    chunks: Sequence[tuple[int, int, int]] = ()
    prompts: torch.Tensor | None = None
    longest: int = 0
    _biases: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """M."""
        return len(self.lengths)

    def write(self, keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put key and value [1, G, N, d] where they belong in a layer's keys and values."""
        for cached, new in ((keys, key[0]), (values, value[0])):
            written = new[:, : len(self.slots)].transpose(0, 1)
            cached[self.slots, :, self.positions] = written.to(cached.dtype)

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[M, 1, 1, L]: 0 where a slot's token sees, minus infinity elsewhere. The same for all layers."""
        if (window, dtype) not in self._biases:
            longest = max(length for _, _, length in self.chunks)
            places = torch.arange(longest, device=self.positions.device)[None]
            last = self.positions[: self.rows, None]
            hidden = places > last if window is None else (places > last) | (places <= last - window)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._biases[window, dtype] = bias.masked_fill_(hidden, float("-inf"))[:, None, None]
        return self._biases[window, dtype]


class LengthsOnHost(RuntimeError):
    """Attention needs `chunks`, and none were given."""


def decoding_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    decoding: DecodingStep | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one flat sequence: next tokens of cached sequences, then new prompts.

    Shapes and errors as for `packed_attention`; what goes where says `decoding`. The outcome for a sequence
    does not depend on what is computed beside it, to the last bit where the matrix kernels allow it.
    """
    refuse_unsupported(module, attention_mask, is_causal, kwargs)
    if decoding is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError("decoding attention needs one flat sequence and a DecodingStep as `decoding`")
    keys, values = decoding.cache.of_layer(module, key, value)
    decoding.write(keys, values, key, value)
    scores = Scores(scaling, 0.0, softcap, s_aux)
    rows = decoding.rows
    outs = []
    if rows:
        outs = [_attend_to_slots(query[0, :, :rows], keys, values, decoding, scores, sliding_window)]
    if decoding.prompts is not None:
        q, k, v = (x[:, :, rows:] for x in (query, key, value))
        out, _ = packed_attention(
            module, q, k, v, None, scaling, cu_seq_lens_q=decoding.prompts,
            max_length_q=decoding.longest, sliding_window=sliding_window, softcap=softcap,
            s_aux=s_aux,
        )  # fmt: skip
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1), None


def _attend_to_slots(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: DecodingStep,
    scores: Scores,
    window: int | None,
) -> torch.Tensor:
    """[1, M, H, d] from query [H, M, d]. LengthsOnHost where `step` has no chunks and needs them."""
    if scores.is_plain and reads_used_keys(query, values):
        return attend_to_used_keys(
            query.transpose(0, 1), keys, values, step.query_bounds, step.key_bounds, step.lengths,
            scores.scaling, window,
        )  # fmt: skip
    if not step.chunks:
        raise LengthsOnHost("its attention of next tokens needs lengths that the host counts")
    # the query heads of a key-value head are rows of one product
    heads, _, width = query.shape
    groups = keys.shape[1]
    grouped = query.transpose(0, 1).reshape(-1, groups, heads // groups, width).to(keys.dtype)
    bias = step.bias(window, keys.dtype)
    outs = []
    for begin, end, length in step.chunks:
        part = slice(begin, end)
        q, seen = grouped[part], bias[part, ..., :length]
        k, v = keys[part, :, :length], values[part, :, :length]
        if q.is_cuda and scores.is_plain:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scores.scale_for(q))
        else:  # faster than SDPA, and bit for bit the same whatever the number of slots and keys
            weights = scores.capped(torch.matmul(q, k.transpose(2, 3)).mul_(scores.scale_for(q))).add_(seen)
            sinks = None if scores.sinks is None else scores.sinks.view(groups, heads // groups, 1)
            out = torch.matmul(softmax_with_sinks(weights, sinks), v)
        outs.append(out.reshape(end - begin, heads, -1))
    return torch.cat(outs)[None].to(query.dtype)


def decoding_into_slots(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Switch the model to `decoding_attention` while the block runs."""
    from transformers import AttentionInterface

    AttentionInterface.register(DECODING, decoding_attention)
    return switched_to(model, DECODING)
