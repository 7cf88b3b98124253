"""A hostfile, machines started through a stand-in for ssh, and through a real sshd (make faults)."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.errors import UserError
from common.launch_config import LaunchConfig
from launch import ssh
from tests import tiny_run
from tests.forked import free_port

STEPS = 150

STAND_IN = """#!/bin/bash
printf '%s\\n' "$*" >> "$CALLS/ssh"
while [[ $1 != -- ]]; do shift; done
host=$2
test "$host" = unreachable && { echo "ssh: connect to host unreachable" >&2; exit 255; }
test "$host" = bare && exec env -i PATH=/nowhere /bin/sh -c "cd /; ${3/python/no_python}"
exec /bin/sh -c "$3"
"""

PIPELINE = """
import json, os, signal, sys, time
from pathlib import Path
rank = [text for text in sys.argv if text.startswith("launch.node_rank=")][0][-1]
calls = Path(os.environ["PYTHONHASHCALLS"])
plan = json.loads((calls / "plan.json").read_text()).get(rank, {})
def stop(number, frame):
    print("told", signal.Signals(number).name, flush=True)
    (calls / f"told_{rank}").write_text(signal.Signals(number).name)
    time.sleep(plan.get("saving", 0))
    (calls / f"saved_{rank}").write_text("")
    sys.exit(143)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
(calls / f"argv_{rank}").write_text(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), sys.executable]))
(calls / f"pid_{rank}").write_text(str(os.getpid()))
print("out of", rank, flush=True)
print("error of", rank, file=sys.stderr, flush=True)
for _ in range(plan.get("lines", 0)):
    print("x" * 1000)
time.sleep(plan.get("seconds", 0))
sys.exit(plan.get("status", 0))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pipeline that only notes how it was started, and an ssh that stays on this machine."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__main__.py").write_text(PIPELINE)
    (tmp_path / "pipeline" / "__init__.py").write_text("")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(STAND_IN)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path))
    monkeypatch.setenv("PYTHONHASHCALLS", str(tmp_path))  # one of those that are passed on
    monkeypatch.chdir(tmp_path)
    behave(tmp_path)
    return tmp_path


def behave(place: Path, **plans: dict[str, float]) -> None:
    (place / "plan.json").write_text(
        json.dumps({name.removeprefix("rank_"): plan for name, plan in plans.items()})
    )


def hostfile(place: Path, text: str) -> LaunchConfig:
    (place / "hosts").write_text(text)
    return LaunchConfig(hostfile=str(place / "hosts"))


