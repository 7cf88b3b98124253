"""Rows in the cache are read, and their hashes compared, by one rank of each machine; the others trust it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.data import cache
from tests import forked
from tests.common.data.built import pairs, write
from tests.programs import rows_of_machine

RANKS, OF_MACHINE = 4, 2


@pytest.fixture
def found(tmp_path: Path) -> Any:
    """Opens the rows; returns by rank what it found."""
    write(tmp_path / "rows.jsonl", pairs(40))

    def run() -> list[dict[str, Any]]:
        forked.run(rows_of_machine.opened, (str(tmp_path), OF_MACHINE), RANKS, tmp_path / "printed.txt")
        return [json.loads((tmp_path / f"found_{rank}.json").read_text()) for rank in range(RANKS)]

    return run


def test_one_rank_of_a_machine_reads_the_rows_and_the_others_map_the_same(found: Any) -> None:
    built, again = found(), found()
    for of_rank in (*built, *again):
        assert of_rank["stored"]["tokens"] == built[0]["stored"]["tokens"] == of_rank["streamed"]["tokens"]
        # a collective would be given up while the first rank tokenizes
        assert of_rank["stored"]["collectives"] == of_rank["streamed"]["collectives"] == 0
    read = [(of_rank["stored"]["read"], of_rank["streamed"]["read"]) for of_rank in again]
    first = ({"sources": 1, "hashed": len(cache.FILES)}, {"sources": 1})
    assert read == [first, ({}, {}), first, ({}, {})]


def test_rows_that_were_damaged_meanwhile_are_made_anew_before_any_rank_has_them(
    found: Any, tmp_path: Path
) -> None:
    whole = found()[0]["stored"]["tokens"]
    for file in tmp_path.glob(f"cache */*/{cache.ROWS_FILE}"):
        content = bytearray(file.read_bytes())
        for at in range(len(content) // 3, len(content) // 2):  # tokens of the first documents lie in front
            content[at] ^= 1
        file.write_bytes(content)
    assert [of_rank["stored"]["tokens"] for of_rank in found()] == [whole] * RANKS
    assert (tmp_path / "printed.txt").read_text().count("the cached rows are damaged") == RANKS // OF_MACHINE
