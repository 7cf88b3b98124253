"""Counts of the pairs and the schedule, before anything is started (`common/forecast.py`)."""

from __future__ import annotations

import logging
from pathlib import Path

from common.config import load_resolved
from common.data.dataset import PREFERENCES
from common.forecast import Forecast, of_pairs, to_read
from common.handoff import model_to_preview
from common.models import load_tokenizer
from common.stage import Step
from common.step_data import build_data
from step2_reward.config import RewardJob

log = logging.getLogger("rlhf.reward")


def forecast(resolved: Path) -> Forecast:
    """Of the job in `resolved`. Before there is a policy, the base model's tokenizer counts."""
    job = load_resolved(resolved, RewardJob)
    data, scale = to_read(job, job.reward.data)
    tokenizer = load_tokenizer(model_to_preview(job.model, job.reward.policy, "reward.policy"))
    built = build_data(job, Step.reward, data, PREFERENCES, tokenizer, log.info)
    return of_pairs(job, data, job.reward.train, built, tokenizer, scale)
