"""Where a step's numbers go: `metrics.jsonl` and `samples.jsonl` always, Weights & Biases as a mirror.

Takes dictionaries of numbers and rows of samples; returns nothing. The files are the truth and nothing here
ever fails a run: a full disk, a server that is away or a broken mirror is said in one line, and training goes
on. It decides neither what is measured nor how often.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import TrackingConfig
from common.runtime.json_lines import JsonLines, records
from common.runtime.wandb_mirror import Mirror, open_mirror

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


class Tracker:
    """Logs one step of a run: to files in its folder, and to one W&B run that a resume continues.

    step_name: `sft`, ...; the W&B job type and the prefix of its metrics. run_name: the W&B group.
    folder: the step's folder, made when missing. config: the resolved configuration in plain values; redacted
    before it leaves the process. resume_step: steps already done; lines of later steps are cut from the
    files, because they will be logged again; None: nothing was done, both files start empty. enabled: false
    on all ranks but the first, where every method does nothing. say: receives the few lines meant for the
    user.
    """

    def __init__(
        self,
        step_name: str,
        run_name: str,
        folder: Path,
        tracking: TrackingConfig,
        config: Mapping[str, Any],
        resume_step: int | None,
        *,
        enabled: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self._step_name = step_name
        self._run_name = run_name
        self._enabled = enabled
        self._metrics = JsonLines(folder / METRICS_FILE, say)
        self._samples = JsonLines(folder / SAMPLES_FILE, say)
        self._mirror: Mirror | None = None
        if enabled:
            self._metrics.keep_until(resume_step)
            self._samples.keep_until(resume_step)
            self._mirror = open_mirror(step_name, run_name, folder, tracking, config, say)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append `{"step": step, **metrics}` to metrics.jsonl. NaN and infinities are written as the strings
        "NaN", "Infinity" and "-Infinity", which strict JSON readers accept and `float()` understands."""
        if not self._enabled:
            return
        numbers = {name: _number(value) for name, value in metrics.items()}
        self._metrics.append(step, numbers)
        if self._mirror is not None:
            self._mirror.log(numbers, step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append one line per sample (`{"step": step, **row}`) to samples.jsonl; on W&B one table."""
        if not self._enabled or not rows:
            return
        for row in rows:
            self._samples.append(step, row)
        if self._mirror is not None:
            self._mirror.log_table([dict(row) for row in rows], step)

    def log_artifact(self, folder: Path, role: str, digest: str) -> str:
        """Record a finished artifact on W&B (its manifest and its place, no weights); returns its W&B name.

        digest: hash of its manifest; its first 12 digits are the version's alias.
        """
        name = re.sub(r"[^\w.-]+", "-", f"{self._run_name}-{self._step_name}")[:100]
        if self._mirror is not None:
            self._mirror.log_artifact(name, folder, role, digest)
        return f"{name}:{digest[:12]}"

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Close the mirror, with the exit status that the error means."""
        code = error.code if isinstance(error, SystemExit) else 0 if error is None else 1
        self.finish(exit_code=code if isinstance(code, int) else 1)

    def finish(self, summary: Mapping[str, float] | None = None, exit_code: int = 0) -> None:
        """Close the mirror; waits a bounded time for uploads. Safe to call twice."""
        if self._mirror is not None:
            self._mirror.finish({name: _number(value) for name, value in (summary or {}).items()}, exit_code)
            self._mirror = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, with NaN and infinities as floats again; a torn last line is left out."""
    spelled = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

    def number(value: Any) -> Any:
        return spelled.get(value, value) if isinstance(value, str) else value

    return [{name: number(value) for name, value in record.items()} for _, record in records(path)]


def _number(value: Any) -> float | int:
    """Numbers of numpy and one-element tensors as Python's own; whole numbers stay whole."""
    if hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, int) else float(value)
