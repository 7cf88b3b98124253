"""The Python side of a GPU: `torch.cuda` says that there is one, and NCCL is torch's fake process group."""

from __future__ import annotations

import contextlib
import importlib
import types
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from common.model import loss_kernel
from tests.gpu_fake.device import Device

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """A device as its driver describes it."""

    name: str = "NVIDIA H200"
    memory: int = int(139.8 * GIB)  # bytes


def install(hardware: Hardware = Hardware()) -> None:
    """Replace what asks the driver, in this process and for good."""
    for name, value in {**_answers(hardware), **_memory(hardware), **_random_states()}.items():
        setattr(torch.cuda, name, value)
    nvtx = importlib.import_module("torch.cuda.nvtx")
    nvtx.range_push = nvtx.range_pop = nvtx.mark = lambda *words: 0
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # bitsandbytes, which peft imports, asks for it
    torch.version.cuda = "13.0"
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # bitsandbytes asks for it when it is imported
    torch.cuda.nccl = types.SimpleNamespace(version=lambda: (2, 28, 3))
    for name, dtype in _TENSORS.items():
        setattr(
            torch.cuda, name, lambda values, dtype=dtype: torch.tensor(values, dtype=dtype, device="cuda")
        )
    _let_fake_tensors_be_used()
    loss_kernel.has_triton = lambda: True  # which torch's wheels for GPUs bring
    torch.nn.Module._apply = _apply


_TENSORS = {
    "FloatTensor": torch.float32, "HalfTensor": torch.float16, "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8, "IntTensor": torch.int32, "LongTensor": torch.int64,
    "DoubleTensor": torch.float64,
}  # fmt: skip


def join(rank: int, size: int) -> None:
    """Let `init_process_group` give a group whose other ranks are names: collectives return at once."""
    import torch.distributed as dist

    real = dist.init_process_group

    def init(backend: str, *, timeout: Any = None, **_: Any) -> None:
        store = dist.HashStore()  # of this rank alone
        backends = "cpu:gloo,cuda:fake" if size == 1 else "cpu:fake,cuda:fake"
        real(backends, rank=rank, world_size=size, store=store, timeout=timeout)

    dist.init_process_group = init


class Stream:
    """Everything is done at once, so that any two streams are the same."""

    device, cuda_stream = torch.device("cuda", 0), 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 1

    def synchronize(self) -> None:
        _waits("stream.synchronize")

    def wait_stream(self, other: Stream) -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Stream | None = None) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _waits("event.synchronize")

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Graph:
    """A CUDA graph: what it is recorded from runs once, then it is launched as one. Nothing that the host has
    to wait for may be in it."""

    def replay(self) -> None: ...

    @staticmethod
    @contextlib.contextmanager
    def recording(graph: Graph, **_: Any) -> Iterator[None]:
        _waits("synchronize")  # as torch does before it records
        assert Device.current is not None
        with Device.current.record.refusing("operation not permitted when stream is capturing"):
            yield


def _set_sync_debug_mode(mode: str | int) -> None:
    if Device.current is not None:
        refused = mode in ("error", 2)
        Device.current.record.refuses_to_wait = "called a synchronizing CUDA operation" if refused else ""


def _waits(what: str) -> None:
    if Device.current is not None:
        Device.current.record.sync(what)


