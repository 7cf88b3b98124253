"""Calls in a child process: what they give, and what becomes of those that take too much."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from common import limited
from common.limited import LimitError, each, end, fork

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "SECONDS", 0.3)
    monkeypatch.setattr(limited, "MEMORY", 2**28)


def where(number: int) -> tuple[int, int]:
    return number, os.getpid()


def use_up(what: str) -> object:
    """What one item of a call does."""
    if what == "loops":
        while True:
            pass
    if what == "counts":
        return 10**10**9
    if what == "grows":
        return bytes(2**29)
    if what == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "fails":
        return 1 // 0
    return what


def open_files(_: object) -> list[str]:
    """What is open beside the standard files and nothing, once the signals of a group have come."""
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    links = [Path(f"/proc/self/fd/{number}") for number in range(3, 100)]
    opened = [os.readlink(link).partition(":")[0] for link in links if link.is_symlink()]
    return [name for name in opened if name != os.devnull]


def test_results_come_in_order_from_one_other_process() -> None:
    first = each(where, [1, 2, 3])
    assert [number for number, _ in first] == [1, 2, 3]
    (child,) = {pid for _, pid in first}
    assert child != os.getpid() and each(where, [4]) == [(4, child)]
    end()
    assert each(where, [5])[0][1] != child


def test_an_exception_is_raised_here_and_the_child_goes_on() -> None:
    ((_, child),) = each(where, [1])
    with pytest.raises(ZeroDivisionError):
        each(use_up, ["fine", "fails", "fine"])
    assert each(where, [1]) == [(1, child)]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("loops", "takes more than 0.3 s"),
        ("counts", "takes more than 0.3 s"),
        ("grows", "needs more than 0.25 GiB of memory"),
        ("crashes", r"ends the process that it runs in \(SIGSEGV\)"),
    ],
)
def test_what_takes_too_much_is_ended_and_said_with_its_number(what: str, said: str) -> None:
    with pytest.raises(LimitError, match=said) as error:
        each(use_up, ["fine", what, "fine"])
    assert error.value.number == 1
    assert each(use_up, ["fine"]) == ["fine"]


def test_another_thread_is_served_as_well() -> None:
    got: list[object] = []
    threads = [threading.Thread(target=lambda: got.append(each(use_up, ["fine"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [["fine"]] * 4
    with pytest.raises(LimitError, match="takes more than"):
        each(use_up, ["loops"])


def test_it_ends_with_its_parent_however_that_ends() -> None:
    program = (
        "import os, signal\nfrom common.limited import each\n"
        "def pid(_): return os.getpid()\n"
        "print(each(pid, [0])[0], flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    # the child has these pipes as well: they are at their end when both are gone
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL and int(done.stdout) > 0


def test_files_of_the_parent_are_closed_and_signals_to_its_group_ignored(tmp_path: Path) -> None:
    end()
    with open(tmp_path / "a file", "w"):
        assert each(open_files, [0]) == [["pipe", "pipe"]]


def test_an_object_of_the_parent_that_is_closed_there_closes_none_of_its_own_files(tmp_path: Path) -> None:
    of_parent = [open(tmp_path / f"{number}", "w") for number in range(9)]  # noqa: SIM115 - closed below

    def serve(calls: Connection, answers: Connection) -> None:
        own = [open(tmp_path / f"own {number}", "w") for number in range(9)]  # noqa: SIM115 - closed below
        for file in of_parent:
            file.write("nothing")  # comes nowhere
            file.close()
        try:
            for file in own:
                file.write("all")
                file.close()
            answers.send("")
        except OSError as error:
            answers.send(str(error))

    pid, calls, answers = fork(serve)
    assert answers.recv() == ""
    calls.close()
    os.waitpid(pid, 0)
    for file in of_parent:
        file.close()
    assert {path.read_text() for path in tmp_path.glob("own *")} == {"all"}
    assert {path.read_text() for path in tmp_path.glob("?")} == {""}


def pid_of_child() -> int:
    return each(where, [0])[0][1]


def test_a_process_that_is_forked_has_a_child_of_its_own() -> None:
    ours = pid_of_child()
    read, write = os.pipe()
    if (forked := os.fork()) == 0:
        os.write(write, str(pid_of_child()).encode())
        os._exit(0)
    os.waitpid(forked, 0)
    assert int(os.read(read, 100)) != ours
    assert pid_of_child() == ours
