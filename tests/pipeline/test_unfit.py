"""Steps that a machine has no room for are refused before anything starts, with settings that fit."""

from __future__ import annotations

import re

import pytest

from common.counts import DataCounts
from common.errors import UserError
from common.stage import Step
from pipeline import run
from pipeline.compose import compose, prepare
from pipeline.config import PipelineConfig
from pipeline.plan import wire_run
from pipeline.planning import memory
from pipeline.planning.fitting import Room, settings_that_fit, variants, ways_out
from pipeline.planning.show import Where, memory_lines
from pipeline.planning.unfit import refuse_unfit
from pipeline.planning.workload import workload_of
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


def ways(config: PipelineConfig, ranks: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("pipeline.planning.fitting.count_gpus", lambda: 8)
    _, *found = ways_out(config, Step.sft, ranks)
    return found


def test_no_offload_is_a_way_out_that_host_memory_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's states, masters and gradients of 70B, shared by 8: 141 GB each, which a node of 2 TB has and one
    of 0.5 TB has not; neither where a run died nor where one is refused."""
    config = config_of("70B", "deepspeed=zero3", "sft.data.max_length=512")
    offloads = [way for way in ways(config, 8, monkeypatch) if "offload" in way]
    waits = "deepspeed=zero3_offload sft.train.async_save=false: "  # another copy would be held there
    assert any(waits in way for way in offloads)
    assert not [way for way in offloads if "zero3_offload" in way and waits not in way]
    with pytest.raises(UserError) as caught:
        refuse_unfit(config, 8, 8, gpu=True)
    assert "deepspeed=zero3_offload" in str(caught.value.hint)
    monkeypatch.setattr("pipeline.planning.devices.host_memory", lambda: NODE // 4)
    assert not [way for way in ways(config, 8, monkeypatch) if "deepspeed=zero3_offload" in way]
    with pytest.raises(UserError) as caught:
        refuse_unfit(config, 8, 8, gpu=True)
    assert "deepspeed=zero3_offload" not in str(caught.value.hint)


def test_where_host_memory_is_short_the_way_out_is_what_takes_less_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """8B on 8 GPUs has room there; in 120 GB of host memory its offloaded states have not."""
    monkeypatch.setattr("pipeline.planning.devices.host_memory", lambda: 120_000_000_000)
    config = config_of("8B", "deepspeed=zero3_offload", "sft.data.max_length=512")
    found = ways(config, 8, monkeypatch)
    assert [way for way in found if way.startswith("deepspeed=zero3: ") and " of host memory " in way]
    assert not [way for way in found if "zero3_offload" in way]
    with pytest.raises(UserError, match="of host memory") as caught:
        refuse_unfit(config, 8, 8, gpu=True)
    assert "deepspeed=zero3: " in str(caught.value.hint)
    refuse_unfit(config_of("8B", "deepspeed=zero3"), 8, 8, gpu=True)


@pytest.mark.parametrize("stage", ["zero1", "zero3", "zero3_offload"])
@pytest.mark.parametrize("host", [NODE, NODE // 20])
def test_every_way_out_fits_the_device_and_the_host(stage: str, host: int) -> None:
    config = config_of("8B", f"deepspeed={stage}")
    work = workload_of(config, Step.sft, 2, gpu=True)
    assert work is not None
    room = Room(H100, host / 2)
    named = [name for name, _ in settings_that_fit(work, Step.sft, config, room)]
    for name, other in variants(work, Step.sft, config):
        needed = memory.estimate(other)
        fits = needed.device <= H100 and max(needed.host, needed.host_to_load) <= host / 2
        assert (name in named) is fits, name


def test_plan_marks_a_stage_that_host_memory_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("8B", "deepspeed=zero3_offload")
    counts = {Step.sft: DataCounts([], 90, 10, 9_000, 3_000, 25, 12, 120, 0.9, 512)}
    where = Where(8, 8, gpu=True)
    text = "\n".join(memory_lines(config, wire_run(config), where, counts))
    assert "no room in host memory" not in text and "does not fit; " not in text
    monkeypatch.setattr("pipeline.planning.devices.host_memory", lambda: 120_000_000_000)
    text = "\n".join(memory_lines(config, wire_run(config), where, counts))
    assert re.search(r"^ +3 .* <- chosen, no room in host memory", text, re.MULTILINE)
    assert "does not fit; deepspeed=zero3: " in text


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
