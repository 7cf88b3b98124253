"""A mirror of metrics.jsonl: what a tracker shows of a step's numbers, fed from the records of the files.

Takes the records that the tracker writes to its files; returns nothing. A sink (W&B, TensorBoard) says how
they are shown. A thread of its own calls it, since sinks may ask a server and wait: none of its calls is made
by the thread that trains. The first failure is said, and after it the mirror is given up. What is said of a
failure names no credential. Which sinks there are is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from common.background import Background
from common.redact import redact_text
from common.runtime.json_lines import strict
from common.tracking_config import AlertKind

FINISH_SECONDS = 15.0
"""How long the end of a step waits for what is not shown yet."""


class Sink(Protocol):
    """How one tracker shows a step. Any method may raise; names of metrics come with the step's prefix."""

    name: str

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None: ...

    def artifact(self, name: str, folder: Path, role: str, digest: str) -> None: ...

    def alert(self, title: str, text: str, kind: AlertKind) -> None: ...

    def finish(self, summary: Mapping[str, float], exit_code: int) -> None: ...

    def abandon(self) -> None:
        """After a failure: leave nothing behind that waits or complains."""

    def left_over(self) -> str:
        """What becomes of what was not taken in time, in words."""


class Mirror:
    """A sink with its thread. prefix: the step's name, before those of its metrics."""

    def __init__(self, sink: Sink, prefix: str, say: Callable[[str], None]) -> None:
        self._sink, self._prefix, self._say = sink, prefix, say
        self._broken = False
        self._calls = Background(f"{sink.name}-mirror")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        values = self._prefixed(metrics)
        self._attempt(lambda: self._sink.log(values, step))

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """name: of the file that the rows are in, without its suffix."""
        self._attempt(
            lambda: self._sink.table(f"{self._prefix}/{name}", rows, step),
            otherwise=f"the {name} are in the run's folder only",
        )

    def log_artifact(self, name: str, folder: Path, role: str, digest: str) -> None:
        self._attempt(
            lambda: self._sink.artifact(name, folder, role, digest),
            otherwise=f"the artifact is not in {self._sink.name}",
        )

    def alert(self, title: str, text: str, kind: AlertKind) -> None:
        self._attempt(
            lambda: self._sink.alert(title, text, kind),
            otherwise=f"{self._sink.name} was not told",
        )

    def finish(self, summary: Mapping[str, float], exit_code: int) -> None:
        values = self._prefixed(summary)
        self._attempt(lambda: self._sink.finish(values, exit_code))
        if not self._calls.close(FINISH_SECONDS):
            self._say(
                f"{self._sink.name}: not everything was taken in {FINISH_SECONDS:.0f} s; "
                f"{self._sink.left_over()}"
            )

    def _prefixed(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {f"{self._prefix}/{name}": value for name, value in metrics.items()}

    def _attempt(self, call: Callable[[], None], otherwise: str = "") -> None:
        """Queue `call`; on failure say why, and give up unless `otherwise` tells what is lost."""

        def attempt() -> None:
            if self._broken:
                return
            try:
                call()
            except Exception as error:
                self._broken = not otherwise
                rest = otherwise or "the mirror stops here, metrics.jsonl goes on"
                self._say(f"{self._sink.name}: {reason(error)}; {rest}")
                if self._broken:
                    self._sink.abandon()

        self._calls.put(attempt)


def reason(error: BaseException) -> str:
    """The first line of an error, without credentials."""
    lines = str(error).strip().splitlines()
    return redact_text(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def cell(value: Any) -> Any:
    """A table's cell: numbers and text as they are, anything nested as JSON."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(strict(value))
