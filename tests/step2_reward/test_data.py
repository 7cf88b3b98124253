from __future__ import annotations

import numpy as np
import pytest
import torch

from common.data.batches import collate_pairs, count_pairs
from common.data.types import TokenizedPair
from step2_reward import data
from step2_reward.data import PairSubset, probe_documents
from tests.step2_reward.pairs import SomePairs


def test_a_sample_is_a_seeded_choice_of_pairs_in_their_order() -> None:
    pairs, sample = SomePairs(), PairSubset(SomePairs(), 3, seed=0)
    chosen = [next(i for i in range(7) if same(pairs[i], sample[k])) for k in range(3)]
    assert len(sample) == 3 and chosen == sorted(chosen)
    assert sample.lengths.tolist() == [pairs.lengths[index] for index in chosen]
    assert same(PairSubset(pairs, 3, seed=0)[0], sample[0]) and sample.sources == pairs.sources
    others = {tuple(PairSubset(pairs, 3, seed=seed).lengths.tolist()) for seed in range(9)}
    assert len(others) > 3


def test_a_sample_of_more_than_there_are_is_all_of_them() -> None:
    assert PairSubset(SomePairs(), 100, seed=5).lengths.tolist() == SomePairs.lengths.tolist()


def test_a_shared_prompt_counts_twice_as_tokens_and_once_as_positions() -> None:
    pairs = SomePairs()
    # prompts of 3 + 1 and 9 + 1 tokens, answers of 4 and 7, 2 and 5 more
    batch, filler = collate_pairs([pairs[0], pairs[1]], [0, 1], [0, 0]), collate_pairs([], [], [])
    assert count_pairs([batch, filler]) == (2, (8 + 11) + (12 + 15), (4 + 4 + 7) + (10 + 2 + 5), 1)
    apart = collate_pairs([pairs[0]], [0], [0], share_prefix=False)
    assert count_pairs([apart]) == (1, 19, 19, 0)
    assert count_pairs([filler]) == (0, 0, 0, 1)


def test_probes_are_the_ends_of_answers_with_their_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = probe_documents(SomePairs(), torch.device("cpu"))
    first = SomePairs()[0]
    assert len(documents) == 2 * data.PROBE_PAIRS
    assert documents[0].tolist() == first.chosen.input_ids.tolist()
    assert documents[1].tolist() == first.rejected.input_ids.tolist()
    monkeypatch.setattr(data, "PROBE_LENGTH", 3)
    shorter = probe_documents(SomePairs(), torch.device("cpu"))
    assert shorter[1].tolist() == first.rejected.input_ids[-3:].tolist()


def same(one: TokenizedPair, other: TokenizedPair) -> bool:
    return np.array_equal(one.chosen.input_ids, other.chosen.input_ids)
