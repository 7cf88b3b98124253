"""Part 1 of an iteration: all ranks sample the responses; `Experience` then collects everything about them.

Takes the actor's engine, the prompts of the iteration and the sampling settings; returns `Response`s, ordered
by prompt and then by sample, the same on every rank. One rank samples all responses to a prompt and computes
the prompt once; which one, expected lengths decide (`lengths.py`). Sampling depends only on seed, iteration,
the prompt's place and the sample, not on rank, slot or their numbers.

Ranks also share the scoring of an `Experience` and exchange the results, so that advantages and minibatches
are computed alike everywhere. Nothing is padded: numbers of tokens lie in flat arrays over all response
tokens, in the order of the responses. Nothing is scored here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import nn

from common.config import ModelConfig
from common.data.types import IGNORE, Batch, TokenizedExample, TokenizedPrompt
from common.decoding.decoder import Decoder
from common.decoding.requests import Completion, DecodingCounts, Request, SamplingParams
from common.decoding.sampling import all_gather_completions
from common.decoding.vllm_decoder import EngineSize, VLLMDecoder
from common.decoding.vllm_server import VLLMServers
from common.model.adapters import ADAPTER
from common.runtime.distributed import (
    StopSignal,
    World,
    all_reduce_sum,
    make_or_raise,
)
from common.training.engine import Engine as TrainingEngine
from common.training.handover import whole_weights
from step3_ppo.config import RolloutConfig
from step3_ppo.lengths import shared_out

STREAM = 0x70706F
"""Sets the draws of roll-outs apart from other uses of the seed."""


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response.

    prompt_id: index of its prompt in the data set. group: the prompt's place in the iteration; the samples of
    a prompt share it. prompt: int32 [T]. tokens: int32 [R], at least one, with the terminator if `stopped`.
    logprobs: fp32 [R], of these tokens at the sampling temperature, over all tokens of the vocabulary.
    """

    prompt_id: int
    group: int
    prompt: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool

    def document(self) -> TokenizedExample:
        """Prompt and response, with the response's tokens as targets of the positions that predict them."""
        ids = np.concatenate([self.prompt, self.tokens]).astype(np.int32)
        labels = np.full(len(ids), IGNORE, np.int32)
        labels[len(self.prompt) - 1 : -1] = self.tokens
        return TokenizedExample(ids, labels, "")


@dataclass(frozen=True)
class Experience:
    """B responses with R tokens altogether; fields are filled in as the iteration goes on.

    scores: of each reward source by name, float64 [B]. rewards: float64 [B], the weighted sum with penalties.
    old_logprobs, ref_logprobs, values: fp32 [R], the actor's, the reference's and the critic's, as they were
    when the iteration began. advantages, returns: fp32 [R]. importance: fp32 [R], see importance.py. Absent
    (None): not computed yet, or not needed.
    """

    responses: Sequence[Response]
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    rewards: np.ndarray | None = None
    old_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None
    values: np.ndarray | None = None
    advantages: np.ndarray | None = None
    returns: np.ndarray | None = None
    importance: np.ndarray | None = None

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [B + 1]: the tokens of response b are offsets[b] to offsets[b + 1]."""
        return np.cumsum([0, *(len(response.tokens) for response in self.responses)])

    @cached_property
    def groups(self) -> np.ndarray:
        """int64 [B]: which responses have a prompt in common."""
        return np.array([response.group for response in self.responses], np.int64)

    @property
    def num_tokens(self) -> int:
        """R, response tokens."""
        return int(self.offsets[-1])

    def of_tokens(self, values: np.ndarray, response_ids: Sequence[int]) -> np.ndarray:
        """Out of a flat array [R], the part of these responses, in their order."""
        parts = [values[self.offsets[i] : self.offsets[i + 1]] for i in response_ids]
        return np.concatenate(parts) if parts else values[:0]

    def of_targets(self, values: np.ndarray, batch: Batch) -> np.ndarray:
        """[M] out of a flat array [R]: of the response tokens of a batch, or of this rank's slice of it."""
        whole = self.of_tokens(values, batch.row_ids)
        return whole if batch.own_targets is None else whole[batch.own_targets]


class PromptSource(Protocol):
    """A data set of prompts."""

    def __getitem__(self, index: int) -> TokenizedPrompt: ...


