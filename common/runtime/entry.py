"""How a step is started: `python -m <step> --config resolved.yaml --run-dir DIR`, one rank of it.

Takes what a step's `__main__` hands over; returns an exit status. Runs under torchrun's environment; with
`--preview` it shows the data instead, with neither model nor ranks; with `--check` it only makes sure of what
the controller, which imports nothing of the user's, cannot look at.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common.artifacts import read_json
from common.config import Dtype, JobConfig, dtype_on, load_resolved
from common.errors import UserError
from common.fields import as_schema
from common.jit import refuse_to_wait_for_ever
from common.notices import listen
from common.redact import shown
from common.runtime.logs import open_rank_log, run_and_report

Job = TypeVar("Job", bound=JobConfig)
Work = TypeVar("Work")


def on_this_device(job: Job) -> Job:
    """The job with a dtype for `auto`, where no controller has settled it for all ranks."""
    if job.model.dtype is not Dtype.auto:
        return job
    import torch

    dtype = dtype_on(job.model.dtype, gpu=torch.cuda.is_available())
    return dataclasses.replace(job, model=dataclasses.replace(job.model, dtype=dtype))


def step_main(
    name: str,
    module: str,
    schema: type[Job],
    check: Callable[[Job], None] | None = None,
) -> int:
    """Exit status: 0 done, 2 something the user can fix, 143 told to stop with its state saved.

    name: the step's folder below the run's, and the prefix of its keys. module: has `train.train`, which gets
    the job and the run's folder, and `dry_run.preview`, which gets the job and the step's folder. check: gets
    the job; raises what the user can fix.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--config", type=Path, required=True, help="a run's resolved.yaml")
    parser.add_argument(
        "--run-dir", type=Path, help="the run's folder; by default the one that holds the config"
    )
    parser.add_argument("--preview", action="store_true", help="show the data and stop")
    if check is not None:
        parser.add_argument("--check", action="store_true", help="make sure of the user's functions and stop")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir or arguments.config.parent
    logs = run_dir / name / "logs"
    rank = int(os.environ.get("RANK", "0"))
    open_rank_log(logs, rank)
    if rank == 0:
        listen(lambda line: print(f"notice: {shown(line)}", flush=True))

    def work() -> int:
        job = load_resolved(arguments.config, schema)
        try:
            if check is not None and arguments.check:
                check(job)
                return 0
            job = on_this_device(job)
            if not arguments.preview:
                refuse_to_wait_for_ever()
                return int(importlib.import_module(f"{module}.train").train(job, run_dir))
            importlib.import_module(f"{module}.dry_run").preview(job, run_dir / name)
            return 0
        except UserError as error:
            raise error.in_step(name) from error

    return run_and_report(work, logs)


def job_main(schema: type[Work], work: Callable[[Work], int]) -> int:
    """`python -m MODULE job.json`: one process that trains nothing; its exit status is as that of a step.

    schema: of the job in that file, beside which the log is kept.
    """
    path = Path(sys.argv[1])
    open_rank_log(path.parent, 0)
    listen(lambda line: print(f"notice: {shown(line)}", flush=True))
    return run_and_report(lambda: work(as_schema(schema, read_json(path))), path.parent)


def command_main(work: Callable[[], int]) -> int:
    """The same for a command that keeps no log."""
    with tempfile.TemporaryDirectory(prefix="rlhf_") as logs:
        open_rank_log(Path(logs), 0)
        return run_and_report(work, Path(logs))
