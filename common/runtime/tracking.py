"""Where a step's numbers go: `metrics.jsonl` and `samples.jsonl` always, Weights & Biases as a mirror.

Takes dictionaries of numbers and rows of samples; returns nothing. The files are the truth and nothing here
ever fails a run: a full disk, a server that is away or a broken mirror is said in one line, and training goes
on. It decides neither what is measured nor how often. This is the only module that imports wandb, and only
when the mirror is on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import re
import secrets
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from common.config import TrackingConfig, WandbMode
from common.credentials import has_wandb_key
from common.files import write_atomically
from common.redact import redact, redact_text

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
RUN_ID_FILE = "wandb_run_id"

log = logging.getLogger("rlhf.tracking")

PROBE_SECONDS = 5.0
INIT_SECONDS = 10.0
FINISH_SECONDS = 15.0
_DEFAULT_SERVER = "https://api.wandb.ai"


class Tracker:
    """Logs one step of a run: to files in its folder, and to one W&B run that a resume continues.

    step_name: `sft`, ...; the W&B job type and the prefix of its metrics. run_name: the W&B group.
    folder: the step's folder, made when missing. config: the resolved configuration; redacted before it
    leaves the process. resume_step: steps already done; lines of later steps are cut from
    the files, because they will be logged again; None: nothing was done, both files start empty.
    enabled: false on all ranks but the first, where every method does nothing. say: receives the few lines
    meant for the user.
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
        self._metrics = _JsonLines(folder / METRICS_FILE, say)
        self._samples = _JsonLines(folder / SAMPLES_FILE, say)
        self._mirror: _Mirror | None = None
        if enabled:
            self._metrics.keep_until(resume_step)
            self._samples.keep_until(resume_step)
            self._mirror = _open_mirror(step_name, run_name, folder, tracking, config, say)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append `{"step": step, **metrics}` to metrics.jsonl. NaN and infinities are written as the strings
        "NaN", "Infinity" and "-Infinity", which strict JSON readers accept and `float()` understands."""
        if not self._enabled:
            return
        numbers = {name: _number(value) for name, value in metrics.items()}
        self._metrics.append({"step": step, **{name: _strict(value) for name, value in numbers.items()}})
        if self._mirror is not None:
            self._mirror.log(numbers, step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append one line per sample (`{"step": step, **row}`) to samples.jsonl; on W&B one table."""
        if not self._enabled or not rows:
            return
        for row in rows:
            self._samples.append({"step": step, **{name: _strict(value) for name, value in row.items()}})
        if self._mirror is not None:
            self._mirror.log_table([dict(row) for row in rows], step)

    def log_artifact(self, folder: Path, role: str, digest: str, parents: Sequence[str] = ()) -> str:
        """Record a finished artifact on W&B (its manifest and its place, no weights); returns its W&B name.

        digest: hash of its manifest; its first 12 digits are the version's alias. parents: names that this
        method returned for the artifacts it was made from.
        """
        name = re.sub(r"[^\w.-]+", "-", f"{self._run_name}-{self._step_name}")[:100]
        if self._enabled and self._mirror is not None:
            self._mirror.log_artifact(name, folder, role, digest, parents)
        return f"{name}:{digest[:12]}"

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Close the mirror, with the exit status that the error means."""
        code = error.code if isinstance(error, SystemExit) else 0 if error is None else 1
        self.finish(exit_code=code if isinstance(code, int) else 1)

    def finish(self, summary: Mapping[str, float] | None = None, exit_code: int = 0) -> None:
        """Close the mirror; waits at most `FINISH_SECONDS` for uploads. Safe to call twice."""
        if self._enabled and self._mirror is not None:
            self._mirror.finish({name: _number(value) for name, value in (summary or {}).items()}, exit_code)
            self._mirror = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, with NaN and infinities as floats again; a torn last line is left out."""
    spelled = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

    def number(value: Any) -> Any:
        return spelled.get(value, value) if isinstance(value, str) else value

    return [{name: number(value) for name, value in record.items()} for _, record in _records(path)]


# --- files ----------------------------------------------------------------------------------------


