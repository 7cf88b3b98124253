"""Tries many cases and records what became of them; or one case again.

    python -m tests.fuzz --cases 50000              (make fuzz; writes benchmarks/results/fuzz.json)
    python -m tests.fuzz --seed 3 --case 1234       (one that was found, with its traceback)

Exit status 1 when anything was found.
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.measure import write_results
from tests.fuzz import driver, workers
from tests.fuzz.targets import every_target


def main() -> int:
    """Run the cases; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone; nothing is recorded")
    arguments = parser.parse_args()
    if arguments.case is not None:
        with every_target() as targets:
            return int(bool(driver.run(targets, arguments.seed, [arguments.case], say=say).findings))
    report = workers.run(arguments.seed, arguments.cases, arguments.workers, say=say)
    write_results("fuzz", report.to_json())
    return int(bool(report.findings))


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
