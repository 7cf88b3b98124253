"""The gold scorer: how good a completion really is, by program. The reward model never sees it.

`score(prompt, completion)` gives a Score; `gold`, `correct` and `style` give one part of it for many
completions, as reward functions do (`demo.gold:gold`); `python -m demo.gold samples.jsonl` prints the means
over a file of samples. A right answer in one word is worth 0.4; saying it as a full sentence adds 0.3, and
opening with one short courtesy adds 0.3. A wrong answer is worth nothing, however polite, and what is said is
read as a whole: `The sum is 3.` and `3 + 0 is 3.` answer 3 + 0, `3 + 3 is 3.` and `2 + 1 is 3.` do not.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.tasks import Question, understand

COURTESIES = ("Sure!", "Of course!", "Gladly!")
LONGEST_ANSWER = 16  # words; more is rambling
_WORD = re.compile(r"\w+")
_END = re.compile(r"[.!?]+(?:\s+|$)")  # of a statement; the point in 1.5 ends none


@dataclass(frozen=True)
class Score:
    """All three from 0 to 1. total = correct × (0.4 + 0.6 × style)."""

    total: float
    correct: float
    style: float


def score(prompt: str, completion: str) -> Score:
    """Judge one completion; ValueError when the prompt is none of the demo's."""
    right, said = right_statements(understand(prompt)), statements(completion)
    # all of it has to be right: neither many answers nor the answer to another question are an answer
    is_correct = float(bool(said) and right.issuperset(said))
    points = form(completion)
    return Score(total=is_correct * (0.4 + 0.6 * points), correct=is_correct, style=points)


def right_statements(question: Question) -> set[str]:
    """What may be said, without its full stop: the answer, or one of the task's sentences with it."""
    task, answer = question.task, question.answer
    full = {task.full_sentence.format(x=subject, answer=answer) for subject in question.spellings}
    return {answer, *(said.removesuffix(".") for said in (task.sentence.format(answer=answer), *full))}


def statements(completion: str) -> list[str]:
    """What a completion says, without courtesies; a courtesy alone says nothing."""
    parts = (" ".join(part.split()) for part in _END.split(completion))
    return [part for part in parts if part and f"{part}!" not in COURTESIES]


def form(completion: str) -> float:
    """Half for one courtesy in front, half for one full sentence; nothing for rambling."""
    text = completion.strip()
    if len(_WORD.findall(text)) > LONGEST_ANSWER:
        return 0.0
    courtesy = next((opening for opening in COURTESIES if text.startswith(opening + " ")), "")
    rest = text.removeprefix(courtesy).strip()
    if not rest or any(opening in rest for opening in COURTESIES):
        return 0.0
    is_sentence = re.fullmatch(r"[A-Z0-9][^.!?]*\.", rest) is not None and len(rest.split()) >= 3
    return 0.5 * bool(courtesy) + 0.5 * is_sentence


def gold(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[object]) -> list[float]:
    """Totals, one per completion. prompts: of each, as a row has it; columns: whatever else, not used.

    ValueError when a prompt is none of the demo's.
    """
    return [judged.total for judged in _judged(prompts, completions)]


def correct(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[object]) -> list[float]:
    """1 for a right answer, however it is said; see `gold`."""
    return [judged.correct for judged in _judged(prompts, completions)]


def style(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[object]) -> list[float]:
    """How well it is said, right or wrong; see `gold`."""
    return [judged.style for judged in _judged(prompts, completions)]


def mean(scores: Iterable[Score]) -> Score:
    """Component-wise mean; zeros for no scores."""
    listed = list(scores)
    count = max(len(listed), 1)
    return Score(
        sum(s.total for s in listed) / count,
        sum(s.correct for s in listed) / count,
        sum(s.style for s in listed) / count,
    )


def _judged(prompts: Sequence[str], completions: Sequence[str]) -> list[Score]:
    return [score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def main(arguments: list[str]) -> int:
    """Print the mean scores of the last step in a samples.jsonl (rows with prompt, completion and step)."""
    if len(arguments) != 1:
        print("usage: python -m demo.gold runs/demo/sft/samples.jsonl", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in Path(arguments[0]).read_text("utf-8").splitlines()]
    last = max((row.get("step", 0) for row in rows), default=0)
    scores = [score(row["prompt"], row["completion"]) for row in rows if row.get("step", 0) == last]
    average = mean(scores)
    print(f"gold over {len(scores)} samples of step {last}:", end=" ")
    print(f"total {average.total:.3f}, correct {average.correct:.3f}, style {average.style:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
