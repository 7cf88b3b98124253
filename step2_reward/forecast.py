"""DataCounts of the pairs and the schedule, before anything is started (`common/forecast.py`)."""

from __future__ import annotations

from pathlib import Path

from common.config import load_resolved
from common.counts import DataCounts
from common.forecast import of_pairs
from common.foresight import foresee_scalar
from common.handoff import model_to_preview
from common.stage import Step
from step2_reward.config import RewardJob


def forecast(resolved: Path) -> DataCounts:
    """Of the job in `resolved`."""
    job = load_resolved(resolved, RewardJob)
    model = model_to_preview(job.model, job.reward.policy, "reward.policy")
    counts = of_pairs(job, Step.reward, job.reward.data, job.reward.train, model)
    foresee_scalar(model)
    return counts
