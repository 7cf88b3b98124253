"""Cached rows and checkpoints on another file system than the run: nothing is renamed across."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.kill_resume import metric_differences, state_differences
from pipeline.verify import verify_path
from step1_sft.config import SFTJob
from tests.runs import Base, finish


@pytest.fixture
def elsewhere(base: Base) -> Iterator[Path]:
    """A folder on a file system in memory."""
    memory = Path("/dev/shm")  # noqa: S108 - in a folder of its own
    if not memory.is_dir() or memory.stat().st_dev == base.folder.stat().st_dev:
        pytest.skip("no other file system to write to")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def job_of(base: Base) -> SFTJob:
    return base.job(max_steps=4, save_every=1, keep_checkpoints=2)


def test_a_run_spread_over_two_file_systems_ends_like_one_on_a_single_one(
    base: Base, elsewhere: Path
) -> None:
    job = job_of(base)
    job.sft.data.cache_dir = str(elsewhere / "cache")
    spread = base.write("spread", job)
    (elsewhere / "checkpoints").mkdir()
    (spread / "sft").mkdir()
    (spread / "sft" / "checkpoints").symlink_to(elsewhere / "checkpoints")
    finish(spread, 1)
    single = base.run("single", job_of(base))
    assert state_differences(single, spread, 4) == [] == metric_differences(single, spread)
    _, newest = sorted((elsewhere / "checkpoints").iterdir())
    (cached,) = (elsewhere / "cache").iterdir()
    assert verify_path(newest, say=lambda line: None) == 0 and cached.stat().st_dev == elsewhere.stat().st_dev

    counters = newest / "counters.json"
    counters.write_text(counters.read_text()[:-1])
    printed = finish(spread, 1)
    assert "set aside, not verified: step_00000004" in printed and "step_00000003" in printed
    assert (elsewhere / "checkpoints" / "quarantine" / "step_00000004").is_dir()
