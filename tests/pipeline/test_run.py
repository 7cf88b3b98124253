"""Skip, resume, refuse: what the controller does with a run's folder, with a fake step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from common.config import DataConfig, Dtype, ModelConfig, SchedulerName, TokenizerConfig
from common.errors import UserError
from common.stage import Role, Stage, Step
from launch.supervise import Outcome
from pipeline import plan, preview, run, state
from pipeline.config import PROJECT, PipelineConfig
from pipeline.verify import verify_path

PROGRAMS = Path(__file__).parent / "programs"
DRIVE = [sys.executable, str(PROGRAMS / "drive.py")]
PATIENCE_SECONDS = 60
MAKE_REPORT = run.make_report
REPORTED: list[object] = []
"""What the step's state was each time a report was asked for."""


@pytest.fixture(autouse=True)
def fake_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.STAGES, Step.sft, Stage(Step.sft, (), Role.policy, "fake_step"))  # type: ignore[arg-type]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), str(PROGRAMS)]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(run, "make_report", lambda run_dir, say: REPORTED.append(status()["status"]))
    REPORTED.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')


def config(**changes: object) -> PipelineConfig:
    llama = ModelConfig(
        config={"model_type": "llama"}, tokenizer=TokenizerConfig(None, 512), dtype=Dtype.fp32
    )
    made = PipelineConfig(run_name="a", model=llama)
    made.sft.data = DataConfig(path="rows.jsonl")
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def launches(rank: int = 0) -> int:
    path = Path(f"runs/a/launches_{rank}")
    return len(path.read_text().splitlines()) if path.exists() else 0


def status() -> dict[str, object]:
    return dict(json.loads(Path("runs/a/sft/state.json").read_text()))


def go(made: PipelineConfig | None = None) -> tuple[int, list[str]]:
    lines: list[str] = []
    return run.run(made or config(), say=lines.append), lines


def test_a_run_leaves_an_artifact_a_state_and_its_lineage_and_says_where() -> None:
    code, lines = go()
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
    go()
    code, lines = go()
    assert (code, launches()) == (0, 1)
    assert len(lines) == 1 and "done already, verified" in lines[0]


def test_what_does_not_change_results_may_change() -> None:
    go()
    made = config()
    made.tracking.project, made.launch.nproc_per_node = "other", "2"
    made.sft.train.keep_checkpoints, made.sft.data.cache_dir = 7, "elsewhere"
    code, lines = go(made)
    assert (code, launches()) == (0, 1)
    assert "done already" in lines[0]


def test_a_changed_configuration_is_refused_with_the_difference_and_both_ways_out() -> None:
    go()
    before = Path("runs/a/resolved.yaml").read_text()
    with pytest.raises(UserError) as caught:
        go(config(seed=7))
    assert "seed: 0 -> 7" in caught.value.message
    assert "run_name=" in str(caught.value.hint) and "force=true" in str(caught.value.hint)
    assert launches() == 1
    assert Path("runs/a/resolved.yaml").read_text() == before
    assert status()["status"] == "done"


