"""A batch -> what one rank of a sequence group has of it: an equal, consecutive slice of its positions.

What is read at positions (targets) goes with them. Documents may lie across slices; where they begin and end
is told of the whole sequence, to which each rank's attention belongs (see `common/model/sequence.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F

from common.data.types import Batch, PairBatch, SharedReads

PAIR = 2
"""Documents of a pair."""
BatchOrPairs = TypeVar("BatchOrPairs", Batch, PairBatch)


def slice_of(batch: BatchOrPairs, rank: int, ranks: int) -> BatchOrPairs:
    """What one of some ranks has of it. Of pairs, which may lie across slices, each rank judges some."""
    if isinstance(batch, Batch):
        return _documents(batch, rank, ranks)
    documents = _documents(batch.documents, rank, ranks)
    size = documents.input_ids.shape[1]
    sides = torch.arange(len(batch.score_positions))
    pair_of_target = batch.document_of_target // PAIR
    targets, scored = pair_of_target % ranks == rank, sides // PAIR % ranks == rank
    pairs = slice(rank, None, ranks)
    ends = batch.score_positions
    return replace(
        batch,
        documents=documents,
        score_positions=ends[_is_between(ends, size * rank, size * (rank + 1))] - size * rank,
        document_of_target=(pair_of_target // ranks * PAIR + batch.document_of_target % PAIR)[targets],
        margins=batch.margins[pairs],
        source_ids=batch.source_ids[pairs],
        lengths=batch.lengths[scored],
        pair_ids=batch.pair_ids[pairs],
        target_reads=_reads(batch.documents.trained_positions, size, ranks, targets),
        score_reads=_reads(ends, size, ranks, scored),
    )


def _reads(positions: torch.Tensor, size: int, ranks: int, needed: torch.Tensor) -> SharedReads:
    """positions: of all reads in the sequence, in slices of `size`; needed: bool, by this rank."""
    holder = positions // size
    by_holder = [torch.nonzero(holder == rank)[:, 0] for rank in range(ranks)]
    length = max(1, *map(len, by_holder))
    places = torch.empty_like(positions)
    for rank, reads in enumerate(by_holder):
        places[reads] = rank * length + torch.arange(len(reads))
    return SharedReads(places[needed], length)


def _documents(batch: Batch, rank: int, ranks: int) -> Batch:
    batch = _padded(batch, ranks)
    length = batch.input_ids.shape[1]
    size = length // ranks
    first, end = size * rank, size * (rank + 1)
    is_here = _is_between(batch.trained_positions, first, end)
    computed = batch.computed_positions
    if computed is not None:
        computed = computed[_is_between(computed, first, end)] - first
    return replace(
        batch,
        # not views: layers that are compiled would ask for the shape of what they are views of
        input_ids=batch.input_ids[:, first:end].clone(),
        position_ids=batch.position_ids[:, first:end].clone(),
        trained_positions=batch.trained_positions[is_here] - first,
        targets=batch.targets[is_here],
        source_of_target=batch.source_of_target[is_here],
        computed_positions=computed,
        padding=min(max(end - (length - batch.padding), 0), size),
        sequence_parallel=ranks,
        first=first,
        own_targets=torch.nonzero(is_here)[:, 0].numpy(),
    )


def _is_between(positions: torch.Tensor, first: int, end: int) -> torch.Tensor:
    return (positions >= first) & (positions < end)


def _padded(batch: Batch, ranks: int) -> Batch:
    """With a document of padding behind, where the positions do not divide by the ranks."""
    length = batch.input_ids.shape[1]
    added = -length % ranks
    if not added:
        return batch
    end = batch.cu_seqlens.new_tensor([length + added])
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, added)),
        position_ids=torch.cat([batch.position_ids, torch.arange(added)[None]], 1),
        cu_seqlens=torch.cat([batch.cu_seqlens, end]),
        max_seqlen=max(batch.max_seqlen, added),
        shared_prefix=(*batch.shared_prefix, 0) if batch.shared_prefix else (),
        padding=batch.padding + added,
    )
