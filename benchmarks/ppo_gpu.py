"""A PPO iteration on one CUDA GPU, ours beside a straightforward one: `python -m benchmarks.ppo_gpu`.

The same comparison as ppo_cpu.py in bf16, with a model of the shape of Qwen 2.5 0.5B and random weights, made
on the spot: nothing is downloaded. Ours is the real command (ZeRO-1, fp32 masters); the reference keeps fp32
weights under autocast and is measured with several batch sizes, of which the fastest that fits stands beside
ours. Reports tokens per second (of prompts and responses), seconds of roll-out, scoring and learning, and
peak GPU memory. Writes `results/ppo_gpu_<shape>_<lengths>.json`. Runs on the CPU with `--shape toy`, to see
that it works.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ppo_workload
from benchmarks.measure import ChildFailed, run_measured, table, threads_environment, write_results
from benchmarks.ppo_cpu import Start
from benchmarks.ppo_sides import (
    PHASES,
    Load,
    OurSettings,
    ReferenceSettings,
    account,
    iterations_of,
    our_command,
    reference_command,
)
from common.cores import count_cores

OURS, RATE = "ours", "tokens_per_second"
SKIPPED = 1


@dataclass(frozen=True)
class Shape:
    """A model, what an iteration is, and how much of it fits."""

    config: Mapping[str, Any]
    prompts: int
    responses_per_update: int
    max_new_tokens: int
    max_length: int
    ours: OurSettings
    references: tuple[ReferenceSettings, ...]


SHAPES = {
    "toy": Shape(
        ppo_workload.TOY, prompts=8, responses_per_update=4, max_new_tokens=12, max_length=512,
        ours=OurSettings(4, 1), references=(ReferenceSettings(8, 4, 2), ReferenceSettings(8, 2, 2)),
    ),
    # Qwen 2.5 0.5B: 494 million weights
    "0.5b": Shape(
        {
            "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "max_position_embeddings": 2048, "tie_word_embeddings": True,
        },
        prompts=256, responses_per_update=128, max_new_tokens=512, max_length=1024,
        ours=OurSettings(256, 16),
        references=tuple(ReferenceSettings(256, size, size // 2) for size in (8, 16, 32, 64)),
    ),
}  # fmt: skip


def main() -> int:
    """Measure ours and every setting of the reference."""
    arguments = _parser().parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.shape != "toy" and not has_gpu():
        print("ppo_gpu needs a CUDA GPU, and torch sees none here; `--shape toy` runs on the CPU")
        return 2
    with tempfile.TemporaryDirectory(prefix="ppo_gpu_") as temporary:
        folder = Path(temporary)
        made = ppo_workload.prepare(
            folder / "workload", 2 * shape.prompts, arguments.lengths, model=shape.config,
            max_length=shape.max_length,
        )  # fmt: skip
        load = Load(
            made, arguments.iterations, shape.prompts, shape.responses_per_update, shape.max_new_tokens,
            shape.max_length, "bf16",
        )  # fmt: skip
        records = {name: measure(load, folder, name, start) for name, start in sides_of(load, shape).items()}
    result = {"shape": arguments.shape, "lengths": arguments.lengths, **summary(records)}
    print(f"\n{rendered(records)}\n{verdict(result)}")
    path = write_results(f"ppo_gpu_{arguments.shape}_{arguments.lengths}", result, to=arguments.results)
    print(f"written: {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo_gpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="0.5b")
    parser.add_argument("--lengths", choices=tuple(ppo_workload.ENDS), default="tail")
    parser.add_argument("--iterations", type=int, default=4, help="of each run; the first is left out")
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    return parser


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def sides_of(load: Load, shape: Shape) -> dict[str, Start]:
    """Ours, and the reference with each of its settings."""
    references = {
        f"reference, {told.score_batch} and {told.train_batch}": functools.partial(
            reference_command, load, told
        )
        for told in shape.references
    }
    return {OURS: functools.partial(our_command, load, shape.ours), **references}


def measure(load: Load, folder: Path, name: str, start: Start) -> dict[str, Any]:
    """One side; what went wrong, where it fails (out of memory, for one)."""
    place = folder / name.replace(",", "").replace(" ", "_")
    command, metrics = start(place)
    environment = {
        **threads_environment(min(count_cores(), 8)), "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip
    try:
        usage, ticks = run_measured(command, log=place / "log", environment=environment, steps_file=metrics)
    except ChildFailed as error:
        print(f"{name} failed:\n{error}", flush=True)
        return {"error": str(error)[-2000:]}
    record: dict[str, Any] = account(metrics, ticks, load.iterations, SKIPPED)
    last = iterations_of(metrics)[-1]
    memory = last.get("perf/peak_memory_gb", last.get("peak_memory_gb"))
    print(f"{name}: {record[RATE]:,.0f} tokens/s", flush=True)
    return {**record, "wall_seconds": usage.wall_seconds, "peak_memory_gb": memory}


def summary(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The ratio to the reference's fastest run that did not fail."""
    finished = {name: r for name, r in records.items() if name != OURS and "error" not in r}
    result: dict[str, Any] = {"runs": dict(records), "best_reference": None}
    if "error" in records[OURS] or not finished:
        return result
    best = max(finished, key=lambda name: finished[name][RATE])
    result["best_reference"] = best
    result["speed_ratio"] = records[OURS][RATE] / finished[best][RATE]
    if records[OURS].get("peak_memory_gb") and finished[best].get("peak_memory_gb"):
        result["memory_ratio"] = records[OURS]["peak_memory_gb"] / finished[best]["peak_memory_gb"]
    return result


def rendered(records: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per run."""
    head = ("", "tokens/s", "s/iteration", *(f"{phase} s" for phase in PHASES), "length", "peak GB")
    names = (RATE, "seconds_per_iteration", *(f"{phase}_seconds" for phase in PHASES), "response_length")
    rows = []
    for side, record in records.items():
        if "error" in record:
            rows.append((side, "failed", *([""] * (len(head) - 2))))
        else:
            memory = record.get("peak_memory_gb")
            shown = "" if not memory else f"{memory:.1f}"
            rows.append((side, *(record[name] for name in names), shown))
    return table(head, rows)


def verdict(result: Mapping[str, Any]) -> str:
    """One line."""
    if result["best_reference"] is None:
        return "no comparison: a side failed"
    memory = f", {result['memory_ratio']:.2f} x its peak memory" if "memory_ratio" in result else ""
    return f"{result['speed_ratio']:.2f} x the tokens per second of the best reference{memory}"


if __name__ == "__main__":
    sys.exit(main())