def _answers(hardware: Hardware) -> dict[str, Any]:
    """What there is, and calls that have nothing to do."""
    properties = types.SimpleNamespace(
        name=hardware.name, total_memory=hardware.memory, major=9, minor=0, multi_processor_count=132,
        warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232448, gcnArchName="",
    )  # fmt: skip
    said = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True,
        "get_device_name": hardware.name, "get_device_capability": (9, 0), "is_bf16_supported": True,
        "get_device_properties": properties, "can_device_access_peer": True,
        "is_current_stream_capturing": False, "graph_pool_handle": (0, 0), "get_sync_debug_mode": 0,
        "set_device": None, "init": None, "_lazy_init": None, "_lazy_call": None, "empty_cache": None,
        "ipc_collect": None,
    }  # fmt: skip
    answers: dict[str, Any] = {name: lambda *_, value=value, **__: value for name, value in said.items()}
    graphs = {
        "CUDAGraph": Graph, "graph": Graph.recording, "set_sync_debug_mode": _set_sync_debug_mode,
    }  # fmt: skip
    streams = {"current_stream": Stream, "default_stream": Stream, "Stream": Stream, "Event": Event}
    switch = {
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda *_: _waits("synchronize"),
    }
    return {**answers, **graphs, **streams, **switch}


def _memory(hardware: Hardware) -> dict[str, Any]:
    def now(*_: Any) -> int:
        return 0 if Device.current is None else Device.current.record.now

    def peak(*_: Any) -> int:
        return 0 if Device.current is None else Device.current.record.peak

    return {
        **dict.fromkeys(("memory_allocated", "memory_reserved", "memory_cached"), now),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved", "max_memory_cached"), peak),
        **dict.fromkeys(("reset_peak_memory_stats", "reset_max_memory_allocated"), lambda *_: None),
        "reset_max_memory_cached": lambda *_: None,
        "memory_stats": lambda *_: defaultdict(int),
        "mem_get_info": lambda *_: (hardware.memory - now(), hardware.memory),
    }


def _random_states() -> dict[str, Any]:
    state = torch.zeros(16, dtype=torch.uint8)
    return {
        **dict.fromkeys(
            ("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all"), lambda *_: None
        ),
        "get_rng_state": lambda *_: state,
        "get_rng_state_all": lambda: [state],
        "initial_seed": lambda: 0,
        "default_generators": (torch.Generator(),),
    }


def _let_fake_tensors_be_used() -> None:
    """Methods that reach for an address or for values, which fake tensors do not have."""

    def tolist(self: FakeTensor) -> Any:
        if Device.current is None:
            raise RuntimeError("a device tensor outlived its device")
        if self.is_cuda:
            Device.current.record.sync("tolist")
        return Device.current.values_of(self).tolist()

    address = torch.Tensor.data_ptr
    torch.Tensor.data_ptr = lambda self: 0 if isinstance(self, FakeTensor) else address(self)
    torch.Tensor.pin_memory = _pinned
    torch.Tensor.is_pinned = lambda self, *_: hasattr(self, "pinned_here")
    FakeTensor.tolist = tolist
    FakeTensor.record_stream = lambda self, stream: None
    FakeTensor.__reduce_ex__ = _as_saved


def _pinned(self: torch.Tensor, *_: Any) -> torch.Tensor:
    self.pinned_here = True  # type: ignore[attr-defined]
    return self


def _as_saved(self: FakeTensor, protocol: int) -> tuple[Any, ...]:
    """A checkpoint holds ones."""
    return _ones, (tuple(self.shape), self.dtype, isinstance(self, torch.nn.Parameter))


def _ones(shape: tuple[int, ...], dtype: torch.dtype, is_parameter: bool) -> torch.Tensor:
    ones = torch.ones(shape, dtype=dtype)
    return torch.nn.Parameter(ones, False) if is_parameter else ones


def _apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """`Module.to`, whose parameters are replaced where host tensors become device tensors; ties are kept."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in self.modules() if recurse else [self]:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = _applied(parameter, fn)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fn(buffer)
    return self


def _applied(parameter: torch.nn.Parameter, fn: Any) -> torch.nn.Parameter:
    with torch.no_grad():
        new = fn(parameter.data)
    if isinstance(new, FakeTensor) == isinstance(parameter, FakeTensor) and new.device == parameter.device:
        if new is not parameter.data:
            parameter.data = new
        return parameter
    replaced = torch.nn.Parameter(new, parameter.requires_grad)
    replaced.__dict__.update(parameter.__dict__)
    return replaced
