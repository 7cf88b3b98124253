"""What may change under a run that was begun, and what the step does then.

Takes the settings that a step was begun with, those that are asked for now, and where its newest checkpoint
is; returns differences that are refused, with reasons, and those it goes on with. A longer or a shorter run
goes on where every step that is done would have been the same: where its learning rates do not depend on the
length. Reads the counters of a checkpoint; starts nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.artifacts import read_json
from common.config import to_plain
from common.fields import as_schema
from common.rates import same_until
from common.stage import Step
from common.training_config import OptimConfig, SchedulerName
from pipeline.config import PipelineConfig
from pipeline.state import differing, shown

MEASURED = ("eval_every", "save_every", "entropy_every", "micro_batch_size")
"""Of a step's loop: they decide when is measured and saved, and the order of sums."""
LENGTH = ("max_steps", "epochs")
WAY_OUT = "a new run_name, or runs with a constant scheduler, which can be made longer"
DEFAULTS = to_plain(PipelineConfig())


@dataclass(frozen=True)
class Changes:
    """refused, taken: lines `key: old -> new`, those that are refused with a reason. is_work: whether a step
    that had ended has something to do now: to train on, or to export another step."""

    refused: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    is_work: bool = False


def changes(
    old: Mapping[str, Any], new: Mapping[str, Any], step: Step, folder: Path, *, ended: bool
) -> Changes:
    """What differs between two configurations of a step (see `state.step_config`), sorted into what may be.

    folder: the step's. ended: whether it had come to its end.
    """
    found = {
        key: (was, now)
        for key, was, now in differing(old, new)
        if key.partition(".")[0] != "deepspeed" and is_difference(key, old, now)
    }
    train = f"{step.value}.train."
    length = {f"{train}{name}" for name in LENGTH} & found.keys()
    work = {key for key in found if key == f"{train}export" or key.startswith(f"{train}stop_when")}
    free = {f"{train}{name}" for name in MEASURED}
    free |= {key for key in found if key.startswith(f"{step.value}.sampling.")}
    lines = {key: f"{key}: {shown(was)} -> {shown(now)}" for key, (was, now) in found.items()}
    refused = {key: lines[key] for key in sorted(found.keys() - length - work - free)}
    if length and (
        why := why_length_is_refused(dig(old, step.value), new[step.value], step, folder, ended=ended)
    ):
        refused |= {key: f"{lines[key]}: {why}" for key in sorted(length)}
    taken = tuple(lines[key] for key in sorted(found.keys() - refused.keys()))
    return Changes(tuple(refused.values()), taken, bool(length | work))


def why_length_is_refused(
    old: Any, new: Mapping[str, Any], step: Step, folder: Path, *, ended: bool
) -> str | None:
    """Why a step cannot go on to another length; None where it can. old, new: the step's own settings."""
    counters = newest_counters(folder)
    done, after = int(counters.get("step", 0)), new["train"]["max_steps"]
    asked, passes = dig(old, "train.max_steps"), dig(old, "train.epochs")
    before = asked or (done if ended else None)
    if after is None and (asked or not passes or new["train"]["epochs"] < passes):
        return "set max_steps: only then it is known whether fewer steps are asked for than are done"
    if after is not None and after < done:
        return f"{done:,} are done; python -m pipeline export has earlier ones that are kept"
    optims = {f"{step.value}.optim": new["optim"]}
    if step is Step.ppo and new["estimator"] == "gae":
        optims["ppo.critic.optim"] = new["critic"]["optim"]
    if not counters.get("updates", counters.get("applied", done)):
        return None
    applied = None if step is Step.ppo else counters.get("applied", done)
    reasons = (why_rates_differ(optim, key, before, after, applied) for key, optim in optims.items())
    return next(filter(None, reasons), None)


def why_rates_differ(
    settings: Mapping[str, Any], key: str, before: int | None, after: int | None, applied: int | None
) -> str | None:
    """Why learning rates of steps that are done depend on the length of the run; None where they do not.

    before, after: optimizer steps of the run, None where that is not known. applied: those that are done;
    None for PPO, whose iterations have several.
    """
    optim = as_schema(OptimConfig, settings, f"{key}.")
    shape = f"{key}.scheduler={optim.scheduler.value}"
    if optim.scheduler is SchedulerName.constant:
        return None
    if before is None or after is None or applied is None:
        return f"{shape} may depend on it; {WAY_OUT}"
    first = same_until(optim, before, after)
    if first is None or applied <= first:
        return None
    return (
        f"{shape} over {before:,} steps has other learning rates than over {after:,} from step {first + 1:,} "
        f"on, and {applied:,} are done; {WAY_OUT}"
    )


def newest_counters(folder: Path) -> dict[str, Any]:
    """Where a step's newest checkpoint is; empty without one that can be read."""
    for path in sorted((folder / "checkpoints").glob("step_????????"), reverse=True):
        with contextlib.suppress(OSError, ValueError, TypeError):
            return dict(read_json(path / "counters.json"))
    return {}


def is_difference(key: str, old: Mapping[str, Any], now: Any) -> bool:
    """Whether a difference is one: a setting that is newer than the run, at its default, is none."""
    known: Any = old
    for part in key.split("."):
        if not isinstance(known, Mapping) or part not in known:
            return now != dig(DEFAULTS, key)
        known = known[part]
    return True


def dig(settings: Any, key: str) -> Any:
    """What is at a dotted key; None where there is nothing."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings
