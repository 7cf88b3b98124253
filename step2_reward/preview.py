"""Pairs as the model sees them: a seeded handful, how long they are, and what was dropped or cut."""

from __future__ import annotations

from pathlib import Path

from common.data import dataset
from common.handoff import model_to_preview
from common.models import load_tokenizer
from common.pair_preview import show_pairs
from step2_reward.config import RewardJob
from step2_reward.data import cache_dir


def preview(job: RewardJob, folder: Path) -> None:
    """Print to the terminal. Tokenizes into the cache, where a run finds it again; loads no model."""
    tokenizer = load_tokenizer(model_to_preview(job.model, job.reward.policy, "reward.policy"))
    train, _, ledger = dataset.build(
        job.reward.data, tokenizer, kind=dataset.PREFERENCES, stage="reward", seed=job.seed,
        cache_dir=cache_dir(job), report=print,
    )  # fmt: skip
    show_pairs(train, ledger, tokenizer, job.reward.data.max_length, job.seed)
