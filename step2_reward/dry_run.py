"""Before a run, without a model: `forecast` counts pairs and steps for `plan`; `preview` shows pairs.

A preview is a seeded handful as the model sees them, their lengths, and what was dropped or cut.
"""

from __future__ import annotations

from pathlib import Path

from common.config import load_resolved
from common.counts import DataCounts
from common.decoding.fallbacks import notice_fallbacks
from common.handoff import model_to_preview
from common.model.scalar_head import NEW_REWARD_MODEL
from common.stage import Step
from common.training.forecast import of_pairs
from common.training.preview import preview_pairs
from step2_reward.config import RewardJob


def forecast(resolved: Path) -> DataCounts:
    """Of the job in `resolved`."""
    job = load_resolved(resolved, RewardJob)
    model = model_to_preview(job.model, job.reward.policy, "reward.policy")
    counts = of_pairs(job, Step.reward, job.reward.data, job.reward.train, model)
    notice_fallbacks(model, NEW_REWARD_MODEL, job.launch)
    return counts


def preview(job: RewardJob, folder: Path) -> None:
    """See `common.training.preview.preview_pairs`."""
    preview_pairs(job, Step.reward, job.reward.data, job.reward.policy)
