"""The micro-batches of every optimizer step; those of the next one are made while the device works.

On a GPU a thread makes them, in memory that the device reads by itself (pinned). On the CPU they are made
when they are needed: the cores that would make them earlier are those that train. A step's batches are a
function of its number alone, so that none is saved, and none is lost when a run ends between two steps.
"""

from __future__ import annotations

from concurrent.futures import Future, wait
from functools import partial
from typing import Any, NamedTuple

import torch

from common.background import in_background
from common.data.batches import Batches

PATIENCE = 10.0
"""Seconds that the end of training waits for batches that nobody wants any more."""


class Made(NamedTuple):
    """Of a step: this rank's micro-batches, and the passes over the data that are done behind it."""

    micro_batches: list[Any]
    epoch: float


class Ahead:
    """Only its thread asks for batches while that works: they remember what they read."""

    def __init__(self, batches: Batches, steps: int, device: torch.device) -> None:
        """steps: how many there are; nothing is read for further ones."""
        self._batches, self._steps, self._device = batches, steps, device
        self._making: tuple[int, Future[Made]] | None = None

    def take(self, step: int) -> Made:
        """Those of a step, from 0; raises what making them raised."""
        if self._making is None or self._making[0] != step:
            self.settle()
            return self._make(step)
        (_, future), self._making = self._making, None
        return future.result()

    def make(self, step: int) -> None:
        """Make those of a step meanwhile, where there is such a step and a device that works."""
        if self._device.type != "cuda" or step >= self._steps:
            return
        self._making = step, in_background(partial(self._make_in_thread, step), "batches")

    def settle(self, seconds: float | None = None) -> None:
        """Wait until nothing is being made; seconds: at most."""
        if self._making is not None:
            wait([self._making[1]], seconds)

    def _make_in_thread(self, step: int) -> Made:
        torch.cuda.set_device(self._device)  # each thread has its own, and pinning asks for it
        return self._make(step)

    def _make(self, step: int) -> Made:
        micro_batches = self._batches.micro_batches(step)
        if self._device.type == "cuda":
            micro_batches = [batch.pinned() for batch in micro_batches]
        return Made(micro_batches, self._batches.epoch_of(step + 1))
