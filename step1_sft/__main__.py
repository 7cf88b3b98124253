"""`python -m step1_sft --config resolved.yaml --run-dir DIR`: one rank, under torchrun's environment.

`--preview` shows the data instead, with neither model nor ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from common.config import load_resolved
from common.errors import UserError
from common.logs import open_rank_log, run_and_report
from step1_sft.config import SFTJob


def main() -> int:
    """Exit status: 0 done, 2 something the user can fix, 143 told to stop with its state saved."""
    parser = argparse.ArgumentParser(prog="python -m step1_sft")
    parser.add_argument("--config", type=Path, required=True, help="a run's resolved.yaml")
    parser.add_argument(
        "--run-dir", type=Path, help="the run's folder; by default the one that holds the config"
    )
    parser.add_argument("--preview", action="store_true", help="show the data and stop")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir or arguments.config.parent
    logs = run_dir / "sft" / "logs"
    open_rank_log(logs, int(os.environ.get("RANK", "0")))

    def work() -> int:
        job = load_resolved(arguments.config, SFTJob)
        try:
            if arguments.preview:
                from step1_sft.preview import preview

                preview(job, run_dir / "sft")
                return 0
            from step1_sft.train import train

            return train(job, run_dir)
        except UserError as error:
            raise error.in_step("sft") from error

    return run_and_report(work, logs)


if __name__ == "__main__":
    sys.exit(main())
