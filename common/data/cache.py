"""Folders of tokenized rows, each named by a hash of everything that decides its rows.

A folder appears under its name only when it is whole; one process fills it while those of other machines wait
on the file system. Knows what a folder depends on and when it is whole, not what its files say.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import chat_template, text
from common.artifacts import file_sha256, read_json
from common.config import DataConfig, SourceConfig
from common.data import encoder, sources
from common.data.stored import ROWS_FILE
from common.files import disk_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INDEX_FILE, LEDGER_FILE, KEY_FILE = "index.arrow", "ledger.json", "key.json"
FILES = (ROWS_FILE, INDEX_FILE, LEDGER_FILE)

Report = Callable[[str], None]

NOT_OF_ROWS = {"__init__.py", "batches.py", "packing.py", "packings.py", "stream_batches.py"}
"""Modules of this folder that do not decide tokenized rows."""


def comes(folder: Path, *, report: Report, silence: float, poll: float = 0.2) -> bool:
    """Wait until `folder` is whole; False when for `silence` seconds there was no sign of a builder."""
    signs: set[tuple[str, int]] = set()
    last_sign = last_line = time.monotonic()
    damaged: int | None = None
    while (key := _written_at(folder)) in (None, damaged) or not is_intact(folder):
        damaged = key  # its rows are read once, until another process has written them anew
        now = time.monotonic()
        seen = _signs(folder)
        if seen != signs:
            signs, last_sign = seen, now
        if now - last_sign > silence:
            return False
        if now - last_line > 60:
            report("waiting for another process to tokenize the data")
            last_line = now
        time.sleep(poll)
    return True


def cache_key(
    data: DataConfig,
    named: Sequence[tuple[str, SourceConfig]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind: str,
    room: int,
    system: str | None = None,
    stage: str | None,
    seed: int,
) -> dict[str, Any]:
    """Everything that decides the tokenized rows, part by part, as JSON values.

    named: the sources with their names. kind: the type of data set. room: tokens of data.max_length that rows
    leave free. system: the message of prompts that have none. stage: the step whose rows are wanted, where
    steps share a source.
    """
    reading = {
        name: {
            "subset": source.subset,
            "split": source.split,
            "revision": source.revision,
            "max_rows": source.max_rows,
            "format": source.format,
            "columns": dict(source.columns),
        }
        for name, source in named
    }
    options = {
        "seed": seed,
        "max_length": data.max_length,
        "room": room,
        "truncation": data.truncation.value,
        "train_on": data.train_on.value,
        "chat_template_kwargs": dict(data.chat_template_kwargs),
        "special_tokens_in_content": data.special_tokens_in_content.value,
        "eval_fraction": data.held_out_fraction(),
        "eval_path": data.eval_path is not None,
        "stage_split": dict(data.stage_split),
        "on_bad_row": data.on_bad_row.value,
        "max_bad_rows": data.max_bad_rows,
        "sources": reading,
        **({} if system is None else {"system": system}),
    }
    return {
        "kind": kind,
        "stage": stage if data.stage_split else None,
        "rows": {name: sources.content_hash(source) for name, source in named},
        "tokenizer": encoder.tokenizer_hash(tokenizer),
        "chat_template": encoder.template_hash(tokenizer),
        "code": _code_version(),
        "options": options,
    }


def _code_version() -> str:
    """Hash of the modules that turn rows into tokens: a change of code is a miss, with no number to bump."""
    total = hashlib.blake2b(digest_size=16)
    modules = [path for path in sorted(Path(__file__).parent.glob("*.py")) if path.name not in NOT_OF_ROWS]
    for path in [*modules, *(Path(str(module.__file__)) for module in (chat_template, text))]:
        total.update(path.read_bytes())
    return total.hexdigest()


def digest(key: Mapping[str, Any]) -> str:
    """The name of the folder with this key."""
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether the folder was finished under its name, and its files have the sizes they had then."""
    try:
        body = read_json(folder / KEY_FILE)
        sizes = {name: (folder / name).stat().st_size for name in FILES}
        return digest(body["key"]) == folder.name and body["bytes"] == sizes
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_intact(folder: Path) -> bool:
    """Whether the folder is whole and its files still hash to what was written; reads all of them."""
    if not is_whole(folder):
        return False
    with suppress(OSError):  # another process may be replacing it
        return hashes_in(folder) == read_json(folder / KEY_FILE).get("sha256")
    return False


