"""`python -m pipeline dashboard [PROJECT]`: a workspace and a report on W&B, laid out like the report of a
run.

Takes the name of a project whose runs were tracked there; leaves a saved view and a report of it, and says
where they are. Sections are in the order of the chain, charts have the titles and lines of
`report/curves.py`. It is an extra: `wandb-workspaces` lays out, and this is the only module that imports it.
Changes no run and reads no number.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.deadline import within
from common.errors import UserError
from common.redact import has_wandb_key, redact_text
from common.stage import Step
from common.tracking_config import TrackingConfig, artifact_name
from pipeline.options import Options
from pipeline.report.curves import MAIN, Plan, evaluations
from pipeline.report.files import read_run
from pipeline.report.glance import BY_STEP, EVAL, SHARES
from pipeline.report.page import TITLES, functions_of
from step3_ppo.config import MEASURED

SECONDS = 60.0
"""How long W&B may take for all of it."""
SERVER = "https://api.wandb.ai"
CHART, ROWS = 8, 6
"""Columns of a chart in a report's grid, of which there are 24, and its rows."""
OPEN = 2
"""Sections of the workspace that are open."""
SWEPT = {
    Step.sft: ("sft.optim.lr", "sft.optim.warmup_ratio", "sft.train.global_batch_size"),
    Step.reward: ("reward.optim.lr", "reward.train.global_batch_size"),
    Step.dpo: ("dpo.optim.lr", "dpo.beta", "dpo.train.global_batch_size"),
    Step.ppo: ("ppo.optim.lr", "ppo.kl.coef", "ppo.rollout.temperature"),
}
"""Settings that sweeps are usually over, by step; `--sweep` names others."""
JUDGED_BY = {
    Step.sft: "eval/loss",
    Step.reward: "eval/accuracy",
    Step.dpo: "eval/rewards/accuracies",
    Step.ppo: "eval/reward",
}
LOGARITHMIC = ("optim.lr", "kl.coef", "beta")
GPUS = range(8)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What is laid out. steps: of the runs. artifacts: names on W&B whose lineage is drawn. swept:
    settings.
    """

    steps: list[Step]
    functions: list[str]
    artifacts: list[str]
    swept: list[str]


@dataclass(frozen=True)
class Part:
    """A section of both: its title, a line, and the library's panels."""

    title: str
    text: str
    panels: list[Any]


def dashboard_verb(arguments: Sequence[str], *, say: Say = print) -> int:
    """The verb. Returns 0."""
    given = dashboard_options(arguments)
    asked = asked_of(given.run, given.sweep)
    check_can_save()
    os.environ["WANDB_SILENT"] = "true"  # the library prints its own lines
    try:
        report, view = within(SECONDS, lambda: save(given.project, given.entity, asked))
    except TimeoutError:
        raise UserError(
            f"W&B did not answer within {SECONDS:g} s", hint="the same command tries again"
        ) from None
    except Exception as error:
        said = redact_text(" ".join(str(error).split()))[:300]
        raise UserError(
            f"W&B did not take the dashboard: {type(error).__name__}: {said}",
            hint=f"does the project {given.project} exist there, and may you write to it? --entity NAME",
        ) from error
    say(f"workspace {view}")
    say(f"report    {report}")
    return 0


def dashboard_options(arguments: Sequence[str]) -> argparse.Namespace:
    """What was typed after `dashboard`. UserError for what cannot be read."""
    parser = Options("dashboard", "[PROJECT]", "Lay out a workspace and a report on W&B.")
    default = TrackingConfig()
    parser.add_argument("project", metavar="PROJECT", nargs="?", default=default.project)
    parser.add_argument(
        "--entity", metavar="NAME", help="team or user; by default the one you are logged in as"
    )
    parser.add_argument(
        "--run", action="append", type=Path, default=[], metavar="RUN",
        help="a run's folder, for its lineage and evaluations; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY",
        help="a setting that was swept, e.g. sft.optim.lr",
    )
    return parser.parse_args(list(arguments))


