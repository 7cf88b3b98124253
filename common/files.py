"""Files and folders that are there whole or not at all: atomic writes, commits, setting aside.

Takes paths and bytes; returns where something lies now. What is written or committed is durable before the
function returns, and nothing is overwritten but the one file that is replaced. What files mean is not known
here.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import UserError


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Replace the file at `path` by `parts`, one after the other: readers see the old content or the new.

    OSError where the disk refuses; the old file is then as it was, and nothing is left beside it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_atomically` of a text in UTF-8; UserError where the disk refuses."""
    with disk_errors(path):
        write_atomically(Path(path), [text.encode()])


def commit_folder(tmp: str | os.PathLike[str], final: str | os.PathLike[str]) -> Path:
    """Make `tmp` durable and rename it to `final`: afterwards `final` is there whole, or not at all.

    `final` must not exist; nothing is ever overwritten. UserError on a full or read-only disk; on
    a full one `tmp` is removed, so that the space it took does not keep the next attempt from working.
    """
    source, target = Path(tmp), Path(final)
    if target.exists():
        raise UserError(f"{target} already exists and is not overwritten", hint="move it away first")
    with disk_errors(target):
        try:
            for folder, _, names in os.walk(source):
                for name in names:
                    _fsync(Path(folder) / name)
                _fsync(Path(folder))
            os.rename(source, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                shutil.rmtree(source, ignore_errors=True)
            raise
        _fsync(target.parent)
    return target


def set_aside(folder: Path, into: Path | None = None) -> Path:
    """Rename `folder` to the first free of `<name>.old-1`, `<name>.old-2`, ...; returns its new path.

    into: a folder, made when missing, that takes it as `<name>`, `<name>-2`, ... Nothing is deleted.
    """
    if into is None:
        names = (folder.with_name(f"{folder.name}.old-{number}") for number in itertools.count(1))
    else:
        names = (into / (folder.name + (f"-{number}" if number > 1 else "")) for number in itertools.count(1))
    target = next(name for name in names if not name.exists())
    with disk_errors(target):
        target.parent.mkdir(exist_ok=True)
        os.rename(folder, target)
    return target


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a full, read-only or forbidden disk raises inside into a UserError naming `path`."""
    try:
        yield
    except OSError as error:
        reason = _DISK_REASONS.get(error.errno or 0)
        if reason is None:
            raise
        what, way_out = reason
        raise UserError(f"cannot write {path}: {what}", hint=way_out) from error


_DISK_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or write elsewhere with output_dir=DIR"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or write elsewhere with output_dir=DIR"),
    errno.EROFS: ("the file system is read-only", "write elsewhere with output_dir=DIR"),
    errno.EACCES: ("permission denied", "write elsewhere with output_dir=DIR"),
    errno.EPERM: ("operation not permitted", "write elsewhere with output_dir=DIR"),
    errno.EEXIST: ("it is there already", "remove it, or write elsewhere with output_dir=DIR"),
    errno.ENOTDIR: ("a file is in the way of a folder", "write elsewhere with output_dir=DIR"),
}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
