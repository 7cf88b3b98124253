"""Files that lie elsewhere, fetched once and kept by their content.

Takes a path such as https://.../rows.jsonl and a folder; returns the file in it. What is there already is
asked about, and fetched again only where it changed. A file appears under its name whole, with the length
that was announced: an interrupted one goes on where it broke off. `remote.py` says where bytes come from;
what they mean is not known here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from common.artifacts import file_sha256, read_json
from common.errors import UserError
from common.files import disk_errors, write_text, written_where
from common.redact import redact_text
from common.remote import BLOCK_BYTES, Changed, RemoteFile, Transient, Version, names_below, remote_file
from common.text import printable

Say = Callable[[str], None]

LARGEST = 2**40
"""Bytes of a file that is fetched."""
LARGE = 2**26
"""Bytes from which on it is said when fetching begins."""
SPARE = 2**26
"""Bytes of a disk that are left free."""
ATTEMPTS = 5
"""Without a block of bytes in between, before it is given up."""
ORIGIN = ".origin"
"""Beside what was fetched: where it is from."""


def file_name(path: str) -> str:
    """The last part of a remote path, with no sign that a file's name should not have."""
    last = unquote(urlsplit(path).path).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]", "_", last, flags=re.ASCII).lstrip(".")[-100:] or "rows"


def origin_of(path: str) -> str | None:
    """Where a file or folder that was fetched is from; None for any other."""
    place = Path(path) if Path(path).is_dir() else Path(path).parent
    with suppress(OSError, UnicodeDecodeError):
        return (place / ORIGIN).read_text(encoding="utf-8").strip()
    return None


def fetch(
    path: str, key: str, cache: Path, say: Say = print, *, sleep: Callable[[float], None] = time.sleep
) -> Path:
    """The file, or for a pattern or a folder of a store the folder of its files, kept below `cache`.

    key: what messages call it. Says what was fetched, and what stands for a place that cannot be reached.
    UserError: no such place, no access, too large, a server that breaks off again and again, a full disk.
    """
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    names = named_files(path, key)
    files = [Kept(cache, name, key, say, sleep).file() for name in names]
    return files[0] if names == [path] else _folder(cache, path, files)


def named_files(path: str, key: str) -> list[str]:
    """The files that a path elsewhere names: itself, or what a pattern or a folder of a store holds."""
    try:
        return names_below(path, key)
    except Transient as failure:
        raise UserError(
            f"{key}={redact_text(path)}: {failure}", hint="see to the network, or download it first"
        ) from None


def _folder(cache: Path, path: str, files: list[Path]) -> Path:
    """A folder with the files under numbered names, in their order."""
    names = [f"{number:05d}-{file.name}" for number, file in enumerate(files)]
    content = hashlib.sha256("\n".join([file.parent.name for file in files]).encode()).hexdigest()[:12]
    folder = cache / content
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        for file, name in zip(files, names, strict=True):
            if not (folder / name).exists() or not file.samefile(folder / name):
                (folder / name).unlink(missing_ok=True)
                _linked(file, folder / name)
        write_text(folder / ORIGIN, redact_text(path) + "\n")
    return folder


