"""Limits that the ranks and the controller both go by. Leaf: imports nothing but errors."""

from __future__ import annotations

import os

from common.errors import UserError

COLLECTIVE_SECONDS = 30 * 60
"""How long ranks wait for each other before they give up; RLHF_COLLECTIVE_SECONDS sets another limit."""
SILENT_SECONDS = 5 * 60
"""How long a rank may give no sign of life; RLHF_SILENT_SECONDS sets another limit."""


def collective_seconds() -> float:
    """How long ranks wait for each other in one collective."""
    return _seconds("RLHF_COLLECTIVE_SECONDS", COLLECTIVE_SECONDS)


def silent_seconds() -> float:
    """How long a rank may give no sign of life: its process is stopped, or its machine is cut off.

    A rank that works, however long, gives one about every second.
    """
    return _seconds("RLHF_SILENT_SECONDS", SILENT_SECONDS)


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e7:
        raise UserError(f"{variable}={text} is not allowed", hint="allowed: seconds, from 1")
    return seconds
