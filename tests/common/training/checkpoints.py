"""Checkpoints of a state that writes a few small files, on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.runtime.distributed import World
from common.training.checkpoint import Checkpoints
from common.training.snapshot import Open

FILES = ("zero/weights.pt", "zero/optimizer.pt", "counters.json", "manifest.json")


class StateOnly:
    """As much of an engine as checkpoints use: a number that is saved in two files."""

    def __init__(self, value: float = 0.0, numbers: int = 100) -> None:
        self.value, self.numbers = value, numbers

    def save(self, folder: Path, open_file: Open) -> None:
        (folder / "zero").mkdir()
        for name in ("weights", "optimizer"):
            with open_file(folder / "zero" / f"{name}.pt") as file:
                torch.save(torch.full((self.numbers,), self.value), file)

    def load(self, folder: Path) -> None:
        values = {float(torch.load(folder / "zero" / f"{n}.pt")[0]) for n in ("weights", "optimizer")}
        (self.value,) = values


def world_of(size: int = 1) -> World:
    return World(0, size, 0, torch.device("cpu"))


def checkpoints_in(folder: Path, keep: int = 2, size: int = 1) -> Checkpoints:
    return Checkpoints(folder, keep=keep, world=world_of(size))


def save(checkpoints: Checkpoints, step: int, best: int | None = None, numbers: int = 100) -> None:
    engine: Any = StateOnly(step * 1.0, numbers)
    checkpoints.save(step, engine, {"step": step}, best_step=best)


def resumed_value(checkpoints: Checkpoints) -> tuple[float, Any]:
    engine: Any = StateOnly(-1.0)
    return engine.value if (found := checkpoints.resume(engine)) is None else engine.value, found


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
