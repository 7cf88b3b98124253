from __future__ import annotations

import contextlib
import errno
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.errors import UserError
from common.runtime.logs import STOPPED_EXIT_CODE, open_rank_log, run_and_report


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Puts the root logger back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def refuse() -> int:
    raise UserError("key=1 is not allowed", hint="allowed: 2")


def test_a_ranks_records_and_warnings_go_to_its_own_file_and_not_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    open_rank_log(tmp_path / "logs", 3)
    logging.getLogger("any.library").warning("from a library")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("from Python", stacklevel=1)
    text = (tmp_path / "logs" / "rank_3.log").read_text()
    assert "WARNING any.library: from a library" in text and "from Python" in text
    assert capfd.readouterr() == ("", "")


def test_the_status_of_work_that_ends_is_passed_on(tmp_path: Path) -> None:
    assert run_and_report(lambda: 0, tmp_path) == 0
    assert run_and_report(lambda: 143, tmp_path) == 143


def test_a_user_error_of_several_ranks_is_printed_once_with_its_way_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        open_rank_log(tmp_path, rank)
    assert [run_and_report(refuse, tmp_path) for _ in range(2)] == [2, 2]
    assert capfd.readouterr().err == "error: key=1 is not allowed\n  allowed: 2\n"
    assert "key=1 is not allowed" in (tmp_path / "rank_1.log").read_text()


def test_an_error_that_quotes_half_a_character_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> int:
        raise UserError("no column \ud800")

    open_rank_log(tmp_path, 0)
    assert run_and_report(refuse, tmp_path) == 2
    assert capfd.readouterr().err == "error: no column \\ud800\n"


def test_the_next_start_prints_its_error_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        open_rank_log(tmp_path, 0)
        run_and_report(refuse, tmp_path)
        assert capfd.readouterr().err.startswith("error: key=1")


def test_an_error_is_printed_when_the_folder_cannot_be_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_and_report(refuse, tmp_path / "gone") == 2
    assert capfd.readouterr().err.startswith("error: key=1")


def test_what_fails_because_another_rank_was_told_to_stop_is_no_failure(tmp_path: Path) -> None:
    def leave() -> int:
        raise SystemExit(STOPPED_EXIT_CODE)

    open_rank_log(tmp_path, 0)
    with pytest.raises(SystemExit):
        run_and_report(leave, tmp_path)
    assert run_and_report(lambda: 1 // 0, tmp_path) == STOPPED_EXIT_CODE
    assert run_and_report(refuse, tmp_path) == 2
    assert "ZeroDivisionError" in (tmp_path / "rank_0.log").read_text()
    open_rank_log(tmp_path, 0)  # the next start
    with pytest.raises(ZeroDivisionError):
        run_and_report(lambda: 1 // 0, tmp_path)


def test_an_error_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    open_rank_log(tmp_path, 0)
    with pytest.raises(ZeroDivisionError):
        run_and_report(lambda: 1 // 0, tmp_path)
    assert "ZeroDivisionError" in (tmp_path / "rank_0.log").read_text()


def test_a_full_disk_beneath_a_log_is_said_in_one_line_without_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank_1.log").symlink_to("/dev/full")
    open_rank_log(tmp_path, 1)
    for _ in range(3):
        logging.getLogger("any.library").warning("from a library")
    with contextlib.suppress(OSError):  # as logging itself does at the end
        logging.getLogger().handlers[0].close()
    said = f"{tmp_path / 'rank_1.log'} cannot be written: No space left on device"
    assert capfd.readouterr().err == f"warning: {said}; the run goes on without it\n"


def test_a_record_that_cannot_be_formatted_keeps_its_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    open_rank_log(tmp_path, 0)
    logging.getLogger("any.library").warning("%d", "no number")
    assert "--- Logging error ---" in capfd.readouterr().err


def broken(number: int) -> Callable[[], int]:
    def work() -> int:
        raise OSError(number, os.strerror(number), "/runs/a/rows.arrow")

    return work


def test_what_a_disk_refuses_anywhere_is_an_error_that_a_person_can_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    open_rank_log(tmp_path, 0)
    assert run_and_report(broken(errno.EIO), tmp_path) == UserError.EXIT_CODE
    assert capfd.readouterr().err == "error: [Errno 5] Input/output error: '/runs/a/rows.arrow'\n"
    assert "Traceback" in (tmp_path / "rank_0.log").read_text()


def test_an_error_of_the_system_that_is_not_the_disks_keeps_its_traceback(tmp_path: Path) -> None:
    for number in (errno.EMFILE, errno.ECONNREFUSED, errno.EPERM):
        open_rank_log(tmp_path, 0)
        with pytest.raises(OSError):
            run_and_report(broken(number), tmp_path)


def test_what_fails_because_another_rank_ended_with_an_error_is_said_by_that_rank_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    open_rank_log(tmp_path, 0)
    assert run_and_report(broken(errno.EIO), tmp_path) == 2
    assert run_and_report(lambda: 1 // 0, tmp_path) == 1
    printed = capfd.readouterr().err
    assert printed.count("error: [") == 1 and "Traceback" not in printed
    assert "ZeroDivisionError" in (tmp_path / "rank_0.log").read_text()


def test_a_removed_folder_is_said_by_one_rank_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        assert run_and_report(refuse, tmp_path / "gone") == 2
    assert capfd.readouterr().err.count("error: key=1") == 1
