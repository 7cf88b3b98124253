"""Re-hash what is on disk: an artifact, a checkpoint, a step, a run, or a folder of runs with their caches.

Takes a path, prints a line for everything found at or below it, and returns the exit status: 0 when all
matches, 2 otherwise. What is unfinished, set aside or interrupted is a note: no loss. Writes nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common.artifacts import (
    CARD,
    MANIFEST,
    content_sha256,
    fault_of,
    file_sha256,
    is_card_edited,
    read_json,
    read_manifest,
    unlisted,
    verify,
)
from common.errors import UserError
from common.handoff import input_of
from common.stage import Step
from pipeline.caches import CACHE_KEY, REFERENCES, used_by, verify_cached, verify_used
from pipeline.lineage import LINEAGE, entry_of, read_lineage
from pipeline.plan import EXPORT
from pipeline.state import (
    CHECKSUM,
    LEDGER,
    LOCK,
    METRICS,
    RESOLVED,
    SAMPLES,
    STATE,
    is_abandoned,
    is_run,
    launch_of,
    read_resolved,
    read_state,
)

PROVES = "this finds damage, not malice: who can write a file can write its hash (docs/security.md)"
COMMITTED = re.compile(r"step_\d{8}")
"""Name of a checkpoint's folder."""
STATUSES = ("running", "stopped", "failed", "done")
STEPS = tuple(step.value for step in Step)
SPELLED = ("NaN", "Infinity", "-Infinity")
OTHERS = ("logs", "wandb", "tensorboard")
"""Folders that nothing here has written, or whose content nobody reads again."""

Say = Callable[[str], None]
Check = tuple[object, Callable[[], str]]
"""What is checked, by name, and what returns a description of it or raises what is wrong."""


def verify_path(path: Path, *, say: Say = print) -> int:
    """Verify everything at or below `path`. UserError when there is nothing to verify."""
    if not path.is_dir():
        what = "a file" if path.exists() else "no such folder"
        raise UserError(f"{path}: {what}", hint="name an artifact, a checkpoint or a run's folder")
    checks, notes = look_for(path)
    if not checks:
        raise UserError(
            f"{path} holds nothing to verify: no {MANIFEST} in it or below it",
            hint="the manifest is written last: what has none is not finished",
        )
    faults = sum(not _check(work, name, say) for name, work in checks)
    for place, what in notes:
        say(f"note     {place}: {what}")
    say(f"{'all is as it was written' if not faults else f'{faults} of them differ'}; {PROVES}")
    return 0 if not faults else UserError.EXIT_CODE


def look_for(path: Path) -> tuple[list[Check], list[tuple[Path, str]]]:
    """Everything to check at or below `path`, and what is unfinished or was set aside and why."""
    checks: list[Check] = []
    notes: list[tuple[Path, str]] = []
    cached: dict[Path, Check] = {}  # by where it is, whoever names it

    def refused(error: OSError) -> None:
        checks.append((error.filename, partial(_raise, error)))

    for name, below, files in os.walk(path, onerror=refused):
        folder = Path(name)
        # a checkpoint is renamed into its place with its manifest: without one, that was lost
        if MANIFEST in files or COMMITTED.fullmatch(folder.name):
            below.clear()
            checks.append((folder, partial(verify_folder, folder)))
            continue
        if CACHE_KEY in files and folder.name not in STEPS:
            below.clear()
            cached[folder.resolve()] = (folder, partial(verify_cached, folder))
            continue
        if LINEAGE in files or is_run(folder):
            checks += _of_run(folder)
            if note := _at_work(folder):
                notes.append((folder, note))
        if STATE in files or (folder.name in STEPS and METRICS in files):
            checks += _of_step(folder)
            for used in used_by(folder):
                checks.append((f"{folder / EXPORT} {used.what}", partial(verify_used, used)))
                if os.path.exists(used.place):
                    cached.setdefault(used.place.resolve(), (used.place, partial(verify_cached, used.place)))
        if folder.name == REFERENCES:
            parts = [folder / file for file in sorted(files) if file.endswith(".npz")]
            cached |= {file.resolve(): (file, partial(verify_cached, file)) for file in parts}
        notes += [(folder / other, why) for other in sorted([*below, *files]) if (why := _why_not(other))]
        links = [folder / other for other in sorted(below) if (folder / other).is_symlink()]
        notes += [(link, f"a link to {os.readlink(link)}, which is verified by that name") for link in links]
        below[:] = sorted(other for other in below if not _why_not(other) and other not in OTHERS)
    return [*checks, *cached.values()], notes


