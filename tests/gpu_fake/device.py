"""A GPU that is not there: host tensors are real, device tensors have shape, dtype and device, no numbers.

Within `with Device():` every operation of torch passes through here. Among host tensors it is computed. With
a device tensor torch's FakeTensorMode derives shape and dtype of the result; what a GPU would refuse (a host
tensor among device tensors, dtypes or shapes that no kernel takes) raises here too. Recorded are:

* each synchronisation: the host waits for the device, with the line that asks;
* each collective, and the bytes that are allocated on the device, with their peak.

Integers that came from the host keep their values on the side, so that what is decided by them is right.
Other numbers are not known: see `answers`. Kernels' numbers, races, NCCL and speed are not shown here.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from tests.gpu_fake.answers import answer
from tests.gpu_fake.contracts import attention_workspace, refuse
from tests.gpu_fake.derived import Mode
from tests.gpu_fake.kernels import Kernels
from tests.gpu_fake.record import Record, is_on_device, site, tensors_in

aten = torch.ops.aten
FOLLOWED = 1 << 16
"""Elements of a device tensor whose values are kept on the side, at most."""
LARGE = 1 << 20
"""Elements of a host tensor above which it is fake as well: a state of 70B weights fits no test machine."""
BLOCK = 512
"""Bytes that the caching allocator rounds up to."""
SIZED_BY_VALUES = {
    aten.bincount, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.nonzero, aten.masked_select,
}  # fmt: skip
MADE_FROM_NOTHING = {
    "arange", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "scalar_tensor", "zeros_like",
    "ones_like", "full_like",
}  # fmt: skip
MAKES = {"empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "arange"}
Tensors = list[torch.Tensor]
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class Device(TorchDispatchMode):
    """One GPU. record: everything it was asked to do."""

    current: Device | None = None

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self.kernels: Kernels | None = None  # None: they are not counted
        self._fake = Mode(allow_non_fake_inputs=True)
        self._values = WeakIdKeyDictionary()
        self._storages = WeakIdKeyDictionary()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile work in here; see `fused`."""
        return True

    def __enter__(self) -> Device:
        Device.current = self
        # torch.tensor(..., device="cuda") then makes a host tensor and copies it
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        Device.current = None
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*error)

    def count_kernels(self) -> None:
        """From now on."""
        self.kernels = Kernels(self.values_of)

    def values_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What `tolist` of a device tensor gives: ones, where the values are not known."""
        known = self._values.get(tensor)
        return torch.ones(tensor.shape, dtype=tensor.dtype) if known is None else known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        on_device = _is_cuda(kwargs.get("device")) or any(map(is_on_device, fakes))
        if not fakes and not on_device:
            return self._on_host(func, args, kwargs)
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            return self._read(args[0])
        if packet in (aten.equal, aten.allclose):
            self._waits(str(packet), on_device)
            return True
        if packet in (aten._to_copy, aten.copy_):
            return self._copy(func, args, kwargs, tensors, fakes)
        if packet is aten._pin_memory:
            return args[0]
        if packet is aten.is_pinned:
            return False
        if _is_sized_by_values(func, args, kwargs):
            return self._sized_by_values(func, args, kwargs, fakes)
        if on_device:
            self._refuse_host_tensors(func, tensors)
            self._waits("index_put by a mask", _puts_by_mask(packet, args))
            refuse(func, args, kwargs)
        return self._run(func, args, kwargs, tensors, fakes)

    def _run(self, func: Any, args: Any, kwargs: Any, tensors: Tensors, fakes: Tensors) -> Any:
        """One operation with something fake. tensors: all of its arguments; fakes: those among them."""
        if func.namespace == "c10d":
            self.record.collective(func.overloadpacket.__name__, args)
            out = func(*args, **kwargs)
        else:
            if len(fakes) < len(tensors):
                args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
            if own := OWN_SHAPES.get(func):
                with self._fake:
                    out = own(*args, **kwargs)
            else:  # as within the mode, which takes a third of the time to enter and to leave
                out = self._fake.dispatch(func, (), args, kwargs)
            if self.kernels is not None:
                self.kernels.add(func, args, kwargs, out)
        self._allocate(out)
        self._passing(func, args)
        self._follow(func, args, kwargs, fakes, out)
        return out

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation among host tensors: computed, unless it makes a large one."""
        if kwargs.get("pin_memory"):
            return self._pinned(func, args, {**kwargs, "pin_memory": False})
        if func.overloadpacket.__name__ in MAKES and args and not _is_meta(kwargs.get("device")):
            size = args[0] if isinstance(args[0], (list, tuple)) else ()
            if size and math.prod(size) > LARGE and kwargs.get("dtype") is not torch.uint8:
                with self._fake:
                    return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _pinned(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """Memory that the driver knows; torch rounds it up to a power of two."""
        made: torch.Tensor = self._on_host(func, args, kwargs).pin_memory()
        size = 1 << (made.untyped_storage().nbytes() - 1).bit_length()
        self.record.pin(size)
        weakref.finalize(made.untyped_storage(), self.record.pin, -size)
        return made

    def _refuse_host_tensors(self, func: Any, tensors: list[torch.Tensor]) -> None:
        """A number may be on the host; indices are copied, for which the host waits."""
        for tensor in tensors:
            if (
                is_on_device(tensor)
                or tensor.is_meta
                or tensor.dim() == 0
                or func.overloadpacket is aten.set_
            ):
                continue
            if func.overloadpacket not in INDEXED:
                raise RuntimeError(f"{func}: a host tensor meets a device tensor at {site()}")
            self._waits("index from host")

    # Memory -----------------------------------------------------------------------------------------

    def _allocate(self, made: Any) -> None:
        for tensor in tensors_in(made):
            if not is_on_device(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self._storages:
                size = math.ceil(storage.nbytes() / BLOCK) * BLOCK
                self._storages[storage] = size
                self.record.allocated(size)
                weakref.finalize(storage, self.record.freed, size)

    def _passing(self, func: Any, args: Any) -> None:
        """What is there while a kernel runs."""
        if func.namespace == "rlhf" and (size := attention_workspace(func, args)):
            self.record.allocated(size)
            self.record.freed(size)

    # Synchronisations -------------------------------------------------------------------------------

    def _waits(self, what: str, on_device: bool = True) -> None:
        if on_device:
            self.record.sync(what)

    def _read(self, tensor: torch.Tensor) -> Any:
        """`item()`, `float()`, `bool()`, an `if`."""
        self._waits("item", tensor.is_cuda)
        known = self._values.get(tensor)
        return answer(tensor.dtype) if known is None else known.item()

    def _copy(self, func: Any, args: Any, kwargs: Any, tensors: Tensors, fakes: Tensors) -> Any:
        """`to` and `copy_`. Between host and device the host waits, unless it is told not to."""
        in_place = func.overloadpacket is aten.copy_
        source = args[1] if in_place else args[0]
        target = args[0].device if in_place else torch.device(kwargs.get("device") or source.device)
        waits = not (kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2]))
        if source.device.type == "cpu" and target.type == "cuda":
            self._waits("copy from host", waits and source.dim() > 0)
            if source.dim() > 0 and not source.is_pinned():
                self.record.from_pageable(source)
            return self._to_device(source, args, kwargs, in_place)
        if source.is_cuda and target.type == "cpu":
            self._waits("copy to host", waits)
            return self._to_host(func, source, args, kwargs, in_place)
        return self._run(func, args, kwargs, tensors, fakes)

    def _to_device(self, source: torch.Tensor, args: Any, kwargs: Any, in_place: bool) -> torch.Tensor:
        out = args[0]
        if in_place:
            torch.broadcast_shapes(source.shape, out.shape)  # raises
        else:
            with self._fake:
                out = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device="cuda")
        self._allocate(out)
        if not isinstance(source, FakeTensor) and out.numel() <= FOLLOWED:
            self._values[out] = source.detach().expand(out.shape).clone().to(out.dtype)
        else:
            self._values.pop(out, None)
        return out

    def _to_host(self, func: Any, source: Any, args: Any, kwargs: Any, in_place: bool) -> torch.Tensor:
        known, dtype = self._values.get(source), kwargs.get("dtype") or source.dtype
        if in_place:
            if not isinstance(args[0], FakeTensor) and known is not None:
                args[0].copy_(known)
            return args[0]
        if known is not None:
            return known.clone().to(dtype)
        if source.numel() <= LARGE:
            return torch.ones(source.shape, dtype=dtype)
        with self._fake:
            return func(*args, **kwargs)

    def _sized_by_values(self, func: Any, args: Any, kwargs: Any, fakes: list[Any]) -> Any:
        """A result whose size depends on values: the host waits to learn it."""
        packet, device = func.overloadpacket, fakes[0].device
        self._waits(f"{packet.__name__}, sized by values", fakes[0].is_cuda)
        if all(x in self._values for x in fakes):
            host_args, host_kwargs = self._known((args, dict(kwargs)))
            made = func(*host_args, **host_kwargs)
        elif packet is aten.index:
            raise RuntimeError(f"a mask whose values are not known at {site()}")
        else:
            every = torch.ones if packet is aten.nonzero else torch.arange
            first = every(args[0].shape if packet is aten.nonzero else args[0].numel())
            made = func(first, *args[1:], **kwargs)

        def put(value: torch.Tensor) -> torch.Tensor:
            with self._fake:
                out = torch.empty(value.shape, dtype=value.dtype, device=device)
            self._allocate(out)
            self._values[out] = value
            return out

        return tree_map_only(torch.Tensor, put, made)

    # Values on the side -----------------------------------------------------------------------------

    def _known(self, tree: Any) -> Any:
        return tree_map_only(FakeTensor, lambda tensor: self._values[tensor], tree)

    def _follow(self, func: Any, args: Any, kwargs: Any, fakes: Tensors, out: Any) -> None:
        """Compute on the host what small integers become; forget what is written over by unknown numbers."""
        if not all(x in self._values for x in fakes):
            if func._schema.is_mutable:
                self._values.pop(fakes[0], None)
            return
        made = [x for x in tensors_in(out) if isinstance(x, FakeTensor)]
        if not made or not all(_is_followed(x) for x in made):
            return
        if not fakes and func.overloadpacket.__name__ not in MADE_FROM_NOTHING:
            return
        host_args, host_kwargs = self._known((args, dict(kwargs)))
        if "device" in host_kwargs:
            host_kwargs["device"] = "cpu"
        with contextlib.suppress(Exception):  # what has no kernel on the host is not known
            for tensor, value in zip(made, tensors_in(func(*host_args, **host_kwargs)), strict=True):
                self._values[tensor] = value


