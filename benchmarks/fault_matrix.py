"""What a cluster does to a run, many times over: nothing that was committed may be lost, no bit may differ.

    python -m benchmarks.fault_matrix --trials 100
    python -m benchmarks.fault_matrix --trials 4 --steps sft --stages 3        (a look whether it works)

For SFT and PPO on two ranks, ZeRO 2 and 3, three kinds of trials, each against a run that nobody touched:

* kill: SIGKILL to one rank, drawn anew each time, at a moment drawn anew (start-up, in a step, in each phase
  of PPO's iterations, while a checkpoint is written); the other has to end by itself within SECONDS, but for
  start-up, where the agent, which is not here, would end it.
* commit: SIGKILL to each rank at every boundary of a commit (the points `commit.*` of RLHF_FAULT).
* term: SIGTERM to one rank, or to both, once or twice in a row, at moments drawn likewise; all ranks have to
  save and end with 143.

After every trial each checkpoint that has a name must verify, and the newest must not be older than before.
At the end of a run its weights, optimizers' states, counters, artifact, metrics and samples are compared bit
by bit. Exit status 1 when anything differs, was lost, or was waited for in vain.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kill_resume import (
    Attempt,
    Point,
    Windows,
    await_moment,
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
from benchmarks.measure import write_results

SECONDS = 60.0
"""How long a rank may go on after another one was killed."""
KINDS = ("kill", "commit", "term")
STEPS = {"sft": 160, "ppo": 60}
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
    seconds: list[float] = field(default_factory=list)  # from a rank's death to the other's end

    def as_json(self) -> dict[str, Any]:
        """Counts; seconds as median and most."""
        waited = (
            {"median": statistics.median(self.seconds), "most": max(self.seconds)} if self.seconds else {}
        )
        return {
            "trials": self.hits.total(), "hits": dict(self.hits), "missed": self.missed,
            "seconds_until_the_other_ended": {name: round(value, 2) for name, value in waited.items()},
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
        attempt = Attempt(self.config, self.point)
        kind = await_moment(attempt, self.folder, self.generator, self.windows)
        victim = self.generator.randrange(self.point.ranks)
        if attempt.is_running():
            os.kill(attempt.processes[victim].pid, signal.SIGKILL)
            self.seen.hits[f"{kind}, rank {victim}"] += 1
            if kind == "startup":  # the ranks may not have met: in a run the agent ends the other
                attempt.kill()
            else:
                self._await_end(attempt, f"{kind}, rank {victim} killed")
        else:
            self._missed(attempt)
        self._look(kind)

    def kill_at(self, point: str, rank: int) -> None:
        """SIGKILL to a rank at a boundary of its second commit."""
        fault = {"RLHF_FAULT": f"point={point},rank={rank},nth=2,do=kill"}
        attempt = Attempt(self.config, self.point, fault)
        end = time.monotonic() + 600
        while attempt.processes[rank].poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        if attempt.processes[rank].poll() != -signal.SIGKILL:
            self._missed(attempt)
        else:
            self.seen.hits[f"{point}, rank {rank}"] += 1
            self._await_end(attempt, f"{point}, rank {rank} killed")
        self._look(point)

    def tell(self) -> None:
        """SIGTERM to one rank or to all, once or twice, at a random moment after the start."""
        from common.runtime.distributed import STOPPED_EXIT_CODE

        attempt = Attempt(self.config, self.point)
        before = last_step(self.folder)
        while attempt.is_running() and last_step(self.folder) <= before:
            time.sleep(0.005)  # what is told to stop while it starts has nothing to save
        kind = await_moment(attempt, self.folder, self.generator, self.windows)
        told = self.generator.choice([[0], [1], [0, 1]])
        times = self.generator.choice([1, 2])
        if not attempt.is_running():
            return self._missed(attempt)
        for _ in range(times):
            for rank in told:
                attempt.processes[rank].send_signal(signal.SIGTERM)
            time.sleep(self.generator.choice([0.0, 0.02]))
        codes = wait(attempt, SECONDS)
        what = f"rank {' and '.join(map(str, told))} told {times} times"
        if codes == [0] * self.point.ranks:
            self.seen.missed += 1  # it was in its last step
        else:
            self.seen.hits[f"{kind}, {what}"] += 1
            if codes != [STOPPED_EXIT_CODE] * self.point.ranks:
                self.seen.faults.append(f"{kind}, {what}: ended with {codes}")
        attempt.kill()
        self._look(what)

    def _missed(self, attempt: Attempt) -> None:
        self.seen.missed += 1
        codes = wait(attempt, SECONDS)
        if codes != [0] * self.point.ranks:
            self.seen.faults.append(f"ended by itself with {codes}")
        attempt.kill()

    def _await_end(self, attempt: Attempt, what: str) -> None:
        began = time.monotonic()
        codes = wait(attempt, SECONDS)
        if None in codes:
            self.seen.faults.append(f"{what}: another rank was there after {SECONDS:.0f} s")
        elif any(code in (0, 2) for code in codes if code != -signal.SIGKILL) and not self.is_done:
            self.seen.faults.append(f"{what}: ended with {codes}")
        else:
            self.seen.seconds.append(time.monotonic() - began)
        attempt.kill()

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


def wait(attempt: Attempt, seconds: float) -> list[int | None]:
    """Exit statuses; None for a rank that is still there after so many seconds."""
    end = time.monotonic() + seconds
    for process in attempt.processes:
        try:
            process.wait(max(0.01, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            continue
    return [process.poll() for process in attempt.processes]


def trials(run: Run, kind: str, count: int) -> None:
    """Disturb the run until there were `count` hits (of `commit`: one at each boundary), or it is done."""
    if kind == "commit":
        for point, rank in BOUNDARIES:
            run.kill_at(point, rank)
        return
    act = run.kill_one if kind == "kill" else run.tell
    while run.seen.hits.total() < count and not run.is_done:
        act()


def measured(folder: Path, point: Point, counts: dict[str, int], seed: int) -> Iterator[dict[str, Any]]:
    """Every kind of trial for one combination, against the same undisturbed run."""
    rows, policy = folder / "rows.jsonl", folder / "policy"
    if not rows.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(rows, point.step_name)
        make_policy(policy, rows)
        make_reward_model(folder / "reward_model", policy)
    whole = write_config(folder / f"zero{point.stage}-whole", point, rows, policy)
    run_to_the_end(whole, point)
    windows = phase_windows(whole.parent / point.step_name)
    last = last_checkpoint(whole.parent / point.step_name)
    for kind, count in counts.items():
        config = write_config(folder / f"zero{point.stage}-{kind}", point, rows, policy)
        run = Run(config, point, windows, seed)
        trials(run, kind, count)
        run_to_the_end(config, point)
        differences = state_differences(whole.parent, config.parent, last, point.step_name)
        differences += metric_differences(whole.parent, config.parent, point.step_name)
        yield {"kind": kind, **vars(point), **run.seen.as_json(), "differences": differences}
        shutil.rmtree(config.parent)


def main() -> int:
    """Run the matrix; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100, help="kills at random moments, in all")
    parser.add_argument("--told", type=int, help="SIGTERM in all; by default a fifth as many")
    parser.add_argument("--steps", choices=tuple(STEPS), nargs="+", default=list(STEPS))
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="of ZeRO")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    combinations = [(step, stage) for step in arguments.steps for stage in arguments.stages]
    told = max(1, arguments.trials // 5) if arguments.told is None else arguments.told
    shares = {"kill": -(-arguments.trials // len(combinations)), "term": -(-told // len(combinations))}
    counts = {kind: shares.get(kind, 0) for kind in arguments.kinds}
    folder = Path(tempfile.mkdtemp(prefix="fault_matrix_"))
    results = []
    for number, (step, stage) in enumerate(combinations):
        point = Point(2, stage, STEPS[step], step)
        for result in measured(folder / step, point, counts, arguments.seed + number):
            results.append(result)
            print(json.dumps(result), flush=True)
    write_results("fault_matrix", {"results": results})
    shutil.rmtree(folder)
    return int(any(result["differences"] or result["faults"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
