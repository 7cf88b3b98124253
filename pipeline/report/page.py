"""Puts the page together: folders of runs in, one HTML file out. A page of one run is the case of one.

Everything that the template shows is gathered here as plain values; the template escapes all of it. The page
is replaced in one step, so that a reader never meets half of one, and it can be made while the run goes on:
then it loads itself anew every few seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import write_text
from common.stage import Step
from pipeline import state
from pipeline.report import charts, comparison, lineage, several, shown
from pipeline.report.charts import Chart
from pipeline.report.comparison import Comparison, Side, compare, over_time
from pipeline.report.curves import Logged, curves
from pipeline.report.files import RunFiles, StepFiles, clean, mapping, number, read_run
from pipeline.report.glance import Glance, at_a_glance
from pipeline.report.lineage import Tree
from pipeline.report.reproduce import Reproduction, reproduce

REPORT = "report.html"
TITLES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "Direct preference optimization",
    "ppo": "Proximal policy optimization",
}
LEDGER_COLUMNS = {
    "rows_read": "read", "rows_kept": "kept", "rows_held_out": "held out", "tokens": "tokens",
    "trained_tokens": "trained", "truncated": "cut", "bad_rows": "bad",
}  # fmt: skip
NOT_FINAL = "The run is not finished: these are the numbers so far."
RELOAD_SECONDS = 10
"""How often a page of a run that goes on loads itself anew."""
COLOURS = 8
"""Colours of runs on the page; those of more runs repeat."""


@dataclass(frozen=True)
class Status:
    """How a step stands: a word for the page, one of done, running, stopped, failed, waiting, and details."""

    word: str
    kind: str
    detail: str = ""


@dataclass(frozen=True)
class StepPage:
    """What the page says of one step of a run."""

    name: str
    status: Status
    facts: list[tuple[str, str]]
    files: StepFiles


@dataclass(frozen=True)
class RunPage:
    """What the page says of one run. mark, short, colour: what it is called and drawn with beside others."""

    mark: str
    name: str
    short: str
    colour: int
    files: RunFiles
    steps: list[StepPage]
    glance: Glance
    tree: Tree
    reproduction: Reproduction

    @property
    def is_unfinished(self) -> bool:
        return any(step.status.kind in ("running", "stopped", "failed") for step in self.steps)


@dataclass(frozen=True)
class Section:
    """The curves of a step, and each run's part in it."""

    name: str
    title: str
    charts: list[Chart]
    further: list[Chart]
    parts: list[tuple[RunPage, StepPage]]


def report(*runs: Path, out: Path | None = None) -> Path:
    """Write the page of one run, or of several beside each other, from the files there; returns its path.

    out: by default `page_of` them. A run may be going on, and its files may be damaged: the page says what
    could not be read. UserError when a folder is none of a run, or is named twice, or the page cannot be
    written.
    """
    places = [run.resolve() for run in runs]
    if twice := [run for run, place in zip(runs, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"{twice[0]} is named twice", hint="name each run once")
    files = [read_run(run) for run in runs]
    path = out or page_of(runs)
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out} is no name of a page", hint=f"--out {out.with_suffix('.html')}")
    write_text(path, render(files))
    return path


def page_of(runs: Sequence[Path]) -> Path:
    """Where the page of these runs is written: of several beside them if they lie together, else here."""
    if len(runs) == 1:
        return runs[0] / REPORT
    lie_together = len({run.resolve().parent for run in runs}) == 1
    return (runs[0].parent if lie_together else Path()) / REPORT


