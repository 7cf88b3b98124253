"""Run the steps in order: per step write the configuration, launch, check the manifest.

Takes a checked PipelineConfig, returns the exit status. A step that is done is verified and skipped, one
that was interrupted goes on, one whose configuration or inputs changed is refused with the
difference. Trains nothing and imports no torch: a step is a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.artifacts import MANIFEST, Artifact, content_sha256, file_sha256, verify
from common.errors import UserError
from common.evidence import share_in_words
from common.files import disk_errors, set_aside
from common.handoff import scores_text
from common.shortage import OUT_OF_MEMORY
from common.stage import Input, Step
from common.tracking_config import AlertKind
from common.webhook import Webhook
from launch.agent import STOPPED
from launch.follow import follow
from launch.local import Job, count_gpus, ranks_of
from launch.nodes import Hello, Machines, gather
from launch.supervise import Outcome, leaving_when_told, supervise
from pipeline import checks, state
from pipeline.config import PipelineConfig
from pipeline.lineage import check_parents, load_sources, record_lineage
from pipeline.plan import EXPORT, Wired, wire_run, with_sources
from pipeline.resume import Changes, changes
from pipeline.sources import check_functions, settle_sources

REPORT = "report.html"
CONTINUES = "continues"
"""Of a state: the artifact that the step had made before it went on."""
OF_MEMORY = (OUT_OF_MEMORY, 128 + signal.SIGKILL)
"""Exit statuses of a step that ran out of memory: of a device, and perhaps of the machine."""
KEEP_OR_START_OVER = (
    "run_name=ANOTHER_NAME keeps both; force=true starts over and keeps the old folder beside it"
)

Say = Callable[[str], None]


def run(config: PipelineConfig, *, say: Say = print) -> int:
    """Run every step of `config`. Returns 0 when all are done, else the status of the one that was not."""
    try:
        with leaving_when_told():
            return run_as_machine(config, say)
    except SystemExit as left:
        if left.code != STOPPED:
            raise
        say("stopped while no step was running; the same command goes on from here")
        return STOPPED


def run_as_machine(config: PipelineConfig, say: Say) -> int:
    """Run `config` alone, as the machine that decides for others, or as one that follows it."""
    checks.check_launch(config.launch)
    own = ranks_of(config.launch)
    wired = wire_run(config)
    name = state.run_name(config)
    folder = state.run_folder(config)
    if config.launch.node_rank:
        return follow(config.launch, hello(config, own), folder, jobs_of(wired, folder, own), say)
    greeting = hello(config, own)  # as the command was given, on all machines
    config, line = state.settle_dtype(config, folder, gpu=count_gpus() > 0)
    config = settle_sources(config, say)
    wired = wire_run(config)
    checks.check(config, own)
    if config.launch.nnodes == 1:
        refuse_what_cannot_fit(config, own, own)
    if line is not None:
        say(line)
    config = replace(config, run_name=name)
    if config.launch.nnodes == 1:
        return run_checked(config, wired, folder, own, None, say)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with gather(config.launch, greeting, folder, say) as machines:
        checks.check(config, sum(machines.ranks), machines.ranks)
        refuse_what_cannot_fit(config, sum(machines.ranks), own)
        status = run_checked(config, wired, folder, own, machines, say)
        machines.leave_with(status)
    return status


def refuse_what_cannot_fit(config: PipelineConfig, ranks: int, ranks_here: int) -> None:
    """UserError where a rank of this machine cannot hold what a step needs, whatever its rows are."""
    from pipeline.planning import gpu_memory, refuse_unfit, refuse_whole_actor

    if count_gpus() > 0:
        refuse_whole_actor(config, gpu_memory())
    refuse_unfit(config, ranks, ranks_here, gpu=count_gpus() > 0)


def run_checked(
    config: PipelineConfig,
    wired: Sequence[Wired],
    folder: Path,
    ranks: int,
    machines: Machines | None,
    say: Say,
) -> int:
    """Run the steps until one does not end well; returns the exit status of the last that ran.

    ranks: those of this machine.
    """
    config = with_sources(config, wired, folder)
    status = check_functions(config, wired, folder)
    if status != 0:
        return status
    lock = state.lock_run(folder)
    try:
        with Webhook(config.tracking, state.run_name(config), say) as webhook:
            for step in wired:
                try:
                    status = run_step(config, step, folder, ranks, lock, say, machines, webhook)
                except UserError as error:
                    name = step.stage.name.value
                    webhook.post(AlertKind.failure, name, f"{name} of {folder} failed: {error.message}")
                    raise
                if status != 0:
                    break
    finally:
        os.close(lock)
    if (folder / REPORT).exists():
        say(f"report    {folder / REPORT}")
    return status


def hello(config: PipelineConfig, ranks: int) -> Hello:
    """What this machine says to the others; the command must be the same on all of them."""
    command = {
        "launch.nnodes": config.launch.nnodes,
        "run_name": state.run_name(config),
        "steps": [step.value for step in config.steps],
        "settings": state.config_hash(config)[:12],
        "force": config.force,
        **{f"version of {name}": version_of(name) for name in ("rlhf-pipeline", "torch", "deepspeed")},
    }
    return Hello(config.launch.node_rank or 0, ranks, command, socket.gethostname())


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:  # this project, in a folder that was only copied
        return "not installed"


def jobs_of(wired: Sequence[Wired], run_dir: Path, ranks: int) -> dict[str, Job]:
    """What each step runs on this machine, by name."""
    arguments = ("--config", str(run_dir / state.RESOLVED), "--run-dir", str(run_dir))
    modules = {step.stage.name.value: step.stage.module for step in wired}
    return {name: Job(module, arguments, ranks, run_dir / name / "logs") for name, module in modules.items()}


def make_report(run_dir: Path, say: Say) -> None:
    """Bring the run's report up to date. A report that cannot be made is worth a line, never the run."""
    if not run_dir.exists():
        return
    try:
        from pipeline.report import report

        report(run_dir)
    except Exception as error:
        words = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        say(f"warning: no report of {run_dir}: {' '.join(words.split())}")


