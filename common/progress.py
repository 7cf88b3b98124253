"""What a person watching sees: a progress bar on a terminal, plain lines elsewhere, and the data preview.

Takes numbers and text that others computed, prints them, returns nothing. It measures nothing itself except
the time that passes, and decides no cadence but its own. This is the only module that imports rich.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_SECONDS = 10.0
PLAIN_SHARE = 0.1
WARNING = "warning: "
_BAR_WIDTH = 40
# control characters but tab and line feed, marks that change the direction of writing, lone surrogates
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@cache
def console() -> Console:
    """The console that everything is printed to: standard output, wherever it points when printing."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


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
            target.print(line, markup=False)
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


# --- how fast the device could be ------------------------------------------------------------------

# Teraflops of dense matrix products with fp32 accumulation, (bf16 and fp16, fp32), from NVIDIA's data sheets.
# fp32 is without TF32, which torch leaves off. None: not published, or not supported.
_PEAK_TERAFLOPS: dict[str, tuple[float | None, float | None]] = {
    "GB200": (2500.0, 80.0),
    "B200": (2250.0, 75.0),
    "H200 NVL": (835.0, 60.0),
    "H200": (989.4, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.4, 67.0),
    "H800": (989.4, 67.0),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX A6000": (154.8, 38.7),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak floating-point operations per second of one device, or None when it is not known.

    device_name: as the driver gives it (`NVIDIA H100 80GB HBM3`). dtype: bf16, fp16 or fp32.
    """
    for name in sorted(_PEAK_TERAFLOPS, key=len, reverse=True):
        if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE):
            half, single = _PEAK_TERAFLOPS[name]
            teraflops = {"bf16": half, "fp16": half, "fp32": single}.get(dtype)
            return None if teraflops is None else teraflops * 1e12
    return None


# --- preview ---------------------------------------------------------------------------------------


def show_preview(
    rows: Sequence[Sequence[tuple[str, bool]]],
    lengths: Sequence[int],
    ledger_lines: Sequence[str],
    trained_share: float | None,
    max_length: int,
) -> None:
    """Print rows as the model sees them, then lengths, the trained share and what became of the data.

    rows: each a sequence of runs, (decoded text, whether it is trained); a run is decoded as a whole, so that
    characters split over several tokens stay whole. lengths: tokens of every document. trained_share: None
    for rows of which nothing is trained.
    Trained text is coloured on a terminal and stands in brackets elsewhere.
    """
    out = console()
    in_colour = out.is_terminal and out.color_system is not None and not out.no_color
    brackets = ("", "") if in_colour else _brackets(out.encoding)
    key = "(trained text is coloured)" if in_colour else f"(trained: {brackets[0]}…{brackets[1]})"
    for number, runs in enumerate(rows, start=1):
        out.print(f"--- row {number}", "" if trained_share is None else f" {key}", sep="", markup=False)
        out.print(_marked(runs, brackets))
    share = [] if trained_share is None else [f"trained share: {trained_share:.1%} of the tokens"]
    for line in ["", *histogram_lines(lengths, max_length), *share, *ledger_lines]:
        out.print(line, markup=False)


def _marked(runs: Sequence[tuple[str, bool]], brackets: tuple[str, str]) -> Any:
    from rich.text import Text

    marked = Text()
    for text, is_trained in runs:
        shown = visible(text)
        marked.append(
            f"{brackets[0]}{shown}{brackets[1]}" if is_trained else shown,
            "bold green" if is_trained else "dim",
        )
    return marked


def visible(text: str) -> str:
    """Text with control characters spelled out, so that data cannot steer the terminal; line ends stay."""
    return _STEERING.sub(lambda found: repr(found.group())[1:-1], text)


def histogram_lines(lengths: Sequence[int], max_length: int, buckets: int = 10) -> list[str]:
    """Document lengths as lines of text: a summary, then one bar per bucket of equal width."""
    if not lengths:
        return ["no documents"]
    ordered = sorted(lengths)
    count, longest = len(ordered), ordered[-1]
    over = sum(1 for length in ordered if length > max_length)
    summary = (
        f"{count:,} documents, {sum(ordered):,} tokens; median {ordered[count // 2]:,}, longest {longest:,}"
    )
    summary += f"; max_length {max_length:,}" + (f" ({over:,} longer)" if over else "")
    width = max(1, -(-(longest + 1) // buckets))
    counts = [0] * (longest // width + 1)
    for length in ordered:
        counts[length // width] += 1
    digits = len(f"{longest:,}")
    lines = []
    for index, number in enumerate(counts):
        bar = "#" * max(round(_BAR_WIDTH * number / max(counts)), 1 if number else 0)
        low, high = index * width, min((index + 1) * width - 1, longest)
        lines.append(f"  {low:>{digits},}-{high:<{digits},} {bar:<{_BAR_WIDTH}} {number:,}")
    return [summary, *lines]


def _brackets(encoding: str) -> tuple[str, str]:
    """Marks around trained text that the output can show."""
    try:
        "⟦⟧".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "[[", "]]"
    return "⟦", "⟧"
