"""From a network's parts (`common/model/partition.py`) to DeepSpeed's partitions under ZeRO-3.

Takes a module with placeholders and the engine's configuration; leaves what DeepSpeed itself leaves when it
partitions a whole module, without a whole tensor and with one copy of each part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from common.model.partition import PART, is_partitioned, part_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def fill_partitions(module: nn.Module, config: dict[str, Any], deepspeed: Any) -> None:
    """Convert all parameters of a module with placeholders, in their order; other modules are left to
    DeepSpeed.

    config: of the engine that is made next. deepspeed: the library, which `engine.py` alone imports. A
    collective: rank 0 broadcasts what is whole on every rank.
    """
    if not is_partitioned(module):
        return
    deepspeed.init_distributed(dist_init_required=False)
    init, there = _partitioner(config, deepspeed), _status(deepspeed)
    dtype = next((DTYPES[name] for name in DTYPES if config.get(name, {}).get("enabled")), None)
    for parameter in module.parameters():
        part = part_of(parameter)
        if part is not None:
            _fill(parameter, part, dtype or parameter.dtype, init, there)
            continue
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
        init._convert_to_zero_parameters([parameter])


@torch.no_grad()
def one_by_one(zero: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, whole until the next is asked for. A collective, in the order of `tensors`.

    zero: DeepSpeed's optimizer of stage 3. What it keeps whole is whole again at the end.
    """
    zero.checkpoint_event_prologue()
    for name, tensor in tensors.items():
        parameter: Any = tensor
        if not hasattr(parameter, "ds_id"):
            yield name, tensor
            continue
        parameter.all_gather([parameter])
        yield name, tensor
        parameter.partition([parameter])
    zero.checkpoint_event_epilogue()


def _partitioner(config: dict[str, Any], deepspeed: Any) -> Any:
    """`zero.Init` as the engine would make it; a second engine has the groups of the first."""
    group = deepspeed.utils.groups._get_zero_param_intra_parallel_group()
    init = deepspeed.zero.Init(config_dict_or_path=config, zero_param_parallel_group=group)
    if init.mem_efficient_linear:  # else the graph of a pass would hold the whole weights of its layers
        init._enable_mem_efficient_linear()
    return init


def _status(deepspeed: Any) -> Any:
    """Of a partition that lies in memory."""
    return deepspeed.runtime.swap_tensor.partitioned_param_swapper.PartitionedParamStatus.AVAILABLE


def _fill(parameter: Any, part: torch.Tensor, dtype: torch.dtype, init: Any, there: Any) -> None:
    """Give a parameter the partition that `zero.Init` would make of the whole; it may end with padding."""
    if any(parameter.stride()):
        raise RuntimeError("something gave a placeholder other values than its parts")
    delattr(parameter, PART)
    parameter.data = parameter.new_empty((), dtype=dtype).expand(parameter.shape)
    init._convert_to_deepspeed_param(parameter)
    aligned = init._aligned_size(parameter)
    size = aligned // init._partition_world_size(parameter)
    device = init.local_device if parameter.ds_persist else init.remote_device
    own: Any = torch.empty(size, dtype=dtype, device=device)
    if init.pin_memory and torch.cuda.is_available():
        own = own.pin_memory()
    own[: len(part)].copy_(part)
    own[len(part) :].zero_()
    own.ds_numel, own.status, own.final_location = size, there, None
    parameter.ds_tensor, parameter.ds_numel_aligned = own, aligned
    parameter.partition()
    parameter.ds_secondary_tensor = None  # of hpZ: made anew from the parts when it is asked for
