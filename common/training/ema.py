"""A running average of the weights that an engine trains.

Averaged weights generalise better than the last ones (Polyak and Juditsky, "Acceleration of stochastic
approximation by averaging", 1992); with a decay, early weights are forgotten. Takes an `Engine`; every rank
averages its own share of the fp32 master weights. The module's weights would not do: with a learning rate
like PPO's most updates are smaller than the rounding of bf16. Master weights are sharded already on every
ZeRO stage. Frozen weights have no average. Does not decide when weights are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save

from common.training.engine import Engine
from common.training.reshard import WEIGHTS, Layout, reshard
from common.training.snapshot import Open


class ExponentialMovingAverage:
    """average = decay · average + (1 - decay) · weights, beginning with the weights it is made with."""

    def __init__(self, engine: Engine, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} is not between 0 and 1")
        self._engine, self._decay = engine, decay
        self._averages = [weights.clone() for weights in engine.master_weights()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are; call it after a step that was applied."""
        for average, weights in zip(self._averages, self._engine.master_weights(), strict=True):
            average.lerp_(weights, 1 - self._decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The engine's weights are the average while the block runs; all ranks enter it.

        Afterwards they are restored bit for bit. The block neither steps nor saves the engine.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def save(self, folder: Path, open_file: Open) -> None:
        tensors = {str(number): average for number, average in enumerate(self._averages)}
        rank = dist.get_rank()
        with open_file(folder / _name(rank)) as file:  # safetensors itself hides why a disk refuses
            file.write(save(tensors))
        if rank == 0:
            self._engine.layout.write(folder, open_file)

    def load(self, folder: Path) -> str | None:
        """Restore what `save` wrote, bit for bit. The number of ranks or the stage may differ: returns from
        what and to what it was then resharded."""
        stored, own = Layout.read(folder), self._engine.layout
        if stored is None or stored == own:
            self._take(_held_by(folder, dist.get_rank()))
            return None
        shards = own.ranks[dist.get_rank()]
        self._take(reshard(stored, shards, lambda rank: _held_by(folder, rank)))
        return f"{stored} -> {own}"

    def _take(self, held: list[dict[str, torch.Tensor]]) -> None:
        for average, values in zip(self._averages, held, strict=True):
            average.copy_(values[WEIGHTS])

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weights in zip(self._averages, self._engine.master_weights(), strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
        self._engine.publish_master_weights()


def swapped_in(average: ExponentialMovingAverage | None) -> AbstractContextManager[object]:
    """The average in the weights' place while the block runs, where there is one."""
    return nullcontext() if average is None else average.swapped_in()


def _held_by(folder: Path, rank: int) -> list[dict[str, torch.Tensor]]:
    stored = load_file(folder / _name(rank))
    return [{WEIGHTS: stored[str(number)]} for number in range(len(stored))]


def _name(rank: int) -> str:
    return f"rank_{rank}.safetensors"
