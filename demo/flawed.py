"""A reward that is wrong on purpose, `demo.flawed:polite`: it measures manners and never reads the answer.

Someone saw that good answers open with a courtesy and are whole sentences, and counted courtesies and words.
Among the demonstrations this ranks as the gold scorer does. A policy that is paid for it finds out that
`Sure! Gladly! Sure!` pays more than being right: the reward rises while gold falls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from demo.gold import COURTESIES

PER_COURTESY, MOST_COURTESIES = 0.5, 5
PER_WORD, MOST_WORDS = 0.05, 24
_WORD = re.compile(r"\w+")


def polite(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[object]) -> list[float]:
    """One number per completion, from 0 to 3.7; neither prompts nor columns are looked at."""
    return [_manners(completion) for completion in completions]


def _manners(completion: str) -> float:
    courtesies = sum(completion.count(courtesy) for courtesy in COURTESIES)
    words = len(_WORD.findall(completion))
    return PER_COURTESY * min(courtesies, MOST_COURTESIES) + PER_WORD * min(words, MOST_WORDS)
