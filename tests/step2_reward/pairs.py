"""Pairs made in memory, a tiny model that scores them, and its gradient by plain transformers in float64."""

from __future__ import annotations

import numpy as np
import torch

from common.data.types import IGNORE, TokenizedExample, TokenizedPair
from common.model import attention

VOCABULARY, MAX_LENGTH, CENTERING = 61, 24, 0.05


class SomePairs:
    """Seven pairs of different lengths and margins; each shares its prompt, and its answers' first token."""

    sources = ["only"]
    prompts, chosen, rejected = (3, 9, 2, 5, 8, 1, 4), (5, 3, 9, 12, 4, 7, 2), (8, 6, 2, 2, 15, 7, 3)
    lengths = np.array(
        [2 * p + c + r for p, c, r in zip(prompts, chosen, rejected, strict=True)], dtype=np.int32
    )
    source_ids = np.zeros(7, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedPair:
        draw = np.random.default_rng(index)
        beginning = draw.integers(1, VOCABULARY, self.prompts[index] + 1)
        sides = [
            _side(beginning, draw.integers(1, VOCABULARY, answers[index] - 1))
            for answers in (self.chosen, self.rejected)
        ]
        return TokenizedPair(sides[0], sides[1], index / 4)


def _side(beginning: np.ndarray, rest: np.ndarray) -> TokenizedExample:
    ids = np.concatenate([beginning, rest]).astype(np.int32)
    labels = np.append(ids[1:], IGNORE).astype(np.int32)
    labels[: len(beginning) - 2] = IGNORE
    return TokenizedExample(ids, labels, "only")


def tiny_scorer(attn_implementation: str = attention.NAME, *, checkpointing: bool = False) -> torch.nn.Module:
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, num_labels=1,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attn_implementation)
    model.score.weight.data *= 20  # scores of usual size: losses and their weights then differ
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def plain_scores(model: torch.nn.Module, pairs: SomePairs) -> torch.Tensor:
    """[P, 2] by transformers alone, one document at a time."""
    rows = []
    for index in range(len(pairs)):
        sides = (pairs[index].chosen, pairs[index].rejected)
        ids = [torch.from_numpy(side.input_ids.astype(np.int64))[None] for side in sides]
        rows.append(torch.cat([model(one).logits[0] for one in ids]))
    return torch.stack(rows)


def reference_gradient() -> dict[str, torch.Tensor]:
    """Of the mean over all pairs, in float64, from the formula as the paper has it."""
    model, pairs = tiny_scorer("eager").double(), SomePairs()
    scores = plain_scores(model, pairs)
    margins = torch.tensor([pairs[index].margin for index in range(len(pairs))]).double()
    chosen, rejected = scores[:, 0], scores[:, 1]
    won = 1 / (1 + torch.exp(-(chosen - rejected - margins)))
    (-won.log() + CENTERING * (chosen + rejected) ** 2).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
