"""What a cluster does to a run, many times over: nothing that was committed may be lost, no bit may differ.

    python -m benchmarks.fault_matrix --trials 200
    python -m benchmarks.fault_matrix --trials 2 --steps sft --stages 3 --length 16  (a look whether it works)

For every step on two ranks under torchrun's agent, ZeRO 2 and 3, three kinds of trials, each against a run
that nobody touched:

* kill: SIGKILL to one rank, drawn anew each time, at a moment drawn anew (start-up, in a step, in each phase
  of PPO's iterations, while a checkpoint is written).
* commit: SIGKILL to each rank at every boundary of a commit (the points `commit.*` of RLHF_FAULT).
* term: SIGTERM to one rank, or to both, once or twice in a row, at moments drawn likewise; at start-up
  before a rank can hear it.

Within SECONDS all ranks have to be gone, with the status that says why: 137 after a kill, 143 after SIGTERM.
After every trial each checkpoint that has a name must verify, and the newest must not be older than before.
At the end of a run its weights, optimizers' states, counters, artifact, metrics and samples are compared bit
by bit. Exit status 1 when anything differs, was lost, ended otherwise or was waited for in vain.

The same command goes on where it was interrupted, after the last kind of trials that it finished.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kill_resume import (
    Attempt,
    Point,
    Windows,
    await_moment,
    is_alive,
    last_checkpoint,
    last_step,
    make_policy,
    make_reward_model,
    metric_differences,
    phase_windows,
    run_to_the_end,
    state_differences,
    write_config,
    write_rows,
)
from benchmarks.measure import machine, write_results
from common.artifacts import MANIFEST
from launch.agent import STOPPED

SECONDS = 60.0
"""How long a rank may go on after another one was killed, or told to stop."""
KILLED = 128 + signal.SIGKILL
KINDS = ("kill", "commit", "term")
STEPS = {"sft": 160, "reward": 160, "dpo": 160, "ppo": 60}
BOUNDARIES = [
    (point, rank)
    for point, ranks in {
        "commit.write": (0, 1), "commit.hash": (0, 1), "commit.manifest": (0,), "commit.rename": (0,),
        "commit.forget": (0,), "commit.end": (0, 1),
    }.items()
    for rank in ranks
]  # fmt: skip
"""Every boundary of a commit, and the ranks that pass it."""


@dataclass
class Seen:
    """What happened in the trials of a run."""

    hits: Counter[str] = field(default_factory=Counter)
    missed: int = 0  # attempts that ended before their moment came
    faults: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # from the signal to the end of all

    def as_json(self) -> dict[str, Any]:
        """Counts; seconds as median and most."""
        waited = (
            {"median": statistics.median(self.seconds), "most": max(self.seconds)} if self.seconds else {}
        )
        return {
            "trials": self.hits.total(), "hits": dict(self.hits), "missed": self.missed,
            "seconds_until_all_had_ended": {name: round(value, 2) for name, value in waited.items()},
            "faults": self.faults,
        }  # fmt: skip


class Run:
    """A run that is being disturbed: its folder, and what has been seen of it."""

    def __init__(self, config: Path, point: Point, windows: Windows, seed: int) -> None:
        self.config, self.point, self.windows = config, point, windows
        self.folder, self.generator, self.seen = config.parent / point.step_name, random.Random(seed), Seen()
        self._newest = 0

    @property
    def is_done(self) -> bool:
        return last_step(self.folder) >= self.point.steps

    def kill_one(self) -> None:
        """SIGKILL to a rank at a random moment."""
        attempt, ranks = self._start()
        moment = await_moment(attempt, self.folder, self.generator, self.windows)
        victim = self.generator.randrange(self.point.ranks)
        signal_to(ranks[victim], signal.SIGKILL)
        self._judge(attempt, f"{moment}, rank {victim}", KILLED)

    def kill_at(self, point: str, rank: int) -> None:
        """SIGKILL to a rank at a boundary of its second commit."""
        attempt, ranks = self._start({"RLHF_FAULT": f"point={point},rank={rank},nth=2,do=kill"})
        while attempt.is_running() and is_alive(ranks[rank]):
            time.sleep(0.01)
        self._judge(attempt, f"{point}, rank {rank}", KILLED)

    def tell(self) -> None:
        """SIGTERM to one rank or to all, once or twice, at a random moment."""
        attempt, ranks = self._start()
        moment = await_moment(attempt, self.folder, self.generator, self.windows)
        told = self.generator.choice([[0], [1], [0, 1]])
        times = self.generator.choice([1, 2])
        for _ in range(times):
            for rank in told:
                signal_to(ranks[rank], signal.SIGTERM)
            time.sleep(self.generator.choice([0.0, 0.02]))
        what = f"{moment}, rank {' and '.join(map(str, told))} told {times} times"
        self._judge(attempt, what, STOPPED)

    def _start(self, environment: Mapping[str, str] | None = None) -> tuple[Attempt, Mapping[int, int]]:
        """An attempt and the processes of its ranks, as soon as they are there."""
        attempt = Attempt(self.config, self.point, environment)
        while len(ranks := attempt.ranks()) < self.point.ranks:
            if not attempt.is_running():
                raise RuntimeError((self.config.parent / "output.log").read_text()[-3000:])
            time.sleep(0.01)
        return attempt, ranks

    def _judge(self, attempt: Attempt, what: str, wanted: int) -> None:
        """Wait for the end after a signal, and note how it came about."""
        began = time.monotonic()
        try:
            status = attempt.finish(SECONDS)
        except subprocess.TimeoutExpired:
            self.seen.hits[what] += 1
            self.seen.faults.append(f"{what}: a rank was there after {SECONDS:.0f} s")
        else:
            if status == 0 and self.is_done:  # it was over before
                self.seen.missed += 1
            else:
                self.seen.hits[what] += 1
                self.seen.seconds.append(time.monotonic() - began)
                if status != wanted:
                    self.seen.faults.append(f"{what}: ended with {status}")
        attempt.kill()
        self._look(what)

    def _look(self, what: str) -> None:
        """Whatever has a checkpoint's name must verify, and no newer one may have gone."""
        from pipeline.verify import verify_path

        checkpoints = self.folder / "checkpoints"
        names = sorted(path.name for path in checkpoints.glob("step_*") if path.suffix != ".tmp")
        if not names:
            return
        if verify_path(checkpoints, say=lambda line: None) != 0:
            self.seen.faults.append(f"{what}: a checkpoint does not verify")
        newest = int(names[-1].removeprefix("step_"))
        if newest < self._newest:
            self.seen.faults.append(f"{what}: checkpoint {self._newest} is lost, {newest} is the newest")
        self._newest = newest


