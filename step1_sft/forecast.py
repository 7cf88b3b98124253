"""DataCounts of SFT's rows and its schedule, before anything is started (`common/forecast.py`)."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from common.config import load_resolved
from common.counts import DataCounts
from common.data.dataset import DEMONSTRATIONS
from common.forecast import of_documents, to_read
from common.foresight import foresee_policy
from common.stage import Step
from common.step_data import build_data
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
    foresee_policy(job.model, samples=job.sft.sampling.num_prompts > 0)
    return of_documents(job, reading, job.sft.train, built, tokenizer)
