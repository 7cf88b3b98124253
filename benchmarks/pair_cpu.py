"""A step on pairs on the CPU, ours beside TRL's: what reward_cpu.py and dpo_cpu.py share.

Takes a step's name and TRL's settings; runs the comparison, or the search for TRL's best setting, and writes
`results/<step>_cpu_<dtype>.json`. The same pairs, weights (4M parameters, or `--model FOLDER`), precision,
optimizer, schedule and pairs per optimizer step, one epoch. Ours is the real command with all it does: strict
reading, checkpoint, hashes, an export that is reloaded and compared. TRL tokenizes the same rows itself,
trains and saves.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import comparison, pairs_workload, workload
from benchmarks.measure import write_results
from benchmarks.pair_sides import Ours, trl_command

PAIRS_PER_STEP = 32

QUIET: Mapping[str, Any] = {
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
}
GROUPED: Mapping[str, Any] = {
    **QUIET,
    "train_sampling_strategy": "group_by_length",
    "remove_unused_columns": False,  # else the lengths are gone before the sampler reads them
}

DEFAULT: Mapping[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
"""Everything else as TRL has it: gradient checkpointing, random order, a log line every 10 steps."""

TrlSettings = Mapping[str, Mapping[str, Any]]
"""Arguments of TRL's config by a name for them."""


def batch_of(pairs: int, common: Mapping[str, Any] = GROUPED, **more: Any) -> dict[str, Any]:
    """Arguments for batches of so many pairs, `PAIRS_PER_STEP` of them in a step."""
    return {**common, **batch_sizes(pairs, PAIRS_PER_STEP), **more}


def batch_sizes(pairs: int, per_step: int) -> dict[str, int]:
    """TRL's arguments for `per_step` pairs in a step, `pairs` in a pass; ValueError unless that divides."""
    if per_step % pairs:
        raise ValueError(f"{per_step} pairs per step are no whole number of TRL's batches of {pairs}")
    return {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": per_step // pairs}


@dataclass(frozen=True)
class Program:
    """What distinguishes the two programs."""

    step: str
    base: Callable[[pairs_workload.PairsWorkload, Path], Path]  # the model that TRL starts from
    best: Mapping[str, TrlSettings]  # by precision: the settings that stand beside ours, one of them `BEST`
    candidates: TrlSettings
    extra: tuple[str, ...] = ()  # overrides of ours

    @property
    def name(self) -> str:
        return f"{self.step}_cpu"


@dataclass(frozen=True)
class Setup:
    """What all runs of one invocation share."""

    program: Program
    made: pairs_workload.PairsWorkload
    base: Path
    dtype: str
    micro_batch: int
    packing: bool
    pairs_per_step: int = PAIRS_PER_STEP


def main(program: Program) -> int:
    """Run the comparison or the search, print the table, write the results."""
    arguments = _parser(program).parse_args()
    with tempfile.TemporaryDirectory(prefix=f"{program.name}_") as temporary:
        folder = Path(temporary)
        made = pairs_workload.prepare(
            folder / "workload", arguments.pairs, arguments.rows, model=arguments.model
        )
        base = program.base(made, folder / "base")
        setup = Setup(
            program, made, base, arguments.dtype, arguments.micro_batch, not arguments.unpacked,
            arguments.pairs_per_step,
        )  # fmt: skip
        totals = functools.partial(running_pairs, per_step=setup.pairs_per_step)
        contest = comparison.Contest(folder, arguments.threads, "pairs", totals)
        if arguments.search:
            result = comparison.search(contest, trl_sides(setup, program.candidates))
        else:
            result = comparison.compare(contest, sides_of(setup), arguments.repeats, brief=arguments.brief)
    of_model = [] if arguments.model is None else [arguments.model.resolve().name]
    parts = [program.name, *of_model, arguments.dtype, *(["hh"] if arguments.pairs == "hh" else [])]
    name = "_".join([*parts, *(["search"] if arguments.search else [])])
    result = {**described(setup, arguments), **result}
    print(f"written: {write_results(name, result, to=arguments.results)}")
    return 0


def _parser(program: Program) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program.name}")
    parser.add_argument("--pairs", choices=pairs_workload.KINDS, default="gsm8k")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--micro-batch", type=int, default=2, help="ours, in rows")
    parser.add_argument("--unpacked", action="store_true", help="ours with one pair per row")
    parser.add_argument("--pairs-per-step", type=int, default=PAIRS_PER_STEP, help="on both sides")
    parser.add_argument(
        "--model", type=Path, help="a pretrained model's folder; by default one of 4M parameters"
    )
    parser.add_argument("--search", action="store_true", help="measure TRL's candidates once each")
    parser.add_argument("--brief", action="store_true", help=comparison.BRIEF)
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    return parser


def sides_of(setup: Setup) -> dict[str, comparison.Start]:
    """Ours, TRL's chosen settings and TRL's defaults."""
    trl = {**setup.program.best[setup.dtype], comparison.DEFAULT: DEFAULT}
    return {comparison.OURS: functools.partial(start_ours, setup), **trl_sides(setup, trl)}


def trl_sides(setup: Setup, named: TrlSettings) -> dict[str, comparison.Start]:
    """TRL with each of these arguments."""
    return {name: functools.partial(start_trl, setup, arguments) for name, arguments in named.items()}


def start_ours(setup: Setup, folder: Path, cache: Path) -> tuple[list[str], Path]:
    """Our command and its metrics.jsonl."""
    ours = Ours(
        setup.program.step, setup.made, folder, cache, setup.dtype, setup.pairs_per_step, setup.micro_batch,
        setup.packing, setup.program.extra,
    )  # fmt: skip
    return ours.command(), ours.metrics


def start_trl(setup: Setup, arguments: Mapping[str, Any], folder: Path, _: Path) -> tuple[list[str], Path]:
    """TRL's process and the file of its steps; its cache is under HF_HOME."""
    step = setup.program.step
    settings = {
        "base": str(setup.base),
        "dtype": setup.dtype,
        "rows": str(setup.made.rows),
        "arguments": {
            "max_length": pairs_workload.MAX_LENGTH,
            "num_train_epochs": 1,
            "warmup_steps": workload.WARMUP_RATIO,
            **workload.optimizer_arguments(setup.made.learning_rate),
            **arguments,
            **batch_sizes(arguments["per_device_train_batch_size"], setup.pairs_per_step),
        },
    }
    return trl_command(step, settings, folder), folder / "steps.jsonl"


def running_pairs(steps_file: Path, per_step: int = PAIRS_PER_STEP) -> list[int]:
    """Pairs trained on after each step: the workload is a whole number of steps."""
    return [per_step * (number + 1) for number in range(len(comparison.step_lines(steps_file)))]


def described(setup: Setup, arguments: argparse.Namespace) -> dict[str, Any]:
    """The conditions, for the record."""
    return {
        "pairs_from": arguments.pairs,
        "dtype": setup.dtype,
        "rows": arguments.rows,
        "pairs_per_step": setup.pairs_per_step,
        "threads": arguments.threads,
        "wait_policy": "OMP_WAIT_POLICY=PASSIVE on both sides",
        "micro_batch_ours": setup.micro_batch,
        "packing_ours": setup.packing,
        "trl": dict(setup.program.best[setup.dtype]),
        "trl_default": dict(DEFAULT),
    }
