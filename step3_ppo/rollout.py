"""The responses of an iteration: sampled by all ranks, known to all ranks.

Takes an engine, the prompts of the iteration and how to sample; returns `Response`s, ordered by prompt and
then by sample, the same on every rank. The samples of a prompt are one rank's, so that it computes the prompt
once. A response is drawn from (seed, iteration, prompt's place, sample), hence does not depend on how many
ranks or slots there are. Nothing is scored here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

from common.data.types import TokenizedPrompt
from common.decoding.decoder import (
    Completion,
    Decoder,
    DecodingCounts,
    GenerationBackend,
    Request,
    SamplingRule,
)
from common.runtime.distributed import StopSignal, World, all_gather_or_raise, all_reduce_sum
from common.training.engine import Engine as TrainingEngine
from step3_ppo.config import RolloutConfig
from step3_ppo.experience import Response

STREAM = 0x70706F
"""Tells the draws of roll-outs from whatever else is derived from a run's seed."""


class PromptSource(Protocol):
    """What prompts are taken from."""

    def __getitem__(self, index: int) -> TokenizedPrompt: ...


def rule_of(config: RolloutConfig, terminators: Sequence[int], *, greedy: bool = False) -> SamplingRule:
    """How responses are sampled; greedy: the likeliest token each time instead."""
    if greedy:
        return SamplingRule(0.0, config.max_new_tokens, tuple(terminators))
    return SamplingRule(
        config.temperature, config.max_new_tokens, tuple(terminators), config.top_p, config.top_k
    )


def roll_out(
    decoder: GenerationBackend,
    prompts: PromptSource,
    prompt_ids: Sequence[int],
    rule: SamplingRule,
    *,
    key: tuple[int, ...],
    samples: int = 1,
    world: World,
    should_stop: Callable[[], bool] | None = None,
    lockstep: bool = False,
) -> list[Response] | None:
    """`samples` responses to each prompt, group-major and sample-minor; None when told to stop.

    prompt_ids: the same on every rank; a prompt's place among them is its group. key: what all draws derive
    from, beside group and sample: whichever rank or slot a response falls to, it is the same. Every rank
    calls this, and all get None if one was told to stop. lockstep: see `Decoder.decode`. A UserError of one
    rank is raised on all.
    """
    own = [
        Request(prompts[prompt_ids[group]].input_ids, (STREAM, *key, group, sample))
        for group in range(world.rank, len(prompt_ids), world.size)
        for sample in range(samples)
    ]
    shares = all_gather_or_raise(
        lambda: decoder.decode(own, rule, should_stop=should_stop, lockstep=lockstep)
    )
    made = [share for share in shares if share is not None]
    if len(made) < len(shares):
        return None
    return [
        _response(prompts, prompt_ids[group], group, completion)
        for group in range(len(prompt_ids))
        for completion in _of_group(made, group, samples)
    ]


def over_ranks(own: DecodingCounts) -> DecodingCounts:
    """The counts of all ranks, summed; all of them call it."""
    return DecodingCounts(*map(int, all_reduce_sum([own.steps, own.tokens, own.rows])))


def _of_group(shares: Sequence[list[Completion]], group: int, samples: int) -> list[Completion]:
    """The completions of one prompt, out of what all ranks made."""
    share, place = shares[group % len(shares)], group // len(shares)
    return share[place * samples : (place + 1) * samples]


def _response(prompts: PromptSource, prompt_id: int, group: int, completion: Completion) -> Response:
    return Response(
        prompt_id,
        group,
        prompts[prompt_id].input_ids,
        completion.tokens,
        completion.logprobs,
        completion.stopped,
    )


class Sampler:
    """The live actor, made to respond: with a decoder, the sampling rules and all ranks.

    Under ZeRO-3 the actor's parameters are gathered while it samples, or layer by layer in lockstep.
    """

    def __init__(
        self,
        actor: TrainingEngine,
        model: nn.Module,
        config: RolloutConfig,
        terminators: Sequence[int],
        world: World,
        stop: StopSignal,
    ) -> None:
        self._actor, self._config, self._terminators = actor, config, terminators
        self._world, self._stop = world, stop
        self._gathers = config.gather_parameters and actor.zero_stage == 3
        self._lockstep = actor.zero_stage == 3 and not self._gathers and world.size > 1
        with self._phase():
            self._decoder = Decoder(model, slots=config.slots)

    def __call__(
        self,
        prompts: PromptSource,
        prompt_ids: Sequence[int],
        *,
        key: tuple[int, ...],
        samples: int = 1,
        greedy: bool = False,
        to_the_end: bool = False,
    ) -> list[Response] | None:
        """See `roll_out`; None when told to stop, unless it is to go on `to_the_end`. key: should differ from
        one iteration to the next."""
        with self._phase():
            return roll_out(
                self._decoder,
                prompts,
                prompt_ids,
                rule_of(self._config, self._terminators, greedy=greedy),
                key=key,
                samples=samples,
                world=self._world,
                should_stop=None if to_the_end else lambda: self._stop.received,
                lockstep=self._lockstep,
            )

    def counts(self) -> DecodingCounts:
        """Of the last call, over all ranks, which all ask."""
        return over_ranks(self._decoder.counts)

    def _phase(self) -> AbstractContextManager[object]:
        return self._actor.gathered() if self._gathers else nullcontext()
