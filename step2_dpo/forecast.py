"""DataCounts of the pairs and the schedule, before anything is started (`common/forecast.py`)."""

from __future__ import annotations

from pathlib import Path

from common.config import load_resolved
from common.counts import DataCounts
from common.forecast import of_pairs
from common.foresight import foresee_policy
from common.handoff import model_to_preview
from common.stage import Step
from step2_dpo.config import DPOJob


def forecast(resolved: Path) -> DataCounts:
    """Of the job in `resolved`."""
    job = load_resolved(resolved, DPOJob)
    model = model_to_preview(job.model, job.dpo.policy, "dpo.policy")
    counts = of_pairs(job, Step.dpo, job.dpo.data, job.dpo.train, model)
    foresee_policy(model, samples=job.dpo.sampling.num_prompts > 0)
    return counts