def _of_run(run_dir: Path) -> Iterator[Check]:
    """What is checked of a run's own files."""
    lineage, resolved = run_dir / LINEAGE, run_dir / RESOLVED
    if lineage.exists():
        for name, entry in _entries(run_dir).items():
            yield f"{lineage} {name}", partial(verify_lineage, run_dir, entry)
        yield lineage, partial(verify_lineage_file, run_dir)
    if resolved.exists():
        yield resolved, partial(verify_resolved, run_dir)


def _of_step(folder: Path) -> Iterator[Check]:
    """What is checked of a step's own files."""
    readers = {METRICS: verify_metrics, SAMPLES: verify_samples, LEDGER: verify_ledger}
    yield folder / STATE, partial(verify_state, folder)
    for name, work in readers.items():
        if (folder / name).exists():
            yield folder / name, partial(work, folder)
    for name in _recorded(folder):
        if name not in readers:
            yield folder / name, partial(verify_record, folder, name)


def _why_not(name: str) -> str | None:
    """Why something is not looked into; None for what is."""
    if name.endswith(".tmp") or ".tmp-" in name:
        return "unfinished; it is removed or written anew when its step runs again"
    return "set aside because it could not be verified" if name == "quarantine" else None


def _at_work(run_dir: Path) -> str | None:
    """Whether the run is going on, or was interrupted."""
    running = [step for step in STEPS if _known(run_dir / step).get("status") == "running"]
    if not running:
        return None
    if (run_dir / LOCK).exists() and not is_abandoned(run_dir):
        return f"{running[-1]} may be at work: what it is writing now looks unfinished"
    return f"{running[-1]} was interrupted; the same command goes on from its last checkpoint"


def _known(step_dir: Path) -> dict[str, Any]:
    """A step's state; empty where there is none, or none that can be read: `verify_state` says so."""
    try:
        return read_state(step_dir) or {}
    except (UserError, OSError):
        return {}


def _recorded(folder: Path) -> Mapping[str, Any]:
    """Hashes of what a step that is done has recorded, by path."""
    records = _known(folder).get("records", {})
    return records if isinstance(records, Mapping) else {}


# --- Artifacts, checkpoints, lineage ---------------------------------------------------------------


def verify_folder(folder: Path) -> str:
    """Verify one finished folder; returns a description of it."""
    manifest = verify(folder)
    size = sum(record["bytes"] for record in manifest.files.values())
    role = f" ({manifest.role.value})" if manifest.role is not None else ""
    extra = unlisted(folder, manifest)
    more = f"; beside them, in no record: {', '.join(extra[:5])}" if extra else ""
    more += f" and {len(extra) - 5} more" if len(extra) > 5 else ""
    more += f"; {CARD} was edited" if is_card_edited(folder, manifest) else ""
    return f"{manifest.kind}{role}, {len(manifest.files)} files, {size:,} bytes{more}"


