"""The prompts of PPO, and which of them each iteration takes. Samples nothing.

How rows become prompts on disk is in `common/training/step_data.py` and `common/data/prompts.py`.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import numpy as np

from common.data.batches import Batches, BatchPlan
from common.data.dataset_types import DatasetType, prompts_with_room
from common.data.stored import PromptDataset
from step3_ppo.config import PPOJob


def dataset_type_of(job: PPOJob) -> DatasetType[PromptDataset]:
    """Prompts that leave room for the longest response."""
    return prompts_with_room(job.ppo.rollout.max_new_tokens)


class PromptOrder:
    """Which prompts each iteration has: a pure function of the seed, for any number of ranks.

    A pass over the prompts is shuffled, and repeats a source's prompts by its weight. Every iteration takes
    N = `per_iteration` prompts over all ranks: where a pass ends within it, the next pass fills it up.
    """

    def __init__(
        self, prompts: PromptDataset, per_iteration: int, seed: int, weights: dict[str, float] | None = None
    ) -> None:
        plan = BatchPlan(
            max_length=0, packing=False, global_batch_size=sys.maxsize, micro_batch_size=1, seed=seed
        )
        # it is only asked for epochs, never for batches, and without packing it reads no lengths
        self._batches = Batches(cast(Any, prompts), plan, weights)
        self._per_iteration = per_iteration
        self.prompts_per_epoch = self._batches.documents_per_epoch

    def prompts_of(self, iteration: int) -> list[int]:
        """Data set indices of the N prompts of an iteration (from 0)."""
        epoch, start = divmod(iteration * self._per_iteration, self.prompts_per_epoch)
        found: list[int] = []
        while len(found) < self._per_iteration:
            end = start + self._per_iteration - len(found)
            found += self._batches.epoch(epoch).documents[start:end].tolist()
            epoch, start = epoch + 1, 0
        return found

    def epoch_of(self, iteration: int) -> float:
        """Passes over the prompts before an iteration (from 0)."""
        return iteration * self._per_iteration / self.prompts_per_epoch


def held_out_sample(held_out: PromptDataset | None, count: int, seed: int) -> list[int]:
    """A seeded choice of at most `count` held-out prompts: data set indices, in their order."""
    if held_out is None:
        return []
    chosen = np.random.default_rng([seed, 3]).permutation(len(held_out))[:count]
    return sorted(int(index) for index in chosen)
