"""What a person watching sees: a progress bar on a terminal, plain lines elsewhere.

Takes numbers and text that others computed, prints them, returns nothing. It measures nothing itself except
the time that passes, and decides no cadence but its own. This is the only module that imports rich.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from common.redact import shown

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_SECONDS = 10.0
PLAIN_SHARE = 0.1
WARNING = "warning: "


@cache
def console() -> Console:
    """The console that everything is printed to: standard output, wherever it points when printing."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line, without credentials and control codes."""
    console().print(shown(line), markup=False)


class Progress:
    """How far a long piece of work has come, with loss, speed and the time left.

    total: steps in all. done: steps done before this process began (a resume); they do not count for the
    speed. label: printed first. enabled: false on all ranks but the first, where nothing is printed.
    Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        total: int,
        *,
        label: str,
        done: int = 0,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._label = label
        self._begun_at = done
        self._enabled = enabled
        self._clock = clock
        self._start = self._last_time = clock()
        self._last_done = done
        self._bar = _start_bar(label, total, done) if enabled and console().is_terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(
        self,
        done: int,
        *,
        loss: float | None = None,
        numbers: Mapping[str, float | None] | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """Show that `done` steps are finished.

        numbers: others to watch, by the word before them; None is left out. mfu: share of the device's peak,
        from 0 to 1.
        """
        if not self._enabled:
            return
        watched = {"loss": loss, **(numbers or {})}
        details = _details(watched, tokens_per_second, mfu, self._seconds_left(done))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, details=details)
        elif self._is_time_for_a_line(done):
            share = f"{done / self._total:4.0%}" if self._total else ""
            width = len(str(self._total))
            console().print(f"{self._label} {done:>{width}}/{self._total} {share}  {details}", markup=False)

    def log(self, line: str) -> None:
        """Print a line above the bar; one that begins with `warning: ` is kept in the process's log, too."""
        if self._enabled:
            target = self._bar.console if self._bar is not None else console()
            target.print(shown(line), markup=False)
            root = logging.getLogger()
            if line.startswith(WARNING) and root.handlers:  # without a log it would be printed again
                root.getChild("rlhf").warning("%s", line.removeprefix(WARNING))

    def restart(self) -> None:
        """The work begins now: what came before it says nothing about the time left."""
        self._start = self._last_time = self._clock()

    def close(self) -> None:
        """Leave the bar as it stands; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()

    def _seconds_left(self, done: int) -> float | None:
        finished = done - self._begun_at
        if finished <= 0:
            return None
        return (self._clock() - self._start) / finished * (self._total - done)

    def _is_time_for_a_line(self, done: int) -> bool:
        now = self._clock()
        is_due = (
            done >= self._total
            or now - self._last_time >= PLAIN_SECONDS
            or done - self._last_done >= PLAIN_SHARE * self._total
        )
        if is_due:
            self._last_time, self._last_done = now, done
        return is_due


def _start_bar(label: str, total: int, done: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Bar(*columns, TextColumn("{task.fields[details]}"), console=console(), refresh_per_second=4)
    bar.add_task(label, total=total, completed=done, details="")
    bar.start()
    return bar


def _details(
    watched: Mapping[str, float | None],
    tokens_per_second: float | None,
    mfu: float | None,
    seconds_left: float | None,
) -> str:
    parts = [
        *(None if value is None else f"{name} {value:z.4f}" for name, value in watched.items()),
        None if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s",
        None if mfu is None else f"MFU {mfu:.1%}",
        None if seconds_left is None else f"{duration(seconds_left)} left",
    ]
    return "  ".join(part for part in parts if part is not None)


def duration(seconds: float) -> str:
    """Seconds as `m:ss`, from an hour on as `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def styled(parts: Sequence[tuple[str, str]]) -> Any:
    """Text for `console().print`, from (text, style) pairs."""
    from rich.text import Text

    text = Text()
    for part, style in parts:
        text.append(part, style)
    return text