def verify_lineage_file(run_dir: Path) -> str:
    """Hold lineage.json against the states and manifests that it was made from."""
    place = run_dir / LINEAGE
    entries = read_lineage(place)
    if {**_json_object(place), "artifacts": None} != {"format_version": 1, "artifacts": None}:
        raise UserError(f"{place} is damaged: it holds more than artifacts of format version 1")
    expected = {
        name: entry_of(name, read_manifest(run_dir / name / EXPORT), state["manifest_sha256"], state)
        for name in STEPS
        if (state := read_state(run_dir / name)) is not None and state["status"] == "done"
    }
    if missing := sorted(expected.keys() - entries.keys()):
        raise UserError(f"{place}: {', '.join(missing)} is done, but not in it")
    if strange := sorted(entries.keys() - set(STEPS)):
        raise UserError(f"{place}: {', '.join(strange)} is no step")
    for name in expected:
        keys = sorted({*expected[name], *entries[name]})
        if other := [key for key in keys if expected[name].get(key) != entries[name].get(key)]:
            raise UserError(f"{place} {name}: {', '.join(other)} differ from {run_dir / name / STATE}")
    return f"{len(entries)} artifact(s)"


def verify_lineage(run_dir: Path, entry: Mapping[str, Any]) -> str:
    """Check that an artifact and its parents are those that were recorded; returns a description.

    Parents outside of the run are re-hashed: nothing else in it would notice that they are damaged.
    """
    folder = run_dir / entry["path"]
    _is_recorded(folder, entry["manifest_sha256"], "")
    parents = list(entry.get("parents") or [])
    if parents != list(read_manifest(folder).details.get("parents") or []):
        raise UserError(f"{folder}: its manifest names other parents than {LINEAGE}")
    for parent in parents:
        place = run_dir / parent["path"]  # an absolute path stays what it is
        _is_recorded(place, parent["manifest_sha256"], f"the {parent['role']} that {folder} was made from")
        if Path(parent["path"]).is_absolute():
            verify(place)
    listed = ", ".join(f"{input_of(parent)} {parent['path']}" for parent in parents)
    return f"lineage, made from {listed}" if parents else "lineage, made from no other artifact"


def _entries(run_dir: Path) -> dict[str, Any]:
    try:
        return dict(sorted(read_lineage(run_dir / LINEAGE).items()))
    except UserError:  # verify_lineage_file says so
        return {}


def _is_recorded(folder: Path, recorded: str, what: str) -> None:
    """UserError unless the folder's manifest is the recorded one. what: what the folder is, in words."""
    name = f"{folder} ({what})" if what else str(folder)
    if not (folder / MANIFEST).exists():
        raise UserError(f"{name}: recorded in {LINEAGE}, but it has no {MANIFEST}")
    if (found := file_sha256(folder / MANIFEST)) != recorded:
        raise UserError(f"{name}: another artifact ({found[:12]}) than recorded ({recorded[:12]})")


def verify_resolved(run_dir: Path) -> str:
    """Hold resolved.yaml against what the step that was launched last has recorded of it."""
    place, resolved = run_dir / RESOLVED, read_resolved(run_dir)
    states = {run_dir / name: state for name in STEPS if (state := read_state(run_dir / name)) is not None}
    if not states:
        return "readable; no step has begun"
    folder, last = max(states.items(), key=lambda found: launch_of(found[1]))
    if last["status"] == "done":
        made_with = read_manifest(folder / EXPORT).details.get("resolved_config_hash")
        if made_with not in (None, file_sha256(place)):
            raise UserError(f"{place}: not the configuration that {folder} was made with")
    if other := list(_other_settings(last["config"], resolved)):
        raise UserError(f"{place}: {', '.join(other[:5])} differ from {folder / STATE}")
    return "the configuration that was used last"


