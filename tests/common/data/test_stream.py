"""Windows of rows that are trained on while those behind them are made."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import DataConfig, OnBadRow, SourceConfig
from common.data import sources, stream, stream_batches
from common.data.batches import BatchPlan
from common.data.dataset_types import DEMONSTRATIONS
from common.data.reader import Reader
from common.data.stages import StageSplit
from common.data.stream import StreamedRows
from common.data.stream_batches import StreamedBatches, training_batches
from common.data.writer import Writer
from common.errors import UserError
from common.stage import Step
from common.streaming import check_streaming
from common.training.ahead import Ahead
from common.training_config import TrainConfig
from tests.common.data.built import Said, made, pairs, texts, write
from tests.tiny import CHATML, tiny_tokenizer

PLAN = BatchPlan(max_length=64, packing=True, global_batch_size=4, micro_batch_size=1, seed=3)
COUNT = 70


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_ROWS", 8)
    for module in (stream, stream_batches):
        monkeypatch.setattr(module, "WINDOW", 16)


def opened(folder: Path, said: Said | None = None, wait: bool = False, **options: Any) -> StreamedRows:
    data = DataConfig(**{"path": str(folder / "rows.jsonl"), "eval_fraction": 0.0, "processes": 2, **options})
    tokenizer = tiny_tokenizer(CHATML)
    windows = stream.folder_of(data, tokenizer, stage="sft", seed=0, cache_dir=folder / "cache")
    report = Said() if said is None else said
    return stream.stream(data, tokenizer, windows, stage="sft", seed=0, report=report, wait=wait)


def steps_of(batches: StreamedBatches, count: int) -> list[list[list[int]]]:
    return [[row.tolist() for row in batches.rows(step)] for step in range(count)]


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[StreamedRows]:
    write(tmp_path / "rows.jsonl", pairs(COUNT))
    yield opened(tmp_path)


def test_the_documents_are_those_of_the_sources_in_their_order(rows: StreamedRows, tmp_path: Path) -> None:
    train, _, ledger = made(tmp_path, eval_fraction=0.0)
    decode, told = tiny_tokenizer().decode, list[Any]()
    rows.when_over = told.append
    assert [decode(rows[at].input_ids) for at in range(COUNT)] == texts(train)
    assert [rows.place(at) for at in (0, 16, 69)] == [train.place(at) for at in (0, 16, 69)]
    assert not rows.has(5) and rows.windows == 5 and told == [ledger]


def test_a_pass_has_every_document_once_and_the_next_one_another_order(rows: StreamedRows) -> None:
    batches = StreamedBatches(rows, PLAN)
    steps = 0
    while batches.epoch_of(steps) < 1:
        steps += 1
    found = steps_of(batches, 2 * steps)
    passes = [[at for step in part for row in step for at in row] for part in (found[:steps], found[steps:])]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(COUNT)) and passes[0] != passes[1]
    # the first pass never goes back: what is behind may not be there yet
    assert [at // 16 for at in passes[0]] == sorted(at // 16 for at in passes[0])
    assert passes[0][:16] != sorted(passes[0][:16])
    assert all(len(step) == 4 for step in found[: steps - 1])
    lengths = [sum(len(rows[at].input_ids) for at in row) for step in found for row in step]
    assert max(lengths) <= 64


def test_the_batches_depend_on_neither_the_ranks_nor_on_what_is_there_already(
    rows: StreamedRows, tmp_path: Path
) -> None:
    while_made = StreamedBatches(rows, PLAN)
    first = [batch for step in range(9) for batch in while_made.micro_batches(step)]
    assert not rows.has(99)
    ready = opened(tmp_path)
    assert ready._making is None  # all windows are there
    shares = [
        StreamedBatches(ready, replace(PLAN, rank=rank, world_size=2)).micro_batches(8) for rank in (0, 1)
    ]
    together = [batch for both in zip(*shares, strict=True) for batch in both]
    last = while_made.micro_batches(8)
    assert [batch.row_ids for batch in together] == [batch.row_ids for batch in last]
    assert (
        first[0].input_ids.tolist()
        == training_batches(ready, PLAN, {}).micro_batches(0)[0].input_ids.tolist()
    )
    # a run that goes on at a step asks for no step before it
    assert [row.tolist() for row in StreamedBatches(ready, PLAN).rows(8)] == steps_of(while_made, 9)[8]


def test_batches_of_a_stream_are_the_same_when_a_thread_makes_them_ahead(
    rows: StreamedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    ahead = Ahead(StreamedBatches(rows, PLAN), 30, torch.device("cuda", 0))
    direct = StreamedBatches(opened(tmp_path), PLAN)
    for step in range(30):
        made = ahead.take(step)
        ahead.make(step + 1)
        assert [b.row_ids for b in made.micro_batches] == [b.row_ids for b in direct.micro_batches(step)]
        assert made.epoch == direct.epoch_of(step + 1)


def test_the_first_window_is_used_before_a_bad_row_behind_it_ends_the_run(tmp_path: Path) -> None:
    rows = pairs(COUNT)
    rows[40] |= {"completion": 5}
    path = write(tmp_path / "rows.jsonl", rows)
    found = opened(tmp_path)
    assert len(found[15].input_ids) and len(found[31].input_ids)
    with pytest.raises(UserError, match=f"{path}:41: "):
        _ = found[40]
    said = Said()
    skipped = opened(tmp_path, said, on_bad_row=OnBadRow.skip)
    assert not skipped.has(99) and any(f"skipped {path}:41" in line for line in said)


def test_what_a_killed_process_had_made_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "rows.jsonl", pairs(COUNT))
    whole = opened(tmp_path)
    expected = [whole[at].input_ids.tolist() for at in range(COUNT)]
    for number in (3, 4):
        (whole.folder / f"{number:08}").rename(tmp_path / str(number))
    (whole.folder / stream.END).unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in whole.folder.iterdir()}
    again = opened(tmp_path)
    assert [again[at].input_ids.tolist() for at in range(COUNT)] == expected
    assert not again.has(5)
    now = {path.name: path.stat().st_mtime_ns for path in again.folder.iterdir()}
    assert len(now) == 6 and kept.items() <= now.items()


def test_a_process_that_is_killed_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl", pairs(COUNT))

    def die(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(stream, "make_windows", die)
    with pytest.raises(RuntimeError, match="ended without a word"):
        opened(tmp_path).has(0)


def test_the_process_ends_with_the_one_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "rows.jsonl", pairs(COUNT))
    monkeypatch.setattr(stream, "make_windows", lambda *arguments: time.sleep(60))
    rows = opened(tmp_path)
    assert rows._making is not None
    rows._making._calls.close()
    assert os.waitpid(rows._making._pid, 0)[0] == rows._making._pid


def test_a_window_that_was_changed_is_named(rows: StreamedRows) -> None:
    assert rows.has(2)
    file = rows.folder / "00000002" / "rows.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="00000002: its rows are not those"):
        _ = rows[40]


def test_the_process_that_makes_windows_holds_no_more_than_a_window_and_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "rows.jsonl", pairs(COUNT))
    held: list[int] = []
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.0, processes=1)
    reader = Reader(data, DEMONSTRATIONS, StageSplit({}, "sft", 0), 0, Said())
    writer = Writer(reader, tiny_tokenizer(CHATML), tmp_path / "blocks", streams=True)
    for window in writer.windows(16):
        held.append(len(writer.kept["lengths"]))
        assert len(window.lengths) == (16 if len(held) < 5 else 6)
    assert max(held) <= 16 + 8 and len(writer.kept["lengths"]) == 0
    (entry,) = reader.ledger.sources
    assert (entry.rows_read, entry.rows_kept) == (COUNT, COUNT) and entry.tokens > COUNT


def test_rows_that_are_held_out_are_not_in_the_stream(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(COUNT))
    held_out = write(tmp_path / "held_out.jsonl", pairs(20, first=10))
    rows = opened(tmp_path, eval_path=held_out, eval_fraction=None)
    assert not rows.has(99) and rows.windows == 4
    decode = tiny_tokenizer().decode
    first = [decode(rows[at].input_ids) for at in range(20)]
    assert "question 9<" in first[9] and "question 30<" in first[10]
    assert np.diff([int(rows.place(at).rpartition(":")[2]) for at in range(50)]).max() == 21


@pytest.mark.parametrize(
    ("step", "change", "said"),
    [
        (Step.dpo, {}, r"dpo reads its rows again.*\n.*dpo.data.streaming=false"),
        (Step.sft, {"max_steps": None}, r"sft.train.epochs=1 comes to.*\n.*sft.train.max_steps=N"),
        (Step.sft, {"eval_fraction": None}, r"eval_fraction=0.05 \(unless it is set\).*\n.*eval_path=FILE"),
        (Step.sft, {"weight": 2.0}, r"sources\[0\].weight=2 is a share"),
        (Step.sft, {"max_rows": 5}, r"sources\[0\].max_rows=5 is drawn"),
    ],
)
def test_what_needs_the_number_of_rows_is_refused_with_the_way_out(
    step: Step, change: dict[str, Any], said: str
) -> None:
    source = SourceConfig(path="rows.jsonl")
    data = DataConfig(sources=[source], streaming=True, eval_fraction=0.0)
    train = TrainConfig(max_steps=5)
    check_streaming(data, train, Step.sft)
    for name, value in change.items():
        target = next(each for each in (data, train, source) if hasattr(each, name))
        setattr(target, name, value)
    with pytest.raises(UserError, match=said):
        check_streaming(data, train, step)


def test_demonstrations_beside_ppo_are_not_streamed() -> None:
    data = DataConfig(path="rows.jsonl", streaming=True, eval_fraction=0.0)
    with pytest.raises(UserError, match=r"ppo.ptx_data.streaming=true .*\n.*ppo.ptx_data.streaming=false"):
        check_streaming(data, TrainConfig(max_steps=5), Step.ppo, "ptx_data")
