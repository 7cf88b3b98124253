"""`python -m pipeline.torch_probe`: what torch says of this machine, as one line of JSON.

A process of its own, because importing torch takes seconds, and a driver that does not answer takes for ever.
"""

from __future__ import annotations

import itertools
import json
from typing import Any


def main() -> None:
    """Print the line."""
    print(json.dumps(look()))


def look() -> dict[str, Any]:
    """torch, its CUDA and NCCL; the devices it sees, which of them reach each other, and bf16."""
    import torch
    import torch.distributed as dist

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": None,
        "devices": [],
        "apart": [],
        "error": None,
    }
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        found["error"] = str(error).strip().splitlines()[0]
        return found
    if dist.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        bf16 = (device.major, device.minor) >= (8, 0)
        found["devices"].append({"name": device.name, "bytes": device.total_memory, "bf16": bf16})
    found["apart"] = [
        [one, other]
        for one, other in itertools.combinations(range(torch.cuda.device_count()), 2)
        if not torch.cuda.can_device_access_peer(one, other)
    ]
    return found


if __name__ == "__main__":
    main()
