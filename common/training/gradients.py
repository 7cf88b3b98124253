"""Gradients of a lone rank that lie end to end, as the optimizer reads them.

Under ZeRO-1 DeepSpeed copies gradients twice before the optimizer reads them: out of the buffer in which
ranks reduce them, and into one flat tensor. A lone rank reduces nothing: each of its fp32 gradients is a
part of the flat tensor from the first pass of a step on, which saves 8 bytes per trained weight at its end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class FlatGradients:
    """The flat gradients of an optimizer step, one tensor for each of DeepSpeed's groups."""

    def __init__(self, zero: Any) -> None:
        """zero: DeepSpeed's optimizer, for which `lie_end_to_end` is true."""
        self._zero = zero
        self._groups: dict[int, Any] = {}
        zero.copy_grads_in_partition = lambda parameter, group_idx=None: None  # they are where they belong
        zero.get_flat_partition = self._take

    def begin(self) -> None:
        """Before the first pass of a step: gradients of 0, to which each pass adds."""
        for number, parameters in enumerate(self._zero.params_in_partition):
            group = self._zero._build_compact_grad_partition_buffer(number)
            parts = (part for part in group if not getattr(part, "_zero_padding", False))
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.detach()  # DeepSpeed moves the data of small ones; the part stays
            self._groups[number] = group

    def _take(self, *_: Any, param_group_idx: int, **__: Any) -> Any:
        """DeepSpeed asks for a group's gradients, once in a step."""
        return self._groups.pop(param_group_idx)


def lie_end_to_end(zero: Any) -> bool:
    """Whether `FlatGradients` holds: one rank, stage 1, fp32, nothing in host memory, no Muon.

    zero: any of DeepSpeed's optimizers. Muon changes gradients on their way into the flat tensor.
    """
    return (
        getattr(zero, "partition_gradients", None) is False
        and dist.get_world_size(zero.dp_process_group) == 1
        and zero.dtype is torch.float32
        and not zero.cpu_offload
        and not any(zero._is_muon_group(parameters) for parameters in zero.params_in_partition)
    )
