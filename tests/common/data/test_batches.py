"""Steps are a function of seed and number; ranks share them without loss or repetition."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from common.data.batches import Batches, BatchPlan, collate, evaluation_batches
from common.data.types import IGNORE, Batch, TokenizedExample


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
