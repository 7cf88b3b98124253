"""From the job's sources to documents on disk, and which of them make a step.

The order is: tokenizer, then tokenized documents (both made once by the first rank of each machine,
while the others wait on the file system), then batches. What becomes a trained token is decided in
`common/data/chat.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.artifacts import write_json
from common.data import dataset
from common.data.batches import BatchPlan
from common.data.chat import check_template
from common.data.types import Batch
from common.distributed import World
from common.models import load_tokenizer
from common.sampling import held_out_prompts, room_for_prompts
from step1_sft.config import SFTJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


log = logging.getLogger("rlhf.data")
Say = Callable[[str], None]


@dataclass(frozen=True)
class SFTData:
    """What SFT trains and evaluates on."""

    train: dataset.TokenizedDataset
    held_out: dataset.TokenizedDataset | None
    ledger: dataset.Ledger
    weights: dict[str, float]  # by source name

    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of everything that decided the documents, for the manifest."""
        held_out = None if self.held_out is None else self.held_out.fingerprint
        return {"train": self.train.fingerprint, "held_out": held_out}

    def prompts(self, job: SFTJob, model: PreTrainedModel) -> list[np.ndarray]:
        """Held-out prompts to complete, with room for the completion in the model's context."""
        if self.held_out is None:
            return []
        sampling = job.sft.sampling
        room = room_for_prompts(model, sampling)
        return held_out_prompts(self.held_out, sampling.num_prompts, room, job.seed)


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


def cache_dir(job: SFTJob) -> Path:
    """Where tokenized rows are kept."""
    return Path(job.sft.data.cache_dir or Path(job.output_dir) / ".cache" / "data")


def load_data(
    job: SFTJob, tokenizer: PreTrainedTokenizerFast, folder: Path, world: World, say: Say
) -> SFTData:
    """Tokenize the job's sources, or find them in the cache; writes `folder/ledger.json`."""
    data = job.sft.data
    train, held_out, ledger = dataset.build(
        data, tokenizer, stage="sft", seed=job.seed, cache_dir=cache_dir(job),
        report=say, wait=world.local_rank > 0,
    )  # fmt: skip
    if world.is_main:
        write_json(folder / "ledger.json", ledger.to_json())
    return SFTData(train, held_out, ledger, dataset.source_weights(data))


def batch_plan(job: SFTJob, world: World) -> BatchPlan:
    """How this job's rows become this rank's batches."""
    return BatchPlan(
        max_length=job.sft.data.max_length,
        packing=job.sft.data.packing,
        global_batch_size=job.sft.train.global_batch_size,
        micro_batch_size=job.sft.train.micro_batch_size,
        seed=job.seed,
        rank=world.rank,
        world_size=world.size,
    )


def count_tokens(micro_batches: Sequence[Batch]) -> tuple[int, int]:
    """Tokens, and trained tokens, of this rank's part of a step; filler batches do not count."""
    tokens = sum(batch.input_ids.shape[1] for batch in micro_batches if batch.row_ids)
    return tokens, sum(len(batch.targets) for batch in micro_batches)


def count_padding(micro_batches: Sequence[Batch]) -> int:
    """Computed positions that are nobody's token. Documents lie end to end: only filler batches have any."""
    return sum(batch.input_ids.shape[1] for batch in micro_batches if not batch.row_ids)
