"""The arithmetic of benchmarks/scale.py beside published figures and sums by hand."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.measure import PROJECT, RESULTS
from benchmarks.restart_time import PARTS
from benchmarks.scale import GB, TASKS, Cluster, models
from pipeline.planning.memory import estimate

SFT_8K = TASKS[0]


def test_models_have_the_published_numbers_of_weights() -> None:
    counted = {model.name: (model.network.parameters / 1e9, model.active / 1e9) for model in models()}
    assert counted["8B"] == pytest.approx((8.03, 8.03), abs=0.01)
    assert counted["70B"] == pytest.approx((70.55, 70.55), abs=0.01)
    assert counted["405B"] == pytest.approx((405.85, 405.85), abs=0.01)
    assert counted["30B-A3B"] == pytest.approx((30.5, 3.3), abs=0.1)  # routers are not counted


def test_traffic_is_that_of_the_zero_paper() -> None:
    model = models()[0]
    size = 2 * model.network.parameters * 7 / 8
    passes = 512 // 8
    sent = [scale.wire_bytes(model, SFT_8K, 8, 1, stage) for stage in (1, 2, 3)]
    assert sent == [3 * size, (passes + 1) * size, 3 * passes * size]
    assert (
        scale.wire_bytes(model, SFT_8K, 8, 4, 3) == 4 * 3 * passes * size
    )  # four ranks to a row: more passes
    assert scale.wire_bytes(model, SFT_8K, 1, 1, 3) == 0


def test_ranks_that_share_a_row_send_what_attention_takes_and_gives() -> None:
    """Of 8B a token has 4,096 numbers of queries and of results, 1,024 of keys and of values; 3 of 4 go."""
    per_token = 2 * (4096 + 1024) * 2 * 3 / 4
    passes, tokens = 512 * 4 // 8, 8192 / 4
    sent = scale.exchanged_bytes(models()[0], SFT_8K, 8, 4)
    assert sent == 3 * passes * 32 * per_token * tokens
    assert scale.exchanged_bytes(models()[0], SFT_8K, 8, 1) == 0


def test_rows_are_shared_within_a_node_by_as_many_as_give_devices_work_but_not_in_ppo() -> None:
    cluster = Cluster()
    assert scale.sharings(SFT_8K, 512, cluster) == [1, 2, 4, 8]
    assert scale.sharings(SFT_8K, 2048, cluster) == [4, 8]
    assert scale.sharings(TASKS[1], 2, cluster) == [1, 2]
    assert scale.sharings(TASKS[2], 512, cluster) == [1]


def test_operations_are_counted_per_weight_token_and_key() -> None:
    model = models()[0]
    by_hand = (8 * model.active + 4 * 2 * 32 * 4096 * 8192) * 4_194_304
    assert scale.operations(model, SFT_8K) == by_hand
    ppo = TASKS[2]
    assert scale.operations(model, ppo) > 2 * scale.operations(
        model, dataclasses.replace(ppo, networks=1, response=0)
    )


def test_no_cell_claims_what_does_not_fit_and_devices_without_a_sequence_are_named() -> None:
    """A rank's host memory counts like its device's; where both are too small the device's is named."""
    found = list(scale.outcomes(Cluster()))
    assert len(found) == len(TASKS) * 4 * 5
    for each in found:
        fits = each.memory <= 80 * GB and each.host <= 250 * GB
        assert (each.seconds is not None) is (each.wire is not None) is (each.setting != "none fits") is fits
        if each.memory > 80 * GB:
            assert each.breaks_first.startswith("memory: "), each
        elif each.host > 250 * GB:
            assert each.breaks_first.startswith(f"host memory: {each.host / GB:.0f} GB"), each
    assert {each.breaks_first.partition(":")[0] for each in found} >= {"memory", "host memory"}
    idle = [each for each in found if each.devices == 4096 and each.task == "SFT, 128k" and each.seconds]
    assert idle and all(each.breaks_first == "32 sequences for 4,096 devices" for each in idle)
    assert all(each.sharing == 8 for each in idle)


