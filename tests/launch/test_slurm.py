"""The sbatch file: what it asks for, what it runs, and a real two-node cluster that runs it (make faults)."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import UserError
from common.launch_config import LaunchConfig, SlurmConfig
from launch import slurm
from launch.command import machine_arguments, override
from tests import tiny_run
from tests.forked import free_port
from tests.launch.slurm_cluster import Cluster, cluster, is_possible

RUN_DIR = Path("/shared/runs/a b")


def rendered(*overrides: str, **launch: object) -> str:
    config = LaunchConfig(**{"nnodes": 2, **launch})  # type: ignore[arg-type]
    arguments = machine_arguments(overrides, config.nnodes, {"run_name": RUN_DIR.name})
    return slurm.render(config, arguments, RUN_DIR, Path("/home/me/my project"), "/venv/bin/python")


def options(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


# --- The command -----------------------------------------------------------------------------------


def test_the_command_of_a_machine_is_what_was_typed_without_the_launcher() -> None:
    typed = [
        "steps=[sft]",
        "launch=slurm",
        "launch.nnodes=2",
        "launch.slurm.partition=gpu",
        "sft.optim.lr=1e-4",
    ]
    typed += ["launch.nproc_per_node=4", "launch.max_restarts=3", "run_name=old", "++launch.slurm.qos=low"]
    assert machine_arguments(typed, 2, {"run_name": "new"}) == [
        "run", "steps=[sft]", "sft.optim.lr=1e-4", "launch.nproc_per_node=4", "launch.max_restarts=3",
        "launch=local", "launch.nnodes=2", "run_name=new",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value", ["plain-1.0", "a b", 'say "hi"', "it's", "back\\", '\\"', "[1,2]", "a=b", "é"]
)
def test_hydra_reads_back_every_value_that_is_added(value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(override("run_name", value))
    assert (parsed.key_or_group, parsed.value()) == ("run_name", value)


# --- The file --------------------------------------------------------------------------------------


def test_the_file_asks_for_what_is_set_and_for_nothing_else() -> None:
    asked = options(rendered())
    assert asked == {
        "job-name": '"a b"', "nodes": "2", "ntasks-per-node": "1", "open-mode": "append", "requeue": "",
        "output": '"/shared/runs/a b/slurm/%j.out"', "signal": "B:USR1@300",
    }  # fmt: skip
    everything = SlurmConfig(
        partition="gpu", account="lab", qos="low", time="04:00:00", gpus_per_node=8, cpus_per_task=16,
        mem="64G", signal_seconds=60, requeue=False, options=["--exclusive", "--constraint=a100&nvlink"],
    )  # fmt: skip
    more = options(rendered(slurm=everything))
    assert more.items() >= {
        "partition": "gpu", "account": "lab", "qos": "low", "time": "04:00:00", "gpus-per-node": "8",
        "cpus-per-task": "16", "mem": "64G", "signal": "B:USR1@60", "no-requeue": "", "exclusive": "",
    }.items()  # fmt: skip
    assert "#SBATCH --constraint=a100&nvlink" in rendered(slurm=everything)
    assert "requeue" not in more and "scontrol requeue" not in rendered(slurm=everything)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("6", 360), ("90", 5400), ("5:30", 330), ("90:00", 5400), ("1:02:03", 3723), ("1-0", 86400),
        ("0-1", 3600), ("2-03:04", 183840), ("0-00:06", 360), ("1-02:03:04", 93784), ("UNLIMITED", None),
        ("1:2:3:4", None), ("", None), ("-1", None),
    ],
)  # fmt: skip
def test_a_limit_is_read_as_sbatch_reads_it(time: str, seconds: int | None) -> None:
    assert slurm.seconds_of(time) == seconds


@pytest.mark.parametrize("time", ["6", "06:00", "0:06:00", "0-0:6", "1"])
def test_a_limit_that_leaves_no_time_to_train_is_refused(time: str) -> None:
    with pytest.raises(UserError, match=f"launch.slurm.time={time} leaves no time to train"):
        rendered(slurm=SlurmConfig(time=time))
    rendered(slurm=SlurmConfig(time=time, signal_seconds=10) if time == "6" else SlurmConfig(time="6:01"))


def test_a_percent_sign_in_the_folder_is_not_taken_for_a_job_number() -> None:
    config = LaunchConfig()
    text = slurm.render(config, [], Path("/runs/50%j"), Path("/"), "python")
    assert options(text)["output"] == "/runs/50%%j/slurm/%j.out"


@pytest.mark.parametrize(
    "bad",
    [
        SlurmConfig(partition="gpu\n#SBATCH --account=other"),
        SlurmConfig(time='1:00:00" --wrap="rm'),
        SlurmConfig(options=["--exclusive\ntouch /tmp/x"]),
        SlurmConfig(options=["touch /tmp/x"]),
        SlurmConfig(setup=["module load cuda\nexit"]),
        SlurmConfig(mem="64G\r"),
    ],
)
def test_no_value_can_add_a_line_to_the_file(bad: SlurmConfig) -> None:
    with pytest.raises(UserError):
        rendered(slurm=bad)


def test_a_value_that_looks_like_shell_stays_one_argument() -> None:
    text = rendered("sft.data.path=\"$(touch /tmp/x) `id` 'a'\"")
    assert "    " + shlex.quote("sft.data.path=\"$(touch /tmp/x) `id` 'a'\"") in text.splitlines()


# --- What the file does, with commands that stand in for SLURM's -----------------------------------

STAND_INS = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for node in $(seq 0 $((NODES - 1))); do SLURM_NODEID=$node "$@" & all="$all $!"; done
        trap 'kill $all' TERM
        worst=0
        for one in $all; do wait $one; code=$?; (( code > worst )) && worst=$code; done
        exit $worst
    """,
    "scontrol": 'case $1 in show) echo first; echo second;; *) echo "$@" >> "$CALLS";; esac',
    "squeue": 'date --date "now + $LEFT" +%Y-%m-%dT%H:%M:%S 2>/dev/null || echo NONE',
    "python": """
        node=$(printf '%s\\n' "$@" | grep launch.node_rank)
        printf '%s\\0' "$@" > "$CALLS.$node"
        trap 'echo saved >> "$CALLS.$node.said"; exit ${SAVED:-143}' USR1
        echo ready >> "$CALLS.$node.said"
        if test -n "$LONG"; then for i in $(seq 600); do sleep 0.05; done; fi
        exit ${STATUS:-0}
    """,
}


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}")
        (folder / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
        "NODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]",
        "LEFT": "no end",
    }  # fmt: skip


