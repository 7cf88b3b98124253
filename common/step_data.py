"""From a step's settings to rows on disk, and how they become this rank's batches; alike for all steps.

Tokenized once by the first rank of each machine, while the others wait on the file system. What becomes a
trained token is decided in `common/data/chat.py`; which rows make a step in `common/data/batches.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from common.artifacts import write_json
from common.config import DataConfig, JobConfig, TrainConfig
from common.data import dataset
from common.data.batches import Batches, BatchPlan
from common.distributed import World
from common.stage import Step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Say = Callable[[str], None]
Rows = TypeVar("Rows", dataset.TokenizedDataset, dataset.PairDataset)
Kind = dataset.Kind[Any, Any, Rows]


@dataclass(frozen=True)
class StepData(Generic[Rows]):
    """What a step trains and evaluates on."""

    train: Rows
    held_out: Rows | None
    ledger: dataset.Ledger
    weights: dict[str, float]  # by source name

    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of everything that decided the rows, for the manifest."""
        held_out = None if self.held_out is None else self.held_out.fingerprint
        return {"train": self.train.fingerprint, "held_out": held_out}


def cache_dir(job: JobConfig, data: DataConfig) -> Path:
    """Where tokenized rows are kept."""
    return Path(data.cache_dir or Path(job.output_dir) / ".cache" / "data")


def build_data(
    job: JobConfig,
    step: Step,
    data: DataConfig,
    kind: Kind[Rows],
    tokenizer: PreTrainedTokenizerFast,
    say: Say,
    *,
    wait: bool = False,
) -> StepData[Rows]:
    """Tokenize the sources, or find them in the cache. wait: another process on this machine does it."""
    train, held_out, ledger = dataset.build(
        data, tokenizer, kind=kind, stage=step.value, seed=job.seed, cache_dir=cache_dir(job, data),
        report=say, wait=wait,
    )  # fmt: skip
    return StepData(train, held_out, ledger, dataset.source_weights(data))


def load_data(
    job: JobConfig,
    step: Step,
    data: DataConfig,
    kind: Kind[Rows],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    world: World,
    say: Say,
) -> StepData[Rows]:
    """`build_data` on every rank; says what became of the rows, and writes `folder/ledger.json`."""
    built = build_data(job, step, data, kind, tokenizer, say, wait=world.local_rank > 0)
    if world.is_main:
        write_json(folder / "ledger.json", built.ledger.to_json())
    say("\n".join(built.ledger.lines()))
    return built


def batch_plan(
    job: JobConfig, data: DataConfig, train: TrainConfig, world: World, *, share_prefix: bool = True
) -> BatchPlan:
    """How the rows become this rank's batches. share_prefix: of pairs, see `losses.can_share_prefix`."""
    return BatchPlan(
        max_length=data.max_length,
        packing=data.packing,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        seed=job.seed,
        rank=world.rank,
        world_size=world.size,
        share_prefix=share_prefix,
    )


def places_of(batches: Batches, rows: dataset.TokenizedDataset | dataset.PairDataset, step: int) -> list[str]:
    """Where the rows of step `step` (from 0) came from, for messages."""
    return [rows.place(int(index)) for row in batches.rows(step) for index in row]
