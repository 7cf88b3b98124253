"""Settings as they are written in, a schema's dataclasses out: types, ranges and rules in one loop.

A field with a number is made by `number`, which says its range; `docs/keys.md` prints it. `as_schema` knows
the dotted path of each key, so a message names the key where it is set. Rules between the keys of a group are
its method `check`, which is given that path.
"""

import functools
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

from common.errors import UserError
from common.text import did_you_mean

T = TypeVar("T")

MISSING = "???"
"""What Hydra and OmegaConf take for a value that is still to come."""
MAX_DEPTH = 20
"""Of lists and mappings inside each other; Hydra and OmegaConf descend as deep, several frames for each."""
TOO_DEEP = f"lists or mappings nested deeper than {MAX_DEPTH}"
EMPTY_TOO = {"empty_too": True}
"""Metadata of a field whose texts may be empty."""


class UnknownKey(UserError):
    """A key that the schema does not have; `hint` names the nearest beside it."""

    def __init__(self, key: str, hint: str) -> None:
        super().__init__(f"unknown key {key}", hint=hint)
        self.key = key


@dataclass(frozen=True)
class Range:
    """The numbers a key may have; inf and nan are in none."""

    minimum: float
    maximum: float
    above: bool = False
    """the minimum itself is not allowed"""
    below: bool = False
    """the maximum itself is not allowed"""
    zero: str = ""
    """what 0 stands for, which is allowed too"""
    note: str = ""
    """why, or the way out"""

    def holds(self, value: float) -> bool:
        """Whether the number is allowed; false for nan."""
        low = value > self.minimum if self.above else value >= self.minimum
        high = value < self.maximum if self.below else value <= self.maximum
        return (low and high) or (value == 0 and bool(self.zero))

    def __str__(self) -> str:
        low, high = (
            f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.minimum, self.maximum)
        )
        if self.above:
            words = f"above {low}, {'below' if self.below else 'up to'} {high}"
        else:
            words = f"{low} {'up to (not including)' if self.below else 'to'} {high}"
        words = f"0 ({self.zero}), or {words}" if self.zero else words
        return f"{words} ({self.note})" if self.note else words


