"""Injected faults: what the variable may say, and when a fault happens."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import phases
from common.errors import UserError
from common.phases import ACTIONS, PHASES, Faults, InjectedError, enter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def unarmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restores the phase and the faults of this process."""
    monkeypatch.setattr(phases, "_current", phases.current())
    monkeypatch.setattr(phases, "_faults", None)
    yield


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("point=saving,do=kill", r"there is no point 'saving'; known: start, data, .*commit\.rename"),
        ("do=kill", "it names no point; known: start"),
        ("point=save", "it names no do; known: kill, term, stop"),
        ("point=save,do=explode", "there is no do 'explode'; known: kill"),
        ("point=save,do=kill,at=3", "it has no 'at'; the keys are point, do, rank, step, nth, once"),
        ("point=save,do=kill,rank=first", "rank=first is not a number from 0"),
        ("point=save,do=kill,step=-1", "step=-1 is not a number from 0"),
        ("point=save,do=kill,nth=0", "nth=0 is not a number from 1"),
        ("point=save,do=nan", "at point=backward only"),
        ("save", "it has no 'save'"),
        ("point=save,do=kill,rank=0,rank=1", "it names rank twice; several faults are separated by ;"),
        ("point=save,do=kill,once=/nowhere/a", "once=/nowhere/a cannot be made: there is no folder /nowhere"),
        ("point=save,do=kill;point=update,do=nothing", "there is no do 'nothing'"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_is_known(text: str, named: str) -> None:
    for rank in (0, 7):  # also by ranks that it does not concern
        with pytest.raises(UserError, match=named) as refused:
            Faults.parse(text, rank)
        assert refused.value.hint == 'for example RLHF_FAULT="point=save,rank=1,step=20,do=kill"'


def test_a_fault_happens_once_at_its_point_in_its_step_on_its_rank() -> None:
    faults = Faults.parse("point=backward,rank=1,step=3,do=nan", 1)
    passed = [("backward", 2), ("update", 3), ("backward", 3), ("backward", 3), ("backward", 4)]
    assert [faults.inject(point, step) for point, step in passed] == [False, False, True, False, False]
    other = Faults.parse("point=backward,rank=1,step=3,do=nan", 0)
    assert not any(other.inject(point, step) for point, step in passed)


def test_without_rank_and_step_every_rank_has_it_at_the_first_passage_and_nth_counts_them() -> None:
    for rank in (0, 5):
        faults = Faults.parse(" point=backward , do=nan ; point=backward, nth=3, do=nan;", rank)
        assert [faults.inject("backward", step) for step in (None, 1, 1, 2)] == [True, False, True, False]


def test_a_fault_with_a_file_happens_in_one_process_of_all(tmp_path: Path) -> None:
    text = f"point=backward,do=nan,once={tmp_path / 'happened'}"
    first, second = Faults.parse(text, 0), Faults.parse(text, 0)
    assert first.inject("backward", 1) and not second.inject("backward", 1)
    assert (tmp_path / "happened").exists()


def test_what_happens_is_what_was_asked(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InjectedError, match="raise at save, step 4"):
        Faults.parse("point=save,do=raise", 0).inject("save", 4)
    with pytest.raises(OSError) as full:
        Faults.parse("point=save,do=enospc", 0).inject("save", 4)
    assert full.value.errno == errno.ENOSPC
    received: list[int] = []
    kept = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        assert not Faults.parse("point=save,do=term", 0).inject("save", 4)
    finally:
        signal.signal(signal.SIGTERM, kept)
    assert received == [signal.SIGTERM]
    for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
        child = os.fork()
        if child == 0:
            Faults.parse(f"point=save,do={name}", 0).inject("save", 4)
            os._exit(3)
        _, status = os.waitpid(child, os.WUNTRACED)
        assert (os.WTERMSIG(status) if name == "kill" else os.WSTOPSIG(status)) == number
        os.kill(child, signal.SIGKILL) if name == "stop" else None
    assert capfd.readouterr().err.count("injected fault: ") == 5


def test_a_step_is_remembered_until_the_next_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_FAULT", "point=backward,step=7,do=nan")
    phases.arm_faults(0)
    assert not enter("step", 6) and not enter("backward") and not enter("step", 7)
    assert str(phases.current()) == "step 7, training"
    assert enter("backward") and not enter("backward")
    assert (phases.current().name, phases.current().step) == ("backward", 7)


def test_without_the_variable_nothing_is_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_FAULT", raising=False)
    phases.arm_faults(0)
    assert phases._faults is None and not enter("backward", 1)


def test_every_point_is_passed_somewhere_and_every_one_that_is_passed_is_known() -> None:
    folders = ("common", "step1_sft", "step2_reward", "step2_dpo", "step3_ppo")
    programs = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    passed = {name for path in programs for name in re.findall(r'\benter\("([\w.]+)"', path.read_text())}
    assert passed == set(PHASES)


def test_the_documentation_names_every_point_and_action() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    assert not [name for name in [*PHASES, *ACTIONS] if f"`{name}`" not in text]
