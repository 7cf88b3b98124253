"""The files of a tokenizer, before they are read: none is larger than one of a tokenizer can be."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError

TOKENIZER_FILES = ("*token*.json", "vocab.*", "merges.txt", "*.model", "*.jinja")
HOLDING_IT = ("tokenizer*.json", "vocab.*", "*.model")
"""Those of which a tokenizer has at least one."""
LARGEST_TOKENIZER = 2**27
"""Bytes of such a file; those of the largest vocabularies have 35 MiB."""


def check_tokenizer_files(folder: Path, key: str) -> None:
    """UserError where there is no tokenizer, or one that would take gigabytes to read, or cannot be read."""
    for file in sorted(found for pattern in TOKENIZER_FILES for found in folder.glob(pattern)):
        if not file.is_file():
            raise UserError(f"{key}={folder}: {file.name} is no file", hint="get the model again")
        if (size := file.stat().st_size) > LARGEST_TOKENIZER:
            raise UserError(
                f"{key}={folder}: {file.name} has {size / 2**20:.0f} MiB",
                hint=f"expected the file of a tokenizer, of at most {LARGEST_TOKENIZER // 2**20} MiB",
            )
    if folder.is_dir() and not any(found for pattern in HOLDING_IT for found in folder.glob(pattern)):
        raise UserError(
            f"{key}={folder} has no tokenizer (tokenizer.json, tokenizer_config.json)",
            hint="put the files of the tokenizer that the model was trained with beside its weights",
        )
