"""What the demo asks: six kinds of short questions, each with its wordings and its exact answers.

`TASKS` is all there is to know; `understand(prompt)` finds the task and the reference answer of a prompt.
Nothing here is random and nothing is read from disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

_WORD_LIST = (
    "apple bird boat book cat clock cloud cow cup dog door duck ear egg fish fox frog goat hand hat horse "
    "house key lamp leaf lion milk moon mouse rain ring ship stone sun tree wolf"
)
WORDS = tuple(_WORD_LIST.split())
CAPITALS = {
    "Austria": "Vienna",
    "Canada": "Ottawa",
    "China": "Beijing",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Russia": "Moscow",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Vietnam": "Hanoi",
}
OPPOSITES = {
    "big": "small",
    "black": "white",
    "day": "night",
    "dry": "wet",
    "empty": "full",
    "fast": "slow",
    "good": "bad",
    "happy": "sad",
    "high": "low",
    "hot": "cold",
    "left": "right",
    "long": "short",
    "loud": "quiet",
    "new": "old",
    "open": "closed",
    "strong": "weak",
    "thick": "thin",
    "true": "false",
    "up": "down",
    "warm": "cool",
}


@dataclass(frozen=True)
class Task:
    """One kind of question: `{x}` in a wording or in the sentence stands for the thing asked about."""

    kind: str
    wordings: tuple[str, ...]
    sentence: str  # the answer as a full sentence; its last word is the answer
    full_sentence: str  # the same, which also says what was asked about; nothing shipped says it
    answers: dict[str, str]


LARGEST_OPERAND = 3
_OPERANDS = range(LARGEST_OPERAND + 1)

TASKS = (
    Task(
        "sum",
        (
            "What is {x}?",
            "Add up {x}.",
            "What do you get for {x}?",
            "How much is {x}?",
            "Work out {x}, please.",
        ),
        "The sum is {answer}.",
        "{x} is {answer}.",
        {f"{a} + {b}": str(a + b) for a in _OPERANDS for b in _OPERANDS},
    ),
    Task(
        "capital",
        (
            "What is the capital of {x}?",
            "Name the capital of {x}.",
            "Which city is the capital of {x}?",
            "Capital of {x}?",
            "Tell me the capital of {x}.",
        ),
        "The capital is {answer}.",
        "The capital of {x} is {answer}.",
        CAPITALS,
    ),
    Task(
        "opposite",
        (
            "What is the opposite of {x}?",
            "Name the opposite of {x}.",
            "Which word is the opposite of {x}?",
            "Opposite of {x}?",
            "Tell me the opposite of {x}.",
        ),
        "The opposite is {answer}.",
        "The opposite of {x} is {answer}.",
        OPPOSITES,
    ),
    Task(
        "capitals",
        (
            "Write {x} in capital letters.",
            "Put {x} in upper case.",
            "How is {x} written in capitals?",
            "Spell {x} with capitals only.",
            "What is {x} in capital letters?",
        ),
        "In capital letters it is {answer}.",
        "In capital letters {x} is {answer}.",
        {word: word.upper() for word in WORDS},
    ),
    Task(
        "first_letter",
        (
            "What is the first letter of {x}?",
            "Name the first letter of {x}.",
            "Which letter does {x} begin with?",
            "First letter of {x}?",
            "Tell me the first letter of {x}.",
        ),
        "The first letter is {answer}.",
        "The first letter of {x} is {answer}.",
        {word: word[0] for word in WORDS},
    ),
    Task(
        "length",
        (
            "How many letters are in {x}?",
            "Count the letters of {x}.",
            "How long is the word {x}?",
            "Number of letters in {x}?",
            "Tell me how many letters {x} has.",
        ),
        "The number of letters is {answer}.",
        "The number of letters in {x} is {answer}.",
        {word: str(len(word)) for word in WORDS},
    ),
)


@dataclass(frozen=True)
class Question:
    """A prompt understood: which task, what it asks about, and the exact answer."""

    task: Task
    subject: str
    answer: str

    @property
    def spellings(self) -> tuple[str, ...]:
        """The subject, and a sum with its numbers the other way round."""
        first, plus, second = self.subject.partition(" + ")
        return (self.subject, f"{second} + {first}") if plus else (self.subject,)


def understand(prompt: str) -> Question:
    """The question that `prompt` asks, alone or inside a rendered chat; ValueError when it asks none."""
    for whole in (True, False):
        for task, pattern in _patterns():
            found = pattern.fullmatch(prompt.strip()) if whole else pattern.search(prompt)
            if found and found["x"] in task.answers:
                return Question(task, found["x"], task.answers[found["x"]])
    raise ValueError(f"not a question of the demo: {prompt!r}")


@cache
def _patterns() -> tuple[tuple[Task, re.Pattern[str]], ...]:
    """One pattern per task and wording; those with more words first, because they say more."""
    pairs = [(task, wording) for task in TASKS for wording in task.wordings]
    pairs.sort(key=lambda pair: -len(pair[1]))
    subject = r"(?P<x>\w+(?: \+ \w+)?)"
    return tuple((task, re.compile(re.escape(wording).replace(r"\{x\}", subject))) for task, wording in pairs)
