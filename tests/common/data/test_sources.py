"""Strict reading: what is accepted, and the exact place and reason of what is not."""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.config import DataConfig, OnBadRow, SourceConfig
from common.data.reader import named_sources
from common.data.sources import content_hash, is_hub_name, source_name
from common.errors import UserError
from common.fields import as_schema
from step1_sft.config import SFTConfig
from tests.common.data.reading import read_source

ROWS: list[dict[str, Any]] = [{"text": "a", "n": 1}, {"text": "ü\u2028b", "n": 2}, {"text": "c", "n": 3}]


def jsonl(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    return [dict(raw.columns) for raw in read_source(SourceConfig(path=str(path)), **options)]


def write_every_kind(folder: Path) -> dict[str, Path]:
    import datasets
    import pyarrow
    import pyarrow.parquet
    import zstandard

    files = {suffix: folder / f"rows{suffix}" for suffix in (".jsonl", ".json", ".csv", ".parquet", ".arrow")}
    files |= {"data.json": folder / "data.json", "stream.arrow": folder / "stream.arrow"}
    files |= {".jsonl.gz": folder / "rows.jsonl.gz", ".jsonl.zst": folder / "rows.jsonl.zst"}
    files[".jsonl"].write_bytes(jsonl(*ROWS))
    files[".jsonl.gz"].write_bytes(gzip.compress(jsonl(*ROWS)))
    # two frames, as tools that append write them
    pack = zstandard.ZstdCompressor().compress
    files[".jsonl.zst"].write_bytes(pack(jsonl(*ROWS[:1])) + pack(jsonl(*ROWS[1:])))
    files[".json"].write_text(json.dumps(ROWS))
    files["data.json"].write_text(json.dumps({"version": 1, "data": ROWS}))
    files[".csv"].write_text('text,n\na,1\n"ü\u2028b",2\nc,3\n', encoding="utf-8")
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, files[".parquet"])
    with pyarrow.ipc.new_file(str(files[".arrow"]), table.schema) as out:
        out.write_table(table)
    with pyarrow.ipc.new_stream(str(files["stream.arrow"]), table.schema) as out:
        out.write_table(table)
    files["saved"] = folder / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(files["saved"]))
    files["splits"] = folder / "splits"
    split = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    split.save_to_disk(str(files["splits"]))
    return files


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    files = write_every_kind(tmp_path)
    assert len(files) == 11
    for kind, path in files.items():
        expected = [{**row, "n": str(row["n"])} for row in ROWS] if kind == ".csv" else ROWS
        assert read(path) == expected, kind


def test_rows_know_their_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS[0]) + b"\n" + jsonl(ROWS[1]))
    rows = list(read_source(SourceConfig(path=str(path), name="mine")))
    assert [(row.source, str(row.place)) for row in rows] == [("mine", f"{path}:1"), ("mine", f"{path}:3")]


def test_a_folder_is_read_file_by_file_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS[1]))
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[0]))
    (tmp_path / "notes.md").write_text("not data")
    assert read(tmp_path) == ROWS[:2]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a', "truncated JSON"),
        (b'{"text": "a"', "truncated JSON"),
        (b'{"text": a}', "not valid JSON: Expecting value at column 10"),
        (b'{"text": "a"} {}', "not valid JSON: Extra data"),
        (b"[1]", "expected an object with columns, found an array"),
        (b'"text"', "expected an object with columns, found a string"),
        (b"null", "expected an object with columns, found null"),
        (b"3", "expected an object with columns, found a number"),
        (b'{"text": "a", "text": "b"}', 'duplicate key "text"'),
        (b'{"text": [{"role": 1, "role": 2}]}', 'duplicate key "role"'),
        (b'{"n": NaN}', "NaN is not JSON"),
        (b'{"n": -Infinity}', "-Infinity is not JSON"),
        (b'{"n": 1e999}', "number 1e999 is out of range"),
        (b'{"text": "\\ud83d"}', "lone surrogate \\ud83d"),
        (b'{"text": {"\\udc00": 1}}', "lone surrogate \\udc00"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 11"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": ' + b"[" * 100 + b"]" * 100 + b"}", "values are nested deeper than 100"),
    ],
)
def test_a_bad_line_is_named_by_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(ROWS[0]) + line + b"\n" + jsonl(ROWS[2]))
    with pytest.raises(UserError) as error:
        read(path)
    assert error.value.message.startswith(f"{path}:2: {reason}")
    assert error.value.hint is not None and "on_bad_row=skip" in error.value.hint
    said: list[str] = []
    assert read(path, on_bad_row=OnBadRow.skip, report=said.append) == [ROWS[0], ROWS[2]]
    assert len(said) == 1 and said[0].startswith(f"skipped {path}:2: {reason}")


