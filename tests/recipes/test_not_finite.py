"""A step whose gradient is not finite on any rank changes nothing on all of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kill_resume import leaves
from common.config import Dtype
from step1_sft.config import SFTJob
from tests.programs.not_finite import sft_not_finite
from tests.runs import Base, finish, training_lines

STEPS, BAD = 4, 3


def job_of(base: Base, stage: int, dtype: Dtype, steps: int = STEPS) -> SFTJob:
    job = base.job(max_steps=steps, save_every=1, keep_checkpoints=10)
    job.deepspeed.stage, job.model.dtype = stage, dtype
    job.sft.sampling.num_prompts = 0
    return job


def tensors_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, fp32 masters, the optimizer's moments."""
    folder = run_dir / "sft" / "checkpoints" / f"step_{step:08d}" / "zero"
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.pt")):
        found |= {f"{path.name}{name}": x for name, x in leaves(torch.load(path, weights_only=False))}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def changed(run_dir: Path, one: int, other: int) -> list[str]:
    before, after = tensors_of(run_dir, one), tensors_of(run_dir, other)
    assert before.keys() == after.keys() and len(before) > 5
    return [name for name in before if not torch.equal(before[name], after[name])]


def counters_of(run_dir: Path, step: int) -> dict[str, Any]:
    folder = run_dir / "sft" / "checkpoints" / f"step_{step:08d}"
    return json.loads((folder / "counters.json").read_text())


@pytest.mark.parametrize(
    ("stage", "dtype"), [(1, Dtype.bf16), (1, Dtype.fp32), (2, Dtype.bf16), (3, Dtype.fp32)]
)
def test_a_step_that_is_not_finite_on_one_of_two_ranks_is_skipped_on_both(
    base: Base, stage: int, dtype: Dtype
) -> None:
    run_dir = base.write(f"nan-zero{stage}-{dtype.value}", job_of(base, stage, dtype))
    printed = finish(run_dir, 2, sft_not_finite, [BAD], 1)
    assert printed.count(f"step {BAD}: loss nan, its gradient is not finite; skipped on all ranks") == 1
    assert changed(run_dir, BAD - 1, BAD) == []
    assert changed(run_dir, BAD, BAD + 1) != [] and changed(run_dir, BAD - 2, BAD - 1) != []

    lines = training_lines(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [math.isnan(line["loss"]) for line in lines] == [False, False, True, False]
    assert math.isnan(lines[2]["grad_norm"])
    # its rows count as consumed, and the schedule did not move
    assert lines[2]["num_tokens"] > lines[1]["num_tokens"]
    assert lines[3]["learning_rate"] == lines[2]["learning_rate"]
    assert (counters_of(run_dir, STEPS)["step"], counters_of(run_dir, STEPS)["applied"]) == (4, 3)
    assert counters_of(run_dir, BAD)["skipped_in_a_row"] == 1
    assert counters_of(run_dir, STEPS)["skipped_in_a_row"] == 0


def test_the_rows_of_a_skipped_step_are_in_the_log_by_source_and_line(base: Base) -> None:
    run_dir = base.write("nan-logged", job_of(base, 2, Dtype.fp32))
    finish(run_dir, 1, sft_not_finite, [BAD], 0)
    (named,) = re.findall(
        r"step 3 skipped, loss nan, rows ([\w:, ]+)\n", (run_dir / "sft/logs/rank_0.log").read_text()
    )
    places = named.split(", ")
    lines = {path.stem: len(path.read_text().splitlines()) for path in base.sources}
    assert len(set(places)) == len(places) >= 4
    for place in places:
        source, row = place.split(":")
        assert 1 <= int(row) <= lines[source]


def test_five_skipped_steps_in_a_row_end_the_run_with_a_clear_error(base: Base) -> None:
    run_dir = base.write("nan-five", job_of(base, 2, Dtype.fp32, steps=12))
    printed = finish(run_dir, 2, sft_not_finite, [2, 3, 4, 5, 7, 8, 9, 10, 11], 0, code=2)
    assert printed.count("error: 5 steps in a row were not finite, up to step 11") == 1
    assert "lower sft.optim.lr" in printed and "Traceback" not in printed
    assert changed(run_dir, 6, 10) == [] and changed(run_dir, 5, 6) != []
    assert len(training_lines(run_dir)) == 11
    assert not (run_dir / "sft" / "export").exists()
