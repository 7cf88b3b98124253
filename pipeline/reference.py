"""The reference of all keys: type, default, allowed values, and the line of documentation in the schema.

`python -m pipeline explain KEY` prints one key or one group; `python -m pipeline.reference` prints
`docs/keys.md`. Takes nothing but the schema; what `conf/` or an experiment sets is not looked at.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
import typing
from enum import Enum
from typing import Any

from common.errors import UserError
from common.fields import Range, fields_of, types_of, without_none
from pipeline import schema
from pipeline.habits import meant


@dataclasses.dataclass(frozen=True)
class Key:
    """One key. name: dotted, `[]` stands for an entry of a list."""

    name: str
    declared: Any
    default: str
    line: str  # of documentation
    range: Range | None = None

    @property
    def type_name(self) -> str:
        """In words: `text`, `whole number or null, 1 to 8`, `one of a, b`, `list of …`, `group`."""
        return _type_name(self.declared) + (f", {self.range}" if self.range else "")


def explain(name: str) -> str:
    """What a key, or each key of a group, means. UserError for a key that does not exist."""
    wanted = re.sub(r"\[\d*\]", "", name)
    names = {key: key.name.replace("[]", "") for key in keys()}
    found = [key for key, plain in names.items() if plain == wanted or plain.startswith(f"{wanted}.")]
    if not found:
        near = schema.nearest(name)
        way_out = f"did you mean {near}?" if near else "see docs/keys.md"
        raise UserError(f"there is no key {name}", hint=meant(name) or way_out)
    whole, *below = found
    lines = [f"{whole.name}: {whole.line}", f"  {whole.type_name}; default: {whole.default}"]
    shown = [key for key in below if names[key].count(".") == wanted.count(".") + 1]
    width = max((len(key.name) for key in shown), default=0)
    lines += [f"  {key.name:<{width}}  {key.line} ({key.type_name}; {key.default})" for key in shown]
    return "\n".join(lines)


def markdown() -> str:
    """`docs/keys.md`: a table for each class of the schema, under all the keys that have it."""
    places: dict[type, dict[str, None]] = {}
    for name, owner, _ in schema.walk():
        places.setdefault(owner, {})[name.rpartition(".")[0]] = None
    parts = [HEAD]
    for owner, names in places.items():
        title = ", ".join(f"`{name}`" for name in names if name) or "The run"
        own = [_key(name, owner, name) for name in fields_of(owner)]
        rows = [[f"`{key.name}`", key.type_name, key.default, key.line] for key in own]
        table = [["key", "type", "default", "meaning"], ["---"] * 4, *rows]
        parts.append("\n".join([f"## {title}", "", *map(_table_row, table)]))
    return "\n\n".join(parts) + "\n"


HEAD = """# All keys

Made by `python -m pipeline.reference > docs/keys.md` from the schemas; a test compares them. The defaults are
the schema's: `conf/` and experiments may set others, and `python -m pipeline run --cfg job` shows what a
command means. `python -m pipeline explain sft.optim.lr` prints the line of one key."""


def keys() -> list[Key]:
    """All keys, groups and entries of lists included, in the schema's order."""
    return [_key(name, owner, field) for name, owner, field in schema.walk()]


def _key(name: str, owner: type, field: str) -> Key:
    known, line = fields_of(owner)[field], _documentation(owner).get(field, "")
    return Key(name, types_of(owner)[field], _default(known), line, known.metadata.get("range"))


@functools.cache
def _documentation(declared: type) -> dict[str, str]:
    """The string below each field, in one line; those of base classes too."""
    found: dict[str, str] = {}
    for base in reversed(declared.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant)
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _written(field.default)
    if field.default_factory is dataclasses.MISSING:
        return "has to be given"
    made = field.default_factory()
    return "see its keys" if dataclasses.is_dataclass(made) else _written(made)


def _written(value: Any) -> str:
    """As on the command line."""
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if dataclasses.is_dataclass(value):  # what differs from the entry's own defaults
        fields = {
            field.name: (getattr(value, field.name), field.default) for field in dataclasses.fields(value)
        }
        return _written({name: own for name, (own, usual) in fields.items() if own != usual})
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_written(each)}" for name, each in value.items()) + "}"
    return str(value) if value != "" else "''"


def _type_name(declared: Any) -> str:
    inner = without_none(declared)
    words = _NAMES.get(inner, "")
    if isinstance(inner, type) and issubclass(inner, Enum):
        words = "one of " + ", ".join(inner.__members__)
    elif typing.get_origin(inner) is list:
        words = f"list of {_type_name(typing.get_args(inner)[0])}"
    elif typing.get_origin(inner) is dict:
        words = "mapping"
    elif dataclasses.is_dataclass(inner):
        words = "group"
    return words if inner is declared else f"{words} or null"


_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "anything"}


def _table_row(cells: list[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(escaped)} |"


if __name__ == "__main__":
    sys.stdout.write(markdown())
