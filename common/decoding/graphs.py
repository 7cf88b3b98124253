"""Forward passes of equal shape as CUDA graphs: recorded once, then launched by the host as one.

Takes a function of device tensors and what these are on the host; returns what the function gives. A shape is
computed as usual first, which loads kernels and shows whether the host waits for the device, then recorded,
then replayed from buffers that are filled anew. Graphs hold addresses, those of the weights too: make a new
`Graphs` whenever a tensor that passes read may have moved. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

WARM_UP_PASSES = 2
"""Passes of a shape that are computed as usual before it is recorded."""

Compute = Callable[..., torch.Tensor]


class Replayed(Protocol):
    def replay(self) -> None: ...


class Graphs:
    """Graphs of passes, by shape, which share their memory. fault: why there will be none; None: nothing
    speaks against them. What a pass returns is written over by the next one."""

    def __init__(self, device: torch.device) -> None:
        self.fault: str | None = None
        self._device = device
        self._seen: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, tuple[Replayed, list[torch.Tensor], torch.Tensor]] = {}
        self._pool: Any = None

    def run(self, shape: Hashable, compute: Compute, inputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """compute(*inputs) with inputs [..] on the host; None, from now on, where it cannot be recorded."""
        if self.fault is not None:
            return None
        try:
            if shape not in self._recorded:
                on_device = [given.to(self._device, non_blocking=True) for given in inputs]
                seen = self._seen[shape] = self._seen.get(shape, 0) + 1
                if seen <= WARM_UP_PASSES:
                    with without_waiting():
                        return compute(*on_device)
                graph, output = self._record(compute, on_device)
                self._recorded[shape] = graph, on_device, output
        except RuntimeError as error:
            self.fault = str(error).strip().partition("\n")[0]
            return None
        graph, buffers, output = self._recorded[shape]
        for buffer, given in zip(buffers, inputs, strict=True):
            buffer.copy_(given, non_blocking=True)
        graph.replay()
        return output

    def _record(self, compute: Compute, inputs: Sequence[torch.Tensor]) -> tuple[Replayed, torch.Tensor]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return recorded(lambda: compute(*inputs), self._pool)


def recorded(compute: Callable[[], torch.Tensor], pool: Any) -> tuple[Replayed, torch.Tensor]:
    """A graph of `compute`, and the tensor into which replaying it writes."""
    graph = torch.cuda.CUDAGraph()
    # threads of NCCL and of the loader go on asking the driver meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = compute()
    return graph, output


@contextmanager
def without_waiting() -> Iterator[None]:
    """RuntimeError in the block where the host would wait for the device, which cannot be recorded."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
