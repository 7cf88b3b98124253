"""What torch derived of operations' results, handed from a case's process to those after it.

FakeTensorMode keeps for each operation and the shapes, strides and dtypes of its arguments what it derived.
That is most of the time of a small case, and the same in the next one, which is a process of its own.
"""

from __future__ import annotations

import io
import pickle
from itertools import islice
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode, _DispatchCacheKey

CANNOT_TRAVEL = (TypeError, AttributeError, RuntimeError, pickle.PicklingError)
Entry = tuple[tuple[Any, ...], Any]
"""What an operation was asked, and what torch keeps of its result."""


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
    for asked, found in pickle.loads(packed):  # noqa: S301  (of a process of ours)
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
