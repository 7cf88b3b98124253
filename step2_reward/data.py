"""From the job's sources to pairs on disk, and which of them make a step.

The order is: the policy's own tokenizer, then tokenized pairs (made once by the first rank of each machine,
while the others wait on the file system), then batches. Where an answer ends, and so where its reward is
read, is decided in `common/data/chat.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.artifacts import write_json
from common.data import dataset
from common.data.batches import BatchPlan, Pairs
from common.data.types import PairBatch, TokenizedPair
from common.distributed import World
from common.losses import can_share_prefix
from common.scalar_head import PackedScalarModel
from step2_reward.config import RewardJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Say = Callable[[str], None]

PROBE_PAIRS, PROBE_LENGTH = 4, 256


@dataclass(frozen=True)
class RewardData:
    """What the reward model trains and is evaluated on."""

    train: dataset.PairDataset
    held_out: dataset.PairDataset | None
    ledger: dataset.Ledger
    weights: dict[str, float]  # by source name

    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of everything that decided the pairs, for the manifest."""
        held_out = None if self.held_out is None else self.held_out.fingerprint
        return {"train": self.train.fingerprint, "held_out": held_out}


class Sample:
    """A seeded choice of at most `count` pairs of a data set, in their order."""

    def __init__(self, pairs: Pairs, count: int, seed: int) -> None:
        self._pairs = pairs
        self._chosen = np.sort(np.random.default_rng([seed, 3]).permutation(len(pairs))[:count])
        self.lengths = pairs.lengths[self._chosen]
        self.source_ids = pairs.source_ids[self._chosen]
        self.sources = pairs.sources

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> TokenizedPair:
        return self._pairs[int(self._chosen[index])]


def cache_dir(job: RewardJob) -> Path:
    """Where tokenized pairs are kept."""
    return Path(job.reward.data.cache_dir or Path(job.output_dir) / ".cache" / "data")


def load_data(
    job: RewardJob, tokenizer: PreTrainedTokenizerFast, folder: Path, world: World, say: Say
) -> RewardData:
    """Tokenize the job's sources, or find them in the cache; writes `folder/ledger.json`."""
    data = job.reward.data
    train, held_out, ledger = dataset.build(
        data, tokenizer, kind=dataset.PREFERENCES, stage="reward", seed=job.seed, cache_dir=cache_dir(job),
        report=say, wait=world.local_rank > 0,
    )  # fmt: skip
    if world.is_main:
        write_json(folder / "ledger.json", ledger.to_json())
    return RewardData(train, held_out, ledger, dataset.source_weights(data))


def batch_plan(job: RewardJob, world: World, module: PackedScalarModel) -> BatchPlan:
    """How this job's pairs become this rank's batches; tries a few tokens on the module."""
    return BatchPlan(
        max_length=job.reward.data.max_length,
        packing=job.reward.data.packing,
        global_batch_size=job.reward.train.global_batch_size,
        micro_batch_size=job.reward.train.micro_batch_size,
        seed=job.seed,
        rank=world.rank,
        world_size=world.size,
        share_prefix=can_share_prefix(module.base()),
    )


def count(micro_batches: Sequence[PairBatch]) -> tuple[int, int, int, int]:
    """Of this rank's part of a step: pairs, tokens of both sides, positions computed for them, padding.

    A prompt that both sides share is two times its tokens and computed once. Padding is nobody's token:
    only filler batches have any.
    """
    pairs = sum(len(batch.pair_ids) for batch in micro_batches)
    tokens = sum(batch.num_tokens for batch in micro_batches)
    sizes = [(batch.documents.input_ids.shape[1], bool(batch.pair_ids)) for batch in micro_batches]
    return pairs, tokens, sum(n for n, real in sizes if real), sum(n for n, real in sizes if not real)


def probe_documents(pairs: Pairs, device: torch.device) -> list[torch.Tensor]:
    """The ends, with their terminators, of a few answers: int64 [T] each, for comparing an exported model."""
    sides = [side for index in range(min(PROBE_PAIRS, len(pairs))) for side in _sides(pairs[index])]
    return [torch.from_numpy(ids[-PROBE_LENGTH:].astype(np.int64)).to(device) for ids in sides]


def _sides(pair: TokenizedPair) -> tuple[np.ndarray, np.ndarray]:
    return pair.chosen.input_ids, pair.rejected.input_ids
