"""A network of which this rank holds only a part: ZeRO-3 without the whole model in any process.

Takes a `Share`, the rank's place among all of them. While `reading_shares` is active, transformers'
`from_pretrained` reads of each matrix the bytes that belong to this rank, straight from the safetensors
files; while `drawing_shares` is, its `from_config` keeps of each drawn matrix the same part. Names,
conversions, dtypes, random numbers and the report of what is missing stay transformers' own. With a `Node`
one rank of each machine reads, and hands on to the others what they would have read. The network has its full
shapes, but matrices are placeholders: NaN everywhere, one number of storage, and the rank's part beside it
(`part_of`). The engine makes DeepSpeed's partitions of these parts. Vectors, the rows of a scalar
head and buffers are whole. Does not know of DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from common.launch_config import LaunchConfig
from common.runtime.distributed import Node, node_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART = "_part_of_rank"
"""Attribute of a placeholder, flat."""


@dataclass(frozen=True)
class Share:
    """Of each tensor, laid flat, the stretch that belongs to this rank: as ZeRO-3 divides it."""

    rank: int
    ranks: int

    def size(self, numel: int) -> int:
        """Numbers of the longest part, of a tensor of `numel`."""
        return -(-numel // self.ranks)

    def bounds(self, numel: int) -> tuple[int, int]:
        """Where the part begins and ends; the last ranks may have less, or nothing."""
        begin = min(self.rank * self.size(numel), numel)
        return begin, min(begin + self.size(numel), numel)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the part."""
        begin, end = self.bounds(tensor.numel())
        return tensor.reshape(-1)[begin:end].clone()


def node_reading(launch: LaunchConfig) -> Node | None:
    """The ranks that one of them reads for, which all call it; None where each reads for itself."""
    return node_of() if launch.read_once_per_node else None


def share_of(stage: int) -> Share | None:
    """This rank's share under ZeRO stage 3; None below, where every rank has the whole model."""
    return Share(dist.get_rank(), dist.get_world_size()) if stage == 3 else None


# --- Placeholders -----------------------------------------------------------------------------------


def is_divided(tensor: Any) -> bool:
    """Whether ranks hold parts of it: of matrices of numbers; vectors and single rows are whole."""
    return len(tensor.shape) >= 2 and tensor.shape[0] > 1 and tensor.dtype.is_floating_point


def placeholder(shape: torch.Size, part: torch.Tensor) -> nn.Parameter:
    """A parameter of this shape that holds no more than `part`; whatever is computed with it is NaN."""
    parameter = nn.Parameter(_nothing(shape, part))
    setattr(parameter, PART, part)
    return parameter


