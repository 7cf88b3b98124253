"""A stream of documents -> Batch: which of its rows make a step, known step by step.

The documents of step k are a pure function of the seed, k and the stream, whatever the number of ranks. The
first pass takes the windows of the stream in their order, each packed and shuffled on its own; later ones
take them in an order of their own. Nothing is remembered but how many rows each window gives.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np

from common.data.batches import Batches, BatchPlan, documents_of, share
from common.data.packing import Packing, one_per_row, pack
from common.data.stored import TokenizedDataset
from common.data.stream import WINDOW, StreamedRows


def training_batches(dataset: TokenizedDataset, plan: BatchPlan, weights: Mapping[str, float]) -> Batches:
    """The batches of a step that trains on documents."""
    if isinstance(dataset, StreamedRows):
        return StreamedBatches(dataset, plan)
    return Batches(dataset, plan, weights)


class StreamedBatches(Batches):
    """Batches of rows whose number is not known before the last is read."""

    def __init__(self, dataset: StreamedRows, plan: BatchPlan) -> None:
        self.stream, self.plan = dataset, plan
        self._packed = functools.lru_cache(maxsize=2)(self._pack)
        self._ends = [0]  # rows of a first pass before each window known so far, and behind the last of them

    def steps_in_epochs(self, epochs: float) -> int:
        raise TypeError("a stream's steps are counted by train.max_steps")

    def epoch_of(self, step: int) -> float:
        """Passes over the data before step `step`; 0 in the first pass, whose length is not known there."""
        return 0.0 if self._reach(step * self.plan.global_batch_size) else step / self._steps()

    def rows(self, step: int) -> list[np.ndarray]:
        """The step's rows on all ranks together; each an array of numbers of documents."""
        size = self.plan.global_batch_size
        if self._reach((step + 1) * size):
            return self._between(0, step * size, (step + 1) * size)
        epoch, within = divmod(step, self._steps())
        return self._between(epoch, within * size, min((within + 1) * size, self._ends[-1]))

    def micro_batches(self, step: int) -> list[Any]:
        """This rank's part of a step as `Batch`es; equally many on every rank, the missing ones without
        targets."""
        return share(self.rows(step), self.plan, functools.partial(documents_of, self.stream))

    def _reach(self, rows: int) -> bool:
        """Whether a first pass has so many rows; waits until that is known."""
        while self._ends[-1] < rows and self.stream.has(len(self._ends) - 1):
            self._ends.append(self._ends[-1] + len(self._packed(0, len(self._ends) - 1)))
        return self._ends[-1] >= rows

    def _is_known(self) -> bool:
        return self.stream.windows == len(self._ends) - 1

    def _steps(self) -> int:
        """Of a pass; asked when its end is known."""
        assert self._is_known()
        return -(-self._ends[-1] // self.plan.global_batch_size)

    def _between(self, epoch: int, first: int, last: int) -> list[np.ndarray]:
        order, ends = self._order(epoch)
        rows = []
        while first < last:
            place = bisect.bisect_right(ends, first) - 1
            packing = self._packed(epoch, order[place])
            until = min(last, ends[place + 1])
            start = order[place] * WINDOW
            rows += [start + packing[row - ends[place]] for row in range(first, until)]
            first = until
        return rows

    def _order(self, epoch: int) -> tuple[list[int], list[int]]:
        """The windows of a pass in their order, and the rows before each."""
        known = len(self._ends) - 1
        if epoch == 0:
            return list(range(known)), self._ends
        order = np.random.default_rng([self.plan.seed, epoch, _ORDER]).permutation(known).tolist()
        sizes = np.diff(self._ends)
        return order, [0, *accumulate(int(sizes[window]) for window in order)]

    def _pack(self, epoch: int, window: int) -> Packing:
        lengths = self.stream.lengths_of(window)
        seed = int(np.random.SeedSequence([self.plan.seed, epoch, window, _ORDER]).generate_state(1)[0])
        if self.plan.packing:
            return pack(lengths, self.plan.max_length, seed=seed)
        return one_per_row(len(lengths), seed=seed)


_ORDER = 4
"""Sets this use of the seed apart from others."""
