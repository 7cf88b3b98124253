"""Pairs as the model sees them: a seeded handful, how long they are, and what was dropped or cut."""

from __future__ import annotations

from pathlib import Path

from common.data import dataset
from common.handoff import model_to_preview
from common.models import load_tokenizer
from common.pair_preview import show_pairs
from step2_dpo.config import DPOJob
from step2_dpo.data import cache_dir


def preview(job: DPOJob, folder: Path) -> None:
    """Print to the terminal. Tokenizes into the cache, where a run finds it again; loads no model."""
    tokenizer = load_tokenizer(model_to_preview(job.model, job.dpo.policy, "dpo.policy"))
    train, _, ledger = dataset.build(
        job.dpo.data, tokenizer, kind=dataset.PREFERENCES, stage="dpo", seed=job.seed,
        cache_dir=cache_dir(job), report=print,
    )  # fmt: skip
    show_pairs(train, ledger, tokenizer, job.dpo.data.max_length, job.seed)
