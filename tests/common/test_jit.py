from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import jit
from common.config import JobConfig
from common.errors import UserError
from common.jit import (
    QUIET_SECONDS,
    Lock,
    extensions_folder,
    file_system_of,
    locks_in,
    look_at,
    wait_for,
)
from common.runtime import entry

BUILDER = """
import sys, time
from torch_file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("acquired", flush=True)
sys.stdin.readline()
baton.release()
"""


@contextmanager
def builder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock as torch does, until it reads a line; torch itself is not imported."""
    import torch.utils.file_baton as module

    source = Path(module.__file__).read_text()
    lock.parent.mkdir(parents=True, exist_ok=True)
    (lock.parent.parent / "torch_file_baton.py").write_text(source)
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", BUILDER, str(lock)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(lock.parent.parent)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "acquired\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def killed_build(lock: Path) -> Path:
    with builder(lock) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return lock


def test_a_lock_is_held_while_its_builder_lives_and_stale_when_it_was_killed(tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "py312_cpu" / "fused_adam" / "lock"
    with builder(lock) as process:
        (held,) = locks_in(tmp_path / "extensions")
        assert (held.path, held.holder, held.is_stale) == (lock, process.pid, False)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (left,) = locks_in(tmp_path / "extensions")
    assert (left.path, left.holder, left.is_stale) == (lock, None, True)


def test_where_other_machines_build_only_silence_tells() -> None:
    lock = Lock(Path("lock"), age=9000.0, quiet=QUIET_SECONDS - 1, holder=None, is_shared=True)
    assert not lock.is_stale
    assert replace(lock, quiet=QUIET_SECONDS + 1).is_stale
    assert not replace(lock, quiet=QUIET_SECONDS + 1, holder=7).is_stale
    assert replace(lock, is_shared=False).is_stale


def test_anything_written_beside_a_lock_breaks_its_silence(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / "op.o").touch()
    hour_ago = (tmp_path / "op.o").stat().st_mtime - 3600
    os.utime(tmp_path / "lock", (hour_ago, hour_ago))
    seen = look_at(tmp_path / "lock")
    assert seen is not None and seen.age > 3000 > 1000 > seen.quiet
    os.utime(tmp_path / "op.o", (hour_ago, hour_ago))
    seen = look_at(tmp_path / "lock")
    assert seen is not None and seen.quiet > 3000


def test_a_clock_that_is_set_ahead_makes_no_shared_lock_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    now = lock.stat().st_mtime
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    monkeypatch.setattr(jit, "file_system_of", lambda path: "nfs4")
    seen = look_at(lock)
    assert seen is not None and seen.is_shared and not seen.is_stale
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["lock", "op"]


def test_who_waits_for_a_builder_that_lives_goes_on_when_it_is_done(tmp_path: Path) -> None:
    lock, said = tmp_path / "op" / "lock", []
    with builder(lock) as process:
        assert process.stdin is not None
        looks = []

        def sleep(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 3:  # three looks do not take it for stale
                process.stdin.write("\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                process.wait()

        wait_for(lock, say=said.append, sleep=sleep)
    assert len(looks) == 3 and len(said) == 1 and f"process {process.pid} holds it" in said[0]


def test_torch_s_compiler_ends_with_the_name_of_a_stale_lock_where_it_would_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension, file_baton

    monkeypatch.setattr(file_baton.FileBaton, "wait", file_baton.FileBaton.wait)  # put back afterwards
    monkeypatch.setattr(jit.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(jit, "LOOK_SECONDS", 0.0)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    lock = killed_build(tmp_path / "extensions" / "an_operator" / "lock")
    jit.refuse_to_wait_for_ever()
    with pytest.raises(UserError) as error:
        cpp_extension.load_inline("an_operator", "int one() { return 1; }", functions=["one"])
    assert str(lock) in error.value.message and "no process of this machine holds it" in error.value.message
    assert error.value.hint is not None and f"rm {lock}" in error.value.hint
    assert lock.exists()  # that is the user's to decide


def test_torch_compiles_where_it_would_look_for_locks(tmp_path: Path) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    assert extensions_folder({"TORCH_EXTENSIONS_DIR": str(tmp_path), "HOME": "/home/x"}) == tmp_path
    assert extensions_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "torch_extensions"
    assert os.path.realpath(extensions_folder()) == os.path.realpath(get_default_build_root()) or (
        "TORCH_EXTENSIONS_DIR" in os.environ
    )
    assert locks_in(tmp_path / "nowhere") == []


def test_the_file_system_is_that_of_the_innermost_mount() -> None:
    assert file_system_of(Path("/proc/self/status")) == "proc"
    assert file_system_of(Path("/proc-of-mine")) != "proc"


def test_a_step_is_started_so_that_it_cannot_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils import file_baton

    monkeypatch.setattr(file_baton.FileBaton, "wait", file_baton.FileBaton.wait)
    monkeypatch.setattr(jit, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(entry, "open_rank_log", lambda folder, rank: folder.mkdir(parents=True))
    lock = killed_build(tmp_path / "op" / "lock")
    (tmp_path / "resolved.yaml").write_text("run_name: one\n")
    monkeypatch.setattr("sys.argv", ["step", "--config", str(tmp_path / "resolved.yaml")])

    def train(job: JobConfig, run_dir: Path) -> int:
        file_baton.FileBaton(str(lock)).wait()
        return 0

    monkeypatch.setitem(sys.modules, "step.train", SimpleNamespace(train=train))
    assert entry.step_main("sft", "step", JobConfig) == UserError.EXIT_CODE
    assert f"rm {lock}" in capsys.readouterr().err
