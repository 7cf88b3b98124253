"""Compilations that other processes may be waiting for: torch's lock files, who holds them, which are stale.

torch compiles an extension (an operator of DeepSpeed's, say) behind a file called `lock`, which the process
that compiles keeps open and removes at its end. One that is killed leaves the file, and every process that
needs the extension afterwards waits for ever, in silence. Takes folders, returns what is in them, and removes
nothing. Imports torch only to change how it waits.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

LOCK = "lock"
QUIET_SECONDS = 900.0
"""How long nothing may happen in a folder that other machines share: their processes are not seen here."""
LOOK_SECONDS = 1.0
SHARED = (
    "nfs",
    "lustre",
    "ceph",
    "gpfs",
    "beegfs",
    "cifs",
    "smb",
    "fuse",
    "9p",
    "afs",
    "wekafs",
    "panfs",
    "virtiofs",
)
"""How the types of file systems begin that several machines may have mounted."""


@dataclass(frozen=True)
class Lock:
    """A lock file of a compilation."""

    path: Path
    age: float  # seconds since it was made
    quiet: float  # seconds since anything in its folder was written
    holder: int | None  # process on this machine that has it open
    is_shared: bool  # other machines may see the folder

    @property
    def is_stale(self) -> bool:
        """Whether nobody will remove it any more."""
        return self.holder is None and (not self.is_shared or self.quiet > QUIET_SECONDS)


def extensions_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where torch compiles: TORCH_EXTENSIONS_DIR, or the user's cache."""
    if named := environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    caches = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "~"), ".cache").expanduser()
    return Path(caches) / "torch_extensions"


def locks_in(folder: Path) -> list[Lock]:
    """The locks of all compilations below torch's folder, by path."""
    paths = [
        *folder.glob(f"*/{LOCK}"),
        *folder.glob(f"*/*/{LOCK}"),
    ]  # the user's cache has a folder per version
    return [lock for path in sorted(paths) if (lock := look_at(path)) is not None]


def look_at(path: Path) -> Lock | None:
    """What is known of a lock; None when there is none (any more)."""
    holder = holder_of(path)  # before looking whether it is there: it may be released between the two
    try:
        now, made = _clock_of(path.parent.parent), path.stat().st_mtime
        written = [made]
        for entry in os.scandir(path.parent):
            with suppress(OSError):
                written.append(entry.stat().st_mtime)
    except OSError:
        return None
    is_shared = file_system_of(path).startswith(SHARED)
    return Lock(path, max(0.0, now - made), max(0.0, now - max(written)), holder, is_shared)


def _clock_of(folder: Path) -> float:
    """What its file system takes for now: this machine's clock may differ from a server's, or be set."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
    return time.time()  # noqa: TID251


def holder_of(path: Path) -> int | None:
    """The process of this machine that has the file open, as far as this user may see; else None."""
    wanted = os.path.realpath(path)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for descriptor in os.scandir(process / "fd"):
                with suppress(OSError):
                    if os.readlink(descriptor.path) == wanted:
                        return int(process.name)
    return None


def file_system_of(path: Path) -> str:
    """The type of the file system that holds `path`, such as ext4 or nfs4; empty where it cannot be known."""
    place, found, longest = os.path.realpath(path), "", -1
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        fields, _, source = line.partition(" - ")
        mount = fields.split()[4].encode().decode("unicode_escape")
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:  # of two on one place the later one is seen
            found, longest = source.split()[0], len(mount)
    return found


def described(lock: Lock) -> str:
    """A lock in words."""
    held = "no process of this machine holds it" if lock.holder is None else f"process {lock.holder} holds it"
    return f"{lock.path} ({_ago(lock.age)} old, {held})"


def refuse_to_wait_for_ever() -> None:
    """Have this process's compilations end with a UserError that names the lock, where torch would hang."""
    from torch.utils.file_baton import FileBaton

    def wait(baton: FileBaton) -> None:
        wait_for(Path(baton.lock_file_path))

    FileBaton.wait = wait  # type: ignore[method-assign,assignment]


def wait_for(
    path: Path, *, say: Callable[[str], None] | None = None, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Return once the lock is gone. UserError when nobody is left who would remove it.

    say: told once who is waited for; by default stderr.
    """
    seen_stale, told = 0, False
    while (lock := look_at(path)) is not None:
        seen_stale = seen_stale + 1 if lock.is_stale else 0
        if seen_stale > 1:  # twice: one that has just been closed is about to be removed
            raise stale_error([lock])
        if not told:
            told = True
            line = f"waiting for the compilation behind {described(lock)}"
            print(line, file=sys.stderr, flush=True) if say is None else say(line)
        sleep(LOOK_SECONDS)


def stale_error(locks: Sequence[Lock]) -> UserError:
    """The error that names stale locks, and how to be rid of them."""
    paths = [lock.path for lock in locks]
    shown = "; ".join(described(lock) for lock in locks)
    return UserError(
        f"a compilation was killed and has left its lock: {shown}",
        hint=f"nothing would ever remove it: rm {' '.join(map(str, paths))}, then run the same command again",
    )


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