def number(default: Any, minimum: float, maximum: float, **further: Any) -> Any:
    """A field with a number, or a list or mapping of numbers, in the `Range` of these bounds."""
    metadata = {"range": Range(minimum, maximum, **further)}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def is_deeper(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Whether lists and mappings lie deeper inside each other; descends no further."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(levels == 0 or is_deeper(each, levels - 1) for each in inner)


def as_schema(schema: type[T], written: Mapping[str, Any], at: str = "") -> T:
    """An object of the schema, with the written values and defaults for the others.

    at: what its keys begin with (`ppo.critic.`). UserError for the first key that does not exist, or has a
    value that it cannot have.
    """
    known, types = fields_of(schema), types_of(typing.cast(Any, schema))
    values = {}
    for name, value in written.items():
        if name not in known:
            listed = f"known{' below ' + at[:-1] if at else ''}: {', '.join(known)}"
            raise UnknownKey(f"{at}{name}", did_you_mean(str(name), known, listed))
        values[name] = _value(f"{at}{name}", types[name], value, known[name].metadata)
    made = schema(**values)
    if hasattr(made, "check"):
        made.check(at)
    return made


def _value(key: str, declared: Any, value: Any, about: Mapping[str, Any]) -> Any:
    """The value in its declared type. about: the metadata of its field."""
    inner = without_none(declared)
    if value is None and inner is not declared:
        return value
    if inner is Any and not (isinstance(value, str) and value == MISSING):
        if is_deeper(value):
            raise UserError(f"{key} holds {TOO_DEEP}")
        return value
    items = typing.get_args(inner)
    if is_dataclass(inner) and isinstance(value, Mapping):
        return as_schema(typing.cast(Any, inner), value, f"{key}.")
    if items and isinstance(value, typing.get_origin(inner)):
        if isinstance(value, Mapping):
            return {str(name): _value(f"{key}.{name}", items[1], each, about) for name, each in value.items()}
        return [_value(f"{key}[{index}]", items[0], each, about) for index, each in enumerate(value)]
    found = _plain(inner, value)
    allowed = about.get("range")
    if found is None or value == MISSING:
        way_out = about.get("way_out", "").format(at=key.rpartition(".")[0] + ".")
        shown = "null" if value is None else repr(value)
        raise UserError(f"{key}: invalid value {shown}", hint=way_out or expected(key, declared, allowed))
    if isinstance(found, str):
        require(
            bool(found.strip()) or bool(about.get("empty_too")), key, repr(found), "a text that is not empty"
        )
        # bytes of a command line that are no UTF-8 come as halves of characters, which no file can hold
        require(not any("\ud800" <= sign <= "\udfff" for sign in found), key, ascii(found), "text in UTF-8")
    if allowed is not None:
        require(allowed.holds(found), key, found, str(allowed))
    return found


def _plain(declared: Any, value: Any) -> Any:
    """The value as bool, int, float, text or an enum's member; None when it is no such thing.

    A text is read, as YAML or the environment may hold a number or yes and no; nothing else is changed but
    a whole number into a number, and 0 and 1 into no and yes.
    """
    if isinstance(declared, type) and issubclass(declared, Enum):
        return declared.__members__.get(str(value))
    if declared is str:
        return str(value) if isinstance(value, (str, int, float)) else None
    if declared is bool:
        return BOOLS.get(str(value).lower()) if isinstance(value, (str, int)) else None
    if declared not in (int, float) or isinstance(value, bool):
        return None
    if not isinstance(value, (str, int) if declared is int else (str, int, float)):
        return None
    try:
        return declared(value)
    except (ValueError, OverflowError):
        return None


_YES, _NO = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
BOOLS = {**dict.fromkeys(_YES, True), **dict.fromkeys(_NO, False)}


def expected(key: str, declared: Any, allowed: Range | None = None) -> str:
    """What a key takes, in words."""
    inner = without_none(declared)
    if isinstance(inner, type) and issubclass(inner, Enum):
        return "allowed: " + ", ".join(inner.__members__)
    if typing.get_origin(inner) is list:
        (item,) = typing.get_args(inner)
        if isinstance(item, type) and issubclass(item, Enum):
            names = list(item.__members__)
            return f"expected a list of {', '.join(names)}, e.g. '{key}=[{names[0]}]'"
        if keys := ", ".join(fields_of(item)):
            return f"expected a list, e.g. '{key}=[{{…}}]', whose entries have the keys {keys}"
        return f"expected a list, e.g. '{key}=[...]'"
    if is_dataclass(inner):
        return "it has the keys " + ", ".join(fields_of(inner))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "a value"}
    return f"expected {words.get(inner, 'a mapping')}" + (f", {allowed}" if allowed else "")


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise the standard error for a value out of range."""
    if not condition:
        raise UserError(f"{key}={value} is not allowed", hint=f"allowed: {allowed}")


def without_none(declared: Any) -> Any:
    """T for Optional[T], else the type itself."""
    if typing.get_origin(declared) is typing.Union:
        (declared,) = [arg for arg in typing.get_args(declared) if arg is not type(None)]
    return declared


def fields_of(declared: Any) -> dict[str, "Field[Any]"]:
    """A class's fields by name; empty for what is no group."""
    is_group = isinstance(declared, type) and is_dataclass(declared)
    return {each.name: each for each in fields(declared)} if is_group else {}


@functools.cache
def types_of(declared: Any) -> dict[str, Any]:
    """The declared types of `fields_of`."""
    hints = typing.get_type_hints(declared) if fields_of(declared) else {}
    return {name: hints[name] for name in fields_of(declared)}