def _nothing(shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    return like.new_full((), math.nan).expand(shape)


def part_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """The rank's part of a placeholder; None for a parameter that is whole."""
    return getattr(parameter, PART, None)


def is_partitioned(model: nn.Module) -> bool:
    return any(part_of(parameter) is not None for parameter in model.parameters())


@torch.no_grad()
def divide(parameter: nn.Parameter, share: Share, device: torch.device) -> None:
    """Make a placeholder of a whole matrix, its part on `device`."""
    setattr(parameter, PART, share.of(parameter.data).to(device))
    parameter.data = _nothing(parameter.shape, parameter.data)


@torch.no_grad()
def make_whole(parameter: nn.Parameter) -> None:
    """Gather a placeholder in host memory on every rank; a collective."""
    part = part_of(parameter)
    assert part is not None
    size = Share(dist.get_rank(), dist.get_world_size()).size(parameter.numel())
    whole = part.new_empty(size * dist.get_world_size())
    dist.all_gather_into_tensor(whole, torch.cat([part, part.new_zeros(size - len(part))]))
    delattr(parameter, PART)
    parameter.data = whole[: parameter.numel()].view(parameter.shape).cpu()


@contextmanager
def grown_whole(model: PreTrainedModel, share: Share | None) -> Iterator[None]:
    """While the block runs, embeddings and output projection are whole; it may replace them. A collective."""
    devices = {part.device for each in _vocabulary(model) if (part := part_of(each)) is not None}
    for parameter in _vocabulary(model):
        if part_of(parameter) is not None:
            make_whole(parameter)
    yield
    for parameter in _vocabulary(model):
        if share is not None and devices:
            divide(parameter, share, next(iter(devices)))


def _vocabulary(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights with a row per token; one where they are tied."""
    layers: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(layer.weight): layer.weight for layer in layers if layer is not None}.values())


def to_device(model: nn.Module, device: torch.device) -> None:
    """As `model.to(device)`, which would give placeholders the memory of whole tensors."""
    if not is_partitioned(model):
        model.to(device)
        return
    named = model.named_parameters()
    parts = {name: part.to(device) for name, each in named if (part := part_of(each)) is not None}
    model._apply(lambda tensor: tensor if part_of(tensor) is not None else tensor.to(device))
    for name, parameter in model.named_parameters():
        if name in parts:
            setattr(parameter, PART, parts[name])
            parameter.data = _nothing(parameter.shape, parts[name])


# --- Reading ----------------------------------------------------------------------------------------


class Stored:
    """A tensor in a safetensors file that is read when it is needed.

    transformers hands it around as a tensor. Whatever its conversions compute with it reads it whole.
    """

    def __init__(self, slices: Any, dtype: torch.dtype | None = None, node: Node | None = None) -> None:
        """slices: of safetensors' `get_slice`. dtype: what it is to be read as; None: as it is stored. node:
        whose first rank reads for all of it, which then read the same tensors in the same order."""
        self._slices, self._node = slices, node
        self.shape = torch.Size(slices.get_shape())
        self.dtype = dtype or (slices[:0] if self.shape else slices[...]).dtype

    def whole(self) -> torch.Tensor:
        def read() -> torch.Tensor:
            return self._slices[...].to(self.dtype)

        return read() if self._node is None else self._node.broadcast(read, self.shape, self.dtype)

    def part(self, share: Share) -> torch.Tensor:
        """The share of it. Without another dtype it stays in the file, mapped, until it is copied."""
        begin, end = share.bounds(self.shape.numel())
        if self._node is None:
            return self._read(begin, end)
        node, size = self._node, share.size(self.shape.numel())
        first = min(node.first * size, self.shape.numel())
        last = min(first + node.size * size, self.shape.numel())
        return node.scatter(lambda: self._read(first, last), size, self.dtype)[: end - begin].clone()

    def _read(self, begin: int, end: int) -> torch.Tensor:
        """Of it, laid flat, the stretch from begin to end; the rows that it lies in are read."""
        row = self.shape[1:].numel()
        rows = self._slices[begin // row : -(-end // row)].reshape(-1)
        first = begin // row * row
        return rows[begin - first : end - first].to(self.dtype)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Stored:
        return Stored(self._slices, dtype or self.dtype, self._node)

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.whole()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        def read(value: Any) -> Any:
            return value.whole() if isinstance(value, Stored) else value

        return function(*tree_map(read, arguments), **tree_map(read, options or {}))


@contextmanager
def reading_shares(share: Share | None, device: torch.device, node: Node | None = None) -> Iterator[None]:
    """While the block runs, `from_pretrained` puts placeholders into the model, their parts on `device`;
    without a share, whole tensors. node: reads once for its ranks, which all load the same model."""
    from transformers import core_model_loading, modeling_utils

    load, put = modeling_utils.convert_and_load_state_dict_in_model, core_model_loading.set_param_for_module

    def load_lazily(model: PreTrainedModel, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        lazy = {
            name: Stored(value, node=node) if hasattr(value, "get_shape") else value
            for name, value in state_dict.items()
        }
        return load(model, lazy, *args, **kwargs)

    def put_part(model: PreTrainedModel, name: str, value: Any, *args: Any) -> None:
        put(model, name, _placed(model, name, value, share, device), *args)

    changed = {
        modeling_utils: ("convert_and_load_state_dict_in_model", load, load_lazily),
        core_model_loading: ("set_param_for_module", put, put_part),
    }
    for module, (name, _, new) in changed.items():
        setattr(module, name, new)
    try:
        yield
    finally:
        for module, (name, old, _) in changed.items():
            setattr(module, name, old)


def _placed(model: PreTrainedModel, name: str, value: Any, share: Share | None, device: torch.device) -> Any:
    """What is put into the model for a tensor that was read, or converted, or is still on the disk."""
    owner, _, attribute = name.rpartition(".")
    is_parameter = attribute in model.get_submodule(owner)._parameters
    if share is None or not (is_parameter and is_divided(value)):
        return value.whole() if isinstance(value, Stored) else value
    part = value.part(share) if isinstance(value, Stored) else share.of(value)
    return placeholder(value.shape, part.to(device))


# --- Drawing ----------------------------------------------------------------------------------------


@contextmanager
def drawing_shares(share: Share, device: torch.device) -> Iterator[None]:
    """While the block runs, a network of transformers that is made has placeholders, their parts on `device`.

    All ranks draw all numbers, in the order of a whole network, and keep a module's own parts before the
    next module is made. RuntimeError for a class whose modules initialise each other's weights.
    """
    from torch.nn.modules.module import register_module_module_registration_hook
    from transformers import PreTrainedModel

    def keep_parts(owner: nn.Module, name: str, made: nn.Module) -> None:
        _divide_all(made.parameters(), share, device)

    kind: Any = PreTrainedModel
    begin = kind._initialize_weights

    def begin_whole(model: PreTrainedModel, module: nn.Module, *args: Any) -> None:
        own = [] if getattr(module, "_is_hf_initialized", False) else list(module.parameters(recurse=False))
        for parameter in own:
            _fill_in(parameter, share)
        begin(model, module, *args)
        _divide_all(own, share, device)

    hook = register_module_module_registration_hook(keep_parts)
    kind._initialize_weights = begin_whole
    try:
        yield
    finally:
        kind._initialize_weights = begin
        hook.remove()


def _divide_all(parameters: Iterable[nn.Parameter], share: Share, device: torch.device) -> None:
    for parameter in parameters:
        if part_of(parameter) is None and is_divided(parameter):
            divide(parameter, share, device)


@torch.no_grad()
def _fill_in(parameter: nn.Parameter, share: Share) -> None:
    """Memory for the whole of a placeholder, of which only the rank's part has its values."""
    part = part_of(parameter)
    if part is None:
        return
    delattr(parameter, PART)
    begin, end = share.bounds(parameter.numel())
    parameter.data = torch.empty(parameter.shape, dtype=part.dtype, device=parameter.device)
    parameter.data.view(-1)[begin:end] = part.to(parameter.device)
