"""What a path names: a file, a folder, files by a pattern (`*`, `?`, `[...]`), or a place elsewhere.

Reads folders anew each time, and nothing of what files hold.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError


def is_remote(path: str) -> bool:
    """Whether a path names a place elsewhere, by its scheme: https://, s3://, gs://, hf://."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def is_glob(path: str) -> bool:
    """Whether a path names files by a pattern: one that is there under its very name does not."""
    return glob.has_magic(path) and not is_remote(path) and not os.path.lexists(path)


def files_of(path: str) -> list[Path]:
    """The files behind a local path, sorted: itself, those below a folder, or those that a pattern matches
    (`**` any folders). Empty where there is none."""
    root = Path(path)
    if root.is_file():
        return [root]
    if is_glob(path):
        return sorted(found for found in map(Path, glob.glob(path, recursive=True)) if found.is_file())
    return sorted(found for found in root.rglob("*") if found.is_file())


def check_pattern(path: str, key: str) -> None:
    """UserError for a pattern that matches no file, or a folder with files that it leaves out."""
    matches = sorted(map(Path, glob.glob(path, recursive=True)))
    files = {match for match in matches if match.is_file()}
    left_out = [match for match in matches if match.is_dir() and not files.issuperset(files_of(str(match)))]
    if left_out:
        beside = f" beside {len(files)} file(s)" if files else ""
        way_out = f"{path.rstrip('/')}/* for the files in such folders"
        raise UserError(
            f"{key}={path} matches {counted(left_out)}{beside}, and a pattern is one of files",
            hint=f"{way_out}, or one by its name: {key}={left_out[0]}",
        )
    if not files:
        raise UserError(f"{key}={path}: no file matches", hint="correct the pattern, or name a folder")


def counted(folders: Sequence[Path]) -> str:
    """`the folder data/a`, or `3 folders (data/a, ...)`."""
    return f"the folder {folders[0]}" if len(folders) == 1 else f"{len(folders)} folders ({folders[0]}, ...)"


def name_of(path: str) -> str:
    """What a source is called: the last part of its path that is no pattern, without suffix."""
    parts = [part for part in path.rstrip("/").split("/") if part and not (is_glob(path) and _is_magic(part))]
    last = parts[-1] if parts else "rows"
    return last.split(".", 1)[0] or last


def _is_magic(part: str) -> bool:
    return re.search(r"[*?[]", part) is not None
