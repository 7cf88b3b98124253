"""SFT on the CPU, ours beside TRL's SFTTrainer: `python -m benchmarks.sft_cpu`.

The same GSM8K rows, 4M-parameter weights, precision, optimizer, schedule and rows per optimizer step, one
epoch. Ours is the real command, `python -m pipeline run experiment=gsm8k ...`; TRL runs in its best setting
(see `BEST`; `--search` measures the candidates) and in its defaults. Every run is a fresh process with a cold
data cache, sides take turns, and medians are reported; one more run each has a warm cache.

Steady state: real tokens (no padding) per CPU-second of the whole process tree, from the end of the second
step to the end of the last. Whole process: from start to exit with the trained weights on disk; ours also
checkpoints, hashes, and compares the reloaded export with the live model. Writes
`results/sft_cpu_<dtype>.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.measure import (
    median_of,
    run_measured,
    steady_rate,
    table,
    threads_environment,
    write_results,
)

ROWS_PER_STEP = 32
WANTED_STEADY, WANTED_WHOLE = 1.5, 0.6
NAMES = ("tokens_per_cpu_second", "tokens_per_second", "wall_seconds", "cpu_seconds", "peak_rss_mb")

QUIET = {
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
}
GROUPED = {**QUIET, "train_sampling_strategy": "group_by_length"}

DEFAULT: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
"""Everything else as TRL has it: gradient checkpointing, random order, a log line every 10 steps."""

BEST: dict[str, dict[str, Any]] = {
    "fp32": {**GROUPED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 32},
    "bf16": {**GROUPED, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8},
}
"""The fastest of `CANDIDATES`: in fp32 by `--search`; in bf16 only batches of 1 and 4 were tried."""

CANDIDATES: dict[str, dict[str, Any]] = {
    "padded, 8": {**QUIET, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    "by length, 1": {**GROUPED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 32},
    "by length, 2": {**GROUPED, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 16},
    "by length, 4": {**GROUPED, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8},
    "by length, 8": {**GROUPED, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    "by length, 32": {**GROUPED, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1},
    # rows of 512 tokens hold 2.4 documents: 13 rows are about as many documents as the others have per step
    "packed, 1": {
        **QUIET, "packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 13,
    },
    "padding-free, 4": {
        **QUIET, "padding_free": True, "max_length": None, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What all runs of one invocation share."""

    made: workload.Workload
    folder: Path
    dtype: str
    threads: int
    micro_batch: int
    rows: int


def main() -> int:
    """Run the comparison or the search, print the table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft_cpu")
    parser.add_argument("--data", type=Path, default=workload.GSM8K)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--micro-batch", type=int, default=8, help="ours, in rows")
    parser.add_argument("--search", action="store_true", help="measure TRL's candidates once each")
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sft_cpu_") as temporary:
        folder = Path(temporary)
        made = workload.prepare(folder / "workload", arguments.data, arguments.rows)
        setup = Setup(made, folder, arguments.dtype, arguments.threads, arguments.micro_batch, arguments.rows)
        result = search(setup) if arguments.search else compare(setup, arguments.repeats)
    result = {**described(setup), **result}
    name = f"sft_cpu_{arguments.dtype}" + ("_search" if arguments.search else "")
    print(f"written: {write_results(name, result, to=arguments.results)}")
    return 0


def compare(setup: Setup, repeats: int) -> dict[str, Any]:
    """Ours, TRL's best and TRL's defaults in turn, `repeats` times; then ours and TRL's best, cache warm."""
    sides = {"ours": None, "TRL best": BEST[setup.dtype], "TRL default": DEFAULT}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(repeats):
        for name, arguments in sides.items():
            runs[name].append(measure(setup, f"{name.replace(' ', '_')}_{number}", arguments))
            print(f"{name}, run {number + 1}: {_line(runs[name][-1])}", flush=True)
    medians = {name: median_of(records) for name, records in runs.items()}
    warm = {}
    for name in ("ours", "TRL best"):
        last = f"{name.replace(' ', '_')}_{repeats - 1}"
        warm[name] = measure(setup, f"{name.replace(' ', '_')}_warm", sides[name], cache_of=last)
        print(f"{name}, cache warm: {_line(warm[name])}", flush=True)
    ratios = ratios_of(medians, warm)
    print("\nmedians\n" + rendered(medians))
    print("\n".join(verdicts(ratios)))
    return {"runs": runs, "medians": medians, "warm": warm, "ratios": ratios}


def search(setup: Setup) -> dict[str, Any]:
    """Every candidate once."""
    found = {}
    for number, (name, arguments) in enumerate(CANDIDATES.items()):
        found[name] = measure(setup, f"candidate_{number}", arguments)
        print(f"{name}: {_line(found[name])}", flush=True)
    print("\n" + rendered(found))
    return {"candidates": found}


