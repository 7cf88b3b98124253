"""Make the shipped data: `python -m demo.make_data` writes demo/data/*.jsonl, the same bytes every time.

sft.jsonl: prompt, completion, kind; demonstrations of mixed quality. preferences.jsonl: prompt, chosen and
rejected. prompts_train.jsonl: the prompts of both, each once, with kind and reference. sft_eval.jsonl,
preferences_eval.jsonl and prompts.jsonl: the same for held-out prompts. A held-out prompt is a wording and a
subject that never meet elsewhere, while each of the two is seen with others: it asks for what was learned, in
words that were not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from demo.gold import COURTESIES
from demo.tasks import TASKS, Task

FOLDER = Path(__file__).parent / "data"
SEED = 20
HELD_OUT_SHARE = 0.85  # of subjects, one wording each
DEMONSTRATIONS = 2  # per training prompt
DEMONSTRATIONS_OF_SUMS = 6  # of two numbers the answer follows, which is learned last
PAIRS = 7  # per training prompt
FORM_PAIRS = 4  # one training pair in so many is about the form of a right answer, not about being right
HELD_OUT_FORM_PAIRS = 2
TERSE, PLAIN, POLITE, EFFUSIVE = "terse", "plain", "polite", "effusive"
NUMBER_OF_COURTESIES = {PLAIN: 0, POLITE: 1, EFFUSIVE: 2}
FORM_SHARES = {TERSE: 0.42, PLAIN: 0.32, POLITE: 0.26}
WRONG_SHARE = 0.08
MISSPELLED_SHARE = 0.4  # of mistakes
FORM_PREFERENCES = (
    (POLITE, PLAIN), (POLITE, TERSE), (PLAIN, TERSE), (POLITE, EFFUSIVE), (PLAIN, EFFUSIVE),
)  # fmt: skip
FORMS_TO_BE_RIGHT_IN = (POLITE, POLITE, PLAIN, TERSE)  # mostly the one that policies will come to

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """A wording of a task, asked about one subject."""

    task: Task
    subject: str
    text: str


def make() -> dict[str, list[dict[str, str]]]:
    """All files by name, each as its rows."""
    draw = Random(SEED)  # noqa: S311 - the same data each time
    training, held_out = split_prompts(draw)
    return {
        "sft.jsonl": demonstrations(draw, [p for p in training for _ in range(how_often(p))]),
        "sft_eval.jsonl": demonstrations(draw, held_out, wrong_share=0.0),
        "preferences.jsonl": preferences(draw, training, PAIRS, FORM_PAIRS),
        "prompts_train.jsonl": with_references(training),
        "prompts.jsonl": with_references(held_out),
        "preferences_eval.jsonl": preferences(draw, held_out, 1, HELD_OUT_FORM_PAIRS),
    }


def split_prompts(draw: Random) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held out), both shuffled: at most one wording of a subject is held out."""
    training: list[Prompt] = []
    held_out: list[Prompt] = []
    for task in TASKS:
        for subject in task.answers:
            is_held_out = draw.random() < HELD_OUT_SHARE
            kept = _index(draw, len(task.wordings))
            for number, wording in enumerate(task.wordings):
                side = held_out if is_held_out and number == kept else training
                side.append(Prompt(task, subject, wording.format(x=subject)))
    return _shuffled(draw, training), _shuffled(draw, held_out)


def how_often(prompt: Prompt) -> int:
    """How many demonstrations answer a training prompt."""
    return DEMONSTRATIONS_OF_SUMS if prompt.task.kind == "sum" else DEMONSTRATIONS


def demonstrations(
    draw: Random, prompts: Sequence[Prompt], wrong_share: float = WRONG_SHARE
) -> list[dict[str, str]]:
    """Answers as people give them, one per prompt: most right; in one word, in a sentence, or politely."""
    rows = []
    for prompt in _shuffled(draw, prompts):
        is_wrong = draw.random() < wrong_share
        answer = wrong_answer(draw, prompt) if is_wrong else prompt.task.answers[prompt.subject]
        completion = phrase(draw, prompt, answer, _form(draw))
        rows.append({"prompt": prompt.text, "completion": completion, "kind": prompt.task.kind})
    return rows