def run_step(
    config: PipelineConfig,
    wired: Wired,
    run_dir: Path,
    ranks: int,
    lock: int,
    say: Say,
    machines: Machines | None,
    webhook: Webhook,
) -> int:
    """Run one step, or find that there is nothing to do. Returns its exit status."""
    name = wired.stage.name.value
    folder = run_dir / name
    try:
        before = state.read_state(folder)
    except UserError:
        if not config.force:
            raise
        before = None
    part = state.step_config(config, wired.stage)
    known = {} if before is None else before["inputs"]
    sources = load_sources(wired, run_dir)
    inputs = state.inputs_of(config, wired.stage, known, sources)
    if before is not None and not holds_work(folder):
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)  # trained on rows that may have changed
        before = {**before, "config": part, "inputs": inputs}
    moved = moved_since(before, part, wired.stage.name, folder)
    if folder.exists() and (refused := reasons_to_refuse(before, inputs, wired, run_dir, moved)):
        if not config.force:
            listed = "".join(f"\n    {line}" for line in refused)
            raise UserError(f"{name} in {folder} was made differently:{listed}", hint=KEEP_OR_START_OVER)
        say(f"{name}: starting over; the old folder is kept as {set_aside(folder)}")
        before, moved = None, Changes()
    if before is not None and is_finished(folder, before) and not moved.is_work:
        return leave_as_it_is(run_dir, wired, before, moved, say)

    resolved = state.write_resolved(config, run_dir)
    policy = sources.get(Input.policy)
    start_from = f", from {policy.path} ({policy.sha256[:12]})" if policy is not None else ""
    if (reference := sources.get(Input.reference)) is not None:
        start_from += f", with the reference {reference.path} ({reference.sha256[:12]})"
    begins = "going on" if before is not None else "starting"
    total = ranks if machines is None else sum(machines.ranks)
    size = f"{total} rank(s){f' on {len(machines.ranks)} machines' if machines is not None else ''}"
    say(f"{name}: {begins} in {folder}, {size}{start_from}")
    lines = [f"changed since it was begun: {line}" for line in moved.taken]
    if Input.reward_model in sources:
        lines += lines_on_reward_model(sources[Input.reward_model], config.reward.warn_below_accuracy)
    for line in lines:
        say(f"{name}: {line}")
    launched = state.now()
    current = {
        "step": name,
        "status": "running",
        "config": part,
        "config_hash": content_sha256(part),
        "inputs": inputs,
        "started": before["started"] if before is not None else launched,
        "launched": launched,
        "launch": state.next_launch(run_dir),
        CONTINUES: artifact_continued(folder, before),
    }
    state.write_state(folder, current)
    if machines is not None:
        machines.expect(run_dir, [resolved])
    outcome = supervise(
        jobs_of([wired], run_dir, ranks)[name],
        (lock,),
        name=name,
        others=machines,
        restarts=config.launch.max_restarts,
        say=say,
    )
    try:
        ended = conclude(run_dir, wired, current, outcome, say)
        if ended in OF_MEMORY:
            is_certain = ended == OUT_OF_MEMORY or outcome.oom_killed
            show_ways_out(config, wired.stage.name, total, ranks, is_certain=is_certain)
        alert_end(webhook, run_dir, name, ended)
        return ended
    finally:
        make_report(run_dir, say)


