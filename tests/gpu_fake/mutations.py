"""Faults of the kinds that only a GPU shows. Each function puts one into the product, in this process."""

from __future__ import annotations

import functools
from typing import Any


def a_host_tensor_among_device_tensors() -> None:
    """A batch of which a part stays on the host."""
    from dataclasses import replace

    from common.data.types import Batch

    to = Batch.to
    Batch.to = lambda self, device: replace(to(self, device), trained_positions=self.trained_positions)


def a_prefix_made_on_the_host() -> None:
    """Keys of shared prefixes without their device."""
    from common.model.attention import SharedPrefix

    keys = SharedPrefix.keys.func
    SharedPrefix.keys = property(lambda self: (keys(self)[0].cpu(), *keys(self)[1:]))


def boundaries_of_documents_in_int64() -> None:
    """Flash attention takes int32."""
    _change_attention(lambda q, k, v, cu_q, *more: (q, k, v, cu_q.long(), *more))


def keys_of_another_dtype() -> None:
    _change_attention(lambda q, k, *more: (q, k.float(), *more))


def an_argument_that_the_kernel_does_not_have() -> None:
    _wrap_attention(lambda function: lambda *args, **kwargs: function(*args, is_causal=True, **kwargs))


def grouped_heads_without_saying_so() -> None:
    """Fewer heads of keys than of queries."""
    _wrap_attention(lambda function: lambda *args, enable_gqa=False, **kwargs: function(*args, **kwargs))


def a_target_too_few() -> None:
    _change_loss(lambda hidden, weight, bias, targets, *more: (hidden, weight, bias, targets[:-1], *more))


def a_weight_in_another_dtype() -> None:
    _change_loss(lambda hidden, weight, *more: (hidden, weight.half(), *more))


def an_item_in_every_micro_batch() -> None:
    from step1_sft.loss import TokenSums

    add = TokenSums.add

    def adding(self: Any, result: Any) -> None:
        add(self, result)
        float(result.loss_sum)

    TokenSums.add = adding


def positions_that_differ_asked_of_the_device() -> None:
    from common.model.packed import PackedModel

    read_at = PackedModel.read_at
    PackedModel.read_at = lambda self, rows, length, different=None: read_at(self, rows, length)


def a_blocking_copy_of_the_batch() -> None:
    from common.data.types import Batch, _moved

    Batch.to = lambda self, device: _moved(self, lambda x: x.to(device))


def a_batch_that_is_not_pinned() -> None:
    from common.data.types import Batch

    Batch.pinned = lambda self: self


def activations_that_are_kept() -> None:
    """Hidden states of every micro-batch stay on the device."""
    from step1_sft import train

    compute_loss, kept = train.compute_loss, []

    def computing(*args: Any, **kwargs: Any) -> Any:
        kept.append(compute_loss(*args, **kwargs))
        kept.append(kept[-1].token_losses.new_zeros(1 << 20))
        return kept[-2]

    train.compute_loss = computing


def whole_logits() -> None:
    """All rows of logits at once, beside those of every chunk."""
    from common.model import loss_kernel

    score = loss_kernel.score_rows
    held = []

    def computing(logits: Any, *more: Any, **options: Any) -> None:
        held.append(logits.new_zeros(64, *logits.shape))
        score(logits, *more, **options)

    loss_kernel.score_rows = computing


def _change_attention(change: Any) -> None:
    _wrap_attention(lambda function: lambda *args, **kwargs: function(*change(*args), **kwargs))


def _wrap_attention(wrap: Any) -> None:
    """With the signature of what is wrapped: the product looks at it."""
    from common.model import flash_attention

    function = flash_attention._varlen_function()
    wrapped = functools.wraps(function)(wrap(function))
    flash_attention._varlen_function = lambda: wrapped


def _change_loss(change: Any) -> None:
    from common.model import fused_loss

    apply = fused_loss._TokenCrossEntropy.apply
    fused_loss._TokenCrossEntropy.apply = lambda *args: apply(*change(*args))
