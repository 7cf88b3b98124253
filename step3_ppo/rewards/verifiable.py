"""Verifiable rewards: 1 for a completion with the right answer, 0 for any other.

For `ppo.rewards`, e.g. `{function: 'step3_ppo.rewards.verifiable:gsm8k'}`. Takes completions and the rows'
column `answer`; returns a float for each completion. Compares numbers exactly, as fractions, and evaluates
nothing: `6*7` is not 42.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

MARKER = "####"
"""Stands before the final answer in GSM8K's solutions (arXiv 2110.14168)."""

LONGEST_NUMBER = 100
"""Characters; a longer number is never right."""

# A minus is a sign unless it follows something that can be subtracted from. A comma belongs to a number only
# before three digits; a point only before a digit, so that a sentence may end in a number.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])(?P<minus>[-−]))?[$€£]?"
    r"(?P<value>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
    r"(?:/(?P<divisor>(?!0+(?![0-9]))[0-9]+)(?![0-9]|[.,][0-9]))?"
)


def gsm8k(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """1 where the last number of the completion equals the number after #### in the row's answer.

    `72`, `$72`, `72.00` and `144/2` are the same number. An answer without #### must be a number itself.
    ValueError for a row whose answer has none: no completion could ever be right.
    """
    pairs = zip(completions, answer, strict=True)
    return [float(last_number(completion) == reference_number(right)) for completion, right in pairs]


def exact_match(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """1 where the completion is the row's answer, word for word; only white space may differ."""
    pairs = zip(completions, answer, strict=True)
    return [float(completion.split() == str(right).split()) for completion, right in pairs]


def last_number(text: str) -> Fraction | None:
    """The last number in a text; None without one."""
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    return None if found is None else _fraction(found)


def reference_number(answer: Any) -> Fraction:
    """The number in a row's answer. ValueError without one."""
    text = str(answer)
    _, marker, after = text.rpartition(MARKER)
    found = _NUMBER.search(after) if marker else _NUMBER.fullmatch(text.strip())
    number = None if found is None else _fraction(found)
    if number is None:
        raise ValueError(f"the row's answer {text[-60:]!r} names no number after {MARKER}")
    return number


def _fraction(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > LONGEST_NUMBER:
        return None
    value = Fraction(found["value"].replace(",", "")) / Fraction(found["divisor"] or 1)
    return -value if found["minus"] else value
