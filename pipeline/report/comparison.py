"""Samples side by side: what was answered to the same prompts, by one policy over time or by several.

Of one run these are the first evaluation and the last, of several runs the last of each. Prompts are shown in
the order of the file, not picked; where samples carry scores, those that differ most are shown as well.
Samples in, rows out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from common.stage import Step
from pipeline.report.files import SampleRow, Samples

SHOWN = 6
FURTHER = 18
"""Prompts that are folded away below them."""
LOSSES_SHOWN = 4
LONG = 600
"""Characters from which a text is folded away."""

_MARKUP = re.compile(
    r"(<\|im_start\|>\w+\n|<\|[^|<>\n]{1,40}\|>|</?s>|<start_of_turn>\w+\n|<end_of_turn>|\[/?INST\])"
)


@dataclass(frozen=True)
class Side:
    """The samples of one column. run: which of several runs; None: of the only one."""

    step: str
    at: int  # the step or iteration of the evaluation
    rows: Sequence[SampleRow]
    run: int | None = None

    @property
    def word(self) -> str:
        """What its evaluations are counted in."""
        return "iteration" if self.step == Step.ppo.value else "step"

    @property
    def mode(self) -> str:
        """Of its samples that are shown: sampled ones where there are greedy ones too; "" where all are
        alike.
        """
        modes = {row.mode for row in self.rows}
        return "sampled" if "sampled" in modes else min(modes, default="")


@dataclass(frozen=True)
class Answers:
    """One prompt, and what each side answered; None where it was not asked."""

    prompt: str
    sides: list[SampleRow | None]


@dataclass(frozen=True)
class Comparison:
    """What is shown of samples."""

    sides: list[Side]
    prompts: list[Answers]  # all of them
    extremes: list[Answers]  # those whose score fell most, or differs most between runs
    judged_by: str  # what `extremes` are ordered by


def over_time(step: str, samples: Samples, functions: Sequence[str] = ()) -> Comparison | None:
    """One run: its first evaluation and its last; None without samples.

    functions: names of scores, the first one judges what fell.
    """
    steps = sorted({min(samples), max(samples)}) if samples else []
    return compare([Side(step, at, samples[at]) for at in steps], functions)


def compare(sides: Sequence[Side], functions: Sequence[str] = ()) -> Comparison | None:
    """What is shown of these sides: prompts that the last one was asked, of several runs those that two were.

    Of each prompt the first sample counts. Prompts of several runs are the same where they are but for the
    markers of their templates. None where nothing is left.
    """
    if not sides:
        return None
    is_of_runs = sides[-1].run is not None
    found = [_first_of_each(side, bare=is_of_runs) for side in sides]
    asked = dict.fromkeys(key for side in (found if is_of_runs else found[-1:]) for key in side)
    rows = [[side.get(key) for side in found] for key in asked]
    if is_of_runs:
        counts = [sum(sample is not None for sample in row) for row in rows]
        shared = [(-count, row) for count, row in zip(counts, rows, strict=True) if count > 1]
        rows = [row for _, row in sorted(shared, key=lambda item: item[0])]  # of most runs first
    prompts = [Answers(next(filter(None, reversed(row))).prompt, row) for row in rows]
    if not prompts:
        return None
    scored = [sample for answers in prompts for sample in answers.sides if sample is not None]
    judged_by = next((name for name in functions if any(name in s.scores for s in scored)), "reward")
    sizes = [(_difference(answers.sides, judged_by, is_of_runs), answers) for answers in prompts]
    extremes = [answers for size, answers in sorted(sizes, key=lambda item: -item[0]) if size > 0]
    return Comparison(list(sides), prompts, extremes[:LOSSES_SHOWN], judged_by)


def parts(text: str) -> list[tuple[str, bool]]:
    """Text in pieces, each with whether it is a marker of a chat template, which the page shows faintly."""
    return [(piece, index % 2 == 1) for index, piece in enumerate(_MARKUP.split(text)) if piece]


def _first_of_each(side: Side, *, bare: bool) -> dict[str, SampleRow]:
    """The first sample of each prompt, in the order of the file."""
    found: dict[str, SampleRow] = {}
    mode = side.mode
    for row in side.rows:
        if row.mode == mode:
            found.setdefault(_without_markup(row.prompt) if bare else row.prompt, row)
    return found


def _without_markup(prompt: str) -> str:
    return "".join(piece for piece, is_marker in parts(prompt) if not is_marker).strip()


def _difference(sides: Sequence[SampleRow | None], name: str, is_of_runs: bool) -> float:
    """By how much the score of a prompt's answers fell, or how far those of runs lie apart; 0: not known."""
    scores = [None if s is None else s.reward if name == "reward" else s.scores.get(name) for s in sides]
    known = [score for score in scores if score is not None]
    if len(known) < 2:
        return 0.0
    return max(known) - min(known) if is_of_runs else known[0] - known[-1]
