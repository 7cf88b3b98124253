"""How much of a second rank is left over: `python -m benchmarks.weak_scaling`.

Trains the 4M-parameter model of `experiment=gsm8k` on packed GSM8K rows, fp32, one OpenMP thread per rank, as
many rows per rank and step for all: one rank alone; two runs of one rank beside each other, which share the
machine and nothing else; and one run of two ranks. Efficiency is the tokens per second of two ranks over
twice those of one. The two runs beside each other part it: what sharing a machine costs (memory, caches), and
what talking to each other and waiting for each other costs. Sides take turns; medians count. Writes
`results/weak_scaling.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.measure import PROJECT, table, threads_environment, write_results
from common.runtime.tracking import read_metrics

WANTED = 0.85
SKIPPED = 2
"""Steps at the beginning that do not count: kernels are chosen, memory is fetched."""

DOCUMENTS = 1500

SIDES = {"one rank": (1, 1), "two runs of one rank": (1, 2), "two ranks": (2, 1)}
"""Ranks of a run, and how many runs go on at the same time."""


def main() -> int:
    """Measure all sides in turn, print the split, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weak_scaling")
    parser.add_argument("--data", type=Path, default=workload.GSM8K)
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3), help="of ZeRO")
    parser.add_argument("--rows", type=int, default=16, help="packed ones of 512 tokens, per rank and step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weak_scaling_") as temporary:
        folder = Path(temporary)
        made = workload.prepare(folder / "workload", arguments.data, DOCUMENTS)
        rates: dict[str, list[float]] = {name: [] for name in SIDES}
        for number in range(arguments.repeats):
            for name, (ranks, runs) in SIDES.items():
                place = folder / f"{name.replace(' ', '_')}_{number}"
                rates[name].append(tokens_per_second(made, place, ranks, runs, arguments))
                print(f"{name}, {number + 1}: {rates[name][-1]:,.0f} tokens/s", flush=True)
    result = {"rates": rates, **split(rates)}
    print(rendered(result))
    print(f"written: {write_results('weak_scaling', result, to=arguments.results)}")
    return 0 if result["efficiency"] >= WANTED else 1


def tokens_per_second(
    made: workload.Workload, place: Path, ranks: int, runs: int, arguments: argparse.Namespace
) -> float:
    """Of all runs together, each with so many ranks: the sum of their medians over the steps that count."""
    place.mkdir(parents=True)
    processes = []
    for number in range(runs):
        with open(place / f"{number}.txt", "wb") as log:
            processes.append(
                subprocess.Popen(
                    command(made, place, f"run{number}", ranks, arguments),
                    cwd=PROJECT,
                    env={**os.environ, **threads_environment(1)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )  # fmt: skip
            )
    for number, process in enumerate(processes):
        if process.wait() != 0:
            raise SystemExit((place / f"{number}.txt").read_text()[-2000:])
    return sum(rate_of(place / f"run{number}" / "sft" / "metrics.jsonl") for number in range(runs))


def command(
    made: workload.Workload, place: Path, name: str, ranks: int, arguments: argparse.Namespace
) -> list[str]:
    """A run as a user would start it; each rank has the same rows in a step whatever their number."""
    return [
        sys.executable, "-m", "pipeline", "run", "steps=[sft]", f"model.path={made.base}", "model.dtype=fp32",
        f"sft.data.path={made.rows}", f"sft.data.max_length={workload.MAX_LENGTH}",
        "sft.data.eval_fraction=0", f"sft.train.global_batch_size={ranks * arguments.rows}",
        "sft.train.micro_batch_size=8", f"sft.train.max_steps={arguments.steps}", "sft.train.eval_every=0",
        f"deepspeed=zero{arguments.stage}", f"launch.nproc_per_node={ranks}", "tracking=off",
        f"run_name={name}", f"output_dir={place}",
    ]  # fmt: skip


def rate_of(metrics: Path) -> float:
    """The median over steps of tokens per second, all ranks together."""
    lines = [line for line in read_metrics(metrics) if "perf/tokens_per_second" in line]
    return statistics.median(line["perf/tokens_per_second"] for line in lines[SKIPPED:])


def split(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Efficiency, and its two factors: of sharing the machine, and of being one run."""
    alone, beside, together = (statistics.median(rates[name]) for name in SIDES)
    return {
        "efficiency": together / (2 * alone),
        "of_sharing_the_machine": beside / (2 * alone),
        "of_being_one_run": together / beside,
    }


def rendered(result: Mapping[str, Any]) -> str:
    """A line per side, then the verdict."""
    rows = [(name, statistics.median(found), *sorted(found)) for name, found in result["rates"].items()]
    head = ("", "tokens/s", *(f"run {number + 1}" for number in range(len(rows[0]) - 2)))
    met = "met" if result["efficiency"] >= WANTED else "not met"
    return (
        f"{table(head, rows)}\nefficiency {result['efficiency']:.3f} (wanted {WANTED}): {met}; sharing the "
        f"machine {result['of_sharing_the_machine']:.3f}, being one run {result['of_being_one_run']:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