def render(files: Sequence[RunFiles]) -> str:
    """The page of runs, in this order."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "shown": shown, "charts": charts, "samples": comparison, "trees": lineage,
        "ledger_columns": LEDGER_COLUMNS.items(), "titles": TITLES,
    }  # fmt: skip
    runs = run_pages(files)
    named = {
        "runs": runs,
        "made": shown.moment(state.now()),
        "reload": RELOAD_SECONDS if any(map(is_going_on, files)) else 0,
        "not_final": NOT_FINAL,
        "sections": list(sections(runs)),
        "comparison": samples_of(files),
        "differences": several.differences(files),
        "final": several.final_numbers(files, [run.glance.table for run in runs]),
        "style": (Path(__file__).parent / "style.css").read_text(encoding="utf-8"),
    }
    return environment.get_template("report.html.jinja").render(named)


def run_pages(files: Sequence[RunFiles]) -> list[RunPage]:
    """Each run, with what it is called beside the others."""
    names = [clean(run.setting("run_name") or run.folder.resolve().name) for run in files]
    return [
        RunPage(
            several.mark_of(index), name, short, index % COLOURS, run, step_pages(run), at_a_glance(run),
            lineage.draw(run.lineage), reproduce(run),
        )
        for index, (run, name, short) in enumerate(zip(files, names, several.short_names(names), strict=True))
    ]  # fmt: skip


def step_pages(run: RunFiles) -> list[StepPage]:
    """Each step of a run."""
    abandoned = state.is_abandoned(run.folder)
    return [
        StepPage(step.name, status_of(step.state, abandoned=abandoned), facts_of(run, step), step)
        for step in run.steps
    ]


def sections(runs: Sequence[RunPage]) -> Iterator[Section]:
    """A section for each step that a run has, in the order of the chain."""
    for name in (step.value for step in Step):
        parts = [(run, step) for run in runs for step in run.steps if step.name == name]
        if not parts:
            continue
        is_alone = len(runs) == 1
        logged = [
            Logged(step.files.metrics, step.files.errors)
            if is_alone
            else Logged(
                step.files.metrics, step.files.errors, f"{run.mark} {run.short}", run.mark, run.colour
            )
            for run, step in parts
        ]
        functions = functions_of([run.files for run, _ in parts]) if name == Step.ppo.value else []
        main, further = curves(name, logged, functions, is_alone=is_alone)
        yield Section(name, TITLES[name], main, further, parts)


def functions_of(runs: Sequence[RunFiles]) -> list[str]:
    """The names of the runs' own evaluations, in their order."""
    named = (name for run in runs for name in mapping(run.setting("ppo.evaluation.functions")))
    return list(dict.fromkeys(named))


def samples_of(runs: Sequence[RunFiles]) -> Comparison | None:
    """Of one run the samples of its last step that has any, over time; of several the last ones of each."""
    last = [next((step for step in reversed(run.steps) if step.samples), None) for run in runs]
    functions = functions_of(runs)
    if len(runs) == 1:
        step = last[0]
        of_ppo = functions if step is not None and step.name == Step.ppo.value else []
        return None if step is None else over_time(step.name, step.samples, of_ppo)
    sides = [
        Side(step.name, max(step.samples), step.samples[max(step.samples)], run)
        for run, step in enumerate(last)
        if step is not None
    ]
    return compare(sides, functions)


def is_going_on(run: RunFiles) -> bool:
    """Whether more is to come of the run: a step runs, or is yet to run, and its process is there."""
    if state.is_abandoned(run.folder):
        return False
    status = {step.state.get("status", "") for step in run.steps}
    is_between_steps = "" in status and status.isdisjoint(("failed", "stopped"))
    return "running" in status or (is_between_steps and (run.folder / state.LOCK).exists())


def status_of(recorded: Mapping[str, str], *, abandoned: bool) -> Status:
    """A step's status in words. abandoned: the process that ran it is no more."""
    status = recorded.get("status", "")
    gone = "its process is gone; the same command goes on from its last save"
    known = {
        "done": Status("finished", "done"),
        "running": Status("interrupted", "failed", gone) if abandoned else Status("going on", "running"),
        "stopped": Status("stopped", "stopped", "the same command goes on from here"),
        "failed": Status("failed", "failed", f"exit status {recorded.get('exit_status', 'unknown')}"),
    }
    return known.get(status, Status(clean(status) if status else "not started", "waiting"))


def facts_of(run: RunFiles, step: StepFiles) -> list[tuple[str, str]]:
    """Short lines about a step: times, how far it is, its size."""
    begun, launched, ended = (step.state.get(key) for key in ("started", "launched", "ended"))
    parameters, base = number(step.details.get("parameters")), step.details.get("base_model")
    (_, tokens) = (step.metrics.get("num_tokens") or [(0, math.inf)])[-1]
    facts = {
        "started": None if begun is None else shown.moment(begun),
        "ended": None if ended is None else shown.moment(ended),
        "took" if launched == begun else "took since it was resumed": shown.duration(
            step.state.get("seconds", "")
        ),
        "progress": progress_of(run, step),
        "parameters": None if parameters is None else f"{parameters:,.0f}",
        "tokens seen": f"{tokens:,.0f}" if tokens < 1e300 else None,
        "from": clean(base) if isinstance(base, str) else None,
    }
    return [(label, fact) for label, fact in facts.items() if fact is not None]


def progress_of(run: RunFiles, step: StepFiles) -> str | None:
    """`step 40 of 400`, or in epochs when the number of steps was not set."""
    last = max((series[-1][0] for series in step.metrics.values() if series), default=None)
    if last is None:
        return None
    word = "iteration" if step.name == Step.ppo.value else "step"
    most, epochs = (number(run.setting(f"{step.name}.train.{key}")) for key in ("max_steps", "epochs"))
    if most is not None:
        return f"{word} {last:,} of {most:,.0f}"
    epoch = step.metrics.get("epoch")
    of = f", epoch {shown.brief(epoch[-1][1])} of {shown.brief(epochs)}" if epoch and epochs else ""
    return f"{word} {last:,}{of}"