def asked_of(runs: Sequence[Path], swept: Sequence[str]) -> Asked:
    """What the runs have; everything without runs. UserError for a folder that is none, or no key of a
    step.
    """
    for key in swept:
        if key.partition(".")[0] not in {*map(str, TITLES), "model", "seed"}:
            raise UserError(f"--sweep {key} is no setting of a step", hint="--sweep sft.optim.lr")
    files = [read_run(run) for run in runs]
    names = {step.name for run in files for step in run.steps} or set(TITLES)
    artifacts = [
        artifact_name(str(run.setting("run_name") or run.folder.resolve().name), node.step)
        for run in files
        for node in run.lineage
    ]
    steps = [step for step in Step if step.value in names]
    return Asked(steps, functions_of(files), artifacts, list(swept))


def check_can_save() -> None:
    """UserError without the library, or without a key for the server."""
    if find_spec("wandb_workspaces") is None:
        raise UserError(
            "dashboard needs wandb-workspaces, which is not installed",
            hint="pip install wandb-workspaces (the extra rlhf-pipeline[dashboard])",
        )
    server = os.environ.get("WANDB_BASE_URL", SERVER).rstrip("/")
    if not has_wandb_key(server, os.environ):
        raise UserError(f"there is no W&B key for {redact_text(server)}", hint="wandb login")


def save(project: str, entity: str | None, asked: Asked) -> tuple[str, str]:
    """Save report and workspace on W&B; their addresses. The project is made where it is not there."""
    import wandb
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    who = entity or str(wandb.Api().default_entity)
    name, parts = f"{project}: SFT to PPO", list(sections(wr, asked))
    report = wr.Report(
        project=project, entity=who, title=name, width="fluid",
        description="Laid out by python -m pipeline dashboard.",
        blocks=[wr.TableOfContents(), *blocks(wr, parts, project, who)],
    )  # fmt: skip
    report.save()
    workspace = ws.Workspace(
        entity=who, project=project, name=name,
        sections=[
            ws.Section(name=part.title, panels=part.panels, is_open=index < OPEN)
            for index, part in enumerate(parts)
        ],
    )  # fmt: skip
    workspace.save()
    return str(report.url), str(workspace.url)


