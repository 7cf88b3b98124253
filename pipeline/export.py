"""`python -m pipeline export PATH`: any kept checkpoint of any step as an artifact, in any form.

Takes a run, a step's folder or a checkpoint; leaves an artifact as the step itself would have, had it ended
there: the step is started by one process, on whatever ranks it was trained, in a folder of its own that says
so. It resumes, trains nothing, and exports with its own checks. In
another dtype it does so in fp32, the optimizer's own, and the artifact is rounded once. An artifact's folder
is taken as it is. Uploading is that of `publish.py`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.artifacts import (
    ADAPTER_FOLDER,
    CARD,
    MANIFEST,
    UNVERIFIED,
    Manifest,
    file_sha256,
    hash_files,
    read_json,
    read_manifest,
    verify,
    write_json,
    write_manifest,
)
from common.card import HUB_NAME, model_card
from common.config import Dtype, to_plain
from common.errors import UserError
from common.files import commit_folder, disk_errors, unfinished, write_text
from common.handoff import TAKEN_FROM, TakenFrom, similar
from common.stage import Role, Step
from common.text import nearest
from common.training_config import Exported
from launch.local import Job, count_gpus
from launch.supervise import supervise
from pipeline.options import Options
from pipeline.plan import EXPORT, STAGES
from pipeline.publish import Destination, check_gguf, find_converter, write_gguf
from pipeline.state import METRICS, RESOLVED, read_resolved, read_state
from step3_ppo.config import CALIBRATION

CHECKPOINTS, COUNTERS = "checkpoints", "counters.json"
TOKENIZER = "tokenizer"
"""Of a step's folder: one that was trained on its rows."""
ROUNDING = "common.training.rounding"
OF_WHOLE_MODEL = (MANIFEST, CARD, "config.json")
"""Files of an artifact that adapters alone have not, beside the weights."""
OF_FORM = ("dtype", "rounded", "adapter_of")
"""Details of a manifest that differ between the forms of an artifact."""
NAMES = {"float32": Dtype.fp32, "bfloat16": Dtype.bf16, "float16": Dtype.fp16}
"""Dtypes as manifests call them."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A kept checkpoint. folder: it, below `run/<step>/checkpoints`. counters: where the step was."""

    run: Path
    step: Step
    folder: Path
    counters: dict[str, Any]


@dataclass(frozen=True)
class Form:
    """What an artifact should be like. dtype: None as it was trained. adapters: LoRA's alone, not merged."""

    dtype: Dtype | None = None
    adapters: bool = False

    @property
    def ending(self) -> str:
        """Of the folder's name."""
        dtype = f".{self.dtype.value}" if self.dtype is not None else ""
        return dtype + (f".{ADAPTER_FOLDER}" if self.adapters else "")

    def fits(self, manifest: Manifest) -> bool:
        """Whether an artifact has this form."""
        is_kind = (manifest.kind == ADAPTER_FOLDER) == self.adapters
        return is_kind and self.dtype in (None, dtype_of(manifest))


def dtype_of(manifest: Manifest) -> Dtype | None:
    """The dtype of an artifact's weights; None where it is another one."""
    return NAMES.get(str(manifest.details.get("dtype")))


@dataclass(frozen=True)
class Further:
    """What is done with an artifact beside making it; all that can be asked before has been."""

    destination: Destination | None = None
    gguf: Path | None = None
    converter: Path | None = None

    @classmethod
    def of(cls, given: argparse.Namespace, role: Role | None) -> Further:
        """UserError for what cannot be done with an artifact of this role."""
        if given.private and not given.push:
            raise UserError("--private is of a push", hint="--push ORG/NAME --private")
        if given.gguf and given.adapter:
            raise UserError("--gguf takes a whole model, and --adapter leaves a part", hint="leave one out")
        if given.gguf:
            check_gguf(given.gguf, role)
        destination = Destination.of(given.push, private=given.private) if given.push else None
        return cls(destination, given.gguf, find_converter() if given.gguf else None)

    def __bool__(self) -> bool:
        return bool(self.destination or self.gguf)

    def do(self, artifact: Path, say: Say) -> None:
        """Convert and push what lies at `artifact`."""
        if self.gguf is not None and self.converter is not None:
            write_gguf(artifact, self.gguf, self.converter, say)
        if self.destination is not None:
            self.destination.upload(artifact, say)


def export_verb(arguments: Sequence[str], *, say: Say = print) -> int:
    """The verb. Returns the exit status: that of the step's process where it could not export."""
    given = export_options(arguments)
    path, form = Path(given.path), Form(Dtype(given.dtype) if given.dtype else None, given.adapter)
    if is_artifact(path):
        further = Further.of(given, read_manifest(path).role)
        status, artifact = export_artifact(path, given.out, form, say, further=bool(further))
    else:
        found = checkpoint_of(path, given.step)
        if given.step == "best" and found.counters.get("best_step") is None:
            say("note: no checkpoint is known as the best of this step: the last that is kept is exported")
        further = Further.of(given, STAGES[found.step].produces)
        status, artifact = export_checkpoint(found, given.out, form, say, further=bool(further))
    if status == 0:
        further.do(artifact, say)
    return status


