"""The inputs of recomputed layers in host memory, from their forward to their backward pass.

A layer that is recomputed keeps its input. With all layers that is what bounds the tokens of a pass once
nothing else does; in host memory (pinned) it is one input at a time on the device, and a second that is
fetched ahead. Copies go through a stream of their own, beside computation. Bytes go and come back unchanged.

Takes a transformers model whose layers are recomputed already. On the CPU there is nothing to move.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 64 << 20
"""Bytes of a block of pinned memory: torch rounds each up to a power of two, and keeps it for later ones."""

RECOMPUTE = "_gradient_checkpointing_func"
"""The attribute under which transformers keeps the function that runs a layer and forgets."""


def offload_layer_inputs(network: PreTrainedModel) -> None:
    """From now on, in every pass that keeps them. UserError for a model of which no layer is recomputed."""
    host = HostMemory()
    modules = [module for module in network.modules() if hasattr(module, RECOMPUTE)]
    for module in modules:
        setattr(module, RECOMPUTE, _offloading(getattr(module, RECOMPUTE), host))
    if not modules:
        raise UserError(
            f"model.activation_offload: no layer of model_type={network.config.model_type} is recomputed",
            hint="model.activation_offload=false",
        )


def _offloading(recompute: Callable[..., Any], host: HostMemory) -> Callable[..., Any]:
    def run(function: Callable[..., Any], hidden: Any, *rest: Any) -> Any:
        """rest: what layers have in common, which stays where it is."""
        kind = hidden.shape, hidden.dtype  # a hook that held `hidden` itself would keep it on the device

        def put(saved: torch.Tensor) -> Any:
            return host.put(saved) if (saved.shape, saved.dtype) == kind else saved

        with saved_tensors_hooks(put, lambda held: held.get() if isinstance(held, Away) else held):
            return recompute(function, hidden, *rest)

    return run


class HostMemory:
    """Tensors that were put away, in order; each is asked for about when the one after it is done with."""

    def __init__(self) -> None:
        self._last: Callable[[], Away | None] = lambda: None
        self._stream: Any = None

    def put(self, tensor: torch.Tensor) -> Away:
        """A copy on the host."""
        away = Away(tensor, self._last, self.stream_of(tensor.device))
        self._last = weakref.ref(away)
        return away

    def stream_of(self, device: torch.device) -> Any:
        """The stream of all copies; None on the CPU."""
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


class Away:
    """A tensor in host memory. before: the one that was put away before it, if it is there still."""

    def __init__(self, tensor: torch.Tensor, before: Callable[[], Away | None], stream: Any) -> None:
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._before, self._stream = before, stream
        self._fetched: torch.Tensor | None = None
        flat = tensor.detach().reshape(-1)
        parts = flat.split(max(1, CHUNK // tensor.element_size()))
        if stream is None:
            self._host = [part.clone() for part in parts]
            return
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host = [
                torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
                for part in parts
            ]
        flat.record_stream(stream)  # its memory is taken again when the copy is done

    def get(self) -> torch.Tensor:
        """The tensor where it was; the one before it is on its way from now on."""
        self.fetch()
        found, self._fetched = self._fetched, None
        assert found is not None
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        if (before := self._before()) is not None:
            before.fetch()
        return found

    def fetch(self) -> None:
        """Begin to copy it back, unless that has begun."""
        if self._fetched is not None:
            return
        self._fetched = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        parts = self._fetched.view(-1).split([len(part) for part in self._host])
        if self._stream is None:
            for part, held in zip(parts, self._host, strict=True):
                part.copy_(held)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which may use this memory still
        with torch.cuda.stream(self._stream):
            for part, held in zip(parts, self._host, strict=True):
                part.copy_(held, non_blocking=True)
        self._fetched.record_stream(self._stream)
