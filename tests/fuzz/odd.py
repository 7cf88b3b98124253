"""Odd values and damaged bytes, drawn from a seeded generator."""

from __future__ import annotations

import math
import random
import unicodedata
from collections.abc import Mapping
from typing import Any

ESCAPES = ("\x1b[31mred", "\x1b]0;title\x07", "a\rb", "\x00", "\x9b2J", "\u202etxt", "\ud800", "\x7f\x08")
TEXTS = (
    "", " ", "a", "???", "null", "~", "1", "-7", "1.5", "1e5", "inf", "nan", " 7 ", "0x10", "1_000", "true",
    "Yes", "off", "../..", "/", "a=b", "[1,2]", "{a: 1}", "'", '"', "a" * 300, "\U0001f600", "\u0663",
    "é\u0301", "{{ 7 * 7 }}", "{% for a in b %}", "%s%n", "<|im_end|>", *ESCAPES,
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 0.0, -0.0, 0.5, 1.5, -2.5, math.inf, -math.inf, math.nan, 1e-320, 1e-7, 1e15, 1e30,
    1e300, 2**31, 2**63 - 1, 2**63, 99_999_999_999, 10**400,
)  # fmt: skip
NESTED: tuple[Any, ...] = (
    [], {}, [1], [None], [[]], ["a"], ["a", 1.5, None], {"a": 1}, {"a": {"b": []}}, {"\x1b[2J": 1}, {1: 2},
)  # fmt: skip


def value(draw: random.Random) -> Any:
    """Anything that YAML, JSON or the command line can hold."""
    pool = draw.choice((NUMBERS, TEXTS, NESTED, (None, True, False), (deep(draw),)))
    return draw.choice(pool)


def deep(draw: random.Random) -> Any:
    """Lists or mappings inside each other."""
    found: Any = 1
    for _ in range(draw.choice((10, 99, 101, 300))):
        found = [found] if draw.random() < 0.5 else {"a": found}
    return found


def changed(draw: random.Random, whole: Any) -> Any:
    """A copy of a JSON value of which one part, at any depth, is replaced, renamed, doubled or gone."""
    if isinstance(whole, Mapping) and whole and draw.random() < 0.8:
        name, copy = draw.choice(sorted(whole, key=str)), dict(whole)
        act = draw.choice(("change", "change", "change", "rename", "drop", "add"))
        if act == "change":
            copy[name] = changed(draw, whole[name])
        elif act == "add":
            copy[draw.choice(TEXTS)] = value(draw)
        else:
            taken = copy.pop(name)
            copy |= {name + draw.choice(TEXTS): taken} if act == "rename" else {}
        return copy
    if isinstance(whole, list) and whole and draw.random() < 0.8:
        place = draw.randrange(len(whole))
        inner = draw.choice(([changed(draw, whole[place])], [], [whole[place]] * 2, [whole]))
        return [*whole[:place], *inner, *whole[place + 1 :]]
    if isinstance(whole, str) and draw.random() < 0.5:
        place = draw.randint(0, len(whole))
        return whole[:place] + draw.choice(TEXTS) + whole[place:]
    return value(draw)


def damaged(draw: random.Random, content: bytes) -> bytes:
    """The bytes with one thing changed; now and then that is the same content."""
    place = draw.randint(0, len(content))
    length = draw.choice((1, 1, 1, 2, 8, 64))
    before, cut, after = content[:place], content[place : place + length], content[place + length :]
    other = draw.choice(
        (
            bytes(byte ^ (1 << draw.randrange(8)) for byte in cut), bytes(len(cut)), b"\xff" * len(cut), b"",
            cut * 2, draw.randbytes(length), draw.choice(TEXTS).encode("utf-8", "surrogatepass"), b"\n", b'"',
            b"[" * 100_000,
        )
    )  # fmt: skip
    replaced, inserted = before + other + after, before + other + cut + after
    return draw.choice((replaced, replaced, inserted, before, after))


def raw(text: str) -> str:
    """What in a shown text a terminal would act on; not line ends and tabs."""
    return "".join(
        sign for sign in text if sign not in "\n\t" and unicodedata.category(sign) in ("Cc", "Cs")
        or unicodedata.bidirectional(sign) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    )  # fmt: skip
