"""Cases drawn from a seed, each tried in this process, and what is wrong with how it ended.

A case may be accepted or refused with a UserError. A finding is what is neither: a traceback; a hang, after
SECONDS; a silent accept, when an oracle that knows nothing of the checks says that it is none; a raw control
character in what is shown. Seed and number of a case are all it takes to try it again.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

from common.errors import UserError
from common.redact import shown
from pipeline import __main__ as command_line
from tests.fuzz.odd import raw

SECONDS = 10.0
"""Of processor time; a case that takes longer hangs."""
KINDS = ("traceback", "hang", "silent", "raw", "crash")


class Target(Protocol):
    """Something that takes input from outside."""

    name: str
    share: int
    """of the cases, in any unit"""

    def draw(self, draw: random.Random) -> Any:
        """An input; its repr says all of it."""

    def outcome(self, case: Any, folder: Path) -> str:
        """In a word how it ended. UserError for a refusal, `Silent` and `Raw` for what must not be.

        folder: empty, of the case alone.
        """


class Silent(Exception):
    """Nonsense was taken, or sense was refused."""


class Raw(Exception):
    """What is shown holds control characters."""


class Hang(BaseException):
    """The time of a case is over; no `except Exception` may take it for something else."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with how a case ended."""

    kind: str
    number: int
    target: str
    case: str
    what: str


@dataclass
class Report:
    """What became of the cases of a seed."""

    seed: int
    cases: int = 0
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    """by target"""
    seconds: Counter[str] = field(default_factory=Counter)
    """of processor time, by target"""
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The counts, and every finding."""
        kinds = Counter(finding.kind for finding in self.findings)
        return {
            "seed": self.seed,
            "cases": self.cases,
            "findings": {kind: kinds[kind] for kind in KINDS},
            "outcomes": {name: dict(sorted(each.items())) for name, each in sorted(self.outcomes.items())},
            "cpu_seconds": {name: round(seconds, 1) for name, seconds in sorted(self.seconds.items())},
            "found": [asdict(finding) for finding in self.findings],
        }


def run(
    targets: Sequence[Target],
    seed: int,
    numbers: Iterable[int],
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Try the cases of these numbers. say: is told each finding, and now and then how far it is."""
    report = Report(seed)
    for number in numbers:
        draw = random.Random(f"{seed} {number}")
        (target,) = draw.choices(targets, [target.share for target in targets])
        began = time.process_time()
        case = target.draw(draw)
        outcome, finding = _tried(target, case, number)
        report.seconds[target.name] += time.process_time() - began
        report.outcomes.setdefault(target.name, Counter())[outcome] += 1
        report.cases += 1
        if finding is not None:
            report.findings.append(finding)
            say(f"{finding.kind}: case {number} ({finding.target})\n  {finding.case}\n  {finding.what}")
        if report.cases % 1_000 == 0:
            say(f"{report.cases} cases, {len(report.findings)} findings")
    return report


def _tried(target: Target, case: Any, number: int) -> tuple[str, Finding | None]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))

    def found(kind: str, what: str) -> tuple[str, Finding]:
        return kind, Finding(kind, number, target.name, _described(case), what)

    try:
        with time_limit(SECONDS):
            return target.outcome(case, folder), None
    except UserError as error:
        text = shown(error)
        return ("refused", None) if not raw(text) else found("raw", ascii(text))
    except Raw as error:
        return found("raw", ascii(str(error)))
    except Silent as error:
        return found("silent", ascii(str(error)))
    except Hang:
        return found("hang", _where())
    except Exception as error:
        return found("traceback", f"{type(error).__name__}: {ascii(str(error))[:300]} at {_where()}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in what takes more processor time, or six times as long on a busy machine."""

    def end(*_: Any) -> None:
        raise Hang

    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, end) for number in timers}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)
    try:
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def shown_by(work: Callable[[], int | None]) -> tuple[int | None, str]:
    """The exit status of `work`, and what it printed. `Raw` when that would steer a terminal."""
    out = io.StringIO()
    status: int | None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = work()
        except SystemExit as left:
            status = int(left.code or 0)
    if signs := raw(out.getvalue()):
        line = next(line for line in out.getvalue().split("\n") if raw(line))
        raise Raw(f"{signs!r} in {line!r}")
    return status, out.getvalue()


def command(*arguments: str) -> tuple[int | None, str]:
    """`python -m pipeline` with these arguments, in this process: exit status and what it printed."""
    with mock.patch.object(sys, "argv", ["rlhf", *arguments]):
        return shown_by(command_line.main)


def refused_or(word: str, status: int | None, printed: str) -> str:
    """The outcome of a command."""
    if status not in (0, UserError.EXIT_CODE):
        raise Silent(f"exit status {status}: {printed}")
    return word if status == 0 else "refused"


def _described(case: Any) -> str:
    try:
        text = ascii(case)
    except (ValueError, RecursionError):  # digits or depth that Python does not write
        text = f"{type(case).__name__} that cannot be written"
    return text if len(text) <= 2_000 else f"{text[:2_000]}… ({len(text):,} signs)"


def _where() -> str:
    frames = traceback.extract_tb(sys.exc_info()[2])
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(own[-4:]))
