"""The preview: rows as the model sees them, their lengths, and what was dropped or cut.

Takes decoded rows, or the settings of a step with pairs; prints to the terminal. Loads no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from common.config import DataConfig, JobConfig
from common.data import control
from common.data.dataset_types import PREFERENCES
from common.data.pairs import prompt_length
from common.data.types import IGNORE, TokenizedExample, TokenizedPair
from common.handoff import model_to_preview
from common.model.tokenizer import load_tokenizer
from common.runtime import progress
from common.stage import Step
from common.text import printable
from common.training.step_data import build_data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from common.data.stored import PairDataset, PromptDataset, TokenizedDataset

ROWS_SHOWN = 5
_BAR_WIDTH = 40
Run = tuple[str, bool]  # a stretch of text, and whether it is trained


def show_preview(
    rows: Sequence[Sequence[Run]],
    lengths: Sequence[int],
    ledger_lines: Sequence[str],
    trained_share: float | None,
    max_length: int,
) -> None:
    """Print rows as the model sees them, then lengths, the trained share and what became of the data.

    rows: each a sequence of runs, (decoded text, whether it is trained). A run is decoded as a whole, because
    a character may be split over several tokens. lengths: tokens of every document. trained_share: None for
    rows of which nothing is trained. Trained text is coloured on a terminal and stands in brackets elsewhere.
    """
    out = progress.console()
    in_colour = out.is_terminal and out.color_system is not None and not out.no_color
    brackets = ("", "") if in_colour else _brackets(out.encoding)
    key = "(trained text is coloured)" if in_colour else f"(trained: {brackets[0]}…{brackets[1]})"
    for number, runs in enumerate(rows, start=1):
        out.print(f"--- row {number}", "" if trained_share is None else f" {key}", sep="", markup=False)
        out.print(progress.styled(_marked(runs, brackets)))
    share = [] if trained_share is None else [f"trained share: {trained_share:.1%} of the tokens"]
    for line in ["", *histogram_lines(lengths, max_length), *share, *ledger_lines]:
        progress.say(line)


def a_few(
    dataset: TokenizedDataset | PairDataset | PromptDataset,
    seed: int,
    runs_of: Callable[[int, bool], list[Run]],
) -> list[list[Run]]:
    """A seeded handful of rows in their order, each behind its head. runs_of: gets the index, and whether the
    row holds control tokens, which are then marked."""
    shown = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:ROWS_SHOWN]).tolist()
    return [[(dataset.head(index), False), *runs_of(index, bool(dataset.control[index]))] for index in shown]


def document_runs(
    example: TokenizedExample,
    tokenizer: PreTrainedTokenizerFast,
    begin: int = 0,
    end: int | None = None,
    *,
    marked: bool = False,
) -> list[Run]:
    """Positions `begin` to `end` of a document as decoded runs of equally treated tokens.

    marked: with control tokens between stars.
    """
    # labels are shifted: the token at t + 1 is trained where position t has a label
    is_trained = [False, *(example.labels[:-1] != IGNORE).tolist()]
    tokens = list(zip(example.input_ids.tolist(), is_trained, strict=True))[begin:end]
    stretches = groupby(tokens, key=lambda token: token[1])
    return [
        (control.spelled([token for token, _ in group], tokenizer, marked=marked), trained)
        for trained, group in stretches
    ]


def preview_pairs(job: JobConfig, step: Step, data: DataConfig, policy: str | None) -> None:
    """Print to the terminal. Tokenizes into the cache, where a run finds it again; loads no model.

    policy: the artifact whose tokenizer counts; None before an earlier step of the run has made it.
    """
    tokenizer = load_tokenizer(model_to_preview(job.model, policy, f"{step.value}.policy"))
    built = build_data(job, step, data, PREFERENCES, tokenizer, progress.say)
    pairs = built.train
    lengths = np.concatenate([pairs.chosen_lengths, pairs.lengths - pairs.chosen_lengths])
    show_preview(
        a_few(pairs, job.seed, lambda index, marked: pair_runs(pairs[index], tokenizer, marked=marked)),
        lengths.tolist(),
        built.ledger.lines(),
        float(pairs.trained.sum() / lengths.sum()),
        data.max_length,
    )


def pair_runs(pair: TokenizedPair, tokenizer: PreTrainedTokenizerFast, *, marked: bool = False) -> list[Run]:
    """The prompt once, then what follows it on the chosen side, then on the rejected one.

    marked: with control tokens between stars.
    """
    chosen, rejected = prompt_length(pair.chosen), prompt_length(pair.rejected)
    return [
        (f"prompt ({chosen} tokens):\n", False),
        *document_runs(pair.chosen, tokenizer, 0, chosen, marked=marked),
        ("\nchosen:\n", False),
        *document_runs(pair.chosen, tokenizer, chosen, len(pair.chosen.input_ids), marked=marked),
        ("\nrejected:\n", False),
        *document_runs(pair.rejected, tokenizer, rejected, len(pair.rejected.input_ids), marked=marked),
        *([(f"\nmargin: {pair.margin:g}", False)] if pair.margin else []),
    ]


def _marked(runs: Sequence[Run], brackets: tuple[str, str]) -> list[tuple[str, str]]:
    begin, end = brackets
    return [
        (f"{begin}{printable(text)}{end}", "bold green") if is_trained else (printable(text), "dim")
        for text, is_trained in runs
    ]


def histogram_lines(lengths: Sequence[int], max_length: int, buckets: int = 10) -> list[str]:
    """Document lengths as lines of text: a summary, then one bar per bucket of equal width."""
    if not lengths:
        return ["no documents"]
    ordered = sorted(lengths)
    count, longest = len(ordered), ordered[-1]
    over = sum(1 for length in ordered if length > max_length)
    summary = (
        f"{count:,} documents, {sum(ordered):,} tokens; median {ordered[count // 2]:,}, longest {longest:,}"
    )
    summary += f"; max_length {max_length:,}" + (f" ({over:,} longer)" if over else "")
    width = max(1, -(-(longest + 1) // buckets))
    counts = [0] * (longest // width + 1)
    for length in ordered:
        counts[length // width] += 1
    digits = len(f"{longest:,}")
    lines = []
    for index, number in enumerate(counts):
        bar = "#" * max(round(_BAR_WIDTH * number / max(counts)), 1 if number else 0)
        low, high = index * width, min((index + 1) * width - 1, longest)
        lines.append(f"  {low:>{digits},}-{high:<{digits},} {bar:<{_BAR_WIDTH}} {number:,}")
    return [summary, *lines]


def _brackets(encoding: str) -> tuple[str, str]:
    """Marks around trained text that the output can show."""
    try:
        "⟦⟧".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "[[", "]]"
    return "⟦", "⟧"
