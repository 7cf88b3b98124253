"""Ctrl-C in each phase of a run: it ends cleanly, says what is saved, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import compose, run, state
from pipeline.config import PROJECT
from pipeline.verify import verify_path
from tests.conftest import Command
from tests.pipeline.fakes import PROGRAMS, REWARD, SFT, config, go, launches

pytestmark = pytest.mark.usefixtures("fake_steps")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_run_told_to_stop_between_two_steps_says_so_and_goes_on_with_the_second(number: int) -> None:
    said: list[str] = []

    def interrupt(line: str) -> None:
        said.append(line)
        if line == "sft: done":
            os.kill(os.getpid(), number)

    assert run.run(config(SFT, REWARD), say=interrupt) == 143
    assert said[-2:] == [
        "sft: done",
        "stopped while no step was running; the same command goes on from here",
    ]
    assert "sft: done already" in go(config(SFT, REWARD))[0]
    assert (launches(SFT), launches(REWARD)) == (1, 1)


def test_ctrl_c_while_the_configuration_is_composed_ends_with_a_word_and_leaves_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*overrides: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(compose, "compose", interrupted)
    ended = command("run", folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    assert not Path("runs").exists()


PHASES = {
    "imports": None,
    "data": None,
    "model": None,
    "backward": 1,
    "evaluate": 4,
    "commit.write": 6,
    "export": 8,
}
"""Where Ctrl-C is pressed, each time further on, and the newest checkpoint that there is then."""


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_every_phase_ends_each_time_as_stopped_and_goes_on(
    tmp_path: Path,
) -> None:
    settings = [
        "steps=[sft]", "run_name=a", f"output_dir={tmp_path}", "launch.nproc_per_node=2",
        "tracking.wandb=off", "model.dtype=fp32", "sft.train.max_steps=8", "sft.train.eval_every=4",
        "sft.train.save_every=6", "sft.train.global_batch_size=4", "sft.train.micro_batch_size=2",
        "sft.sampling.num_prompts=0",
    ]  # fmt: skip
    checkpoints = tmp_path / "a" / "sft" / "checkpoints"
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{PROGRAMS}", "CUDA_VISIBLE_DEVICES": ""}

    def start(phase: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(PROGRAMS / "interrupted.py"), "run", *settings],
            env={**environment, "INTERRUPT": phase},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    for phase, newest in PHASES.items():
        ended = start(phase)
        said = ended.stdout + ended.stderr
        assert ended.returncode == 143, (phase, said)
        assert "sft: stopped; the same command goes on from here" in said and "Traceback" not in said, phase
        saved = sorted(path.name for path in checkpoints.glob("step_*"))
        assert (saved[-1] if saved else None) == (None if newest is None else f"step_{newest:08d}"), phase
        assert (f"told to stop: saved at step {newest}" in said) == (newest in (1, 4, 6)), (phase, said)
        assert state.read_state(tmp_path / "a" / "sft")["status"] == "stopped"  # type: ignore[index]
    ended = start("")
    assert ended.returncode == 0, ended.stderr
    assert verify_path(tmp_path / "a", say=lambda line: None) == 0