def test_values_may_be_nested_and_many(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    nested: Any = "a"
    for _ in range(99):
        nested = [nested]
    path.write_bytes(jsonl({"text": nested, "more": [[]] * 200}))
    assert read(path) == [{"text": nested, "more": [[]] * 200}]


def test_a_whole_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert read(path) == [{"text": "😀"}]


def test_skipping_ends_after_max_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x\n" * 3 + jsonl(*ROWS))
    assert read(path, on_bad_row=OnBadRow.skip, max_bad_rows=3, report=lambda line: None) == ROWS
    with pytest.raises(UserError, match="rows.jsonl:3: .*more than data.max_bad_rows=2"):
        read(path, on_bad_row=OnBadRow.skip, max_bad_rows=2, report=lambda line: None)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: the file is empty"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.json", '{"data": []}'), ("a.csv", "text\n")],
)
def test_a_file_without_rows_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: no rows"):
        read(tmp_path / name)


def test_a_missing_file_is_answered_with_the_nearest_names(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(*ROWS))
    with pytest.raises(UserError) as error:
        read(tmp_path / "trian.jsonl")
    assert error.value.hint == f"did you mean {tmp_path / 'train.jsonl'}?"
    with pytest.raises(UserError, match="the folder .* does not exist either"):
        read(tmp_path / "nowhere" / "train.jsonl")


def test_a_folder_without_data_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("not data")
    with pytest.raises(UserError, match=r"no data files in this folder \(found notes.md\)"):
        read(tmp_path)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match="not a known kind of file"):
        read(tmp_path / "rows.xlsx")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_was_cut_off_is_an_error_and_not_a_short_file(
    tmp_path: Path, suffix: str
) -> None:
    import zstandard

    # the cut lies behind the last line break, where the text itself looks complete
    plain = jsonl(*ROWS * 50)
    packed = (
        gzip.compress(plain)
        if suffix == ".gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(plain)
    )
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(packed[:-4])
    with pytest.raises(UserError, match=r"cannot be read after line 150: .*\n.*cut off"):
        read(path)
    path.write_bytes(packed[:30] + b"\xff" * 30 + packed[60:])
    with pytest.raises(UserError, match="cannot be read after line"):
        read(path)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match="cannot be read after line 0"):
        read(path)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_damaged_columnar_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"garbage, and enough of it to look like a file")
    with pytest.raises(UserError, match=f"{name}: not a readable"):
        read(tmp_path / name)


