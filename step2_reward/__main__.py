"""`python -m step2_reward --config resolved.yaml --run-dir DIR`: one rank, under torchrun's environment."""

from __future__ import annotations

import sys
from pathlib import Path

from common.runtime.entry import step_main
from step2_reward.config import RewardJob


def main() -> int:
    """See `common.runtime.entry.step_main`."""
    return step_main("reward", "step2_reward", RewardJob, train=_train, preview=_preview)


def _train(job: RewardJob, run_dir: Path) -> int:
    from step2_reward.train import train

    return train(job, run_dir)


def _preview(job: RewardJob, folder: Path) -> None:
    from step2_reward.dry_run import preview

    preview(job, folder)


if __name__ == "__main__":
    sys.exit(main())
