"""All that takes input from outside, as targets of the fuzzer."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz import folders, rows, settings
from tests.fuzz.driver import Target


@contextlib.contextmanager
def every_target() -> Iterator[list[Target]]:
    """Each with what it copies, in a folder that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz_whole_"))
    kinds = (folders.Artifacts, folders.Saved, folders.Runs, folders.Models)
    try:
        copied = [kind(folder / kind.name / "whole") for kind in kinds]
        yield [settings.Settings(), settings.CommandLine(), rows.Rows(), *copied]
    finally:
        shutil.rmtree(folder)