def roll_out(
    decoder: Decoder | VLLMDecoder | VLLMServers,
    prompts: PromptSource,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    key: tuple[int, ...],
    samples: int = 1,
    expected: np.ndarray | None = None,
    world: World,
    should_stop: Callable[[], bool] | None = None,
    lockstep: bool = False,
) -> list[Response] | None:
    """`samples` responses to each prompt, group-major and sample-minor; None when told to stop.

    prompt_ids: the same on every rank; a prompt's place among them is its group. key: all draws derive from
    it, the group and the sample, not from rank or slot. expected: as of `shared_out`, the same on every rank.
    Every rank calls this; all get None if one was told to stop, and all raise the UserError of one. lockstep:
    see `Decoder.decode`.
    """
    unknown = np.full(len(prompt_ids), np.nan)
    shares = shared_out(unknown if expected is None else expected, world.size)
    own = [
        Request(prompts[prompt_ids[group]].input_ids, (STREAM, *key, group, sample))
        for group in shares[world.rank].tolist()
        for sample in range(samples)
    ]
    completions: list[Completion] | None = None

    def decode() -> bool:
        nonlocal completions
        completions = decoder.decode(own, params, should_stop=should_stop, lockstep=lockstep)
        return completions is not None

    (told,) = all_reduce_sum([not make_or_raise(decode)])
    if told:
        return None
    made: dict[int, list[Completion]] = {}
    for share, found in zip(shares, all_gather_completions(completions or []), strict=True):
        made |= {group: found[i * samples : (i + 1) * samples] for i, group in enumerate(share.tolist())}
    return [
        _response(prompts, prompt_ids[group], group, completion)
        for group in range(len(prompt_ids))
        for completion in made[group]
    ]


def over_ranks(own: DecodingCounts) -> DecodingCounts:
    """The counts summed over all ranks, which all call it."""
    return DecodingCounts(*map(int, all_reduce_sum([own.steps, own.tokens, own.rows])))


def balance(own: DecodingCounts, world: World) -> float:
    """Mean forward passes of a rank over those of the rank with most, which all call it; 1: all ended
    together. 1 with vLLM's servers, whose passes are not seen."""
    passes = [0.0] * world.size
    passes[world.rank] = float(own.steps)
    passes = all_reduce_sum(passes)
    return sum(passes) / (len(passes) * max(passes)) if any(passes) else 1.0


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
    """Samples responses from the live actor on all ranks.

    Under ZeRO-3 the actor's parameters are gathered while it samples, or layer by layer in lockstep. vLLM
    gets them anew for every call, under ZeRO-3 one tensor at a time.
    """

    def __init__(
        self,
        actor: TrainingEngine,
        model: nn.Module,
        config: RolloutConfig,
        terminators: Sequence[int],
        world: World,
        stop: StopSignal,
        vllm: VLLMDecoder | VLLMServers | None = None,
    ) -> None:
        """vllm: what samples, in the place of the builtin decoder."""
        self._actor, self._model, self._config, self._terminators = actor, model, config, terminators
        self._world, self._stop = world, stop
        self._gathers = config.gather_parameters and actor.zero_stage == 3
        self._lockstep = actor.zero_stage == 3 and not self._gathers and world.size > 1
        self._vllm = vllm
        if vllm is None:
            with self._phase():
                self._decoder: Decoder | VLLMDecoder | VLLMServers = Decoder(
                    model, slots=config.slots, cuda_graphs=config.cuda_graphs
                )
        else:
            self._decoder = vllm

    def __call__(
        self,
        prompts: PromptSource,
        prompt_ids: Sequence[int],
        *,
        key: tuple[int, ...],
        samples: int = 1,
        expected: np.ndarray | None = None,
        greedy: bool = False,
        to_the_end: bool = False,
    ) -> list[Response] | None:
        """See `roll_out`; None when told to stop, unless `to_the_end`. key: another one each iteration."""
        with self._phase():
            return roll_out(
                self._decoder,
                prompts,
                prompt_ids,
                SamplingParams.of(self._config, self._terminators, greedy=greedy),
                key=key,
                samples=samples,
                expected=expected,
                world=self._world,
                should_stop=None if to_the_end else lambda: self._stop.received,
                lockstep=self._lockstep,
            )

    def counts(self) -> DecodingCounts:
        """Of the last call, over all ranks, which all call it."""
        return over_ranks(self._decoder.counts)

    def balance(self) -> float:
        """Of the last call, see `balance`; all ranks call it."""
        return balance(self._decoder.counts, self._world)

    def _phase(self) -> AbstractContextManager[object]:
        if self._vllm is not None:
            return self._vllm.holding(whole_weights(self._actor, self._model))
        return self._actor.gathered() if self._gathers else nullcontext()


def vllm_of(
    policy: ModelConfig, model: nn.Module, config: RolloutConfig, max_length: int, world: World, folder: Path
) -> VLLMDecoder | VLLMServers | None:
    """vLLM on every rank, or servers, for all ranks, which all call it; None where the settings ask for
    another engine.

    policy: its files. model: made from them, to be trained. max_length: of a prompt with its response.
    folder: where weights on their way to servers are written.
    """
    if not config.uses_vllm:
        return None
    vllm, filters = config.vllm, config.leaves_out_tokens
    if vllm.servers is not None:
        return VLLMServers(
            vllm.servers, policy, max_length, folder, world,
            filters=filters, slots=config.slots, timeout=vllm.timeout,
        )  # fmt: skip
    size = EngineSize(config.slots, max_length, None if vllm.cache_gb is None else vllm.cache_gb * 1e9)
    adapter = getattr(model, "peft_config", {}).get(ADAPTER)
    return VLLMDecoder(policy, size, world.device, filters=filters, adapter=adapter)