def signal_to(process: int, number: int) -> None:
    """Send it, unless the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def trials(run: Run, kind: str, count: int) -> None:
    """Disturb the run until there were `count` hits (of `commit`: one at each boundary), or it is done."""
    if kind == "commit":
        for point, rank in BOUNDARIES:
            run.kill_at(point, rank)
        return
    act = run.kill_one if kind == "kill" else run.tell
    while run.seen.hits.total() < count and not run.is_done:
        act()


def measured(folder: Path, point: Point, counts: Mapping[str, int], seed: int) -> Iterator[dict[str, Any]]:
    """These kinds of trials for one combination, against the same undisturbed run."""
    rows, policy = folder / "rows.jsonl", folder / "policy"
    if not (folder / "reward_model" / MANIFEST).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_rows(rows, point.step_name)
        make_policy(policy, rows)
        make_reward_model(folder / "reward_model", policy)
    whole = folder / f"zero{point.stage}-whole"
    if not (whole / point.step_name / "export" / MANIFEST).exists():
        shutil.rmtree(whole, ignore_errors=True)
        run_to_the_end(write_config(whole, point, rows, policy), point)
    windows = phase_windows(whole / point.step_name)
    last = last_checkpoint(whole / point.step_name)
    for kind, count in counts.items():
        disturbed = folder / f"zero{point.stage}-{kind}"
        shutil.rmtree(disturbed, ignore_errors=True)
        config = write_config(disturbed, point, rows, policy)
        run = Run(config, point, windows, seed)
        trials(run, kind, count)
        run_to_the_end(config, point)
        differences = state_differences(whole, disturbed, last, point.step_name)
        differences += metric_differences(whole, disturbed, point.step_name)
        yield {"kind": kind, **vars(point), **run.seen.as_json(), "differences": differences}
        shutil.rmtree(disturbed)


def folder_of(arguments: Sequence[str]) -> Path:
    """Where the same command of the same commit keeps what it has done."""
    key = hashlib.sha256(json.dumps([machine()["commit"], *arguments]).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"fault_matrix_{key}"


def main() -> int:
    """Run the matrix; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200, help="kills at random moments, in all")
    parser.add_argument("--told", type=int, help="SIGTERM in all; by default a fifth as many")
    parser.add_argument("--steps", choices=tuple(STEPS), nargs="+", default=list(STEPS))
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="of ZeRO")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--length", type=int, help="steps of each run; by default 160, of PPO 60")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    combinations = [(step, stage) for step in arguments.steps for stage in arguments.stages]
    told = max(1, arguments.trials // 5) if arguments.told is None else arguments.told
    shares = {"kill": -(-arguments.trials // len(combinations)), "term": -(-told // len(combinations))}
    folder = folder_of(sys.argv[1:])
    folder.mkdir(exist_ok=True)
    done = folder / "done.jsonl"
    results = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    for result in results:
        print(json.dumps(result), flush=True)
    known = {(result["step_name"], result["stage"], result["kind"]) for result in results}
    for number, (step, stage) in enumerate(combinations):
        counts = {kind: shares.get(kind, 0) for kind in arguments.kinds if (step, stage, kind) not in known}
        if not counts:
            continue
        point = Point(2, stage, arguments.length or STEPS[step], step)
        for result in measured(folder / step, point, counts, arguments.seed + number):
            results.append(result)
            print(json.dumps(result), flush=True)
            with done.open("a") as file:
                file.write(json.dumps(result) + "\n")
    write_results("fault_matrix", {"results": results})
    shutil.rmtree(folder)
    return int(any(result["differences"] or result["faults"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