def blocks(wr: Any, parts: Iterable[Part], project: str, entity: str) -> Iterator[Any]:
    """The sections as a report: a heading, a line, and a grid of panels."""
    for part in parts:
        yield wr.H2(part.title)
        yield wr.P(part.text)
        for index, panel in enumerate(part.panels):
            panel.layout = (
                wr.Layout(x=CHART * (index % 3), y=ROWS * (index // 3), w=CHART, h=ROWS)
                if isinstance(panel, wr.LinePlot)
                else wr.Layout(x=0, y=2 * ROWS * index, w=3 * CHART, h=2 * ROWS)
            )
        yield wr.PanelGrid(runsets=[wr.Runset(entity=entity, project=project)], panels=part.panels)


def sections(wr: Any, asked: Asked) -> Iterator[Part]:
    """All of them, in order. wr: the library's reports."""
    steps, no_run = asked.steps, "`python -m pipeline dashboard --run runs/NAME` draws a run's lineage here."
    yield Part(
        "Before and after",
        "Held-out measures begin before the first step: the first point is before, the last one after.",
        [panel for step in reversed(steps) for panel in held_out(wr, step, asked.functions)],
    )
    for step in steps:
        charts = [line_plot(wr, step, plan) for plan in MAIN[step.value]]
        yield Part(TITLES[step.value], f"Over the {unit_of(step)}s of {step.value}.", charts)
    yield Part(
        "Samples",
        "Prompts and responses at the last evaluation; of PPO with reward and KL.",
        [table(wr, f"{step.value}/samples") for step in steps if step is not Step.reward],
    )
    yield Part(
        "Data",
        "What became of the rows of each source.",
        [table(wr, f"{step.value}/ledger") for step in steps],
    )
    yield Part(
        "Lineage",
        "Which artifact was made from which; lineage.json in a run's folder has the hashes.",
        [wr.WeavePanelArtifact(artifact=name, tab="lineage") for name in asked.artifacts]
        or [wr.MarkdownPanel(markdown=no_run)],
    )
    yield Part(
        "Sweeps",
        "Settings on the left, what they came to on the right; below, what differs between runs.",
        [*(parallel(wr, step, asked.swept) for step in steps), wr.RunComparer(diff_only="split")],
    )
    yield Part(
        "Systems",
        "Speed and memory as metrics.jsonl has them, and what W&B measures of the machine.",
        list(systems(wr, steps)),
    )


def table(wr: Any, name: str) -> Any:
    """The latest table of this name, of all runs."""
    return wr.WeavePanelSummaryTable(table_name=name)


def unit_of(step: Step) -> str:
    return "iteration" if step is Step.ppo else "step"


def held_out(wr: Any, step: Step, functions: Sequence[str]) -> Iterator[Any]:
    """What a step is judged by on held-out rows."""
    if step is Step.ppo:
        names = [EVAL + name for name in (*functions, *MEASURED)]
        plans = evaluations(names, functions)
        yield from (line_plot(wr, step, plan) for plan in plans)
        return
    for name in BY_STEP[step.value]:
        yield line_plot(wr, step, Plan(f"{step.value}: {name}, held out", {EVAL + name: "held out"}))


def line_plot(wr: Any, step: Step, plan: Plan) -> Any:
    """A chart of the report as one of W&B's."""
    is_share = all(metric.removeprefix(EVAL) in SHARES for metric in plan.lines)
    metrics = [f"{step.value}/{metric}" for metric in plan.lines]
    return wr.LinePlot(
        title=plan.title, x=f"{step.value}/step", y=metrics, title_x=unit_of(step), title_y=plan.unit or None,
        range_y=(0, 1) if is_share else (None, None),
    )  # fmt: skip


def parallel(wr: Any, step: Step, swept: Sequence[str]) -> Any:
    """Settings of a step, and what it is judged by."""
    named = [key for key in swept if key.partition(".")[0] in (step.value, "model", "seed")]
    keys = [*(named or SWEPT[step]), *(["seed"] if "seed" not in named else [])]
    columns = [
        wr.ParallelCoordinatesPlotColumn(
            metric=wr.Config(key), display_name=key, log=key.endswith(LOGARITHMIC) or None
        )
        for key in keys
    ]
    result = f"{step.value}/{JUDGED_BY[step]}"
    columns.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(result), display_name=result))
    return wr.ParallelCoordinatesPlot(title=f"{step.value}: what settings came to", columns=columns)


def systems(wr: Any, steps: Sequence[Step]) -> Iterator[Any]:
    """Memory, speed, and use of the devices."""
    for step in steps:
        for title, names in (("speed", ("tokens_per_second",)), ("memory", ("memory_gb", "peak_memory_gb"))):
            metrics = [f"{step.value}/perf/{name}" for name in names]
            yield wr.LinePlot(title=f"{step.value}: {title}", x=f"{step.value}/step", y=metrics)
    of_gpu = {"GPU use": "gpu", "GPU memory allocated": "memoryAllocated", "GPU power": "powerWatts"}
    for title, name in of_gpu.items():
        yield wr.LinePlot(
            title=title, x="Relative Time (Wall)", y=[f"system/gpu.{gpu}.{name}" for gpu in GPUS]
        )
    yield wr.LinePlot(title="CPU use", x="Relative Time (Wall)", y=["system/cpu"])
    yield wr.LinePlot(title="Memory of the process", x="Relative Time (Wall)", y=["system/proc.memory.rssMB"])
