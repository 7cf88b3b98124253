"""Rows tokenized in several processes: the same files, and the same errors, as in one."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.config import DataConfig, OnBadRow, SourceConfig
from common.data import cache, chat, sources
from common.data.blocks import WHO, Maker
from common.data.dataset import build
from common.data.dataset_types import DEMONSTRATIONS, PREFERENCES, PROMPTS, DatasetType
from common.data.reader import Reader
from common.data.stages import StageSplit
from common.errors import UserError
from common.limited import fork
from tests.common.data.built import Said, made, pairs, preferences, write
from tests.tiny import CHATML, tiny_tokenizer


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_ROWS", 8)


def faulty(count: int) -> list[dict[str, Any]]:
    """Some bad, some empty, some too long, some with a control token or another column."""
    rows = pairs(count)
    rows[9] |= {"completion": 3}
    rows[20] |= {"completion": "long " * 200}
    rows[31] |= {"completion": ""}
    rows[33] |= {"prompt": "</s>", "mood": "good"}
    rows[50] |= {"prompt": 0}
    return rows


CASES: dict[str, tuple[DatasetType[Any], list[dict[str, Any]]]] = {
    "demonstrations": (DEMONSTRATIONS, faulty(70)),
    "preferences": (PREFERENCES, preferences(70)),
    "prompts": (PROMPTS, [{"prompt": f"ask {number % 50}", "n": number} for number in range(70)]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_processes_changes_no_byte_and_no_word(tmp_path: Path, case: str) -> None:
    kind, rows = CASES[case]
    data = DataConfig(
        path=write(tmp_path / "rows.jsonl", rows),
        eval_path=write(tmp_path / "held_out.jsonl", rows[12:24]),
        max_length=100,
        on_bad_row=OnBadRow.skip,
    )
    found = []
    for processes in (1, 3):
        said, folder = Said(), tmp_path / f"cache {processes}"
        train, _, ledger = build(
            replace(data, processes=processes), tiny_tokenizer(CHATML), kind,
            seed=0, cache_dir=folder, report=said,
        )  # fmt: skip
        lines = [line for line in said if not line.startswith("tokeniz")]
        found.append((cache.hashes_in(train.folder), ledger, lines))
        assert len(train) > 30 and ledger.sources[0].dropped
        assert [path.name for path in folder.iterdir()] == [train.folder.name]
    assert found[0] == found[1]


def test_the_first_bad_row_is_named_whichever_process_meets_one_first(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", faulty(70))
    for processes in (1, 3):
        with pytest.raises(UserError, match=rf"{path}:10: "):
            made(tmp_path, processes=processes)


def of_some(act: Callable[[], object]) -> DatasetType[Any]:
    """Demonstrations that do something before the rows 40 to 47 are tokenized."""

    def tokenize(rows: Any, tokenizer: Any) -> Any:
        if rows[0].place.row == 41:
            act()
        return chat.tokenize(rows, tokenizer)

    return replace(DEMONSTRATIONS, tokenize=tokenize)


def test_a_process_that_was_killed_is_named_and_what_the_others_made_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(70))
    with pytest.raises(UserError, match=r"one of 3 processes that tokenize was ended: SIGKILL\n.*fewer"):
        made(tmp_path, processes=3, kind=of_some(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    (spool,) = (tmp_path / "cache").iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in spool.glob("*.npz")}
    assert kept
    again: list[Path] = []
    made(tmp_path, processes=3, kind=of_some(lambda: again.append(spool)))
    assert not spool.exists() and not again  # it happened in another process


def test_a_block_that_was_damaged_is_made_anew(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(70))

    def fail() -> None:
        raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        made(tmp_path, processes=1, kind=of_some(fail))
    (spool,) = (tmp_path / "cache").iterdir()
    blocks = sorted(spool.glob("*.npz"))
    assert len(blocks) == 4
    content = bytearray(blocks[1].read_bytes())
    content[len(content) // 2] ^= 1
    blocks[1].write_bytes(content)
    blocks[2].write_bytes(b"")
    train, _, _ = made(tmp_path, processes=2)
    other, _, _ = build(
        DataConfig(path=str(tmp_path / "rows.jsonl")), tiny_tokenizer(CHATML), DEMONSTRATIONS,
        seed=0, cache_dir=tmp_path / "other", report=Said(),
    )  # fmt: skip
    assert cache.hashes_in(train.folder) == cache.hashes_in(other.folder)


def test_how_far_it_is_and_how_long_the_rest_takes_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.data.writer.PROGRESS_SECONDS", -1.0)
    write(tmp_path / "rows.jsonl", pairs(70))
    said = Said()
    made(tmp_path, said=said, processes=1)
    lines = [line for line in said if line.startswith("tokenized")]
    assert len(lines) == 9 and lines[0] == "tokenized 8 rows"
    assert [line.split(",")[1] for line in lines[1:4]] == [" 11%", " 22%", " 34%"]
    assert all(line.endswith(" left") for line in lines[1:])


def claimed(tmp_path: Path, owner: str) -> tuple[Path, DatasetType[Any], list[int]]:
    """Rows, the third block of which `owner` has claimed; and which blocks are tokenized here."""
    write(tmp_path / "rows.jsonl", pairs(40))
    made(tmp_path)
    (folder,) = (tmp_path / "cache").iterdir()
    path = cache.spool_of(folder) / "0_000000001.npz"
    shutil.rmtree(folder)
    path.parent.mkdir()
    path.with_suffix(".claim").write_text(owner)
    here: list[int] = []

    def tokenize(rows: Any, tokenizer: Any) -> Any:
        here.append(rows[0].place.row)
        return chat.tokenize(rows, tokenizer)

    return path, replace(DEMONSTRATIONS, tokenize=tokenize), here


def test_a_block_that_another_machine_has_claimed_is_made_there(tmp_path: Path) -> None:
    path, kind, here = claimed(tmp_path, "elsewhere 1")
    maker = Maker(
        Reader(DataConfig(path=str(tmp_path / "rows.jsonl")), DEMONSTRATIONS, StageSplit({}, None, 0), 0),
        tiny_tokenizer(CHATML), 0, SourceConfig(path=str(tmp_path / "rows.jsonl"), name="rows"), False,
    )  # fmt: skip
    blocks = list(sources.blocks_of(maker.source))
    maker.make(blocks[0])
    theirs = threading.Timer(0.5, lambda: maker.make(blocks[2]).save(path))
    theirs.start()
    train, _, _ = made(tmp_path, kind=kind, processes=1)
    theirs.join()
    assert here == [1, 9, 25, 33] and len(train) == 38


@pytest.mark.parametrize("owner", ["elsewhere 1", f"{WHO} 99999999", ""])
def test_a_block_whose_maker_is_gone_is_made_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    monkeypatch.setattr("common.data.writer.ELSEWHERE_SECONDS", 0.1)
    _, kind, here = claimed(tmp_path, owner)
    train, _, _ = made(tmp_path, kind=kind, processes=1)
    assert sorted(here) == [1, 9, 17, 25, 33] and len(train) == 38


def claim_of_all(tmp_path: Path, owner: str) -> Path:
    """Rows whose blocks `owner` has said to put together; the file that says so."""
    path, _, _ = claimed(tmp_path, "elsewhere 1")
    path.with_suffix(".claim").unlink()
    found = path.with_name("all.claim")
    found.write_text(owner)
    return found


def test_a_second_machine_makes_its_share_and_one_puts_all_together(tmp_path: Path) -> None:
    claim = claim_of_all(tmp_path, "elsewhere 1")
    said = tmp_path / "said"

    def second(calls: Any, answers: Any) -> None:
        lines = Said()
        train, _, _ = made(tmp_path, said=lines, processes=1)
        said.write_text("\n".join([*lines, str(len(train))]))

    pid, *_ = fork(second)
    while len(list(claim.parent.glob("0_*.npz"))) < 4:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    claim.write_text(f"{WHO} {os.getpid()}")  # this process is the first machine
    here: list[int] = []

    def tokenize(rows: Any, tokenizer: Any) -> Any:
        here.append(rows[0].place.row)
        return chat.tokenize(rows, tokenizer)

    train, _, _ = made(tmp_path, kind=replace(DEMONSTRATIONS, tokenize=tokenize), processes=1)
    assert os.waitpid(pid, 0)[1] == 0
    assert here == [1] and said.read_text().splitlines()[1:] == [
        "another process puts the rows together; this one tokenizes a share of them",
        "38",
    ]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [train.folder.name]


def test_where_the_machine_that_puts_all_together_is_silent_another_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.data.writer.ELSEWHERE_SECONDS", 0.1)
    claim_of_all(tmp_path, "elsewhere 1")
    said = Said()
    train, _, _ = made(tmp_path, said=said, processes=1)
    assert len(train) == 38 and "the other process is silent: the rows are put together here" in said
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [train.folder.name]


def test_a_builder_that_was_killed_on_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    claim_of_all(tmp_path, f"{WHO} 99999999")
    said = Said()
    train, _, _ = made(tmp_path, said=said, processes=1)
    assert len(train) == 38 and not any("process" in line for line in said)
