"""A step's numbers for TensorBoard: its event files, in the step's folder.

Takes what `mirror.py` hands it. This is the only module that imports TensorBoard, and only when it is asked
for. The event files hold nothing that is not in metrics.jsonl and samples.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.redact import redact
from common.runtime.mirror import Mirror, cell, reason
from common.tracking_config import AlertKind

FOLDER = "tensorboard"
FLUSH_SECONDS = 10


class TensorBoard:
    """The event files of one step. writer: torch's SummaryWriter, which has a thread of its own."""

    name = "tensorboard"

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._last_step = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._last_step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells: list[list[Any]] = [columns, ["---"] * len(columns)]
        cells += [[row.get(column) for column in columns] for row in rows]
        text = "\n".join(f"| {' | '.join(map(_in_table, line))} |" for line in cells)
        self._writer.add_text(name, text, step)

    def artifact(self, name: str, folder: Path, role: str, digest: str) -> None:
        self._writer.add_text(f"artifacts/{role}", f"{name}: `{folder}` ({digest})", self._last_step)

    def alert(self, title: str, text: str, kind: AlertKind) -> None:
        self._writer.add_text("alerts", f"**{title}** {text}", self._last_step)

    def finish(self, summary: Mapping[str, float], exit_code: int) -> None:
        self._writer.close()

    def abandon(self) -> None:
        """Its thread ends with the process."""

    def left_over(self) -> str:
        return "what is missing is in metrics.jsonl"


def open_mirror(
    step_name: str,
    folder: Path,
    config: Mapping[str, Any],
    done: int | None,
    say: Callable[[str], None],
) -> Mirror | None:
    """The event files of this step, in `folder`/tensorboard; None, said in a line, when they cannot be had.

    done: steps already done, of which files of an earlier process tell; TensorBoard passes over what these
    say of later ones. None: nothing was done.
    """
    place = folder / FOLDER
    try:
        from torch.utils.tensorboard import SummaryWriter

        purge = (0 if done is None else done + 1) if place.exists() else None
        writer = SummaryWriter(str(place), purge_step=purge, flush_secs=FLUSH_SECONDS)
        settings = json.dumps(redact(config), indent=2, ensure_ascii=False, default=str)
        writer.add_text(f"{step_name}/config", "\n".join(f"    {line}" for line in settings.splitlines()), 0)
    except Exception as error:
        say(f"tensorboard: off ({reason(error)})")
        return None
    say(f"tensorboard: {place}")
    return Mirror(TensorBoard(writer), step_name, say)


def _in_table(value: Any) -> str:
    """A cell of Markdown, in which newlines and bars are text."""
    return str(cell(value)).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