def test_where_nothing_fits_every_setting_is_too_large_for_the_device_or_the_host() -> None:
    cluster = Cluster()
    by_name = {model.name: model for model in models()}
    for each in scale.outcomes(cluster):
        if each.seconds is not None:
            continue
        model, task = by_name[each.model], next(task for task in TASKS if task.name == each.task)
        for setting in scale.SETTINGS:
            for sharing in scale.sharings(task, each.devices, cluster):
                ranks = min(each.devices, task.sequences * sharing)
                needed = estimate(scale.workload(model, task, ranks, sharing, setting))
                assert needed.device > 80 * GB or max(needed.host, needed.host_to_load) > 250 * GB, each


def test_states_that_host_memory_has_no_room_for_are_no_setting() -> None:
    """An optimizer of 30 billion weights takes 12 bytes each: 366 GB on one rank."""
    model = next(model for model in models() if model.name == "30B-A3B")
    alone = scale.outcome(model, SFT_8K, 1, Cluster())
    assert alone.setting == "none fits" and alone.breaks_first.startswith("host memory")
    assert alone.host > 12 * model.network.parameters
    with_more = scale.outcome(model, SFT_8K, 1, Cluster(host=1000 * GB))
    assert with_more.setting.endswith("in host memory") and with_more.host > 250 * GB


def test_servers_do_not_help_trainers_without_host_memory() -> None:
    """70B on 8 devices with servers fits by its device alone: the offloaded states are 2 networks of 70B."""
    large, ppo = models()[1], TASKS[2]
    assert "with servers" not in scale.outcome(large, ppo, 8, Cluster()).breaks_first
    assert "with servers" in scale.outcome(large, ppo, 8, Cluster(host=1000 * GB)).breaks_first


def test_a_restart_takes_what_was_measured_and_the_reading_that_grows_with_the_model() -> None:
    """405B on 512 nodes, 2 GB/s each: 811.7 GB of weights, whole, and a share of 5,682 GB."""
    record = json.loads((RESULTS / "restart_time.json").read_text())
    measured = record["medians"]
    for trial in record["trials"]:
        assert sum(trial[part] for part in PARTS) == pytest.approx(trial["all"])
    found = scale.survival(models()[2], 4096, Cluster())
    reading = 2 * 405.85 / 2 + 14 * 405.85 / 512 / 2
    assert found.restart_seconds == pytest.approx(30 + measured["all"] + reading, rel=1e-3)
    slower = scale.survival(models()[2], 4096, Cluster(restart_seconds=measured["all"] + 100))
    assert slower.lost - found.lost == pytest.approx(100 / (found.hours_to_failure * 3600))


def test_an_hour_between_checkpoints_loses_more_than_the_best_interval() -> None:
    for model in models():
        for devices in (8, 4096):
            found = scale.survival(model, devices, Cluster())
            assert found.lost <= found.lost_hourly
            mean, writing = found.hours_to_failure * 3600, found.checkpoint_seconds
            by_hand = writing / 3600 + (1800 + found.restart_seconds) / mean
            assert found.lost_hourly == pytest.approx(by_hand)


def test_checkpoints_are_as_far_apart_as_youngs_formula_says() -> None:
    found = scale.survival(models()[2], 4096, Cluster())
    assert found.hours_to_failure == pytest.approx(50_700 / 4096)
    writing = 14 * 405.85e9 / (512 * 2e9)
    assert found.checkpoint_seconds == pytest.approx(writing, rel=1e-3)
    assert found.interval_minutes == pytest.approx((2 * writing * 12.378 * 3600) ** 0.5 / 60, rel=1e-3)
    assert 0.02 < found.lost < 0.04


def test_the_page_has_the_tables_that_the_program_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scale", "--results", str(tmp_path)])
    assert scale.main() == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line and "written" not in line]
    page = (PROJECT / "docs" / "scale.md").read_text()
    assert len(printed) > 70
    assert [line for line in printed if line not in page] == []
