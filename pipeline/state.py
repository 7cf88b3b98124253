"""What a run's folder remembers: its lock, the state of each step, and what has changed since.

Takes folders and configurations; returns states and differences. `state.json` in a step's folder
records the configuration and inputs it was started with and how it ended. Decides nothing (see
`pipeline/run.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.artifacts import Artifact, FileRecord, content_sha256, file_sha256, read_json, write_json
from common.config import DataConfig, Dtype, dtype_on, to_plain
from common.errors import UserError
from common.files import disk_errors, write_text
from common.paths import files_of
from common.stage import Input, Stage, Step
from pipeline.config import PipelineConfig

STATE = "state.json"
RESOLVED = "resolved.yaml"
LOCK = ".lock"
METRICS, SAMPLES, LEDGER = "metrics.jsonl", "samples.jsonl", "ledger.json"
"""What a step writes of its training, of its completions and of its rows."""
CHECKSUM = "checksum"
NOT_RECORDED = (STATE, "export", "checkpoints", "logs", "wandb", "wandb_run_id", "tensorboard")
DYING_SECONDS = 10.0
"""How long the ranks of a killed controller may hold its lock."""

# What may change under a run without changing its result; inside a list: of each of its entries.
FREE_KEYS = (
    ("train", "keep_checkpoints"),
    ("train", "save_minutes"),
    ("train", "async_save"),
    ("data", "cache_dir"),
    ("ptx_data", "cache_dir"),
    ("warn_below_accuracy",),
    ("offload_frozen",),
    ("rewards", "timeout"),
    ("rewards", "retries"),
    ("rewards", "concurrency"),
)

NO_PART_IN_RESULTS = ("run_name", "output_dir", "force", "launch", "tracking")

# What an artifact brings along: for a step that starts from one, these say nothing.
BASE_MODEL_KEYS = ("path", "revision", "config", "tokenizer", "chat_template")


def lock_run(folder: Path) -> int:
    """Lock the run's folder, which is made, until the returned file descriptor is closed everywhere.

    Processes that inherit the descriptor keep the lock. UserError naming the holder when it is
    taken; when the holder is dead, its ranks are given a moment to die as well.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + DYING_SECONDS
    while not _try_lock(descriptor, folder):
        holder = os.pread(descriptor, 400, 0).decode(errors="replace").strip()
        if not _is_dead(holder) or time.monotonic() > end:
            os.close(descriptor)
            raise UserError(
                f"another run is using {folder} ({holder or 'holder unknown'})",
                hint="wait for it, stop it (kill and the process number), or choose another run_name",
            )
        time.sleep(0.05)
    with disk_errors(folder):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _holder(os.getpid()).encode(), 0)
    return descriptor


def is_abandoned(folder: Path) -> bool:
    """Whether the process that last held the run's lock is known to be no more; takes no lock itself."""
    try:
        holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return _is_dead(holder.strip())


def _try_lock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        os.close(descriptor)
        raise UserError(
            f"{folder} cannot be locked: {error.strerror}", hint="output_dir=FOLDER_ON_A_LOCAL_DISK"
        ) from None
    return True


def _holder(process_id: int) -> str:
    return f"host {socket.gethostname()}, process {process_id}"


