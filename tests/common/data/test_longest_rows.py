"""Rows without an end, and rows that unpack to much more than they are: named, and never held in memory."""

from __future__ import annotations

import gzip
import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config import OnBadRow, SourceConfig
from common.data import files, json_document, strict_json
from common.errors import UserError
from tests.common.data.reading import read_source

LONGEST = 1000
GOOD = b'{"text": "a"}\n'
TOO_LONG = b'{"text": "' + b"x" * 5 * LONGEST + b'"}\n'


@pytest.fixture(autouse=True)
def longest(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, json_document):
        monkeypatch.setattr(module, "LONGEST_ROW", LONGEST)
    monkeypatch.setattr(json_document, "BLOCK", 100)


def skipping(path: Path) -> tuple[list[Any], list[str]]:
    """The rows of a file that can be used, and what is said of the others."""
    said: list[str] = []
    rows = read_source(SourceConfig(path=str(path)), on_bad_row=OnBadRow.skip, report=said.append)
    return [row.columns["text"] for row in rows], [line.removeprefix(f"skipped {path}:") for line in said]


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_source(SourceConfig(path=str(path))))
    return caught.value.message.removeprefix(str(path))


def zstd(plain: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(plain)


def write_arrow(path: Path, table: Any) -> None:
    import pyarrow

    with pyarrow.ipc.new_file(str(path), table.schema) as out:
        out.write_table(table)


def unchecked_strings(*values: bytes, offsets: tuple[int, ...] = ()) -> Any:
    """A table with a column of strings that nobody has checked."""
    import pyarrow

    column = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    if offsets:
        buffers = [None, pyarrow.py_buffer(struct.pack(f"{len(offsets)}i", *offsets)), column.buffers()[2]]
        column = pyarrow.StringArray.from_buffers(len(offsets) - 1, *buffers[1:])
    return pyarrow.table({"text": column})


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_a_line_that_is_too_long_is_a_bad_row_and_the_others_are_read(
    suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(GOOD + TOO_LONG + GOOD))
    assert skipping(path) == (["a", "a"], ["2: the line is longer than 64 MiB"])
    assert refused(path) == ":2: the line is longer than 64 MiB"
    path.write_bytes(pack(GOOD + TOO_LONG.rstrip()))
    assert skipping(path) == (["a"], ["2: the line is longer than 64 MiB"])


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_zeros_without_an_end_are_not_held_in_memory(
    suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(bytes(2**27)))
    assert path.stat().st_size < 2**18
    tracemalloc.start()
    assert skipping(path) == ([], ["1: the line is longer than 64 MiB"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26  # zstd unpacks up to 16 MiB at once


def test_a_line_of_very_many_values_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MOST_COMMAS", 100)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b'{"text": [' + b"[]," * 101 + b"1]}\n" + GOOD)
    (bad,) = skipping(path)[1]
    assert bad.startswith("2: more than") and skipping(path)[0] == ["a", "a"]
    (tmp_path / "rows.json").write_bytes(b'[{"text": [' + b"[]," * 101 + b"1]}]")
    assert refused(tmp_path / "rows.json").startswith(":1: a value has more than")


def test_deep_values_with_an_escape_are_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rb'{"a": "\u0041", "text": ' + b"[" * 400 + b"]" * 400 + b"}\n")
    assert refused(path) == ":1: values are nested deeper than 100"


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b'[{"text": "a"},\n{"text": "' + b"x" * 5 * LONGEST, ":2: a value is longer than 64 MiB"),
        (b'{"rows":\n[{"text": "a"}], "more": "' + b"x" * 5 * LONGEST, ":2: a value is longer than 64 MiB"),
        (b" " * 5000, ":1: not valid JSON: Expecting value at column 5001"),
        (b"[\n" + b'{"text": "a"},\n' * 9 + b'{"text": }]', ":11: not valid JSON: Expecting value at "),
        (b"[\n" + b'{"text": "a"},\n' * 100, ":102: not valid JSON: Expecting value at column 1"),
        (b'[{"text": "a"}' + b" " * 500 + b"\n  x]", ":2: not valid JSON: Expecting ']' at column 3"),
        (b'[{"text": "a"}]' + b" " * 500 + b"1", ":1: not valid JSON: Extra data at column 516"),
        (b'[{"text": "a"}, ' + b"[" * 10**6, ":1: not valid JSON: maximum recursion depth exceeded"),
        (b'{"a": [' + b'{"a": 1},' * 100 + b"1], 2: 3}", "Expecting property name enclosed in double quotes"),
        (b'[{"text": "' + b"x" * 300 + b'\xff"}]', ":1: 'utf-8' codec can't decode byte 0xff"),
    ],
)  # fmt: skip
def test_what_is_no_document_is_named_by_its_line(document: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(document)
    assert said in refused(path)


def test_a_document_is_read_across_blocks_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["", "ü\u2028\n", '"\\', "😀" * 20, "x" * 200, -1.5e-7, 12345, True, None, {"a": []}]
    rows = [{"text": text} for text in texts]
    for number, document in enumerate([rows, {"v": 1, "data": rows, "more": {"a": [1]}}]):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(document, indent=2), encoding="utf-8")
        for block in (1, 2, 3, 7, 100, 10_000):
            monkeypatch.setattr(json_document, "BLOCK", block)
            assert skipping(path) == (texts, [])
    path.write_bytes(b"\xef\xbb\xbf[12345, 6]")
    monkeypatch.setattr(json_document, "BLOCK", 3)
    assert skipping(path)[1] == [f"{row}: expected an object with columns, found a number" for row in (1, 2)]