def moved_since(
    before: Mapping[str, Any] | None, part: Mapping[str, Any], step: Step, folder: Path
) -> Changes:
    """What changed of a step's configuration since it was begun."""
    if before is None:
        return Changes()
    return changes(before["config"], part, step, folder, ended=is_finished(folder, before))


def leave_as_it_is(run_dir: Path, wired: Wired, before: Mapping[str, Any], moved: Changes, say: Say) -> int:
    """Verify a step that is done, and say so. Returns 0."""
    name, sha256 = wired.stage.name.value, finish(run_dir, wired, before)
    for line in moved.taken:
        say(f"{name}: {line}, which changes nothing of a step that is done")
    say(f"{name}: done already, verified: {run_dir / name / EXPORT} ({sha256[:12]})")
    return 0


def alert_end(webhook: Webhook, run_dir: Path, step: str, status: int) -> None:
    """Tell the webhook how a step ended: also one whose ranks were killed, which tell nobody."""
    if status in (0, STOPPED):
        webhook.post(AlertKind.end, step, f"{step} of {run_dir} {'finished' if status == 0 else 'stopped'}")
    else:
        died = f"killed by signal {status - 128}" if status > 128 else f"exit status {status}"
        webhook.post(AlertKind.failure, step, f"{step} of {run_dir} failed ({died})")


def lines_on_reward_model(artifact: Artifact, least: float) -> list[str]:
    """What a reward model is worth to a step that learns from it; a warning where that is too little.

    least: the share of pairs that it has to order as people did.
    """
    details = artifact.manifest.details
    named = f"reward model {artifact.path} ({artifact.sha256[:12]})"
    measured = details.get("calibration") or {}
    accuracy, pairs = measured.get("accuracy"), measured.get("pairs", 0)
    if scores_text(artifact):
        return [f"{named} is given text, which it reads in its own tokens: {details['imported']['from']}"]
    if accuracy is None:
        return [f"warning: {named} says nothing of its accuracy"]
    which = "held-out" if "eval/accuracy" in (details.get("metrics") or {}) else "training"
    lines = [f"{named} orders {share_in_words(accuracy, pairs, f'{which} pairs')} as people did"]
    if accuracy < least:
        lines.append(
            f"warning: that is less than reward.warn_below_accuracy={least}: a policy trained on it follows "
            "its mistakes"
        )
    return lines


