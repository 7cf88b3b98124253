"""`preview`: the rows of every step as the model will see them, without a run's folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.artifacts import MANIFEST
from common.config import TokenizerConfig
from common.stage import Role, Step
from launch.local import Job, count_gpus
from launch.supervise import supervise
from pipeline import checks, state
from pipeline.config import PipelineConfig
from pipeline.lineage import check_named_sources
from pipeline.plan import Wired, start_of, wire_run


def preview(config: PipelineConfig) -> int:
    """Show the rows of every step as the model will see them, in one process and without a run's folder.

    Rows are read without a reward model, so that none need be there yet.
    """
    wired = wire_run(config, can_lack=[Role.reward_model])
    check_named_sources(wired)
    config, _ = state.settle_dtype(
        config, Path(config.output_dir) / state.run_name(config), gpu=count_gpus() > 0
    )
    checks.check(config, 1, can_lack=[Role.reward_model])
    with tempfile.TemporaryDirectory(prefix="rlhf_preview_") as folder:
        for step in wired:
            resolved = state.write_resolved(preview_config(config, step, wired, Path(folder)), Path(folder))
            job = Job(step.stage.module, ("--preview", "--config", str(resolved)))
            status, _ = supervise(job, ())
            if status != 0:
                return status
    return 0


def preview_config(
    config: PipelineConfig, wired: Wired, steps: Sequence[Wired], folder: Path
) -> PipelineConfig:
    """The configuration for one step's preview: with the tokenizer that the step will read its rows with.

    That of the policy it starts from, if there is one already; else the one that the preview of SFT has just
    trained in `folder`, if it did; else the base model's own.
    """
    if Role.policy not in wired.sources:
        return config
    name = wired.stage.name.value
    run_dir = Path(config.output_dir) / state.run_name(config)
    made = wired.folder_of(Role.policy, run_dir)
    policy = str(made) if (made / MANIFEST).exists() else start_of(wired.stage.name, steps)
    part = replace(getattr(config, name), policy=policy)
    trained = folder / Step.sft.value / "tokenizer"
    if policy is None and trained.exists():
        model = replace(config.model, tokenizer=TokenizerConfig(path=str(trained)))
        return replace(config, model=model, **{name: part})
    return replace(config, **{name: part})
