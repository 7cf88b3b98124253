"""Give an artifact away: to the hub as a repository that `from_pretrained` loads, to llama.cpp as a file.

Takes an artifact's folder, which stays as it is, and a name on the hub or a path. A push is one commit: an
interrupted one leaves the repository as it was, and the same command goes on with what had arrived.
Everything that can be known before an artifact is made is asked first (`Destination.of`, `find_converter`).
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.artifacts import CARD, MANIFEST, Manifest, verify
from common.card import addressed
from common.errors import UserError
from common.files import disk_errors
from common.redact import shown
from common.stage import Role
from common.text import one_line

CONVERTER = "convert_hf_to_gguf.py"
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""What the converter calls dtypes."""
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
"""Ends of files that a loader would take for weights, whoever left them in a repository."""
AGAIN = "what has arrived is kept: the same command again goes on"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Destination:
    """A repository on the hub. private: None for what it is, or becomes by its owner's settings."""

    name: str
    private: bool | None = None

    @classmethod
    def of(cls, name: str, *, private: bool) -> Destination:
        """UserError for a name that cannot be one, and without a token that the hub takes."""
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"--push {name}: {one_line(error)}", hint="--push ORG/NAME") from None
        if "/" not in name:
            raise UserError(f"--push {name} names no owner", hint=f"--push YOUR_NAME/{name}")
        if get_token() is None:
            raise UserError(
                f"--push {name} needs a token of the hub, and there is none",
                hint="hf auth login, or set HF_TOKEN to one that may write (https://huggingface.co/settings/tokens)",
            )
        with hub_errors(name):
            HfApi().whoami()
        return cls(name, True if private else None)

    def upload(self, artifact: Path, say: Say) -> None:
        """Make the repository what the artifact is, in one commit. UserError where that cannot be."""
        from huggingface_hub import HfApi

        manifest, api = verify(artifact), HfApi()
        for line in of_this_machine(manifest):
            say(f"note: {line}")
        with hub_errors(self.name):
            api.create_repo(self.name, private=self.private, exist_ok=True)
            is_private = bool(api.model_info(self.name).private)
            if self.private and not is_private:
                raise UserError(
                    f"--private: {self.name} is there already, and public; nothing was uploaded",
                    hint="another name, or make it private on the hub first",
                )
            size = sum(record["bytes"] for record in manifest.files.values())
            say(f"pushing {artifact} to {self.name}, {size / 2**20:,.1f} MiB")
            operations, removed = self._operations(artifact, manifest, api.list_repo_files(self.name))
            for name in removed:
                say(f"note: {name} in {self.name} is not of this artifact, and is removed there")
            title = f"A {'policy' if manifest.role is Role.policy else 'reward model'} of rlhf-pipeline"
            done = api.create_commit(self.name, operations, commit_message=title)
        url = f"{api.endpoint}/{self.name}"
        say(f"  pushed    {url} ({'private' if is_private else 'public'}), commit {done.oid[:12]}")

    def _operations(
        self, artifact: Path, manifest: Manifest, there: list[str]
    ) -> tuple[list[Any], list[str]]:
        """What the commit does, and the files that it removes: weights that a loader would take instead."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        names = sorted({*manifest.files, MANIFEST} - {CARD})
        added: list[Any] = [CommitOperationAdd(name, artifact / name) for name in names]
        if (artifact / CARD).exists():
            card = addressed((artifact / CARD).read_text(encoding="utf-8"), self.name)
            added.append(CommitOperationAdd(CARD, card.encode()))
        removed = [name for name in there if name.endswith(WEIGHTS) and name not in names]
        return [*added, *map(CommitOperationDelete, removed)], removed


def of_this_machine(manifest: Manifest) -> Iterator[str]:
    """Lines on what others will read of this machine in an artifact's files, or cannot follow."""
    details = manifest.details
    if base := details.get("adapter_of"):
        yield f"the adapters load on {base}, which others need as well"
    named = [details.get("base_model"), *(parent.get("path") for parent in details.get("parents") or [])]
    if local := sorted({path for path in named if isinstance(path, str) and path.startswith("/")}):
        yield f"{MANIFEST} names folders of this machine: {', '.join(local)}"


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """What the hub or its client refuse as a UserError that says how to get on."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # httpx or httpx2, by the client's version; connections that fail raise others of its kind
    transport = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise UserError(f"--push {name}: HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE") from error
    except OSError as error:
        raise refused(name, error) from error
    except (ValueError, RuntimeError) as error:  # of the card's head; of the client's own uploads
        cause = f" ({one_line(error.__cause__)})" if error.__cause__ is not None else ""
        raise UserError(f"--push {name}: {shown(one_line(error) + cause)}", hint=AGAIN) from error
    except Exception as error:
        if not isinstance(error, transport):
            raise
        raise UserError(
            f"--push {name}: the hub cannot be reached ({one_line(error)})", hint=AGAIN
        ) from error


def refused(name: str, error: OSError) -> UserError:
    """What the hub, or a disk on the way to it, said."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = shown(getattr(error, "server_message", None) or one_line(error))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"--push {name}: the disk is full", hint=f"free some space, or set HF_HOME; {AGAIN}")
    if status == 401:
        return UserError(f"--push {name}: the hub does not take the token", hint="hf auth login, or HF_TOKEN")
    if status == 403:
        return UserError(
            f"--push {name}: the token may not do this: {said}",
            hint="a token that may write, and an owner that you belong to",
        )
    if status is None:
        return UserError(f"--push {name}: the upload broke off ({said})", hint=AGAIN)
    return UserError(f"--push {name}: the hub answers {status}: {said}", hint=AGAIN)


