from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Triton reads it when it is imported, by whatever: kernels then run on the CPU, a program after another
os.environ["TRITON_INTERPRET"] = "1"

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_is_no_garbage() -> Iterator[None]:
    """Collecting garbage looks at all there is: torch's modules would make composing half as slow again."""
    gc.collect()
    gc.freeze()
    yield


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`python -m pipeline` within this process, for commands that end before they start one.

    An error that the command line does not catch reaches the test.
    """

    def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        from pipeline.__main__ import main

        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["rlhf", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capfd.readouterr()
        status = ended.value.code
        assert isinstance(status, int)
        return subprocess.CompletedProcess(arguments, status, printed.out, printed.err)

    return run
