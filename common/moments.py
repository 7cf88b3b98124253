"""Where this rank is: recipes and mechanisms call `at` at a few named points of a run.

Takes the point's name and the step; remembers them for those who watch (`watch.py`). Where the environment
variable RLHF_FAULT is set, something may go wrong there (`faults.py`); else nothing is computed. Leaf.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

VARIABLE = "RLHF_FAULT"

POINTS = {
    "start": "starting",
    "load": "loading a checkpoint",
    "step": "training",
    "backward": "the backward pass",
    "update": "the update of the weights",
    "rollout": "sampling responses",
    "score": "scoring responses",
    "evaluate": "evaluating",
    "save": "saving a checkpoint",
    "commit.write": "writing its part of a checkpoint",
    "commit.hash": "hashing a checkpoint",
    "commit.manifest": "writing a checkpoint's manifest",
    "commit.rename": "committing a checkpoint",
    "commit.forget": "deleting old checkpoints",
    "commit.end": "after a checkpoint",
    "export": "exporting",
}
"""Every point by name, and what a rank that passed it last is doing."""


@dataclass(frozen=True)
class Moment:
    """The last point passed, and the step it was in (None: before the first)."""

    point: str
    step: int | None

    def __str__(self) -> str:
        step = "" if self.step is None else f"step {self.step}, "
        return f"{step}{POINTS[self.point]}"


_now = Moment("start", None)
_strike: Callable[[str, int | None], bool] | None = None


def at(point: str, step: int | None = None) -> bool:
    """Say that this rank begins `point`; step: None where the caller does not know it, and it stays.

    True when a fault asks for a loss that is not a number, at `backward` only.
    """
    global _now
    _now = Moment(point, _now.step if step is None else step)
    return _strike is not None and _strike(point, _now.step)


def now() -> Moment:
    """The last point that this rank passed."""
    return _now


def arm(rank: int) -> None:
    """Let the faults that RLHF_FAULT asks of this rank happen. UserError when it cannot be understood."""
    global _strike
    if text := os.environ.get(VARIABLE):
        from common.faults import Faults

        _strike = Faults.parse(text, rank).strike
