"""The mirror of a step's numbers on Weights & Biases: one run, online, or offline to be sent later.

Takes what `mirror.py` hands it. No wait for the server is longer than a few seconds, and none fails a run:
what goes wrong is said in one line. This is the only module that imports wandb, and only when the mirror is
on. It holds nothing that is not in the files.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import secrets
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.deadline import within
from common.redact import has_wandb_key, redact, redact_text
from common.runtime.mirror import FINISH_SECONDS, Mirror, cell, reason
from common.tracking_config import AlertKind, TrackingConfig, WandbMode

RUN_ID_FILE = "wandb_run_id"

log = logging.getLogger("rlhf.tracking")

PROBE_SECONDS = 5.0
INIT_SECONDS = 10.0
ALERT_LEVELS = {AlertKind.watchdog: "WARN", AlertKind.failure: "ERROR", AlertKind.end: "INFO"}
_DEFAULT_SERVER = "https://api.wandb.ai"


class WandbRun:
    """One live W&B run of a step."""

    name = "wandb"

    def __init__(self, run: Any, step_name: str) -> None:
        self._run, self._step = run, f"{step_name}/step"
        self._is_defined = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        # W&B's own step only counts calls: a resumed run would have to go back, which W&B refuses
        self._define_metrics()
        self._run.log({self._step: step, **values})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        import wandb

        columns = list(dict.fromkeys(column for row in rows for column in row))
        data = [[step, *(cell(row.get(column)) for column in columns)] for row in rows]
        self._run.log({self._step: step, name: wandb.Table(columns=["step", *columns], data=data)})

    def artifact(self, name: str, folder: Path, role: str, digest: str) -> None:
        import wandb

        metadata = {"manifest_sha256": digest, "path": str(folder.resolve())}
        artifact = wandb.Artifact(name, type=role, metadata=metadata)
        # the manifest holds the hash of every file: it stands for the weights, which stay where they are
        artifact.add_file(str(folder / "manifest.json"), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["latest", digest[:12]])

    def alert(self, title: str, text: str, kind: AlertKind) -> None:
        # how often is decided by who calls
        self._run.alert(title=title, text=text, level=ALERT_LEVELS[kind], wait_duration=0)

    def finish(self, summary: Mapping[str, float], exit_code: int) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=exit_code)

    def abandon(self) -> None:
        _stop_service()

    def left_over(self) -> str:
        return _sync(self._run)

    def _define_metrics(self) -> None:
        if not self._is_defined:
            self._is_defined = True
            self._run.define_metric(self._step, hidden=True)
            self._run.define_metric(f"{self._step.partition('/')[0]}/*", step_metric=self._step)


def open_mirror(
    step_name: str,
    run_name: str,
    folder: Path,
    tracking: TrackingConfig,
    config: Mapping[str, Any],
    say: Callable[[str], None],
) -> Mirror | None:
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
    if run is None:
        line = f"wandb: off ({why})"
    elif mode is WandbMode.online:
        line = f"wandb: {run.url}"
    else:
        line = f"wandb: offline ({why}); {_sync(run)}"
    say(line)
    if wanted is WandbMode.online and mode is not WandbMode.online:
        log.warning(line)  # for the report, which shows warnings
    return None if run is None else Mirror(WandbRun(run, step_name), step_name, say)


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

    def ask() -> None:
        urllib.request.urlopen(server, timeout=seconds).close()  # noqa: S310 - W&B takes http(s) alone

    try:
        within(seconds, ask)
        return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # certificates are W&B's own business: it may be told to trust more than Python does
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _start(
    mode: WandbMode, why: str, identity: Mapping[str, Any], folder: Path, config: Mapping[str, Any]
) -> tuple[Any, WandbMode, str]:
    """Start the run in `mode`, or offline when online fails; (None, off, why) when neither can be done."""
    for attempt in (mode, WandbMode.offline)[: 2 if mode is WandbMode.online else 1]:
        try:
            return _init(attempt, identity, folder, config), attempt, why
        except Exception as error:
            why = reason(error)
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
        config=redact(config),
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
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if known := path.read_text(encoding="ascii").strip():
            return known
    run_id = secrets.token_hex(8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id + "\n", encoding="ascii")
    except OSError as error:
        print(f"warning: {path} cannot be written ({error}); a resume begins a new W&B run", file=sys.stderr)
    return run_id


def _sync(run: Any) -> str:
    return f"send it later with: wandb sync {os.path.relpath(Path(run.dir).parent)}"
