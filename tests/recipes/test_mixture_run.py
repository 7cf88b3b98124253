"""A mixture of experts through a whole step, its routers balanced."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import LLAMA, Base, finish, training_lines

pytestmark = pytest.mark.slow  # whole runs

MIXTURE = {
    **LLAMA, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip
LOGGED = ("loss", "grad_norm", "aux_loss", "max_expert_load")


def run(base: Base, ranks: int, stage: int, micro_batch_size: int, *, checkpointing: bool) -> Path:
    """Three steps over a whole epoch each, so that any packing holds the same documents."""
    job = base.job(max_steps=3, save_every=0, global_batch_size=64, micro_batch_size=micro_batch_size)
    job.model.config, job.deepspeed.stage = dict(MIXTURE), stage
    job.model.gradient_checkpointing, job.model.router_aux_loss_coef = checkpointing, 0.5
    job.sft.sampling.num_prompts = 0
    run_dir = base.write(f"mixture-{ranks}-{stage}", job)
    printed = finish(run_dir, ranks)
    assert "each step runs its micro-batches once more without gradients" in printed
    return run_dir


def test_a_mixture_trains_the_same_on_one_rank_and_partitioned_over_two(base: Base) -> None:
    alone = training_lines(run(base, 1, 1, 4, checkpointing=False))
    shared = training_lines(run(base, 2, 3, 1, checkpointing=True))
    assert len(alone) == len(shared) == 3
    for name in LOGGED:
        # sums in another order, grown by two updates
        assert [line[name] for line in shared] == pytest.approx([line[name] for line in alone], rel=1e-4)
