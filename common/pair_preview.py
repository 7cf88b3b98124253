"""Pairs as the model sees them: a seeded handful, how long answers are, and what was dropped or cut.

Takes a step's settings; prints to the terminal. Loads no model and makes no batches.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from common.config import DataConfig, JobConfig
from common.data import control
from common.data.dataset import PREFERENCES
from common.data.pairs import prompt_length
from common.data.types import IGNORE, TokenizedExample, TokenizedPair
from common.handoff import model_to_preview
from common.models import load_tokenizer
from common.progress import show_preview
from common.stage import Step
from common.step_data import build_data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from common.data.dataset import Ledger, PairDataset

PAIRS_SHOWN = 5
Run = tuple[str, bool]  # a stretch of text, and whether it is trained


def preview_pairs(job: JobConfig, step: Step, data: DataConfig, policy: str | None) -> None:
    """Print to the terminal. Tokenizes into the cache, where a run finds it again; loads no model.

    policy: the artifact whose tokenizer counts; None before an earlier step of the run has made it.
    """
    tokenizer = load_tokenizer(model_to_preview(job.model, policy, f"{step.value}.policy"))
    built = build_data(job, step, data, PREFERENCES, tokenizer, print)
    show_pairs(built.train, built.ledger, tokenizer, data.max_length, job.seed)


def show_pairs(
    pairs: PairDataset, ledger: Ledger, tokenizer: PreTrainedTokenizerFast, max_length: int, seed: int
) -> None:
    """Print a few pairs, the histogram of the lengths of their sides, and what became of the rows."""
    shown = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:PAIRS_SHOWN])
    lengths = np.concatenate([pairs.chosen_lengths, pairs.lengths - pairs.chosen_lengths])
    show_preview(
        [
            [
                (pairs.head(index), False),
                *pair_runs(pairs[index], tokenizer, marked=bool(pairs.control[index])),
            ]
            for index in shown.tolist()
        ],
        lengths.tolist(),
        ledger.lines(),
        float(pairs.trained.sum() / lengths.sum()),
        max_length,
    )


def pair_runs(pair: TokenizedPair, tokenizer: PreTrainedTokenizerFast, *, marked: bool = False) -> list[Run]:
    """The prompt once, then what follows it on the chosen side, then on the rejected one.

    marked: with control tokens between stars.
    """
    chosen, rejected = prompt_length(pair.chosen), prompt_length(pair.rejected)
    return [
        (f"prompt ({chosen} tokens):\n", False),
        *_runs(pair.chosen, tokenizer, 0, chosen, marked),
        ("\nchosen:\n", False),
        *_runs(pair.chosen, tokenizer, chosen, len(pair.chosen.input_ids), marked),
        ("\nrejected:\n", False),
        *_runs(pair.rejected, tokenizer, rejected, len(pair.rejected.input_ids), marked),
        *([(f"\nmargin: {pair.margin:g}", False)] if pair.margin else []),
    ]


def _runs(
    example: TokenizedExample, tokenizer: PreTrainedTokenizerFast, begin: int, end: int, marked: bool
) -> list[Run]:
    """Positions `begin` to `end` as decoded stretches of equally treated tokens."""
    is_trained = [False, *(example.labels[:-1] != IGNORE).tolist()]
    tokens = list(zip(example.input_ids.tolist(), is_trained, strict=True))[begin:end]
    stretches = groupby(tokens, key=lambda token: token[1])
    return [
        (control.spelled([token for token, _ in group], tokenizer, marked=marked), trained)
        for trained, group in stretches
    ]
