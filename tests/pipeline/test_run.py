"""Skip, resume, refuse: what the controller does with a run's folder, with a fake step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from common.config import DataConfig
from common.errors import UserError
from common.training_config import SchedulerName
from pipeline import run, state
from pipeline.config import PipelineConfig
from tests.pipeline.fakes import attempt, config, launches, status

pytestmark = pytest.mark.usefixtures("fake_steps")


def test_a_run_leaves_an_artifact_a_state_and_its_lineage_and_says_where() -> None:
    code, lines = attempt()
    assert code == 0
    assert launches() == 1
    assert status()["status"] == "done"
    assert any("runs/a/sft/export" in line for line in lines)
    assert any("runs/a/sft/samples.jsonl" in line for line in lines)
    entry = json.loads(Path("runs/a/lineage.json").read_text())["artifacts"]["sft"]
    assert entry["manifest_sha256"] == status()["manifest_sha256"]
    assert list(entry["inputs"]) == ["sft.data.sources[0]"]
    assert "run_name: a" in Path("runs/a/resolved.yaml").read_text()


def test_the_same_again_is_verified_and_skipped_with_one_line() -> None:
    attempt()
    code, lines = attempt()
    assert (code, launches()) == (0, 1)
    assert len(lines) == 1 and "done already, verified" in lines[0]


def test_what_does_not_change_results_may_change() -> None:
    attempt()
    made = config()
    made.tracking.project, made.launch.nproc_per_node = "other", "2"
    made.sft.train.keep_checkpoints, made.sft.data.cache_dir = 7, "elsewhere"
    code, lines = attempt(made)
    assert (code, launches()) == (0, 1)
    assert "done already" in lines[0]


def test_a_changed_configuration_is_refused_with_the_difference_and_both_ways_out() -> None:
    attempt()
    before = Path("runs/a/resolved.yaml").read_text()
    with pytest.raises(UserError) as caught:
        attempt(config(seed=7))
    assert "seed: 0 -> 7" in caught.value.message
    assert "run_name=" in str(caught.value.hint) and "force=true" in str(caught.value.hint)
    assert launches() == 1
    assert Path("runs/a/resolved.yaml").read_text() == before
    assert status()["status"] == "done"


def test_changed_rows_are_refused_and_touched_ones_are_not() -> None:
    attempt()
    os.utime("rows.jsonl", (1, 1))
    assert attempt()[0] == 0 and launches() == 1
    Path("rows.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(UserError, match=r"content of sft\.data\.sources\[0\]: [0-9a-f]{12} -> [0-9a-f]{12}"):
        attempt()


def test_force_starts_over_and_keeps_the_old_folder() -> None:
    attempt()
    code, lines = attempt(config(seed=7, force=True))
    assert (code, launches()) == (0, 2)
    assert json.loads(Path("runs/a/sft.old-1/state.json").read_text())["config"]["seed"] == 0
    assert "runs/a/sft.old-1" in lines[0]
    # The same command again goes on, or skips: force only answers a refusal.
    assert "done already" in attempt(config(seed=7, force=True))[1][0]
    attempt(config(seed=8, force=True))
    assert Path("runs/a/sft.old-2").is_dir()


def test_a_damaged_export_of_a_finished_step_is_refused_and_named() -> None:
    attempt()
    Path("runs/a/sft/export/config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: content differs"):
        attempt()
    assert attempt(config(force=True))[0] == 0
    assert Path("runs/a/sft.old-1/export/config.json").read_text() == "[]"


def test_a_damaged_state_is_refused_and_force_starts_over() -> None:
    attempt()
    Path("runs/a/sft/state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        attempt()
    assert attempt(config(force=True))[0] == 0
    assert Path("runs/a/sft.old-1/state.json").read_text() == "{"


def test_files_of_unknown_origin_in_the_steps_folder_are_not_touched() -> None:
    Path("runs/a/sft").mkdir(parents=True)
    Path("runs/a/sft/mine.txt").write_text("keep")
    with pytest.raises(UserError, match="holds files"):
        attempt()
    assert launches() == 0


def test_a_step_that_crashed_goes_on_with_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_STEP", "crash")
    assert attempt()[0] == 1
    assert status()["status"] == "failed"
    shown = capfd.readouterr().err
    assert "RuntimeError: the fake step crashed" in shown and "sft failed (exit status 1)" in shown
    monkeypatch.setenv("FAKE_STEP", "done")
    code, lines = attempt()
    assert (code, launches()) == (0, 2)
    assert "going on" in lines[0]


def test_a_step_that_fails_is_started_again_as_often_as_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = config()
    made.launch.max_restarts = 2
    monkeypatch.setenv("FAKE_STEP", "crash")
    code, lines = attempt(made)
    assert (code, launches(), status()["status"]) == (1, 3, "failed")
    assert [line for line in lines if "restart" in line] == [
        f"sft: rank 0 failed (exit status 1); starting again from the last checkpoint, restart {number} of 2"
        for number in (1, 2)
    ]


def test_a_correction_is_accepted_while_there_is_nothing_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP", "user-error")
    assert attempt()[0] == 2
    monkeypatch.setenv("FAKE_STEP", "done")
    assert attempt(config(seed=7))[0] == 0
    assert launches() == 2
    with pytest.raises(UserError, match="seed: 7 -> 8"):  # now there is
        attempt(config(seed=8))


def test_a_run_that_was_killed_after_its_export_is_done_without_another_launch() -> None:
    attempt()
    Path("runs/a/sft/state.json").write_text(json.dumps({**status(), "status": "running"}))
    code, lines = attempt()
    assert (code, launches()) == (0, 1)
    assert "done already" in lines[0] and status()["status"] == "done"


def test_a_second_run_on_the_same_folder_is_refused_while_the_first_is_alive() -> None:
    descriptor = state.lock_run(Path("runs/a"))
    with pytest.raises(UserError) as caught:
        attempt()
    assert f"process {os.getpid()}" in caught.value.message and "host " in caught.value.message
    os.close(descriptor)
    assert attempt()[0] == 0


def test_what_is_run_is_written_as_it_is_also_below_folders_named_by_a_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "make_report", lambda run_dir, say: None)
    made = config(output_dir=f"runs/{'a1' * 20}")
    made.model.path = f"hub/models--org--name/snapshots/{'0b' * 20}"
    (Path(made.model.path)).mkdir(parents=True)
    (Path(made.model.path) / "config.json").write_text("{}")
    made.model.revision = "c2" * 20
    code, _ = attempt(made)
    assert code == 0
    folder = Path(made.output_dir) / "a"
    resolved = yaml.safe_load((folder / "resolved.yaml").read_text())
    assert (resolved["model"]["path"], resolved["output_dir"]) == (made.model.path, made.output_dir)
    recorded = json.loads((folder / "sft" / "state.json").read_text())
    assert recorded["config"]["model"]["path"] == made.model.path
    assert recorded["config"]["model"]["revision"] == made.model.revision


def test_without_a_name_the_same_configuration_finds_its_run_again() -> None:
    first, second = config(run_name=None), config(run_name=None, seed=1)
    assert state.run_name(first) == state.run_name(config(run_name=None, force=True, output_dir="x"))
    assert state.run_name(first) != state.run_name(second)
    assert state.run_name(first).startswith("sft-")


def test_checks_come_before_anything_is_written() -> None:
    made = config()
    made.sft.data = DataConfig(path="nowhere.jsonl")
    with pytest.raises(UserError):
        attempt(made)
    assert not Path("runs").exists()


def test_two_ranks_are_launched_through_the_agent() -> None:
    made = config()
    made.launch.nproc_per_node = "2"
    assert attempt(made)[0] == 0
    started = [Path(f"runs/a/launches_{rank}").read_text() for rank in (0, 1)]
    assert started == ["2 127.0.0.1\n"] * 2


def longer(steps: int) -> PipelineConfig:
    made = config()
    made.sft.train.max_steps, made.sft.optim.scheduler = steps, SchedulerName.constant
    return made


def test_a_step_that_is_done_goes_on_when_more_steps_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(longer(10))
    first = status()["manifest_sha256"]
    monkeypatch.setenv("FAKE_STEP", "crash")
    for number in (2, 3):  # the artifact of the shorter run is not taken for what it makes
        assert attempt(longer(20))[0] == 1
        assert launches() == number and status()["continues"] == first
    monkeypatch.delenv("FAKE_STEP")
    monkeypatch.setenv("FAKE_WEIGHTS", '{"longer": true}')
    shutil.rmtree("runs/a/sft/export")
    code, lines = attempt(longer(20))
    assert (code, launches()) == (0, 4) and status()["manifest_sha256"] != first
    code, lines = attempt(longer(20))
    assert (code, launches()) == (0, 4) and "done already" in lines[-1]


def test_a_note_says_what_changed_and_settings_that_do_nothing_to_a_finished_step_start_nothing() -> None:
    attempt(longer(10))
    made = longer(10)
    made.sft.train.save_every = 5
    code, lines = attempt(made)
    assert (code, launches()) == (0, 1)
    assert lines[0] == "sft: sft.train.save_every: 0 -> 5, which changes nothing of a step that is done"
    _, lines = attempt(longer(20))
    assert any("changed since it was begun: sft.train.max_steps: 10 -> 20" in line for line in lines)
