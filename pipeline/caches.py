"""What runs have cached, held against its own records, and against what artifacts were made from.

Takes folders; returns descriptions, or raises a UserError that says what differs and what that means. A cache
is no part of an artifact: one that was cleaned away is made anew from the same data. Writes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.artifacts import fault_of, file_sha256, read_json, read_manifest
from common.errors import UserError
from pipeline.plan import EXPORT
from pipeline.state import read_resolved

CACHE_KEY = "key.json"
"""Written last into a folder of tokenized rows (see common/data/cache.py)."""
ROWS = "rows.arrow"
REFERENCES = "reference"
"""Folder with what DPO's starting policies say of pairs (see step2_dpo/reference.py)."""


class Used(NamedTuple):
    """What an artifact was made from, which a cache may still hold."""

    what: str
    place: Path  # a folder of rows, or a file of log-probabilities
    sha256: str  # as the artifact's manifest records it


def used_by(step_dir: Path) -> Iterator[Used]:
    """What the artifact of a step was made from, in the caches that its run names; nothing where that cannot
    be read, which others say."""
    step_dir = step_dir.absolute()
    with contextlib.suppress(UserError, OSError):
        details, settings = read_manifest(step_dir / EXPORT).details, read_resolved(step_dir.parent)
        data = details.get("data") or {}
        for key, part, sha256 in (("data", "train", "rows_sha256"), ("ptx_data", "ptx", "ptx_rows_sha256")):
            if isinstance(data.get(part), str) and isinstance(data.get(sha256), str):
                folder = _cache_dir(step_dir, settings, key) / data[part].rpartition("-")[0]
                yield Used("rows" if key == "data" else f"rows of {key}", folder, data[sha256])
        reference = details.get("reference") or {}
        if all(isinstance(reference.get(name), str) for name in ("file", "sha256")):
            file = _cache_dir(step_dir, settings, "data") / REFERENCES / reference["file"]
            yield Used("reference log-probabilities", file, reference["sha256"])


def _cache_dir(step_dir: Path, settings: Any, key: str) -> Path:
    """Where a step's rows are cached, as `common/training/step_data.py` says it."""
    for name in (step_dir.name, key, "cache_dir"):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return Path(settings) if isinstance(settings, str) else step_dir.parents[1] / ".cache" / "data"


def verify_used(used: Used) -> str:
    """Whether a cache still holds what an artifact was made from."""
    what, place, sha256 = used
    if not place.exists():
        return f"no longer in {place}; that is no damage: the same data gives them again"
    found = read_json(place / CACHE_KEY)["sha256"][ROWS] if place.is_dir() else file_sha256(place)
    if found != sha256:
        raise UserError(
            f"{place} holds other {what} ({found[:12]}) than the artifact was made from ({sha256[:12]}): "
            "they were written anew since; the artifact is unharmed, but it was not trained on these"
        )
    return f"{place} holds those that it was made from"


def verify_cached(place: Path) -> str:
    """Hold a folder of rows, or a file of log-probabilities, against its own record."""
    return verify_rows(place) if place.is_dir() else verify_reference(place)


def verify_rows(folder: Path) -> str:
    """Hold a folder of tokenized rows against its key: the folder's name, and the hashes of its files."""
    place = folder / CACHE_KEY
    try:
        body = read_json(place)
    except (OSError, ValueError) as error:
        raise UserError(f"{place} is damaged: {error}; {_ANEW}") from None
    key = json.dumps(body["key"], sort_keys=True).encode()
    if hashlib.blake2b(key, digest_size=12).hexdigest() != folder.name:
        raise UserError(f"{place} is damaged: {folder.name} is not the hash of its key; {_ANEW}")
    if strange := body.keys() - {"key", "bytes", "sha256"}:
        raise UserError(f"{place} is damaged: unknown entry {', '.join(sorted(strange))}; {_ANEW}")
    hashes = body.get("sha256", {})
    for name, size in body["bytes"].items():
        if fault := fault_of(folder / name, size, hashes[name] if hashes else None):
            raise UserError(f"{folder / name}: {fault}; {_ANEW}")
    total = sum(body["bytes"].values())
    return f"tokenized rows, {total:,} bytes{'' if hashes else ' (of an older version, without hashes)'}"


def verify_reference(path: Path) -> str:
    """The parts of a file of reference log-probabilities have the checksums that the file itself records."""
    try:
        with zipfile.ZipFile(path) as parts:
            if (damaged := parts.testzip()) is not None:
                raise ValueError(f"{damaged} differs from its checksum")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged: {error}; {_ANEW}") from None
    return f"reference log-probabilities, {path.stat().st_size:,} bytes"


_ANEW = "no artifact is harmed by that: a run that would read it notices and makes it anew"
