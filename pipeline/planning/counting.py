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
from pathlib import Path
from typing import Any

from common.counts import DataCounts
from common.errors import UserError
from common.stage import Step
from launch.local import python_path
from pipeline.config import PipelineConfig
from pipeline.lineage import readable
from pipeline.plan import Wired
from pipeline.state import run_folder, write_resolved


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
            write_resolved(readable(config, step, wired, tokenizer), folder).rename(of_step)
            arguments += [step.stage.name.value, step.stage.module, str(of_step)]
        found = _ask(folder / "answer.json", arguments)
    if (error := found.pop("error", None)) is not None:
        raise UserError(error["message"], hint=error["hint"])
    return {Step(step): DataCounts(**values) for step, values in found.items()}


def _ask(answer: Path, arguments: Sequence[str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": python_path(), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "common.training.forecast", str(answer), *arguments]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not answer.exists():
        raise RuntimeError(f"counting the rows failed ({done.returncode}):\n{done.stderr[-4000:]}")
    return dict(json.loads(answer.read_text(encoding="utf-8")))
