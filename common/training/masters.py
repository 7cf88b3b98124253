"""fp32 weights that are their own master weights.

Under ZeRO-1 and ZeRO-2 DeepSpeed gives the optimizer an fp32 copy of the weights that a rank updates, and
copies it back after each step. Weights that are fp32 themselves need no copy: 4 bytes of each are saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def share_masters(zero: Any) -> None:
    """Let the optimizer's flat tensors lie in the weights' own memory, where both are fp32.

    zero: DeepSpeed's optimizer, right after its construction; any other than that of stages 1 and 2, and one
    whose masters are in host memory, is left as it is. Its copy after a step then writes each number onto
    itself.
    """
    partitions = getattr(zero, "parallel_partitioned_bit16_groups", None)
    if partitions is None or zero.dtype is not torch.float32 or zero.cpu_offload:
        return
    for number, master in enumerate(zero.single_partition_of_fp32_groups):
        own = partitions[number][dist.get_rank(zero.real_dp_process_group[number])]
        master.data = own.data  # the optimizer holds the tensor: it stays the same one
        for parameter in zero.bit16_groups[number]:
            if (mapping := parameter._hp_mapping) is not None:
                place = mapping.hp_fragment_address
                mapping.hp_fragment = master.detach().narrow(0, place.start, place.numel)
