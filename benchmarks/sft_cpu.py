"""SFT on the CPU, ours beside TRL's SFTTrainer: `python -m benchmarks.sft_cpu`.

    python -m benchmarks.sft_cpu --model FOLDER   (a pretrained model instead of one of 4M parameters)

The same GSM8K rows, weights, precision, optimizer, schedule and rows per optimizer step, one
epoch. Ours is the real command, `python -m pipeline run experiment=gsm8k ...`; TRL runs in its best setting
(see `BEST`; `--search` measures the candidates) and in its defaults. Every run is a fresh process with a cold
data cache, sides take turns, and medians are reported; one more run each has a warm cache.

What is measured is real tokens (no padding), as comparison.py says; ours also checkpoints, hashes, and
compares the reloaded export with the live model. Writes `results/sft_cpu_<dtype>.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import comparison, workload
from benchmarks.measure import write_results

ROWS_PER_STEP = 32

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
    rows_per_step: int = ROWS_PER_STEP


def main() -> int:
    """Run the comparison or the search, print the table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft_cpu")
    parser.add_argument("--data", type=Path, default=workload.GSM8K)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--micro-batch", type=int, default=8, help="ours, in rows")
    parser.add_argument(
        "--model", type=Path, help="a pretrained model's folder; by default one of 4M parameters"
    )
    parser.add_argument("--search", action="store_true", help="measure TRL's candidates once each")
    parser.add_argument("--brief", action="store_true", help=comparison.BRIEF)
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sft_cpu_") as temporary:
        folder = Path(temporary)
        made = workload.prepare(folder / "workload", arguments.data, arguments.rows, model=arguments.model)
        setup = Setup(made, folder, arguments.dtype, arguments.threads, arguments.micro_batch, arguments.rows)
        contest = comparison.Contest(folder, setup.threads, "tokens", comparison.running_tokens)
        if arguments.search:
            result = comparison.search(contest, trl_sides(setup, CANDIDATES))
        else:
            result = comparison.compare(contest, sides_of(setup), arguments.repeats, brief=arguments.brief)
    result = {**described(setup), **result}
    of_model = "" if arguments.model is None else f"_{arguments.model.resolve().name}"
    name = f"sft_cpu{of_model}_{arguments.dtype}" + ("_search" if arguments.search else "")
    print(f"written: {write_results(name, result, to=arguments.results)}")
    return 0


def sides_of(setup: Setup) -> dict[str, comparison.Start]:
    """Ours, TRL's best and TRL's defaults."""
    trl = {comparison.BEST: BEST[setup.dtype], comparison.DEFAULT: DEFAULT}
    return {comparison.OURS: functools.partial(ours, setup), **trl_sides(setup, trl)}


def trl_sides(setup: Setup, named: Mapping[str, Mapping[str, Any]]) -> dict[str, comparison.Start]:
    """TRL with each of these arguments."""
    return {name: functools.partial(_trl, setup, arguments) for name, arguments in named.items()}


def ours(setup: Setup, folder: Path, cache: Path) -> tuple[list[str], Path]:
    """The command of a run in `folder`, and the file that gets a line per step."""
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
        f"sft.train.global_batch_size={setup.rows_per_step}",
        f"sft.train.micro_batch_size={setup.micro_batch}",
        "sft.train.epochs=1",
        f"sft.optim.lr={setup.made.learning_rate}",
        "deepspeed=zero1",
        "launch.nproc_per_node=1",
        "tracking=off",
    ]
    command = [sys.executable, "-m", "pipeline", "run", *overrides]
    return command, folder / "ours" / "sft" / "metrics.jsonl"


def _trl(setup: Setup, arguments: Mapping[str, Any], folder: Path, _: Path) -> tuple[list[str], Path]:
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
            **workload.optimizer_arguments(setup.made.learning_rate),
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


if __name__ == "__main__":
    sys.exit(main())
