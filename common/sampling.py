"""Completions of held-out prompts, to look at while a policy trains.

Takes the live model and prompts as token ids; returns texts and whether each stopped by itself.
Plain `generate` on a left-padded batch: roll-outs for PPO are another matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch

from common.attention import plain_attention
from common.config import SamplingConfig
from common.data.types import IGNORE, TokenizedExample
from common.distributed import World, gather_objects

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One completion. `stopped`: it ended with a terminator before `max_new_tokens`."""

    prompt: str
    completion: str
    stopped: bool


class Documents(Protocol):
    """What prompts are taken from: documents of which some tokens are trained."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TokenizedExample: ...


def held_out_prompts(documents: Documents, count: int, longest: float, seed: int) -> list[np.ndarray]:
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


def room_for_prompts(model: PreTrainedModel, sampling: SamplingConfig) -> float:
    """Tokens that a prompt may have, so that its completion fits into the model's context too."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return math.inf if context is None else context - min(sampling.max_new_tokens, context // 2)


@torch.no_grad()
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

    Ranks share the prompts. `is_partitioned` (ZeRO-3) keeps ranks in step, since every forward pass
    is a collective there. The process's random state is left as it was.
    """
    share = list(prompts[world.rank :: world.size])
    padded = share or [prompts[0]]  # a rank without prompts still takes part in the collectives
    input_ids, mask = _left_pad(padded, tokenizer.pad_token_id, world.device)
    was_training = model.training
    model.eval()
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), plain_attention(model):
        torch.manual_seed(seed + world.rank)
        output = cast(Any, model).generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=_new_tokens(model, input_ids.shape[1], sampling.max_new_tokens),
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_k=0 if sampling.temperature > 0 else None,
            eos_token_id=list(terminators),
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=is_partitioned and world.size > 1,
            use_cache=True,
        )
    model.train(was_training)
    new_tokens = output[: len(share), input_ids.shape[1] :].tolist()
    own = [
        _sample(tokenizer, prompt, new, terminators) for prompt, new in zip(share, new_tokens, strict=True)
    ]
    shares = gather_objects(own)
    return [shares[i % world.size][i // world.size] for i in range(len(prompts))]


def stop_rate(samples: Sequence[Sample]) -> float:
    """Share of the completions that stopped by themselves."""
    return sum(sample.stopped for sample in samples) / len(samples)


def _new_tokens(model: PreTrainedModel, prompt_length: int, wanted: int) -> int:
    """As many as wanted, as far as the model's context reaches."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return wanted if context is None else min(wanted, context - prompt_length)


def _left_pad(
    prompts: Sequence[np.ndarray], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _sample(
    tokenizer: PreTrainedTokenizerBase, prompt: np.ndarray, new: Sequence[int], terminators: Sequence[int]
) -> Sample:
    end = next((i for i, token in enumerate(new) if token in terminators), None)
    return Sample(_text(tokenizer, prompt.tolist()), _text(tokenizer, list(new[:end])), end is not None)


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False))
