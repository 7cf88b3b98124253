"""What the fake device was asked to do, and which line asked."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from common.phases import current

ROOT = __file__.rsplit("/tests/", 1)[0] + "/"
NOT_ASKING = ("/tests/gpu_fake/", "/torch/", "<frozen", "/contextlib.py", "/functools.py")


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """All tensors of nested arguments; torch's own function for this takes several times as long."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [tensor for part in tree for tensor in tensors_in(part)]


def is_on_device(tensor: torch.Tensor) -> bool:
    """As `is_cuda`, which asks through torch's dispatcher."""
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def site() -> str:
    """`file:line function` of the innermost frame outside of torch; behind <- the project's innermost."""
    frame, first = sys._getframe(1), None
    while frame is not None:
        short, is_ours = _asking(frame.f_code.co_filename)
        if short and (is_ours or first is None):
            here = f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
            if is_ours:
                return here if first is None else f"{first} <- {here}"
            first = here
        frame = frame.f_back  # type: ignore[assignment]
    return first or "?"


@cache
def _asking(name: str) -> tuple[str, bool]:
    """A file's short name, empty where it is none that asks; whether it is the project's."""
    if any(part in name for part in NOT_ASKING):
        return "", False
    return name.split("site-packages/")[-1].removeprefix(ROOT), "site-packages" not in name


class Record:
    """Counts by phase and step of the run (`common.phases`), and memory in bytes."""

    def __init__(self) -> None:
        self.syncs: Counter[tuple[str, int, str, str]] = Counter()  # (phase, step, what, site)
        self.collectives: Counter[tuple[str, int, str]] = Counter()
        self.sent: Counter[tuple[str, int, str]] = Counter()  # bytes given to each kind of collective
        self.pageable: Counter[tuple[str, int, str]] = Counter()  # bytes, by (phase, step, site)
        self.now = self.peak = 0
        self.pinned = self.pinned_peak = 0  # of host memory, made pinned
        self.peak_site = ""
        self.refuses_to_wait = ""

    @contextmanager
    def refusing(self, why: str) -> Iterator[None]:
        """In the block a synchronisation is an error of this name."""
        before, self.refuses_to_wait = self.refuses_to_wait, why
        try:
            yield
        finally:
            self.refuses_to_wait = before

    def sync(self, what: str) -> None:
        if self.refuses_to_wait:
            raise RuntimeError(f"{self.refuses_to_wait}: {what}")
        self.syncs[*place(), what, site()] += 1

    def from_pageable(self, source: torch.Tensor) -> None:
        """A copy from memory that is not pinned: the driver copies it once more first."""
        self.pageable[*place(), site()] += source.numel() * source.element_size()

    def collective(self, name: str, arguments: Any) -> None:
        on_device = list(filter(is_on_device, tensors_in(arguments)))
        if on_device:
            self.collectives[*place(), name] += 1
            self.sent[*place(), name] += sum(x.numel() * x.element_size() for x in on_device)

    def allocated(self, size: int) -> None:
        self.now += size
        if self.now > self.peak:
            self.peak, self.peak_site = self.now, site()

    def pin(self, size: int) -> None:
        self.pinned += size
        self.pinned_peak = max(self.pinned_peak, self.pinned)

    def freed(self, size: int) -> None:
        self.now -= size

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "syncs": [[*key, count] for key, count in sorted(self.syncs.items())],
            "collectives": [[*key, n, self.sent[key]] for key, n in sorted(self.collectives.items())],
            "pageable": [[*key, size] for key, size in sorted(self.pageable.items())],
            "peak": self.peak,
            "pinned_peak": self.pinned_peak,
            "peak_site": self.peak_site,
        }


def place() -> tuple[str, int]:
    """The phase and the step of the run."""
    phase = current()
    return phase.name, phase.step or 0