def _puts_by_mask(packet: Any, args: Any) -> bool:
    """A single value is filled in; several have to be counted first."""
    if packet not in INDEXED or packet is aten.index or args[2].numel() == 1:
        return False
    return any(x is not None and x.dtype is torch.bool for x in args[1])


def _grouped_product(a: torch.Tensor, b: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
    """Any dtype, as the kernel takes it; what derives its shape knows bf16 only."""
    made = aten._grouped_mm(a.bfloat16(), b.bfloat16(), *more, **options)
    return made if options.get("out_dtype") else made.to(a.dtype)


def _sum_in_place(total: Any, a: Any, b: Any, *dtype: Any, out: Any) -> Any:
    """`torch.addmm(..., out_dtype=, out=)`, which torch would derive by a product beside the sum."""
    if out.shape != (a.shape[0], b.shape[1]) or total.shape != out.shape:
        raise RuntimeError(f"addmm: {tuple(a.shape)} @ {tuple(b.shape)} into {tuple(out.shape)}")
    return out


OWN_SHAPES = {aten._grouped_mm.default: _grouped_product, aten.addmm.dtype_out: _sum_in_place}
"""Operations whose results are not derived by torch."""


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _is_followed(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= (64 if tensor.is_floating_point() else FOLLOWED)


def _is_sized_by_values(func: Any, args: Any, kwargs: Any) -> bool:
    packet = func.overloadpacket
    if packet is aten.repeat_interleave:
        return func._overloadname == "Tensor" and kwargs.get("output_size") is None
    if packet is aten.index:
        return any(x is not None and x.dtype is torch.bool for x in args[1])
    return packet in SIZED_BY_VALUES
