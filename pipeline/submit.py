"""Hand a run to several machines: over ssh, or as a job of SLURM or Kubernetes.

Takes a finished configuration and the overrides it was made from, returns the exit status. Checks what can be
seen from here, and leaves the rest to the machines, which run the same command: they have the GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.launch_config import Launcher
from common.stage import Step
from launch import k8s, slurm, ssh
from pipeline import checks, state
from pipeline.config import PipelineConfig
from pipeline.disk import check_disk
from pipeline.plan import wire_run
from pipeline.sources import settle_sources


def is_for_other_machines(config: PipelineConfig) -> bool:
    """Whether this process only starts the run; a machine that has its number takes part in it."""
    return config.launch.is_elsewhere


def submit(config: PipelineConfig, overrides: Sequence[str], *, say: Callable[[str], None] = print) -> int:
    """Start the run where launch.kind says. Returns the run's exit status over ssh, else 0 once it is queued.

    overrides: as typed.
    """
    run_dir = state.run_folder(config)
    wire_run(config)  # each step has a start
    if config.launch.kind is Launcher.k8s:  # its paths are those of the container
        return k8s.launch(config.launch, overrides, run_dir, say)
    check_paths(settle_sources(config, say))
    launcher = ssh if config.launch.kind is Launcher.ssh else slurm
    return launcher.launch(config.launch, overrides, run_dir, say)


def check_paths(config: PipelineConfig) -> None:
    """The model, the data and the output folder, which the machines see as this one does."""
    if Step.sft in config.steps:
        checks.check_model(config.model)
    for step in config.steps:
        checks.check_data(getattr(config, step.value).data, f"{step.value}.data")
    check_disk(config, [])
