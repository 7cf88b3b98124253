"""Run a job to its end: signals to stop, restarts, and what is said when it fails.

Takes a Job, alone or with the other machines of a run (`launch/nodes.py`); returns its exit status. A rank
that died is started again, with all the others and from the last checkpoint, as often as was asked for; what
a person has to fix (exit status 2) and what was told to stop (143) is not. Knows nothing of steps.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

from common.errors import UserError
from common.shortage import oom_kills
from launch.agent import GRACE_SECONDS, STALLED, STOPPED, as_told, exit_status, gravity
from launch.local import Job, Meeting, start

POLL_SECONDS = 0.05
HALT_SECONDS = 10.0
"""How long ranks may take to end after one elsewhere failed, before they are killed: they cannot save."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a job ended on one machine."""

    status: int  # 128 + N where signal N killed a rank
    cause: tuple[int, int] | None = None  # a rank, and the exit code that explains the status
    stopped: bool = False  # the machine was told to stop
    where: str | None = None  # which machine, where it is not this one
    lost: str | None = None  # what happened to the machine itself, which no restart brings back
    oom_killed: bool = False  # a rank was killed while the kernel there killed for want of memory
    seconds: float = field(default=0.0, compare=False)  # that the job took, with its restarts

    @property
    def gravity(self) -> int:
        """How little it explains: of several outcomes the least one is the cause."""
        if self.lost is not None:
            return 0
        return 4 if self.status == 0 else gravity(self.code)

    @property
    def code(self) -> int:
        """The exit code that explains it, -N for signal N; of torchrun's agent where no rank is known."""
        if self.cause is not None:
            return self.cause[1]
        return 128 - self.status if self.status > 128 and self.status != STOPPED else self.status

    @property
    def is_restartable(self) -> bool:
        """Whether another start may end better."""
        return self.lost is None and self.status not in (0, UserError.EXIT_CODE, STOPPED)


class Others(Protocol):
    """The other machines of a run, as machine 0 sees them."""

    def begin(self, name: str) -> Meeting:
        """Have them start their part of the job `name`; where all ranks meet."""

    def ended(self) -> list[Outcome]:
        """How it ended on those that ended since the last call."""

    def is_running(self) -> bool:
        """Whether any has not ended yet."""

    def halt(self, seconds: float) -> None:
        """Have them stop it, and kill what is left after so many seconds."""