@pytest.mark.parametrize("rest", [b'"' + b"x\n" * LONGEST, b"x" * 5 * LONGEST, b"," * 5 * LONGEST])
def test_a_row_of_a_table_that_is_too_long_is_named(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,n\n" + b"a,1\n" * LONGEST + rest)
    assert refused(path).startswith(f":{LONGEST + 2}: not valid CSV: the row is longer than 64 MiB")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_long_row_of_a_file_of_columns_is_a_bad_row(name: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a", "x" * 5 * LONGEST, *"bcdefgh" * 20]})
    path = tmp_path / name
    (pyarrow.parquet.write_table if name.endswith("parquet") else lambda t, p: write_arrow(p, t))(table, path)
    texts, said = skipping(path)
    assert texts == ["a", *"bcdefgh" * 20] and said == ["2: the row is longer than 64 MiB"]


def test_rows_of_parquet_that_unpack_to_much_more_than_text_does_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": ["a", "x" * 10**6, *"b" * 2000]})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    assert refused(path).startswith(": group 1 of its rows comes to ")


def in_every_form(table: Any, folder: Path) -> Iterator[Path]:
    import datasets
    import pyarrow.parquet

    write_arrow(folder / "rows.arrow", table)
    yield folder / "rows.arrow"
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    yield folder / "rows.parquet"
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(folder / "saved"))
    yield folder / "saved"


def test_invalid_utf8_in_a_file_of_columns_is_a_bad_row(tmp_path: Path) -> None:
    values = [b"a", b"\xff\xfe", *[b"b"] * 100, b"c\xc3"]
    for path in in_every_form(unchecked_strings(*values), tmp_path):
        texts, said = skipping(path)
        assert texts == ["a", *["b"] * 100]
        assert [line.split(":")[0] for line in said] == ["2", "103"]
        assert all("not readable" in line and "Invalid UTF8 sequence" in line for line in said)


def test_a_column_that_points_out_of_its_file_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    write_arrow(path, unchecked_strings(b"a", b"b", b"c", offsets=(0, -(2**30), 2, 3)))
    texts, said = skipping(path)
    assert texts == ["c"] and [line.split(":")[0] for line in said] == ["1", "2"]


@pytest.mark.parametrize("unit", ["s", "ms"])
def test_a_value_that_python_has_no_word_for_is_a_bad_row(unit: str, tmp_path: Path) -> None:
    import pyarrow

    path = tmp_path / "rows.arrow"
    dates = pyarrow.array([0, 2**60, None], pyarrow.timestamp(unit))
    write_arrow(path, pyarrow.table({"text": ["a", "b", "c"], "date": dates}))
    texts, said = skipping(path)
    assert texts == ["a", "c"] and [line.split(":")[0] for line in said] == ["2"]