def script(tmp_path: Path, *overrides: str, python: str | None = None, **launch: object) -> list[str]:
    config = LaunchConfig(**{"nnodes": 2, **launch})  # type: ignore[arg-type]
    run_dir = tmp_path / "my runs" / "a"
    (run_dir / "slurm").mkdir(parents=True)
    arguments = machine_arguments(overrides, config.nnodes, {"run_name": "a"})
    text = slurm.render(config, arguments, run_dir, tmp_path, python or str(tmp_path / "bin" / "python"))
    path = run_dir / "slurm" / "job.sh"
    path.write_text(text)
    return ["bash", str(path)]


def calls(tmp_path: Path, node: int) -> list[str]:
    return (tmp_path / f"calls.launch.node_rank={node}").read_text().split("\0")[:-1]


def test_every_node_runs_the_same_command_with_its_own_number(
    tmp_path: Path, stand_ins: dict[str, str]
) -> None:
    typed = ["steps=[sft,reward]", 'sft.data.path="it\'s $HOME.jsonl"', "sft.data.columns={prompt: q}"]
    setup = ["export SETUP=done"]
    command = script(tmp_path, *typed, slurm=SlurmConfig(setup=setup))
    assert subprocess.run(command, env=stand_ins).returncode == 0
    shared = ["-m", "pipeline", "run", *typed, "launch=local", "launch.nnodes=2", "run_name=a"]
    endpoint = "launch.rdzv_endpoint=first:20014"  # from the job's number
    assert [calls(tmp_path, node) for node in range(2)] == [
        [*shared, endpoint, f"launch.node_rank={node}"] for node in range(2)
    ]
    assert not (tmp_path / "calls").exists()


