"""A run as a job of SLURM: one controller per node, started by srun.

Takes the launch configuration and the overrides as typed; writes an sbatch file into the run's folder and
hands it to the cluster. The job leaves before its time is up, with its state saved, and is queued again; it
then runs the same command, which goes on. Waits for nothing and knows nothing of steps.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError
from common.launch_config import LaunchConfig, SlurmConfig
from launch.command import hand_over, keep, machine_arguments, one_line

TEMPLATE = Path(__file__).parent / "templates" / "slurm.sh.jinja"
FOLDER = "slurm"
SCRIPT = "job.sh"
EARLY_SECONDS = 60
"""How much earlier than asked for SLURM may send a signal."""


def launch(config: LaunchConfig, overrides: Sequence[str], run_dir: Path, say: Callable[[str], None]) -> int:
    """Write `<run>/slurm/job.sh` and submit it; with launch.submit=false only write it. Returns 0.

    overrides: as typed. UserError where there is no sbatch, or it refuses the job.
    """
    arguments = machine_arguments(overrides, config.nnodes, {"run_name": run_dir.name})
    text = render(config, arguments, run_dir.absolute(), Path.cwd(), sys.executable)
    script = keep(text, run_dir, FOLDER, SCRIPT)
    say(f"slurm     {script}")
    if config.slurm.cpus_per_task is None and not any(
        text.startswith(("--exclusive", "--cpus-per", "-c")) for text in config.slurm.options
    ):
        say("  note: most clusters give one core where launch.slurm.cpus_per_task=N does not ask for more")
    typed = shlex.join(["sbatch", str(script)])
    if not config.submit:
        say(f"  submit it with: {typed}")
        return 0
    elsewhere, refused = f"on a machine of the cluster: {typed}", "the settings are launch.slurm.*"
    answer = hand_over(["sbatch", "--parsable", str(script)], script, elsewhere=elsewhere, refused=refused)
    job = answer.partition(";")[0]
    say(f"  job {job} is queued; it prints into {script.parent / f'{job}.out'}")
    then = "and is queued again" if config.slurm.requeue else "and ends"
    say(f"  scancel --batch --signal=USR1 {job}: it saves {then}; scancel {job}: it ends")
    return 0


def render(config: LaunchConfig, arguments: Sequence[str], run_dir: Path, folder: Path, python: str) -> str:
    """The sbatch file. Pure.

    arguments: what every node runs after `python -m pipeline` (`launch.command.machine_arguments`).
    run_dir: absolute; its folder `slurm` takes what the job prints. folder: where the command is run.
    """
    from jinja2 import Environment, StrictUndefined

    check_time(config.slurm)
    logs = run_dir / FOLDER
    environment = Environment(  # noqa: S701 - a shell script: its values go through shlex.quote
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    given = config.rdzv_endpoint
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        nnodes=config.nnodes,
        script=shlex.quote(one_line(str(logs / SCRIPT), "output_dir")),
        options=sbatch_options(config, run_dir),
        folder=shlex.quote(one_line(str(folder), "the working directory")),
        logs=shlex.quote(str(logs)),
        python=shlex.quote(python),
        setup=[one_line(line, "launch.slurm.setup") for line in config.slurm.setup],
        arguments=[shlex.quote(text) for text in arguments],
        endpoint=None if given is None else shlex.quote(given),
        requeue=config.slurm.requeue,
        early=EARLY_SECONDS,
        notice=config.slurm.signal_seconds + EARLY_SECONDS,
    )


def check_time(slurm: SlurmConfig) -> None:
    """UserError for a limit that is over before anything is trained."""
    notice = slurm.signal_seconds + EARLY_SECONDS
    seconds = seconds_of(slurm.time or "")
    if seconds is not None and seconds <= notice:
        raise UserError(
            f"launch.slurm.time={slurm.time} leaves no time to train: the job is told to leave launch.slurm."
            f"signal_seconds={slurm.signal_seconds} before its end, or up to {EARLY_SECONDS} s earlier",
            hint=f"launch.slurm.time of well over {notice // 60} minutes, or a smaller signal_seconds",
        )


def seconds_of(time: str) -> int | None:
    """A limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None for anything else: UNLIMITED."""
    if re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time) is None:
        return None
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if dash or len(numbers) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def sbatch_options(config: LaunchConfig, run_dir: Path) -> list[str]:
    """What follows #SBATCH, a line each."""
    slurm = config.slurm
    log = f"{run_dir}/{FOLDER}/".replace("%", "%%") + "%j.out"
    values: dict[str, str | int | None] = {
        "job-name": run_dir.name,
        "nodes": config.nnodes,
        "ntasks-per-node": 1,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "output": log,
        "open-mode": "append",
        "signal": f"B:USR1@{slurm.signal_seconds}",
    }
    lines = [f"--{name}={sbatch_value(value, name)}" for name, value in values.items() if value is not None]
    lines.append("--requeue" if slurm.requeue else "--no-requeue")
    for text in slurm.options:
        if not text.startswith("-"):
            raise UserError(
                f"launch.slurm.options: {text!r} is not an option of sbatch", hint="such as --exclusive"
            )
        lines.append(one_line(text, "launch.slurm.options"))
    return lines


def sbatch_value(value: str | int, name: str) -> str:
    """A value as sbatch reads it from a line of its own: quoted where it holds more than plain signs."""
    text = one_line(str(value), f"sbatch --{name}")
    if '"' in text or "\\" in text:
        raise UserError(
            f'sbatch --{name}={text} cannot hold " or \\', hint="another value, or another run_name"
        )
    return text if shlex.quote(text) == text else f'"{text}"'
