"""Packings that are kept in files: the same rows as in memory, made once, and nobody's own memory."""

from __future__ import annotations

import logging
import os
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import files
from common.data import batches, packings
from common.data.batches import Batches, BatchPlan, PairBatches, evaluation_batches
from common.data.index import ROWS, read_index, write_index
from common.data.packing import Packing, pack
from common.data.packings import Packings
from common.data.stored import TokenizedDataset
from common.limited import fork
from step3_ppo.data import PromptOrder
from tests.common.data.built import made, pairs, write

PLAN = BatchPlan(max_length=64, packing=True, global_batch_size=4, micro_batch_size=1, seed=3)
COUNT = 60


@pytest.fixture(autouse=True)
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packings, "KEPT_FROM", 0)


@pytest.fixture
def rows(tmp_path: Path) -> TokenizedDataset:
    write(tmp_path / "rows.jsonl", pairs(COUNT))
    return made(tmp_path, eval_fraction=0.0)[0]


def kept(rows: TokenizedDataset) -> list[Path]:
    return sorted(rows.folder.with_name(f"{rows.folder.name}.packings").glob("[!.]*"))


def steps_of(rows: Any, kind: type[Batches] = Batches, **options: Any) -> list[list[list[int]]]:
    found = kind(rows, BatchPlan(**{**vars(PLAN), **options}), {"rows": 1.5})
    return [[row.tolist() for row in found.rows(step)] for step in range(found.steps_in_epochs(2))]


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("made again")


def order_of(rows: Any, count: int = 30) -> list[list[int]]:
    order = PromptOrder(rows, 7, seed=1, weights={"rows": 0.5})
    return [order.prompts_of(iteration) for iteration in range(count)]


@pytest.mark.parametrize(("kind", "packing"), [(Batches, True), (Batches, False), (PairBatches, True)])
def test_a_packing_from_its_file_has_the_rows_of_one_made_in_memory(
    rows: TokenizedDataset, monkeypatch: pytest.MonkeyPatch, kind: type[Batches], packing: bool
) -> None:
    first = steps_of(rows, kind, packing=packing)
    assert len(kept(rows)) == 2  # an epoch each
    with monkeypatch.context() as only:
        only.setattr(batches, "one_per_row", refuse)
        if kind is Batches:  # the pairs of a step are packed in each step
            only.setattr(batches, "pack", refuse)
        assert steps_of(rows, kind, packing=packing) == first
    monkeypatch.setattr(packings, "KEPT_FROM", 10**9)
    assert steps_of(rows, kind, packing=packing) == first


def test_prompts_and_held_out_documents_are_ordered_by_files_too(
    rows: TokenizedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated() -> list[tuple[int, ...]]:
        return [batch.row_ids for batch in evaluation_batches(rows, PLAN)]

    found = evaluated(), order_of(rows)
    assert len(kept(rows)) == 1 + 7  # 30 iterations of 7 prompts see half of them seven times
    monkeypatch.setattr(packings, "KEPT_FROM", 10**9)
    assert (evaluated(), order_of(rows)) == found


def test_whatever_decides_a_packing_is_in_its_name(rows: TokenizedDataset, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"seed": 4}, {"max_length": 65}, {"packing": False}]
    for number, change in enumerate(changes, start=1):
        Batches(rows, BatchPlan(**{**vars(PLAN), **change})).rows(0)
        assert len(kept(rows)) == number, change
    Batches(rows, PLAN, {"rows": 2.0}).rows(0)
    Batches(rows, PLAN).rows(40)  # of another epoch
    assert len(kept(rows)) == len(changes) + 2
    # neither ranks nor the size of steps decide anything
    Batches(rows, BatchPlan(64, True, 8, 2, seed=3, rank=1, world_size=2)).rows(0)
    assert len(kept(rows)) == len(changes) + 2


def test_a_packing_that_was_damaged_is_made_anew(rows: TokenizedDataset) -> None:
    first = steps_of(rows)
    for file in kept(rows):
        whole = file.read_bytes()
        for damaged in (b"", whole[:100], whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1])):
            file.unlink()  # those who have it open go on reading the old one
            file.write_bytes(damaged)
            assert steps_of(rows) == first and file.read_bytes() == whole


