"""A wall clock that jumps an hour ahead and back all through a run ends nothing and measures nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import PROJECT
from pipeline.verify import verify_path
from tests.pipeline.fakes import PROGRAMS


@pytest.mark.slow
def test_a_run_on_two_ranks_goes_through_whatever_the_wall_clock_does(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path / "jumping_clock.so"
    source = PROGRAMS / "jumping_clock.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    clock = "import time; print(len({round(time.time() / 3600) for _ in range(100)}) > 1)"
    own = {"LD_PRELOAD": str(library), "PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **own, "RLHF_SILENT_SECONDS": "120"}
    looked = subprocess.run([sys.executable, "-c", clock], env=environment, capture_output=True, check=True)
    assert looked.stdout == b"True\n"

    ended = subprocess.run(
        [
            sys.executable, "-m", "pipeline", "run", "steps=[sft]", "run_name=a", f"output_dir={tmp_path}",
            "launch.nproc_per_node=2", "sft.train.max_steps=6", "sft.train.save_every=3",
            "sft.train.save_minutes=30", "sft.train.keep_checkpoints=9",
        ],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    folder = tmp_path / "a" / "sft"
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["step_00000003", "step_00000006"]  # none because half an hour seemed to have passed
    assert 0 < json.loads((folder / "state.json").read_text())["seconds"] < 600
    assert verify_path(tmp_path / "a", say=lambda line: None) == 0