def _linked(file: Path, name: Path) -> None:
    """Another name for a file; a copy where the disk has no such links."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


@dataclass(frozen=True)
class Kept:
    """One file elsewhere, and what is kept of it below `cache`."""

    cache: Path
    path: str
    key: str
    say: Say
    sleep: Callable[[float], None]

    def file(self) -> Path:
        """The file, which is that of before where it is still the same, or cannot be asked about."""
        remote = remote_file(self.path, self.key)
        with self._alone():
            before = self._before()
            try:
                version = self._look(remote)
            except UserError as error:
                if before is None:
                    raise
                self.say(printable(f"notice: {error.message}; the copy of before is used: {before}"))
                return before
            if before is not None and version.mark and asdict(version) == self._record().get("version"):
                self.say(f"{self._named}: as it was, {_size(version.size)}, in {before}")
                return before
            return self._fetched(remote, version)

    def version(self) -> Version:
        """What the file is now; where it cannot be asked about, what it was when it was fetched last."""
        try:
            return self._look(remote_file(self.path, self.key))
        except UserError as error:
            if (before := self._record().get("version")) is None:
                raise
            self.say(printable(f"notice: {error.message}; taken as it was before"))
            return Version(**before)

    def pinned(self, version: Version, watch: Callable[[Path], None]) -> Path:
        """The file, if it is still this version; nobody is asked where it is here already.

        watch: is told where its bytes are, of which there are more each time; what it raises ends it.
        """
        with self._alone():
            before = self._before()
            if before is not None and self._record().get("version") == asdict(version):
                watch(before)
                return before
            return self._fetched(remote_file(self.path, self.key), version, watch)

    def _look(self, remote: RemoteFile) -> Version:
        failures: list[Transient] = []
        while True:
            try:
                version = remote.look()
            except Transient as failure:
                failures.append(failure)
                self._wait(failures)
                continue
            if version.size == 0:
                raise UserError(f"{self._named} is empty", hint="name a file with rows in it")
            if version.size > LARGEST:
                raise UserError(f"{self._named} has {_size(version.size)}", hint=f"at most {_size(LARGEST)}")
            return version

    def _fetched(
        self, remote: RemoteFile, version: Version, watch: Callable[[Path], None] | None = None
    ) -> Path:
        partial = self._place(".partial")
        if version.size > LARGE:
            self.say(f"{self._named}: fetching {_size(version.size)}")
        failures: list[Transient] = []
        while True:
            have = self._begun(partial, version)
            self._check_room(version.size - have)
            if watch is not None:
                watch(partial)
            try:
                if have < version.size:
                    self._append(remote, version, partial, have, watch)
                if partial.stat().st_size == version.size:
                    return self._keep(partial, version)
                raise Transient(f"it broke off after {partial.stat().st_size:,} of {version.size:,} bytes")
            except Transient as failure:
                went_on = version.mark and partial.stat().st_size >= have + BLOCK_BYTES
                failures = [failure] if went_on else [*failures, failure]
                self._wait(failures)
            except Changed:
                if watch is not None:
                    raise UserError(
                        f"{self._named} is another file than when this run began",
                        hint="begin another run: run_name=NAME, or force=true",
                    ) from None
                failures.append(Transient("it changes while it is fetched"))
                self._wait(failures)
                version = self._look(remote)

    def _begun(self, partial: Path, version: Version) -> int:
        """Bytes of this version that are there; what is of another one, or of none that can be told, goes."""
        record = self._place(".begun.json")
        with disk_errors(partial):
            begun = None
            with suppress(FileNotFoundError, ValueError):
                begun = read_json(record) if partial.exists() else None
            if begun == asdict(version) and version.mark and partial.stat().st_size <= version.size:
                return partial.stat().st_size
            partial.unlink(missing_ok=True)
            write_text(record, json.dumps(asdict(version)))
            partial.touch()
        return 0

    def _append(
        self,
        remote: RemoteFile,
        version: Version,
        partial: Path,
        start: int,
        watch: Callable[[Path], None] | None,
    ) -> None:
        have = start
        with disk_errors(partial), open(partial, "ab") as file:
            for block in remote.blocks(version, start):
                have += len(block)
                if have > version.size:
                    partial.unlink()
                    raise UserError(f"{self._named} is longer than it says", hint="download it first")
                file.write(block)
                if watch is not None:
                    file.flush()
                    watch(partial)
            file.flush()
            os.fsync(file.fileno())

    def _keep(self, partial: Path, version: Version) -> Path:
        """Give it its name, by its content; the record is written last."""
        sha256 = file_sha256(partial)
        file = self.cache / sha256[:12] / file_name(self.path)
        with disk_errors(file):
            file.parent.mkdir(exist_ok=True)
            os.replace(partial, file)
            write_text(file.parent / ORIGIN, redact_text(self.path) + "\n")
            record = {"version": asdict(version), "sha256": sha256, "file": f"{file.parent.name}/{file.name}"}
            write_text(self._place(".json"), json.dumps(record))
            self._place(".begun.json").unlink(missing_ok=True)
        self.say(f"{self._named}: {_size(version.size)} fetched, sha256 {sha256[:12]}, in {file}")
        return file

    def _before(self) -> Path | None:
        """What was fetched before, where it is still what it was."""
        record = self._record()
        if not isinstance(record.get("file"), str):
            return None
        file = self.cache / record["file"]
        with suppress(OSError):
            if file_sha256(file) == record.get("sha256"):
                return file
        return None

    def _record(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            record = read_json(self._place(".json"))
            return record if isinstance(record, dict) else {}
        return {}

    def _place(self, suffix: str) -> Path:
        """A file for what is known of the path; of what is begun one for each machine."""
        name = hashlib.sha256(self.path.encode()).hexdigest()[:12]
        machine = "" if suffix == ".json" else f".{socket.gethostname()}"
        return self.cache / f"{name}{machine}{suffix}"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process of this machine fetches it at a time; a killed one lets go."""
        with disk_errors(self.cache):
            lock = os.open(self._place(".lock"), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say(f"{self._named}: another process is fetching it; waiting")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process that was forked meanwhile has it open, too
            os.close(lock)

    def _check_room(self, missing: int) -> None:
        free = shutil.disk_usage(self.cache).free
        if missing + SPARE > free:
            raise UserError(
                f"{self._named} needs {_size(missing)} more, and {self.cache} has {_size(free)} free",
                hint=f"make room, or write elsewhere with {written_where()}",
            )

    def _wait(self, failures: list[Transient]) -> None:
        """Before the next attempt. UserError when there were too many."""
        if len(failures) == ATTEMPTS:
            said = "; ".join(dict.fromkeys(map(str, failures)))
            raise UserError(
                f"{self._named} cannot be fetched: {said}",
                hint="see to the network: what has come is kept, and the same command goes on from there",
            )
        self.sleep(2.0 ** (len(failures) - 1))

    @property
    def _named(self) -> str:
        return f"{self.key}={redact_text(self.path)}"


def _size(count: int) -> str:
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count:,} bytes"
