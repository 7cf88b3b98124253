"""An iteration's responses -> minibatches -> micro-batches: which responses make an update.

Takes an `Experience`; returns this rank's micro-batches of each update. An update's responses depend only on
the seed, the iteration and the epoch, not on the number of ranks or the micro-batch size. Micro-batches hold
rows of `ppo.data.max_length` tokens, so their number depends on the lengths of responses.

A group stays together: in an update, and in a row as far as it fits, which computes its common prefix once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from common.data.batches import BatchPlan, batches_of
from common.data.types import Batch, TokenizedExample
from common.runtime.distributed import all_gather_arrays
from step3_ppo.rollout import Experience


@dataclass(frozen=True)
class Minibatch:
    """One update: this rank's micro-batches; the responses of all ranks, and how many tokens these have."""

    micro_batches: list[Batch]
    responses: np.ndarray  # int64, into the experience's
    tokens: int


def minibatches_of(experience: Experience, plan: BatchPlan, *, iteration: int, epoch: int) -> list[Minibatch]:
    """The updates of one pass over the responses, `plan.global_batch_size` each; groups in a new order."""
    key = [plan.seed, iteration, epoch, _ORDER]
    groups, lengths = experience.groups, np.diff(experience.offsets)
    place_of_group = np.random.default_rng(key).permutation(groups.max() + 1)
    order = np.argsort(place_of_group[groups], kind="stable")
    size = plan.global_batch_size
    return [
        Minibatch(_batches(experience, chosen, plan), chosen, int(lengths[chosen].sum()))
        for chosen in (order[first : first + size] for first in range(0, len(order), size))
    ]


def all_minibatches(
    experience: Experience, plan: BatchPlan, *, iteration: int, epochs: int
) -> list[Minibatch]:
    """The updates of an iteration: `epochs` passes over its responses."""
    passes = [minibatches_of(experience, plan, iteration=iteration, epoch=epoch) for epoch in range(epochs)]
    return [minibatch for one in passes for minibatch in one]


def first_pass(experience: Experience, plan: BatchPlan, *, iteration: int) -> list[Batch]:
    """All responses once, in the micro-batches in which the updates see them first."""
    minibatches = minibatches_of(experience, plan, iteration=iteration, epoch=0)
    return [batch for minibatch in minibatches for batch in minibatch.micro_batches]


def batches_in(experience: Experience, plan: BatchPlan) -> list[Batch]:
    """This rank's micro-batches of one pass over all responses."""
    return _batches(experience, np.arange(len(experience.responses)), plan)


def updates_in(responses: int, plan: BatchPlan, epochs: int) -> int:
    """Number of updates in an iteration of so many responses."""
    return epochs * math.ceil(responses / plan.global_batch_size)


def per_token(
    experience: Experience, batches: Iterable[Batch], compute: Callable[[Batch], torch.Tensor]
) -> np.ndarray:
    """fp32 [R]: the results of `compute` (fp32 [M] for a batch's M response tokens) for all response tokens.

    batches: this rank's; together the ranks' hold every response once. All ranks get all results.
    """
    found = np.empty(experience.num_tokens, np.float32)
    for response, values in _all_gathered(batches, compute, np.diff(experience.offsets)):
        found[experience.offsets[response] : experience.offsets[response + 1]] = values
    return found


def per_response(
    experience: Experience, batches: Iterable[Batch], compute: Callable[[Batch], torch.Tensor]
) -> np.ndarray:
    """float64 [B]: the results of `compute` (a number for each document of a batch) for all responses."""
    found = np.empty(len(experience.responses), np.float64)
    ones = np.ones(len(found), np.int64)
    for response, values in _all_gathered(batches, compute, ones):
        found[response] = values[0]
    return found


def last_positions(batch: Batch) -> torch.Tensor:
    """int64 [D]: position of each document's last token, where its reward is read."""
    return batch.cu_seqlens[1:].long() - 1


@torch.no_grad()
def _all_gathered(
    batches: Iterable[Batch], compute: Callable[[Batch], torch.Tensor], sizes: np.ndarray
) -> Iterable[tuple[int, np.ndarray]]:
    """(response, its values) of all ranks' batches. sizes: int64 [B], how many values a response has."""
    ids, found = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for batch in batches:
        ids.append(np.array(batch.row_ids, np.int64))
        values = compute(batch).float().cpu().numpy()
        found.append(values[: sizes[ids[-1]].sum()])  # a filler batch has no response
    for responses, flat in all_gather_arrays([np.concatenate(ids), np.concatenate(found)]):
        yield from zip(responses.tolist(), np.split(flat, np.cumsum(sizes[responses])[:-1]), strict=False)


def _batches(experience: Experience, chosen: np.ndarray, plan: BatchPlan) -> list[Batch]:
    return batches_of(
        _ResponseDocuments(experience), chosen, plan, seed=plan.seed, prefix_groups=experience.groups
    )


class _ResponseDocuments:
    """Prompts with their responses, as the documents that `common.data.batches` takes."""

    def __init__(self, experience: Experience) -> None:
        self._responses = experience.responses
        self.lengths = np.array([len(r.prompt) + len(r.tokens) for r in experience.responses], np.int64)
        self.source_ids = np.zeros(len(self.lengths), np.int64)
        self.sources = [""]

    def __len__(self) -> int:
        return len(self._responses)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self._responses[index].document()


_ORDER = 3
"""Sets this use of the seed apart from others."""
