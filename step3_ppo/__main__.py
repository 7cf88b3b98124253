"""`python -m step3_ppo --config resolved.yaml --run-dir DIR`: one rank, under torchrun's environment."""

from __future__ import annotations

import sys

from common.runtime.entry import step_main
from common.vllm_fit import check_vllm
from step3_ppo.config import PPOJob


def main() -> int:
    """See `common.runtime.entry.step_main`."""
    return step_main("ppo", "step3_ppo", PPOJob, _check)


def _check(job: PPOJob) -> None:
    from step3_ppo.rewards.functions import load_functions
    from step3_ppo.rewards.sources import RewardSources

    if job.ppo.rollout.vllm_here:
        check_vllm()
    RewardSources(job.ppo.rewards)
    load_functions(job.ppo.evaluation.functions, "ppo.evaluation.functions")


if __name__ == "__main__":
    sys.exit(main())
