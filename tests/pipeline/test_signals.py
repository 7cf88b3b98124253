"""Signals reach the controller in a process of its own: what its ranks are told, and what is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline import state
from tests.pipeline.fakes import PATIENCE_SECONDS, PROGRAMS, status

pytestmark = pytest.mark.usefixtures("fake_steps")


DRIVE = [sys.executable, str(PROGRAMS / "drive.py")]


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
