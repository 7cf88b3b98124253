"""One log file per rank, and how a step ends: done, told to stop, or with an error a person can read."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from common.errors import UserError
from common.files import is_of_disk
from common.redact import shown
from common.shortage import OUT_OF_MEMORY, shortage

STOPPED_EXIT_CODE = 143
"""Exit status of ranks that were told to stop."""
_ERROR_FILE = "error.txt"
_STOPPED_FILE = "stopped.txt"
ending = threading.Lock()
"""Held by whoever ends this process, so that it ends for one reason and says one."""


class _RankLog(logging.FileHandler):
    """A log whose disk may be full or gone: that is said once, and what follows is not in it."""

    is_refused = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.is_refused:
            self.is_refused = True
            said = f"{self.baseFilename} cannot be written: {error.strerror}; the run goes on without it"
            print(f"warning: {shown(said)}", file=sys.stderr, flush=True)


class _Shown(logging.Formatter):
    """Records, with their tracebacks, without credentials and control codes."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def open_rank_log(folder: Path, rank: int) -> None:
    """Send every log record of this process to `folder/rank_<rank>.log`, and nothing to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = _RankLog(folder / f"rank_{rank}.log")
    handler.setFormatter(_Shown("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it has a handler of its own, for every retry
    if rank == 0:
        for name in (_ERROR_FILE, _STOPPED_FILE):
            (folder / name).unlink(missing_ok=True)


def run_and_report(work: Callable[[], int], folder: Path) -> int:
    """The exit status of `work()`. A UserError is printed by the first rank that meets it, without traceback,
    and so is what a disk refuses.

    `folder` holds the ranks' logs. Other exceptions keep their traceback, there and on the terminal. Where
    another rank left before, told to stop or with an error that it has printed, they are its consequence:
    this rank ends without a word on the terminal.
    """
    try:
        return work()
    except SystemExit as left:
        if left.code == STOPPED_EXIT_CODE:
            with contextlib.suppress(OSError):  # a full disk
                (folder / _STOPPED_FILE).touch()
        raise
    except UserError as error:
        logging.getLogger("rlhf").error("%s", error)
        return _refused(folder, error)
    except Exception as error:
        with ending:  # for ever, where the watch has it: ranks that leave make others fail in a collective
            pass
        if (said := shortage(error)) is not None:
            logging.getLogger("rlhf").exception("out of memory")
            print(f"error: {shown(said)}", file=sys.stderr, flush=True)
            return OUT_OF_MEMORY
        if isinstance(error, OSError) and is_of_disk(error):
            logging.getLogger("rlhf").exception("a disk refused")
            return _refused(folder, error)
        if (folder / _STOPPED_FILE).exists():
            logging.getLogger("rlhf").exception("another rank was told to stop")
            return STOPPED_EXIT_CODE
        if (folder / _ERROR_FILE).exists():
            logging.getLogger("rlhf").exception("another rank ended with an error")
            return 1
        logging.getLogger("rlhf").exception("unexpected error")
        raise


def _refused(folder: Path, error: Exception) -> int:
    if _is_first(folder, said := shown(error)):
        print(f"error: {said}", file=sys.stderr, flush=True)
    return UserError.EXIT_CODE


def _is_first(folder: Path, message: str) -> bool:
    try:
        with open(folder / _ERROR_FILE, "x") as file:
            file.write(message)
    except FileExistsError:
        return False
    except FileNotFoundError:  # the run's folder was removed, which all ranks are told
        return os.environ.get("RANK", "0") == "0"
    except OSError:  # a full or read-only disk must not hide the message
        return True
    return True


def rank_log() -> TextIO | None:
    """The log file of this process; None where there is none."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            return handler.stream
    return None


def is_first(message: str) -> bool:
    """Whether no other rank of this start has printed an error yet."""
    log = rank_log()
    return log is None or _is_first(Path(log.name).parent, message)
