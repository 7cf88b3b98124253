"""Document lengths -> rows: which documents share a row.

Exact best-fit-decreasing over a whole epoch: longest documents first, each into the fullest row that
still has room. Equal lengths are placed together, so a million documents take a fraction of a
second. `spread` fills a given number of rows evenly instead. Takes and returns numbers only: no token
is read, no mask or label made here.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Rows in compressed form: row r holds `documents[offsets[r] : offsets[r + 1]]`.

    offsets: int [rows + 1]. documents: int [D], each document exactly once.
    """

    offsets: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return np.asarray(self.documents[self.offsets[row] : self.offsets[row + 1]], np.int64)

    def of(self, documents: np.ndarray) -> Packing:
        """The same rows, with `documents[i]` in place of document i."""
        return Packing(self.offsets, documents[self.documents])

    def rows(self, first: int, last: int) -> list[np.ndarray]:
        """Rows [first, last), as far as there are so many: int64 arrays."""
        return [self[row] for row in range(first, min(last, len(self)))]


def pack(lengths: np.ndarray, capacity: int, *, seed: int) -> Packing:
    """Best-fit-decreasing: rows of at most `capacity` tokens, in an order shuffled by `seed`.

    lengths: int [D], each from 1 to `capacity`. Which of several equally long documents goes where
    is shuffled by `seed` too. The number of rows and their fills do not depend on `seed`.
    """
    lengths = np.asarray(lengths)
    _check(lengths, capacity)
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    values, counts = np.unique(-lengths, return_counts=True)
    row_of, rows = _best_fit((-values).tolist(), counts.tolist(), capacity, len(lengths))
    return _shuffled(_grouped(row_of, order, rows), generator)


def spread(lengths: np.ndarray, capacity: int, rows: int, *, seed: int) -> Packing:
    """Rows about equally full: `rows` of them, more only where `capacity` asks for it.

    lengths: int [D], D >= rows. Longest documents first, each into the emptiest row; which of several
    equally long ones goes where is shuffled by `seed`. No row is empty.
    """
    lengths = np.asarray(lengths)
    _check(lengths, capacity)
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    emptiest = [(0, row) for row in range(rows)]  # a heap of fill and row
    row_of = np.empty(len(order), np.int64)
    for at, length in enumerate(lengths[order].tolist()):
        if emptiest[0][0] + length > capacity:
            heapq.heappush(emptiest, (0, len(emptiest)))
        fill, row_of[at] = emptiest[0]
        heapq.heapreplace(emptiest, (fill + length, int(row_of[at])))
    return _grouped(row_of, order, len(emptiest))


def one_per_row(count: int, *, seed: int) -> Packing:
    """Without packing: every document a row of its own, in an order shuffled by `seed`."""
    documents = np.random.default_rng(seed).permutation(count)
    return Packing(np.arange(count + 1), documents)


def in_order(count: int) -> Packing:
    """Every document a row of its own, in their order."""
    return Packing(np.arange(count + 1), np.arange(count))


def _check(lengths: np.ndarray, capacity: int) -> None:
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit rows of {capacity}")


def _best_fit(values: list[int], counts: list[int], capacity: int, documents: int) -> tuple[np.ndarray, int]:
    """Row of each document (documents sorted by falling length), and the number of rows.

    `open_rows[room]` lists rows with that much room left; bit `room` of `occupied` says whether any.
    The fullest row that fits has the lowest set bit at or above the length. Once a document went
    there, that row is still the fullest that fits, until it has no room for another: so each row
    takes as many as it can before the next one gets any.
    """
    row_of = np.empty(documents, np.int64)
    open_rows: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
    occupied = rows = done = 0
    for length, count in zip(values, counts, strict=True):
        while count:
            fitting = occupied >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                chosen = open_rows[room].pop()
                if not open_rows[room]:
                    occupied &= ~(1 << room)
            else:
                room = capacity
                needed = -(-count // (capacity // length))
                chosen = np.arange(rows, rows + needed)
                rows += needed
            placed, remaining = _fill(chosen, room, length, count)
            row_of[done : done + len(placed)] = placed
            done, count = done + len(placed), count - len(placed)
            for left, which in remaining:
                open_rows[left].append(which)
                occupied |= 1 << left
    return row_of, rows


def _fill(
    chosen: np.ndarray, room: int, length: int, count: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Put up to `count` documents of one length into equally empty rows, one row after another.

    Returns the row of each document placed, and the rows by the room they now have.
    """
    each = room // length
    full, partly = divmod(count, each)
    if full >= len(chosen):
        return np.repeat(chosen, each), _with_room((room - each * length, chosen))
    placed = np.repeat(chosen[: full + 1], each)[:count]
    after = chosen[full + (partly > 0) :]
    middle = (room - partly * length, chosen[full : full + 1] if partly else chosen[:0])
    return placed, _with_room((room - each * length, chosen[:full]), middle, (room, after))


def _with_room(*groups: tuple[int, np.ndarray]) -> list[tuple[int, np.ndarray]]:
    return [(room, rows) for room, rows in groups if room and len(rows)]


def _grouped(row_of: np.ndarray, order: np.ndarray, rows: int) -> Packing:
    by_row = np.argsort(row_of, kind="stable")
    sizes = np.bincount(row_of, minlength=rows)
    return Packing(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), order[by_row].astype(np.int64))


def _shuffled(packing: Packing, generator: np.random.Generator) -> Packing:
    """The same rows in another order."""
    row_order = generator.permutation(len(packing))
    sizes = np.diff(packing.offsets)[row_order]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    # position within its row of each document, plus where that row began before
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
    return Packing(offsets, packing.documents[np.repeat(packing.offsets[row_order], sizes) + within])
