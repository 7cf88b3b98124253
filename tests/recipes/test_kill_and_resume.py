"""A run that was killed ends with the same bits as one that was not.

The whole program (20 kills at random moments at 1 and 2 ranks, ZeRO 1, 2 and 3) is
`python -m benchmarks.kill_resume`; here each exact moment of a save is hit once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import kill_resume
from benchmarks.kill_resume import Point
from pipeline.verify import verify_path
from tests import runs
from tests.forked import sft
from tests.programs import killed
from tests.runs import finish, start, training_lines, wait_while

ALONE, TWO_RANKS = Point(1, 2, steps=16), Point(2, 3, steps=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    kill_resume.write_rows(folder / "rows.jsonl")
    return folder


def prepare(folder: Path, name: str, point: Point) -> Path:
    return kill_resume.write_config(folder / name, point, folder / "rows.jsonl").parent


def whole_run(folder: Path, point: Point) -> Path:
    run_dir = prepare(folder, f"whole-{point.ranks}", point)
    finish(run_dir, point.ranks)
    return run_dir


@pytest.fixture(scope="module")
def whole_alone(folder: Path) -> Path:
    return whole_run(folder, ALONE)


@pytest.fixture(scope="module")
def whole_two(folder: Path) -> Path:
    return whole_run(folder, TWO_RANKS)


def dies(run_dir: Path, ranks: int, moment: str, victim: int = 0) -> None:
    """Start the run, whose rank `victim` dies at `moment`; the other is then killed by its launcher."""
    runs.dies(run_dir, ranks, victim, killed.sft_killed, moment, victim)


def checkpoint_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "sft" / "checkpoints").iterdir())


def assert_same_end(whole: Path, other: Path, point: Point) -> None:
    assert kill_resume.state_differences(whole, other, point.steps) == []
    assert kill_resume.metric_differences(whole, other) == []
    # a run killed while it deleted its last old checkpoint has nothing to save any more, and keeps it
    names = checkpoint_names(other)
    assert set(names) >= set(checkpoint_names(whole)) and len(names) <= len(checkpoint_names(whole)) + 1
    assert not any(name.endswith(".tmp") for name in names)
    assert [line["step"] for line in training_lines(other)] == list(range(1, point.steps + 1))


def test_a_run_killed_at_each_moment_of_a_save_ends_with_the_same_bits(
    folder: Path, whole_alone: Path
) -> None:
    run_dir = prepare(folder, "killed-alone", ALONE)
    left = {}
    for moment in killed.MOMENTS:
        dies(run_dir, 1, moment)
        left[moment] = checkpoint_names(run_dir)
        # whatever is there under a checkpoint's name is whole
        assert verify_path(run_dir / "sft" / "checkpoints", say=lambda line: None) == 0
    assert left == {
        "writing": ["step_00000002", "step_00000004.tmp"],
        "hashing": ["step_00000002", "step_00000004", "step_00000006.tmp"],
        "before the manifest": ["step_00000004", "step_00000006", "step_00000008.tmp"],
        "before the rename": ["step_00000006", "step_00000008", "step_00000010.tmp"],
        "before retention": ["step_00000008", "step_00000010", "step_00000012"],
        # step 8 was kept as the best until the evaluation after step 16
        "deleting": ["step_00000008.tmp", "step_00000012", "step_00000014", "step_00000016"],
    }
    dies(run_dir, 1, killed.EXPORTING)
    assert (run_dir / "sft" / "export.tmp").is_dir() and not (run_dir / "sft" / "export").exists()
    printed = finish(run_dir, 1)
    assert "resuming from" in printed and "step_00000016" in printed
    assert_same_end(whole_alone, run_dir, ALONE)
    assert not (run_dir / "sft" / "export.tmp").exists()


def test_lines_logged_after_the_last_save_are_not_doubled(folder: Path, whole_alone: Path) -> None:
    run_dir = prepare(folder, "killed-after-evaluation", ALONE)
    dies(run_dir, 1, killed.AFTER_EVALUATION)
    steps = [line["step"] for line in training_lines(run_dir)]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8] and checkpoint_names(run_dir)[-1] == "step_00000006"
    samples = run_dir / "sft" / "samples.jsonl"
    assert {json.loads(line)["step"] for line in samples.read_text().splitlines()} == {0, 8}
    finish(run_dir, 1)
    assert_same_end(whole_alone, run_dir, ALONE)


@pytest.mark.slow
def test_two_ranks_of_which_either_is_killed_end_with_the_same_bits(folder: Path, whole_two: Path) -> None:
    run_dir = prepare(folder, "killed-two", TWO_RANKS)
    dies(run_dir, 2, "writing", victim=1)
    assert checkpoint_names(run_dir) == ["step_00000002", "step_00000004.tmp"]
    dies(run_dir, 2, "before retention", victim=0)
    assert checkpoint_names(run_dir) == ["step_00000002", "step_00000004", "step_00000006"]
    started = start(run_dir, 2, sft)
    wait_while(started, lambda: kill_resume.last_step(run_dir / "sft") < 7)
    started.kill()  # in the middle of a step, or of what follows it
    finish(run_dir, 2)
    assert_same_end(whole_two, run_dir, TWO_RANKS)


def test_a_comparison_notices_a_run_with_another_seed(folder: Path, whole_alone: Path) -> None:
    """Guards the comparison itself."""
    run_dir = prepare(folder, "other", ALONE)
    config = run_dir / "resolved.yaml"
    config.write_text(config.read_text().replace("seed: 3", "seed: 4"))
    finish(run_dir, 1)
    assert len(kill_resume.state_differences(whole_alone, run_dir, ALONE.steps)) > 10
    assert len(kill_resume.metric_differences(whole_alone, run_dir)) >= ALONE.steps
