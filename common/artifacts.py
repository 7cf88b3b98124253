"""Folders that are proved complete: hashing, manifests, verification.

Takes a folder that a step has written and returns proof of what is in it. An artifact (a model
that plain transformers loads) and a checkpoint (resumable state) share one format: their files,
and `manifest.json` written last, so that no manifest means not finished. What the files mean is
not known here, and nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypedDict, TypeVar

from common.errors import UserError
from common.files import is_damage, write_text
from common.stage import Role
from common.text import plain

T = TypeVar("T")
FORMAT_VERSION = 1
READERS = 8
"""Files that are hashed at once, at most."""
MANIFEST = "manifest.json"
CARD = "README.md"
"""The model card of an artifact: for people to fill in, so that it may differ from what was recorded."""
VARIABLES = "chat_template_kwargs"
UNVERIFIED = "unverified"
"""Kind of an artifact that failed its check when it was exported; its details say why, under this name."""

ADAPTER_FOLDER = "adapter"
"""Kind of an artifact's form that holds adapters alone, and the folder of adapters beside merged weights."""

KINDS = ("artifact", "checkpoint", "tokenizer", UNVERIFIED, ADAPTER_FOLDER)
_SHAPES: Mapping[str, type] = {
    "data": dict, f"data.{VARIABLES}": dict, "data.stage_split": dict, "data.stage_split.shares": dict,
    "metrics": dict, "calibration": dict, "reference": dict, "origin": dict, "training": dict,
    "parents": list,
}  # fmt: skip
"""Types of the details that are looked into, where they are there."""

# Files that a loader might pick up although nobody recorded them: a stray shard or adapter changes
# what is loaded. Other extra files (a README, a plot) are harmless.
LOADED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".model", ".txt", ".py")


class Damaged(UserError):
    """A folder that is not as it was when it was finished, or never was: never used again as it is."""


class FileRecord(TypedDict):
    """What is known of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a finished folder holds, and how it came to be."""

    kind: str  # one of KINDS
    role: Role | None  # what an artifact is for; None for a checkpoint
    files: Mapping[str, FileRecord]  # by path relative to the folder, with forward slashes
    details: Mapping[str, Any] = field(default_factory=dict)  # base model, tokenizer, parents, metrics, ...
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Artifact:
    """A verified artifact on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str], role: Role, *, allow_unverified: bool = False) -> Artifact:
        """Re-hash the artifact at `path`. UserError when it is damaged, or made for another role.

        allow_unverified: take one that failed its check when it was exported, to look at it.
        """
        folder = Path(path)
        manifest = verify(folder)
        if manifest.kind == UNVERIFIED and manifest.role is role:
            if allow_unverified:
                return cls(folder, manifest)
            raise UserError(
                f"{folder} failed its check when it was exported: {manifest.details.get(UNVERIFIED)}",
                hint=f"no step takes it; look at it with: python -m pipeline chat {folder}",
            )
        if manifest.kind == ADAPTER_FOLDER:
            raise UserError(
                f"{folder} holds adapters alone, where a {role.value} is needed",
                hint="name the folder that was exported without --adapter",
            )
        found = f"a {manifest.kind}" if manifest.role is None else f"a {manifest.role.value}"
        if manifest.kind != "artifact" or manifest.role is not role:
            raise UserError(
                f"{folder} is {found}, where a {role.value} is needed",
                hint=f"name the export/ folder of a step that produces a {role.value}",
            )
        return cls(folder, manifest)

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template that all of its training rows were rendered with."""
        return dict((self.manifest.details.get("data") or {}).get(VARIABLES) or {})

    @property
    def sha256(self) -> str:
        """Identity of the artifact: the hash of its manifest, which names every file by hash."""
        return file_sha256(self.path / MANIFEST)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; reads it once, with flat memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """The same text for equal values, whatever order their keys were inserted in. NaN becomes null."""
    held = plain(value, unknown=lambda value: value)  # json refuses what it does not know
    return json.dumps(held, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def content_sha256(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: the identity of a configuration."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. OSError where it cannot be read, ValueError where it is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replace the file at `path` by the canonical JSON of `value`, in one step that survives a crash."""
    write_text(path, canonical_json(value))


def hash_files(folder: str | os.PathLike[str]) -> dict[str, FileRecord]:
    """Hash and size of every file below `folder` except its manifest, by relative path, sorted."""
    root = Path(folder)
    names = _file_names(root)
    return dict(zip(names, side_by_side(lambda name: file_record(root / name), names), strict=True))


def file_record(path: Path) -> FileRecord:
    """A file's hash and size."""
    return FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size)


def side_by_side(read: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """What `read` returns for each name, in order; several at once, for hashing leaves other threads free."""
    if len(names) < 2:
        return [read(name) for name in names]
    with ThreadPoolExecutor(min(len(names), READERS, os.cpu_count() or 1)) as readers:
        return list(readers.map(read, names))


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Write `manifest.json` into `folder`, durably; call it when every other file is in place."""
    body = {
        "format_version": manifest.format_version,
        "kind": manifest.kind,
        "role": manifest.role,
        "files": dict(manifest.files),
        "details": dict(manifest.details),
    }
    path = Path(folder) / MANIFEST
    # The checksum covers what no file hash does: the details themselves.
    write_json(path, {**body, "checksum": content_sha256(body)})
    return path


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a finished folder; its files are not looked at.

    Damaged when there is none or it is broken; UserError when it may not be read, or has another format.
    """
    path = Path(folder) / MANIFEST
    try:
        body = read_json(path)
        if type(version := body["format_version"]) is int and version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}; this program reads version {FORMAT_VERSION}",
                hint="use the version of this program that wrote it",
            )
        recorded = body.pop("checksum")
        if recorded != content_sha256(body):
            raise ValueError("its checksum does not match its content")
        return _manifest(**body)
    except OSError as error:
        _raise_unreadable(path, error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else repr(error)
        raise Damaged(f"{path} is damaged: {why:.200}", hint=_RESTORE) from None


def verify(folder: str | os.PathLike[str]) -> Manifest:
    """Re-hash a finished folder against its manifest.

    Returns the manifest. Damaged names each file that is missing, not recorded, of another size or of
    other content.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    faults = list(_faults(root, manifest))
    if faults:
        shown = "\n    ".join(faults[:10] + ([f"and {len(faults) - 10} more"] if len(faults) > 10 else []))
        raise Damaged(f"{root} does not match its manifest:\n    {shown}", hint=_RESTORE)
    return manifest


_RESTORE = "restore it from a copy, or make it again; a damaged one is never used"


def _raise_unreadable(path: Path, error: OSError) -> NoReturn:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        there = "there is no such folder" if not path.parent.is_dir() else f"it has no {MANIFEST}"
        raise Damaged(
            f"{path.parent} is not finished: {there}", hint="the manifest is written last: run the step again"
        ) from None
    if is_damage(error):
        raise Damaged(f"{path} cannot be read: {error.strerror}", hint=_RESTORE) from None
    raise not_readable(path, error) from None


def not_readable(path: Path, error: OSError) -> UserError:
    """What is said of a file that may be whole, but cannot be opened or read here and now."""
    hint = "check its permissions" if isinstance(error, PermissionError) else None
    return UserError(f"{path} cannot be read: {error.strerror}", hint=hint)


_CALIBRATION = ("mean", "std", "accuracy", "pairs")
"""Numbers of a reward model's calibration that are read."""


def _manifest(format_version: Any, kind: Any, role: Any, files: Any, details: Any) -> Manifest:
    """The parts of a manifest's content, looked at; ValueError or the like where one is of no use."""
    if type(format_version) is not int or kind not in KINDS:
        raise ValueError(f"format version {format_version!r:.40}, kind {kind!r:.40}")
    found = {name: _detail(details, name) or shape() for name, shape in _SHAPES.items()}
    if wrong := [name for name, shape in _SHAPES.items() if not isinstance(found[name], shape)]:
        raise ValueError(f"details of another type: {', '.join(wrong)}")
    read = [found["calibration"].get(name) for name in _CALIBRATION]
    measured = [value for value in read if value is not None]  # null: was NaN
    if not all(
        isinstance(value, int | float) for value in [*measured, *found["data.stage_split.shares"].values()]
    ):
        raise ValueError("details that are no numbers: of the calibration, or shares of the data")
    for parent in found["parents"]:
        if not all(isinstance(parent[name], str) for name in ("role", "path", "manifest_sha256")):
            raise ValueError("a parent that is not named by texts")
    records = {name: _record(name, entry) for name, entry in files.items()}
    return Manifest(kind, None if role is None else Role(role), records, dict(details), format_version)


def _detail(details: Any, name: str) -> Any:
    """What is at a dotted name; None where that is nothing."""
    for part in name.split("."):
        details = (details or {}).get(part)
    return details


def _record(name: str, entry: Any) -> FileRecord:
    size, sha256 = entry["bytes"], entry["sha256"]
    if type(size) is not int or not isinstance(sha256, str) or "\0" in name:
        raise ValueError(f"{name!r:.80} has no record of a file")
    return FileRecord(sha256=sha256, bytes=size)


def _file_names(root: Path) -> list[str]:
    """All that is not a folder, by path relative to `root`; a link to a folder is one of them."""
    names = []
    refused: list[OSError] = []
    for folder, below, files in os.walk(root, onerror=refused.append):
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in [*files, *links]]
    if refused:
        raise not_readable(Path(refused[0].filename or root), refused[0])
    return sorted(name for name in names if name != MANIFEST)


