"""Files elsewhere that are fetched while their rows are trained on."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from common import remote
from common.config import DataConfig, SourceConfig
from common.data import sources, stream, stream_batches
from common.data.batches import BatchPlan
from common.data.sources import StreamedSource, rows_of, streamed
from common.data.stream import StreamedRows
from common.data.stream_batches import StreamedBatches
from common.errors import UserError
from common.listing import list_files, listed
from tests.common.data.built import Said, made, pairs, texts
from tests.files_server import LOOK, Files, serving
from tests.tiny import CHATML, tiny_tokenizer

COUNT = 120
PLAN = BatchPlan(max_length=64, packing=True, global_batch_size=4, micro_batch_size=1, seed=3)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_ROWS", 8)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 256)
    for module in (stream, stream_batches):
        monkeypatch.setattr(module, "WINDOW", 16)


@pytest.fixture
def files() -> Iterator[Files]:
    with serving() as served:
        yield served


def content(kind: str, first: int = 0) -> bytes:
    """With every packed line in a block of its own and much longer than what is unpacked at once, so that
    half the bytes give about half the rows."""
    noise = random.Random(first)
    rows = [{**row, "unused": noise.randbytes(300).hex()} for row in pairs(COUNT, first=first)]
    lines = [f"{json.dumps(row)}\n".encode() for row in rows]
    if kind == "parquet":
        written = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), written)
        return written.getvalue()
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}[kind]
    return b"".join(map(pack, lines))


def listing_of(files: Files, folder: Path, kind: str = "jsonl") -> Path:
    listing = list_files(f"{files.url}/rows.{kind}", "data.path", folder / "rows", Said())
    assert listing is not None
    return listing


def opened(folder: Path, path: Path, **options: Any) -> StreamedRows:
    given = {"path": str(path), "eval_fraction": 0.0, "processes": 2, "streaming": True, **options}
    data, tokenizer = DataConfig(**given), tiny_tokenizer(CHATML)
    windows = stream.folder_of(data, tokenizer, stage="sft", seed=0, cache_dir=folder / "cache")
    return stream.stream(data, tokenizer, windows, stage="sft", seed=0, report=Said())


def all_of(rows: StreamedRows) -> list[list[int]]:
    assert not rows.has(99)
    return [rows[at].input_ids.tolist() for at in range(COUNT)]


def bodies(files: Files) -> list[str | None]:
    """The ranges that were asked for, but to look."""
    return [asked for _, asked in files.asked if asked != LOOK]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_the_first_batch_is_there_before_the_rest_of_the_file_is_sent(
    files: Files, tmp_path: Path, kind: str
) -> None:
    path = f"/rows.{kind}"
    files.files[path] = content(kind)
    files.holds[path] = len(files.files[path]) // 2
    listing = listing_of(files, tmp_path, kind)
    assert bodies(files) == []  # nothing but the look
    rows = opened(tmp_path, listing)
    (batch, *_) = StreamedBatches(rows, PLAN).micro_batches(0)
    assert not files.released.is_set() and rows.windows is None
    files.released.set()
    found = all_of(rows)
    assert len(bodies(files)) == 1
    (tmp_path / f"rows.{kind}").write_bytes(files.files[path])
    whole, _, _ = made(tmp_path, path=str(tmp_path / f"rows.{kind}"), eval_fraction=0.0)
    assert [tiny_tokenizer().decode(ids) for ids in found] == texts(whole)
    assert rows.place(50) == whole.place(50).replace(str(tmp_path), files.url)
    again = StreamedBatches(opened(tmp_path, listing), PLAN).micro_batches(0)[0]
    assert batch.input_ids.tolist() == again.input_ids.tolist() and len(bodies(files)) == 1


def test_a_file_of_columns_is_read_when_it_is_here(files: Files, tmp_path: Path) -> None:
    files.files["/rows.parquet"] = content("parquet")
    found = all_of(opened(tmp_path, listing_of(files, tmp_path, "parquet")))
    files.files["/rows.jsonl"] = content("jsonl")
    assert found == all_of(opened(tmp_path, listing_of(files, tmp_path)))


def test_a_run_that_was_killed_goes_on_with_the_bytes_that_had_come(files: Files, tmp_path: Path) -> None:
    files.files["/rows.jsonl"] = content("jsonl")
    expected = all_of(opened(tmp_path / "whole", listing_of(files, tmp_path / "whole")))
    files.asked.clear()
    files.holds["/rows.jsonl"] = len(content("jsonl")) // 2
    rows = opened(tmp_path, listing_of(files, tmp_path))
    assert rows.has(1)
    assert rows._making is not None
    os.kill(rows._making._pid, signal.SIGKILL)
    files.released.set()
    again = opened(tmp_path, listing_of(files, tmp_path))
    assert again.folder == rows.folder and all_of(again) == expected
    first, second = bodies(files)
    assert first is None and second is not None and int(second.removeprefix("bytes=")[:-1]) > 10_000
    files.files.clear()  # nor is the server needed for what is here
    assert all_of(opened(tmp_path / "other", listing_of(files, tmp_path))) == expected
    assert len(bodies(files)) == 2


def test_a_file_that_changes_is_an_error_and_no_other_rows(files: Files, tmp_path: Path) -> None:
    files.files["/rows.jsonl"] = content("jsonl")
    before = listing_of(files, tmp_path)
    files.files["/rows.jsonl"] = content("jsonl", first=500)
    with pytest.raises(UserError, match="rows.jsonl is another file than when this run began"):
        opened(tmp_path, before).has(0)
    after = listing_of(files, tmp_path)
    assert after != before and opened(tmp_path, after).has(0)


def test_a_server_that_breaks_off_is_asked_again_and_then_told_with_the_way_out(
    files: Files, tmp_path: Path
) -> None:
    files.files["/rows.jsonl"] = content("jsonl")
    files.cuts = [30_000, 20_000]
    rows = opened(tmp_path, listing_of(files, tmp_path))
    assert len(all_of(rows)) == COUNT and len(bodies(files)) == 3
    files.files["/rows.jsonl"] = content("jsonl", first=500)
    listing = listing_of(files, tmp_path)
    files.statuses = [404]
    with pytest.raises(UserError, match="rows.jsonl: the server says 404"):
        opened(tmp_path, listing).has(0)


def test_what_a_listing_cannot_hold_is_fetched_whole_and_that_is_said(files: Files, tmp_path: Path) -> None:
    files.files["/rows.jsonl"] = content("jsonl")
    said = Said()
    named = f"{files.url}/rows.jsonl?token=abcdefgh12345678"
    assert list_files(named, "data.path", tmp_path, said) is None
    assert "secret" in said[0] and "abcdefgh" not in said[0] and files.asked == []
    files.marks = False
    assert list_files(f"{files.url}/rows.jsonl", "data.path", tmp_path, said) is None
    assert "gives neither ETag nor Last-Modified" in said[1]


def test_the_same_files_are_the_same_listing(files: Files, tmp_path: Path) -> None:
    files.files["/rows.jsonl"] = content("jsonl")
    first, again = listing_of(files, tmp_path), listing_of(files, tmp_path)
    assert first == again and listed(first)[0].version.size == len(content("jsonl"))
    files.files.clear()
    said = Said()
    with pytest.raises(UserError, match="404"):
        list_files(f"{files.url}/rows.jsonl", "data.path", tmp_path / "rows", said)
    assert isinstance(streamed(SourceConfig(path=str(first))), StreamedSource)


def test_who_wants_the_first_rows_fetches_no_others(files: Files, tmp_path: Path) -> None:
    files.files["/rows.jsonl"] = content("jsonl")
    files.holds["/rows.jsonl"] = len(content("jsonl")) // 2
    source = streamed(SourceConfig(path=str(listing_of(files, tmp_path)), max_rows=5))
    rows = list(rows_of(source, lambda place, reason: None))
    assert [raw.place.row for raw in rows] == [1, 2, 3, 4, 5] and not files.released.is_set()
