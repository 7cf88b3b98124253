"""The slices of a batch are the batch: no position, target or pair is lost, and none is had twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data.batches import Batches, BatchPlan, collate, collate_pairs, count_pairs
from common.data.slices import slice_of
from common.data.types import IGNORE, Batch, SharedReads
from step1_sft.data import count_tokens
from tests.common.data.test_batches import Made, pair

DOCUMENTS = Made([5, 3, 6, 1])


def whole() -> Batch:
    return collate([DOCUMENTS[i] for i in range(4)], range(4), [0, 0, 1, 0])


@pytest.mark.parametrize("ranks", [2, 3, 4, 16])
def test_slices_end_to_end_are_the_batch_and_padding(ranks: int) -> None:
    batch = whole()
    slices = [slice_of(batch, rank, ranks) for rank in range(ranks)]
    size = slices[0].input_ids.shape[1]
    assert all(part.input_ids.shape == part.position_ids.shape == (1, size) for part in slices)
    assert size * ranks - 15 == sum(part.padding for part in slices) < ranks
    assert torch.equal(torch.cat([part.input_ids for part in slices], 1)[:, :15], batch.input_ids)
    assert torch.equal(torch.cat([part.position_ids for part in slices], 1)[:, :15], batch.position_ids)
    for name in ("targets", "source_of_target"):
        assert torch.equal(torch.cat([getattr(part, name) for part in slices]), getattr(batch, name))
    for name in ("trained_positions", "computed_positions"):
        found = [getattr(part, name) + rank * size for rank, part in enumerate(slices)]
        assert torch.equal(torch.cat(found), getattr(batch, name))
    for part in slices:
        bounds = [0, 5, 8, 14, 15]
        assert part.cu_seqlens.tolist() == (bounds if 15 % ranks == 0 else [*bounds, size * ranks])


def test_a_batch_without_documents_is_padding_everywhere() -> None:
    parts = [slice_of(collate([], (), ()), rank, 4) for rank in range(4)]
    assert [(part.input_ids.shape[1], part.padding) for part in parts] == [(1, 1)] * 4
    assert count_tokens(parts) == (0, 0, 4)


def test_ranks_of_a_group_have_the_same_rows_and_count_each_token_once() -> None:
    data = Made([7, 4, 9, 3, 5, 8, 6])
    settings = {"max_length": 16, "packing": True, "global_batch_size": 8, "micro_batch_size": 1, "seed": 5}
    alone = Batches(data, BatchPlan(**settings)).micro_batches(0)
    rows, counts = [], []
    for rank in range(4):
        plan = BatchPlan(
            **settings, rank=rank // 2, world_size=2, sequence_rank=rank % 2, sequence_parallel=2
        )
        batches = Batches(data, plan).micro_batches(0)
        rows.append([batch.row_ids for batch in batches])
        counts.append(count_tokens(batches))
    assert rows[0] == rows[1] != rows[2] == rows[3]
    expected, found = count_tokens(alone), np.sum(counts, 0)
    assert tuple(found[:2]) == expected[:2] == (42, 28)


PAIRS = [pair([5, 6, 7], [1, 2, 9], [3, 9]), pair([8], [4, 9], [4, 4, 9]), pair([5], [11], [12, 13])]


def exchanged(of_ranks: list[torch.Tensor], reads: SharedReads) -> list[int]:
    """What `reads` finds among what each rank has read."""
    padded = [F.pad(values, (0, reads.length - len(values)), value=-1) for values in of_ranks]
    return torch.cat(padded)[reads.own].tolist()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_pair_is_judged_by_one_rank_with_what_all_have_read(ranks: int) -> None:
    batch = collate_pairs(PAIRS, [7, 8, 9], [0, 1, 0])
    parts = [slice_of(batch, rank, ranks) for rank in range(ranks)]
    targets = [part.documents.targets for part in parts]
    ends = [part.documents.input_ids[0][part.score_positions] for part in parts]
    for rank, part in enumerate(parts):
        sides = [side for own in PAIRS[rank::ranks] for side in (own.chosen, own.rejected)]
        assert part.target_reads is not None and part.score_reads is not None
        trained = [int(label) for side in sides for label in side.labels if label != IGNORE]
        assert exchanged(targets, part.target_reads) == trained
        assert exchanged(ends, part.score_reads) == [side.input_ids[-1] for side in sides]
        of_side = [number for number, side in enumerate(sides) for _ in range(side.trained)]
        assert part.document_of_target.tolist() == of_side
        assert part.lengths.tolist() == [len(side.input_ids) for side in sides]
        assert part.pair_ids == (7, 8, 9)[rank::ranks]
        assert part.source_ids.tolist() == [0, 1, 0][rank::ranks]
    pairs, tokens, computed, padding = np.sum([count_pairs([part]) for part in parts], 0)
    assert (pairs, tokens) == (3, batch.num_tokens) and padding == -computed % ranks
    assert computed == batch.documents.input_ids.shape[1]