def conclude(run_dir: Path, wired: Wired, current: Mapping[str, Any], outcome: Outcome, say: Say) -> int:
    """Record how a step ended, and tell the user what there is now. Returns the exit status to pass on."""
    name, status = wired.stage.name.value, outcome.status
    folder = run_dir / name
    if not folder.exists():  # and is not made again
        if status != UserError.EXIT_CODE:
            print(f"{name} failed: {folder} was removed while it was running", file=sys.stderr)
        return status or UserError.EXIT_CODE
    ended = {**current, "exit_status": status, "ended": state.now(), "seconds": round(outcome.seconds)}
    if status == 0:
        try:
            sha256 = finish(run_dir, wired, ended)
        except UserError:
            state.write_state(folder, {**ended, "status": "failed"})
            raise
        say(f"{name}: done")
        say(f"  artifact  {folder / EXPORT} ({sha256[:12]})")
        if (folder / state.SAMPLES).exists():
            say(f"  samples   {folder / state.SAMPLES}")
        return STOPPED if outcome.stopped else 0
    state.write_state(folder, {**ended, "status": "stopped" if status == STOPPED else "failed"})
    if status == STOPPED:
        say(f"{name}: stopped; the same command goes on from here")
    elif status != UserError.EXIT_CODE:  # a UserError was printed by the step itself
        died = f"killed by signal {status - 128}" if status > 128 else f"exit status {status}"
        logs = f"; its logs are in {folder / 'logs'}" if (folder / "logs").is_dir() else ""
        print(f"{name} failed ({died}){logs}", file=sys.stderr)
        if status - 128 == signal.SIGKILL:
            why = "the machine was out of memory: its kernel killed a process meanwhile"
            perhaps = why if outcome.oom_killed else "perhaps it ran out of memory"
            print(f"  {perhaps}; the same command goes on from its last save", file=sys.stderr)
    return status


def show_ways_out(
    config: PipelineConfig, step: Step, ranks: int, ranks_here: int, *, is_certain: bool
) -> None:
    """Say what would need less memory, as far as that can be estimated; what went wrong was said already.

    is_certain: memory was short. Otherwise the ways out are shown only where the estimate finds it short too.
    """
    from pipeline.planning import ways_out

    with contextlib.suppress(Exception):
        needed, *ways = ways_out(config, step, ranks, ranks_here=ranks_here)
        for line in [needed, *(ways if is_certain or "short" in needed else [])]:
            print(f"  {line}", file=sys.stderr)


def reasons_to_refuse(
    before: Mapping[str, Any] | None,
    inputs: Mapping[str, Any],
    wired: Wired,
    run_dir: Path,
    moved: Changes,
) -> list[str]:
    """Why the step cannot go on in its folder with this configuration; empty when it can.

    moved: what changed of the configuration.
    """
    folder = run_dir / wired.stage.name.value
    if before is None:
        return [f"{folder} holds files, but no usable {state.STATE}"] if any(folder.iterdir()) else []
    changed = [*moved.refused, *state.input_differences(before["inputs"], inputs)]
    if not changed and is_finished(folder, before):
        try:
            check_parents(Artifact(folder / EXPORT, verify(folder / EXPORT)), wired, run_dir, inputs)
        except UserError as error:
            return [error.message]
    return changed


def holds_work(folder: Path) -> bool:
    """Whether a step left anything to go on from: a checkpoint, even a broken one, or an export."""
    return (folder / EXPORT).exists() or any((folder / "checkpoints").glob("*"))


def is_finished(folder: Path, before: Mapping[str, Any]) -> bool:
    """Whether the export is complete: it appears by one rename, as the last thing a step does.

    One that the step went on from is not what it makes.
    """
    if before["status"] == "done":
        return True
    manifest = folder / EXPORT / MANIFEST
    return manifest.exists() and file_sha256(manifest) != before.get(CONTINUES)


def artifact_continued(folder: Path, before: Mapping[str, Any] | None) -> str | None:
    """Hash of the manifest of an artifact that the step had made, and goes on from; None without one."""
    if before is None:
        return None
    manifest = folder / EXPORT / MANIFEST
    return file_sha256(manifest) if is_finished(folder, before) else before.get(CONTINUES)


def finish(run_dir: Path, wired: Wired, ended: Mapping[str, Any]) -> str:
    """Verify the artifact, record it in state and lineage; returns the hash of its manifest."""
    folder = run_dir / wired.stage.name.value
    artifact = Artifact.load(folder / EXPORT, wired.stage.produces)
    check_parents(artifact, wired, run_dir, ended["inputs"])
    sha256 = artifact.sha256
    records = ended.get("records") or state.records_of(folder)
    done = {**ended, "status": "done", "manifest_sha256": sha256, "records": records}
    state.write_state(folder, done)
    record_lineage(run_dir, wired.stage, artifact, ended)
    return sha256