def test_changed_rows_are_refused_and_touched_ones_are_not() -> None:
    go()
    os.utime("rows.jsonl", (1, 1))
    assert go()[0] == 0 and launches() == 1
    Path("rows.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(UserError, match=r"content of sft\.data\.sources\[0\]: [0-9a-f]{12} -> [0-9a-f]{12}"):
        go()


def test_force_starts_over_and_keeps_the_old_folder() -> None:
    go()
    code, lines = go(config(seed=7, force=True))
    assert (code, launches()) == (0, 2)
    assert json.loads(Path("runs/a/sft.old-1/state.json").read_text())["config"]["seed"] == 0
    assert "runs/a/sft.old-1" in lines[0]
    # The same command again goes on, or skips: force only answers a refusal.
    assert "done already" in go(config(seed=7, force=True))[1][0]
    go(config(seed=8, force=True))
    assert Path("runs/a/sft.old-2").is_dir()


def test_a_damaged_export_of_a_finished_step_is_refused_and_named() -> None:
    go()
    Path("runs/a/sft/export/config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: content differs"):
        go()
    assert go(config(force=True))[0] == 0
    assert Path("runs/a/sft.old-1/export/config.json").read_text() == "[]"


def test_a_damaged_state_is_refused_and_force_starts_over() -> None:
    go()
    Path("runs/a/sft/state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        go()
    assert go(config(force=True))[0] == 0
    assert Path("runs/a/sft.old-1/state.json").read_text() == "{"


def test_files_of_unknown_origin_in_the_steps_folder_are_not_touched() -> None:
    Path("runs/a/sft").mkdir(parents=True)
    Path("runs/a/sft/mine.txt").write_text("keep")
    with pytest.raises(UserError, match="holds files"):
        go()
    assert launches() == 0


def test_a_step_that_crashed_goes_on_with_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_STEP", "crash")
    assert go()[0] == 1
    assert status()["status"] == "failed"
    shown = capfd.readouterr().err
    assert "RuntimeError: the fake step crashed" in shown and "sft failed (exit status 1)" in shown
    monkeypatch.setenv("FAKE_STEP", "done")
    code, lines = go()
    assert (code, launches()) == (0, 2)
    assert "going on" in lines[0]


def test_a_step_that_fails_is_started_again_as_often_as_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = config()
    made.launch.max_restarts = 2
    monkeypatch.setenv("FAKE_STEP", "crash")
    code, lines = go(made)
    assert (code, launches(), status()["status"]) == (1, 3, "failed")
    assert [line for line in lines if "restart" in line] == [
        f"sft: rank 0 failed (exit status 1); starting again from the last checkpoint, restart {number} of 2"
        for number in (1, 2)
    ]


def test_a_correction_is_accepted_while_there_is_nothing_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP", "user-error")
    assert go()[0] == 2
    monkeypatch.setenv("FAKE_STEP", "done")
    assert go(config(seed=7))[0] == 0
    assert launches() == 2
    with pytest.raises(UserError, match="seed: 7 -> 8"):  # now there is
        go(config(seed=8))


def test_a_failure_after_a_signal_is_not_called_stopped() -> None:
    wired = plan.wire([Step.sft])[0]
    Path("runs/a/sft").mkdir(parents=True)
    current = {"step": "sft", "config": {}, "config_hash": "", "inputs": {}, "started": "", "launched": ""}
    assert run.conclude(Path("runs/a"), wired, current, Outcome(2, stopped=True), print) == 2
    assert status()["status"] == "failed"
    assert run.conclude(Path("runs/a"), wired, current, Outcome(143, stopped=True), print) == 143
    assert status()["status"] == "stopped"


@pytest.mark.parametrize(
    ("does", "code", "told"),
    [
        ("done", 0, ("end", "sft of runs/a finished")),
        ("crash", 1, ("failure", "sft of runs/a failed (exit status 1)")),
        ("user-error", 2, ("failure", "sft of runs/a failed (exit status 2)")),
        ("no-export", None, ("failure", "sft of runs/a failed: runs/a/sft/export is not finished")),
    ],
)
def test_the_webhook_is_told_once_how_a_step_ended(
    does: str, code: int | None, told: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    posted: list[tuple[str, str]] = []
    monkeypatch.setenv("FAKE_STEP", does)
    monkeypatch.setattr(
        run.Webhook,
        "post",
        lambda self, kind, step, text: posted.append((kind.value, text.partition(": there")[0])),
    )
    if code is None:
        with pytest.raises(UserError):
            go()
    else:
        assert go()[0] == code
    assert [(kind, text[: len(told[1])]) for kind, text in posted] == [told]
    if does == "done":
        go()  # done already: nothing has ended
        assert len(posted) == 1


def test_a_webhook_that_nobody_answers_fails_no_run() -> None:
    made = config()
    made.tracking.webhook = "http://127.0.0.1:9/secret"
    code, lines = go(made)
    assert code == 0
    assert [line for line in lines if "webhook" in line] == [
        "warning: tracking.webhook: an alert was not posted: ConnectionRefusedError; the run goes on"
    ]


@pytest.mark.parametrize("ended", [0, 1, 2])
def test_a_folder_that_was_removed_while_its_step_ran_is_said_and_not_made_again(
    ended: int, capsys: pytest.CaptureFixture[str]
) -> None:
    wired = plan.wire([Step.sft])[0]
    said = "sft failed: runs/a/sft was removed while it was running\n"
    assert run.conclude(Path("runs/a"), wired, {}, Outcome(ended), print) == (ended or 2)
    assert capsys.readouterr().err == ("" if ended == 2 else said)  # else the rank said so
    MAKE_REPORT(Path("runs/a"), pytest.fail)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("needed", "is_certain", "ways"),
    [("needs 9 GB and has 8 GB: 1 GB short", False, 1), ("needs 1 GB", False, 0), ("needs 1 GB", True, 1)],
)
def test_ways_to_need_less_memory_are_named_where_it_was_short(
    needed: str,
    is_certain: bool,
    ways: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pipeline.planning.ways_out", lambda *args, **more: [needed, "deepspeed=zero3"])
    run.show_ways_out(config(), Step.sft, 2, 2, is_certain=is_certain)
    assert capsys.readouterr().err == f"  {needed}\n" + ways * "  deepspeed=zero3\n"


def test_an_error_that_the_step_has_printed_is_not_commented(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_STEP", "user-error")
    code, lines = go()
    assert code == 2 and len(lines) == 1
    assert capfd.readouterr().err == "error: the fake step found something\n"


def test_a_step_that_ends_well_without_an_artifact_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP", "no-export")
    with pytest.raises(UserError, match="is not finished"):
        go()
    assert status()["status"] == "failed"


def test_a_run_that_was_killed_after_its_export_is_done_without_another_launch() -> None:
    go()
    Path("runs/a/sft/state.json").write_text(json.dumps({**status(), "status": "running"}))
    code, lines = go()
    assert (code, launches()) == (0, 1)
    assert "done already" in lines[0] and status()["status"] == "done"


def test_a_second_run_on_the_same_folder_is_refused_while_the_first_is_alive() -> None:
    descriptor = state.lock_run(Path("runs/a"))
    with pytest.raises(UserError) as caught:
        go()
    assert f"process {os.getpid()}" in caught.value.message and "host " in caught.value.message
    os.close(descriptor)
    assert go()[0] == 0


def test_what_is_run_is_written_as_it_is_also_below_folders_named_by_a_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "make_report", lambda run_dir, say: None)
    made = config(output_dir=f"runs/{'a1' * 20}")
    made.model.path = f"hub/models--org--name/snapshots/{'0b' * 20}"
    (Path(made.model.path)).mkdir(parents=True)
    (Path(made.model.path) / "config.json").write_text("{}")
    made.model.revision = "c2" * 20
    code, _ = go(made)
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
        go(made)
    assert not Path("runs").exists()


def test_two_ranks_are_launched_through_the_agent() -> None:
    made = config()
    made.launch.nproc_per_node = "2"
    assert go(made)[0] == 0
    assert (launches(0), launches(1)) == (1, 1)
    assert Path("runs/a/launches_1").read_text() == "2 127.0.0.1\n"


def test_preview_passes_its_exit_status_on_and_makes_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config()
    assert preview.preview(made) == 0
    monkeypatch.setenv("FAKE_STATUS", "2")
    assert preview.preview(made) == 2
    assert not Path("runs").exists()


def test_verify_checks_every_artifact_checkpoint_and_parent_of_a_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from common.artifacts import Manifest, hash_files, write_manifest

    go()
    checkpoint = Path("runs/a/sft/checkpoints/step_00000002")
    checkpoint.mkdir(parents=True)
    (checkpoint / "shard.pt").write_bytes(b"state")
    write_manifest(checkpoint, Manifest("checkpoint", None, hash_files(checkpoint)))
    assert verify_path(Path("runs/a")) == 0
    shown = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[:-1])
    assert shown["ok       runs/a/sft/checkpoints/step_00000002"] == "checkpoint, 1 files, 5 bytes"
    assert {"ok       runs/a/sft/export", "ok       runs/a/lineage.json sft"} < shown.keys()

    (checkpoint / "shard.pt").write_bytes(b"stale")
    assert verify_path(Path("runs/a")) == 2
    assert "shard.pt: content differs" in capsys.readouterr().out
    assert verify_path(checkpoint) == 2
    assert verify_path(Path("runs/a/sft/export")) == 0


def test_verify_finds_an_artifact_that_was_exchanged_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    from common.artifacts import Manifest, hash_files, write_manifest

    go()
    export = Path("runs/a/sft/export")
    (export / "config.json").write_text('{"other": 1}')
    write_manifest(export, Manifest("artifact", Role.policy, hash_files(export)))
    assert verify_path(export) == 0  # whole in itself, but not the one that the run made
    assert verify_path(Path("runs/a")) == 2
    assert "another artifact" in capsys.readouterr().out


def test_verify_of_a_folder_without_anything_finished_is_an_error() -> None:
    Path("runs/a").mkdir(parents=True)
    with pytest.raises(UserError, match="holds nothing to verify"):
        verify_path(Path("runs/a"))
    with pytest.raises(UserError, match="no such folder"):
        verify_path(Path("nowhere"))


@contextlib.contextmanager
def controller(*extra: str) -> Iterator[subprocess.Popen[str]]:
    """A controller in a process of its own, whose step waits to be told to stop."""
    command = [*DRIVE, "run", "experiment=demo", "sft.data.path=rows.jsonl", "run_name=a", *extra]
    process = subprocess.Popen(
        command,
        env={**os.environ, "FAKE_STEP": "wait"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell starts background jobs with it ignored, and the controller leaves it so
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def wait_for_ranks(process: subprocess.Popen[str], ranks: int) -> list[int]:
    """Process ids of the ranks and of what started them, once all are waiting."""
    end = time.monotonic() + PATIENCE_SECONDS
    paths = [Path(f"runs/a/pid_{rank}") for rank in range(ranks)]
    while not all(path.exists() for path in paths):
        assert process.poll() is None and time.monotonic() < end, "the ranks did not start"
        time.sleep(0.02)
    return [int(number) for path in paths for number in path.read_text().split()]


def gone(process_id: int) -> bool:
    """Whether the process has ended, within patience."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        try:
            text = Path(f"/proc/{process_id}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if text.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGUSR1)),
    ],
)
def test_a_signal_to_stop_is_passed_on_once_and_waited_for(number: signal.Signals) -> None:
    with controller() as process:
        wait_for_ranks(process, 1)
        for _ in range(3):
            process.send_signal(number)
        shown, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 143
    assert "the same command goes on from here" in shown
    assert "Traceback" not in shown
    expected = signal.SIGTERM if number == signal.SIGINT else number
    assert Path("runs/a/told_0").read_text() == str(int(expected))
    assert status()["status"] == "stopped"


def test_two_ranks_are_both_told_to_stop_and_can_save() -> None:
    with controller("launch.nproc_per_node=2") as process:
        wait_for_ranks(process, 2)
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 143, shown
    assert "Traceback" not in shown
    assert Path("runs/a/told_0").exists() and Path("runs/a/told_1").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_die_with_a_killed_controller_and_the_folder_is_free_again(ranks: int) -> None:
    with controller(f"launch.nproc_per_node={ranks}") as process:
        started = wait_for_ranks(process, ranks)
        with pytest.raises(UserError, match=f"process {process.pid}"):
            state.lock_run(Path("runs/a"))
        process.kill()
        process.wait()
        own = {os.getpid(), process.pid}
        assert all(gone(process_id) for process_id in set(started) - own)
    os.close(state.lock_run(Path("runs/a")))
    assert status()["status"] == "running"  # nobody was left to say otherwise; the next run goes on


# --- The report ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("behaviour", "state_then"), [("done", "done"), ("crash", "failed")])
def test_a_report_is_made_when_a_step_has_ended_well_or_not(
    behaviour: str, state_then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP", behaviour)
    go()
    assert [state_then] == REPORTED


def test_a_report_that_is_there_is_named_and_not_made_again_for_nothing() -> None:
    go()
    Path("runs/a/report.html").write_text("a report")
    REPORTED.clear()
    code, lines = go()
    assert (code, lines[-1], REPORTED) == (0, "report    runs/a/report.html", [])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no\nlines"), "RuntimeError: no lines"),
        (UserError("no run", hint="none"), "no run"),
    ],
)
def test_a_report_that_cannot_be_made_costs_one_line_and_not_the_run(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.report

    def refuse(run_dir: Path) -> Path:
        raise error

    monkeypatch.setattr(pipeline.report, "report", refuse)
    monkeypatch.setattr(run, "make_report", MAKE_REPORT)
    code, lines = go()
    assert code == 0
    assert [line for line in lines if "report" in line] == [f"warning: no report of runs/a: {said}"]


def longer(steps: int) -> PipelineConfig:
    made = config()
    made.sft.train.max_steps, made.sft.optim.scheduler = steps, SchedulerName.constant
    return made


def test_a_step_that_is_done_goes_on_when_more_steps_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    go(longer(10))
    first = status()["manifest_sha256"]
    monkeypatch.setenv("FAKE_STEP", "crash")
    for number in (2, 3):  # the artifact of the shorter run is not taken for what it makes
        assert go(longer(20))[0] == 1
        assert launches() == number and status()["continues"] == first
    monkeypatch.delenv("FAKE_STEP")
    monkeypatch.setenv("FAKE_WEIGHTS", '{"longer": true}')
    shutil.rmtree("runs/a/sft/export")
    code, lines = go(longer(20))
    assert (code, launches()) == (0, 4) and status()["manifest_sha256"] != first
    code, lines = go(longer(20))
    assert (code, launches()) == (0, 4) and "done already" in lines[-1]


def test_a_note_says_what_changed_and_settings_that_do_nothing_to_a_finished_step_start_nothing() -> None:
    go(longer(10))
    made = longer(10)
    made.sft.train.save_every = 5
    code, lines = go(made)
    assert (code, launches()) == (0, 1)
    assert lines[0] == "sft: sft.train.save_every: 0 -> 5, which changes nothing of a step that is done"
    _, lines = go(longer(20))
    assert any("changed since it was begun: sft.train.max_steps: 10 -> 20" in line for line in lines)
