"""A run of a sweep: a process of its own, and the number that the sweeper learns from. Its end: a table.

Takes a finished PipelineConfig; starts `python -m pipeline.sweep FILE`, which runs it, and returns the value
of its `objective`. A run leaves nothing behind in the sweeper's process, and a sweeper that starts several at
once does not mix them. Decides neither what is swept nor what comes next: that is Hydra's sweeper.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import load_resolved, to_plain
from common.errors import UserError
from common.redact import shown
from common.stage import Step
from common.text import table
from launch.rank import die_with
from launch.supervise import StopRequests
from pipeline import state
from pipeline.config import PipelineConfig
from pipeline.run import run

DEFAULTS: dict[Step, tuple[str, ...]] = {
    Step.sft: ("eval/loss", "loss"),
    Step.reward: ("eval/loss", "loss"),
    Step.dpo: ("eval/loss", "loss"),
    Step.ppo: ("eval/reward", "objective/scores"),
}
"""What a run returns when `objective` is not set: the first of these that its last step has logged."""
COLUMNS = 5
"""Settings of a sweep that its table has room for."""


def run_in_child(config: PipelineConfig) -> float:
    """Run it to its end; returns the objective's last value.

    Leaves by SystemExit with the run's exit status when that is not 0. UserError without such a number.
    """
    with StopRequests() as requests, tempfile.TemporaryDirectory(prefix="rlhf_sweep_") as folder:
        path = Path(folder) / "config.yaml"  # readable by its owner only: nothing in it is hidden yet
        write(config, path)
        command = [sys.executable, "-m", "pipeline.sweep", str(path), str(os.getpid())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        requests.pass_on_to(process.send_signal)
        status = process.wait()
    if status != 0:
        sys.exit(status if status > 0 else 128 - status)
    return objective_of(config)


def write(config: PipelineConfig, path: Path) -> None:
    """The configuration as the child reads it."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(to_plain(config)), path)


def objective_of(config: PipelineConfig) -> float:
    """The last value of what `objective` names, or of what the last step is measured by."""
    return judged(config)[1]


def judged(config: PipelineConfig) -> tuple[str, float]:
    """What a run is judged by, as `objective` would name it, and what it came to."""
    run_dir = state.run_folder(config)
    if config.objective is None:
        step = config.steps[-1]
        names = DEFAULTS[step]
    else:
        named, _, name = config.objective.partition(":")
        step, names = Step(named), (name,)
    last: dict[str, float] = {}
    with open(run_dir / step.value / state.METRICS, encoding="utf-8") as lines:
        for line in lines:
            last |= json.loads(line)
    name, found = next(((name, last[name]) for name in names if name in last), (names[0], None))
    if not isinstance(found, int | float) or not math.isfinite(found):
        raise UserError(
            f"objective={step.value}:{name} is {found} in {run_dir}",
            hint=f"a run of {step.value} has: {', '.join(sorted(last))}",
        )
    return f"{step.value}:{name}", float(found)


@dataclass(frozen=True)
class Ended:
    """A run of a sweep: what it is judged by, and what it came to; None where it did not end well."""

    folder: Path
    judged: tuple[str, float] | None = None


def conclude(runs: Sequence[Ended], say: Callable[[str], None]) -> None:
    """Say what each run had of its own and came to, and put them on one page.

    A page that cannot be made is worth a line, never the sweep.
    """
    from pipeline.report import report
    from pipeline.report.files import read_run
    from pipeline.report.several import differences
    from pipeline.report.shown import figure

    there = [run for run in {run.folder: run for run in runs}.values() if state.is_run(run.folder)]
    if len(there) < 2:
        return
    try:
        differing = differences([read_run(run.folder) for run in there])
        page = report(*(run.folder for run in there))
    except Exception as error:
        words = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        say(f"warning: no table of the sweep: {' '.join(words.split())}")
        return
    shown = differing[:COLUMNS]
    names = dict.fromkeys(run.judged[0] for run in there if run.judged is not None)
    header = ["run", *(row.key for row in shown), ", ".join(names) or "objective"]
    rows = [
        [run.folder.name, *(row.values[index] or "–" for row in shown),
         "did not end well" if run.judged is None else figure(run.judged[1])]
        for index, run in enumerate(there)
    ]  # fmt: skip
    for line in table([header, *rows]):
        say(line)
    if further := differing[COLUMNS:]:
        say(f"they differ in {len(further)} further settings, which are on the page")
    say(f"report    {page}")


def main() -> int:
    """The child: FILE and its parent's process id."""
    die_with(int(sys.argv[2]))
    config = load_resolved(Path(sys.argv[1]), PipelineConfig)
    try:
        return run(config, say=lambda line: print(line, flush=True))
    except UserError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        return UserError.EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