def go(config: LaunchConfig, *overrides: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    return ssh.launch(config, overrides, Path("runs/a"), lines.append), lines


def noted(place: Path, rank: int) -> tuple[list[str], str, dict[str, str], str]:
    arguments, folder, environment, python = json.loads((place / f"argv_{rank}").read_text())
    return arguments, folder, environment, python


# --- The hostfile ----------------------------------------------------------------------------------


def test_a_hostfile_has_hosts_slots_comments_and_empty_lines(tmp_path: Path) -> None:
    text = "# ours\n\nnode-a slots=8\n  me@node-b   slots=4 # the old one\nnode-c\n"
    hosts = ssh.read_hostfile(Path(hostfile(tmp_path, text).hostfile or ""))
    assert [(host.name, host.slots, host.line) for host in hosts] == [
        ("node-a", 8, 3), ("me@node-b", 4, 4), ("node-c", None, 5),
    ]  # fmt: skip
    assert hosts[1].address == "node-b"
    assert (
        ssh.Host("me@localhost", 1, 1).address == ssh.Host("localhost", 1, 1).address == socket.gethostname()
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=2\nb slots=0\n", "line 2: slots=0 is not understood"),
        ("a slot=2\n", "line 1: slot=2 is not understood"),
        ("a slots=2 gpus=2\n", "line 1: slots=2 gpus=2 is not understood"),
        ("a 4\n", "line 1: 4 is not understood"),
        ("a slots=2\n\na slots=2\n", "line 3: a is there already \\(line 1\\)"),
        ("-oProxyCommand=sh slots=1\n", "line 1: -oProxyCommand=sh is not the name of a host"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_line_that_is_no_host_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ssh.read_hostfile(Path(hostfile(tmp_path, text).hostfile or ""))


def test_a_hostfile_that_is_missing_or_not_given_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="launch.hostfile=.* cannot be read: No such file"):
        go(LaunchConfig(hostfile=str(tmp_path / "none")))
    with pytest.raises(UserError, match="launch.hostfile is missing"):
        go(LaunchConfig())


def test_nnodes_takes_the_first_and_not_more_than_there_are(tmp_path: Path) -> None:
    config = hostfile(tmp_path, "a slots=2\nb slots=2\nc slots=2\n")
    hosts = ssh.read_hostfile(tmp_path / "hosts")
    assert [host.name for host in ssh.choose(hosts, config)] == ["a", "b", "c"]
    config.nnodes = 2
    assert [host.name for host in ssh.choose(hosts, config)] == ["a", "b"]
    config.nnodes = 4
    with pytest.raises(UserError, match="launch.nnodes=4, but .* names 3 host"):
        ssh.choose(hosts, config)


def test_more_ranks_than_slots_are_refused(tmp_path: Path) -> None:
    config = hostfile(tmp_path, "a slots=2\n")
    config.nproc_per_node = "4"
    with pytest.raises(UserError, match="launch.nproc_per_node=4, but .*, line 1 offers a slots=2"):
        go(config)


# --- Starting --------------------------------------------------------------------------------------


def test_every_machine_runs_the_command_in_the_same_folder_with_its_number_and_slots(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = hostfile(place, "localhost slots=2\nnode-b slots=3\n")
    config.rdzv_endpoint = "node-a:4000"
    config.ssh_options = ["-p 2222", "-i", "my key"]
    typed = ["steps=[sft]", 'sft.data.path="it\'s $HOME.jsonl"', "launch=ssh", "launch.hostfile=hosts"]
    assert go(config, *typed)[0] == 0
    shared = [
        "run",
        *typed[:2],
        "launch=local",
        "launch.nnodes=2",
        "run_name=a",
        "launch.rdzv_endpoint=node-a:4000",
    ]
    for rank, slots in enumerate([2, 3]):
        arguments, folder, _, python = noted(place, rank)
        assert arguments == [*shared, f"launch.node_rank={rank}", f"launch.nproc_per_node={slots}"]
        assert (folder, python) == (str(place), sys.executable)
    assert len((place / "ssh").read_text().splitlines()) == 1  # localhost needs none
    assert "-p 2222 -i my key -- node-b" in (place / "ssh").read_text()
    printed = capfd.readouterr()
    assert sorted(printed.out.splitlines()) == ["[localhost] out of 0", "[node-b] out of 1"]
    assert sorted(printed.err.splitlines()) == ["[localhost] error of 0", "[node-b] error of 1"]


@pytest.mark.parametrize("typed", [["launch.nproc_per_node=2"], ["++launch.nproc_per_node=2"], []])
def test_ranks_that_are_set_take_the_place_of_slots(place: Path, typed: list[str]) -> None:
    config = hostfile(place, "node-a slots=4\n")
    config.nproc_per_node = "2"  # typed, or of an experiment
    go(config, *typed)
    assert [text for text in noted(place, 0)[0] if "nproc" in text] == typed


def test_an_option_of_ssh_that_no_shell_could_read_is_named(place: Path) -> None:
    config = hostfile(place, "node-a slots=4\n")
    config.ssh_options = ["-p 2222", "-o ProxyCommand='x"]
    with pytest.raises(
        UserError, match="launch.ssh_options: -o ProxyCommand='x is not understood: No closing"
    ):
        go(config)


def test_where_they_meet_is_the_first_host_at_an_even_port(place: Path) -> None:
    _, lines = go(hostfile(place, "me@node-a slots=1\nnode-b slots=1\n"))
    (endpoint,) = {text for rank in range(2) for text in noted(place, rank)[0] if "rdzv" in text}
    host, _, port = endpoint.removeprefix("launch.rdzv_endpoint=").partition(":")
    assert host == "node-a" and 20000 <= int(port) < 32000 and int(port) % 2 == 0
    assert f"{host}:{port}" in lines[0]


def test_credentials_reach_the_machines_but_no_command_line(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("UNRELATED", "kept here")
    assert go(hostfile(place, "node-a slots=1\n"))[0] == 0
    environment = noted(place, 0)[2]
    assert environment["WANDB_API_KEY"] == "0123456789secret" and environment["NCCL_DEBUG"] == "INFO"
    assert "secret" not in (place / "ssh").read_text()
    assert "UNRELATED" not in ssh.passed_on(os.environ)


# --- Ends ------------------------------------------------------------------------------------------


def test_when_one_ends_badly_the_others_are_told_to_save_and_its_status_is_the_run_s(place: Path) -> None:
    behave(place, rank_0={"seconds": 60, "saving": 0.3}, rank_1={"seconds": 0.3, "status": 7})
    status, lines = go(hostfile(place, "node-a slots=1\nnode-b slots=1\n"))
    assert status == 7
    assert (place / "saved_0").exists() and not (place / "told_1").exists()
    assert lines[-1] == "node-b: ended with exit status 7; the others are stopped"


@pytest.mark.parametrize(
    ("name", "status", "said"), [("unreachable", 255, "not reached"), ("bare", 127, "needs the same folder")]
)
def test_a_machine_that_cannot_be_used_is_named(place: Path, name: str, status: int, said: str) -> None:
    behave(place, rank_0={"seconds": 60})
    code, lines = go(hostfile(place, f"node-a slots=1\n{name} slots=1\n"))
    assert code == status
    assert lines[-1].startswith(f"{name}: {said}")


def test_this_machine_s_part_that_does_not_stop_is_killed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphaned: list[object] = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: orphaned.append(process.args))
    monkeypatch.setattr(ssh, "SAVE_SECONDS", 0.2)
    behave(place, rank_0={"saving": 600, "seconds": 600}, rank_1={"seconds": 0.5, "status": 7})
    assert go(hostfile(place, "localhost slots=1\nnode-b slots=1\n"))[0] == 7
    wait_for(place, "told_0")
    assert not Path("/proc", (place / "pid_0").read_text()).exists() and orphaned == []


def test_when_the_launcher_breaks_off_this_machine_s_part_still_saves(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(run: ssh.Run) -> int:
        wait_for(place, "argv_0")
        raise OSError("broken off")

    monkeypatch.setattr(ssh.Run, "wait", break_off)
    behave(place, rank_0={"seconds": 600})
    with pytest.raises(OSError, match="broken off"):
        go(hostfile(place, "localhost slots=1\n"))
    wait_for(place, "saved_0")


DRIVE = """
import sys
from pathlib import Path
from common.launch_config import LaunchConfig
from launch import ssh
sys.exit(ssh.launch(LaunchConfig(hostfile="hosts"), [], Path("runs/a"), lambda line: print(line, flush=True)))
"""


def started(place: Path) -> subprocess.Popen[str]:
    """The launcher as a process of its own, once both of its machines run."""
    behave(place, rank_0={"seconds": 60, "saving": 0.3}, rank_1={"seconds": 60, "saving": 0.3})
    process = driven(place)
    wait_for(place, "argv_0", "argv_1")
    time.sleep(0.1)  # argv is written a moment before the first line
    return process


def driven(place: Path) -> subprocess.Popen[str]:
    """The launcher as a process of its own."""
    (place / "hosts").write_text("localhost slots=1\nnode-b slots=1\n")
    return subprocess.Popen(
        [sys.executable, "-c", DRIVE],
        env={**os.environ, "PYTHONPATH": str(tiny_run.ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(place: Path, *names: str) -> None:
    end = time.monotonic() + 60
    while not all((place / name).exists() for name in names):
        assert time.monotonic() < end, names
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("sent", "arrives"), [("SIGINT", "SIGTERM"), ("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1")]
)
def test_a_signal_reaches_every_machine_once(place: Path, sent: str, arrives: str) -> None:
    process = started(place)
    os.killpg(process.pid, signal.Signals[sent])  # as a terminal does with Ctrl-C
    wait_for(place, "told_0", "told_1")
    os.killpg(process.pid, signal.Signals[sent])  # a second one changes nothing
    assert process.wait(60) == 143
    assert {(place / f"told_{rank}").read_text() for rank in range(2)} == {arrives}
    assert all((place / f"saved_{rank}").exists() for rank in range(2))
    assert process.stdout is not None and process.stdout.read().count("told") == 2


def test_when_the_launcher_is_killed_the_machines_still_save(place: Path) -> None:
    process = started(place)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    wait_for(place, "saved_0", "saved_1")


def test_a_reader_that_leaves_does_not_hold_the_machines_up(place: Path) -> None:
    behave(place, rank_0={"lines": 1000}, rank_1={"lines": 1000})
    process = driven(place)
    assert process.stdout is not None and process.stdout.readline().startswith("ssh")
    process.stdout.close()
    assert process.wait(60) == 0


def test_what_a_machine_prints_after_its_reader_has_left_does_not_disturb_it(tmp_path: Path) -> None:
    program = f"for _ in range(200): print('x' * 1000, flush=True)\nopen({str(tmp_path / 'end')!r}, 'w')"
    remote = subprocess.Popen(
        [sys.executable, "-m", "launch.remote"],
        cwd=tiny_run.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert remote.stdin is not None and remote.stdout is not None
    remote.stdout.close()
    order = {"command": [sys.executable, "-c", program], "environment": {}, "folder": str(tmp_path)}
    remote.stdin.write(json.dumps(order).encode() + b"\n")
    remote.stdin.flush()
    assert remote.wait(60) == 0
    assert (tmp_path / "end").exists()


# --- A real sshd -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A server of its own port and keys; the options that reach it."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or os.geteuid() != 0:
        pytest.skip("needs root and openssh-server (make faults installs it)")
    folder = tmp_path_factory.mktemp("sshd")
    port = free_port()
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "me"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nListenAddress 127.0.0.2\nHostKey {folder}/host\n"
        f"AuthorizedKeysFile {folder}/me.pub\nPidFile {folder}/pid\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin yes\n"
    )
    with ExitStack() as stack:
        log = stack.enter_context(open(folder / "log", "wb"))
        server = subprocess.Popen([program, "-D", "-e", "-f", str(folder / "conf")], stderr=log)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        options = [f"-p {port}", f"-i {folder}/me", f"-o UserKnownHostsFile={folder}/known"]
        options += ["-o StrictHostKeyChecking=accept-new", "-o IdentitiesOnly=yes"]
        words = [word for text in options for word in text.split()]
        end = time.monotonic() + 30
        while subprocess.run(["ssh", *words, "-o", "BatchMode=yes", "127.0.0.1", "true"]).returncode != 0:
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.1)
        yield options


def over_ssh(tmp_path: Path, options: list[str], *overrides: str) -> list[str]:
    (tmp_path / "hosts").write_text(f"127.0.0.1 slots=1\n{getpass.getuser()}@127.0.0.2 slots=1\n")
    quoted = ", ".join(f'"{text}"' for text in options)
    return [
        *tiny_run.sft(tmp_path, steps=STEPS), "run_name=in parts", "launch=ssh",
        f'launch.hostfile="{tmp_path}/hosts"', f"launch.ssh_options=[{quoted}]", *overrides,
    ]  # fmt: skip


@pytest.mark.cluster
def test_two_machines_over_a_real_sshd_stop_on_ctrl_c_and_go_on_bit_identically(
    sshd: list[str], tmp_path: Path
) -> None:
    whole = tiny_run.finish(
        [*tiny_run.sft(tmp_path, steps=STEPS), "run_name=whole", "launch.nproc_per_node=2"]
    )
    command = over_ssh(tmp_path, sshd)
    run_dir = tmp_path / "runs" / "in parts"
    process = tiny_run.start(command)
    tiny_run.wait_until(lambda: tiny_run.steps_done(run_dir) >= 30 or process.poll() is not None, lambda: "")
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=tiny_run.PATIENCE_SECONDS)[0]
    assert process.returncode == 143, printed
    assert "[127.0.0.1] sft: stopped" in printed
    assert 30 <= tiny_run.steps_done(run_dir) < STEPS
    printed = tiny_run.finish(command)
    assert "[127.0.0.1] sft: going on" in printed
    assert tiny_run.weights(run_dir) == tiny_run.weights(tmp_path / "runs" / "whole"), whole


@pytest.mark.cluster
def test_a_connection_that_breaks_stops_every_machine_with_its_state_saved(
    sshd: list[str], tmp_path: Path
) -> None:
    command = over_ssh(tmp_path, sshd)
    run_dir = tmp_path / "runs" / "in parts"
    process = tiny_run.start(command)
    tiny_run.wait_until(lambda: tiny_run.steps_done(run_dir) >= 30 or process.poll() is not None, lambda: "")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)  # the client that leads to the second machine
    printed = process.communicate(timeout=tiny_run.PATIENCE_SECONDS)[0]
    assert process.returncode not in (0, None), printed
    assert "@127.0.0.2: ended with exit status 137; the others are stopped" in printed
    saved = sorted((run_dir / "sft" / "checkpoints").glob("step_*"))
    assert saved and not saved[-1].name.endswith(".tmp"), printed
