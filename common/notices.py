"""What a step does in another way than was asked, or more slowly than it could, said where the user looks.

Whatever runs in a step, or counts its rows for `plan`, calls `notice`. It is a warning in the log, which the
report shows; the listener of the first rank prints each once. Decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger("rlhf.notices")


def notice(what: str, why: str, cost: str = "") -> None:
    """Say it to whoever listens in this process. what: is done; why, instead of what one would expect."""
    log.warning("%s, since %s%s", what, why, f" ({cost})" if cost else "")


class Listener(logging.Handler):
    """Hands each notice of this process, once, to `say`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say, self._said = say, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def listen(say: Callable[[str], None]) -> None:
    """From now on, in place of any listener before."""
    log.handlers[:] = [Listener(say)]
    log.setLevel(logging.WARNING)
