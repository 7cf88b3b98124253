"""Which responses make an update, and that every number comes back to the response it is of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.data.batches import BatchPlan
from common.data.types import Batch
from step3_ppo.minibatches import (
    batches_in,
    computed,
    ends_in,
    minibatches_of,
    per_response,
    per_token,
    updates_in,
)
from step3_ppo.rollout import Experience
from tests.step3_ppo.gradients import MAX_LENGTH, PROMPTS, RESPONSES, some_experience

SIZE = 3


def plan_of(rank: int = 0, ranks: int = 1, micro: int = 2, packing: bool = True, seed: int = 5) -> BatchPlan:
    return BatchPlan(MAX_LENGTH, packing, SIZE, micro, seed, rank, ranks)


def responses_of(minibatch: list[Batch]) -> list[int]:
    return sorted(response for batch in minibatch for response in batch.row_ids)


def ids(batch: Batch) -> torch.Tensor:
    """The token that each target is."""
    return batch.targets.float()


def last_ids(batch: Batch) -> torch.Tensor:
    """The last token of each response that ends in a batch."""
    return batch.input_ids[0, ends_in(batch)[1]].float()


def passes(plan: BatchPlan, iteration: int = 0, epoch: int = 0) -> list[list[int]]:
    """The responses of each update, in no order."""
    found = minibatches_of(some_experience(), plan, iteration=iteration, epoch=epoch)
    return [responses_of(minibatch.micro_batches) for minibatch in found]


def two_prompts() -> Experience:
    """Three responses to each of two prompts."""
    some = some_experience().responses
    return Experience(
        [replace(response, group=group, prompt=some[1].prompt) for group in (0, 1) for response in some[:3]]
    )


def test_responses_to_a_prompt_stay_together_and_it_is_computed_once() -> None:
    experience, prompt = two_prompts(), PROMPTS[1]
    plan = BatchPlan(2 * MAX_LENGTH, True, SIZE, 1, 5)
    orders = set()
    for iteration in range(8):
        updates = minibatches_of(experience, plan, iteration=iteration, epoch=0)
        orders.add(tuple(map(tuple, (update.responses.tolist() for update in updates))))
        for update in updates:
            (batch,) = update.micro_batches
            assert set(experience.groups[list(batch.row_ids)]) in ({0}, {1}) and len(batch.row_ids) == SIZE
            assert batch.shared_prefix[0] == 0 and all(shared >= prompt for shared in batch.shared_prefix[1:])
            whole = sum(len(experience.responses[index].document().input_ids) for index in batch.row_ids)
            assert batch.input_ids.shape[1] == whole - sum(batch.shared_prefix)
    assert orders == {((0, 1, 2), (3, 4, 5)), ((3, 4, 5), (0, 1, 2))}


def test_rows_hold_as_much_of_a_family_as_fits() -> None:
    experience = two_prompts()
    plan = BatchPlan(MAX_LENGTH // 2 + 4, True, 6, 1, 5)  # room for two of the three responses
    batches = batches_in(experience, plan)
    assert sorted(index for batch in batches for index in batch.row_ids) == list(range(6))
    assert sorted(len(batch.row_ids) for batch in batches) == [1, 1, 2, 2]
    assert all(batch.input_ids.shape[1] <= plan.max_length for batch in batches)
    assert sum(any(batch.shared_prefix) for batch in batches) == 2
    apart = batches_in(experience, replace(plan, share_prefix=False))
    assert not any(batch.shared_prefix for batch in apart)
    assert sum(batch.input_ids.shape[1] for batch in apart) == sum(
        len(response.document().input_ids) for response in experience.responses
    )


def test_no_rank_is_left_without_a_row_for_the_sake_of_sharing() -> None:
    experience = Experience(two_prompts().responses[:3])
    plan = BatchPlan(2 * MAX_LENGTH, True, SIZE, 1, 5)
    shares = [batches_in(experience, replace(plan, rank=rank, world_size=2)) for rank in range(2)]
    assert all(batch.row_ids for share in shares for batch in share)


def test_a_pass_has_every_response_once_and_its_last_update_may_be_short() -> None:
    updates = passes(plan_of())
    assert [len(update) for update in updates] == [3, 3, 1] and updates_in(7, plan_of(), 1) == 3
    assert sorted(sum(updates, [])) == list(range(7))
    assert updates_in(7, plan_of(), 4) == 12


def test_each_pass_iteration_and_seed_has_its_own_order() -> None:
    orders = [passes(plan_of()), passes(plan_of(), epoch=1), passes(plan_of(), iteration=1)]
    orders.append(passes(plan_of(seed=6)))
    assert all(one != other for i, one in enumerate(orders) for other in orders[i + 1 :])
    assert orders[0] == passes(plan_of())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro", [1, 4])
def test_ranks_share_the_same_updates_and_count_the_tokens_of_all(packing: bool, micro: int) -> None:
    alone = minibatches_of(some_experience(), plan_of(), iteration=2, epoch=1)
    shares = [
        minibatches_of(some_experience(), plan_of(rank, 2, micro, packing), iteration=2, epoch=1)
        for rank in range(2)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        own = [responses_of(part.micro_batches) for part in parts]
        assert sorted(own[0] + own[1]) == responses_of(whole.micro_batches)
        assert all(
            sorted(part.responses) == sorted(whole.responses) == sorted(own[0] + own[1]) for part in parts
        )
        assert len({len(part.micro_batches) for part in parts}) == 1  # every pass is a collective on ZeRO-3
        tokens = sum(RESPONSES[response] for response in own[0] + own[1])
        assert {part.tokens for part in [whole, *parts]} == {tokens}
        targets = sum(len(batch.targets) for part in parts for batch in part.micro_batches)
        assert targets == tokens


def test_a_responses_tokens_are_the_targets_of_the_positions_before_them() -> None:
    experience = some_experience()
    for batch in batches_in(experience, replace(plan_of(), share_prefix=False)):
        ends = batch.cu_seqlens.tolist()
        for response, first, end in zip(batch.row_ids, ends, ends[1:], strict=False):
            prompt, tokens = experience.responses[response].prompt, experience.responses[response].tokens
            inside = (batch.trained_positions >= first) & (batch.trained_positions < end)
            places = batch.trained_positions[inside].tolist()
            assert places == list(range(first + len(prompt) - 1, end - 1))
            assert batch.targets[inside].tolist() == tokens.tolist()
            assert batch.input_ids[0, [place + 1 for place in places]].tolist() == tokens.tolist()


@pytest.mark.parametrize("packing", [True, False])
def test_numbers_come_back_in_the_order_of_the_responses(packing: bool) -> None:
    experience = some_experience()
    batches = batches_in(experience, plan_of(packing=packing))
    assert [batch.row_ids for batch in batches] != [tuple(range(7))]  # packing has moved them, or split them
    shares = {"ids": computed(batches, ids), "twice": computed(batches, lambda batch: 2 * ids(batch))}
    of_tokens = per_token(experience, batches, shares)
    assert all(found.dtype == np.float32 for found in of_tokens.values())
    expected = np.concatenate([response.tokens for response in experience.responses])
    assert of_tokens["ids"].tolist() == expected.tolist()
    assert of_tokens["twice"].tolist() == (2 * expected).tolist()
    of_responses = per_response(experience, batches, computed(batches, last_ids))
    assert of_responses.dtype == np.float64
    assert of_responses.tolist() == [response.tokens[-1] for response in experience.responses]


def test_a_rank_without_a_response_answers_for_none() -> None:
    experience = some_experience()
    one = Experience(experience.responses[:1])
    (filler,) = batches_in(one, plan_of(rank=1, ranks=2))
    assert filler.row_ids == () and len(ends_in(filler)[0]) == 0
    both = [filler, *batches_in(one, plan_of())]
    assert per_response(one, both, computed(both, last_ids)).tolist() == [one.responses[0].tokens[-1]]
    assert per_token(one, both, {"": computed(both, ids)})[""].tolist() == one.responses[0].tokens.tolist()


@pytest.mark.parametrize("ranks", [2, 3, 4, 16])
def test_ranks_that_share_rows_have_each_token_and_each_response_once(ranks: int) -> None:
    experience, plan = two_prompts(), replace(plan_of(), max_length=2 * MAX_LENGTH)
    (whole,) = minibatches_of(experience, replace(plan, global_batch_size=6), iteration=0, epoch=0)
    assert any(batch.shared_prefix for batch in whole.micro_batches)  # a first token is told by the prompt
    of_ranks = [
        batches_in(experience, replace(plan, sequence_rank=rank, sequence_parallel=ranks))
        for rank in range(ranks)
    ]
    parts = [batch for batches in of_ranks for batch in batches]
    assert {len(batches) for batches in of_ranks} == {len(of_ranks[0])}
    assert sum(len(ends_in(part)[0]) for part in parts) == len(experience.responses)
    assert sum(len(part.targets) for part in parts) == experience.num_tokens
    tokens = np.concatenate([response.tokens for response in experience.responses])
    assert per_token(experience, parts, {"": computed(parts, ids)})[""].tolist() == tokens.tolist()
    for part in parts:
        assert experience.of_targets(tokens, part).tolist() == part.targets.tolist()
    last = per_response(experience, parts, computed(parts, last_ids))
    assert last.tolist() == [response.tokens[-1] for response in experience.responses]


def test_what_is_asked_carries_no_gradient() -> None:
    weight = torch.ones((), requires_grad=True)
    experience = replace(some_experience())
    grads: list[bool] = []

    def compute(batch: Batch) -> torch.Tensor:
        grads.append((batch.targets.float() * weight).requires_grad)
        return batch.targets.float()

    computed(batches_in(experience, plan_of()), compute)
    assert grads and not any(grads)