def test_a_json_file_with_lines_is_told_its_right_name(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(jsonl(*ROWS))
    with pytest.raises(UserError, match=r"rows.json:2: not valid JSON.*\n.*name it .jsonl"):
        read(tmp_path / "rows.json")


def test_a_csv_row_with_too_few_cells_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text,n\n"two\nlines",1\nb\n')
    with pytest.raises(UserError, match="rows.csv:4: 1 cells in a table of 2 columns"):
        read(tmp_path / "rows.csv")


def test_an_unknown_split_of_a_saved_data_set_lists_those_there_are(tmp_path: Path) -> None:
    path = write_every_kind(tmp_path)["splits"]
    with pytest.raises(UserError, match=r"no split test\n.*one of train"):
        list(read_source(SourceConfig(path=str(path), split="test")))


def test_max_rows_is_a_seeded_sample_in_order_and_never_the_first_n(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(*({"text": str(number)} for number in range(1000))))

    def sample(seed: int) -> list[int]:
        rows = read_source(SourceConfig(path=str(path), max_rows=50), seed=seed)
        return [int(str(row.columns["text"])) for row in rows]

    assert len(sample(0)) == 50
    assert sample(0) == sorted(sample(0)) == sample(0)
    assert sample(0) != sample(1)
    assert max(sample(0)) > 800
    assert [row.place.row for row in read_source(SourceConfig(path=str(path), max_rows=2000))][-1] == 1000


def test_what_is_a_hub_name_and_what_a_misspelt_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert is_hub_name("openai/gsm8k") and is_hub_name("squad")
    for path in ("demo/data", "rows.jsonl", "./rows", "/abs/rows", "a/b/c", "../rows"):
        assert not is_hub_name(path), path


def test_no_network_for_a_hub_name_names_it_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'someone/something' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError) as error:
        list(read_source(SourceConfig(path="someone/something")))
    assert "data.path=someone/something" in error.value.message and "Couldn't reach" in error.value.message
    assert error.value.hint is not None and "download it first" in error.value.hint


def test_a_hub_data_set_is_asked_for_at_its_pinned_revision_and_by_its_subset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    asked: list[Any] = []

    def loaded(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    source = SourceConfig(path="someone/something", subset="maths", revision="abc123", split="test")
    assert [dict(row.columns) for row in read_source(source)] == ROWS
    options = {"name": "maths", "split": "test", "revision": "abc123"}
    assert asked == [(("someone/something",), options)]


def test_held_out_rows_of_a_hub_data_set_are_those_of_their_split() -> None:
    alike: dict[str, Any] = {"format": "chosen", "columns": {"prompt": "q"}}
    training = SourceConfig(path="a/b", subset="maths", revision="abc", **alike)
    data = DataConfig(sources=[training], eval_path="a/b", eval_split="test")
    (_, first), (name, held_out) = named_sources(data)
    assert first == training and name == "b-2"
    assert held_out == dataclasses.replace(training, split="test")
    elsewhere = dataclasses.replace(data, eval_path="c/d", eval_split=None)
    assert named_sources(elsewhere)[1][1] == SourceConfig(path="c/d", **alike)


def test_a_split_without_held_out_rows_is_refused() -> None:
    with pytest.raises(UserError, match=r"sft\.data\.eval_split=test has no effect without"):
        as_schema(SFTConfig, {"data": {"path": "a/b", "eval_split": "test"}}, "sft.")


def test_names_and_hashes_of_sources(tmp_path: Path) -> None:
    first, second = tmp_path / "rows.jsonl", tmp_path / "copy" / "rows.jsonl"
    second.parent.mkdir()
    first.write_bytes(jsonl(*ROWS))
    second.write_bytes(jsonl(*ROWS))
    assert source_name(SourceConfig(path=str(first))) == "rows"
    assert source_name(SourceConfig(path="openai/gsm8k")) == "gsm8k"
    assert source_name(SourceConfig(path=str(first), name="mine")) == "mine"
    same = content_hash(SourceConfig(path=str(first)))
    assert same == content_hash(SourceConfig(path=str(second)))
    second.write_bytes(jsonl(*ROWS[:2]))
    assert same != content_hash(SourceConfig(path=str(second)))


def test_reading_lines_keeps_one_row_in_memory_and_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(*({"text": "x" * 1000} for _ in range(20_000))))
    tracemalloc.start()
    count = sum(1 for _ in read_source(SourceConfig(path=str(path))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000 and path.stat().st_size > 20_000_000
    assert peak < 2_000_000


PICTURE = {"bytes": b"\x89PNG", "path": None}
"""What a data set stores for a picture; nothing here could decode it."""


@pytest.mark.parametrize("form", ["folder", "parquet"])
@pytest.mark.parametrize("feature", ["Image", "Audio"])
def test_pictures_and_sound_are_read_as_stored_without_the_libraries_that_decode_them(
    tmp_path: Path, feature: str, form: str
) -> None:
    import datasets
    import pyarrow

    media = getattr(datasets, feature)()
    features = {"prompt": datasets.Value("string"), "seen": media, "more": datasets.List({"x": media})}
    rows = {"prompt": ["q"], "seen": [PICTURE], "more": [[{"x": PICTURE}]]}
    types = {
        "prompt": pyarrow.string(),
        "seen": media.pa_type,
        "more": pyarrow.list_(pyarrow.struct({"x": media.pa_type})),
    }
    table = pyarrow.table({name: pyarrow.array(rows[name], types[name]) for name in rows})
    saved = datasets.Dataset(
        datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=datasets.Features(features))
    )
    path = tmp_path / ("rows.parquet" if form == "parquet" else "rows")
    (saved.to_parquet if form == "parquet" else saved.save_to_disk)(str(path))
    (row,) = read_source(SourceConfig(path=str(path)))
    assert row.columns == {"prompt": "q", "seen": PICTURE, "more": [{"x": PICTURE}]} and row.columnar


LENGTHS = struct.pack("<3i", 0, 1, 2)


@pytest.mark.parametrize(
    ("suffix", "written", "damaged"),
    [
        (".arrow", b"ab", b"a\xff"),
        (".arrow", LENGTHS, LENGTHS[:4] + b"\0\0\0\x40" + LENGTHS[8:]),
        (".parquet", b"\1\0\0\0a\1\0\0\0b", b"\1\0\0\0a\1\0\0\0\xff"),
    ],
)
def test_columns_that_hold_no_text_or_point_outside_of_their_memory_are_refused(
    tmp_path: Path, suffix: str, written: bytes, damaged: bytes
) -> None:
    """Read as they are they end in a traceback, or end the process."""
    import pyarrow
    import pyarrow.parquet

    path, table = tmp_path / f"rows{suffix}", pyarrow.table({"text": ["a", "b"]})
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, use_dictionary=False, compression="none")
    else:
        with pyarrow.ipc.new_file(path, table.schema) as out:
            out.write_table(table)
    content = path.read_bytes()
    assert written in content
    path.write_bytes(content.replace(written, damaged))
    with pytest.raises(UserError, match="(not a readable (Arrow|Parquet) file|:2: not readable)"):
        read(path)