def _other_settings(recorded: Any, resolved: Any, key: str = "") -> Iterator[str]:
    """Keys of leaves of the recorded configuration, which has not all of them, that are other ones."""
    if isinstance(recorded, Mapping) and isinstance(resolved, Mapping):
        for name, value in recorded.items():
            yield from _other_settings(value, resolved.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(recorded, list) and isinstance(resolved, list) and len(recorded) == len(resolved):
        for number, (one, other) in enumerate(zip(recorded, resolved, strict=True)):
            yield from _other_settings(one, other, f"{key}[{number}]")
    elif recorded != resolved:
        yield key


# --- A step's own files ----------------------------------------------------------------------------


def verify_state(folder: Path) -> str:
    """Hold a step's state against what is there."""
    place = folder / STATE
    state = read_state(folder)
    if state is None:
        raise UserError(f"{place} is missing, beside what the step has left")
    recorded = state.pop(CHECKSUM, None)
    is_old = recorded is None and "records" not in state  # then it has neither
    if recorded != content_sha256(state) and not is_old:
        raise UserError(f"{place} is damaged: its checksum does not match its content")
    status, export = state["status"], folder / EXPORT
    if status not in STATUSES:
        raise UserError(f"{place}: unknown status {status}")
    if state.get("config_hash") != content_sha256(state["config"]):
        raise UserError(f"{place}: its configuration has another hash than recorded")
    is_there = (export / MANIFEST).exists()
    if status != "done":
        words = f"{status}, with an artifact that the same command will record" if is_there else status
        return f"{folder.name} is {words}" if status == "running" else f"{folder.name} {words}"
    if not is_there:
        raise UserError(f"{place} says done, but there is no finished {export}")
    if file_sha256(export / MANIFEST) != state.get("manifest_sha256"):
        raise UserError(f"{place} says done, with another artifact than {export}")
    if missing := [name for name in _recorded(folder) if not (folder / name).exists()]:
        raise UserError(f"{folder}: {', '.join(missing)} recorded, but missing")
    return f"{folder.name} is done"


def verify_record(folder: Path, name: str) -> str:
    """Hold a file against its hash, which is recorded when the step is done."""
    record = _recorded(folder).get(name)
    if record is None:
        return "readable, not hashed"
    if fault := fault_of(folder / name, record["bytes"], record["sha256"]):
        raise UserError(f"{folder / name}: {fault}")
    return f"{record['bytes']:,} bytes"


def verify_metrics(folder: Path) -> str:
    """Every line is a JSON object of numbers with a step, and the steps never go back."""
    steps: list[int] = []
    for number, record in _json_lines(folder / METRICS, is_done=METRICS in _recorded(folder)):
        where = f"{folder / METRICS}:{number}"
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise UserError(f"{where}: no step")
        if steps and step < steps[-1]:
            raise UserError(f"{where}: step {step} after step {steps[-1]}")
        steps.append(step)
        for name, value in record.items():
            if not isinstance(value, int | float) and value not in SPELLED:
                raise UserError(f"{where}: {name} is no number")
    said = f"{len(steps)} lines up to step {steps[-1]}" if steps else "empty"
    return f"{said}, {verify_record(folder, METRICS)}"


def verify_samples(folder: Path) -> str:
    """Every line is a JSON object."""
    lines = sum(1 for _ in _json_lines(folder / SAMPLES, is_done=SAMPLES in _recorded(folder)))
    return f"{lines} lines, {verify_record(folder, SAMPLES)}"


def verify_ledger(folder: Path) -> str:
    """The ledger of the data is a JSON object."""
    _json_object(folder / LEDGER)
    return verify_record(folder, LEDGER)


def _json_lines(path: Path, *, is_done: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines with their numbers. A torn last one is passed over while its step is not done."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            is_torn = not line.endswith(b"\n")
            try:
                record = json.loads(line, parse_constant=_not_strict)
            except (ValueError, RecursionError) as error:
                if is_torn and not is_done:
                    return
                raise UserError(f"{path}:{number} is no JSON: {error}") from None
            if not isinstance(record, dict) or (is_torn and is_done):
                raise UserError(f"{path}:{number} is {'cut short' if is_torn else 'no JSON object'}")
            yield number, record


def _not_strict(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return value


def _raise(error: OSError) -> str:
    raise error


def _check(work: Callable[[], str], name: object, say: Say) -> bool:
    try:
        say(f"ok       {name}: {work()}")
        return True
    except UserError as error:
        say(f"DIFFERS  {error.message}")
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        say(f"DIFFERS  {name}: damaged entry ({error!r})")
    except OSError as error:
        say(f"DIFFERS  {name}: cannot be read ({error.strerror})")
    return False
