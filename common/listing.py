"""Files elsewhere that are read while they are fetched.

`list_files` writes down what a path names now, each file with its length and its mark: a listing, a small
file that stands for the rows and is the same wherever the run goes on. `Listed` gives the bytes of one of
them: those that are kept, those that had come when a run was ended, and then those that come.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from common.artifacts import read_json
from common.background import in_background
from common.download import ORIGIN, Kept, Say, file_name, named_files
from common.files import disk_errors, write_text
from common.redact import redact_text
from common.remote import Version
from common.text import printable

SUFFIX = ".streamed.json"
"""Of a listing, behind the name of the rows."""
POLL = 0.05
"""Seconds between two looks for bytes that have come."""


@dataclass(frozen=True)
class Listed:
    """One file of a listing. path: elsewhere. key: what messages call it. cache: where it is kept."""

    path: str
    version: Version
    key: str
    cache: Path

    def fetched(self) -> Path:
        """The file, when all of it is here. UserError where it is another one by now, or cannot be had."""
        return self._kept.pinned(self.version, lambda path: None)

    def opened(self) -> BinaryIO:
        """Its bytes, as they come. Reading raises what `fetched` does."""
        return io.BufferedReader(cast(Any, _Coming(self._kept, self.version)), 2**16)

    @property
    def _kept(self) -> Kept:
        return Kept(self.cache, self.path, self.key, lambda line: None, time.sleep)


def is_listing(path: Path) -> bool:
    return path.name.endswith(SUFFIX) and (path.parent / ORIGIN).exists()


def listed(listing: Path) -> list[Listed]:
    """The files of a listing, in order."""
    written, cache = read_json(listing), listing.parent.parent
    return [Listed(path, Version(size, mark), written["key"], cache) for path, size, mark in written["files"]]


def list_files(
    path: str, key: str, cache: Path, say: Say, *, sleep: Callable[[float], None] = time.sleep
) -> Path | None:
    """The listing of a path, kept below `cache`. None, and why is said, where the files have to be fetched
    whole: a run that goes on could not tell, or not ask, whether they are the same.

    key: what messages call it. UserError as of `download.fetch`.
    """
    whole = f"{key}={redact_text(path)} is fetched whole before training"
    if redact_text(path) != path:
        say(printable(f"notice: {whole}: its address holds a secret, which is not written down"))
        return None
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    kept = [Kept(cache, name, key, say, sleep) for name in named_files(path, key)]
    files = [(each.path, each.version()) for each in kept]
    if any(not version.mark for _, version in files):
        say(printable(f"notice: {whole}: the server gives neither ETag nor Last-Modified"))
        return None
    body = {"key": key, "files": [[name, *asdict(version).values()] for name, version in files]}
    content = json.dumps(body, indent=1)
    listing = cache / hashlib.sha256(content.encode()).hexdigest()[:12] / f"{file_name(path)}{SUFFIX}"
    with disk_errors(listing):
        listing.parent.mkdir(exist_ok=True)
        write_text(listing.parent / ORIGIN, path + "\n")
        write_text(listing, content)
    say(f"{key}={path}: {len(files)} file(s), fetched while they are trained on")
    return listing


class _Closed(Exception):
    """Nobody reads any more."""


class _Coming(io.RawIOBase):
    """The bytes of a file that a thread fetches meanwhile."""

    def __init__(self, kept: Kept, version: Version) -> None:
        self._file: BinaryIO | None = None
        self._fetching = in_background(lambda: kept.pinned(version, self._watch), "fetching")

    def _watch(self, path: Path) -> None:
        if self.closed:
            raise _Closed
        if self._file is None:
            self._file = open(path, "rb")  # noqa: SIM115 - closed with this one

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            is_over = self._fetching.done()  # asked first: what came until then is still read
            if self._file is not None and (count := cast(Any, self._file).readinto(buffer)):
                return int(count)
            if is_over:
                self._fetching.result()
                return 0
            wait([self._fetching], POLL)

    def close(self) -> None:
        super().close()
        if self._file is not None:
            self._file.close()
