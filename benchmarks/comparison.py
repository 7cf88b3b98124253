"""Two sides measured in turn on the CPU: rates in the steady state, and whole processes.

Takes commands that append a line per optimizer step to a file; returns medians, ratios and verdicts. Every
run is a fresh process with a cold cache. Steady state: what a side does per CPU-second of its whole process
tree from the end of the second step to the end of the last. Whole process: from start to exit with the
trained weights on disk. Knows no trainer; those are in `<step>_cpu.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import median_of, run_measured, steady_rate, table, threads_environment

WANTED_STEADY, WANTED_WHOLE = 1.5, 0.6
OURS, BEST, DEFAULT = "ours", "TRL best", "TRL default"
BRIEF = "ours and TRL's best alone, no TRL's defaults, no warm cache"

Start = Callable[[Path, Path], tuple[list[str], Path]]
"""From a run's folder and its cache to its command and the file that gets a line per step."""

Totals = Callable[[Path], list[int]]
"""From that file to running totals of what is counted, one after each step."""


@dataclass(frozen=True)
class Contest:
    """What all runs of one comparison share."""

    folder: Path
    threads: int
    unit: str  # what is counted: "tokens" or "pairs"
    totals: Totals

    @property
    def names(self) -> tuple[str, ...]:
        """The numbers that are compared, of each run."""
        unit = self.unit
        rates = (f"{unit}_per_cpu_second", f"{unit}_per_second")
        return (*rates, "wall_seconds", "cpu_seconds", "peak_rss_mb")


def compare(
    contest: Contest, sides: Mapping[str, Start], repeats: int, *, brief: bool = False
) -> dict[str, Any]:
    """All sides in turn, `repeats` times; then ours and TRL's best with a warm cache.

    sides: at least `OURS`, `BEST` and `DEFAULT`, by name. brief: ours and TRL's best alone, with a cold cache
    alone, where a run takes many minutes.
    """
    if brief:
        sides = {name: sides[name] for name in (OURS, BEST)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(repeats):
        for name, start in sides.items():
            runs[name].append(measure(contest, f"{_folder_of(name)}_{number}", start))
            print(f"{name}, run {number + 1}: {_line(contest, runs[name][-1])}", flush=True)
    medians = {name: median_of(records) for name, records in runs.items()}
    warm = {}
    for name in () if brief else (OURS, BEST):
        last = f"{_folder_of(name)}_{repeats - 1}"
        warm[name] = measure(contest, f"{_folder_of(name)}_warm", sides[name], cache_of=last)
        print(f"{name}, cache warm: {_line(contest, warm[name])}", flush=True)
    ratios = ratios_of(contest, medians, warm)
    print("\nmedians\n" + rendered(contest, medians))
    print("\n".join(verdicts(contest.unit, ratios)))
    return {"runs": runs, "medians": medians, "warm": warm, "ratios": ratios}


def search(contest: Contest, candidates: Mapping[str, Start]) -> dict[str, Any]:
    """Every candidate once."""
    found = {}
    for number, (name, start) in enumerate(candidates.items()):
        found[name] = measure(contest, f"candidate_{number}", start)
        print(f"{name}: {_line(contest, found[name])}", flush=True)
    print("\n" + rendered(contest, found))
    return {"candidates": found}


def measure(contest: Contest, name: str, start: Start, cache_of: str | None = None) -> dict[str, float]:
    """One run. cache_of: an earlier run whose cache to use."""
    folder = contest.folder / name
    cache = contest.folder / (cache_of or name) / "cache"
    command, steps_file = start(folder, cache)
    environment = {**threads_environment(contest.threads), "HF_HOME": str(cache)}
    usage, ticks = run_measured(command, log=folder / "log", environment=environment, steps_file=steps_file)
    totals = contest.totals(steps_file)
    if len(totals) < 4 or ticks[-1].step < len(totals):
        raise ValueError(f"{name}: {len(totals)} steps were logged and {ticks[-1:]} seen")
    ticks = [tick for tick in ticks if tick.step <= len(totals)]  # what follows the last step is no step
    rates = steady_rate(ticks, totals, unit=contest.unit)
    record = {**vars(usage), **rates, contest.unit: totals[-1], "steps": len(totals)}
    if cache_of is not None:
        shutil.rmtree(contest.folder / cache_of)
    return record


def step_lines(steps_file: Path) -> list[dict[str, Any]]:
    """The lines of optimizer steps in either side's file, without evaluations."""
    lines = [json.loads(line) for line in steps_file.read_text().splitlines()]
    return [line for line in lines if not any(name.startswith("eval/") for name in line)]


def running_tokens(steps_file: Path) -> list[int]:
    """Tokens trained on after each step."""
    lines = step_lines(steps_file)
    return [int(line["num_tokens"] if "num_tokens" in line else line["tokens"]) for line in lines]


def ratios_of(
    contest: Contest, medians: Mapping[str, Mapping[str, float]], warm: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Ours to each other side's: of the rates, more is better; of the times, less."""
    ratios = {}
    for side, other in medians.items():
        if side != OURS:
            for name in contest.names:
                ratios[f"{name}_to_{_folder_of(side).lower()}"] = medians[OURS][name] / other[name]
    for name in ("wall_seconds", "cpu_seconds") if warm else ():
        ratios[f"warm_{name}_to_trl_best"] = warm[OURS][name] / warm[BEST][name]
    return ratios


def verdicts(unit: str, ratios: Mapping[str, float]) -> list[str]:
    """The two bars, one line each, and TRL's defaults where they were run.

    Where TRL has several best settings, each number is compared with the one that is best at it.
    """
    steady = min(_to_best(f"{unit}_per_cpu_second", ratios))
    wall, cpu = max(_to_best("wall_seconds", ratios)), max(_to_best("cpu_seconds", ratios))
    lines = [
        f"steady state: {steady:.2f} x TRL's best in {unit} per CPU-second (wanted {WANTED_STEADY}): "
        + ("met" if steady >= WANTED_STEADY else "not met"),
        f"whole process: {wall:.2f} x TRL's best wall time, {cpu:.2f} x its CPU time "
        f"(wanted {WANTED_WHOLE}): " + ("met" if max(wall, cpu) <= WANTED_WHOLE else "not met"),
    ]
    if (rate := ratios.get(f"{unit}_per_cpu_second_to_trl_default")) is not None:
        seconds = ratios["wall_seconds_to_trl_default"]
        lines.append(f"beside TRL's defaults: {rate:.2f} x {unit} per CPU-second, {seconds:.2f} x wall time")
    return lines


def _to_best(name: str, ratios: Mapping[str, float]) -> list[float]:
    return [ratio for key, ratio in ratios.items() if key.startswith(f"{name}_to_trl_best")]


def rendered(contest: Contest, records: Mapping[str, Mapping[str, float]]) -> str:
    """One line per side."""
    head = ("", f"{contest.unit}/CPU-s", f"{contest.unit}/s", "wall s", "CPU s", "peak RSS MB")
    return table(head, [(name, *(record[key] for key in contest.names)) for name, record in records.items()])


def _folder_of(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def _line(contest: Contest, record: Mapping[str, float]) -> str:
    return (
        f"{record[contest.names[0]]:,.4g} {contest.unit}/CPU-s, {record['wall_seconds']:.1f} s wall, "
        f"{record['cpu_seconds']:.1f} s CPU, {record['peak_rss_mb']:,.0f} MB"
    )
