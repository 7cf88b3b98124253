"""`python -m step2_reward --config resolved.yaml --run-dir DIR`: one rank, under torchrun's environment."""

from __future__ import annotations

import sys

from common.runtime.entry import step_main
from step2_reward.config import RewardJob


def main() -> int:
    """See `common.runtime.entry.step_main`."""
    return step_main("reward", "step2_reward", RewardJob)


if __name__ == "__main__":
    sys.exit(main())
