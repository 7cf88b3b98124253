"""Puts the page together: a run's folder in, `report.html` in it out.

Everything that the template shows is gathered here as plain values; the template escapes all of it. The page
is replaced in one step, so that a reader never meets half of one, and it can be made while the run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.files import write_text
from common.stage import Step
from pipeline import state
from pipeline.report import charts, comparison, lineage, shown
from pipeline.report.charts import Chart
from pipeline.report.comparison import Comparison, compare
from pipeline.report.curves import curves
from pipeline.report.files import RunFiles, StepFiles, clean, mapping, number, read_run
from pipeline.report.glance import at_a_glance
from pipeline.report.reproduce import reproduce

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


@dataclass(frozen=True)
class Status:
    """How a step stands: a word for the page, one of done, running, stopped, failed, waiting, and details."""

    word: str
    kind: str
    detail: str = ""


@dataclass(frozen=True)
class StepPage:
    """What the page shows of one step."""

    name: str
    title: str
    status: Status
    facts: list[tuple[str, str]]
    charts: list[Chart]
    further: list[Chart]
    comparison: Comparison | None
    files: StepFiles


def report(run: Path) -> Path:
    """Write `report.html` into a run's folder, from the files there; returns its path.

    The run may be going on, and its files may be damaged: the page says what could not be read. UserError
    when the folder is none of a run, or the page cannot be written.
    """
    path = run / REPORT
    write_text(path, render(read_run(run)))
    return path


def render(run: RunFiles) -> str:
    """The page of a run."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"shown": shown, "charts": charts, "samples": comparison, "trees": lineage}
    glance = at_a_glance(run)
    abandoned = state.is_abandoned(run.folder)
    steps = [step_page(run, step, abandoned=abandoned) for step in run.steps]
    unfinished = any(step.status.kind in ("running", "stopped", "failed") for step in steps)
    named = {
        "name": clean(run.setting("run_name") or run.folder.resolve().name),
        "made": shown.moment(state.now()),
        "glance": glance,
        "judged": NOT_FINAL if unfinished and glance.cards else "",
        "steps": steps,
        "compared": next((step for step in reversed(steps) if step.comparison is not None), None),
        "ledger_columns": LEDGER_COLUMNS.items(),
        "tree": lineage.draw(run.lineage),
        "lineage": run.lineage,
        "reproduction": reproduce(run),
        "config_text": run.config_text,
        "problems": run.problems,
        "style": (Path(__file__).parent / "style.css").read_text(encoding="utf-8"),
    }
    return environment.get_template("report.html.jinja").render(named)


def step_page(run: RunFiles, step: StepFiles, *, abandoned: bool) -> StepPage:
    """Everything about one step."""
    functions = list(mapping(run.setting("ppo.evaluation.functions"))) if step.name == Step.ppo.value else []
    main, further = curves(step.name, step.metrics, functions, step.errors)
    status = status_of(step.state, abandoned=abandoned)
    title, facts = TITLES[step.name], facts_of(run, step)
    return StepPage(step.name, title, status, facts, main, further, compare(step.samples, functions), step)


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
