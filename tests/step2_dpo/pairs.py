"""Pairs made in memory, and an engine that is only its module."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from common.data.types import IGNORE, TokenizedExample, TokenizedPair
from common.model import attention
from tests.packed import packed_lm

VOCABULARY, MAX_LENGTH = 61, 24


class SomePairs:
    """Seven pairs of different lengths; each pair shares its prompt."""

    sources = ["only"]
    prompts, chosen, rejected = (3, 9, 2, 5, 8, 1, 4), (5, 3, 9, 12, 4, 7, 1), (8, 6, 2, 1, 15, 7, 3)
    lengths = np.array(
        [2 * p + c + r for p, c, r in zip(prompts, chosen, rejected, strict=True)], dtype=np.int32
    )
    source_ids = np.zeros(7, dtype=np.int32)
    fingerprint = "seven"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedPair:
        draw = np.random.default_rng(index)
        prompt = draw.integers(1, VOCABULARY, self.prompts[index])
        sides = [
            _side(prompt, draw.integers(1, VOCABULARY, answers[index]))
            for answers in (self.chosen, self.rejected)
        ]
        return TokenizedPair(sides[0], sides[1], 0.0)


def _side(prompt: np.ndarray, answer: np.ndarray) -> TokenizedExample:
    ids = np.concatenate([prompt, answer]).astype(np.int32)
    labels = np.append(ids[1:], IGNORE).astype(np.int32)
    labels[: len(prompt) - 1] = IGNORE
    return TokenizedExample(ids, labels, "only")


def tiny_llama(attn_implementation: str = attention.NAME, seed: int = 0) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention.register()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)


class PlainEngine:
    """What the loss and the reference ask of an engine, without one."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.module = packed_lm(model)
        self.calls = 0

    def __call__(self, **arguments: Any) -> Any:
        self.calls += 1
        return self.module(**arguments)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()


def plain_logps(model: torch.nn.Module, pair: TokenizedPair) -> tuple[torch.Tensor, torch.Tensor]:
    """log π of both answers by transformers alone, one document at a time. float64 with a double model."""
    sums = []
    for side in (pair.chosen, pair.rejected):
        logits = model(torch.from_numpy(side.input_ids.astype(np.int64))[None]).logits[0]
        labels = torch.from_numpy(side.labels.astype(np.int64))
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
        sums.append(-nll)
    return sums[0], sums[1]
