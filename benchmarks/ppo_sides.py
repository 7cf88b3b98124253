"""The two sides of a PPO comparison: our command, and the reference's settings; and what is read from both.

Takes the artifacts and prompts of `ppo_workload.py`; returns command lines and the file that gets a line per
iteration, and the numbers of a run from such a file. Starts nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Tick, steady_rate
from benchmarks.ppo_workload import PPOWorkload

PHASES = ("rollout", "score", "learn")
ACTOR_LR, CRITIC_LR = 1e-7, 9e-6
"""The actor's is a tenth of the default: its responses must not grow or shrink while they are measured."""


@dataclass(frozen=True)
class Load:
    """What an iteration is, on both sides."""

    made: PPOWorkload
    iterations: int
    prompts: int  # responses per iteration, one to each
    responses_per_update: int
    max_new_tokens: int
    max_length: int  # of a prompt with its response
    dtype: str


@dataclass(frozen=True)
class OurSettings:
    """What ours can choose: slots of the decoder, rows of `max_length` tokens per pass."""

    slots: int
    micro_batch: int


@dataclass(frozen=True)
class ReferenceSettings:
    """What the reference can choose: prompts in one `generate`, sequences per pass."""

    rollout_batch: int
    score_batch: int
    train_batch: int


def our_command(
    load: Load, settings: OurSettings, folder: Path, extra: Sequence[str] = ()
) -> tuple[list[str], Path]:
    """The pipeline's own command, and its metrics.jsonl."""
    overrides = [
        "steps=[ppo]",
        "run_name=ours",
        f"output_dir={folder}",
        f"model.dtype={load.dtype}",
        f"ppo.policy={load.made.policy}",
        f"ppo.reward_model={load.made.reward_model}",
        f"ppo.data.path={load.made.prompts}",
        f"ppo.data.cache_dir={folder / 'cache'}",
        f"ppo.data.max_length={load.max_length}",
        "ppo.data.eval_fraction=0",
        "ppo.evaluation.num_prompts=0",
        f"ppo.rollout.prompts={load.prompts}",
        f"ppo.rollout.max_new_tokens={load.max_new_tokens}",
        f"ppo.rollout.slots={settings.slots}",
        f"ppo.train.global_batch_size={load.responses_per_update}",
        f"ppo.train.micro_batch_size={settings.micro_batch}",
        f"ppo.train.max_steps={load.iterations}",
        f"ppo.optim.lr={ACTOR_LR}",
        "ppo.optim.warmup_ratio=0",
        f"ppo.critic.optim.lr={CRITIC_LR}",
        "ppo.critic.optim.warmup_ratio=0",
        "deepspeed=zero1",
        "launch.nproc_per_node=1",
        "tracking=off",
        *extra,
    ]
    return [sys.executable, "-m", "pipeline", "run", *overrides], folder / "ours" / "ppo" / "metrics.jsonl"


def reference_command(load: Load, settings: ReferenceSettings, folder: Path) -> tuple[list[str], Path]:
    """The reference as a process, and its metrics.jsonl; makes `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "policy": str(load.made.policy),
        "reward_model": str(load.made.reward_model),
        "prompts": str(load.made.prompts),
        "out": str(folder),
        "iterations": load.iterations,
        "prompts_per_iteration": load.prompts,
        "responses_per_update": load.responses_per_update,
        "max_new_tokens": load.max_new_tokens,
        "dtype": load.dtype,
        "actor_lr": ACTOR_LR,
        "critic_lr": CRITIC_LR,
        **vars(settings),
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(told))
    return [sys.executable, "-m", "benchmarks.ppo_reference", str(path)], folder / "metrics.jsonl"


def iterations_of(metrics: Path) -> list[dict[str, Any]]:
    """The lines of iterations in either side's file."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if "time/rollout" in line]


def account(metrics: Path, ticks: Sequence[Tick], iterations: int, skip: int) -> dict[str, float]:
    """What an iteration took, without the first `skip`; tokens are those of prompts and responses.

    Seconds of the phases are wall time as the process says; CPU-seconds are those of its tree, from outside.
    ValueError when the run did not have `iterations`.
    """
    lines = iterations_of(metrics)
    if len(lines) != iterations or not ticks or ticks[-1].step < iterations:
        raise ValueError(f"{metrics}: {len(lines)} iterations were logged and {list(ticks[-1:])} seen")
    # what follows the last iteration (a checkpoint, an export) is none
    ticks = [tick for tick in ticks if tick.step <= iterations]
    totals, measured = [int(line["num_tokens"]) for line in lines], lines[skip:]
    by_iteration = steady_rate(ticks, range(1, iterations + 1), skip=skip, unit="iterations")
    return {
        **steady_rate(ticks, totals, skip=skip),
        "cpu_seconds_per_iteration": 1 / by_iteration["iterations_per_cpu_second"],
        "seconds_per_iteration": 1 / by_iteration["iterations_per_second"],
        **{
            f"{phase}_seconds": statistics.median(line[f"time/{phase}"] for line in measured)
            for phase in PHASES
        },
        "tokens_per_iteration": (totals[-1] - totals[skip - 1]) / len(measured),
        "response_length": statistics.mean(line["response/length_mean"] for line in measured),
    }
