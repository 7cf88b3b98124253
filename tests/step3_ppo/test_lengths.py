"""Expected lengths of responses, and what follows from them for the ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from step3_ppo.lengths import FILE, ExpectedLengths, shared_out
from step3_ppo.rollout import Response

NAN = float("nan")


def response(prompt_id: int, length: int, group: int = 0) -> Response:
    tokens = np.zeros(length, np.int32)
    return Response(prompt_id, group, tokens[:1], tokens, tokens.astype(np.float32), True)


def shares(expected: list[float], ranks: int) -> list[list[int]]:
    return [share.tolist() for share in shared_out(np.array(expected), ranks)]


def test_the_longest_group_that_is_left_goes_to_the_rank_with_the_fewest_tokens() -> None:
    # 20 | 12, then 9 to 12: 20 | 21, then 4 to 20: 24 | 21, then 2 to 21
    assert shares([4.0, 20.0, 2.0, 9.0, 12.0], 2) == [[1, 0], [4, 3, 2]]


def test_a_prompt_that_was_never_sampled_is_expected_to_be_like_the_others() -> None:
    assert shares([1.0, NAN, 9.0], 1) == [[2, 1, 0]]  # 5 is between 1 and 9


def test_nothing_expected_gives_every_rth_prompt_to_a_rank() -> None:
    assert shares([NAN] * 7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert shares([NAN] * 2, 4) == [[0], [1], [], []]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_group_is_sampled_once_and_no_rank_has_more_than_an_even_share(ranks: int) -> None:
    expected = np.random.default_rng(0).lognormal(5.0, 1.5, 22)
    found = shared_out(expected, ranks)
    assert sorted(np.concatenate(found).tolist()) == list(range(22))
    assert max(map(len, found)) <= -(-22 // ranks)
    for share in found:
        assert (np.diff(expected[share]) <= 0).all()  # begins with its longest


def test_the_newest_responses_to_a_prompt_are_what_is_expected(tmp_path: Path) -> None:
    lengths = ExpectedLengths(4, writes=True)
    assert np.isnan(lengths.of([0, 3])).all()
    lengths.note([response(2, 4), response(2, 7), response(0, 5)])
    lengths.note([response(0, 8, group=0), response(0, 1, group=1)])
    assert lengths.of([2, 0, 2]).tolist() == [5.5, 4.5, 5.5] and np.isnan(lengths.of([1, 3])).all()

    lengths.save(tmp_path, lambda path: path.open("wb"))  # type: ignore[arg-type]
    restored = ExpectedLengths(4, writes=False)
    restored.note([response(1, 3)])
    restored.load(tmp_path)
    assert np.array_equal(restored.of(range(4)), lengths.of(range(4)), equal_nan=True)

    (tmp_path / FILE).unlink()
    restored.save(tmp_path, lambda path: path.open("wb"))  # type: ignore[arg-type]
    assert not (tmp_path / FILE).exists()  # another rank's is enough
    restored.load(tmp_path)  # a checkpoint of an earlier version
    assert np.isnan(restored.of(range(4))).all()