def fault_of(path: Path, size: int, sha256: str | None) -> str | None:
    """How a file differs from what was recorded of it; None when it does not. sha256: None for unknown.

    UserError where it may be whole, but cannot be read here and now.
    """
    try:
        if not path.is_file():
            return "missing"
        if (found := path.stat().st_size) != size:
            return f"{found} bytes, recorded {size}"
        if sha256 is not None and (content := file_sha256(path)) != sha256:
            return f"content differs (sha256 {content[:12]}, recorded {sha256[:12]})"
    except OSError as error:
        if not is_damage(error):
            raise not_readable(path, error) from None
        return f"cannot be read: {error.strerror}"
    return None


def is_card_edited(folder: str | os.PathLike[str], manifest: Manifest) -> bool:
    """Whether the model card is not as it was written: somebody filled it in, or removed it."""
    record = manifest.files.get(CARD)
    return record is not None and fault_of(Path(folder) / CARD, record["bytes"], record["sha256"]) is not None


def unlisted(folder: str | os.PathLike[str], manifest: Manifest) -> list[str]:
    """What lies below a finished folder and is not in its manifest, by path; links to folders, too."""
    return [name for name in _file_names(Path(folder)) if name not in manifest.files]


def _faults(root: Path, manifest: Manifest) -> Iterator[str]:
    files = manifest.files
    names = [name for name in sorted(files) if name != CARD]
    found = side_by_side(
        lambda name: fault_of(root / name, files[name]["bytes"], files[name]["sha256"]), names
    )
    for name, fault in zip(names, found, strict=True):
        if fault:
            yield f"{name}: {fault}"
    for name in unlisted(root, manifest):
        if (root / name).is_dir():
            yield f"{name}: a link to a folder, which nobody recorded"
        elif name.endswith(LOADED_SUFFIXES):
            yield f"{name}: not recorded, yet a loader could read it"
