"""`python -m step1_sft --config resolved.yaml --run-dir DIR`: one rank, under torchrun's environment."""

from __future__ import annotations

import sys

from common.runtime.entry import step_main
from step1_sft.config import SFTJob


def main() -> int:
    """See `common.runtime.entry.step_main`."""
    return step_main("sft", "step1_sft", SFTJob)


if __name__ == "__main__":
    sys.exit(main())
