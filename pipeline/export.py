"""`python -m pipeline export PATH`: any kept checkpoint of any step as an artifact.

Takes a run, a step's folder or a checkpoint; leaves an artifact as the step itself would have, had it ended
there: the step is started by one process, on whatever ranks it was trained, in a folder of its own in which
that checkpoint is its last step. It resumes, has nothing left to train, and exports with its own checks.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.artifacts import MANIFEST, UNVERIFIED, Artifact, read_json
from common.errors import UserError
from common.files import commit_folder, disk_errors, write_text
from common.handoff import similar
from common.stage import Step
from common.text import nearest
from launch.local import Job
from launch.supervise import supervise
from pipeline.options import Options
from pipeline.plan import EXPORT, STAGES
from pipeline.state import METRICS, RESOLVED, read_resolved

CHECKPOINTS, COUNTERS = "checkpoints", "counters.json"
TOKENIZER = "tokenizer"
"""Of a step's folder: one that was trained on its rows."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A kept checkpoint. folder: it, below `run/<step>/checkpoints`. counters: where the step was."""

    run: Path
    step: Step
    folder: Path
    counters: dict[str, Any]


def export_verb(arguments: Sequence[str], *, say: Say = print) -> int:
    """The verb. Returns the exit status: that of the step's process where it could not export."""
    given = export_options(arguments)
    found = checkpoint_of(Path(given.path), given.step)
    number = found.counters["step"]
    out = given.out or found.run / found.step.value / f"{EXPORT}.step_{number}"
    if out.exists():
        raise UserError(f"{out} exists, and nothing is overwritten", hint="--out NEW_FOLDER, or remove it")
    say(f"{found.step.value}: exporting {found.folder}, step {number}")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export.", dir=out.parent) as beside:
        run = Path(beside) / found.run.name
        lay_out(found, run)
        job = Job(STAGES[found.step].module, ("--config", str(run / RESOLVED), "--run-dir", str(run)))
        status = supervise(job).status
        for made in (EXPORT, f"{EXPORT}.{UNVERIFIED}"):
            if (run / found.step.value / made).exists():
                commit_folder(run / found.step.value / made, out)
    if status == 0:
        artifact = Artifact.load(out, STAGES[found.step].produces)
        say(f"  artifact  {out} ({artifact.sha256[:12]})")
    elif out.exists():
        say(f"  what failed its check is kept in {out}; no step takes it")
    return status


def export_options(arguments: Sequence[str]) -> argparse.Namespace:
    """What was typed after `export`. UserError for what cannot be read."""
    parser = Options("export", "PATH --step best", "Make an artifact of a checkpoint.")
    parser.add_argument("path", metavar="PATH", help="a run, the folder of a step, or a checkpoint")
    parser.add_argument("--step", default="best", metavar="N", help="best (default), last, or a number")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: STEP/export.step_N in the run")
    return parser.parse_args(list(arguments))


def checkpoint_of(path: Path, wanted: str) -> Checkpoint:
    """The checkpoint that is meant by a run (of its latest step that has some), a step, or itself.

    wanted: best, last or the number of a step. UserError naming those that there are.
    """
    if path.parent.name == CHECKPOINTS:
        folder = path.parent.parent
    else:
        steps = [path / step.value for step in reversed(Step) if (path / step.value / CHECKPOINTS).is_dir()]
        folder = steps[0] if steps else path
    if not (folder / CHECKPOINTS).is_dir() or folder.name not in Step.__members__:
        what = "has no checkpoints" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}", hint=similar(path) if not path.exists() else "name a run")
    kept = {counters["step"]: each for each in below(folder) if not (counters := read(each)).get("update")}
    if path.parent.name == CHECKPOINTS and path not in kept.values():
        raise UserError(
            f"{path} is in the midst of an iteration", hint=f"whole ones are kept: {listed(kept)}"
        )
    if not kept:
        raise UserError(f"{folder} has no checkpoint yet", hint="it is written while the step trains")
    last = max(kept)
    best = read(kept[last]).get("best_step")
    named = {"last": last, "best": last if best is None else best}
    if path.parent.name == CHECKPOINTS:
        wanted = str(read(path)["step"])
    number = named.get(wanted, int(wanted) if wanted.isdecimal() else None)
    if number not in kept:
        near = nearest(wanted, named)
        hint = f"did you mean --step {near[0]}?" if near else f"kept are {listed(kept)}; or best, last"
        raise UserError(f"--step {wanted}: {folder} keeps no such checkpoint", hint=hint)
    return Checkpoint(folder.parent, Step(folder.name), kept[number], read(kept[number]))


def below(folder: Path) -> list[Path]:
    """The finished checkpoints of a step's folder, oldest first."""
    return sorted(each for each in (folder / CHECKPOINTS).glob("step_*") if (each / MANIFEST).exists())


def listed(kept: Iterable[int]) -> str:
    """Numbers of steps, for messages."""
    return ", ".join(str(step) for step in sorted(kept)) or "none"


def read(folder: Path) -> dict[str, Any]:
    """Where the step was at a checkpoint. UserError where its files cannot be read."""
    try:
        counters = read_json(folder / COUNTERS)
        return {**counters, "step": int(counters["step"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} is damaged: {error!r}", hint="name another checkpoint") from None


def lay_out(found: Checkpoint, run: Path) -> None:
    """Write a run's folder in which the checkpoint is the last that the step can do, on one rank."""
    from omegaconf import OmegaConf

    name, step = found.step.value, run / found.step.value
    resolved = OmegaConf.create(read_resolved(found.run))
    OmegaConf.update(resolved, f"{name}.train.max_steps", found.counters["step"])
    OmegaConf.update(resolved, "deepspeed.hpz_partition_size", 1)
    OmegaConf.update(resolved, "tracking", {"to": [], "webhook": None})
    (step / CHECKPOINTS).mkdir(parents=True)
    (step / CHECKPOINTS / found.folder.name).symlink_to(found.folder.resolve())
    write_text(run / RESOLVED, OmegaConf.to_yaml(resolved))
    for there in (found.run / name / METRICS, found.run / name / TOKENIZER):
        if there.is_dir():
            shutil.copytree(there, step / there.name)
        elif there.exists():
            shutil.copy(there, step / there.name)
