"""The arithmetic of benchmarks/scale.py beside published figures and sums by hand."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.measure import PROJECT
from benchmarks.scale import GB, TASKS, Cluster, models

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
    found = list(scale.outcomes(Cluster()))
    assert len(found) == len(TASKS) * 4 * 5
    for each in found:
        assert (each.seconds is None) is (each.memory > 80 * GB), each
        assert each.seconds is not None or each.breaks_first.startswith("memory")
    idle = [each for each in found if each.devices == 4096 and each.task == "SFT, 128k" and each.seconds]
    assert idle and all(each.breaks_first == "32 sequences for 4,096 devices" for each in idle)
    assert all(each.sharing == 8 for each in idle)


def test_checkpoints_are_as_far_apart_as_youngs_formula_says() -> None:
    found = scale.survival(models()[2], 4096, Cluster())
    assert found.hours_to_failure == pytest.approx(50_700 / 4096)
    writing = 14 * 405.85e9 / (512 * 2e9)
    assert found.checkpoint_seconds == pytest.approx(writing, rel=1e-3)
    assert found.interval_minutes == pytest.approx((2 * writing * 12.378 * 3600) ** 0.5 / 60, rel=1e-3)
    assert 0.01 < found.lost < 0.03


def test_the_page_has_the_tables_that_the_program_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scale", "--results", str(tmp_path)])
    assert scale.main() == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line and "written" not in line]
    page = (PROJECT / "docs" / "scale.md").read_text()
    assert len(printed) > 70
    assert [line for line in printed if line not in page] == []
