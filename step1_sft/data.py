"""What is SFT's own about its data: a tokenizer trained on the rows, and what a step counts.

How rows come to disk and into batches is in `common/training/step_data.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.data import dataset
from common.data.chat import check_template
from common.data.types import Batch
from common.model.tokenizer import load_tokenizer
from step1_sft.config import SFTJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


log = logging.getLogger("rlhf.data")
Say = Callable[[str], None]


def load_sft_tokenizer(job: SFTJob, folder: Path, local_rank: int, say: Say) -> PreTrainedTokenizerFast:
    """The base model's tokenizer, or one trained on the training rows and kept in `folder/tokenizer`.

    UserError when its chat template cannot say which tokens an assistant writes. Without a template
    only plain text can be trained on.
    """
    size, saved = job.model.tokenizer.train_vocab_size, folder / "tokenizer"
    if size is not None and local_rank > 0:
        while not saved.exists():  # renamed into place by local rank 0, whose death ends us all
            time.sleep(0.1)

    def training_texts() -> Iterator[str]:
        say(f"training a tokenizer of {size} tokens on the rows")
        return dataset.training_texts(job.sft.data, stage="sft", seed=job.seed, report=log.info)

    tokenizer = load_tokenizer(job.model, training_texts, saved)
    if tokenizer.chat_template:
        check_template(tokenizer)
    return tokenizer


def count_tokens(micro_batches: Sequence[Batch]) -> tuple[int, int, int]:
    """This rank's part of a step: tokens, trained tokens, and computed positions that are nobody's token."""
    computed = sum(batch.input_ids.shape[1] for batch in micro_batches)
    padding = sum(batch.padding for batch in micro_batches)
    return computed - padding, sum(len(batch.targets) for batch in micro_batches), padding