def in_child(act: Any) -> int:
    """Its pid; it ends with `act`."""

    def serve(calls: Any, answers: Any) -> None:
        act()

    return fork(serve)[0]


def test_ranks_that_ask_at_once_make_it_once(
    rows: TokenizedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"

    def noted(*arguments: Any, **options: Any) -> Packing:
        with open(log, "a") as file:
            file.write("made\n")
        return pack(*arguments, **options)

    monkeypatch.setattr(batches, "pack", noted)
    for pid in [in_child(lambda: Batches(rows, PLAN).rows(0)) for _ in range(4)]:
        assert os.waitpid(pid, 0)[1] == 0
    assert log.read_text() == "made\n" and len(kept(rows)) == 1


def test_one_that_was_killed_while_it_wrote_leaves_nothing(
    rows: TokenizedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as dies:
        dies.setattr(files.os, "replace", lambda *paths: os.kill(os.getpid(), signal.SIGKILL))
        pid = in_child(lambda: Batches(rows, PLAN).rows(0))
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    folder = rows.folder.with_name(f"{rows.folder.name}.packings")
    assert len(list(folder.glob(".*.tmp"))) == 1 and not kept(rows)
    steps_of(rows)
    assert not list(folder.glob(".*.tmp")) and len(kept(rows)) == 2


def test_where_the_disk_refuses_it_is_held_in_memory_and_that_is_said(
    rows: TokenizedDataset, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = steps_of(rows)
    folder = kept(rows)[0].parent
    for file in (*kept(rows), folder / ".lock"):
        file.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert steps_of(rows) == expected
    assert (
        f"{folder}: the packing of 90 documents cannot be kept there (File exists): every rank" in caplog.text
    )


def test_a_rank_holds_nothing_of_the_records_or_of_an_epoch(tmp_path: Path) -> None:
    count = 200_000
    lengths = np.random.default_rng(0).integers(1, 33, count).astype(np.int32)
    zeros = np.zeros(count, np.int32)
    columns = {"lengths": lengths, "trained": lengths, "source_ids": zeros, "numbers": zeros}
    parts = {"train": np.arange(count), "eval": np.empty(0, np.int64)}
    write_index(tmp_path / "index.arrow", {**columns, "control": zeros.astype(np.int8)}, parts)

    def opened() -> Batches:
        index = read_index(tmp_path / "index.arrow", "train")
        return Batches(TokenizedDataset(tmp_path / "rows", index, ["rows"], "train"), PLAN)

    opened().rows(0)
    tracemalloc.start()
    try:
        found = opened()
        assert sum(map(len, found.rows(5))) and found.steps_in_epochs(3)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 0.1 * count  # bytes; it was 49 for each record


def test_an_index_comes_back_as_it_was_written(tmp_path: Path) -> None:
    columns = {
        "a": np.array([5, 6, 7], np.int32),
        "b": np.array([1, 0, 1], np.int8),
        "c": np.array([0.5, 1.5, 2.5], np.float32),
    }
    write_index(tmp_path / "index", columns, {"train": np.array([0, 2]), "eval": np.array([1])})
    train, held_out = (read_index(tmp_path / "index", part) for part in ("train", "eval"))
    assert {name: column.tolist() for name, column in train.items()} == {
        "a": [5, 7], "b": [1, 1], "c": [0.5, 2.5], ROWS: [0, 2],
    }  # fmt: skip
    assert held_out["a"].tolist() == [6] and held_out[ROWS].tolist() == [1]
    assert [column.dtype for column in train.values()] == [np.int32, np.int8, np.float32, np.int64]


def test_a_packing_without_a_folder_is_made_where_it_is_asked_for() -> None:
    made_here = Packings.of(object()).get({}, 10**9, lambda: pack(np.array([3]), 10, seed=0))
    assert made_here.documents.tolist() == [0]
