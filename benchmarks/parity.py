"""What two sides logged at the same steps, compared number by number.

Takes steps as mappings from a quantity's name to its value; returns the largest differences, a table and a
verdict. Starts nothing and knows no trainer beyond the files that `trl_run.py` writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import table

TOLERANCE = 1e-4
Step = Mapping[str, float]


@dataclass(frozen=True)
class Quantity:
    """A number that both sides log at every step.

    The difference at a step is relative to TRL's value there, or, for one that may lie near 0 (`signed`), to
    the largest that it has in the run.
    """

    name: str
    theirs: str | None = None  # what TRL calls it, where that is another name
    tolerance: float | None = TOLERANCE  # largest difference allowed at any step; None: shown, not judged
    signed: bool = False

    @property
    def name_in_trl(self) -> str:
        return self.theirs or self.name


LOSS = Quantity("loss")
GRAD_NORM = Quantity("grad_norm")
LEARNING_RATE = Quantity("learning_rate", tolerance=1e-9)


def read_ours(metrics: Path) -> list[dict[str, float]]:
    """The steps in our metrics.jsonl, without evaluations."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def read_trl(out: Path, quantities: Sequence[Quantity]) -> list[dict[str, float]]:
    """What the trainer logged, under our names, with gradient norms summed in float64.

    The norm that it logged itself, which torch sums in fp32, stays as `logged_grad_norm`.
    """
    entries = [entry for entry in json.loads((out / "logs.json").read_text()) if "loss" in entry]
    norms = json.loads((out / "grad_norms.json").read_text())
    return [
        {
            **{quantity.name: entry[quantity.name_in_trl] for quantity in quantities},
            "grad_norm": norm,
            "logged_grad_norm": entry["grad_norm"],
        }
        for entry, norm in zip(entries, norms, strict=True)
    ]


def differences(ours: Sequence[Step], theirs: Sequence[Step], quantity: Quantity) -> list[float]:
    """At each step, relative; 0 where both are 0, infinite where one is NaN."""
    name = quantity.name
    largest = max(abs(step[name]) for step in theirs)
    found = []
    for a, b in zip(ours, theirs, strict=True):
        scale = largest if quantity.signed else abs(b[name])
        difference = abs(a[name] - b[name])
        relative = difference / scale if scale else (0.0 if difference == 0 else math.inf)
        found.append(math.inf if math.isnan(relative) else relative)
    return found


def summary(ours: Sequence[Step], theirs: Sequence[Step], quantities: Sequence[Quantity]) -> dict[str, Any]:
    """Largest differences and whether the criteria hold; ValueError when steps are missing."""
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} steps of ours and {len(theirs)} of TRL's cannot be compared")
    largest = {quantity.name: max(differences(ours, theirs, quantity)) for quantity in quantities}
    failed = [q.name for q in quantities if q.tolerance is not None and not largest[q.name] <= q.tolerance]
    names = [quantity.name for quantity in quantities]
    return {
        "steps": len(ours),
        "dtype": "fp32",
        "tolerance": {quantity.name: quantity.tolerance for quantity in quantities},
        "relative_to_the_largest_in_the_run": [quantity.name for quantity in quantities if quantity.signed],
        "largest_relative_difference": largest,
        "failed": failed,
        "passed": not failed,
        "ours": [{name: step[name] for name in names} for step in ours],
        "trl": [dict(step) for step in theirs],
    }


def render(ours: Sequence[Step], theirs: Sequence[Step], quantities: Sequence[Quantity]) -> str:
    """A table: of each quantity ours, TRL's and the difference. The learning rate is the same in all."""
    shown = [quantity for quantity in quantities if quantity.name != LEARNING_RATE.name]
    apart = {quantity.name: differences(ours, theirs, quantity) for quantity in shown}
    head = ["step", *(cell for quantity in shown for cell in (quantity.name, "TRL", "difference"))]
    rows = [
        [
            str(number + 1),
            *(
                cell
                for q in shown
                for cell in (f"{a[q.name]:.7g}", f"{b[q.name]:.7g}", f"{apart[q.name][number]:.1e}")
            ),
        ]
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True))
    ]
    return table(head, rows)


def verdict(result: Mapping[str, Any]) -> str:
    """One line."""
    found = ", ".join(
        f"{name} {value:.1e}" + ("" if allowed is None else f" (allowed {allowed:.0e})")
        for (name, value), allowed in zip(
            result["largest_relative_difference"].items(), result["tolerance"].values(), strict=True
        )
    )
    outcome = "passed" if result["passed"] else f"FAILED ({', '.join(result['failed'])})"
    return f"{outcome}: largest relative differences over {result['steps']} steps: {found}"
