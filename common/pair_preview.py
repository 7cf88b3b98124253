"""Pairs as the model sees them: a seeded handful, how long answers are, and what was dropped or cut.

Takes what a step's preview.py loads; prints to the terminal. Loads no model and makes no batches.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from common.data.types import IGNORE, TokenizedExample, TokenizedPair
from common.progress import show_preview

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from common.data.dataset import Ledger, PairDataset

PAIRS_SHOWN = 5
Run = tuple[str, bool]  # a stretch of text, and whether it is trained


def show_pairs(
    pairs: PairDataset, ledger: Ledger, tokenizer: PreTrainedTokenizerFast, max_length: int, seed: int
) -> None:
    """Print a few pairs, the histogram of the lengths of their sides, and what became of the rows."""
    shown = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:PAIRS_SHOWN])
    sides = [side for index in range(len(pairs)) for side in (pairs[index].chosen, pairs[index].rejected)]
    lengths = [len(side.input_ids) for side in sides]
    show_preview(
        [pair_runs(pairs[int(index)], tokenizer) for index in shown],
        lengths,
        ledger.lines(),
        sum(side.trained for side in sides) / sum(lengths),
        max_length,
    )


def pair_runs(pair: TokenizedPair, tokenizer: PreTrainedTokenizerFast) -> list[Run]:
    """The prompt once, then what follows it on the chosen side, then on the rejected one."""
    prompt = prompt_tokens(pair)
    begin = f"prompt ({prompt} tokens):\n"
    return [
        (begin, False),
        *_runs(pair.chosen, tokenizer, 0, prompt),
        ("\nchosen:\n", False),
        *_runs(pair.chosen, tokenizer, prompt, len(pair.chosen.input_ids)),
        ("\nrejected:\n", False),
        *_runs(pair.rejected, tokenizer, prompt, len(pair.rejected.input_ids)),
        *([(f"\nmargin: {pair.margin:g}", False)] if pair.margin else []),
    ]


def prompt_tokens(pair: TokenizedPair) -> int:
    """Tokens before the first trained one on either side: the same tokens on both."""
    # labels are shifted: the token after the first position with a label is the first trained one
    return min(int(np.argmax(side.labels != IGNORE)) + 1 for side in (pair.chosen, pair.rejected))


def _runs(example: TokenizedExample, tokenizer: PreTrainedTokenizerFast, begin: int, end: int) -> list[Run]:
    """Positions `begin` to `end` as decoded stretches of equally treated tokens."""
    is_trained = [False, *(example.labels[:-1] != IGNORE).tolist()]
    tokens = list(zip(example.input_ids.tolist(), is_trained, strict=True))[begin:end]
    stretches = groupby(tokens, key=lambda token: token[1])
    return [(str(tokenizer.decode([token for token, _ in group])), trained) for trained, group in stretches]
