"""Runs whose steps are fakes: their settings, how they are run, and what they left in the working folder.

The fixture `fake_steps` (`conftest.py`) puts `programs/fake_*.py` in the places of the steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.artifacts import Manifest, file_sha256, hash_files, write_manifest
from common.config import DataConfig, Dtype, ModelConfig, TokenizerConfig
from common.errors import UserError
from common.stage import Role, Step
from pipeline import run
from pipeline.config import PipelineConfig
from tests.pipeline.programs.fake_step import TOKENS

PROGRAMS = Path(__file__).parent / "programs"
PATIENCE_SECONDS = 60
SFT, REWARD, DPO, PPO = Step.sft, Step.reward, Step.dpo, Step.ppo


def config(*steps: Step, **changes: Any) -> PipelineConfig:
    """A run of these steps, by default of SFT alone."""
    llama = ModelConfig(
        config={"model_type": "llama"}, tokenizer=TokenizerConfig(None, 512), dtype=Dtype.fp32
    )
    made = PipelineConfig(run_name="a", model=llama, steps=list(steps) or [SFT])
    made.sft.data = DataConfig(path="rows.jsonl")
    made.reward.data = DataConfig(path="pairs.jsonl")
    made.dpo.data = DataConfig(path="pairs.jsonl")
    made.ppo.data = DataConfig(path="prompts.jsonl")
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def from_policy(step: Step, path: str, **changes: Any) -> PipelineConfig:
    """A run of one step that starts from the policy at `path`."""
    made = config(step, **changes)
    getattr(made, step.value).policy = path
    return made


def refused(made: PipelineConfig) -> UserError:
    with pytest.raises(UserError) as caught:
        run.run(made, say=lambda line: None)
    return caught.value


def make_policy(path: str, weights: str = "{}", role: Role = Role.policy, **details: str) -> str:
    """An artifact made elsewhere, instead of what is there; returns the hash of its manifest."""
    shutil.rmtree(path, ignore_errors=True)
    Path(path).mkdir(parents=True)
    (Path(path) / "config.json").write_text(weights)
    return file_sha256(
        write_manifest(path, Manifest("artifact", role, hash_files(path), {**TOKENS, **details}))
    )


def artifact(folder: Path, role: Role = Role.policy) -> Path:
    """A folder that is an artifact of this role, new."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_manifest(folder, Manifest("artifact", role, hash_files(folder), {}))
    return folder


def attempt(made: PipelineConfig | None = None) -> tuple[int, list[str]]:
    """Run; returns the exit status and what was said."""
    lines: list[str] = []
    return run.run(made or config(), say=lines.append), lines


def go(made: PipelineConfig | None = None) -> list[str]:
    """Run to a good end; returns what was said."""
    code, lines = attempt(made)
    assert code == 0
    return lines


def status(step: Step = Step.sft) -> dict[str, object]:
    return dict(json.loads(Path(f"runs/a/{step.value}/state.json").read_text()))


def launches(step: Step = Step.sft, name: str = "a") -> int:
    path = Path(f"runs/{name}/{step.value}_launches")
    return len(path.read_text().splitlines()) if path.exists() else 0
