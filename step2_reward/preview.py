"""Pairs as the model sees them: a seeded handful, how long they are, and what was dropped or cut."""

from __future__ import annotations

from pathlib import Path

from common.pair_preview import preview_pairs
from common.stage import Step
from step2_reward.config import RewardJob


def preview(job: RewardJob, folder: Path) -> None:
    """See `common.pair_preview.preview_pairs`."""
    preview_pairs(job, Step.reward, job.reward.data, job.reward.policy)
