"""The kernels that the fake device was asked for: bytes read and written, and floating-point operations.

Bytes are those of tensors that a kernel must read or write once: no cache helps between kernels, and none is
needed within one. Operations are of matrix products (torch's own formulas) and of packed attention.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from tests.gpu_fake.record import is_on_device, place, site, tensors_in

VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "device", "empty", "empty_like",
    "empty_strided", "expand", "is_pinned", "lift_fresh", "narrow", "new_empty", "new_empty_strided",
    "permute", "record_stream", "reshape", "resize_", "select", "set_", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "view_as",
}  # fmt: skip
"""What moves nothing."""
WRITES = {"copy_", "zero_", "fill_", "uniform_", "normal_"}
"""In place, and what was there is not read."""
GATHERS = {"embedding", "gather", "index", "index_select"}
"""Of their first argument they read what they return."""
SCATTERS = {"index_put_", "_index_put_impl_", "scatter_", "index_copy_", "index_add_"}
"""Of their first argument they read and write as much as they are given."""
NOT_FUSED = {"mm", "bmm", "addmm", "_varlen_attn", "_varlen_attn_backward"}
"""What a compiler of graphs leaves to other kernels."""
HEAD = "common/model/fused_loss.py"
"""What is asked for in there is named apart."""
Values = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Kernel:
    """All calls of a kernel. operations: floating-point; single: those of them in fp32."""

    calls: int = 0
    bytes: float = 0.0
    operations: float = 0.0
    single: float = 0.0

    def add(self, size: float, operations: float, is_half: bool = True) -> None:
        self.calls += 1
        self.bytes += size
        self.operations += operations
        self.single += 0.0 if is_half else operations


class Kernels:
    """What was asked for, by (phase, step, kernel). values: of a device tensor that is known."""

    def __init__(self, values: Values) -> None:
        self.found: defaultdict[tuple[str, int, str], Kernel] = defaultdict(Kernel)
        self._values = values
        self._is_fused = False

    @contextlib.contextmanager
    def fused(self, kernels: Iterable[tuple[str, float]]) -> Iterator[None]:
        """While the block runs a graph that was compiled: (name, bytes) of its kernels."""
        for name, size in kernels:
            self.found[*place(), name].add(size, 0.0)
        before, self._is_fused = self._is_fused, True
        try:
            yield
        finally:
            self._is_fused = before

    def add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """One operation of torch, unless it moves nothing."""
        name = func.overloadpacket.__name__
        if name in VIEWS or func.namespace == "profiler" or (self._is_fused and name not in NOT_FUSED):
            return
        given = tensors_in([args, {key: value for key, value in kwargs.items() if key != "out"}])
        made = tensors_in(out) or _written(func, args)
        if not any(map(is_on_device, (*given, *made))) or _are_views(func, made, given):
            return
        size = _bytes_of(name, given, made)
        if name == "_varlen_attn" and (used := _used(args)) is not None:
            unread = [x.shape[0] - int(self._values(used).sum()) for x in args[1:3]]
            size -= sum(n * size_of(x[:1]) for n, x in zip(unread, args[1:3], strict=True))
        if HEAD in site():
            name = f"head: {name}"
        factors = [x for x in given if x.is_floating_point()]
        first = 1 if func.overloadpacket.__name__ == "addmm" else 0  # behind the sum, which is fp32
        is_half = len(factors) > first and factors[first].element_size() == 2
        operations = _operations(func, args, kwargs, out, self._values)
        self.found[*place(), name].add(size, operations, is_half)

    def plain(self) -> list[list[Any]]:
        """As JSON has it: phase, step, kernel, calls, bytes, operations, operations in fp32."""
        return [
            [*key, kernel.calls, kernel.bytes, kernel.operations, kernel.single]
            for key, kernel in sorted(self.found.items())
        ]


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of its elements; what is expanded lies there once."""
    places = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in places if stride) * tensor.element_size()


def _are_views(func: Any, made: Iterable[torch.Tensor], given: Iterable[torch.Tensor]) -> bool:
    there = {id(x.untyped_storage()) for x in given}
    return not func._schema.is_mutable and all(id(x.untyped_storage()) in there for x in made)


def _written(func: Any, args: Any) -> list[torch.Tensor]:
    """Of an operation that returns nothing: the arguments that it changes. AdamW may change gradients, to
    unscale them; ours are not scaled there."""
    arguments = zip(func._schema.arguments, args, strict=False)
    changed = [
        x for a, x in arguments if a.alias_info is not None and a.alias_info.is_write and a.name != "grads"
    ]
    return tensors_in(changed)


def _bytes_of(name: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> float:
    written = sum(map(size_of, made))
    if name in WRITES:
        return written + sum(map(size_of, given[1:]))
    if name in GATHERS:
        return 2 * written + sum(map(size_of, given[1:]))
    if name in SCATTERS:
        return 3 * size_of(given[-1]) + sum(map(size_of, given[1:-1]))
    return written + sum(map(size_of, given))


def _operations(func: Any, args: Any, kwargs: Any, out: Any, values: Values) -> float:
    name = func.overloadpacket.__name__
    if name == "_varlen_attn":
        return 4.0 * _products(args, values)
    if name == "_varlen_attn_backward":
        return 10.0 * _products(args[1:], values)
    if name == "addmm":  # torch's own count does not know the form that names a dtype
        (rows, inner), columns = args[1].shape, args[2].shape[1]
        return 2.0 * rows * inner * columns
    if func.overloadpacket in flop_registry:
        return float(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
    return 0.0


def _used(args: Any) -> torch.Tensor | None:
    """`seqused_k` of an attention that reads a cache: how many keys of each sequence."""
    return args[11] if len(args) > 11 and isinstance(args[11], torch.Tensor) else None


def _products(args: Any, values: Values) -> float:
    """Products of numbers in queries @ keys of all heads: each document's last query sees its last key."""
    query = args[0]
    bounds = [x for x in tensors_in(list(args)) if x.dtype is torch.int32][:2]
    queries, keys = (values(x).double().diff() for x in bounds)
    if (used := _used(args)) is not None:
        keys = values(used).double()
    pairs = (queries * (keys - queries) + queries * (queries + 1) / 2).sum()
    return float(pairs) * query.shape[1] * query.shape[2]
