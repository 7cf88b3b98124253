"""A file of completions, a line of JSON per prompt, that an interrupted process can go on with.

Takes records in the order of their `index`, from 0 on; appends them as whole lines. Beside the file lies
another with what decides its completions: a file that was begun with other settings is refused with what
differs, and nothing that was not begun here is ever written to. Does not know how completions are made.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from common.artifacts import read_json, write_json
from common.errors import UserError
from common.files import disk_errors
from common.runtime.json_lines import write_whole

IN_WORDS = {"model": "another model", "prompts": "other prompts"}
"""What is said of settings that are hashes."""


class CompletionsFile:
    """The file at `path`, open for appending. count: lines that it has."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """settings: JSON values that decide the completions."""
        self.path, self._settings = path, {name: _plain(value) for name, value in settings.items()}
        self.beside = path.with_name(f"{path.name}.settings.json")
        self.count = self._completions = self._stopped = 0

    def __enter__(self) -> CompletionsFile:
        """UserError where these settings do not go on with the file, or another process writes it."""
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._check_settings()
            else:
                write_json(self.beside, self._settings)
            self._file = self.path.open("ab+", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self.path} is being written by another process", hint="--out FILE") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the line of the next prompt."""
        assert record["index"] == self.count
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        with disk_errors(self.path):
            write_whole(self._file, line.encode("utf-8", "replace"))
        self._note(record)

    def summary(self) -> str:
        """How many completions there are, and how many of them ended by themselves."""
        if not self._completions:
            return "no completions"
        share = self._stopped / self._completions
        return f"{self._completions:,} completions, of which {share:.0%} stopped by themselves"

    def _check_settings(self) -> None:
        try:
            begun = read_json(self.beside)
        except (OSError, ValueError):
            raise UserError(
                f"{self.path} exists, without {self.beside.name} beside it that says how it was made",
                hint="nothing is overwritten: --out NEW_FILE",
            ) from None
        theirs, ours = (value if isinstance(value, dict) else {} for value in (begun, self._settings))
        different = [name for name in sorted(theirs | ours) if theirs.get(name) != ours.get(name)]
        if different:
            said = ", ".join(
                IN_WORDS.get(name, f"{name}={ours.get(name)} (it was {theirs.get(name)})")
                for name in different
            )
            raise UserError(
                f"{self.path} was begun in another way; now there is {said}",
                hint="the same settings go on with it; for others: --out NEW_FILE",
            )

    def _read(self) -> None:
        """Count the whole lines, and cut what follows them: a line that was torn."""
        end = 0
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._note(self._record(line))
                end += len(line)
        self._file.truncate(end)

    def _record(self, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if record["index"] == self.count and all("stopped" in each for each in record["completions"]):
                return dict(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise UserError(
            f"{self.path}:{self.count + 1} is not the line that was written there",
            hint="restore the file, or --out NEW_FILE",
        )

    def _note(self, record: Mapping[str, Any]) -> None:
        self.count += 1
        self._completions += len(record["completions"])
        self._stopped += sum(bool(each["stopped"]) for each in record["completions"])


def _plain(value: Any) -> Any:
    """As it is read again."""
    return json.loads(json.dumps(value, default=lambda each: getattr(each, "value", str(each))))