def test_lists_that_point_outside_of_their_file_are_refused(tmp_path: Path) -> None:
    """Their size is computed from such numbers: trusted, they end the process."""
    import pyarrow

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    table, path = pyarrow.table({"messages": [turns, turns]}), tmp_path / "rows.arrow"
    with pyarrow.ipc.new_stream(path, table.schema) as out:
        out.write_table(table)
    content, written = path.read_bytes(), struct.pack("<3i", 0, 2, 4)
    assert content.count(written) == 1
    for first, last in ((0, 0x40000000), (0x40000000, 0x40000002), (-0x40000000, 4)):
        path.write_bytes(content.replace(written, struct.pack("<3i", first, 2, last)))
        with pytest.raises(UserError, match="(not a readable Arrow file|: not readable)"):
            read(path)


def test_a_parquet_file_whose_footer_is_damaged_does_not_end_the_process(tmp_path: Path) -> None:
    """Every byte of it in turn; its library ends the process for some, where it is asked about columns."""
    import pyarrow
    import pyarrow.parquet

    table, path = pyarrow.table({"messages": [[{"role": "user", "content": "a"}]]}), tmp_path / "r.parquet"
    pyarrow.parquet.write_table(table, path)
    content, ended = path.read_bytes(), Counter[str]()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    for at in range(len(content) - footer, len(content) - 8):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x02]) + content[at + 1 :])
        try:
            ended["read"] += len(read(path))
        except UserError:
            ended["refused"] += 1
    assert ended["read"] > 100 and ended["refused"] > 100
