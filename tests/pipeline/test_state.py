"""What may change under a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import Dtype, ModelConfig
from common.stage import Step
from pipeline.config import PipelineConfig
from pipeline.plan import STAGES
from pipeline.resume import Changes, changes
from pipeline.state import differing, run_name, settle_dtype, step_config, write_state


def test_a_key_that_an_older_version_did_not_have_is_no_difference_while_it_is_null() -> None:
    before = {"sft": {"data": {"sources": [{"path": "a", "weight": 1.0}]}, "optim": {"lr": None}}}
    entry = {"path": "a", "weight": 1.0, "subset": None}
    after = {"sft": {"data": {"sources": [entry]}, "optim": {"lr": None, "warmup_steps": None}}}
    assert list(differing(before, after)) == list(differing(after, before)) == []
    entry["subset"] = "maths"
    assert [key for key, _, _ in differing(before, after)] == ["sft.data.sources"]


@pytest.mark.parametrize(("gpu", "chosen", "why"), [(False, "fp32", "CPU"), (True, "bf16", "GPUs")])
def test_auto_is_settled_by_the_kind_of_device_alone(
    tmp_path: Path, gpu: bool, chosen: str, why: str
) -> None:
    settled, line = settle_dtype(PipelineConfig(), tmp_path, gpu=gpu)
    assert settled.model.dtype is Dtype(chosen)
    assert line is not None and f"auto: {chosen}" in line and why in line
    # one command names one run, on whatever device
    assert settled.run_name == run_name(PipelineConfig())


def test_a_dtype_that_was_named_is_left_alone(tmp_path: Path) -> None:
    named = PipelineConfig(model=ModelConfig(dtype=Dtype.fp16))
    assert settle_dtype(named, tmp_path, gpu=True) == (named, None)


def test_a_run_goes_on_in_the_dtype_it_began_with_on_another_kind_of_device(tmp_path: Path) -> None:
    began, _ = settle_dtype(PipelineConfig(), tmp_path, gpu=True)
    part = step_config(began, STAGES[Step.sft])
    write_state(tmp_path / "sft", {"status": "stopped", "config": part, "inputs": {}})
    settled, line = settle_dtype(PipelineConfig(), tmp_path, gpu=False)
    assert settled.model.dtype is Dtype.bf16
    assert line is not None and "bf16, which this run began with" in line and "would take fp32" in line
    now = step_config(settled, STAGES[Step.sft])
    assert changes(part, now, Step.sft, tmp_path / "sft", ended=False) == Changes()