def _is_dead(holder: str) -> bool:
    """Whether the recorded holder was a process of this host that is no more."""
    number = holder.rpartition(" ")[2]
    if number.isdecimal() and holder == _holder(int(number)):
        try:
            os.kill(int(number), 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # of another user
            return False
    return False


def step_config(config: PipelineConfig, stage: Stage) -> dict[str, Any]:
    """The part of the configuration that decides a step's result, as plain values.

    Where an artifact lies is not part of it; what is in it is one of the step's inputs (see `inputs_of`).
    """
    name = stage.name.value
    part = {key: to_plain(getattr(config, key)) for key in ("seed", "model", name, "deepspeed")}
    for *groups, leaf in FREE_KEYS:
        holder = part[name]
        for group in groups:
            holder = holder.get(group, {})
        for holding in holder if isinstance(holder, list) else [holder]:
            holding.pop(leaf, None)
    for taken in stage.consumes:
        part[name].pop(taken.value, None)
    if Input.policy in stage.consumes:
        for key in BASE_MODEL_KEYS:
            part["model"].pop(key)
    return part


def settle_dtype(config: PipelineConfig, run_dir: Path, *, gpu: bool) -> tuple[PipelineConfig, str | None]:
    """The configuration with a dtype in place of `model.dtype=auto`, and a line that says which and why.

    That which a step of the run has begun with, wherever it goes on; else by the kind of device. The run's
    name goes with it, since the name of a run is the same on every device.
    """
    if config.model.dtype is not Dtype.auto:
        return config, None
    here = dtype_on(Dtype.auto, gpu=gpu)
    recorded = dtype_of_run(run_dir)
    chosen = recorded or here
    why = "ranks run on GPUs" if gpu else "ranks run on the CPU"
    because = f"since {why}"
    if recorded not in (None, here):
        because = f"which this run began with; {why}, where a new run would take {here.value}"
    settled = replace(config, run_name=run_name(config), model=replace(config.model, dtype=chosen))
    return settled, f"model.dtype=auto: {chosen.value}, {because}"


def dtype_of_run(run_dir: Path) -> Dtype | None:
    """What the run's steps began with; None before any did."""
    for step in Step:
        try:
            before = read_state(run_dir / step.value)
            dtype = Dtype(before["config"]["model"]["dtype"]) if before is not None else None
        except (UserError, KeyError, TypeError, ValueError):  # said where the step is run
            continue
        if dtype not in (None, Dtype.auto):
            return dtype
    return None


def run_name(config: PipelineConfig) -> str:
    """The run's name; without one, the steps and a hash of everything that decides their results."""
    if config.run_name is not None:
        return config.run_name
    steps = "-".join(step.value for step in config.steps)
    return f"{steps}-{config_hash(config)[:8]}"


def is_run(folder: Path) -> bool:
    """Whether a run has left anything in the folder that says so."""
    of_steps = (f"{step.value}/{name}" for step in Step for name in (STATE, METRICS))
    return any((folder / mark).exists() for mark in (RESOLVED, *of_steps))


def run_folder(config: PipelineConfig) -> Path:
    """Where the run is, or will be."""
    return Path(config.output_dir) / run_name(config)


def config_hash(config: PipelineConfig) -> str:
    """Hash of everything that decides the run's results; steps that do not run have no part in it."""
    idle = [step.value for step in Step if step not in config.steps]
    left_out = (*NO_PART_IN_RESULTS, "objective", *idle)
    return content_sha256({key: value for key, value in to_plain(config).items() if key not in left_out})


def read_state(folder: Path) -> dict[str, Any] | None:
    """A step's state; None when it was never started. UserError when the file is damaged."""
    path = folder / STATE
    try:
        state = read_json(path)
        state["status"], state["config"], state["inputs"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: {error!r}",
            hint="a new run_name starts afresh; force=true sets this folder aside and starts over",
        ) from None
    return dict(state)


def records_of(folder: Path) -> dict[str, FileRecord]:
    """Hash and size of what a step has recorded: metrics, samples, ledgers, its own tokenizer; by path.

    Not of what has hashes of its own (artifact, checkpoints), and not of what others write (logs, W&B).
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        top = name.parts[0]
        is_own = top not in NOT_RECORDED and not top.startswith((".", "export.")) and not top.endswith(".tmp")
        if path.is_file() and is_own:
            found[name.as_posix()] = FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size)
    return found


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace a step's state; a checksum of it all is added, which `verify` looks at."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    body = {key: value for key, value in state.items() if key != CHECKSUM}
    write_json(folder / STATE, {**body, CHECKSUM: content_sha256(body)})


def now() -> str:
    """The time, in UTC, for people: clocks are set, so that it orders and measures nothing."""
    return datetime.now(UTC).isoformat(timespec="seconds")  # noqa: TID251


def next_launch(run_dir: Path) -> int:
    """A number that is larger than that of every launch of a step of this run before."""
    return 1 + max(_launch_in(run_dir / step.value) for step in Step)


def launch_of(state: Mapping[str, Any]) -> int:
    """Its number among the launches of the run; 0 where none is recorded."""
    number = state.get("launch")
    return number if isinstance(number, int) else 0


def _launch_in(folder: Path) -> int:
    with contextlib.suppress(UserError):  # a damaged one is said where its step is run
        return launch_of(read_state(folder) or {})
    return 0


def inputs_of(
    config: PipelineConfig,
    stage: Stage,
    known: Mapping[str, Any],
    sources: Mapping[Input, Artifact] | None = None,
) -> dict[str, Any]:
    """Hash of everything local that the step reads, by key.

    known: what an earlier run recorded; a file of the same size and time is not hashed again.
    sources: the artifacts that the step consumes, verified; their manifest's hash stands for all of them.
    """
    consumed = {
        f"{stage.name.value}.{taken.value}": {"path": str(artifact.path), "sha256": artifact.sha256}
        for taken, artifact in (sources or {}).items()
    }
    paths: dict[str, str | None] = {}
    for key, data in data_of(config, stage.name).items():
        for index, source in enumerate(data.all_sources()):
            paths[f"{key}.sources[{index}]"] = source.path
        paths[f"{key}.eval_path"] = data.eval_path
    if Input.policy not in stage.consumes:
        model = config.model
        paths |= {"model.path": model.path, "model.tokenizer.path": model.tokenizer.path}
        paths["model.chat_template"] = model.chat_template
    files = {
        key: fingerprint(Path(path), known.get(key))
        for key, path in paths.items()
        if path is not None and (Path(path).exists() or files_of(path))
    }
    return {**files, **consumed}


def data_of(config: PipelineConfig, step: Step) -> dict[str, DataConfig]:
    """Every data set of a step's settings, by key: `data`, and what a step may have beside it."""
    part = getattr(config, step.value)
    groups = {f"{step.value}.{field.name}": getattr(part, field.name) for field in dataclasses.fields(part)}
    return {key: group for key, group in groups.items() if isinstance(group, DataConfig)}


def fingerprint(path: Path, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Bytes, newest modification time and content hash of a file, or of all files below a folder, or of those
    that a pattern matches."""
    files = files_of(str(path))
    stats = [file.stat() for file in files]
    found: dict[str, Any] = {
        "bytes": sum(stat.st_size for stat in stats),
        "files": len(files),
        "modified": max((stat.st_mtime_ns for stat in stats), default=0),
    }
    if known is not None and all(known.get(name) == value for name, value in found.items()):
        return dict(known)
    if path.is_file():
        return {**found, "sha256": file_sha256(path)}
    hashes = {
        os.path.relpath(file, path) if path.is_dir() else str(file): file_sha256(file) for file in files
    }
    return {**found, "sha256": content_sha256(hashes)}


def differing(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old, new) of every leaf in which two configurations differ; a list is one leaf. A key that is not
    there, as in what an older version wrote, says the same as null."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({**old, **new}):
            yield from differing(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif _without_nulls(old) != _without_nulls(new):
        yield prefix, old, new


def _without_nulls(value: Any) -> Any:
    """Entries of a list without their keys that are null."""
    if not isinstance(value, list):
        return value
    return [
        {key: inner for key, inner in entry.items() if inner is not None}
        if isinstance(entry, dict)
        else entry
        for entry in value
    ]


def input_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines for every input whose content changed; paths and times do not count."""
    lines = []
    for key in sorted({**old, **new}):
        before, after = (side.get(key, {}).get("sha256", "nothing") for side in (old, new))
        if before != after:
            lines.append(f"content of {key}: {before[:12]} -> {after[:12]}")
    return lines


def shown(value: Any) -> str:
    """A value as messages have it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."


def write_resolved(config: PipelineConfig, folder: Path) -> Path:
    """Write the whole configuration for the ranks, as it is: composing has refused credentials. Its path."""
    from omegaconf import OmegaConf

    plain = {**to_plain(config), "run_name": run_name(config)}
    path = folder / RESOLVED
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(plain)))
    return path


def read_resolved(run_dir: Path) -> dict[Any, Any]:
    """The configuration that was written for the run's ranks last, as plain values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = run_dir / RESOLVED
    try:
        resolved = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(resolved, dict):
        raise UserError(f"{path} holds no settings")
    return resolved
