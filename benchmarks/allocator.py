"""SFT on the CPU with each allocator of ranks: `python -m benchmarks.allocator --model models/smollm2`.

The real command on rows of GSM8K, full fine-tuning, one thread; sides take turns, each a fresh process.
Measured: tokens per CPU-second of the whole process tree in the steady state, and the peak of the largest
process. Writes `results/allocator_<dtype>.json`. `--tcmalloc FILE` adds a side with that library.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from pathlib import Path

from benchmarks import comparison, sft_cpu, workload
from benchmarks.measure import median_of, run_measured, steady_rate, threads_environment, write_results

ROWS = 24
STEP = 8
AS_IT_IS, KEEPING, TCMALLOC = "glibc as it is", "glibc, told to keep", "tcmalloc"


def main() -> int:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allocator")
    parser.add_argument("--model", type=Path, required=True, help="a pretrained model's folder")
    parser.add_argument("--data", type=Path, default=workload.GSM8K)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tcmalloc", type=Path, help="libtcmalloc_minimal.so.4")
    arguments = parser.parse_args()
    # an empty GLIBC_TUNABLES is a user's choice of glibc as it is
    sides = {AS_IT_IS: {"GLIBC_TUNABLES": ""}, KEEPING: {}}
    if arguments.tcmalloc is not None:
        sides[TCMALLOC] = {"LD_PRELOAD": str(arguments.tcmalloc.resolve())}
    with tempfile.TemporaryDirectory(prefix="allocator_") as temporary:
        folder = Path(temporary)
        made = workload.prepare(folder / "workload", arguments.data, ROWS, model=arguments.model)
        setup = sft_cpu.Setup(made, folder, arguments.dtype, 1, 4, ROWS, rows_per_step=STEP)
        start = functools.partial(sft_cpu.ours, setup)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(arguments.repeats):
            for place, (side, variables) in enumerate(sides.items()):
                where = folder / f"run_{number}_{place}"
                command, steps_file = start(where, folder / "cache")
                environment = {**threads_environment(1), **variables}
                usage, ticks = run_measured(
                    command, log=where / "log", environment=environment, steps_file=steps_file
                )
                totals = comparison.running_tokens(steps_file)
                ticks = [tick for tick in ticks if tick.step <= len(totals)]
                runs[side].append({**vars(usage), **steady_rate(ticks, totals, skip=1)})
                print(side, runs[side][-1], flush=True)
    result = {"dtype": arguments.dtype, "rows": ROWS, "rows_per_step": STEP, "threads": 1}
    medians = {name: median_of(records) for name, records in runs.items()}
    written = write_results(f"allocator_{arguments.dtype}", {**result, "medians": medians, "runs": runs})
    print(f"written: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
