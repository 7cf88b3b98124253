"""`python -m step1_sft --config resolved.yaml --run-dir DIR`: one rank, under torchrun's environment."""

from __future__ import annotations

import sys
from pathlib import Path

from common.runtime.entry import step_main
from step1_sft.config import SFTJob


def main() -> int:
    """See `common.runtime.entry.step_main`."""
    return step_main("sft", "step1_sft", SFTJob, train=_train, preview=_preview)


def _train(job: SFTJob, run_dir: Path) -> int:
    from step1_sft.train import train

    return train(job, run_dir)


def _preview(job: SFTJob, folder: Path) -> None:
    from step1_sft.dry_run import preview

    preview(job, folder)


if __name__ == "__main__":
    sys.exit(main())
