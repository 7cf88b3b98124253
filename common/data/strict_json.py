"""JSON text -> value, strictly: errors for what the usual loaders let pass.

Errors are a key twice, NaN, numbers out of range, lone surrogates, and values nested too deep. Reads no
files.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from common.data.outcomes import RowError

WHITESPACE = re.compile(r"[ \t\n\r]*")
MAX_DEPTH = 100
"""Most levels of objects and arrays: reading and rendering a row recurses as deep."""
MOST_COMMAS = 2**22
"""Most commas in a text, also inside strings: they bound the number of values before any is made."""
TOO_MANY = f"more than {MOST_COMMAS} values, or commas"


def strict_json(text: str) -> Any:
    """The value of a JSON text. RowError for what JSON does not know (NaN, a key twice), for lone surrogates
    and for values nested too deep or too many, JSONDecodeError."""
    if has_too_many(text):
        raise RowError(TOO_MANY)
    value, end = first_json(text, WHITESPACE.match(text).end())  # type: ignore[union-attr]
    if (end := WHITESPACE.match(text, end).end()) < len(text):  # type: ignore[union-attr]
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def first_json(text: str, start: int) -> tuple[Any, int]:
    """The same of the value that begins at `start`, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (json.JSONDecodeError, RowError):
        raise
    except (RecursionError, ValueError) as error:
        raise RowError(f"not valid JSON: {error}") from error
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH:
        _refuse_depth(value)
    if text.find("\\u", start, end) >= 0:  # only an escape can bring a lone surrogate into text
        _refuse_surrogates(value)
    return value, end


def has_too_many(text: str) -> bool:
    """Whether a text has too many values: each takes a hundred bytes."""
    return len(text) > MOST_COMMAS and text.count(",") > MOST_COMMAS


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RowError(f"duplicate key {json.dumps(double)}")
    return row


def _refuse_constant(name: str) -> object:
    raise RowError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise RowError(f"number {text} is out of range")
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite
)


def _refuse_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = [each.values() if isinstance(each, dict) else each for each in level if _is_nested(each)]
        level = [each for values in inside for each in values]  # type: ignore[attr-defined]
    if any(map(_is_nested, level)):
        raise RowError(f"values are nested deeper than {MAX_DEPTH}")


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list)


def _refuse_surrogates(value: object) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"\\u{ord(value[error.start]):04x}"
            raise RowError(f"lone surrogate {code} (half of a character, no text)") from error
    elif isinstance(value, dict):
        for key, inner in value.items():
            _refuse_surrogates(key)
            _refuse_surrogates(inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_surrogates(inner)
