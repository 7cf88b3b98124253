"""Pairs as the model sees them: a seeded handful, how long they are, and what was dropped or cut."""

from __future__ import annotations

from pathlib import Path

from common.data import dataset
from common.handoff import load_named, model_of
from common.models import load_tokenizer
from common.pair_preview import show_pairs
from common.stage import Role
from step2_dpo.config import DPOJob
from step2_dpo.data import cache_dir


def preview(job: DPOJob, folder: Path) -> None:
    """Print to the terminal. Tokenizes into the cache, where a run finds it again; loads no model."""
    policy = load_named(job.dpo.policy or "", Role.policy, "dpo.policy")
    tokenizer = load_tokenizer(model_of(job.model, policy.path))
    train, _, ledger = dataset.build(
        job.dpo.data, tokenizer, kind=dataset.PREFERENCES, stage="dpo", seed=job.seed,
        cache_dir=cache_dir(job), report=print,
    )  # fmt: skip
    show_pairs(train, ledger, tokenizer, job.dpo.data.max_length, job.seed)
