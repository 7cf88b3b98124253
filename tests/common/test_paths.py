"""Patterns name files: sorted, read as one source, and a change of what they match is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import DataConfig, SourceConfig
from common.data.sources import content_hash, source_name
from common.errors import UserError
from common.paths import files_of, is_glob
from pipeline.checks import check_data
from pipeline.state import fingerprint
from tests.common.data.reading import read_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place, text in (("b/two", "2"), ("b/one", "1"), ("c/three", "3")):
        file = tmp_path / f"{place}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'{{"text": "{text}"}}\n')
    (tmp_path / "b" / "notes.md").write_text("not rows")
    (tmp_path / "b" / "deep.jsonl").mkdir()
    return tmp_path


def texts(path: str) -> list[object]:
    return [row.columns["text"] for row in read_source(SourceConfig(path=path))]


def test_the_files_that_a_pattern_matches_are_one_source_in_order_of_names(folder: Path) -> None:
    assert texts(f"{folder}/b/*.jsonl") == ["1", "2"]
    assert texts(f"{folder}/*/*.jsonl") == texts(f"{folder}/**/*.jsonl") == ["1", "2", "3"]
    assert texts(f"{folder}/b/t??.jsonl") == texts(f"{folder}/b/[t]*.jsonl") == ["2"]
    assert [place.name for place in files_of(f"{folder}/b/*.jsonl")] == ["one.jsonl", "two.jsonl"]


def test_rows_of_a_pattern_are_named_by_their_own_file(folder: Path) -> None:
    (folder / "b" / "two.jsonl").write_text('{"text": "2"}\n{"text": \n')
    with pytest.raises(UserError, match=r"b/two\.jsonl:2: truncated JSON"):
        texts(f"{folder}/b/*.jsonl")


def test_a_pattern_that_matches_nothing_is_an_error_wherever_it_is_met(folder: Path) -> None:
    path = f"{folder}/b/*.csv"
    with pytest.raises(UserError, match=r"data\.path=.*\*\.csv: no file matches"):
        texts(path)
    with pytest.raises(UserError, match=r"data\.path=.*: no file matches"):
        content_hash(SourceConfig(path=path))
    for data in (DataConfig(path=path), DataConfig(path=f"{folder}/b/one.jsonl", eval_path=path)):
        with pytest.raises(UserError, match=r"sft\.data\.(path|eval_path)=.*\*\.csv: no file matches"):
            check_data(data, "sft.data")
    check_data(DataConfig(path=f"{folder}/b/*.jsonl"), "sft.data")


def test_another_file_behind_a_pattern_is_another_input(folder: Path) -> None:
    path = f"{folder}/b/*.jsonl"
    before, hashed = fingerprint(Path(path)), content_hash(SourceConfig(path=path))
    assert before["files"] == 2 and fingerprint(Path(path), before) == before
    (folder / "b" / "new.jsonl").write_text('{"text": "0"}\n')
    after = fingerprint(Path(path), before)
    assert (after["files"], after["sha256"]) != (2, before["sha256"])
    assert content_hash(SourceConfig(path=path)) != hashed


def test_a_file_with_a_bracket_in_its_name_is_that_file(folder: Path) -> None:
    (folder / "rows[1].jsonl").write_text('{"text": "x"}\n')
    path = str(folder / "rows[1].jsonl")
    assert not is_glob(path) and texts(path) == ["x"]


def test_a_source_is_named_by_the_last_part_that_is_no_pattern(folder: Path) -> None:
    assert source_name(SourceConfig(path=f"{folder}/b/*.jsonl")) == "b"
    assert source_name(SourceConfig(path=f"{folder}/b/one.jsonl")) == "one"
    assert source_name(SourceConfig(path="*.jsonl")) == "rows"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("[bc]", r"2 folders \(.*/b, \.\.\.\)"), ("[cd]*", r"the folder .*/c beside 1 file\(s\)")],
)
def test_a_pattern_that_matches_a_folder_with_files_says_what_it_expects(
    pattern: str, found: str, folder: Path
) -> None:
    (folder / "d.jsonl").write_text('{"text": "4"}\n')
    path, words = f"{folder}/{pattern}", rf"data\.path=.* matches {found}, and a pattern is one of files"
    with pytest.raises(UserError, match=words) as said:
        check_data(DataConfig(path=path), "sft.data")
    assert f"{path}/* for the files in such folders" in str(said.value.hint)
    with pytest.raises(UserError, match=words):
        texts(path)


def test_a_pattern_for_all_files_below_may_match_their_folders(folder: Path) -> None:
    (folder / "b" / "notes.md").unlink()
    check_data(DataConfig(path=f"{folder}/**"), "sft.data")
    assert texts(f"{folder}/**") == ["1", "2", "3"]
