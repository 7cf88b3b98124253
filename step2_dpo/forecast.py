"""Counts of the pairs and the schedule, before anything is started (`common/forecast.py`)."""

from __future__ import annotations

from pathlib import Path

from common.config import load_resolved
from common.counts import Counts
from common.forecast import of_pairs
from common.stage import Step
from step2_dpo.config import DPOJob


def forecast(resolved: Path) -> Counts:
    """Of the job in `resolved`."""
    job = load_resolved(resolved, DPOJob)
    return of_pairs(job, Step.dpo, job.dpo.data, job.dpo.train, job.dpo.policy)
