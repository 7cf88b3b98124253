"""Append-only files of JSON lines that hold whole lines only, whatever happens while they are written.

Takes records, which are mappings with a `step`; returns those that are whole. A disk that refuses is said in
one line and fails nothing. What a record means is not known here.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.text import plain


class JsonLines:
    """One such file. say: hears, once, that it cannot be written."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._warned = False

    def keep_until(self, step: int | None) -> None:
        """Drop torn lines and those of later steps; None: all lines. Makes the folder when it is missing."""
        kept = -1 if step is None else step
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                lines = (line for line, record in records(self._path) if kept >= record["step"])
                write_atomically(self._path, lines)
        except OSError as error:
            self._warn(error)

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        """Add the line `{"step": step, **record}`, its values as `strict` spells them."""
        body = {"step": step, **{name: strict(value) for name, value in record.items()}}
        line = (json.dumps(body, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
        try:
            with self._path.open("ab", buffering=0) as file:
                write_whole(file, line)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned and not isinstance(error, FileNotFoundError):  # a folder removed ends the run
            self._warned = True
            self._say(f"warning: {self._path} cannot be written ({error}); training goes on without it")


def write_whole(file: io.FileIO, line: bytes) -> None:
    """One write per line, undone when it was cut short: the next line must begin on a line of its own.

    file: open for appending, without a buffer. OSError where the disk does not take all of it.
    """
    begin = file.seek(0, os.SEEK_END)
    written = 0
    try:
        while written < len(line):  # what is left says why it was not taken
            written += file.write(line[written:]) or 0
    except BaseException:
        file.truncate(begin)
        raise


def records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a file with what they say; what is not a JSON object with a step is passed over."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record


def strict(value: Any) -> Any:
    """What strict JSON can hold: not-a-number and infinities by name, unknown objects by their text."""
    return plain(value, not_finite=json.dumps)