class _JsonLines:
    """An append-only file of JSON lines that holds whole lines only, whatever happens while it is written."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._warned = False

    def keep_until(self, step: int | None) -> None:
        """Drop torn lines and those of later steps, through a new file renamed over the old one."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                kept = -1 if step is None else step
                lines = (line for line, record in _records(self._path) if kept >= record["step"])
                write_atomically(self._path, lines)
        except OSError as error:
            self._warn(error)

    def append(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
        try:
            self._write_whole(line)
        except OSError as error:
            self._warn(error)

    def _write_whole(self, line: bytes) -> None:
        """One write per line, undone when it was cut short: the next line must begin on a line of its own."""
        with self._path.open("ab", buffering=0) as file:
            begin = file.seek(0, os.SEEK_END)
            written = -1
            try:
                written = file.write(line)
            finally:
                if written != len(line):
                    file.truncate(begin)
        if written != len(line):
            raise OSError(f"wrote {written} of {len(line)} bytes")

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self._say(f"warning: {self._path} cannot be written ({error}); training goes on without it")


def _records(path: Path) -> Iterable[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a file with what they say; what is not a JSON object with a step is passed over."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record


def _number(value: Any) -> float | int:
    """Numbers of numpy and one-element tensors as Python's own; whole numbers stay whole."""
    if hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, int) else float(value)


def _strict(value: Any) -> Any:
    """What strict JSON can hold: not-a-number and infinities by name, unknown objects by their text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


# --- W&B ------------------------------------------------------------------------------------------


class _Mirror:
    """One live W&B run, fed by a thread of its own.

    Some of W&B's calls ask the server and wait (tables and artifacts do), so none is made by the thread that
    trains. The first failure is said, and after it the mirror is given up.
    """

    def __init__(self, run: Any, step_name: str, say: Callable[[str], None]) -> None:
        self._run = run
        self._prefix = step_name
        self._say = say
        self._broken = False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
        self._thread.start()
        self._attempt(self._define_metrics)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        # W&B's own step only counts calls: a resumed run would have to go back, which W&B refuses
        values = {f"{self._prefix}/{name}": value for name, value in metrics.items()}
        self._attempt(lambda: self._run.log({f"{self._prefix}/step": step, **values}))

    def log_table(self, rows: list[dict[str, Any]], step: int) -> None:
        def send() -> None:
            import wandb

            columns = list(dict.fromkeys(name for row in rows for name in row))
            data = [[step, *(_cell(row.get(name)) for name in columns)] for row in rows]
            table = wandb.Table(columns=["step", *columns], data=data)
            self._run.log({f"{self._prefix}/step": step, f"{self._prefix}/samples": table})

        self._attempt(send, otherwise=f"the samples are in {SAMPLES_FILE} only")

    def log_artifact(self, name: str, folder: Path, role: str, digest: str, parents: Sequence[str]) -> None:
        def send() -> None:
            import wandb

            metadata = {"manifest_sha256": digest, "parents": list(parents), "path": str(folder.resolve())}
            artifact = wandb.Artifact(name, type=role, metadata=metadata)
            # the manifest holds the hash of every file: it stands for the weights, which stay where they are
            artifact.add_file(str(folder / "manifest.json"), policy="immutable", skip_cache=True)
            if not self._run.offline:  # W&B cannot look up a parent without its server
                for parent in parents:
                    self._run.use_artifact(parent)
            self._run.log_artifact(artifact, aliases=["latest", digest[:12]])

        self._attempt(send, otherwise="the artifact is not on W&B")

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        values = {f"{self._prefix}/{name}": value for name, value in summary.items()}
        self._attempt(lambda: self._run.summary.update(values))
        self._attempt(lambda: self._run.finish(exit_code=exit_code))
        self._calls.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._say(
                f"wandb: the server did not take everything in {FINISH_SECONDS:.0f} s; {_sync(self._run)}"
            )

    def _define_metrics(self) -> None:
        self._run.define_metric(f"{self._prefix}/step", hidden=True)
        self._run.define_metric(f"{self._prefix}/*", step_metric=f"{self._prefix}/step")

    def _attempt(self, call: Callable[[], Any], otherwise: str = "") -> None:
        """Queue `call`; on failure say why, and give up unless `otherwise` tells what is lost."""

        def attempt() -> None:
            try:
                call()
            except Exception as error:
                self._broken = not otherwise
                rest = otherwise or f"the mirror stops here, {METRICS_FILE} goes on"
                self._say(f"wandb: {_reason(error)}; {rest}")
                if self._broken:
                    _stop_service()

        self._calls.put(attempt)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if not self._broken:
                call()


def _open_mirror(
    step_name: str,
    run_name: str,
    folder: Path,
    tracking: TrackingConfig,
    config: Mapping[str, Any],
    say: Callable[[str], None],
) -> _Mirror | None:
    """The W&B run of this step, online or offline; None when it is off or cannot be had at all."""
    if tracking.wandb is WandbMode.off:
        return None
    server = os.environ.get("WANDB_BASE_URL", _DEFAULT_SERVER).rstrip("/")
    mode, why = choose_mode(tracking.wandb, os.environ, has_wandb_key(server, os.environ))
    wanted = mode
    if mode is WandbMode.online and not server_answers(server):
        mode, why = WandbMode.offline, f"{redact_text(server)} does not answer"
    if mode is WandbMode.off:
        say(f"wandb: off ({why})")
        return None
    _keep_files_in(folder)
    identity: dict[str, Any] = {"id": _run_id(folder), "name": f"{run_name}/{step_name}", "group": run_name}
    identity |= {"job_type": step_name, "project": tracking.project, "entity": tracking.entity}
    run, mode, why = _start(mode, why, identity, folder, config)
    line = f"wandb: off ({why})"
    if run is not None:
        line = f"wandb: {run.url}" if mode is WandbMode.online else _offline_line(why, run)
    say(line)
    if wanted is WandbMode.online and mode is not WandbMode.online:
        log.warning(line)  # for the report, which shows warnings
    if run is None:
        return None
    return _Mirror(run, step_name, say)


def choose_mode(requested: WandbMode, environ: Mapping[str, str], has_key: bool) -> tuple[WandbMode, str]:
    """The mode to begin with, and why when it is not online. `auto` follows WANDB_MODE, then the key."""
    if requested is not WandbMode.auto:
        return (
            requested,
            "" if requested is WandbMode.online and has_key else f"tracking.wandb={requested.name}",
        )
    wanted = environ.get("WANDB_MODE", "").lower()
    if wanted in ("disabled", "offline", "dryrun") or environ.get("WANDB_DISABLED", "").lower() == "true":
        mode = WandbMode.offline if wanted in ("offline", "dryrun") else WandbMode.off
        return mode, "asked for by the environment"
    return (WandbMode.online, "") if has_key else (WandbMode.offline, "no W&B key; `wandb login` adds one")


def server_answers(server: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether anything at all answers there in time, through the proxy that the environment names."""
    try:
        with urllib.request.urlopen(server, timeout=seconds):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # certificates are W&B's own business: it may be told to trust more than Python does
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError):
        return False