def export_options(arguments: Sequence[str]) -> argparse.Namespace:
    """What was typed after `export`. UserError for what cannot be read."""
    parser = Options("export", "PATH --step best", "Make an artifact of a checkpoint.")
    parser.add_argument(
        "path", metavar="PATH", help="a run, the folder of a step, a checkpoint or an artifact"
    )
    parser.add_argument("--step", default="best", metavar="N", help="best (default), last, or a number")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: STEP/export.step_N in the run")
    parser.add_argument(
        "--dtype", choices=[dtype.value for dtype in NAMES.values()],
        help="rounded once from the optimizer's fp32 weights; default: as it was trained",
    )  # fmt: skip
    lora = parser.add_mutually_exclusive_group()
    lora.add_argument("--merge", action="store_true", help="LoRA: merged into the base (default)")
    lora.add_argument("--adapter", action="store_true", help="LoRA: the adapters alone, as peft loads them")
    parser.add_argument("--push", metavar="ORG/NAME", help="upload it to the hub as well")
    parser.add_argument("--private", action="store_true", help="of a push: for those alone whom you let")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="convert it for llama.cpp as well")
    return parser.parse_args(list(arguments))


def is_artifact(path: Path) -> bool:
    """Whether it is an artifact's folder, or that of a published form of one."""
    return (path / MANIFEST).exists() and read_manifest(path).kind in ("artifact", ADAPTER_FOLDER)


def export_checkpoint(
    found: Checkpoint, out: Path | None, form: Form, say: Say, *, further: bool = False
) -> tuple[int, Path]:
    """Make an artifact of a checkpoint; returns the exit status, and where it is.

    out: None for a folder beside the step's own export. further: one that is there from before will do.
    """
    number, name = found.counters["step"], found.step.value
    out = out or found.run / name / f"{EXPORT}.step_{number}{form.ending}"
    if further and is_made_of(out, found, form):
        say(f"{name}: step {number} was exported before: {out}")
        return 0, out
    check_is_new(out)
    resolved = read_resolved(found.run)["model"]
    if form.adapters and not resolved["lora"]["enabled"]:
        raise no_adapters(found.run)
    trained = Dtype(resolved["dtype"])
    if form.dtype is None and trained is Dtype.fp16 and not count_gpus():  # CPUs train in fp32 and bf16
        form = replace(form, dtype=Dtype.fp16)
    say(f"{name}: exporting {found.folder}, step {number}")
    with beside(out, say) as folder:
        run = folder / found.run.name
        lay_out(found, run, Dtype.fp32 if form.dtype is not None else trained)
        job = Job(STAGES[found.step].module, ("--config", str(run / RESOLVED), "--run-dir", str(run)))
        status = supervise(job).status
        failed = run / name / f"{EXPORT}.{UNVERIFIED}"
        if failed.exists():
            commit_folder(failed, out)
            say(f"  what failed its check is kept in {out}; no step takes it")
        if status == 0:
            status = commit_as(run / name / EXPORT, out, form, folder, say)
    return status, out


def is_made_of(out: Path, found: Checkpoint, form: Form) -> bool:
    """Whether a folder holds the artifact of a checkpoint, in this form."""
    made = read_manifest(out) if is_artifact(out) else None
    if made is None or not form.fits(made):
        return False
    progress = made.details.get("progress") or {"step": None}
    return all(found.counters.get(name) == value for name, value in progress.items() if name != "watchdogs")


def is_form_of(out: Path, manifest: Manifest, form: Form) -> bool:
    """Whether a folder holds this form of an artifact."""
    made = read_manifest(out) if is_artifact(out) else None
    if made is None or not form.fits(made):
        return False
    ours, theirs = (
        {name: value for name, value in side.details.items() if name not in OF_FORM}
        for side in (made, manifest)
    )
    return ours == theirs


def export_artifact(
    path: Path, out: Path | None, form: Form, say: Say, *, further: bool = False
) -> tuple[int, Path]:
    """Make another form of an artifact; returns the exit status, and where it is.

    further: what has the form already will do; otherwise that is a UserError.
    """
    manifest = verify(path)
    form = replace(form, adapters=form.adapters or manifest.kind == ADAPTER_FOLDER)
    if form.fits(manifest):
        if further and out is None:
            return 0, path
        raise UserError(
            f"{path} is an artifact already",
            hint="name a run or a checkpoint to make one, or another form of it: --dtype, --adapter",
        )
    if form.adapters and manifest.kind != ADAPTER_FOLDER and not (path / ADAPTER_FOLDER).is_dir():
        raise no_adapters(path)
    out = out or path.with_name(path.name + form.ending)
    if further and is_form_of(out, manifest, form):
        say(f"{path} was exported before: {out}")
        return 0, out
    check_is_new(out)
    with beside(out, say) as folder:
        made = shutil.copytree(path, folder / path.name) if form.adapters else path
        return commit_as(made, out, form, folder, say), out


