"""The program for the first minutes on a GPU, rehearsed on the CPU with toys."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measure import PROJECT, threads_environment


def gpu_all(out: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "benchmarks/gpu_all.sh", *parts], cwd=PROJECT, capture_output=True, text=True, check=False,
        env={**os.environ, **threads_environment(1), "TOY": "1", "OUT": str(out), "PYTHON": sys.executable},
    )  # fmt: skip


@pytest.mark.slow
def test_parts_write_their_results_and_are_not_run_twice(tmp_path: Path) -> None:
    first = gpu_all(tmp_path, "collective", "decode_1b")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "the sum over 1 rank(s) is right" in (tmp_path / "collective.log").read_text()
    written = json.loads((tmp_path / "decode_gpu_toy.json").read_text())
    assert written["runs"]["4"]["tokens_per_second"] > 0
    again = gpu_all(tmp_path, "collective", "decode_1b")
    assert again.returncode == 0 and again.stdout.count("ended before") == 2


def test_a_part_that_fails_is_said_with_its_log_and_leaves_no_mark(tmp_path: Path) -> None:
    unknown = gpu_all(tmp_path, "sft_2b")
    assert unknown.returncode == 2 and "no part 'sft_2b'; there are: tests collective" in unknown.stderr
    (tmp_path / "runs").write_text("no folder")
    failed = gpu_all(tmp_path, "quantized")
    assert failed.returncode == 1 and "quantized: FAILED" in failed.stdout
    assert not (tmp_path / "quantized.done").exists()