def measure(
    setup: Setup, name: str, trl: Mapping[str, Any] | None, cache_of: str | None = None
) -> dict[str, float]:
    """One run, of TRL with these arguments or of ours (None). cache_of: an earlier run whose cache to use."""
    folder = setup.folder / name
    cache = setup.folder / (cache_of or name) / "cache"
    command, steps_file = _ours(setup, folder, cache) if trl is None else _trl(setup, folder, trl)
    environment = {**threads_environment(setup.threads), "HF_HOME": str(cache)}
    usage, ticks = run_measured(command, log=folder / "log", environment=environment, steps_file=steps_file)
    tokens = running_tokens(steps_file)
    if len(tokens) < 4 or ticks[-1].step != len(tokens):
        raise ValueError(f"{name}: {len(tokens)} steps were logged and {ticks[-1:]} seen")
    record = {**vars(usage), **steady_rate(ticks, tokens), "tokens": tokens[-1], "steps": len(tokens)}
    if cache_of is not None:
        shutil.rmtree(setup.folder / cache_of)
    return record


def running_tokens(steps_file: Path) -> list[int]:
    """Tokens trained on after each step, from either side's file."""
    lines = [json.loads(line) for line in steps_file.read_text().splitlines()]
    return [int(line.get("num_tokens", line.get("tokens"))) for line in lines if "eval/loss" not in line]


def _ours(setup: Setup, folder: Path, cache: Path) -> tuple[list[str], Path]:
    overrides = [
        "experiment=gsm8k",
        "run_name=ours",
        f"output_dir={folder}",
        f"model.path={setup.made.base}",
        f"model.dtype={setup.dtype}",
        f"sft.data.path={setup.made.rows}",
        f"sft.data.cache_dir={cache}",
        f"sft.data.max_length={workload.MAX_LENGTH}",
        "sft.data.packing=false",  # so that a step has as many documents as TRL's
        "sft.data.eval_fraction=0",
        f"sft.train.global_batch_size={ROWS_PER_STEP}",
        f"sft.train.micro_batch_size={setup.micro_batch}",
        "sft.train.epochs=1",
        f"sft.optim.lr={workload.LEARNING_RATE}",
        "deepspeed=zero1",
        "launch.nproc_per_node=1",
        "tracking=off",
    ]
    command = [sys.executable, "-m", "pipeline", "run", *overrides]
    return command, folder / "ours" / "sft" / "metrics.jsonl"


def _trl(setup: Setup, folder: Path, arguments: Mapping[str, Any]) -> tuple[list[str], Path]:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "base": str(setup.made.base),
        "dtype": setup.dtype,
        "rows": str(setup.made.rows),
        "out": str(folder),
        "arguments": {
            "max_length": workload.MAX_LENGTH,
            "num_train_epochs": 1,
            "warmup_steps": workload.WARMUP_RATIO,
            **workload.optimizer_arguments(),
            **arguments,
        },
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    return [sys.executable, "-m", "benchmarks.trl_sft", str(path)], folder / "steps.jsonl"


def described(setup: Setup) -> dict[str, Any]:
    """The conditions, for the record."""
    return {
        "dtype": setup.dtype,
        "rows": setup.rows,
        "rows_per_step": ROWS_PER_STEP,
        "threads": setup.threads,
        "wait_policy": "OMP_WAIT_POLICY=PASSIVE on both sides",
        "micro_batch_ours": setup.micro_batch,
        "trl_best": BEST[setup.dtype],
        "trl_default": DEFAULT,
    }


def ratios_of(
    medians: Mapping[str, Mapping[str, float]], warm: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Ours to TRL's: of the rates, more is better; of the times, less."""
    ours, best, default = (medians[name] for name in ("ours", "TRL best", "TRL default"))
    ratios = {}
    for side, other in (("best", best), ("default", default)):
        for name in NAMES:
            ratios[f"{name}_to_trl_{side}"] = ours[name] / other[name]
    ratios["warm_wall_seconds_to_trl_best"] = warm["ours"]["wall_seconds"] / warm["TRL best"]["wall_seconds"]
    ratios["warm_cpu_seconds_to_trl_best"] = warm["ours"]["cpu_seconds"] / warm["TRL best"]["cpu_seconds"]
    return ratios


def verdicts(ratios: Mapping[str, float]) -> list[str]:
    """The two bars, one line each."""
    steady = ratios["tokens_per_cpu_second_to_trl_best"]
    wall, cpu = ratios["wall_seconds_to_trl_best"], ratios["cpu_seconds_to_trl_best"]
    return [
        f"steady state: {steady:.2f} x TRL's best in tokens per CPU-second (wanted {WANTED_STEADY}): "
        + ("met" if steady >= WANTED_STEADY else "not met"),
        f"whole process: {wall:.2f} x TRL's best wall time, {cpu:.2f} x its CPU time "
        f"(wanted {WANTED_WHOLE}): " + ("met" if max(wall, cpu) <= WANTED_WHOLE else "not met"),
        f"beside TRL's defaults: {ratios['tokens_per_cpu_second_to_trl_default']:.2f} x tokens per "
        "CPU-second, "
        f"{ratios['wall_seconds_to_trl_default']:.2f} x wall time",
    ]


def rendered(records: Mapping[str, Mapping[str, float]]) -> str:
    """One line per side."""
    head = ("", "tokens/CPU-s", "tokens/s", "wall s", "CPU s", "peak RSS MB")
    return table(head, [(name, *(record[key] for key in NAMES)) for name, record in records.items()])


def _line(record: Mapping[str, float]) -> str:
    return (
        f"{record['tokens_per_cpu_second']:,.0f} tokens/CPU-s, {record['wall_seconds']:.1f} s wall, "
        f"{record['cpu_seconds']:.1f} s CPU, {record['peak_rss_mb']:,.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
