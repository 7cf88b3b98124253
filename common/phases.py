"""Which phase of the run this rank is in, and faults that are injected there.

Recipes and mechanisms call `enter` at named phases, and the heartbeat (`heartbeat.py`) reports the phase.
Faults are injected to try what a cluster does to a run: `RLHF_FAULT="point=save,rank=1,step=20,do=kill"`.
Several faults are separated by `;`. Keys:

    point   the phase: one of PHASES
    do      the fault: one of ACTIONS
    rank    the rank; all ranks by default
    step    the step (PPO: iteration); any step by default
    nth     which matching entry of the phase, from 1; 1 by default
    once    a file that is created when the fault happens; while it exists, the fault does not happen again,
            also after a restart

A fault happens at most once per process. Without RLHF_FAULT nothing is computed here.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError

VARIABLE = "RLHF_FAULT"

PHASES = {
    "start": "starting",
    "data": "preparing its data",
    "model": "loading its model",
    "load": "loading a checkpoint",
    "step": "training",
    "backward": "the backward pass",
    "update": "the update of the weights",
    "rollout": "sampling responses",
    "score": "scoring responses",
    "evaluate": "evaluating",
    "save": "saving a checkpoint",
    "commit.write": "writing its part of a checkpoint",
    "commit.hash": "hashing a checkpoint",
    "commit.manifest": "writing a checkpoint's manifest",
    "commit.rename": "committing a checkpoint",
    "commit.forget": "deleting old checkpoints",
    "commit.end": "after a checkpoint",
    "export": "exporting",
}
"""Every phase by name, and what a rank in it is doing."""

ACTIONS = {
    "kill": "SIGKILL to itself",
    "term": "SIGTERM to itself",
    "stop": "SIGSTOP to itself: the process is there and does nothing",
    "hang": "waits for ever",
    "freeze": "waits for ever in a function that keeps the interpreter's lock, so that no thread runs",
    "raise": "raises an error that is nobody's",
    "enospc": "raises what a full disk raises",
    "eio": "raises what a broken disk raises",
    "emfile": "raises what too many open files raise, which is not the disk's fault",
    "nan": "makes the loss NaN; at the phase backward only",
}
"""Every fault that can be injected."""

_EXAMPLE = f'for example {VARIABLE}="point=save,rank=1,step=20,do=kill"'
log = logging.getLogger("rlhf.faults")


@dataclass(frozen=True)
class Phase:
    """The phase that was entered last, and its step (None: before the first)."""

    name: str
    step: int | None

    def __str__(self) -> str:
        step = "" if self.step is None else f"step {self.step}, "
        return f"{step}{PHASES[self.name]}"


_current = Phase("start", None)
_faults: Faults | None = None


def enter(name: str, step: int | None = None, *, beside: bool = False) -> bool:
    """Record that this rank enters a phase. step: None keeps the step of the phase before. beside: a thread
    enters it, while the rank stays where it is.

    Returns True when an injected fault asks for a NaN loss, at `backward` only.
    """
    global _current
    if not beside:
        _current = Phase(name, _current.step if step is None else step)
    return _faults is not None and _faults.inject(name, _current.step)


def current() -> Phase:
    """The phase that this rank entered last."""
    return _current


def arm_faults(rank: int) -> None:
    """Let the faults of RLHF_FAULT happen on this rank. UserError when the variable cannot be parsed."""
    global _faults
    if text := os.environ.get(VARIABLE):
        _faults = Faults.parse(text, rank)


class InjectedError(RuntimeError):
    """What `do=raise` raises."""


@dataclass
class Fault:
    """One fault of one rank, and how often its point was passed."""

    point: str
    do: str
    rank: int | None = None
    step: int | None = None
    nth: int = 1
    once: Path | None = None
    passed: int = field(default=0, init=False)

    def is_due(self, point: str, step: int | None) -> bool:
        """Count a passage; True at the one that is meant."""
        if point != self.point or self.step not in (None, step):
            return False
        self.passed += 1
        return self.passed == self.nth and self._is_first()

    def _is_first(self) -> bool:
        if self.once is None:
            return True
        try:
            self.once.open("x").close()
        except FileExistsError:
            return False
        return True


class Faults:
    """The faults of this process."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = faults

    @classmethod
    def parse(cls, text: str, rank: int) -> Faults:
        """Those of the rank, out of all that the variable names. UserError that says what is allowed."""
        found = [_parse(part) for part in text.split(";") if part.strip()]
        return cls([fault for fault in found if fault.rank in (None, rank)])

    def inject(self, point: str, step: int | None) -> bool:
        """Let what is due here happen; True when a loss is to be not a number."""
        due = [fault for fault in self._faults if fault.is_due(point, step)]
        return bool([fault for fault in due if _happen(fault, step)])


def _parse(text: str) -> Fault:
    given: dict[str, str] = {}
    allowed = ("point", "do", "rank", "step", "nth", "once")
    for part in text.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in allowed:
            raise _refused(text, f"it has no {key!r}; the keys are {', '.join(allowed)}")
        if key in given:
            raise _refused(text, f"it names {key} twice; several faults are separated by ;")
        given[key] = value
    for key, known in (("point", PHASES), ("do", ACTIONS)):
        if given.get(key) not in known:
            what = f"there is no {key} {given[key]!r}" if key in given else f"it names no {key}"
            raise _refused(text, f"{what}; known: {', '.join(known)}")
    numbers = {}
    for key, least in (("rank", 0), ("step", 0), ("nth", 1)):
        if key in given:
            if not given[key].isdecimal() or int(given[key]) < least:
                raise _refused(text, f"{key}={given[key]} is not a number from {least}")
            numbers[key] = int(given[key])
    if given["do"] == "nan" and given["point"] != "backward":
        raise _refused(text, "a loss is made not a number at point=backward only")
    once = Path(given["once"]) if given.get("once") else None
    if once is not None and not once.parent.is_dir():
        raise _refused(text, f"once={once} cannot be made: there is no folder {once.parent}")
    return Fault(given["point"], given["do"], once=once, **numbers)


def _refused(text: str, why: str) -> UserError:
    return UserError(f"{VARIABLE} is not understood in {text.strip()!r}: {why}", hint=_EXAMPLE)


def _happen(fault: Fault, step: int | None) -> bool:
    line = f"injected fault: {fault.do} at {fault.point}, step {step}, process {os.getpid()}"
    log.warning(line)
    print(line, file=sys.stderr, flush=True)
    if fault.do in ("kill", "term", "stop"):
        os.kill(os.getpid(), signal.Signals[f"SIG{fault.do.upper()}"])
    elif fault.do == "hang":
        while True:
            time.sleep(1)
    elif fault.do == "freeze":
        ctypes.PyDLL(None).sleep(10**6)
    elif fault.do == "raise":
        raise InjectedError(line)
    elif number := getattr(errno, fault.do.upper(), None):
        raise OSError(number, os.strerror(number))
    return fault.do == "nan"
