"""Where a step's numbers go: `metrics.jsonl` and `samples.jsonl` always, W&B and TensorBoard as mirrors.

Takes dictionaries of numbers, rows of samples, and alerts; returns nothing. The files are the truth and
nothing here ever fails a run: a full disk, a server that is away or a broken mirror is said in one line, and
training goes on. A mirror that was not there before is filled from the files first. It decides neither what
is measured nor how often.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.redact import shown
from common.runtime import tensorboard_mirror, wandb_mirror
from common.runtime.json_lines import JsonLines, records
from common.runtime.logs import STOPPED_EXIT_CODE
from common.runtime.mirror import Mirror
from common.tracking_config import AlertKind, MirrorName, TrackingConfig, artifact_name
from common.webhook import Webhook

METRICS_FILE = "metrics.jsonl"
SAMPLES = "samples"
SAMPLES_FILE = f"{SAMPLES}.jsonl"
LEDGER_FILE = "ledger.json"
ALERT_AGAIN_SECONDS = 60.0


class Tracker:
    """Logs one step of a run: to files in its folder, and to mirrors that a resume continues.

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
        self._mirrors: list[Mirror] = []
        self._tracking, self._said_at = tracking, dict[str, float]()
        self._webhook = Webhook(tracking if enabled else TrackingConfig(), run_name, say)
        if enabled:
            self._metrics.keep_until(resume_step)
            self._samples.keep_until(resume_step)
            self._open_mirrors(folder, config, resume_step, say)

    def _open_mirrors(
        self, folder: Path, config: Mapping[str, Any], resume_step: int | None, say: Callable[[str], None]
    ) -> None:
        """Open those that are asked for; what was logged before one was is given to it first."""
        for name in self._tracking.to:
            if name is MirrorName.wandb:
                is_new = not (folder / wandb_mirror.RUN_ID_FILE).exists()
                opened = wandb_mirror.open_mirror(
                    self._step_name, self._run_name, folder, self._tracking, config, say
                )
            else:
                is_new = not (folder / tensorboard_mirror.FOLDER).exists()
                opened = tensorboard_mirror.open_mirror(self._step_name, folder, config, resume_step, say)
            if opened is not None:
                self._mirrors.append(opened)
                if is_new:
                    self._fill(opened, folder)

    def _fill(self, mirror: Mirror, folder: Path) -> None:
        """What is in the files."""
        if (folder / METRICS_FILE).exists():
            for record in read_metrics(folder / METRICS_FILE):
                step = record.pop("step")
                mirror.log(record, step)
        if (folder / SAMPLES_FILE).exists():
            rows = (record for _, record in records(folder / SAMPLES_FILE))
            for step, of_step in itertools.groupby(rows, key=lambda row: row.pop("step")):
                mirror.log_table(SAMPLES, list(of_step), step)
        if (folder / LEDGER_FILE).exists():
            with contextlib.suppress(OSError, ValueError, KeyError):  # damage is said by the report
                sources = json.loads((folder / LEDGER_FILE).read_text(encoding="utf-8"))["sources"]
                mirror.log_table("ledger", sources, 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append `{"step": step, **metrics}` to metrics.jsonl. NaN and infinities are written as the strings
        "NaN", "Infinity" and "-Infinity", which strict JSON readers accept and `float()` understands."""
        if not self._enabled:
            return
        numbers = {name: _number(value) for name, value in metrics.items()}
        self._metrics.append(step, numbers)
        for mirror in self._mirrors:
            mirror.log(numbers, step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append one line per sample (`{"step": step, **row}`) to samples.jsonl; in a mirror one table."""
        if not self._enabled or not rows:
            return
        for row in rows:
            self._samples.append(step, row)
        for mirror in self._mirrors:
            mirror.log_table(SAMPLES, [dict(row) for row in rows], step)

    def log_artifact(self, folder: Path, role: str, digest: str) -> str:
        """Record a finished artifact (its manifest and its place, no weights); returns its W&B name.

        digest: hash of its manifest; its first 12 digits are the version's alias.
        """
        name = artifact_name(self._run_name, self._step_name)
        for mirror in self._mirrors:
            mirror.log_artifact(name, folder, role, digest)
        return f"{name}:{digest[:12]}"

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Close the mirrors, with the exit status that the error means."""
        code = error.code if isinstance(error, SystemExit) else 0 if error is None else 1
        self.finish(exit_code=code if isinstance(code, int) else 1, error=error)

    def alert(self, text: str) -> None:
        """Tell mirrors and webhook of a number that looks wrong; the same with other digits once a minute."""
        now, words = time.monotonic(), re.sub(r"[\d.]+", "", text)
        if now - self._said_at.get(words, -math.inf) >= ALERT_AGAIN_SECONDS:
            self._said_at[words] = now
            self._tell(AlertKind.watchdog, text)
            self._webhook.post(AlertKind.watchdog, self._step_name, f"{self._place}: {text}")

    def finish(
        self,
        summary: Mapping[str, float] | None = None,
        exit_code: int = 0,
        error: BaseException | None = None,
    ) -> None:
        """Close the mirrors; waits a bounded time for uploads. Safe to call twice.

        The webhook hears of the end from the controller, which sees a killed process end, too.
        """
        if exit_code in (0, STOPPED_EXIT_CODE):
            self._tell(AlertKind.end, "finished" if exit_code == 0 else "stopped")
        else:
            self._tell(AlertKind.failure, shown(error) if error is not None else f"exit status {exit_code}")
        for mirror in self._mirrors:
            mirror.finish({name: _number(value) for name, value in (summary or {}).items()}, exit_code)
        self._mirrors = []
        self._webhook.__exit__(None, None, None)

    @property
    def _place(self) -> str:
        return f"{self._step_name} of run {self._run_name}"

    def _tell(self, kind: AlertKind, text: str) -> None:
        for mirror in self._mirrors if kind in self._tracking.alerts else ():
            mirror.alert(f"{self._place}: {kind.value}", shown(text), kind)


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
