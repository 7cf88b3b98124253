"""Samples side by side: what the policy answered to the same prompts at the first evaluation and at the last.

Prompts are shown in the order of the file, not picked; where samples carry scores, those that lost most are
shown as well. Samples in, pairs out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.files import SampleRow, Samples

SHOWN = 6
FURTHER = 18
"""Pairs that are folded away below them."""
LOSSES_SHOWN = 4
LONG = 600
"""Characters from which a text is folded away."""

_MARKUP = re.compile(
    r"(<\|im_start\|>\w+\n|<\|[^|<>\n]{1,40}\|>|</?s>|<start_of_turn>\w+\n|<end_of_turn>|\[/?INST\])"
)


@dataclass(frozen=True)
class Pair:
    """One prompt and its responses."""

    prompt: str
    before: SampleRow | None
    after: SampleRow


@dataclass(frozen=True)
class Comparison:
    """What is shown of a step's samples."""

    before_step: int | None  # None: there is one evaluation only
    after_step: int
    mode: str
    pairs: list[Pair]  # of all prompts
    losses: list[Pair]  # those whose score fell most
    judged_by: str  # what `losses` are ordered by


def compare(samples: Samples, functions: Sequence[str] = ()) -> Comparison | None:
    """Pairs to show; None without samples. functions: names of scores, the first one judges losses."""
    if not samples:
        return None
    first, last = min(samples), max(samples)
    modes = {sample.mode for sample in samples[last]}
    mode = "sampled" if "sampled" in modes else min(modes)
    before: dict[str, SampleRow] = {}
    after: dict[str, SampleRow] = {}  # the first sample of each prompt, in the order of the file
    for side, step in ((before, first), (after, last)):
        for sample in samples[step]:
            if sample.mode == mode:
                side.setdefault(sample.prompt, sample)
    pairs = [Pair(prompt, before.get(prompt), sample) for prompt, sample in after.items()]
    judged_by = next((name for name in functions if any(name in s.scores for s in after.values())), "reward")
    falls = [(fall, pair) for pair in pairs if (fall := _fall(pair, judged_by)) > 0]
    losses = [pair for _, pair in sorted(falls, key=lambda item: -item[0])]
    before_step = first if first != last else None
    return Comparison(before_step, last, mode, pairs, losses[:LOSSES_SHOWN], judged_by)


def parts(text: str) -> list[tuple[str, bool]]:
    """Text in pieces, each with whether it is a marker of a chat template, which the page shows faintly."""
    return [(piece, index % 2 == 1) for index, piece in enumerate(_MARKUP.split(text)) if piece]


def _fall(pair: Pair, name: str) -> float:
    """By how much the score of a prompt's response fell; 0 when it is not known."""
    if pair.before is None:
        return 0.0
    sides = (pair.before, pair.after)
    earlier, later = (side.reward if name == "reward" else side.scores.get(name) for side in sides)
    return 0.0 if earlier is None or later is None else earlier - later
