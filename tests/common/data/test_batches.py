"""Steps are a function of seed and number; ranks share them without loss or repetition."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest

from common.data.batches import (
    Batches,
    BatchPlan,
    PairBatches,
    collate,
    collate_pairs,
    evaluation_batches,
    evaluation_pair_batches,
)
from common.data.types import IGNORE, Batch, TokenizedExample, TokenizedPair


class Made:
    """A data set in memory: document i consists of tokens 100 * i, 100 * i + 1, ..."""

    def __init__(self, lengths: Sequence[int], source_ids: Sequence[int] | None = None) -> None:
        self.lengths = np.array(lengths, np.int32)
        self.source_ids = np.array(source_ids or [0] * len(lengths), np.int32)
        self.sources = [f"s{number}" for number in range(int(self.source_ids.max()) + 1)]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedExample:
        ids = np.arange(self.lengths[index], dtype=np.int32) + 100 * index
        labels = np.append(ids[1:], IGNORE).astype(np.int32)
        labels[0] = IGNORE
        return TokenizedExample(ids, labels, self.sources[int(self.source_ids[index])])


LENGTHS = [int(n) for n in np.random.default_rng(0).integers(3, 11, 53)]


def plan(**changes: int | bool) -> BatchPlan:
    values = {"max_length": 16, "packing": True, "global_batch_size": 4, "micro_batch_size": 1, "seed": 5}
    return BatchPlan(**{**values, **changes})  # type: ignore[arg-type]


def step_documents(batches: Batches, step: int) -> list[list[int]]:
    return [row.tolist() for row in batches.rows(step)]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_sees_every_document_once(packing: bool) -> None:
    batches = Batches(Made(LENGTHS), plan(packing=packing))
    steps = batches.steps_in_epochs(1)
    seen = [doc for step in range(steps) for row in step_documents(batches, step) for doc in row]
    assert sorted(seen) == list(range(53))
    if not packing:
        assert steps == 14 and len(batches.rows(13)) == 1  # 53 = 13 × 4 + 1: the ragged last step is kept


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (2, 1), (2, 2), (3, 1), (4, 3), (8, 1)])
def test_the_documents_of_a_step_do_not_depend_on_ranks_or_micro_batches(
    packing: bool, world_size: int, micro_batch_size: int
) -> None:
    data = Made(LENGTHS)
    reference = Batches(data, plan(packing=packing))
    changes = {"packing": packing, "world_size": world_size, "micro_batch_size": micro_batch_size}
    ranks = [Batches(data, plan(rank=rank, **changes)) for rank in range(world_size)]
    for step in range(reference.steps_in_epochs(1.5)):
        shared = [rank.micro_batches(step) for rank in ranks]
        assert len({len(batches) for batches in shared}) == 1  # every rank runs as many passes
        seen = Counter(doc for batches in shared for batch in batches for doc in batch.row_ids)
        expected = Counter(doc for row in reference.rows(step) for doc in row.tolist())
        assert seen == expected
        targets = Counter(t for batches in shared for b in batches for t in b.targets.tolist())
        assert targets == Counter(t for b in reference.micro_batches(step) for t in b.targets.tolist())


def test_steps_can_be_asked_for_in_any_order() -> None:
    straight = Batches(Made(LENGTHS), plan())
    expected = [step_documents(straight, step) for step in range(20)]
    jumping = Batches(Made(LENGTHS), plan())
    assert [step_documents(jumping, step) for step in reversed(range(20))] == expected[::-1]


def test_epochs_and_seeds_have_different_orders() -> None:
    batches = Batches(Made(LENGTHS), plan())
    per_epoch = batches.steps_in_epochs(1)
    assert step_documents(batches, 0) != step_documents(batches, per_epoch)
    assert step_documents(batches, 0) != step_documents(Batches(Made(LENGTHS), plan(seed=6)), 0)


def test_steps_and_epochs_are_counted_like_this() -> None:
    batches = Batches(Made([5] * 20), plan(packing=False))  # 5 steps per epoch
    assert [batches.steps_in_epochs(epochs) for epochs in (1, 2, 0.4, 0.5, 1.1, 0.1 + 0.2)] == [
        5,
        10,
        2,
        3,
        6,
        2,
    ]
    assert [batches.epoch_of(step) for step in (0, 1, 5, 12)] == [0, 0.2, 1, 2.4]


def test_weights_repeat_whole_copies_and_draw_the_rest_afresh() -> None:
    data = Made([5] * 30, [0] * 10 + [1] * 20)
    batches = Batches(data, plan(packing=False), {"s0": 2.5, "s1": 0.25})
    first, second = (Counter(batches.documents(epoch).tolist()) for epoch in (0, 1))
    for counts in (first, second):
        assert sum(counts[doc] for doc in range(10)) == 25
        assert {counts[doc] for doc in range(10)} == {2, 3}
        assert sum(counts[doc] for doc in range(10, 30)) == 5
    assert first != second
    assert batches.steps_in_epochs(1) == 8  # 30 rows in steps of 4
    assert Batches(data, plan(packing=False)).steps_in_epochs(1) == 8


def test_no_row_is_longer_than_it_may_be() -> None:
    batches = Batches(Made(LENGTHS), plan())
    longest = max(b.input_ids.shape[1] for step in range(10) for b in batches.micro_batches(step))
    assert 10 < longest <= 16


# collating


def test_a_batch_is_laid_out_like_this() -> None:
    data = Made([3, 1, 4], [0, 0, 1])
    batch = collate([data[2], data[0]], [2, 0], [1, 0])
    assert batch.input_ids.tolist() == [[200, 201, 202, 203, 0, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.trained_positions.tolist() == [1, 2, 5]
    assert batch.targets.tolist() == [202, 203, 2]
    assert batch.source_of_target.tolist() == [1, 1, 0]
    assert batch.max_seqlen == 4 and batch.row_ids == (2, 0)
    types = {str(tensor.dtype) for tensor in (batch.input_ids, batch.position_ids, batch.targets)}
    assert types == {"torch.int64"} and str(batch.cu_seqlens.dtype) == "torch.int32"


def test_a_batch_without_documents_has_one_token_and_no_target() -> None:
    batch = collate([], [], [])
    assert batch.input_ids.tolist() == [[0]] and batch.cu_seqlens.tolist() == [0, 1]
    assert batch.targets.tolist() == batch.trained_positions.tolist() == batch.source_of_target.tolist() == []
    assert batch.row_ids == () and batch.max_seqlen == 1


def test_no_target_comes_from_the_next_document() -> None:
    batches = Batches(Made(LENGTHS), plan(micro_batch_size=4))
    batch = batches.micro_batches(0)[0]
    assert len(batch.cu_seqlens) > 5
    last_positions = set((batch.cu_seqlens[1:] - 1).tolist())
    assert not last_positions & set(batch.trained_positions.tolist())
    of_position = batch.input_ids[0, batch.trained_positions + 1]
    assert of_position.tolist() == batch.targets.tolist()


# evaluation


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 8), (2, 3), (5, 2)])
def test_evaluation_sees_each_document_once_over_all_ranks(
    packing: bool, world_size: int, micro_batch_size: int
) -> None:
    data = Made(LENGTHS)
    ranks: list[list[Batch]] = []
    for rank in range(world_size):
        changes = {"packing": packing, "micro_batch_size": micro_batch_size}
        ranks.append(list(evaluation_batches(data, plan(rank=rank, world_size=world_size, **changes))))
    assert len({len(batches) for batches in ranks}) == 1
    seen = [doc for batch in itertools.chain(*ranks) for doc in batch.row_ids]
    assert sorted(seen) == list(range(53))


def test_evaluation_takes_the_same_rows_whatever_the_seed() -> None:
    first, second = (list(evaluation_batches(Made(LENGTHS), plan(seed=seed))) for seed in (1, 2))
    assert [batch.row_ids for batch in first] == [batch.row_ids for batch in second]


def pair(prompt: list[int], chosen: list[int], rejected: list[int], margin: float = 0.0) -> TokenizedPair:
    """Sides of which what follows the prompt is trained."""
    sides = []
    for answer in (chosen, rejected):
        ids = np.array(prompt + answer, np.int32)
        labels = np.append(ids[1:], IGNORE).astype(np.int32)
        labels[: len(prompt) - 1] = IGNORE
        sides.append(TokenizedExample(ids, labels, "s"))
    return TokenizedPair(sides[0], sides[1], margin)


FIRST, SECOND = pair([5, 6, 7], [1, 2, 9], [3, 9], 0.5), pair([8], [4, 9], [4, 4, 9])


def test_a_pair_without_sharing_is_two_documents() -> None:
    batch = collate_pairs([FIRST], [3], [1], share_prefix=False)
    documents = batch.documents
    assert documents.input_ids.tolist() == [[5, 6, 7, 1, 2, 9, 5, 6, 7, 3, 9]]
    assert documents.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]]
    assert documents.cu_seqlens.tolist() == [0, 6, 11] and documents.shared_prefix == ()
    assert documents.trained_positions.tolist() == [2, 3, 4, 8, 9]
    assert documents.targets.tolist() == [1, 2, 9, 3, 9]
    assert batch.document_of_target.tolist() == [0, 0, 0, 1, 1]
    assert batch.score_positions.tolist() == [5, 10] and batch.lengths.tolist() == [6, 5]
    assert batch.margins.tolist() == [0.5] and batch.source_ids.tolist() == [1] and batch.pair_ids == (3,)


def test_what_both_sides_begin_with_stands_once() -> None:
    batch = collate_pairs([FIRST, SECOND], [0, 1], [0, 0])
    documents = batch.documents
    assert documents.input_ids.tolist() == [[5, 6, 7, 1, 2, 9, 3, 9, 8, 4, 9, 4, 9]]
    # the second pair's sides go on alike for one token of the answer
    assert documents.shared_prefix == (0, 3, 0, 2)
    assert documents.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 2, 3]]
    assert documents.cu_seqlens.tolist() == [0, 6, 8, 11, 13] and documents.max_seqlen == 6
    # the last token of the prompt predicts both answers
    assert documents.trained_positions.tolist() == [2, 3, 4, 2, 6, 8, 9, 8, 9, 11]
    assert documents.targets.tolist() == [1, 2, 9, 3, 9, 4, 9, 4, 4, 9]
    assert batch.score_positions.tolist() == [5, 7, 10, 12]
    assert batch.lengths.tolist() == [6, 5, 3, 4] and batch.num_tokens == 18
    ends = documents.input_ids[0][batch.score_positions]
    assert ends.tolist() == [9, 9, 9, 9]


def test_a_family_stands_on_what_its_first_document_begins_with() -> None:
    tokens = ([5, 6, 7, 1], [5, 6, 7, 2, 9], [5, 6, 8, 9], [5, 6, 7, 1], [5, 6, 7, 1], [5, 6, 4])
    documents = []
    for ids in tokens:
        labels = np.array([*ids[1:], IGNORE], np.int32)
        labels[:1] = IGNORE
        documents.append(TokenizedExample(np.array(ids, np.int32), labels, "s"))
    # the fifth begins like those before it and is of another family; the last is of the first family again
    batch = collate(documents, range(6), [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0])
    assert batch.shared_prefix == (0, 3, 2, 3, 0, 0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 2, 9, 8, 9, 1, 5, 6, 7, 1, 5, 6, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 2, 3, 3, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8, 9, 13, 16] and batch.max_seqlen == 4
    assert batch.trained_positions.tolist() == [1, 2, 1, 2, 4, 1, 6, 1, 2, 10, 11, 14]
    assert batch.targets.tolist() == [7, 1, 7, 2, 9, 8, 9, 7, 1, 7, 1, 4]
    assert batch.source_of_target.tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0]


def test_no_pair_at_all_is_one_token_without_scores() -> None:
    batch = collate_pairs([], [], [])
    assert batch.documents.input_ids.shape == (1, 1) and len(batch.documents.targets) == 0
    assert len(batch.score_positions) == len(batch.margins) == len(batch.pair_ids) == batch.num_tokens == 0


class SomePairs:
    """Eleven pairs of different lengths from two sources."""

    sources: ClassVar = ["a", "b"]
    source_ids = np.array([0] * 6 + [1] * 5, np.int32)

    def __init__(self) -> None:
        self.pairs = [pair([1, 2], [3] * (1 + i) + [9], [4] * (2 + i % 3) + [9]) for i in range(11)]
        self.lengths = np.array([len(p.chosen.input_ids) + len(p.rejected.input_ids) for p in self.pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenizedPair:
        return self.pairs[index]


def plan_of(packing: bool, micro: int = 1, rank: int = 0, ranks: int = 1) -> BatchPlan:
    return BatchPlan(16, packing, 4, micro, 3, rank, ranks)


def ids_of(step: int, packing: bool, micro: int, ranks: int) -> list[int]:
    parts = [
        PairBatches(SomePairs(), plan_of(packing, micro, rank, ranks)).micro_batches(step)
        for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1
    return sorted(index for part in parts for batch in part for index in batch.pair_ids)


def test_the_pairs_of_a_step_do_not_depend_on_packing_micro_batch_or_ranks() -> None:
    assert PairBatches(SomePairs(), plan_of(True)).steps_in_epochs(2) == 6
    seen = []
    for step in range(6):
        (ids,) = {tuple(ids_of(step, p, m, r)) for p in (True, False) for m in (1, 3) for r in (1, 2, 3)}
        assert len(ids) == (3 if step in (2, 5) else 4)
        seen.append(ids)
    assert sorted(i for ids in seen[:3] for i in ids) == list(range(11)) and seen[:3] != seen[3:]


def test_a_packed_row_holds_no_more_than_two_documents_of_the_greatest_length() -> None:
    pairs = SomePairs()
    rows = PairBatches(pairs, plan_of(True)).rows(0)
    assert len(rows) < 4 and all(pairs.lengths[row].sum() <= 32 for row in rows)
    assert [len(row) for row in PairBatches(pairs, plan_of(False)).rows(0)] == [1, 1, 1, 1]


class ShortPairs:
    """128 pairs of 10 to 40 tokens, and one of 60: in rows of 400 tokens, fewer rows than 16."""

    sources: ClassVar = ["a"]
    source_ids = np.zeros(129, np.int32)

    def __init__(self) -> None:
        sizes = [*np.random.default_rng(0).integers(3, 18, 128).tolist(), 28]
        self.pairs = [pair([1, 2], [3] * (n - 1) + [9], [4] * (n - 1) + [9]) for n in sizes]
        self.lengths = np.array([2 * (n + 2) for n in sizes])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenizedPair:
        return self.pairs[index]


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("ranks", [16, 2, 1])
def test_no_rank_is_without_a_pair_while_there_are_pairs_enough(ranks: int, evaluation: bool) -> None:
    data = ShortPairs()
    seen, sizes = [], []
    for rank in range(ranks):
        layout = BatchPlan(200, True, 129, 1, 0, rank, ranks)
        if evaluation:
            batches = list(evaluation_pair_batches(data, layout))
        else:
            batches = PairBatches(data, layout).micro_batches(0)
        seen += [index for batch in batches for index in batch.pair_ids]
        sizes += [batch.num_tokens for batch in batches]
        assert all(batch.pair_ids for batch in batches) or ranks < 16
    assert sorted(seen) == list(range(129))
    if ranks == 16:  # a row each, of about as many tokens
        assert len(sizes) == 16 and max(sizes) - min(sizes) <= 60
    else:  # as full as before
        assert 8 <= sum(size > 0 for size in sizes) <= -(-int(data.lengths.sum()) // 400) + 1


def test_fewer_pairs_than_ranks_are_a_row_each() -> None:
    layout = BatchPlan(16, True, 3, 1, 0, 0, 8)
    assert [len(row) for row in PairBatches(SomePairs(), layout).rows(0)] == [1, 1, 1]


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_sees_each_pair_once(packing: bool) -> None:
    seen = [
        index
        for rank in range(2)
        for batch in evaluation_pair_batches(SomePairs(), plan_of(packing, 2, rank, 2))
        for index in batch.pair_ids
    ]
    assert sorted(seen) == list(range(11))
