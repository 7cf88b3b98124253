"""The files of a checkpoint, written at once, or held in memory and written while training goes on.

A `Stateful` opens each file by `Snapshot.open` and fills it. Nothing here is a collective: a rank writes and
hashes its own files, and `checkpoint.py` commits what all ranks have written.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from common.artifacts import FileRecord, file_record
from common.files import disk_errors
from common.phases import enter

Open = Callable[[Path], AbstractContextManager[BinaryIO]]
"""Opens a new file for its bytes; OSError where the disk refuses."""
Buffers = dict[str, io.BytesIO]
"""Memory of files by their name in a checkpoint, used again for the next one: memory that is touched for the
first time is several times as slow."""


class Snapshot:
    """This rank's files of one checkpoint.

    folder: where they go. buffers: memory that holds them until `write`; None: they are written as they come.
    """

    def __init__(self, folder: Path, buffers: Buffers | None) -> None:
        self.folder, self._buffers = folder, buffers
        self._names: list[str] = []

    @contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """A file below the folder."""
        name = path.relative_to(self.folder).as_posix()
        self._names.append(name)
        if self._buffers is None:
            with path.open("wb") as file:
                try:
                    yield file
                except RuntimeError as error:  # torch.save's, at a file that the disk did not let it end
                    raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        else:
            held = self._buffers.setdefault(name, io.BytesIO())
            held.seek(0)
            yield held
            held.truncate()

    def write(self) -> dict[str, FileRecord]:
        """Write what is held, durably; every file's hash and size. UserError where the disk refuses."""
        if self._buffers is None:
            enter("commit.hash")
            return {name: file_record(self.folder / name) for name in self._names}
        records = {}
        with disk_errors(self.folder):
            enter("commit.write", beside=True)
            for name in self._names:
                with self._buffers[name].getbuffer() as content:
                    with (self.folder / name).open("wb") as file:
                        file.write(content)
                        os.fsync(file.fileno())
                    records[name] = FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        enter("commit.hash", beside=True)
        return records
