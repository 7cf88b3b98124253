"""`python -m pipeline.doctor.torch_probe`: what torch says of this machine, as one line of JSON.

A process of its own, because importing torch takes seconds, and a driver that does not answer takes for ever.
"""

from __future__ import annotations

import itertools
import json
import time
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
        "gflops": {},
    }
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        found["error"] = str(error).strip().splitlines()[0]
        found["gflops"] = products("cpu")
        return found
    found["gflops"] = products("cuda" if torch.cuda.device_count() else "cpu")
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


def products(device: str, seconds: float = 0.15) -> dict[str, float]:
    """GFLOP/s of matrix products as a small model has them, [512, 1024] by [1024, 1024], by dtype."""
    import torch

    speed = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.ones(rows, 1024, dtype=dtype, device=device) for rows in (512, 1024))
        for _ in range(2):  # kernels are made at the first
            _value_of(a @ b)
        count, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < seconds:
            _value_of(a @ b)
            count += 1
        speed[name] = count * 2 * 512 * 1024 * 1024 / spent / 1e9
    return speed


def _value_of(product: Any) -> float:
    return float(product[0, 0])  # a GPU has then computed it


if __name__ == "__main__":
    main()
