"""A data set of the hub that is fetched while its rows are trained on."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from common import hub_data
from common.config import DataConfig, SourceConfig
from common.data import saved, sources, stream, stream_batches
from common.data.batches import BatchPlan
from common.data.sources import rows_of, streamed
from common.data.stream import StreamedRows
from common.data.stream_batches import StreamedBatches
from common.errors import UserError
from tests import fake_data_hub
from tests.common.data.built import Said, made, pairs, texts
from tests.fake_data_hub import NAME, FakeDataHub
from tests.tiny import CHATML, tiny_tokenizer

FILES, COUNT = 3, 40
"""Rows of a file."""
PLAN = BatchPlan(max_length=64, packing=True, global_batch_size=4, micro_batch_size=1, seed=3)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeDataHub]:
    """A hub that this process's client asks, which keeps what it fetches below `tmp_path`."""
    with fake_data_hub.asked(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_ROWS", 8)
    monkeypatch.setattr(saved, "PART_ROWS", 8)
    for module in (stream, stream_batches):
        monkeypatch.setattr(module, "WINDOW", 16)


def rows_in(file: int) -> list[dict[str, Any]]:
    return pairs(COUNT, first=file * COUNT)


def file_of(kind: str, rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "csv":
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        return text.getvalue().encode()
    if kind == "json":
        return json.dumps(rows).encode()
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), written, row_group_size=16)
    return written.getvalue()


def put(hub: FakeDataHub, kind: str) -> list[str]:
    names = [f"data/train-{file:05}-of-{FILES:05}.{kind}" for file in range(FILES)]
    hub.files |= {name: file_of(kind, rows_in(file)) for file, name in enumerate(names)}
    return names


def opened(folder: Path, **options: Any) -> StreamedRows:
    given = {"path": NAME, "eval_fraction": 0.0, "processes": 2, "streaming": True, **options}
    data, tokenizer = DataConfig(**given), tiny_tokenizer(CHATML)
    windows = stream.folder_of(data, tokenizer, stage="sft", seed=0, cache_dir=folder / "cache")
    return stream.stream(data, tokenizer, windows, stage="sft", seed=0, report=Said())


def read(source: SourceConfig) -> list[Any]:
    def bad_row(place: Any, reason: str) -> None:
        raise AssertionError((place, reason))

    return [(str(raw.place), dict(raw.columns), raw.columnar) for raw in rows_of(source, bad_row)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv"])
def test_the_documents_are_those_of_the_data_set_fetched_whole(
    hub: FakeDataHub, tmp_path: Path, kind: str
) -> None:
    put(hub, kind)
    rows = opened(tmp_path)
    while rows.has(99):
        pass
    decode = tiny_tokenizer().decode
    whole, _, _ = made(tmp_path, path=NAME, eval_fraction=0.0)
    found = [decode(rows[at].input_ids) for at in range(FILES * COUNT)]
    assert found == texts(whole) and len(whole) == FILES * COUNT
    assert [rows.place(at) for at in (0, 50, 119)] == [whole.place(at) for at in (0, 50, 119)]


def all_of(rows: StreamedRows) -> list[list[int]]:
    assert not rows.has(99)
    return [rows[at].input_ids.tolist() for at in range(FILES * COUNT)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_the_first_batch_is_there_before_a_later_file_is_sent(
    hub: FakeDataHub, tmp_path: Path, kind: str
) -> None:
    first, second, third = put(hub, kind)
    hub.holds = second
    rows = opened(tmp_path)
    (batch, *_) = StreamedBatches(rows, PLAN).micro_batches(0)
    assert first in hub.asked and third not in hub.asked and not hub.released.is_set()
    hub.released.set()
    assert len(all_of(rows)) == FILES * COUNT and third in hub.asked
    again = StreamedBatches(opened(tmp_path), PLAN).micro_batches(0)[0]
    assert batch.input_ids.tolist() == again.input_ids.tolist()


def test_a_run_that_was_killed_goes_on_with_the_same_rows_of_the_same_commit(
    hub: FakeDataHub, tmp_path: Path
) -> None:
    _, _, third = put(hub, "parquet")
    source = [SourceConfig(path=NAME, revision=hub.commit())]
    expected = all_of(opened(tmp_path / "whole", path=None, sources=source))
    hub.holds = third
    rows = opened(tmp_path, path=None, sources=source)
    assert rows.has(1)
    assert rows._making is not None
    os.kill(rows._making._pid, signal.SIGKILL)
    kept = {path.name: path.stat().st_mtime_ns for path in rows.folder.glob("0*")}
    hub.released.set()
    hub.files[third] = file_of("parquet", pairs(COUNT, first=500))
    again = opened(tmp_path, path=None, sources=source)
    assert again.folder == rows.folder and all_of(again) == expected
    assert (
        len(kept) >= 2
        and kept.items() <= {path.name: path.stat().st_mtime_ns for path in again.folder.glob("0*")}.items()
    )
    moved = opened(tmp_path, path=None, sources=[SourceConfig(path=NAME, revision=hub.commit())])
    assert moved.folder != again.folder and all_of(moved) != expected


@pytest.mark.parametrize(
    ("fault", "kind"), [("breaks", "parquet"), ("breaks", "jsonl"), ("breaks", "csv"), ("short", "parquet")]
)
def test_a_file_that_is_cut_off_is_an_error_and_no_end(
    hub: FakeDataHub, tmp_path: Path, kind: str, fault: str
) -> None:
    _, _, third = put(hub, kind)
    expected = all_of(opened(tmp_path / "whole"))
    setattr(hub, fault, third)
    rows = opened(tmp_path)
    assert [rows[at].input_ids.tolist() for at in range(48)] == expected[:48]
    with pytest.raises(UserError, match=rf"{NAME}: the hub data set ended after \d+ rows: ") as error:
        rows.has(99)
    assert "goes on from what is tokenized" in str(error.value.hint)
    setattr(hub, fault, None)
    assert all_of(opened(tmp_path)) == expected


def test_fewer_rows_than_the_card_says_are_an_error(hub: FakeDataHub, tmp_path: Path) -> None:
    put(hub, "parquet")
    card = "dataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: {}\n"
    features = "  features:\n  - name: prompt\n    dtype: string\n  - name: completion\n    dtype: string\n"
    for count in (FILES * COUNT, FILES * COUNT + 1):
        hub.files["README.md"] = f"---\n{card.format(count)}{features}---\n".encode()
        hub_data.commit_of.cache_clear()
        if count == FILES * COUNT:
            assert len(read(streamed(SourceConfig(path=NAME)))) == count
        else:
            with pytest.raises(UserError, match="ended after 120 rows: its card says 121 rows"):
                read(streamed(SourceConfig(path=NAME)))


def test_a_hub_that_does_not_answer_is_told_with_the_way_out(
    hub: FakeDataHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for revision in (None, "main", "f" * 40):
        with pytest.raises(UserError, match="someone/else: no such file here, and the hub data set") as error:
            read(streamed(SourceConfig(path="someone/else", revision=revision)))
        assert "download it first" in str(error.value.hint)


def test_files_here_are_read_as_ever(tmp_path: Path) -> None:
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"))
    assert streamed(source) is source
