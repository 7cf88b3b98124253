"""Questions about the configuration's schema: which keys exist, of what type, and which is nearest.

Pure: takes dotted keys, returns keys, types or text. Knows the schema, not its values.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator
from typing import Any

from common.fields import types_of, without_none
from pipeline.config import PipelineConfig

LONGEST_KEY = 200
"""Characters up to which a key is compared with known ones: likeness takes the square of their number."""


def known_keys() -> list[str]:
    """Every dotted key of the schema that can be set, groups included, in the schema's order."""
    return [key for key, _, _ in walk() if "[]" not in key]


def walk(owner: type = PipelineConfig, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """(key, class that has it, its name there) of all keys below a class, in the schema's order; groups and
    entries of lists, with `[]` behind the list's name, included."""
    for name, declared in types_of(owner).items():
        yield prefix + name, owner, name
        inner, joint = without_none(declared), ""
        if typing.get_origin(inner) is list:
            (inner,), joint = typing.get_args(inner), "[]"
        yield from walk(inner, f"{prefix}{name}{joint}.")


def type_of(key: str) -> Any:
    """Declared type of a dotted key; None when it does not exist. Below a mapping anything exists."""
    declared: Any = PipelineConfig
    for part in key.split("."):
        declared = without_none(declared)
        if typing.get_origin(declared) is dict:
            return Any
        fields = types_of(declared)
        if part not in fields:
            return None
        declared = fields[part]
    return declared


def keys_of_type(declared: type) -> list[str]:
    """Every key of this type, e.g. sft.data and its like for DataConfig."""
    return [key for key in known_keys() if without_none(type_of(key)) is declared]


def is_free_form(key: str) -> bool:
    """Whether the key lies below a mapping with keys of the user's choice, such as model.config."""
    parts = key.split(".")
    parents = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(typing.get_origin(without_none(type_of(parent))) is dict for parent in parents)


def is_text(key: str) -> bool:
    """Whether the key takes text."""
    return without_none(type_of(key)) is str


def in_a_list(key: str) -> str | None:
    """How to write a key that lies in an entry of a list (ppo.rewards.function), or None when it does not."""
    parts = re.sub(r"\[(\d*)\]", r".\1", key).split(".")
    for end in range(1, len(parts)):
        place = ".".join(parts[:end])
        declared = without_none(type_of(place))
        if typing.get_origin(declared) is list:
            (item,) = typing.get_args(declared)
            fields = list(types_of(item))
            rest = [part for part in parts[end:] if part and not part.isdigit()]
            if not fields or not rest:
                return None
            entry = nearest(rest[0], fields) or fields[0]
            shown = dict.fromkeys([*(name for name in fields if name == "path"), entry])  # a source needs one
            return f"{place} is a list: '{place}=[{{{', '.join(f'{name}: …' for name in shown)}}}]'"
    return None


def nearest(key: str, candidates: list[str] | None = None) -> str | None:
    """The known key most like `key`, or None when none is much like it.

    The last part counts most: whoever writes sft.lr means sft.optim.lr.
    """
    known = known_keys() if candidates is None else candidates
    if len(key) > LONGEST_KEY:
        return None
    parent = key.rpartition(".")[0]
    best: tuple[float, str] | None = None
    for other in known:
        leaves = _likeness(_leaf(key), _leaf(other))
        # Short words are like many others by chance: elsewhere in the tree the bar is higher.
        if leaves >= (0.6 if other.rpartition(".")[0] == parent else 0.75):
            likeness = leaves + 0.5 * _likeness(key, other)
            if best is None or likeness > best[0]:
                best = likeness, other
    return None if best is None else best[1]


def _leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _likeness(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()
