"""What is DPO's own about its data: prompts of pairs, to sample from.

How pairs come to disk and into batches is in `common/training/step_data.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.data.dataset import PairDataset
from common.data.types import TokenizedExample
from common.decoding.sampling import held_out_prompts, room_for_prompts
from step2_dpo.config import DPOJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ChosenAnswers:
    """The chosen sides of pairs, as documents."""

    pairs: PairDataset

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.pairs[index].chosen


def prompts_to_sample(held_out: PairDataset | None, job: DPOJob, model: PreTrainedModel) -> list[np.ndarray]:
    """Held-out prompts to complete, with room for the completion in the model's context."""
    if held_out is None:
        return []
    sampling, answers = job.dpo.sampling, ChosenAnswers(held_out)
    return held_out_prompts(answers, sampling.num_prompts, room_for_prompts(model, sampling), job.seed)
