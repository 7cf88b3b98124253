"""Exports that no process holds whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import Dtype
from tests.common.training.test_engine import runs
from tests.programs import partitioned, streamed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    partitioned.write(made)
    return made


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_export_tensor_by_tensor_has_the_bytes_of_a_whole_one(
    models: Path, tmp_path: Path, ranks: int
) -> None:
    (tmp_path / "out").mkdir()
    runs(streamed.same_files, ranks, tmp_path, str(models), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("names", "dtype", "ranks"),
    [
        (["all linear", "a tied head", "a trained head"], Dtype.bf16, 2),
        (["not the tied ones", "tied embeddings", "magnitudes"], Dtype.fp32, 1),
        pytest.param(list(streamed.ADAPTED), Dtype.fp32, 2, marks=pytest.mark.slow),
    ],
)
def test_adapters_are_merged_tensor_by_tensor_as_in_a_whole_export(
    models: Path, tmp_path: Path, names: list[str], dtype: Dtype, ranks: int
) -> None:
    (tmp_path / "out").mkdir()
    runs(streamed.adapters_are_merged, ranks, tmp_path, str(models), str(tmp_path / "out"), names, dtype)


def test_what_cannot_be_written_tensor_by_tensor_is_left_to_the_whole_export(
    models: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    runs(streamed.exported_whole, 2, tmp_path, str(models), str(tmp_path / "out"))


def test_a_full_disk_hangs_no_rank_and_a_flipped_bit_is_found(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    runs(streamed.a_full_disk_and_a_flipped_bit, 2, tmp_path, str(models), str(tmp_path / "out"))


def test_what_merges_leave_in_the_allocator_goes_back_to_the_system(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    runs(streamed.memory_goes_back, 1, tmp_path, str(tmp_path / "out"))
