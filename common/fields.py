"""Fields of the schemas that say which values they may have, and the check of them.

A value out of range is a `UserError` that names key, value and what is allowed; null is allowed where it is
the default.
"""

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

from common.errors import UserError


def ranged(default: Any, allowed: str, test: Callable[[Any], bool]) -> Any:
    """A field whose values pass `test`; `allowed` says in words which these are."""
    return field(default=default, metadata={"allowed": allowed, "test": test})


def at_least(least: int, default: Any) -> Any:
    """A field with a number of `least` or more."""
    return ranged(default, f"{least} or more", lambda value: value >= least)


def check_ranges(group: Any, prefix: str) -> None:
    """Raise the standard error for the first field of a schema that is out of range. prefix: its key."""
    for each in fields(group):
        value = getattr(group, each.name)
        if "test" in each.metadata and not (value is None and each.default is None):
            require(each.metadata["test"](value), f"{prefix}.{each.name}", value, each.metadata["allowed"])


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise the standard error for a value out of range."""
    if not condition:
        raise UserError(f"{key}={value} is not allowed", hint=f"allowed: {allowed}")
