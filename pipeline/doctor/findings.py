"""What a probe takes and returns: a machine in, findings out.

A probe reads what the system offers (files under /proc, other programs' answers, a file it writes and removes
again) and changes nothing. A warning would stop or hang a run; a note is worth knowing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

GIB = 2**30


class Level(Enum):
    ok = "ok"
    note = "note"
    warning = "WARNING"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    name: str
    text: str
    way_out: str = ""


Findings = Iterator[Finding]


@dataclass(frozen=True)
class Machine:
    """What probes are given: this process's environment, where runs would go, how long a child may take."""

    environment: Mapping[str, str]
    output_dir: Path
    child_seconds: float = 60.0

    def tool(self, name: str) -> str | None:
        """The path of a program."""
        return shutil.which(name, path=self.environment.get("PATH", os.defpath))

    def answer(
        self, *command: str, seconds: float = 8.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, in bounded time. environment: further variables."""
        return subprocess.run(
            command, env={**self.environment, **environment}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=seconds, check=False, errors="replace",
        )  # fmt: skip

    def folder(self, variable: str, *below_home: str) -> Path:
        """The folder that a variable names, or else one below the home folder."""
        home = self.environment.get("HOME", "~")
        return Path(self.environment.get(variable) or Path(home, *below_home).expanduser())


@dataclass(frozen=True)
class Probe:
    """A probe and its name; when_late: the way out when it does not answer."""

    name: str
    look: Callable[[Machine], Iterable[Finding]]
    when_late: str = ""
    starts_child: bool = False


def ok(name: str, text: str) -> Finding:
    return Finding(Level.ok, name, text)


def note(name: str, text: str, way_out: str = "") -> Finding:
    return Finding(Level.note, name, text, way_out)


def warning(name: str, text: str, way_out: str) -> Finding:
    return Finding(Level.warning, name, text, way_out)
