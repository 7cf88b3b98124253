"""Re-hash what is on disk: an artifact, a checkpoint, a step or a whole run.

Takes a path, prints one line per finished folder found below it, and returns the exit status: 0 when
everything matches, 2 otherwise. Changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common.artifacts import MANIFEST, file_sha256, read_manifest, verify
from common.errors import UserError
from pipeline.run import LINEAGE, read_lineage


def verify_path(path: Path, *, say: Callable[[str], None] = print) -> int:
    """Verify everything at or below `path`. UserError when there is nothing to verify."""
    if not path.is_dir():
        what = "a file" if path.exists() else "no such folder"
        raise UserError(f"{path}: {what}", hint="name an artifact, a checkpoint or a run's folder")
    folders = list(finished_folders(path))
    if not folders and not (path / LINEAGE).exists():
        raise UserError(
            f"{path} holds nothing to verify: no {MANIFEST} in it or below it",
            hint="the manifest is written last: what has none is not finished",
        )
    faults = sum(not _check(partial(verify_folder, folder), folder, say) for folder in folders)
    if (path / LINEAGE).exists():
        for name, entry in sorted(read_lineage(path / LINEAGE).items()):
            place = path / LINEAGE
            faults += not _check(partial(verify_lineage, path, entry), f"{place} {name}", say)
    say("all is as it was written" if not faults else f"{faults} of them differ")
    return 0 if not faults else UserError.EXIT_CODE


def finished_folders(path: Path) -> Iterator[Path]:
    """Folders with a manifest at or below `path`, without unfinished ones and what was set aside."""
    for folder, below, files in os.walk(path):
        if MANIFEST in files:
            below.clear()
            yield Path(folder)
        below[:] = sorted(name for name in below if not name.endswith(".tmp") and name != "quarantine")


def verify_folder(folder: Path) -> str:
    """Verify one finished folder; returns a description of it."""
    manifest = verify(folder)
    size = sum(record["bytes"] for record in manifest.files.values())
    role = f" ({manifest.role.value})" if manifest.role is not None else ""
    return f"{manifest.kind}{role}, {len(manifest.files)} files, {size:,} bytes"


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
    listed = ", ".join(f"{parent['role']} {parent['path']}" for parent in parents)
    return f"lineage, made from {listed}" if parents else "lineage, made from no other artifact"


def _is_recorded(folder: Path, recorded: str, what: str) -> None:
    """UserError unless the folder's manifest is the recorded one. what: what the folder is, in words."""
    name = f"{folder} ({what})" if what else str(folder)
    if not (folder / MANIFEST).exists():
        raise UserError(f"{name}: recorded in {LINEAGE}, but it has no {MANIFEST}")
    if (found := file_sha256(folder / MANIFEST)) != recorded:
        raise UserError(f"{name}: another artifact ({found[:12]}) than recorded ({recorded[:12]})")


def _check(work: Callable[[], str], name: object, say: Callable[[str], None]) -> bool:
    try:
        say(f"ok       {name}: {work()}")
    except UserError as error:
        say(f"DIFFERS  {error.message}")
        return False
    except (KeyError, TypeError) as error:
        say(f"DIFFERS  {name}: damaged entry ({error!r})")
        return False
    return True
