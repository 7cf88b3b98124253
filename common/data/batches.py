"""Rows -> Batch, pairs -> PairBatch: which rows make a step, and which of them this rank computes.

The documents of step k are a pure function of the seed and k, whatever the number of ranks, the micro
batch or the accumulation. An epoch's documents are drawn by the sources' weights, packed afresh and
shuffled, which `packings.py` keeps; ranks take turns through the rows of a step. Nothing is remembered
between calls but the last epochs, so resuming needs no more than the step's number. Does not tokenize.

Documents with a common prefix (both sides of a pair, the samples of a prompt) are neighbours in a row, and
the prefix is stored once (prefix sharing).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from common.data.packing import Packing, in_order, one_per_row, pack, spread
from common.data.packings import Packings
from common.data.slices import slice_of
from common.data.types import IGNORE, Batch, PairBatch, TokenizedExample, TokenizedPair, prefix_owners_of
from common.errors import UserError

PAIR = 2
"""Answers in a pair: a row of packed pairs has room for so many documents of the greatest length."""


Record = TypeVar("Record", covariant=True)


class RecordSource(Protocol[Record]):
    """The part of a data set (see `stored.py`) that batches need. lengths: tokens, of a pair of both
    sides."""

    lengths: np.ndarray
    source_ids: np.ndarray
    sources: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


DocumentSource = RecordSource[TokenizedExample]
PairSource = RecordSource[TokenizedPair]


@dataclass(frozen=True)
class BatchPlan:
    """How rows become batches. Only the ranks, their numbers and `micro_batch_size` differ between machines,
    and they never change which documents a step has."""

    max_length: int
    packing: bool
    global_batch_size: int  # rows (of pairs: pairs) per optimizer step, over all ranks
    micro_batch_size: int  # rows per rank and forward pass
    seed: int
    rank: int = 0  # of data: the ranks of a sequence group have the same rows
    world_size: int = 1
    sequence_rank: int = 0
    sequence_parallel: int = 1  # ranks of a sequence group, each with a slice of every row
    share_prefix: bool = True  # what neighbours begin with alike is computed once


class Batches:
    """The batches of every step. `weights`: how often a source's rows are seen per epoch (default 1)."""

    def __init__(
        self,
        dataset: DocumentSource | PairSource,
        plan: BatchPlan,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self._weights = [float((weights or {}).get(name, 1.0)) for name in dataset.sources]
        rows = [int(np.count_nonzero(dataset.source_ids == source)) for source in range(len(dataset.sources))]
        self._shares = [_share_of(*each) for each in zip(self._weights, rows, strict=True)]
        if sum(rows) and not self.documents_per_epoch:
            raise UserError(
                f"data.sources: an epoch has none of {sum(rows):,} rows by the weights of their sources",
                hint="larger weights, e.g. 1: each row is seen once an epoch",
            )
        self._packings = Packings.of(dataset)
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)
        self._first_steps = [0]  # of each epoch known so far, and of the one after

    @property
    def documents_per_epoch(self) -> int:
        """Documents that every epoch has, those that it repeats each time."""
        return sum(copies * rows + extra for copies, extra, rows in self._shares)

    def documents(self, epoch: int) -> np.ndarray:
        """Dataset indices seen in an epoch: whole copies of each source and a seeded share of it."""
        chosen = [np.empty(0, np.int64)]
        for source, (copies, extra, _) in enumerate(self._shares):
            members = np.flatnonzero(self.dataset.source_ids == source)
            generator = np.random.default_rng([self.plan.seed, epoch, source, 1])
            chosen += [members] * copies + ([generator.permutation(members)[:extra]] if extra else [])
        return np.concatenate(chosen)

    def steps_in_epochs(self, epochs: float) -> int:
        """Optimizer steps in this many passes; the last one may be short of rows."""
        whole = math.floor(epochs)
        first = self._first_step(whole)
        part = epochs - whole
        # a rounding error in 0.1 + 0.2 must not cost a step
        return first + (math.ceil(part * self._steps_of(whole) - 1e-9) if part > 1e-12 else 0)

    def epoch_of(self, step: int) -> float:
        """Passes over the data before step `step` (from 0)."""
        epoch, within = self._position(step)
        return epoch + within / self._steps_of(epoch)

    def rows(self, step: int) -> list[np.ndarray]:
        """The step's rows on all ranks together; each an array of dataset indices."""
        epoch, within = self._position(step)
        first = within * self.plan.global_batch_size
        return self.epoch(epoch).rows(first, first + self.plan.global_batch_size)

    def micro_batches(self, step: int) -> list[Any]:
        """This rank's part of a step as `Batch`es; equally many on every rank, the missing ones without
        targets."""
        return share(self.rows(step), self.plan, self._collate)

    def _collate(self, indices: list[int]) -> Any:
        return documents_of(self.dataset, indices)

    @property
    def _packed_over_epoch(self) -> bool:
        """Whether the rows of an epoch are packed, or else documents (pairs) one by one."""
        return self.plan.packing

    def _epoch(self, number: int) -> Packing:
        """The rows of an epoch in their order; their documents are dataset indices."""
        packed, seed = self._packed_over_epoch, self._seed_of(number)
        key = {
            "epoch": number, "seed": self.plan.seed, "weights": self._weights,
            "max_length": self.plan.max_length if packed else None,
        }  # fmt: skip

        def make() -> Packing:
            documents = self.documents(number)
            if not packed:
                return one_per_row(len(documents), seed=seed).of(documents)
            return pack(self.dataset.lengths[documents], self.plan.max_length, seed=seed).of(documents)

        return self._packings.get(key, self.documents_per_epoch, make)

    def _seed_of(self, epoch: int) -> int:
        return int(np.random.SeedSequence([self.plan.seed, epoch, 2]).generate_state(1)[0])

    def _steps_of(self, epoch: int) -> int:
        return self._first_step(epoch + 1) - self._first_step(epoch)

    def _first_step(self, epoch: int) -> int:
        while len(self._first_steps) <= epoch:
            known = len(self._first_steps) - 1
            if known and all(weight.is_integer() for weight in self._weights):
                steps = self._first_steps[1]  # same documents, so as many rows
            else:
                steps = -(-len(self.epoch(known)) // self.plan.global_batch_size)
            if not steps:
                raise ValueError("a data set without documents has no steps")
            self._first_steps.append(self._first_steps[-1] + steps)
        return self._first_steps[epoch]

    def _position(self, step: int) -> tuple[int, int]:
        epoch = 0
        while self._first_step(epoch + 1) <= step:
            epoch += 1
        return epoch, step - self._first_step(epoch)


class PairBatches(Batches):
    """The batches of every step of pairs, as `PairBatch`es.

    A step has `global_batch_size` pairs however they are packed: packing puts as many pairs of the step into
    a row as fit into two documents of `max_length` tokens, or fewer where ranks would be left without a row.
    """

    def rows(self, step: int) -> list[np.ndarray]:
        """The step's rows on all ranks together; each an array of pair indices."""
        pairs = np.concatenate(super().rows(step))
        capacity = PAIR * self.plan.max_length
        return _rows_within(capacity, self.dataset.lengths, pairs, self.plan, seed=self.plan.seed + step)

    def one_by_one(self) -> PairBatches:
        """The same, for a model that cannot compute once what neighbours begin with alike."""
        apart = copy.copy(self)
        apart.plan = replace(self.plan, share_prefix=False)
        return apart

    def _collate(self, indices: list[int]) -> Any:
        return _pairs(self.dataset, indices, self.plan)

    @property
    def _packed_over_epoch(self) -> bool:
        return False


def _share_of(weight: float, rows: int) -> tuple[int, int, int]:
    """Of a source: whole copies in an epoch, rows drawn beside them, and its rows."""
    copies = math.floor(weight)
    return copies, round((weight - copies) * rows), rows


def batches_of(
    dataset: DocumentSource,
    indices: np.ndarray,
    plan: BatchPlan,
    *,
    seed: int,
    prefix_groups: np.ndarray | None = None,
) -> list[Batch]:
    """These documents (int64 [D], indices), each once over all ranks, as this rank's `Batch`es.

    prefix_groups: int64, one per document of the data set. Neighbours of one group among `indices` share a
    row, as many as fit; the plan may compute their prefix once.
    Equally many batches on every rank, the missing ones without targets. `plan.global_batch_size` plays no
    part.
    """
    shared_by = prefix_groups if plan.share_prefix else None
    units = _units(dataset, indices, plan, shared_by)
    lengths = np.array([length for _, length in units], np.int64)
    rows = _rows_within(plan.max_length, lengths, np.arange(len(units)), plan, seed=seed)
    of_rows = [np.concatenate([units[unit][0] for unit in row]) for row in rows]
    return share(of_rows, plan, functools.partial(documents_of, dataset, prefix_groups=shared_by))


def evaluation_batches(dataset: DocumentSource, plan: BatchPlan) -> Iterator[Batch]:
    """Every document exactly once over all ranks; equally many batches on every rank."""
    packing = _evaluated(dataset, plan.max_length if plan.packing else None)
    yield from _passes(packing, plan, functools.partial(documents_of, dataset))


def evaluation_pair_batches(dataset: PairSource, plan: BatchPlan) -> Iterator[PairBatch]:
    """Every pair exactly once over all ranks; equally many batches on every rank."""
    capacity = PAIR * plan.max_length
    packing = _evaluated(dataset, capacity if plan.packing else None)
    if len(packing) < plan.world_size:
        packing = _packed_within(capacity, dataset.lengths, plan, seed=0)
    yield from _passes(packing, plan, lambda indices: _pairs(dataset, indices, plan))


def _evaluated(dataset: RecordSource[Any], capacity: int | None) -> Packing:
    """All records, packed in rows of so many tokens; in their order and one by one where that is None."""

    def make() -> Packing:
        if capacity is None:
            return in_order(len(dataset))
        return pack(dataset.lengths, capacity, seed=0)

    return Packings.of(dataset).get({"evaluation": capacity}, len(dataset), make)


def collate(
    examples: Sequence[TokenizedExample],
    row_ids: Sequence[int],
    source_ids: Sequence[int],
    prefix_groups: Sequence[int] | None = None,
) -> Batch:
    """Documents laid end to end; no document gives one token without targets.

    row_ids, source_ids, prefix_groups: one per document. Neighbours of one prefix group share their common
    prefix (None: nothing is shared). Shapes as in `Batch`.
    """
    filler = not examples
    if filler:
        nothing = TokenizedExample(np.zeros(1, np.int32), np.full(1, IGNORE, np.int32), "")
        examples, source_ids, prefix_groups = [nothing], [0], None
    lengths = np.array([len(example.input_ids) for example in examples])
    shared = _shared_tokens(examples, prefix_groups)
    own_lengths = lengths - shared
    starts = np.cumsum(own_lengths) - own_lengths
    labels = np.concatenate([example.labels for example in examples])
    trained = np.flatnonzero(labels != IGNORE)
    document = np.repeat(np.arange(len(examples)), lengths)[trained]
    within = trained - (np.cumsum(lengths) - lengths)[document]
    owner = np.array(prefix_owners_of(shared.tolist()))[document]
    is_in_owner = within < shared[document]
    positions = within + np.where(is_in_owner, starts[owner], (starts - shared)[document])
    return Batch(
        input_ids=_tensor(
            np.concatenate([e.input_ids[count:] for e, count in zip(examples, shared, strict=True)])
        )[None],
        position_ids=_tensor(np.arange(own_lengths.sum()) - np.repeat(starts - shared, own_lengths))[None],
        cu_seqlens=_tensor(np.append(starts, own_lengths.sum())).to(torch.int32),
        trained_positions=_tensor(positions),
        targets=_tensor(labels[trained]),
        source_of_target=_tensor(np.asarray(source_ids)[document]),
        max_seqlen=int(own_lengths.max()),
        row_ids=tuple(int(index) for index in row_ids),
        shared_prefix=tuple(shared.tolist()) if shared.any() else (),
        computed_positions=_tensor(np.unique(positions)),
        padding=int(filler),
    )


def collate_pairs(
    pairs: Sequence[TokenizedPair],
    pair_ids: Sequence[int],
    source_ids: Sequence[int],
    *,
    share_prefix: bool = True,
) -> PairBatch:
    """Both sides of each pair end to end; none at all gives one token without targets or scores.

    share_prefix: both sides share their common prefix, stored in front of the chosen side. Shapes are those
    of `PairBatch`.
    """
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    sources, prefix_groups = (np.repeat(x, PAIR).tolist() for x in (source_ids, range(len(pairs))))
    documents = collate(sides, pair_ids, sources, prefix_groups if share_prefix else None)
    return PairBatch(
        documents=documents,
        score_positions=documents.cu_seqlens[1 : 1 + len(sides)].long() - 1 if sides else _tensor([]),
        document_of_target=_tensor(np.repeat(np.arange(len(sides)), [side.trained for side in sides])),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        source_ids=_tensor(source_ids),
        lengths=_tensor([len(side.input_ids) for side in sides]),
        pair_ids=tuple(int(index) for index in pair_ids),
    )


def count_pairs(micro_batches: Sequence[PairBatch]) -> tuple[int, int, int, int]:
    """Of this rank's part of a step: pairs, tokens of both sides, positions computed for them, padding.

    A shared prompt counts twice as tokens and once as computed positions.
    """
    pairs = sum(len(batch.pair_ids) for batch in micro_batches)
    tokens = sum(batch.num_tokens for batch in micro_batches)
    positions = sum(batch.documents.input_ids.shape[1] for batch in micro_batches)
    padding = sum(batch.documents.padding for batch in micro_batches)
    return pairs, tokens, positions - padding, padding


def _shared_tokens(examples: Sequence[TokenizedExample], prefix_groups: Sequence[int] | None) -> np.ndarray:
    """int64 [D]: tokens that each document shares with the owner of its prefix group, the first of it."""
    shared = np.zeros(len(examples), np.int64)
    owner = 0
    for index in range(1, len(examples) if prefix_groups is not None else 0):
        if prefix_groups is not None and prefix_groups[index] == prefix_groups[owner]:
            shared[index] = _common_tokens(examples[owner], examples[index])
        if not shared[index]:
            owner = index
    return shared


def _common_tokens(owner: TokenizedExample, other: TokenizedExample) -> int:
    """How many tokens both begin with; each keeps at least its last one."""
    a, b = owner.input_ids, other.input_ids
    shorter = min(len(a), len(b)) - 1
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


def _units(
    dataset: DocumentSource, indices: np.ndarray, plan: BatchPlan, prefix_groups: np.ndarray | None
) -> list[tuple[np.ndarray, int]]:
    """The documents in units that stay together in a row, with the tokens of each unit.

    Each document is a unit where nothing is shared, where every document has a row of its own, or where ranks
    would get no row.
    """
    alone = [(indices[at : at + 1], int(dataset.lengths[index])) for at, index in enumerate(indices)]
    if prefix_groups is None or not plan.packing:
        return alone
    units: list[tuple[np.ndarray, int]] = []
    owner = dataset[indices[0]] if len(indices) else None
    for document, length in alone:
        example = dataset[int(document[0])]
        if units and owner is not None and prefix_groups[units[-1][0][0]] == prefix_groups[document[0]]:
            together = units[-1][1] + length - _common_tokens(owner, example)
            if together <= plan.max_length:
                units[-1] = (np.append(units[-1][0], document), together)
                continue
        units.append((document, length))
        owner = example
    return units if len(units) >= plan.world_size else alone


def _rows_within(
    capacity: int, lengths: np.ndarray, records: np.ndarray, plan: BatchPlan, *, seed: int
) -> list[np.ndarray]:
    """The records as rows: packed, or each a row of its own; a row for every rank if there are enough."""
    packing = _packed_within(capacity, lengths[records], plan, seed=seed).of(records)
    return packing.rows(0, len(packing))


def _packed_within(capacity: int, lengths: np.ndarray, plan: BatchPlan, *, seed: int) -> Packing:
    if not plan.packing:
        return in_order(len(lengths))
    fewest = min(plan.world_size, len(lengths))
    packing = pack(lengths, capacity, seed=seed)
    return packing if len(packing) >= fewest else spread(lengths, capacity, fewest, seed=seed)


def _passes(packing: Packing, plan: BatchPlan, make: Callable[[list[int]], Any]) -> Iterator[Any]:
    per_pass = plan.micro_batch_size * plan.world_size
    for first in range(0, len(packing), per_pass):
        yield from share(packing.rows(first, first + per_pass), plan, make)


def share(rows: Sequence[np.ndarray], plan: BatchPlan, make: Callable[[list[int]], Any]) -> list[Any]:
    """This rank's part of some rows of all ranks, by micro-batch; equally many on every rank."""
    size = plan.micro_batch_size
    passes = -(-len(rows[:: plan.world_size]) // size)  # of rank 0, which never has fewer rows
    mine = rows[plan.rank :: plan.world_size]
    parts = [mine[first * size : (first + 1) * size] for first in range(passes)]
    made = [make([int(index) for row in part for index in row]) for part in parts]
    if plan.sequence_parallel == 1:
        return made
    return [slice_of(batch, plan.sequence_rank, plan.sequence_parallel) for batch in made]


def documents_of(dataset: Any, indices: list[int], prefix_groups: np.ndarray | None = None) -> Batch:
    """These documents of a data set as one batch."""
    source_ids = [int(dataset.source_ids[index]) for index in indices]
    of_documents = None if prefix_groups is None else prefix_groups[indices].tolist()
    return collate([dataset[index] for index in indices], indices, source_ids, of_documents)


def _pairs(dataset: Any, indices: list[int], plan: BatchPlan) -> PairBatch:
    source_ids = [int(dataset.source_ids[index]) for index in indices]
    pairs = [dataset[index] for index in indices]
    return collate_pairs(pairs, indices, source_ids, share_prefix=plan.share_prefix)


def _tensor(array: np.ndarray | Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
