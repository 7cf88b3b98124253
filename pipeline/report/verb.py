"""`python -m pipeline report RUN [RUN ...]`: the page of runs, written once, or as long as they go on."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.options import Options
from pipeline.report.files import read_run
from pipeline.report.page import RELOAD_SECONDS, is_going_on, report

Say = Callable[[str], None]


def report_verb(arguments: Sequence[str], *, say: Say = print) -> int:
    """The verb. Returns 0."""
    given = report_options(arguments)
    say(f"report    {report(*given.runs, out=given.out)}")
    if given.watch:
        watch(given.runs, given.out, say)
    return 0


def report_options(arguments: Sequence[str]) -> argparse.Namespace:
    """What was typed after `report`. UserError for what cannot be read."""
    parser = Options("report", "runs/NAME", "Write one HTML page about a run, or about several side by side.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="by default report.html, in the run's folder"
    )
    parser.add_argument("--watch", action="store_true", help="write it anew as long as a run goes on")
    given = parser.parse_args(list(arguments))
    # runs/* names an earlier page, too
    given.runs = [run for run in given.runs if run.suffix != ".html" or not run.is_file()] or given.runs
    return given


def watch(
    runs: Sequence[Path], out: Path | None, say: Say, *, pause: Callable[[float], None] = time.sleep
) -> None:
    """Write the page anew every few seconds until all runs have ended; the last one stays as it is."""
    if not _going_on(runs):
        say("no run goes on: the page is final")
        return
    say(f"written anew every {RELOAD_SECONDS} s until the run ends; the page loads itself anew, too")
    while _going_on(runs):
        pause(RELOAD_SECONDS)
        report(*runs, out=out)
    say("the run has ended: the page is final")


def _going_on(runs: Sequence[Path]) -> bool:
    return any(is_going_on(read_run(run)) for run in runs)
