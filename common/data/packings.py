"""Packings of stored records: each made once, by the process that first asks, and mapped into memory by all.

A file per packing, in a folder beside the records', named by everything that decides it: an epoch of ten
million documents costs a rank no memory of its own. Packings of few documents, and of records that are not
stored, are made in memory wherever they are asked for; which rows they have is the same. Does not pack.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.data import packing
from common.data.packing import Packing
from common.data.stored import StoredRecords
from common.files import write_atomically

KEPT_FROM = 2**17
"""Documents from which on a packing is kept in a file; fewer take at most 3 MB of each rank."""
HEAD = 256
"""Bytes before the numbers of a file."""
SUFFIX = ".packings"

log = logging.getLogger("rlhf.data")


class Packings:
    """The packings of some records. folder: where they are kept; None: nowhere."""

    def __init__(self, folder: Path | None, fingerprint: str = "") -> None:
        self._folder, self._fingerprint = folder, fingerprint

    @classmethod
    def of(cls, records: object) -> Packings:
        """Those of a data set, which are kept where its records are stored."""
        if not isinstance(records, StoredRecords):
            return cls(None)
        return cls(records.folder.with_name(records.folder.name + SUFFIX), records.fingerprint)

    def get(self, key: Mapping[str, Any], documents: int, make: Callable[[], Packing]) -> Packing:
        """The packing with this key, from its file or made.

        key: everything that decides it beside the records, as JSON values. documents: how many it has. Where
        the disk refuses, it is held in memory, and a line says so.
        """
        if self._folder is None or documents < KEPT_FROM:
            return make()
        file = self._folder / _name({**key, "records": self._fingerprint})
        if (found := read(file)) is not None:
            return found
        made: Packing | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _alone(self._folder):
                if (found := read(file)) is None:
                    made = make()
                    write(made, file)
                    found = read(file)
        except OSError as error:
            _warn(
                f"{self._folder}: the packing of {documents:,} documents cannot be kept there "
                f"({error.strerror}): every rank holds it in memory"
            )
        return found or made or make()


def write(made: Packing, file: Path) -> None:
    """Into a file that is there whole or not at all. OSError where the disk refuses."""
    dtype = np.uint32 if len(made.documents) < 2**32 else np.int64
    numbers = [np.ascontiguousarray(part, dtype) for part in (made.offsets, made.documents)]
    total = hashlib.sha256()
    for part in numbers:
        total.update(part.data)
    head = {"rows": len(made), "documents": len(made.documents), "dtype": np.dtype(dtype).name}
    line = json.dumps({**head, "sha256": total.hexdigest()}).encode()
    write_atomically(file, [line.ljust(HEAD), *(part.data for part in numbers)])


def read(file: Path) -> Packing | None:
    """A packing mapped into memory; None where there is none, or one that is not as it was written."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with open(file, "rb") as stream:
            head = json.loads(stream.read(HEAD))
        numbers = np.memmap(file, np.dtype(head["dtype"]), "r", HEAD)
        if hashlib.sha256(numbers.data).hexdigest() == head["sha256"]:
            begin = head["rows"] + 1
            return Packing(np.asarray(numbers[:begin]), np.asarray(numbers[begin:]))
    return None


def _warn(said: str) -> None:
    """To the rank's log, and by rank 0 to the terminal, which logs do not reach."""
    log.warning(said)
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {said}", file=sys.stderr, flush=True)


def _name(key: Mapping[str, Any]) -> str:
    """A change of the code that packs is another name."""
    told = json.dumps(key, sort_keys=True).encode() + Path(str(packing.__file__)).read_bytes()
    return hashlib.blake2b(told, digest_size=12).hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within it no other process of this machine makes a packing here. Where locks do not reach other
    machines, those make the same one."""
    with open(folder / ".lock", "w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(".*.tmp"):  # by one that was killed
            left.unlink(missing_ok=True)
        yield
