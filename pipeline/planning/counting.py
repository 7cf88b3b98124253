"""The counts of every step's data, asked of one child process that tokenizes.

Takes a wired run; returns `DataCounts` by step, or raises what kept them from being counted. The controller
itself imports neither torch nor a tokenizer. What a step will read its rows with is decided as for a preview.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.artifacts import MANIFEST
from common.config import TokenizerConfig
from common.counts import DataCounts
from common.errors import UserError
from common.stage import Role, Step
from launch.local import python_path
from pipeline import state
from pipeline.config import PipelineConfig
from pipeline.plan import Wired, start_of
from pipeline.state import write_resolved


def count(config: PipelineConfig, wired: Sequence[Wired]) -> dict[Step, DataCounts]:
    """Tokenize, or find the rows in the cache. UserError for data that a run would refuse as well."""
    with tempfile.TemporaryDirectory(prefix="rlhf_plan_") as name:
        folder = Path(name)
        tokenizer = folder / Step.sft.value / "tokenizer"
        kept = run_folder(config) / Step.sft.value / "tokenizer"
        if kept.is_dir():
            shutil.copytree(kept, tokenizer)
        arguments: list[str] = []
        for step in wired:
            of_step = folder / f"{step.stage.name.value}.yaml"
            readable = config_to_count(config, step, wired, tokenizer)
            write_resolved(readable, folder).rename(of_step)
            arguments += [step.stage.name.value, step.stage.module, str(of_step)]
        found = _ask(folder / "answer.json", arguments)
    if (error := found.pop("error", None)) is not None:
        raise UserError(error["message"], hint=error["hint"])
    return {Step(step): DataCounts(**values) for step, values in found.items()}


def run_folder(config: PipelineConfig) -> Path:
    """Where the run is, or will be."""
    return Path(config.output_dir) / state.run_name(config)


def config_to_count(
    config: PipelineConfig, step: Wired, wired: Sequence[Wired], tokenizer: Path
) -> PipelineConfig:
    """With the tokenizer of the policy that the step starts from, if there is one already.

    tokenizer: where that of SFT is, or will be when SFT's rows are counted, which comes first.
    """
    if Role.policy not in step.sources:
        return config
    name = step.stage.name.value
    made = step.folder_of(Role.policy, run_folder(config))
    policy = str(made) if (made / MANIFEST).exists() else start_of(step.stage.name, wired)
    part = replace(getattr(config, name), policy=policy)
    if policy is None and config.model.tokenizer.train_vocab_size is not None:
        model = replace(config.model, tokenizer=TokenizerConfig(path=str(tokenizer)))
        return replace(config, model=model, **{name: part})
    return replace(config, **{name: part})


def _ask(answer: Path, arguments: Sequence[str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": python_path(), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "common.training.forecast", str(answer), *arguments]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not answer.exists():
        raise RuntimeError(f"counting the rows failed ({done.returncode}):\n{done.stderr[-4000:]}")
    return dict(json.loads(answer.read_text(encoding="utf-8")))
