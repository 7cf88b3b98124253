"""A step's data and schedule, counted before it is started; a program of its own for the controller.

    python -m common.training.forecast ANSWER.json STEP MODULE RESOLVED.yaml [STEP MODULE RESOLVED.yaml ...]

Takes each step's configuration; writes the `DataCounts` of each as JSON, or the UserError that stopped it.
Tokenizes into the cache, where the run finds it again; of large sources it tokenizes a seeded sample and
scales the counts. Loads no weights: a small copy of the architecture shows what it falls back to. Every
step's `dry_run.py` says how its rows are read.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.config import DataConfig, JobConfig, ModelConfig, SourceConfig
from common.counts import DataCounts
from common.data import sources
from common.data.batches import Batches, PairBatches
from common.data.dataset_types import PREFERENCES
from common.data.packing import pack
from common.data.stored import PromptDataset, TokenizedDataset
from common.data.stream import WINDOW
from common.download import origin_of
from common.errors import UserError
from common.model.tokenizer import load_tokenizer
from common.notices import listen, notice
from common.paths import files_of
from common.runtime.distributed import World
from common.stage import Step
from common.training.step_data import StepData, batch_plan, build_data
from common.training_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGE_BYTES = 16 * 2**20
"""Sources above this are sampled: tokenizing them would take more than seconds."""

SAMPLED_ROWS = 2_000
"""Rows of each source that a sample has."""

PACKED_SUFFIXES = (".gz", ".zst", ".parquet", ".arrow")

ALONE = World(0, 1, 0, torch.device("cpu"))
"""Ranks play no part in how many steps there are."""


def main(arguments: Sequence[str]) -> int:
    """Answer for each step in turn; the first UserError ends it."""
    answer, rest = Path(arguments[0]), list(arguments[1:])
    found: dict[str, Any] = {}
    try:
        for step, module, resolved in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            program = importlib.import_module(f"{module}.dry_run")
            try:
                lines: list[str] = []
                listen(lines.append)
                counts = program.forecast(Path(resolved))
                found[step] = {**dataclasses.asdict(counts), "notices": lines}
            except UserError as error:
                raise error.in_step(step) from error
    except UserError as error:
        found["error"] = {"message": error.message, "hint": error.hint}
    answer.write_text(json.dumps(found), encoding="utf-8")
    return 0


@dataclass(frozen=True)
class Reading:
    """The settings to count with, for all rows or for a sample. factors: rows of each source for one row of
    its sample. scale: the same over all sources; counts are multiplied by it."""

    data: DataConfig
    factors: tuple[float, ...]
    scale: float = 1.0

    def weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        """By source: how often a row of the sample counts; times `scale` the sample stands for all rows."""
        pairs = zip(weights.items(), self.factors, strict=False)  # the last, data.eval_path, has no factor
        return {name: weight * factor / self.scale for (name, weight), factor in pairs}

    def total(self, built: StepData[Any], values: np.ndarray | None = None) -> int:
        """The sum of `values` (one per row read) estimated for all training rows; by default their number."""
        each = np.array(self.factors)[built.train.source_ids]
        return round(float((each if values is None else each * values).sum()))


def to_read(job: JobConfig, data: DataConfig) -> Reading:
    """All rows where the sources are small; else a sample, kept in a folder of its own."""
    if data.streaming:
        notice(
            f"rows are packed and shuffled {WINDOW:,} at a time, in the order of their files",
            "data.streaming tokenizes them while they are trained on",
        )
        data = dataclasses.replace(data, path=None, sources=[*map(_first_rows, data.all_sources())])
    data = dataclasses.replace(data, streaming=False)  # all that are counted have to be there
    if size_of(data.all_sources()) <= LARGE_BYTES:
        return Reading(data, (1.0,) * len(data.all_sources()))
    every = data.all_sources()
    wanted = [_count(source) for source in every]
    taken = [min(count, SAMPLED_ROWS) for count in wanted]
    sampled = [dataclasses.replace(source, max_rows=rows) for source, rows in zip(every, taken, strict=True)]
    folder = Path(job.output_dir) / ".cache" / "plan"
    reading = dataclasses.replace(data, path=None, sources=sampled, cache_dir=str(folder))
    factors = tuple(rows / max(read, 1) for rows, read in zip(wanted, taken, strict=True))
    return Reading(reading, factors, sum(wanted) / max(sum(taken), 1))


def _first_rows(source: SourceConfig) -> SourceConfig:
    """The source; of a data set of the hub, which is fetched while training runs, its first rows."""
    streamed = sources.streamed(source)
    if streamed is source:
        return source
    named = origin_of(source.path) or source.path
    notice(
        f"of {named} the first {SAMPLED_ROWS:,} rows are counted, as if it had no others",
        "data.streaming fetches it while it is trained on",
    )
    return dataclasses.replace(streamed, max_rows=SAMPLED_ROWS)


def _count(source: SourceConfig) -> int:
    """The rows of a source that are wanted."""
    if isinstance(source, sources.StreamedSource) and source.max_rows is not None:
        return source.max_rows
    return min(count := sources.count_rows(source), source.max_rows or count)


def size_of(every: Sequence[SourceConfig]) -> int:
    """Bytes of the sources that are files here; packed ones count fourfold."""
    total = 0
    for source in every:
        total += sum(
            file.stat().st_size * (4 if file.name.endswith(PACKED_SUFFIXES) else 1)
            for file in files_of(source.path)
        )
    return total


def of_documents(
    job: JobConfig,
    reading: Reading,
    train: TrainConfig,
    built: StepData[TokenizedDataset],
    tokenizer: PreTrainedTokenizerFast,
) -> DataCounts:
    """The counts of a step that trains on documents, packed over the whole epoch."""
    data = reading.data
    batches = Batches(built.train, batch_plan(job, data, train, ALONE), reading.weights(built.weights))
    documents = batches.documents(0)
    lengths = built.train.lengths[documents]
    rows = len(pack(lengths, data.max_length, seed=0)) if data.packing else len(documents)
    steps = batches.steps_in_epochs(train.epochs)
    fill = float(lengths.sum()) / (rows * data.max_length)
    found = _counts(built, tokenizer, reading, seen=len(documents), steps=steps, train=train)
    return dataclasses.replace(found, rows=round(rows * reading.scale), fill=fill)


def of_pairs(
    job: JobConfig, step: Step, data: DataConfig, train: TrainConfig, model: ModelConfig
) -> DataCounts:
    """The counts of a step that trains on pairs, packed within an optimizer step; its rows are pairs.

    model: that the step starts from. Before there is one, the base model's tokenizer counts.
    """
    reading = to_read(job, data)
    tokenizer = load_tokenizer(model)
    say = logging.getLogger(f"rlhf.{step.value}").info
    built = build_data(job, step, reading.data, PREFERENCES, tokenizer, say)
    plan = batch_plan(job, reading.data, train, ALONE)
    batches = PairBatches(built.train, plan, reading.weights(built.weights))
    pairs = batches.documents(0)
    steps = batches.steps_in_epochs(train.epochs)
    longest = max(built.train.chosen_lengths.max(), (built.train.lengths - built.train.chosen_lengths).max())
    found = _counts(built, tokenizer, reading, seen=len(pairs), steps=steps, train=train)
    return dataclasses.replace(found, longest=int(longest))


def of_prompts(
    built: StepData[PromptDataset],
    tokenizer: PreTrainedTokenizerFast,
    reading: Reading,
    train: TrainConfig,
    prompts: int,
    iterations: int,
) -> DataCounts:
    """The counts of PPO: its rows are the prompts of a pass, its steps are iterations."""
    found = _counts(built, tokenizer, reading, seen=prompts, steps=0, train=train)
    return dataclasses.replace(found, total_steps=iterations)


def _counts(
    built: StepData[Any],
    tokenizer: PreTrainedTokenizerFast,
    reading: Reading,
    *,
    seen: int,
    steps: int,
    train: TrainConfig,
) -> DataCounts:
    """seen, steps: of the rows that were read."""
    data, scale = built.train, reading.scale
    held_out = 0 if built.held_out is None else len(built.held_out)
    return DataCounts(
        ledger=built.ledger.lines(),
        documents=reading.total(built),
        held_out=held_out if reading.data.eval_path else round(held_out * scale),
        tokens=reading.total(built, data.lengths),
        trained_tokens=reading.total(built, data.trained),
        rows=round(seen * scale),
        total_steps=train.max_steps or math.ceil(steps * scale),
        longest=int(data.lengths.max()),
        fill=1.0,
        vocabulary=max(tokenizer.get_vocab().values()) + 1,
        scale=scale,
        seen=round(seen * scale),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
