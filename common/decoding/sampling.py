"""Completions of held-out prompts, to look at while a policy trains.

Takes the live model and prompts as token ids; returns texts and whether each stopped by itself. How tokens
are drawn is the decoder's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from common.config import SamplingConfig
from common.data.types import IGNORE, TokenizedExample
from common.decoding.decoder import Decoder
from common.decoding.requests import Completion, Request, SamplingParams
from common.runtime.distributed import World, all_gather_arrays

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SLOTS = 32
"""Completions that are sampled side by side on a rank."""

STREAM = 0x73616D70
"""Tells the draws of samples from whatever else is derived from a run's seed."""


@dataclass(frozen=True)
class Sample:
    """One completion. `stopped`: it ended with a terminator before `max_new_tokens`."""

    prompt: str
    completion: str
    stopped: bool


class HeldOutDocuments(Protocol):
    """What prompts are taken from: documents of which some tokens are trained."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TokenizedExample: ...


def held_out_prompts(documents: HeldOutDocuments, count: int, longest: float, seed: int) -> list[np.ndarray]:
    """A seeded choice of prompts (int32 [T]): documents cut where their first trained token would come.

    Each prompt once. Left out are documents trained from their start (plain text), which have no prompt,
    and prompts of `longest` tokens or more, which leave no room for a completion.
    """
    prompts: dict[bytes, np.ndarray] = {}
    for index in np.random.default_rng(seed).permutation(len(documents)):
        if len(prompts) == count:
            break
        example = documents[int(index)]
        first = int(np.argmax(example.labels != IGNORE))
        if 0 < first < longest:
            prompt = example.input_ids[: first + 1]
            prompts.setdefault(prompt.tobytes(), prompt)
    return list(prompts.values())


def prompts_to_sample(
    documents: HeldOutDocuments | None, sampling: SamplingConfig, model: PreTrainedModel, seed: int
) -> list[np.ndarray]:
    """Held-out prompts to complete, with room for the completion in the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = math.inf if context is None else context - min(sampling.max_new_tokens, context // 2)
    return [] if documents is None else held_out_prompts(documents, sampling.num_prompts, room, seed)


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    terminators: Sequence[int],
    sampling: SamplingConfig,
    world: World,
    *,
    seed: int,
    is_partitioned: bool,
) -> list[Sample]:
    """Complete each prompt (int32 [T] token ids); the same list, in order, on every rank.

    Ranks share the prompts; what is drawn for one depends on the seed and its place only. `is_partitioned`
    (ZeRO-3) keeps ranks in step, since every forward pass is a collective there. The process's random state
    and the model's mode are left as they were.
    """
    own = range(world.rank, len(prompts), world.size)
    params = SamplingParams(sampling.temperature, sampling.max_new_tokens, tuple(terminators))
    decoder = Decoder(model, slots=SLOTS, cuda_graphs=sampling.cuda_graphs)
    completions = decoder.decode(
        [Request(prompts[i], (seed, STREAM, i)) for i in own],
        params,
        lockstep=is_partitioned and world.size > 1,
    )
    assert completions is not None  # nobody told it to stop
    shares = all_gather_completions(completions)
    return [
        _sample(tokenizer, prompt, shares[i % world.size][i // world.size])
        for i, prompt in enumerate(prompts)
    ]


def all_gather_completions(own: Sequence[Completion]) -> list[list[Completion]]:
    """All-gather: the completions of all ranks, by rank, on every rank; they travel as arrays."""
    tokens = np.concatenate([np.empty(0, np.int32), *(completion.tokens for completion in own)])
    logprobs = np.concatenate([np.empty(0, np.float32), *(completion.logprobs for completion in own)])
    lengths = np.array([len(completion.tokens) for completion in own], np.int64)
    stopped = np.array([completion.stopped for completion in own], bool)
    gathered = all_gather_arrays([tokens.astype(np.int32), logprobs.astype(np.float32), lengths, stopped])
    return [_completions(*share) for share in gathered]


def _completions(
    tokens: np.ndarray, logprobs: np.ndarray, lengths: np.ndarray, stopped: np.ndarray
) -> list[Completion]:
    """One rank's. tokens, logprobs: [T], of all of them end to end."""
    ends = np.cumsum(lengths)[:-1]
    parts = zip(np.split(tokens, ends), np.split(logprobs, ends), stopped.tolist(), strict=False)
    return [Completion(*part) for part in parts]


def stop_rate(samples: Sequence[Sample]) -> float:
    return sum(sample.stopped for sample in samples) / len(samples)


def _sample(tokenizer: PreTrainedTokenizerBase, prompt: np.ndarray, completion: Completion) -> Sample:
    tokens = completion.tokens.tolist()
    words = tokens[:-1] if completion.stopped else tokens
    asked, said = (str(tokenizer.decode(ids, skip_special_tokens=False)) for ids in (prompt.tolist(), words))
    return Sample(asked, said, completion.stopped)