# --- llama.cpp --------------------------------------------------------------------------------------


def find_converter() -> Path:
    """llama.cpp's converter, from LLAMA_CPP (its folder, or the file) or PATH; UserError without one."""
    if named := os.environ.get("LLAMA_CPP"):
        given = Path(named).expanduser()
        found = given / CONVERTER if given.is_dir() else given
        if found.is_file():
            return found
        raise UserError(f"LLAMA_CPP={named} holds no {CONVERTER}", hint="name a checkout of llama.cpp")
    for folder in os.get_exec_path():
        if (found := Path(folder) / CONVERTER).is_file():
            return found
    raise UserError(
        f"--gguf needs llama.cpp's {CONVERTER}, which is neither on PATH nor in LLAMA_CPP",
        hint="git clone --depth 1 https://github.com/ggml-org/llama.cpp; pip install gguf; "
        "LLAMA_CPP=llama.cpp, then the same command again",
    )


def check_gguf(file: Path, role: Role | None) -> None:
    """UserError for a file that is there, and for what llama.cpp has no format for."""
    if file.exists():
        raise UserError(
            f"--gguf {file} exists, and nothing is overwritten", hint="another name, or remove it"
        )
    if role is not Role.policy:
        raise UserError(
            "--gguf: llama.cpp has no format for a classifier with one label", hint="export a policy"
        )


def write_gguf(artifact: Path, file: Path, converter: Path, say: Say) -> None:
    """Convert an artifact to one GGUF file in the dtype it has; the file is there whole or not at all."""
    dtype = verify(artifact).details.get("dtype")
    partial = file.with_name(f".{file.name}.tmp")
    command = [sys.executable, str(converter), str(artifact), "--outfile", str(partial)]
    with disk_errors(file, "--gguf FILE"):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            ended = subprocess.run(
                [*command, "--outtype", OUTTYPES.get(str(dtype), "auto")],
                capture_output=True,
                text=True,
                check=False,
            )
            if ended.returncode != 0 or not partial.exists():
                lines = [line for line in ended.stderr.splitlines() if line.strip()] or ["it wrote no file"]
                missing = re.search(r"No module named '([\w.]+)'", lines[-1])
                raise UserError(
                    f"--gguf: {converter} refuses {artifact}: {shown(lines[-1])}",
                    hint=f"it needs a package that is not installed: pip install {missing[1]}"
                    if missing
                    else "the artifact is unharmed; llama.cpp may not know this model or its tokenizer",
                )
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    say(f"  gguf      {file} ({file.stat().st_size / 2**20:,.1f} MiB)")