def check_is_new(out: Path) -> None:
    """UserError for a folder that is there."""
    if out.exists():
        raise UserError(f"{out} exists, and nothing is overwritten", hint="--out NEW_FOLDER, or remove it")


def no_adapters(path: Path) -> UserError:
    """What is said of weights that were all trained."""
    return UserError(
        f"--adapter: {path} was trained without LoRA: all its weights changed", hint="leave --adapter out"
    )


@contextmanager
def beside(out: Path, say: Say) -> Iterator[Path]:
    """A folder for what is not finished, on the disk of `out`."""
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(".export.", out.parent, say) as folder:
            yield folder


def commit_as(made: Path, out: Path, form: Form, folder: Path, say: Say) -> int:
    """Bring a whole artifact into a form, and commit it. Returns the status of the process that rounds.

    folder: for what is not finished; what lies there may be changed.
    """
    if form.adapters and (made / ADAPTER_FOLDER).is_dir():
        keep_adapters(made)
    if form.dtype not in (None, dtype_of(read_manifest(made))):
        assert form.dtype is not None
        rounded = folder / "rounded"
        arguments = (str(made), "--dtype", form.dtype.value, "--out", str(rounded))
        if status := supervise(Job(ROUNDING, arguments)).status:
            return status
        made = rounded
    commit_folder(made, out)
    say(f"  {'adapters' if form.adapters else 'artifact'}  {out} ({file_sha256(out / MANIFEST)[:12]})")
    return 0


def keep_adapters(folder: Path) -> None:
    """Leave of an artifact its adapters, as peft and transformers load them on their base, and the tokenizer.

    UserError where tokens were added: the base's embeddings have no rows for them.
    """
    manifest = read_manifest(folder)
    settings = read_json(folder / ADAPTER_FOLDER / "adapter_config.json")
    base = settings["base_model_name_or_path"]
    if not base:
        raise UserError(
            "--adapter: the base was initialised at random, and is nowhere to load from", hint="leave it out"
        )
    check_same_vocabulary(folder / "config.json", Path(base) / "config.json")
    for path in folder.iterdir():
        if path.name in OF_WHOLE_MODEL or ".safetensors" in path.suffixes:
            path.unlink()
    if Path(base).is_dir():  # to be found from any working directory
        found = {**settings, "base_model_name_or_path": str(Path(base).resolve())}
        write_json(folder / ADAPTER_FOLDER / "adapter_config.json", found)
    for path in (folder / ADAPTER_FOLDER).iterdir():
        path.rename(folder / path.name)
    (folder / ADAPTER_FOLDER).rmdir()
    assert manifest.role is not None
    is_published = HUB_NAME.fullmatch(base) and not Path(base).exists()
    details = {**manifest.details, "adapter_of": base if is_published else Path(base).name}
    write_text(folder / CARD, model_card(manifest.role, details))
    write_manifest(folder, Manifest(ADAPTER_FOLDER, manifest.role, hash_files(folder), details))


def check_same_vocabulary(made: Path, base: Path) -> None:
    """UserError where the base is at hand and has another number of tokens."""
    if not base.exists():
        return
    ours, theirs = (read_json(path).get("vocab_size") for path in (made, base))
    if ours != theirs:
        raise UserError(
            f"--adapter: the model has {ours} tokens and its base {base.parent} {theirs}",
            hint="adapters hold no embeddings: leave --adapter out, for merged weights",
        )


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


def has_ended(found: Checkpoint) -> bool:
    """Whether the step that a checkpoint is of was done; False while it can still go on."""
    state = read_state(found.run / found.step.value)
    return state is not None and state["status"] == "done"


def lay_out(found: Checkpoint, run: Path, dtype: Dtype | None = None) -> None:
    """Write a run's folder in which the step does nothing but export the checkpoint, on one rank.

    dtype: None for that of the run.
    """
    from omegaconf import OmegaConf

    name, step = found.step.value, run / found.step.value
    resolved = OmegaConf.create(read_resolved(found.run))
    trained = resolved.model.dtype
    OmegaConf.update(resolved, f"{name}.train.export", Exported.last.value)
    if dtype is not None:
        OmegaConf.update(resolved, "model.dtype", dtype.value)
    OmegaConf.update(resolved, "deepspeed.hpz_partition_size", 1)
    OmegaConf.update(resolved, "tracking", {"to": [], "webhook": None})
    (step / CHECKPOINTS).mkdir(parents=True)
    (step / CHECKPOINTS / found.folder.name).symlink_to(found.folder.resolve())
    write_text(run / RESOLVED, OmegaConf.to_yaml(resolved))
    of_run = TakenFrom(has_ended(found), file_sha256(found.run / RESOLVED), {"model.dtype": trained})
    write_json(step / TAKEN_FROM, to_plain(of_run))
    for there in (found.run / name / kept for kept in (METRICS, TOKENIZER, CALIBRATION)):
        if there.is_dir():
            shutil.copytree(there, step / there.name)
        elif there.exists():
            shutil.copy(there, step / there.name)