def test_setup_may_name_another_interpreter(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    setup = [f"RLHF_PYTHON={tmp_path}/bin/python"]
    command = script(tmp_path, slurm=SlurmConfig(setup=setup), python="/not/there")
    assert subprocess.run(command, env=stand_ins).returncode == 0
    assert calls(tmp_path, 0)[:3] == ["-m", "pipeline", "run"]


def test_the_place_to_meet_can_be_given(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    subprocess.run(script(tmp_path, rdzv_endpoint="10.0.0.1:4000"), env=stand_ins, check=True)
    assert calls(tmp_path, 1)[-2:] == ["launch.rdzv_endpoint=10.0.0.1:4000", "launch.node_rank=1"]


@pytest.mark.parametrize("status", [1, 2, 137, 143])
def test_the_exit_status_is_passed_on_and_nothing_is_queued_again(
    tmp_path: Path, stand_ins: dict[str, str], status: int
) -> None:
    done = subprocess.run(script(tmp_path), env={**stand_ins, "STATUS": str(status)})
    assert done.returncode == status
    assert not (tmp_path / "calls").exists()  # 143 without having been told: it was cancelled


@pytest.mark.parametrize(
    ("saved", "requeue", "queued"), [(143, True, True), (143, False, False), (1, True, False)]
)
def test_told_to_leave_the_first_node_saves_and_the_job_is_queued_again(
    tmp_path: Path, stand_ins: dict[str, str], saved: int, requeue: bool, queued: bool
) -> None:
    command = script(tmp_path, nnodes=1, slurm=SlurmConfig(requeue=requeue))
    status, _ = told_to_leave(tmp_path, command, {**stand_ins, "SAVED": str(saved)})
    assert status == saved
    assert (tmp_path / "calls").exists() == queued
    if queued:
        assert (tmp_path / "calls").read_text() == "requeue 7\n"


def told_to_leave(tmp_path: Path, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run it, with SIGUSR1 as soon as the command runs; its exit status and what it said."""
    process = subprocess.Popen(
        command, env={**environment, "LONG": "1", "NODES": "1"}, stderr=subprocess.PIPE, text=True
    )
    said = tmp_path / "calls.launch.node_rank=0.said"
    while not said.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    printed = process.communicate(timeout=60)[1]
    assert said.read_text().split() == ["ready", "saved"]
    return process.returncode, printed


@pytest.mark.parametrize(("left", "queued"), [("340 seconds", False), ("370 seconds", True)])
def test_a_job_whose_time_is_up_when_it_begins_is_not_queued_again(
    tmp_path: Path, stand_ins: dict[str, str], left: str, queued: bool
) -> None:
    status, printed = told_to_leave(tmp_path, script(tmp_path, nnodes=1), {**stand_ins, "LEFT": left})
    assert status == 143 and (tmp_path / "calls").exists() == queued
    assert ("launch.slurm.time must be well over launch.slurm.signal_seconds" in printed) != queued


# --- Submitting ------------------------------------------------------------------------------------


def test_the_file_is_written_and_said_where_when_it_is_not_to_be_submitted(tmp_path: Path) -> None:
    lines: list[str] = []
    assert slurm.launch(LaunchConfig(submit=False), [], tmp_path / "a", lines.append) == 0
    path = tmp_path / "a" / "slurm" / "job.sh"
    assert path.exists() and any(str(path) in line and "sbatch" in line for line in lines)


def test_a_job_that_would_get_one_core_is_told_so(tmp_path: Path) -> None:
    def note(asked: SlurmConfig) -> bool:
        lines: list[str] = []
        slurm.launch(LaunchConfig(submit=False, slurm=asked), [], tmp_path / "a", lines.append)
        return any("one core" in line for line in lines)

    assert note(SlurmConfig(gpus_per_node=8))
    assert not note(SlurmConfig(cpus_per_task=16))
    assert not note(SlurmConfig(options=["--exclusive"]))


def test_without_sbatch_the_error_says_that_the_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch .* is written but not submitted"):
        slurm.launch(LaunchConfig(), [], tmp_path / "a", lambda line: None)
    assert (tmp_path / "a" / "slurm" / "job.sh").exists()


# --- A real cluster --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not is_possible():
        pytest.skip("needs root, and slurmctld, slurmd and slurm-client (make faults installs them)")
    with cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.mark.cluster
@pytest.mark.parametrize("nnodes", [1, 2])
def test_a_job_that_is_told_to_leave_is_queued_again_and_ends_as_if_nothing_had_happened(
    two_nodes: Cluster, tmp_path: Path, nnodes: int
) -> None:
    overrides = tiny_run.sft(tmp_path, steps=150)
    ranks = ["launch.nproc_per_node=1"] if nnodes == 2 else ["launch.nproc_per_node=2"]
    whole = tiny_run.finish([*overrides, "launch.nproc_per_node=2", "run_name=whole"])
    port = free_port()
    submitted = tiny_run.finish(
        [*overrides, *ranks, "run_name=in parts", "launch=slurm", f"launch.nnodes={nnodes}",
         f"launch.rdzv_endpoint=127.0.0.1:{port}"],
        two_nodes.environment,
    )  # fmt: skip
    job = submitted.partition("job ")[2].split()[0]
    run_dir = tmp_path / "runs" / "in parts"
    log = run_dir / "slurm" / f"{job}.out"
    tiny_run.wait_until(lambda: tiny_run.steps_done(run_dir) >= 30, lambda: log.read_text())
    two_nodes.ask("scancel", "--batch", "--signal=USR1", job)
    two_nodes.wait_for(job, "PENDING")
    stopped_at = tiny_run.steps_done(run_dir)
    assert 30 <= stopped_at < 150
    assert "told to leave" in log.read_text()
    two_nodes.ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # it would wait two minutes
    state = two_nodes.wait_for(job, "COMPLETED", "FAILED", "CANCELLED")
    printed = log.read_text()
    assert state == "COMPLETED", printed[-3000:]
    assert two_nodes.show(job, "Restarts") == "1"
    assert "sft: starting in" in printed and "sft: going on in" in printed
    assert tiny_run.weights(run_dir) == tiny_run.weights(tmp_path / "runs" / "whole"), whole