def _start(
    mode: WandbMode, why: str, identity: Mapping[str, Any], folder: Path, config: Mapping[str, Any]
) -> tuple[Any, WandbMode, str]:
    """Start the run in `mode`, or offline when online fails; (None, off, why) when neither can be done."""
    for attempt in (mode, WandbMode.offline)[: 2 if mode is WandbMode.online else 1]:
        try:
            return _init(attempt, identity, folder, config), attempt, why
        except Exception as error:
            why = _reason(error)
            _stop_service()
    return None, WandbMode.off, why


def _stop_service() -> None:
    """End W&B's service process, which otherwise keeps the id of a failed run taken and complains at exit."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown(exit_code=1)


def _init(mode: WandbMode, identity: Mapping[str, Any], folder: Path, config: Mapping[str, Any]) -> Any:
    """`wandb.init` with a bound on every wait, nothing on the console, and nothing read from the project."""
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        login_timeout=1,
        disable_git=True,
        disable_code=True,
        save_code=False,
        symlink=False,
        x_disable_viewer=True,
    )
    wandb.setup(settings=settings)  # before init: logging in would print
    return wandb.init(
        **identity,
        mode="online" if mode is WandbMode.online else "offline",
        resume="allow",
        reinit="create_new",
        dir=str(folder),
        config=_plain(redact(config)),
        settings=settings,
    )


def _keep_files_in(folder: Path) -> None:
    """W&B's files, staging area and cache stay in the run's folder unless the user put them elsewhere."""
    places = {"WANDB_DIR": folder, "WANDB_CACHE_DIR": folder / "wandb" / "cache"}
    places |= {"WANDB_DATA_DIR": folder / "wandb" / "data"}
    for name, place in places.items():
        os.environ.setdefault(name, str(place.resolve()))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _run_id(folder: Path) -> str:
    """The W&B id of this step folder, made once: a resume finds it, a folder begun anew gets another."""
    path = folder / RUN_ID_FILE
    try:
        return path.read_text(encoding="ascii").strip() or _new_run_id(path)
    except (OSError, UnicodeDecodeError):
        return _new_run_id(path)


def _new_run_id(path: Path) -> str:
    run_id = secrets.token_hex(8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id + "\n", encoding="ascii")
    except OSError as error:
        print(f"warning: {path} cannot be written ({error}); a resume begins a new W&B run", file=sys.stderr)
    return run_id


def _offline_line(why: str, run: Any) -> str:
    return f"wandb: offline ({why}); {_sync(run)}"


def _sync(run: Any) -> str:
    return f"send it later with: wandb sync {os.path.relpath(Path(run.dir).parent)}"


def _reason(error: BaseException) -> str:
    """The first line of an error, without credentials."""
    lines = str(error).strip().splitlines()
    return redact_text(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def _plain(value: Any) -> Any:
    """Nested settings as JSON has them: enums by name, unknown objects by their text."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _cell(value: Any) -> Any:
    """A table's cell: numbers and text as they are, anything nested as JSON."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(_strict(value))
