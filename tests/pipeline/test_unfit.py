"""Steps that a machine has no room for are refused before anything starts, with settings that fit."""

from __future__ import annotations

import re

import pytest

from common.errors import UserError
from pipeline import run
from pipeline.compose import compose, prepare
from pipeline.config import PipelineConfig
from pipeline.planning.unfit import refuse_unfit
from tests.gpu_fake.large import SIZES

H100, NODE = 85_520_809_984, 2_000_000_000_000


@pytest.fixture(autouse=True)
def node_of_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.devices.gpu_memory", lambda: H100)
    monkeypatch.setattr("pipeline.planning.devices.host_memory", lambda: NODE)


def config_of(size: str, *overrides: str) -> PipelineConfig:
    fields = ", ".join(
        f"{key}: {str(value).lower()}" for key, value in SIZES[size].items() if value is not None
    )
    typed = ["steps=[sft]", f"model.config={{{fields}}}", "sft.data.path=x", "model.dtype=bf16", *overrides]
    return compose(prepare(typed).overrides)


def test_what_is_refused_fits_with_the_setting_that_is_named_first() -> None:
    with pytest.raises(UserError) as caught:
        refuse_unfit(config_of("8B", "deepspeed=zero1"), 2, 2, gpu=True)
    found = re.fullmatch(
        r"sft: a rank needs about ([\d.]+) GB besides what its rows take, and a GPU here has 85.5 GB",
        caught.value.message,
    )
    assert found and float(found[1]) > 85.5
    first, *_, last = str(caught.value.hint).splitlines()
    overrides = first.partition(":")[0].split()
    assert overrides and "launch.check_memory=false" in last
    refuse_unfit(config_of("8B", *overrides), 2, 2, gpu=True)


def test_rows_are_not_judged_and_what_fits_passes() -> None:
    refuse_unfit(config_of("8B", "deepspeed=zero3"), 8, 8, gpu=True)
    refuse_unfit(config_of("8B", "deepspeed=zero3", "sft.data.max_length=100000"), 8, 8, gpu=True)
    refuse_unfit(config_of("8B", "deepspeed=zero1", "launch.check_memory=false"), 1, 1, gpu=True)


def test_no_setting_helps_70b_on_one_gpu() -> None:
    with pytest.raises(UserError, match="a GPU here has 85.5 GB"):
        refuse_unfit(config_of("70B", "deepspeed=zero3"), 1, 1, gpu=True)
    refuse_unfit(config_of("70B", "deepspeed=zero3"), 64, 8, gpu=True)


def test_states_in_host_memory_have_room_there(monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = config_of("70B", "deepspeed=zero3_offload")
    refuse_unfit(offloaded, 8, 8, gpu=True)
    monkeypatch.setattr("pipeline.planning.devices.host_memory", lambda: NODE // 4)
    with pytest.raises(UserError, match=r"GB of host memory, and its share of that here is 62.5 GB"):
        refuse_unfit(offloaded, 8, 8, gpu=True)


def test_ranks_on_the_cpu_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    small = config_of("1B", "model.dtype=fp32", "deepspeed=zero3")
    refuse_unfit(small, 2, 2, gpu=False)
    monkeypatch.setattr("pipeline.planning.devices.host_memory", lambda: 8_000_000_000)
    with pytest.raises(UserError, match="its share here has 4.0 GB"):
        refuse_unfit(small, 2, 2, gpu=False)


def test_a_run_asks_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "count_gpus", lambda: 8)
    monkeypatch.setattr("pipeline.planning.gpu_memory", lambda: H100)
    with pytest.raises(UserError, match="besides what its rows take"):
        run.refuse_what_cannot_fit(config_of("8B", "deepspeed=zero1"), 2, 2)
