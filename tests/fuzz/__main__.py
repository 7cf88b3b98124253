"""Tries many cases and records what became of them; or one case again.

    python -m tests.fuzz --cases 50000              (make fuzz; writes benchmarks/results/fuzz.json)
    python -m tests.fuzz --seed 3 --case 1234       (one that was found, with its traceback)

Exit status 1 when anything was found.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.measure import write_results
from tests.fuzz import driver
from tests.fuzz.targets import every_target


def main() -> int:
    """Run the cases; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone; nothing is recorded")
    arguments = parser.parse_args()
    numbers = range(arguments.cases) if arguments.case is None else [arguments.case]
    with every_target() as targets:
        report = driver.run(targets, arguments.seed, numbers, say=lambda line: print(line, flush=True))
    if arguments.case is None:
        write_results("fuzz", report.to_json())
    return int(bool(report.findings))


if __name__ == "__main__":
    sys.exit(main())
