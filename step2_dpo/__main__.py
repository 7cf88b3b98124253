"""`python -m step2_dpo --config resolved.yaml --run-dir DIR`: one rank, under torchrun's environment."""

from __future__ import annotations

import sys

from common.runtime.entry import step_main
from step2_dpo.config import DPOJob


def main() -> int:
    """See `common.runtime.entry.step_main`."""
    return step_main("dpo", "step2_dpo", DPOJob)


if __name__ == "__main__":
    sys.exit(main())
