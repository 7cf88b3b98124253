"""From the job's sources to documents on disk, and which of them make a step.

The order is: tokenizer, then tokenized documents (both made once by the first rank of each machine,
while the others wait on the file system), then batches. What becomes a trained token is decided in
`common/data/chat.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.data import dataset
from common.data.batches import BatchPlan
from common.data.chat import check_template, find_terminators
from common.data.types import IGNORE, Batch
from common.distributed import World
from common.models import load_tokenizer
from step1_sft.config import SFTJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class SFTData:
    """What SFT trains and evaluates on."""

    train: dataset.TokenizedDataset
    held_out: dataset.TokenizedDataset | None
    ledger: dataset.Ledger
    weights: dict[str, float]  # by source name


def load_sft_tokenizer(job: SFTJob, folder: Path, local_rank: int) -> PreTrainedTokenizerFast:
    """The base model's tokenizer, or one trained on the training rows and kept in `folder/tokenizer`."""
    ...


def count_tokens(micro_batches: Sequence[Batch]) -> tuple[int, int]:
    """Tokens, and trained tokens, of this rank's part of a step; filler batches do not count."""
    tokens = sum(batch.input_ids.shape[1] for batch in micro_batches if batch.row_ids)
    return tokens, sum(len(batch.targets) for batch in micro_batches)


def held_out_prompts(held_out: dataset.TokenizedDataset, count: int, seed: int) -> list[np.ndarray]:
    """A seeded choice of held-out documents, each cut where its first trained token would come.

    Documents that are trained from their start (plain text) have no prompt and are left out.
    """
    order = np.random.default_rng(seed).permutation(len(held_out))
    prompts: list[np.ndarray] = []
    for index in order:
        if len(prompts) == count:
            break
        example = held_out[int(index)]
        first = int(np.argmax(example.labels != IGNORE))
        if first > 0:
            prompts.append(example.input_ids[: first + 1])
    return prompts
