"""Sources -> windows of tokenized documents, each trained on while those behind it are made.

One process of each machine makes the windows (`Streaming`), in the order of the rows; all ranks open them
when they need them. A window is a folder of `WINDOW` documents (the last may have fewer) as `writer.py`
writes them, and appears when it is whole, so that a run that was interrupted finds what had been made. No
process holds more of the data than a few windows. Does not pack and does not make batches.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import limited
from common.artifacts import file_sha256, read_json
from common.config import DataConfig
from common.data import cache
from common.data.blocks import WHO
from common.data.dataset_types import DEMONSTRATIONS
from common.data.index import read_index
from common.data.ledger import Ledger
from common.data.reader import Reader, named_sources
from common.data.stages import StageSplit
from common.data.stored import ROWS_FILE, TokenizedDataset
from common.data.types import TokenizedExample
from common.data.writer import Writer
from common.errors import UserError
from common.files import disk_errors
from common.limited import fork

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WINDOW = 16_384
"""Documents that are packed and shuffled together."""
END, SHA256 = "end.json", "sha256.json"
POLL, PATIENCE = 0.05, 10.0
"""Seconds between two looks for a window, and before a line says that one is waited for."""

Report = Callable[[str], None]


class Streaming:
    """The process that makes the windows, seen from the one that started it."""

    def __init__(self, serve: Callable[[Connection, Connection], None], report: Report) -> None:
        self._report = report
        self.error: Exception | None = None
        # the pipe of calls is never used: the process ends when this one does, which closes it
        self._pid, self._calls, self._answers = fork(serve)

    def look(self) -> None:
        """Say what it said, and keep what ended it."""
        while not self._answers.closed and self._answers.poll():
            try:
                said = self._answers.recv()
            except (EOFError, OSError):
                self._answers.close()
                return
            if isinstance(said, Exception):
                self.error = said
            else:
                self._report(said)

    @property
    def is_over(self) -> bool:
        return self._answers.closed

    def end(self) -> None:
        """End the process; it does so by itself when this one ends."""
        self._answers.close()
        self._calls.close()
        os.waitpid(self._pid, 0)


class StreamedRows(TokenizedDataset):
    """Documents by their number in the stream. Reading one waits until it is there.

    windows: how many there are; None before that is known. when_over: is told then what became of the rows.
    """

    def __init__(self, folder: Path, names: list[str], making: Streaming | None, report: Report) -> None:
        self.sources, self.folder, self.fingerprint = names, folder, folder.name
        self._making, self._report = making, report
        self.source_ids = _SourceIds(self)  # type: ignore[assignment]  # one at a time
        self.window = functools.lru_cache(maxsize=4)(self._window)
        self.windows: int | None = None
        self.when_over: Callable[[Ledger], None] = lambda ledger: None

    def end(self) -> None:
        """No further windows are wanted."""
        if self._making is not None:
            self._making.end()

    def __len__(self) -> int:
        raise TypeError("how long a stream is, is known when it ends")

    def __getitem__(self, index: int) -> TokenizedExample:
        number, within = divmod(index, WINDOW)
        return self.window(number)[within]

    def place(self, index: int) -> str:
        number, within = divmod(index, WINDOW)
        return self.window(number).place(within)

    def has(self, number: int) -> bool:
        """Whether there is such a window; waits until that is known. UserError where the rows are bad."""
        began = time.monotonic()
        while True:
            if self._making is not None:
                self._making.look()
            if self.windows is None and (self.folder / END).exists():
                end = read_json(self.folder / END)
                self.windows = int(end["windows"])
                self.when_over(Ledger.from_json(end["ledger"]))
            if self.windows is not None or (self.folder / _name(number)).exists():
                return self.windows is None or number < self.windows
            if self._making is not None and self._making.error is not None:
                raise self._making.error  # of a row behind the windows that are there
            if self._making is not None and self._making.is_over:
                raise RuntimeError(f"{self.folder}: the process that tokenizes ended without a word")
            if time.monotonic() - began > PATIENCE:
                self._report(f"waiting for rows: window {number + 1} of {WINDOW:,} is being tokenized")
                began = time.monotonic()
            time.sleep(POLL)

    def lengths_of(self, number: int) -> np.ndarray:
        """int32 [R], tokens of the documents of a window."""
        return self._index(number)["lengths"]

    def _index(self, number: int) -> dict[str, np.ndarray]:
        if not self.has(number):
            raise IndexError(f"window {number} of {self.windows}")
        return read_index(self.folder / _name(number) / cache.INDEX_FILE, "train")

    def _window(self, number: int) -> TokenizedDataset:
        index, folder = self._index(number), self.folder / _name(number)
        if file_sha256(folder / ROWS_FILE) != read_json(folder / SHA256)[ROWS_FILE]:
            raise UserError(
                f"{folder}: its rows are not those that were written",
                hint=f"remove {self.folder} : they are tokenized anew",
            )
        return TokenizedDataset(folder, index, self.sources, "train")


class _SourceIds:
    """`source_ids` of a stream, one at a time."""

    def __init__(self, rows: StreamedRows) -> None:
        self._rows = rows

    def __getitem__(self, index: int) -> int:
        number, within = divmod(index, WINDOW)
        return int(self._rows.window(number).source_ids[within])


def folder_of(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, *, stage: str, seed: int, cache_dir: Path
) -> Path:
    """Where the windows lie; reads all sources."""
    key = cache.cache_key(
        data, named_sources(data), tokenizer, kind=DEMONSTRATIONS.name, room=0, stage=stage, seed=seed
    )
    return cache_dir / f"{cache.digest(key)}.stream"


def stream(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    stage: str,
    seed: int,
    report: Report,
    wait: bool = False,
) -> StreamedRows:
    """The demonstrations of the sources, from the first one on. folder: that of `folder_of`.

    With `wait` another process on this machine makes the windows.
    """
    named, split = named_sources(data), StageSplit(data.stage_split, stage, seed)
    names = [name for name, _ in named]
    if wait or (folder / END).exists():
        return StreamedRows(folder, names, None, report)
    with disk_errors(folder, "data.cache_dir=DIR"):
        folder.mkdir(parents=True, exist_ok=True)

    def serve(calls: Connection, answers: Connection) -> None:
        threading.Thread(target=_end_with_parent, args=(calls,), daemon=True).start()
        reader = Reader(data, DEMONSTRATIONS, split, seed, answers.send)
        try:
            with disk_errors(folder, "data.cache_dir=DIR"):
                make_windows(Writer(reader, tokenizer, cache.spool_of(folder), streams=True), folder)
        except Exception as error:
            answers.send(error)
        limited.end()

    return StreamedRows(folder, names, Streaming(serve, report), report)


def _end_with_parent(calls: Connection) -> None:
    try:
        calls.recv()
    finally:
        os._exit(0)


def make_windows(writer: Writer, folder: Path) -> None:
    """Write all windows that are not there yet, and then how many they are, with the ledger."""
    count = 0
    for number, window in enumerate(writer.windows(WINDOW)):
        count = number + 1
        final, unfinished = folder / _name(number), folder / f".{_name(number)}.{WHO}-{os.getpid()}"
        if final.exists():
            continue
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        writer.write_window(window, unfinished)
        hashes = {ROWS_FILE: file_sha256(unfinished / ROWS_FILE)}
        (unfinished / SHA256).write_text(json.dumps(hashes))
        try:
            unfinished.rename(final)
        except OSError:
            if not final.exists():  # else another machine was faster, with the same rows
                raise
    if not count:
        reasons = "; ".join(writer.reader.ledger.reasons())
        raise UserError(f"no row is left to train on: {reasons}", hint="see data.max_length, data.truncation")
    end = {"windows": count, "ledger": writer.reader.ledger.to_json()}
    partial = folder / f".{END}.{WHO}-{os.getpid()}"
    partial.write_text(json.dumps(end))
    partial.rename(folder / END)
    for left in (writer.spool, *folder.glob(f".0*.{WHO}-*")):  # also of builders that were killed
        shutil.rmtree(left, ignore_errors=True)


def _name(number: int) -> str:
    return f"{number:08}"
