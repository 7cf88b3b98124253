from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from pipeline import plan, run
from pipeline.config import PROJECT
from tests.pipeline.fakes import PROGRAMS
from tests.pipeline.programs.fake_step import FAKES


@pytest.fixture
def fake_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is a fake, its rows lie in the working folder, and no report is made."""
    for step, module in FAKES.items():
        monkeypatch.setitem(plan.STAGES, step, dataclasses.replace(plan.STAGES[step], module=module))  # type: ignore[arg-type]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), str(PROGRAMS)]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(run, "make_report", lambda run_dir, say: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
