"""What a block of code spends its time on, kernel by kernel, by torch's profiler."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def profiled(path: Path, device: torch.device) -> Iterator[None]:
    """Write each kernel's name, calls and share of the time on `device` into `path`, longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        yield
        if gpu:
            torch.cuda.synchronize()
    events = seen.key_averages()
    times = [(event.self_device_time_total if gpu else event.self_cpu_time_total) for event in events]
    whole = sum(times) or 1.0
    kernels = [
        {"kernel": event.key, "calls": event.count, "share": spent / whole}
        for spent, event in sorted(zip(times, events, strict=True), key=lambda pair: -pair[0])
    ]
    path.write_text(json.dumps(kernels))
