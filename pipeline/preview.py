"""`preview`: the rows of every step as the model will see them, without a run's folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

from common.stage import Input, Step
from launch.local import Job, count_gpus
from launch.supervise import supervise
from pipeline import checks, state
from pipeline.config import PipelineConfig
from pipeline.lineage import readable
from pipeline.plan import wire_run
from pipeline.sources import settle_sources


def preview(config: PipelineConfig) -> int:
    """Show the rows of every step as the model will see them, in one process and without a run's folder.

    Rows are read without a reward model, so that none need be there yet.
    """
    config = settle_sources(config, can_lack=[Input.reward_model])
    wired = wire_run(config, can_lack=[Input.reward_model])
    config, _ = state.settle_dtype(config, state.run_folder(config), gpu=count_gpus() > 0)
    checks.check(config, config.launch.sequence_parallel, can_lack=[Input.reward_model])
    with tempfile.TemporaryDirectory(prefix="rlhf_preview_") as folder:
        for step in wired:
            trained = Path(folder) / Step.sft.value / "tokenizer"  # by the preview of SFT
            to_read = readable(config, step, wired, trained if trained.exists() else None)
            resolved = state.write_resolved(to_read, Path(folder))
            job = Job(step.stage.module, ("--preview", "--config", str(resolved)))
            if (status := supervise(job).status) != 0:
                return status
    return 0
