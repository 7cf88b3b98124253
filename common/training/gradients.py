"""Gradients of a lone rank that lie end to end, as the optimizer reads them.

Under ZeRO-1 in fp32 DeepSpeed copies gradients twice before the optimizer reads them: out of the buffer in
which ranks reduce them, and into one flat tensor. A lone rank reduces nothing: each of its gradients is a
part of the flat tensor from the first pass of a step on. The step's end then takes 8 bytes less per trained
weight. In bf16 DeepSpeed's optimizer is another one, whose gradients lie so already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


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


class FlatGradients:
    """The gradients of an optimizer step, one flat tensor for each of DeepSpeed's groups."""

    def __init__(self, zero: Any) -> None:
        """zero: DeepSpeed's optimizer, of which `lie_end_to_end` is true."""
        self._zero = zero
        # as DeepSpeed does where gradients are summed in another dtype
        zero._use_compact_grad_partition_buffer = lambda group: True
        # it would add a gradient to what is that gradient, or its copy
        zero._add_to_grad_partition_buffer = lambda part, reduced: part.copy_(reduced)

    def begin(self) -> None:
        """Before the first pass of a step: gradients of 0, to which each pass adds."""
        zero = self._zero
        for number, parameters in enumerate(zero.params_in_partition):
            group = zero._build_compact_grad_partition_buffer(number)
            parts = (part for part in group if not getattr(part, "_zero_padding", False))
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.detach()  # DeepSpeed moves its data, not the part's
            zero.averaged_gradients[number] = group
