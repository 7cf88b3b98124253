"""Before a run, without a model: `forecast` counts rows and steps for `plan`; `preview` shows rows.

A preview is a seeded handful as the model sees them, their lengths, and what was dropped or cut.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from common.config import load_resolved
from common.counts import DataCounts
from common.data.dataset_types import DEMONSTRATIONS
from common.data.stored import TokenizedDataset
from common.decoding.fallbacks import notice_fallbacks
from common.model.architecture import CAUSAL_LM
from common.runtime import progress
from common.stage import Step
from common.training.forecast import of_documents, to_read
from common.training.preview import a_few, document_runs, show_preview
from common.training.step_data import build_data
from step1_sft.config import SFTJob
from step1_sft.data import load_sft_tokenizer

log = logging.getLogger("rlhf.sft")


def forecast(resolved: Path) -> DataCounts:
    """Of the job in `resolved`; a tokenizer that is trained for it is left in `sft/` beside that file."""
    job = load_resolved(resolved, SFTJob)
    reading = to_read(job, job.sft.data)
    counted = replace(job, sft=replace(job.sft, data=reading.data))
    tokenizer = load_sft_tokenizer(counted, resolved.parent / "sft", local_rank=0, say=log.info)
    built = build_data(counted, Step.sft, reading.data, DEMONSTRATIONS, tokenizer, log.info)
    notice_fallbacks(job.model, CAUSAL_LM, job.launch, samples=job.sft.sampling.num_prompts > 0)
    return of_documents(job, reading, job.sft.train, built, tokenizer)


def preview(job: SFTJob, folder: Path) -> None:
    """Print to the terminal. Tokenizes into the cache, where a run finds it again; loads no model."""
    tokenizer = load_sft_tokenizer(job, folder, local_rank=0, say=progress.say)
    shown = to_read(job, job.sft.data).data if job.sft.data.streaming else job.sft.data
    data = build_data(job, Step.sft, shown, DEMONSTRATIONS, tokenizer, progress.say)
    train = data.train
    show_preview(
        a_few(
            train,
            job.seed,
            lambda index, marked: [
                *which(train, index),
                *document_runs(train[index], tokenizer, marked=marked),
            ],
        ),
        train.lengths.tolist(),
        data.ledger.lines(),
        float(train.trained.sum() / train.lengths.sum()),
        job.sft.data.max_length,
    )


def which(rows: TokenizedDataset, index: int) -> list[tuple[str, bool]]:
    """Of a row that was split, which of its documents this is."""
    number, count = rows.part_of_row(index)
    if count == 1:
        return []
    return [(f"document {number} of {count} of {rows.place(index)}, behind a prompt of its own:\n", False)]
