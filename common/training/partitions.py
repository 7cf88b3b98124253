"""From a network's parts (`common/model/partition.py`) to DeepSpeed's partitions under ZeRO-3.

Takes a module with placeholders and the engine's configuration; leaves what DeepSpeed itself leaves when it
partitions a whole module. One tensor at a time is given the memory of a whole one, which nobody writes to.
"""

from __future__ import annotations

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
    init = _partitioner(config, deepspeed)
    dtype = next((DTYPES[name] for name in DTYPES if config.get(name, {}).get("enabled")), None)
    for parameter in module.parameters():
        part = part_of(parameter)
        if part is not None:
            _fill(parameter, part if dtype is None else part.to(dtype), init)
            continue
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
        init._convert_to_zero_parameters([parameter])


def _partitioner(config: dict[str, Any], deepspeed: Any) -> Any:
    """`zero.Init` as the engine would make it; a second engine has the groups of the first."""
    group = deepspeed.utils.groups._get_zero_param_intra_parallel_group()
    return deepspeed.zero.Init(config_dict_or_path=config, zero_param_parallel_group=group)


def _fill(parameter: Any, part: torch.Tensor, init: Any) -> None:
    """DeepSpeed divides a tensor whose memory was never touched, and the part is written into its own."""
    if any(parameter.stride()):
        raise RuntimeError("something gave a placeholder other values than its parts")
    delattr(parameter, PART)
    parameter.data = torch.empty(parameter.shape, dtype=part.dtype, device=init.local_device)
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()
    parameter.ds_tensor.copy_(part)
    parameter.ds_secondary_tensor = None  # of hpZ: made anew from the parts when it is asked for
