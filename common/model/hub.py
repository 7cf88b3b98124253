"""Where a model lies, as a folder or on the hub, and what is said when it cannot be loaded from there.

Takes the path that a user named and its key; returns the folder, or the hub name with the commit from which
everything is loaded. Errors of the hub's client, of safetensors and of an architecture's own code become
UserErrors that name the key. Loads nothing itself.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.artifacts import read_json
from common.deadline import within
from common.errors import UserError
from common.text import one_line, told

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
"""What is read of a hub model; no pickles."""
AGAIN = "get the model again, or name another one"


def locate(path: str, revision: str | None, key: str) -> tuple[str, str | None]:
    """(folder, None) for a local path, (hub name, commit) for a hub model."""
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local), None
    if local.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        found = "is a file" if local.exists() else "does not exist"
        raise UserError(f"{key}={path} {found}", hint="name a model's folder, or a hub model org/name")
    return path, _hub_commit(path, revision, key)


def fetch(path: str, revision: str | None, key: str) -> tuple[Path, str | None]:
    """(folder, None) for a local path; for a hub model the folder in the cache, and the commit it is of."""
    where, commit = locate(path, revision, key)
    if commit is None:
        check_folder(Path(where))
        return Path(where), None
    from huggingface_hub import snapshot_download

    with loading_errors(path, key, revision):
        folder = snapshot_download(
            path, revision=commit, allow_patterns=MODEL_FILES, local_files_only=not hub_answers()
        )
    check_folder(Path(folder))
    return Path(folder), commit


def cached_card(name: str, revision: str | None) -> Path | None:
    """The model card of a hub model, from the hub where it answers, else from the cache; None without one."""
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(
            name, "README.md", revision=revision, local_files_only=not hub_answers(),
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):
        return None
    return None if file is None else Path(file)


def _hub_commit(name: str, revision: str | None, key: str) -> str:
    """The commit behind a branch, or behind the default branch: everything is then loaded from it."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    options: dict[str, Any] = {"revision": revision, "local_files_only": not hub_answers()}
    with loading_errors(name, key, revision):
        file = cached_file(
            name, "config.json", _raise_exceptions_for_missing_entries=False, **options
        ) or cached_file(name, "tokenizer_config.json", **options)
    commit = extract_commit_hash(file, None)
    if commit is None:
        raise RuntimeError(f"no commit in {file}")
    return commit


def hub_answers(seconds: float = 5.0) -> bool:
    """Whether the hub's host takes connections; its client would retry for most of a minute to find out.

    Behind a proxy only the client can tell, and is let to.
    """
    from huggingface_hub.constants import ENDPOINT

    if urllib.request.getproxies():
        return True
    endpoint = urllib.parse.urlsplit(ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        within(seconds, lambda: socket.create_connection((endpoint.hostname or "", port), seconds).close())
    except OSError:
        return False
    return True


def check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"model.path={folder} has no config.json", hint="name the folder of a saved model")
    try:
        read_json(config)
    except ValueError as error:
        raise UserError(f"{config} is not JSON: {error}", hint="get the model again") from error
    weights = sorted(folder.glob("*.safetensors"))
    if strange := [file.name for file in weights if not file.is_file()]:  # a pipe would be waited for
        raise UserError(f"model.path={folder}: {strange[0]} is no file", hint="get the model again")
    if weights:
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"model.path={folder} has its weights in {pickles[0]}, a pickle, which can run code when loaded",
            hint="convert it to safetensors: load it where you trust it and call save_pretrained",
        )
    raise UserError(f"model.path={folder} has no weights (*.safetensors)", hint="get the model again")


@contextmanager
def loading_errors(name: str, key: str, revision: str | None = None) -> Iterator[None]:
    """Say what went wrong while loading in terms of what the user named."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from safetensors import SafetensorError

    at = name if revision is None else f"{name} (revision {revision})"
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"a weight file of {key}={at} is damaged: {one_line(error)}", hint="get the model again"
        ) from error
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        if Path(name).expanduser().is_dir():
            raise UserError(f"{key}={at} cannot be loaded: {one_line(error)}", hint=AGAIN) from error
        raise _hub_error(at, key, error) from error
    except UserError:
        raise
    except Exception as error:  # whatever an architecture's own code makes of these files
        text = one_line(error)
        if "trust_remote_code" in text or "custom code" in text:
            raise UserError(
                f"{key}={at} comes with Python code of its own",
                hint="read that code; to run it set model.trust_remote_code=true",
            ) from error
        if "mismatched" in text:
            text = "the shapes of its weights are not those its config.json says"
        elif not isinstance(error, (ValueError, ImportError)):
            text = told(error)
        raise UserError(f"{key}={at} cannot be loaded: {text}", hint=AGAIN) from error


def _hub_error(at: str, key: str, error: Exception) -> UserError:
    text = f"{error} {error.__cause__}"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    if offline or "connect" in text.lower() or "offline" in text.lower():
        return UserError(
            f"{key}={at} is not a local folder, not in the cache, and the hub cannot be reached",
            hint="check the name and the network, or download it elsewhere and name the folder",
        )
    if "safetensors" in text:
        return UserError(
            f"{key}={at} has no safetensors weights; pickles can run code and are not loaded",
            hint="choose a revision or a model with safetensors",
        )
    return UserError(
        f"{key}={at} cannot be loaded from the hub: {one_line(error)}",
        hint="check the name, the revision, and (gated models) that you are logged in: hf auth login",
    )
