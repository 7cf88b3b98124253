"""Damage of every kind in every file of a PPO checkpoint: the one before is used, nothing is deleted."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.runtime.distributed import STOPPED_EXIT_CODE, World
from common.training.checkpoint import Checkpoints
from common.training.snapshot import Open
from tests.programs.faulted import ppo_faulted
from tests.runs import Base, finish, write_job
from tests.step3_ppo.runs import make_artifacts, make_job

pytestmark = pytest.mark.slow


class NoState:
    """As much of a state as it takes to find a checkpoint."""

    def save(self, folder: Path, open_file: Open) -> None:
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        assert (folder / "actor").is_dir()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-(len(content) // 3) - 1] ^= 16
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip,
    "its last third gone": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "emptied": lambda path: os.truncate(path, 0),
    "missing": os.unlink,
}


@pytest.fixture(scope="module")
def checkpoints(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After iteration 1, and in the middle of iteration 2: everything that a checkpoint may hold."""
    folder = tmp_path_factory.mktemp("damaged")
    job = make_job(folder, make_artifacts(folder, base.tokenizer), max_steps=2, save_every=1)
    job.ppo.ema_decay, job.ppo.evaluation.num_prompts = 0.5, 0
    run_dir = write_job(job, folder / "run")
    told = {"RLHF_FAULT": "point=update,step=2,do=term"}
    finish(run_dir, 1, ppo_faulted, told, code=STOPPED_EXIT_CODE)
    return run_dir / "ppo" / "checkpoints"


def test_damage_of_any_kind_in_any_file_is_found_and_costs_one_checkpoint(
    checkpoints: Path, tmp_path: Path
) -> None:
    older, newer = sorted(path.name for path in checkpoints.glob("step_*"))
    files = sorted(
        p.relative_to(checkpoints / newer) for p in (checkpoints / newer).rglob("*") if p.is_file()
    )
    kinds = {re.sub(r"\d+", "N", file.as_posix()) for file in files}
    assert {"manifest.json", "counters.json", "experience/experience.npz"} <= kinds and len(kinds) >= 8, kinds
    for number, (name, file) in enumerate((name, file) for name in DAMAGE for file in files):
        copy = tmp_path / str(number)
        shutil.copytree(checkpoints, copy)
        DAMAGE[name](copy / newer / file)
        found = Checkpoints(copy, keep=2, world=World(0, 1, 0, torch.device("cpu"))).resume(NoState())
        assert found is not None and found.path.name == older, (name, file)
        (said,) = found.set_aside
        assert said.startswith(f"{newer}: ")
        assert file.as_posix() in said or "not finished" in said, (name, file, said)
        assert (copy / "quarantine" / newer).is_dir() and not (copy / newer).exists()
        shutil.rmtree(copy)
