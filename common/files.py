"""Files and folders that are there whole or not at all: atomic writes, commits, setting aside.

Takes paths and bytes; returns where something lies now. What is written or committed is durable before the
function returns, and nothing is overwritten but the one file that is replaced. What files mean is not known
here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from common.errors import UserError

OUTPUT_DIR = "output_dir=DIR"
WRITTEN_WITH = "RLHF_WRITTEN_WITH"
"""Environment variable with what a process was told by `written_with`; unset: output_dir=DIR."""
IN_USE = ".in_use"
"""In a folder of `unfinished`: locked by the process that works there, from before it has this name."""


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
def unfinished(prefix: str, folder: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """A new folder `folder`/`prefix`... for what is not finished; it is removed in the end.

    What a killed process has left of such a folder is removed first, and said: nobody holds its lock.
    """
    for left in sorted(folder.glob(f"{glob.escape(prefix)}*")):
        if (left / IN_USE).is_file() and not _is_in_use(left / IN_USE):
            shutil.rmtree(left, ignore_errors=True)
            say(f"removed {left}, which a process that was killed had left unfinished")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as name:
        made = Path(name)
        with open(made / f"{IN_USE}.new", "w") as lock:
            with contextlib.suppress(OSError):  # without locks nothing is known of it, and it stays
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(lock.name, made / IN_USE)
            yield made


def _is_in_use(lock: Path) -> bool:
    """Whether a process holds the lock; True as well where that cannot be known."""
    try:
        with open(lock, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def written_where() -> str:
    """The setting with which what is being done writes elsewhere, as `written_with` has said."""
    return os.environ.get(WRITTEN_WITH, OUTPUT_DIR)


@contextlib.contextmanager
def written_with(setting: str) -> Iterator[None]:
    """Within it, here and in processes that are started, a disk's refusal ends with this setting."""
    before = os.environ.get(WRITTEN_WITH)
    os.environ[WRITTEN_WITH] = setting
    try:
        yield
    finally:
        os.environ.pop(WRITTEN_WITH)
        os.environ |= {} if before is None else {WRITTEN_WITH: before}


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str], way_out: str | None = None) -> Iterator[None]:
    """Turn what a full, broken, read-only or forbidden disk raises inside into a UserError naming `path`.

    way_out: the setting with which to write elsewhere, by default `written_where`. What is no fault of the
    place that is written to (too many open files, a connection, a file of others) stays what it is.
    """
    try:
        yield
    except OSError as error:
        if (refused := refused_by_disk(error, Path(path), way_out or written_where())) is None:
            raise
        raise refused from error


def refused_by_disk(error: OSError, path: Path, way_out: str) -> UserError | None:
    """What the disk said to writing at or beside `path`; None for an error that is not of this disk."""
    if isinstance(error, shutil.Error):
        error = _of_first_file(error)
    number, names = error.errno or 0, (error.filename, error.filename2)
    named = [Path(os.fsdecode(name)) for name in names if isinstance(name, str | bytes | os.PathLike)]
    if number == errno.ENOENT and not path.parent.exists():
        return UserError(
            f"cannot write {path}: the folder {path.parent} is gone",
            hint="a run needs its folder until it ends; the same command goes on with what is left",
        )
    if named and not any(_is_near(file, path) for file in named):
        return None
    if number in _OF_A_NAMED_FILE and not named:
        return None  # of a socket or a process
    if number not in _DISK_REASONS:
        return None
    what, first = _DISK_REASONS[number]
    return UserError(f"cannot write {path}: {what}", hint=f"{first}write elsewhere with {way_out}")


def _of_first_file(error: shutil.Error) -> OSError:
    """The error of the first file that `shutil.copytree` could not copy: it keeps them as texts."""
    (_, target, text), *_ = error.args[0]
    found = re.match(r"\[Errno (\d+)\] ([^:]*)", str(text))
    return OSError(int(found[1]), found[2], str(target)) if found else error


def is_of_disk(error: OSError) -> bool:
    """Whether an error can be of nothing but a disk, whatever it does not name."""
    return error.errno in _DISK_REASONS and error.errno not in _OF_A_NAMED_FILE


def is_damage(error: OSError) -> bool:
    """Whether a file that cannot be read is damaged, and not we who may or can open no file."""
    return error.errno in _DAMAGE


_FREE = "free some space, or "
_DISK_REASONS = {
    errno.ENOSPC: ("the disk is full", _FREE),
    errno.EDQUOT: ("the disk quota is used up", _FREE),
    errno.EFBIG: ("a file may not be so large there", "raise the limit (ulimit -f), or "),
    errno.EIO: ("the disk does not work (input/output error)", "check it, or "),
    errno.ESTALE: ("the file server has lost it (stale file handle)", "check the mount, or "),
    errno.EROFS: ("the file system is read-only", ""),
    errno.EACCES: ("permission denied", ""),
    errno.EPERM: ("operation not permitted", ""),
    errno.EEXIST: ("it is there already", "remove it, or "),
    errno.ENOTEMPTY: ("it is there already", "remove it, or "),
    errno.ENOTDIR: ("a file is in the way of a folder", ""),
    # what is renamed has a file system of its own: a mount, or a layer of a container's image
    errno.EXDEV: ("it is on another file system", "move it by hand, or "),
    errno.EBUSY: ("it is a mount", "move it by hand, or "),
}
_OF_A_NAMED_FILE = {errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
"""Errors of the disk only where they name a file."""
_DAMAGE = {
    errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EBADMSG,
    errno.EUCLEAN,
}  # fmt: skip


def _is_near(file: Path, path: Path) -> bool:
    """Whether a file is at, below, above or beside `path`."""
    file, path = Path(os.path.abspath(file)), Path(os.path.abspath(path))
    return file.is_relative_to(path.parent) or path.is_relative_to(file)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
