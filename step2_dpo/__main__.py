"""`python -m step2_dpo --config resolved.yaml --run-dir DIR`: one rank, under torchrun's environment."""

from __future__ import annotations

import sys
from pathlib import Path

from common.runtime.entry import step_main
from step2_dpo.config import DPOJob


def main() -> int:
    """See `common.runtime.entry.step_main`."""
    return step_main("dpo", "step2_dpo", DPOJob, train=_train, preview=_preview)


def _train(job: DPOJob, run_dir: Path) -> int:
    from step2_dpo.train import train

    return train(job, run_dir)


def _preview(job: DPOJob, folder: Path) -> None:
    from step2_dpo.dry_run import preview

    preview(job, folder)


if __name__ == "__main__":
    sys.exit(main())