def with_references(prompts: Sequence[Prompt]) -> list[dict[str, str]]:
    """Prompts alone, each with its right answer in one word."""
    return [{"prompt": p.text, "kind": p.task.kind, "reference": p.task.answers[p.subject]} for p in prompts]


def preferences(
    draw: Random, prompts: Sequence[Prompt], per_prompt: int, form_pairs: int
) -> list[dict[str, str]]:
    """Pairs that differ in one thing: one in `form_pairs` in the form of a right answer, the others in being
    right."""
    rows = []
    for number, prompt in enumerate(_shuffled(draw, [p for p in prompts for _ in range(per_prompt)])):
        right = prompt.task.answers[prompt.subject]
        if number % form_pairs == 0:
            better, worse = FORM_PREFERENCES[_index(draw, len(FORM_PREFERENCES))]
            chosen, rejected = (phrase(draw, prompt, right, form) for form in (better, worse))
        else:
            form = FORMS_TO_BE_RIGHT_IN[_index(draw, len(FORMS_TO_BE_RIGHT_IN))]
            chosen = phrase(draw, prompt, right, form)
            rejected = mistake(draw, prompt, form)
        rows.append({"prompt": prompt.text, "chosen": chosen, "rejected": rejected})
    return rows


def phrase(draw: Random, prompt: Prompt, answer: str, form: str) -> str:
    """An answer in one word, as a sentence, or as a sentence after one courtesy or two."""
    if form == TERSE:
        return answer
    sentence = prompt.task.sentence.format(answer=answer)
    courtesies = [COURTESIES[_index(draw, len(COURTESIES))] for _ in range(NUMBER_OF_COURTESIES[form])]
    return " ".join([*courtesies, sentence])


def mistake(draw: Random, prompt: Prompt, form: str) -> str:
    """What policies get wrong: a wrong answer (numbers off by one or two), or a misspelled one."""
    right = prompt.task.answers[prompt.subject]
    answer = near_miss(draw, prompt)
    if len(right) > 1 and draw.random() < MISSPELLED_SHARE:
        answer = spliced(draw, right, answer)
    return phrase(draw, prompt, answer, form)


def spliced(draw: Random, word: str, other: str) -> str:
    """The beginning of one word with the end of another, as small models spell; never the word itself."""
    kept = word[: 1 + _index(draw, len(word) - 1)]
    made = kept + other[_index(draw, len(other)) :]
    return made if made != word else kept


def near_miss(draw: Random, prompt: Prompt) -> str:
    """A wrong number off by one or two, where numbers are asked for; else any wrong answer of the task."""
    right = prompt.task.answers[prompt.subject]
    if not right.isdigit():
        return wrong_answer(draw, prompt)
    around = {int(right) + off for off in (-2, -1, 1, 2)}
    near = sorted(around & {int(answer) for answer in prompt.task.answers.values()})
    return str(near[_index(draw, len(near))])


def wrong_answer(draw: Random, prompt: Prompt) -> str:
    """The right answer to another question of the same task."""
    right = prompt.task.answers[prompt.subject]
    others = sorted({answer for answer in prompt.task.answers.values() if answer != right})
    return others[_index(draw, len(others))]


def write(folder: Path = FOLDER) -> None:
    """Write all files, one JSON object per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make().items():
        (folder / name).write_text(as_jsonl(rows), encoding="utf-8", newline="\n")


def as_jsonl(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _form(draw: Random) -> str:
    point = draw.random()
    for form, share in FORM_SHARES.items():
        point -= share
        if point < 0:
            return form
    return POLITE


def _index(draw: Random, count: int) -> int:
    """A number below `count`. Only `random()` is promised to give the same numbers on every Python."""
    return int(draw.random() * count)


def _shuffled(draw: Random, items: Sequence[T]) -> list[T]:
    keys = [draw.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


if __name__ == "__main__":
    write()
