"""How long training stands still for a checkpoint: `python -m benchmarks.checkpoint_pause --model FOLDER`.

A model with its AdamW state, one rank at ZeRO-1 in fp32, is saved several times by `Checkpoints`: one process
waits until each checkpoint is committed, one writes it beside training (`train.async_save`); processes take
turns. Measured for each save: the time until it returns, and until the checkpoint can be committed, which
then takes the third number. The first save of each process is shown apart: it takes memory for the first
time. Writes `results/checkpoint_pause.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, table, threads_environment, write_results

SIDES = ("waits", "beside")
COLUMNS = ("first_pause_s", "pause_s", "written_s", "commit_s", "peak_gb")


def main() -> int:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_pause")
    parser.add_argument("--model", type=Path, required=True, help="a pretrained model's folder")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # a process started by this program
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(saves(arguments.model, arguments.saves, beside=arguments.side == "beside")))
        return 0
    runs = [{"side": side, **_run(side, arguments)} for _ in range(arguments.repeats) for side in SIDES]
    medians = {side: [_median(runs, side, name) for name in COLUMNS] for side in SIDES}
    print(table(("side", *COLUMNS), [[side, *numbers] for side, numbers in medians.items()]))
    path = write_results("checkpoint_pause", {"columns": COLUMNS, "medians": medians, "runs": runs})
    print(f"written: {path}")
    return 0


def _median(runs: list[dict[str, Any]], side: str, name: str) -> float:
    return statistics.median(run[name] for run in runs if run["side"] == side)


def _run(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.checkpoint_pause", "--model", str(arguments.model)]
    command += ["--saves", str(arguments.saves), "--side", side]
    done = subprocess.run(
        command, cwd=PROJECT, env=threads_environment(1), capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def saves(folder: Path, count: int, *, beside: bool) -> dict[str, float]:
    """Save an engine so many times after a first one; medians of them in seconds, and the peak of memory."""
    import resource

    from common.runtime.distributed import init_world
    from common.training.checkpoint import Checkpoints

    world, engine = init_world(), engine_of(folder)
    pauses, written, commits = [], [], []
    with tempfile.TemporaryDirectory(prefix="pause_", dir=PROJECT / "benchmarks") as temporary:
        checkpoints = Checkpoints(Path(temporary) / "saved", keep=1, world=world, background=beside)
        for step in range(1 + count):
            begun = time.perf_counter()
            checkpoints.save(step, engine, {"step": step}, best_step=None)
            pauses.append(time.perf_counter() - begun)
            while beside and not checkpoints.is_written:
                time.sleep(0.01)
            written.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            checkpoints.finish()
            commits.append(time.perf_counter() - begun)
    return {
        "first_pause_s": pauses[0],
        "pause_s": statistics.median(pauses[1:]),
        "written_s": statistics.median(written[1:]),
        "commit_s": statistics.median(commits[1:]),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def engine_of(folder: Path) -> Any:
    """The model under ZeRO-1 after one step of AdamW."""
    import torch

    from common.config import DeepSpeedConfig, Dtype, ModelConfig
    from common.model.loading import load_model
    from common.model.tokenizer import load_tokenizer
    from common.training.ds_config import build_ds_config
    from common.training.engine import Engine

    model = ModelConfig(path=str(folder), dtype=Dtype.fp32)
    network: Any = load_model(model, load_tokenizer(model), seed=0, device=torch.device("cpu"))
    config = build_ds_config(
        DeepSpeedConfig(stage=1), dtype=Dtype.fp32, max_grad_norm=1.0, micro_batch_size=1, world_size=1,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
    )  # fmt: skip
    engine = Engine(network, torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True), config)
    engine.backward(sum(parameter.sum() for parameter in network.parameters()), 1.0)  # type: ignore[arg-type]
    assert engine.step().applied
    return engine


if __name__ == "__main__":
    sys.exit(main())
