"""An iteration's responses -> minibatches -> micro-batches: which responses make an update.

Takes an `Experience`; returns this rank's micro-batches of each update. An update's responses depend only on
the seed, the iteration and the epoch, not on the number of ranks or the micro-batch size. Micro-batches hold
rows of `ppo.data.max_length` tokens, so their number depends on the lengths of responses.

A group stays together: in an update, and in a row as far as it fits, which computes its common prefix once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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


@torch.no_grad()
def computed(batches: Iterable[Batch], compute: Callable[[Batch], torch.Tensor]) -> np.ndarray:
    """fp32: what `compute` gives for each of this rank's batches, end to end."""
    found = [np.empty(0, np.float32)]
    for batch in batches:
        found.append(compute(batch).float().cpu().numpy())
    return np.concatenate(found)


def per_token(
    experience: Experience, batches: Iterable[Batch], shares: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """fp32 [R] by name, for all response tokens, on every rank.

    batches: this rank's; together the ranks' hold every token once. shares: what it `computed` for the M
    response tokens of each.
    """
    places = np.arange(experience.num_tokens, dtype=np.int32)
    own = [experience.of_targets(places, batch) for batch in batches]
    return _placed(own, shares, experience.num_tokens)


def per_response(experience: Experience, batches: Iterable[Batch], scores: np.ndarray) -> np.ndarray:
    """float64 [B], for all responses, on every rank.

    batches: this rank's; together the ranks' hold every response once. scores: what it `computed` for the
    responses that end in each, see `ends_in`.
    """
    own = [np.array(batch.row_ids, np.int32)[ends_in(batch)[0].numpy()] for batch in batches]
    return _placed(own, {"": scores}, len(experience.responses))[""].astype(np.float64)


def ends_in(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch on the host, or this rank's slice of it: which of its documents end there, and the positions
    of their last tokens, where their rewards are read. int64 [D] each."""
    ends = batch.cu_seqlens[1 : 1 + len(batch.row_ids)].long() - 1 - batch.first
    here = torch.nonzero((ends >= 0) & (ends < batch.input_ids.shape[1]))[:, 0]
    return here, ends[here]


def _placed(
    places: Sequence[np.ndarray], shares: Mapping[str, np.ndarray], count: int
) -> dict[str, np.ndarray]:
    """fp32 [count] by name, from all ranks. places: int32, where this rank's numbers go; end to end they are
    as many as each share has."""
    found = {name: np.empty(count, np.float32) for name in shares}
    own = np.concatenate([np.empty(0, np.int32), *places])
    for at, *of_rank in all_gather_arrays([own, *shares.values()]):
        for name, values in zip(shares, of_rank, strict=True):
            found[name][at] = values
    return found


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
