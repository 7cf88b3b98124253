"""Values as people and JSON read them: the nearest known name, text a terminal can show, errors in a line,
and plain values.

Imports nothing heavy.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

_CONTROLS = [*range(9), *range(11, 32), 127]
_ESCAPED = [*range(128, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_ACTED_ON: dict[int, str] = {
    **{code: chr(0x2421 if code == 127 else 0x2400 + code) for code in _CONTROLS},
    **{code: ascii(chr(code))[1:-1] for code in _ESCAPED},
}


def printable(text: str) -> str:
    """`text` with what a terminal would act on made visible: newline and tab stay.

    ASCII's control codes become the symbols of their names, the others, signs that turn the direction of
    writing, and halves of characters their escapes.
    """
    return text.translate(_ACTED_ON)


def one_line(error: BaseException, width: int = 300) -> str:
    """An error's text, cut to `width` characters."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # it may hold anything, such as a number with more digits than Python writes
        text = "(cannot be shown)"
    return text if len(text) <= width else text[: width - 3] + "..."


def told(error: BaseException) -> str:
    """An error in one line, with its type: a KeyError's text alone is a key."""
    return f"{type(error).__name__}: {one_line(error)}"


def nearest(word: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The known names most like `word`, the most alike first; empty when none is much like it."""
    return difflib.get_close_matches(word, list(known), count, cutoff)


def did_you_mean(
    word: str, known: Iterable[str], otherwise: str, *, prefix: str = "", cutoff: float = 0.6
) -> str:
    """The hint for an unknown name: the nearest known one, with `prefix` before it, or `otherwise`."""
    near = nearest(word, known, cutoff=cutoff)
    return f"did you mean {prefix}{near[0]}?" if near else otherwise


def plain(
    value: Any,
    *,
    not_finite: Callable[[float], Any] = lambda value: None,
    unknown: Callable[[Any], Any] = str,
) -> Any:
    """`value` in terms of JSON: enums by value, paths as text, sets as sorted lists.

    not_finite: what stands for NaN and infinities, by default null. unknown: for objects JSON does not have.
    """

    def inner(value: Any) -> Any:
        return plain(value, not_finite=not_finite, unknown=unknown)

    if isinstance(value, Enum):
        return inner(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else not_finite(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(inner(key)): inner(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [inner(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(inner, value), key=str)
    return str(value) if isinstance(value, os.PathLike) else unknown(value)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines with the cells of all rows in aligned columns. right: columns of numbers, which end below each
    other.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
