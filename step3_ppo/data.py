"""What PPO trains on: prompts, and which of them an iteration has.

How rows become prompts on disk is in `common/step_data.py` and `common/data/prompts.py`. Samples nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from common.artifacts import Artifact
from common.data.batches import Batches, BatchPlan
from common.data.dataset import PromptDataset
from common.data.kinds import Prompts
from common.distributed import World
from common.stage import Step
from common.step_data import Say, StepData, load_data
from step3_ppo.config import PPOJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_prompts(
    job: PPOJob,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    world: World,
    say: Say,
    *,
    policy: Artifact | None = None,
) -> StepData[PromptDataset]:
    """The prompts on every rank, each with room for the longest response; see `step_data.load_data`."""
    return load_data(job, Step.ppo, job.ppo.data, kind_of(job), tokenizer, folder, world, say, policy=policy)


def kind_of(job: PPOJob) -> Prompts:
    """Prompts that leave room for the longest response."""
    return Prompts(room=job.ppo.rollout.max_new_tokens)


class PromptOrder:
    """Which prompts each iteration has: a pure function of the seed, for any number of ranks.

    An epoch is a shuffled pass over the prompts, those of a source as often as its weight says; its last
    iteration may be short. per_iteration: N, over all ranks.
    """

    def __init__(
        self, prompts: PromptDataset, per_iteration: int, seed: int, weights: dict[str, float] | None = None
    ) -> None:
        plan = BatchPlan(
            max_length=0, packing=False, global_batch_size=per_iteration, micro_batch_size=1, seed=seed
        )
        # it is only asked for rows, never for batches, and without packing it reads no lengths
        self._batches = Batches(cast(Any, prompts), plan, weights)

    def prompts_of(self, iteration: int) -> list[int]:
        """Data set indices of the prompts of an iteration (from 0), at most N."""
        return [int(index) for (index,) in self._batches.rows(iteration)]

    def iterations_in(self, epochs: float) -> int:
        """Iterations in this many passes over the prompts."""
        return self._batches.steps_in_epochs(epochs)

    def epoch_of(self, iteration: int) -> float:
        """Passes over the prompts before an iteration (from 0)."""
        return self._batches.epoch_of(iteration)


def held_out_sample(held_out: PromptDataset | None, count: int, seed: int) -> list[int]:
    """A seeded choice of at most `count` held-out prompts: data set indices, in their order."""
    if held_out is None:
        return []
    chosen = np.random.default_rng([seed, 3]).permutation(len(held_out))[:count]
    return sorted(int(index) for index in chosen)
