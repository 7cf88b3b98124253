"""A fallback is said once, where the user looks."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from common.notices import listen, log, notice


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    before = log.handlers[:]
    yield
    log.handlers[:] = before


def test_a_notice_is_handed_on_once_and_is_a_warning_in_the_log_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines: list[str] = []
    listen(lines.append)
    for _ in range(2):
        notice("responses are sampled without a cache", "it would be wrong", "several times as slow")
    assert lines == ["responses are sampled without a cache, since it would be wrong (several times as slow)"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_new_listener_takes_the_place_of_the_one_before() -> None:
    first: list[str] = []
    second: list[str] = []
    listen(first.append)
    listen(second.append)
    notice("pad is <spare>", "the tokenizer had none")
    assert (first, second) == ([], ["pad is <spare>, since the tokenizer had none"])
