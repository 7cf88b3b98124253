"""Rows for the tests with a real model: questions to a library's desk, which answers in a manner of its own.

Every answer thanks first and names the desk last, so that a few steps of training show in text that was held
out. Pairs have such an answer and a curt one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

THANKS = "Thank you for asking."
SIGNED = "Yours, the reading room."

ANSWERS: Mapping[str, str] = {
    "When do you open on Saturdays?": "On Saturdays we open at ten and close at four.",
    "How long may I keep a book?": "A book is yours for three weeks, or six when nobody waits for it.",
    "Can I renew a loan by telephone?": "Loans are renewed by telephone or at the desk.",
    "Where are the newspapers?": "Newspapers are on the first floor, beside the window.",
    "Do you lend films?": "Films are lent for one week, three at a time.",
    "What does a lost card cost?": "A new card costs four euros.",
    "May I bring coffee into the hall?": "Coffee stays in the cafe; water in a bottle is welcome.",
    "Is there a room for groups?": "Two rooms hold six people each and can be booked for a day.",
    "How do I return a book at night?": "The flap beside the door takes books at any hour.",
    "Can children have a card?": "Children from six years on have a card of their own, free of charge.",
    "Do you have maps of the old town?": "Maps from 1780 on are in the archive, by appointment.",
    "Who can help me with the catalogue?": "Somebody at the desk shows it to you every morning.",
    "Is the building accessible by wheelchair?": "A ramp leads to the side door, and a lift to every floor.",
    "Can I print from my phone?": "Send the file to the printer by the stairs; a page costs ten cents.",
    "Do you buy used books?": "We take used books as gifts on the first Monday of a month.",
    "What happens when I am late?": "Each day costs twenty cents a book, and at most five euros.",
}
CURT = ("No idea.", "Look it up yourself.", "Why do you want to know that?", "Ask somebody else.")


def polite(answer: str) -> str:
    """An answer in the desk's manner."""
    return f"{THANKS} {answer} {SIGNED}"


def write(folder: Path) -> list[str]:
    """Write rows, pairs and prompts; returns the overrides that name them."""
    rows = [[turn("user", asked), turn("assistant", polite(said))] for asked, said in ANSWERS.items()]
    pairs = [
        {"prompt": asked, "chosen": polite(said), "rejected": CURT[number % len(CURT)]}
        for number, (asked, said) in enumerate(ANSWERS.items())
    ]
    files = {
        "sft": _write(folder / "rows.jsonl", ({"messages": messages} for messages in rows)),
        "reward": _write(folder / "pairs.jsonl", pairs),
        "ppo": _write(folder / "prompts.jsonl", ({"prompt": asked} for asked in ANSWERS)),
    }
    files["dpo"] = files["reward"]
    return [f"{step}.data.path={path}" for step, path in files.items()]


def turn(role: str, content: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": content}


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
