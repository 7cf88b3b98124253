"""The project where its user cannot write, and a home that is read-only: nothing is written beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import PROJECT

PACKAGES = (
    "pipeline",
    "common",
    "launch",
    "step1_sft",
    "step2_reward",
    "step2_dpo",
    "step3_ppo",
    "demo",
    "conf",
)
NO_PRIVILEGES = ["setpriv", "--bounding-set=-all"]
"""What takes from root the right to write where a file's mode forbids it."""


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "checkout"
    for package in PACKAGES:
        shutil.copytree(PROJECT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "home").mkdir()
    closed = [tmp_path / "home", folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in closed:
        path.chmod(0o555)
    yield folder
    for path in closed:
        path.chmod(0o755)


def go(checkout: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if os.geteuid() == 0 and shutil.which(NO_PRIVILEGES[0]) is None:
        pytest.skip("root may write everywhere, and there is no setpriv")
    own = {"HOME": str(checkout.parent / "home"), "PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "LANG") if name in os.environ}
    return subprocess.run(
        [*(NO_PRIVILEGES if os.geteuid() == 0 else []), sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd, env={**kept, **own}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def test_a_run_that_would_be_made_in_a_read_only_checkout_is_refused_with_the_way_out(checkout: Path) -> None:
    ended = go(checkout, checkout, "run", "steps=[sft]")
    assert ended.returncode == 2
    assert f"error: output_dir=runs: {checkout} cannot be written (read-only, or not yours)" in ended.stderr
    assert "output_dir=ANOTHER_FOLDER" in ended.stderr


@pytest.mark.slow
def test_every_verb_works_from_a_read_only_checkout_and_leaves_nothing_in_it(
    checkout: Path, tmp_path: Path
) -> None:
    before = sorted(checkout.rglob("*"))
    own = tmp_path / "own"
    own.mkdir()
    settings = ["steps=[sft]", "run_name=a", "sft.train.max_steps=2", "launch.nproc_per_node=2"]
    for verb in (
        ["run", *settings],
        ["plan", *settings],
        ["preview", *settings],
        ["export", "runs/a", "--step", "last"],
        ["verify", "runs/a"],
        ["report", "runs/a"],
        ["doctor"],
    ):
        ended = go(checkout, own, *verb)
        assert ended.returncode == 0, (verb, ended.stdout + ended.stderr)
        assert "Traceback" not in ended.stderr, (verb, ended.stderr)
    assert sorted(checkout.rglob("*")) == before
    assert list((tmp_path / "home").iterdir()) == []
    assert sorted(path.name for path in own.iterdir()) == ["runs"]