def rows_sha256(folder: Path) -> str:
    """Hash of the rows of a folder, as it was recorded when they were written."""
    return str(read_json(folder / KEY_FILE)["sha256"][ROWS_FILE])


def seal(folder: Path, key: Mapping[str, Any]) -> None:
    """Write the key last: with it the folder is whole."""
    sizes = {name: (folder / name).stat().st_size for name in FILES}
    body = {"key": key, "bytes": sizes, "sha256": hashes_in(folder)}
    (folder / KEY_FILE).write_text(json.dumps(body, indent=1))


def hashes_in(folder: Path) -> dict[str, str]:
    """Hash of each file of a folder; reads all of them."""
    return {name: file_sha256(folder / name) for name in FILES}


def why_missed(root: Path, key: Mapping[str, Any]) -> str:
    """Which parts of the key differ from the newest data set of this kind in the cache."""
    entries = sorted(root.glob(f"*/{KEY_FILE}"), key=lambda path: path.stat().st_mtime_ns)
    for path in reversed(entries):
        try:
            cached = read_json(path)["key"]
            if any(cached[name] != key[name] for name in ("kind", "stage")):
                continue  # other rows, for another step
        except (OSError, ValueError, KeyError, TypeError):
            continue
        before, now = _flat(cached), _flat(key)
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if not names:
            return "tokenizing; the cached rows are damaged"
        changes = []
        if cached["rows"].keys() != key["rows"].keys():  # then how they are read differs anyway
            changes.append("other sources")
            names = [name for name in names if not name.startswith(("rows.", "options.sources."))]
        changes += [
            f"{name} {before.get(name)} -> {now.get(name)}" if name.startswith("options.") else name
            for name in names
        ]
        return "tokenizing; changed since the last time: " + "; ".join(changes)
    return f"tokenizing; nothing of this step is cached yet in {root}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    return flat


def _written_at(folder: Path) -> int | None:
    """When the key of a folder that looks whole was written, in ns; None for another."""
    with suppress(OSError):
        return (folder / KEY_FILE).stat().st_mtime_ns if is_whole(folder) else None
    return None


def _signs(folder: Path) -> set[tuple[str, int]]:
    """Signs of a builder at work: numbers that grow meanwhile."""
    signs = set()
    for path in _unfinished(folder):
        with suppress(OSError):  # it may be renamed while we look
            signs.add((path.name, (path / ROWS_FILE).stat().st_size))
    return signs


def spool_of(folder: Path) -> Path:
    """Where blocks of rows wait while `folder` is built; what a builder that ended has left there is used by
    the next one."""
    return folder.with_name(f"{folder.name}.blocks")


def remove_spool(folder: Path) -> None:
    shutil.rmtree(spool_of(folder), ignore_errors=True)


def _unfinished(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f"{folder.name}.tmp-*"))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends well and vanishes when it does not."""
    here = f"{socket.gethostname()}-"
    unfinished = folder.parent / f"{folder.name}.tmp-{here}{os.getpid()}"
    try:
        with disk_errors(folder, "data.cache_dir=DIR"):
            for left in _unfinished(folder):  # by builders on this machine that were killed
                owner = left.name.rpartition("-")[2]
                if f".tmp-{here}" in left.name and owner.isdigit() and not Path(f"/proc/{owner}").exists():
                    shutil.rmtree(left, ignore_errors=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            yield unfinished
            if folder.exists() and not is_intact(folder):
                shutil.rmtree(folder)
            try:
                os.rename(unfinished, folder)
            except OSError:
                if not is_whole(folder):  # else another process was faster, with the same rows
                    raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