@contextlib.contextmanager
def handling(numbers: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals, without those that are ignored: nohup stays in force."""
    kept = {number: signal.getsignal(number) for number in numbers}
    for number, old in kept.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in kept.items():
            signal.signal(number, old)


class StopRequests(contextlib.ExitStack):
    """Notes the signals that ask to stop while it is open, and passes each on once to the job that runs.

    Ranks save on SIGTERM and SIGUSR1; a Python process would end on SIGINT without saving.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        super().__init__()
        self.received: set[int] = set()
        self._send: Callable[[int], object] | None = None
        self.enter_context(handling(self.NUMBERS, self._receive))

    def pass_on_to(self, send: Callable[[int], object]) -> None:
        """From now on to what `send` reaches; what came before it was started it gets at once."""
        self._send = send
        for number in list(self.received):
            send(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        passed_on = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        if passed_on not in self.received:
            self.received.add(passed_on)
            if self._send is not None:
                self._send(passed_on)


@contextlib.contextmanager
def leaving_when_told() -> Iterator[None]:
    """While no job runs, what asks to stop ends this process with 143: nothing is lost between two jobs."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(STOPPED)

    with handling(StopRequests.NUMBERS, leave):
        yield


class Running:
    """A job that was started on this machine."""

    def __init__(self, job: Job, keep_open: Sequence[int], requests: StopRequests) -> None:
        self._requests = requests
        self._is_rank = job.is_one_process
        self._report, report = os.pipe()
        try:
            self._process = start(job, keep_open=keep_open, report=report)
        finally:
            os.close(report)
        self._oom_kills = oom_kills()
        self._killed_at: float | None = None
        self._outcome: Outcome | None = None
        requests.pass_on_to(self._process.send_signal)

    def wait(self, seconds: float | None = None) -> Outcome | None:
        """How it ended; None if it has not after so many seconds."""
        if self._outcome is not None:
            return self._outcome
        if self._killed_at is not None and time.monotonic() > self._killed_at:
            self._process.kill()
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._outcome = self._made_of(code)
        return self._outcome

    def halt(self, seconds: float) -> None:
        """Ask it to stop, and kill it when it still runs after so many seconds."""
        if self._killed_at is None and self._outcome is None:
            self._killed_at = time.monotonic() + seconds
            self._process.send_signal(signal.SIGTERM)

    def _made_of(self, code: int) -> Outcome:
        told = bool(self._requests.received)
        words = os.read(self._report, 100).split()
        os.close(self._report)
        if self._killed_at is not None and code == -signal.SIGKILL:
            return Outcome(STOPPED, stopped=told)
        cause = (int(words[0]), int(words[1])) if words else None
        if cause is None and code != 0 and self._is_rank:  # else torchrun's agent failed, not a rank
            cause = (0, as_told(code, stopping=told or self._killed_at is not None))
        killed = code == -signal.SIGKILL or (cause is not None and cause[1] == -signal.SIGKILL)
        return Outcome(exit_status(code), cause, told, oom_killed=killed and oom_kills() > self._oom_kills)


def supervise(
    job: Job,
    keep_open: Sequence[int] = (),
    *,
    name: str = "",
    others: Others | None = None,
    restarts: int = 0,
    say: Say = print,
) -> Outcome:
    """Run a job to its end, passing each signal to stop on to it once.

    keep_open: see `launch.local.start`. name: what the job is called in messages, and by the other machines.
    restarts: how often it is started again when a rank died. Returns how it ended the last time.
    """
    began = time.monotonic()
    with StopRequests() as requests:
        for number in range(restarts + 1):
            outcome = run_once(job, keep_open, requests, name, others)
            explain(outcome, job.log_dir)
            if requests.received or number == restarts or not outcome.is_restartable:
                break
            say(f"{name}: {died(outcome)}; starting again from the last checkpoint, "
                f"restart {number + 1} of {restarts}")  # fmt: skip
        stopped = outcome.stopped or bool(requests.received)
        return replace(outcome, stopped=stopped, seconds=time.monotonic() - began)


def run_once(
    job: Job, keep_open: Sequence[int], requests: StopRequests, name: str, others: Others | None
) -> Outcome:
    """Start the job on every machine and wait for all; returns the outcome that explains the others."""
    if others is None:
        outcome = Running(job, keep_open, requests).wait()
        assert outcome is not None
        return outcome
    running = Running(replace(job, meeting=others.begin(name)), keep_open, requests)
    own: Outcome | None = None
    outcomes: list[Outcome] = []
    is_halting = False
    while own is None or others.is_running():
        if own is None and (own := running.wait(POLL_SECONDS)) is not None:
            outcomes.append(own)
        elif own is not None:
            time.sleep(POLL_SECONDS)
        outcomes += others.ended()
        bad = [outcome for outcome in outcomes if outcome.status != 0]
        if bad and not is_halting:
            is_halting = True
            # ranks that were told to stop are saving together; after a failure there is nothing to save
            seconds = GRACE_SECONDS if bad[0].status == STOPPED else HALT_SECONDS
            running.halt(seconds)
            others.halt(seconds)
    cause = min(outcomes, key=lambda outcome: outcome.gravity)
    return replace(cause, stopped=any(outcome.stopped for outcome in outcomes))


def explain(outcome: Outcome, log_dir: Path | None) -> None:
    """Say what the terminal has not shown: the rank that failed, and the end of its log; a machine's loss."""
    if outcome.lost is not None:
        print(outcome.lost, file=sys.stderr, flush=True)
        return
    if outcome.status == UserError.EXIT_CODE and outcome.where is not None:
        print(f"{outcome.where} says there what is wrong", file=sys.stderr, flush=True)
        return
    # Rank 0 shows its own traceback, and a status of 2 comes with a message printed where the rank is.
    said = (0, UserError.EXIT_CODE, STOPPED, STALLED)
    if outcome.status in said or (outcome.cause and outcome.cause[0] == 0):
        return
    print(f"{_who(outcome)} failed first (exit status {outcome.code})", file=sys.stderr)
    if log_dir is None or outcome.cause is None:
        return
    log = log_dir / f"rank_{outcome.cause[0]}.log"
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        print(f"the end of {log}:", *lines, sep="\n  ", file=sys.stderr)


def died(outcome: Outcome) -> str:
    """What happened, in a few words: `rank 1 died (SIGKILL)`."""
    if outcome.code == STALLED:
        return "a rank hangs"
    if outcome.code >= 0:
        return f"{_who(outcome)} failed (exit status {outcome.code})"
    try:
        of = signal.Signals(-outcome.code).name
    except ValueError:
        of = f"signal {-outcome.code}"
    return f"{_who(outcome)} died ({of}{', out of memory' if outcome.oom_killed else ''})"


def _who(outcome: Outcome) -> str:
    who = "torchrun's agent" if outcome.cause is None else f"rank {outcome.cause[0]}"
    return who if outcome.where is None else f"{who} on {outcome.where}"
