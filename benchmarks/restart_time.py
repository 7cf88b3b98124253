"""How long a run stands still when a rank dies.

    python -m benchmarks.restart_time --model models/smollm2 --data rows.jsonl

SFT on two ranks with `launch.max_restarts=1`: rank 1 is killed (SIGKILL) in the update of the step after a
save, and the run is watched until that step is done. The time in between, in parts: notice (until all ranks
have ended), start (new processes, imports, the tokenizer), loading (rows, network, engine), resume (the
checkpoint is read) and step (the one that is done again). The moments are those of the terminal's lines
and of the ranks' logs. Wall seconds; how busy the machine was is in the record. Writes
`results/restart_time.json`, whose median `benchmarks.scale` takes.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from threading import Thread

from benchmarks.kill_resume import last_step
from benchmarks.measure import PROJECT, table, threads_environment, write_results

RANKS, SAVED = 2, 2
"""SAVED: the step that is saved; rank 1 dies in the next."""
LINES = {"notice": "starting again from", "loading": "learning rate:", "resume": "resuming from"}
"""By the part that ends with it; loading's and resume's are those after the notice."""
PARTS = ("notice", "start", "loading", "resume", "step")
LIMIT = 900.0
"""Seconds of a trial."""
_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ", re.MULTILINE)


def main() -> int:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restart_time")
    parser.add_argument("--model", type=Path, required=True, help="a pretrained model's folder")
    parser.add_argument("--data", type=Path, required=True, help="rows for SFT")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    arguments = parser.parse_args()
    trials: list[dict[str, float]] = []
    for _ in range(arguments.trials):
        trials.append(trial(arguments.model, arguments.data))
        medians = {part: statistics.median(found[part] for found in trials) for part in trials[0]}
        result = {"ranks": RANKS, "model": str(arguments.model), "medians": medians, "trials": trials}
        path = write_results("restart_time", result, to=arguments.results)
        print(table(("seconds", *medians), [["median", *medians.values()]]), f"written: {path}", sep="\n")
    return 0


def trial(model: Path, rows: Path) -> dict[str, float]:
    """Seconds of each part, and of all together."""
    with tempfile.TemporaryDirectory(prefix="restart_") as folder:
        run_dir = Path(folder) / "run"
        seen: list[tuple[float, str]] = []
        process = subprocess.Popen(
            command(model, rows, Path(folder)), cwd=PROJECT, env=environment(Path(folder)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        reader = Thread(target=lambda: seen.extend((now(), line) for line in process.stdout or ()))
        reader.start()
        try:
            done = await_step(run_dir / "sft", process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join()
        if done is None:
            raise RuntimeError("the step after the save never ended:\n" + "".join(line for _, line in seen))
        killed = stamps(run_dir / "sft" / "logs" / "rank_1.log", "injected fault")[0]
        logged = stamps(run_dir / "sft" / "logs" / "rank_0.log")
        return parts(killed, seen, logged, done)


def command(model: Path, rows: Path, folder: Path) -> list[str]:
    train = {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 8, "save_every": SAVED}
    return [
        sys.executable, "-m", "pipeline", "run", "steps=[sft]", f"model.path={model.absolute()}",
        f"sft.data.path={rows.absolute()}", "sft.data.max_length=128", "sft.sampling.num_prompts=0",
        "sft.train.eval_every=0", *(f"sft.train.{key}={value}" for key, value in train.items()),
        f"launch.nproc_per_node={RANKS}", "launch.max_restarts=1", "tracking.wandb=off",
        f"output_dir={folder}", "run_name=run",
    ]  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    fault = f"point=update,rank=1,step={SAVED + 1},do=kill,once={folder / 'killed'}"
    return {**threads_environment(1), "PYTHONUNBUFFERED": "1", "RLHF_FAULT": fault}


def await_step(folder: Path, process: subprocess.Popen[str]) -> float | None:
    """When the step after the save was done; None: the run ended before, or took too long."""
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < LIMIT:
        if last_step(folder) > SAVED:
            return now()
        time.sleep(0.05)
    return None


def now() -> float:
    """By the clock that stamps the lines of logs."""
    return time.time()  # noqa: TID251


def stamps(log: Path, words: str = "") -> list[float]:
    """Moments of the lines of a rank's log that have these words."""
    lines = (line for line in log.read_text().splitlines() if words in line)
    found = (_STAMP.match(line) for line in lines)
    return [datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp() for match in found if match]


def parts(killed: float, seen: list[tuple[float, str]], logged: list[float], done: float) -> dict[str, float]:
    """Seconds of each part. seen: the terminal's lines and their moments; logged: of rank 0's log."""
    at = killed
    moments = {}
    for part, words in LINES.items():
        at = moments[part] = next(when for when, line in seen if when >= at and words in line)
    moments["start"] = next(when for when in logged if when > moments["notice"])
    ends = [killed, *(moments[part] for part in PARTS[:-1]), done]
    found = {part: end - begin for part, begin, end in zip(PARTS, ends[:-1], ends[1:], strict=True)}
    return {**found, "all": done - killed}


if __name__ == "__main__":
    sys.exit(main())
