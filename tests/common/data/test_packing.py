"""Best-fit-decreasing, compared with the textbook version."""

from __future__ import annotations

import numpy as np
import pytest

from common.data.packing import one_per_row, pack, spread


def textbook(lengths: list[int], capacity: int) -> list[list[int]]:
    """Lengths per row: the longest document first, into the fullest row with room."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def rows_of(lengths: list[int], capacity: int, seed: int = 0) -> list[list[int]]:
    packing = pack(np.array(lengths, np.int32), capacity, seed=seed)
    return [[lengths[document] for document in packing[row]] for row in range(len(packing))]


def test_a_small_case_worked_out_by_hand() -> None:
    # 7 opens a row (3 left), 5 opens one (5 left), 4 goes to the 5, 3 to the 7, 1 to the 1 that is left
    assert sorted(rows_of([4, 1, 7, 3, 5], 10)) == [[5, 4, 1], [7, 3]]


def test_equal_lengths_fill_one_row_after_another() -> None:
    assert sorted(map(len, rows_of([3] * 8, 10))) == [2, 3, 3]


@pytest.mark.parametrize("seed", range(60))
def test_rows_are_those_of_the_textbook(seed: int) -> None:
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(1, 64))
    lengths = generator.integers(1, capacity + 1, int(generator.integers(1, 150))).tolist()
    ours, theirs = rows_of(lengths, capacity, seed), textbook(lengths, capacity)
    assert len(ours) == len(theirs)
    assert sorted(map(sum, ours)) == sorted(map(sum, theirs))
    assert max(map(sum, ours)) <= capacity


def test_every_document_is_in_exactly_one_row() -> None:
    lengths = np.random.default_rng(0).integers(1, 101, 5000)
    packing = pack(lengths, 100, seed=3)
    assert sorted(packing.documents.tolist()) == list(range(5000))
    assert packing.offsets[0] == 0 and packing.offsets[-1] == 5000
    assert (np.diff(packing.offsets) > 0).all()


def test_the_seed_decides_the_order_and_nothing_else() -> None:
    lengths = np.random.default_rng(0).integers(1, 11, 200)
    first, again, other = pack(lengths, 20, seed=1), pack(lengths, 20, seed=1), pack(lengths, 20, seed=2)
    assert first.documents.tolist() == again.documents.tolist() != other.documents.tolist()
    fills = [sorted(lengths[p[row]].sum() for row in range(len(p))) for p in (first, other)]
    assert fills[0] == fills[1]


def test_no_documents_make_no_rows_and_a_document_too_long_is_refused() -> None:
    assert len(pack(np.array([], np.int32), 10, seed=0)) == 0
    for wrong in (11, 0):
        with pytest.raises(ValueError, match="do not fit rows of 10"):
            pack(np.array([wrong]), 10, seed=0)


def test_without_packing_every_document_has_a_row_of_its_own() -> None:
    rows = one_per_row(5, seed=0)
    assert len(rows) == 5 and sorted(int(rows[i][0]) for i in range(5)) == list(range(5))
    assert [len(rows[i]) for i in range(5)] == [1] * 5


def spread_rows(lengths: list[int], capacity: int, rows: int, seed: int = 0) -> list[list[int]]:
    packing = spread(np.array(lengths, np.int32), capacity, rows, seed=seed)
    return [[lengths[document] for document in packing[row]] for row in range(len(packing))]


def test_documents_are_spread_over_rows_like_this() -> None:
    # 7 and 5 open the rows, 4 goes to the 5, 3 to the 7, 1 to the 9
    assert spread_rows([4, 1, 7, 3, 5], 100, 2) == [[7, 3], [5, 4, 1]]


def test_a_row_is_added_where_a_document_fits_into_none() -> None:
    # 6, 6, 4, 4: the rows are full then, and 3 needs another
    assert spread_rows([6, 4, 3, 6, 4], 10, 2) == [[6, 4], [6, 4], [3]]


@pytest.mark.parametrize("seed", range(30))
def test_spread_rows_hold_every_document_once_and_none_is_empty_or_too_long(seed: int) -> None:
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(1, 64))
    lengths = generator.integers(1, capacity + 1, int(generator.integers(1, 60)))
    rows = int(generator.integers(1, len(lengths) + 1))
    packing = spread(lengths, capacity, rows, seed=seed)
    assert sorted(packing.documents.tolist()) == list(range(len(lengths)))
    fills = [int(lengths[packing[row]].sum()) for row in range(len(packing))]
    assert len(fills) >= rows and all(0 < fill <= capacity for fill in fills)
