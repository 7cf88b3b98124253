"""From the job's sources to pairs on disk, and which of them make a step.

The order is: the policy's own tokenizer, then tokenized pairs (made once by the first rank of each machine,
while the others wait on the file system), then batches. What becomes a trained token is decided in
`common/data/chat.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.artifacts import write_json
from common.data import dataset
from common.data.batches import BatchPlan
from common.data.types import PairBatch, TokenizedExample
from common.distributed import World
from common.losses import PackedCausalLM, can_share_prefix
from common.sampling import held_out_prompts, room_for_prompts
from step2_dpo.config import DPOJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Say = Callable[[str], None]


@dataclass(frozen=True)
class ChosenAnswers:
    """The chosen sides of pairs, as documents."""

    pairs: dataset.PairDataset

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.pairs[index].chosen


@dataclass(frozen=True)
class DPOData:
    """What DPO trains and evaluates on."""

    train: dataset.PairDataset
    held_out: dataset.PairDataset | None
    ledger: dataset.Ledger
    weights: dict[str, float]  # by source name

    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of everything that decided the pairs, for the manifest."""
        held_out = None if self.held_out is None else self.held_out.fingerprint
        return {"train": self.train.fingerprint, "held_out": held_out}

    def prompts(self, job: DPOJob, model: PreTrainedModel) -> list[np.ndarray]:
        """Held-out prompts to complete, with room for the completion in the model's context."""
        if self.held_out is None:
            return []
        sampling = job.dpo.sampling
        room = room_for_prompts(model, sampling)
        return held_out_prompts(ChosenAnswers(self.held_out), sampling.num_prompts, room, job.seed)


def cache_dir(job: DPOJob) -> Path:
    """Where tokenized pairs, and the reference's log-probabilities, are kept."""
    return Path(job.dpo.data.cache_dir or Path(job.output_dir) / ".cache" / "data")


def load_data(
    job: DPOJob, tokenizer: PreTrainedTokenizerFast, folder: Path, world: World, say: Say
) -> DPOData:
    """Tokenize the job's sources, or find them in the cache; writes `folder/ledger.json`."""
    data = job.dpo.data
    train, held_out, ledger = dataset.build(
        data, tokenizer, kind=dataset.PREFERENCES, stage="dpo", seed=job.seed, cache_dir=cache_dir(job),
        report=say, wait=world.local_rank > 0,
    )  # fmt: skip
    if world.is_main:
        write_json(folder / "ledger.json", ledger.to_json())
    return DPOData(train, held_out, ledger, dataset.source_weights(data))


def batch_plan(job: DPOJob, world: World, module: PackedCausalLM) -> BatchPlan:
    """How this job's pairs become this rank's batches; tries a few tokens on the module."""
    return BatchPlan(
        max_length=job.dpo.data.max_length,
        packing=job.dpo.data.packing,
        global_batch_size=job.dpo.train.global_batch_size,
        micro_batch_size=job.dpo.train.micro_batch_size,
        seed=job.seed,
        rank=world.rank,
        world_size=world.size,
        share_prefix=can_share_prefix(module.base()),
    )


def count_tokens(micro_batches: Sequence[PairBatch]) -> tuple[int, int, int]:
    """Of this rank's part of a step: tokens of both sides, positions computed for them, and padding.

    A prompt that both sides share is two times its tokens and computed once. Padding is nobody's token:
    only filler batches have any.
    """
    tokens = sum(batch.num_tokens for batch in micro_batches)
    sizes = [(batch.documents.input_ids.shape[1], bool(batch.pair_ids)) for batch in micro_batches]
    return tokens, sum(n for n, real in sizes if real), sum(n for n, real in sizes if not real)
