"""What torch derives of operations' results: kept, and handed from a case's process to those after it.

FakeTensorMode keeps for each operation and the shapes, strides and dtypes of its arguments what it derived.
Deriving is most of the time of a small case, and the same in the next one, which is a process of its own;
looking it up is most of the time of a large one.
"""

from __future__ import annotations

import io
import pickle
from itertools import islice
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, _DispatchCacheKey

CANNOT_TRAVEL = (TypeError, AttributeError, RuntimeError, pickle.PicklingError)
Entry = tuple[tuple[Any, ...], Any]
"""What an operation was asked, and what torch keeps of its result."""


PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Mode(FakeTensorMode):
    """For tensors of known sizes: what an operation was asked is said in fewer words."""

    def _prep_args_for_hash(self, result: Any, args: Any, state: Any, objects: Any) -> None:
        if type(args) not in (tuple, list):
            super()._prep_args_for_hash(result, args, state, objects)
            return
        result.append((type(args), len(args)))
        for each in args:
            if type(each) in PLAIN:
                result.append((type(each), each))  # 1 is not 1.0
            elif type(each) is FakeTensor and self._is_simple(each):
                result.append(_described(each))
            else:
                super()._prep_args_for_hash(result, (each,), state, objects)

    def _is_simple(self, tensor: FakeTensor) -> bool:
        known = tensor.constant is None and not tensor._has_symbolic_sizes_strides
        return known and tensor.fake_mode is self and tensor.layout is torch.strided


def _described(tensor: FakeTensor) -> tuple[Any, ...]:
    """All that a result can depend on, but for values. Whether it is contiguous follows from it."""
    return (
        tensor.dtype, tensor.shape, tensor.stride(), tensor.fake_device, tensor.storage_offset(),
        tensor.untyped_storage().nbytes(), tensor.requires_grad, tensor.is_conj(), tensor.is_neg(),
        tensor.is_inference(), tensor.is_quantized,
    )  # fmt: skip


def count() -> int:
    """How many there are in this process."""
    return len(FakeTensorMode.cache)


def since(first: int) -> bytes:
    """Those of torch's own operations that came after the first ones; the few that do not travel are left
    out."""
    new = ((key.key, found) for key, found in islice(FakeTensorMode.cache.items(), first, None))
    entries = [entry for entry in new if getattr(entry[0][0], "namespace", None) == "aten"]
    try:
        return _packed(entries)
    except CANNOT_TRAVEL:
        return _packed([entry for entry in entries if _travels(entry)])


def take(packed: bytes) -> None:
    """Know what another process derived. packed: of `since`."""
    for asked, found in pickle.loads(packed):  # noqa: S301 - of a process of ours
        FakeTensorMode.cache.setdefault(_DispatchCacheKey(asked), found)


def _travels(entry: Entry) -> bool:
    try:
        _packed([entry])
    except CANNOT_TRAVEL:
        return False
    return True


def _packed(entries: list[Entry]) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(entries)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, OpOverload):
            return _operation, (value.overloadpacket.__name__, value._overloadname)
        return NotImplemented


def _operation(name: str, overload: str) -> OpOverload:
    found: OpOverload = getattr(getattr(torch.ops.aten, name), overload)
    return found
