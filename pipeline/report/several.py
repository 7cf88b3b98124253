"""Several runs beside each other: how they are named, which settings differ, what each came to.

Files of runs in, rows of a table out, a column per run in the order in which they were named. A difference
between runs is given where the same prompts were answered by both, with its interval, and else left to the
reader.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from common import estimates
from common.estimates import Estimate
from pipeline.report.files import RunFiles, clean, mapping
from pipeline.report.glance import Measure, values_of
from pipeline.report.reproduce import decisive, leaves, value_text

LONG_NAME = 24
REWARD = "reward"
UNITS = ("ppo.rewards", "ppo.reward_clip", "ppo.missing_eos_penalty", "content of ppo.reward_model")
COMMON_FROM = 8
"""Letters at the beginning of all names that are left out, at least."""


@dataclass(frozen=True)
class Difference:
    """A setting, or the content of an input, that is not the same in all runs."""

    key: str
    values: list[str]  # by run; empty where the run has none


@dataclass(frozen=True)
class Number:
    """What a run came to, as text; and by how much it is above the first run, on the same prompts."""

    value: str
    interval: str
    above_first: str


@dataclass(frozen=True)
class FinalRow:
    """One measure in all runs."""

    measure: Measure  # of one of them, for its names
    numbers: list[Number | None]  # by run


def mark_of(index: int) -> str:
    """A, B, ... Z, A2, ...: what a run is called where its name has no room."""
    round_, letter = divmod(index, len(ascii_uppercase))
    return ascii_uppercase[letter] + (str(round_ + 1) if round_ else "")


def short_names(names: Sequence[str]) -> list[str]:
    """Names in which what all begin with is left out where it is long, and the middle of what still is."""
    common = len(os.path.commonprefix(list(names))) if len(set(names)) > 1 else 0
    cut = common if common >= COMMON_FROM and max(map(len, names)) > LONG_NAME else 0
    rests = ["…" + name[cut:] if cut else name for name in names]
    half = LONG_NAME // 2
    return [rest if len(rest) <= LONG_NAME else f"{rest[:half]}…{rest[1 - half :]}" for rest in rests]


def differences(runs: Sequence[RunFiles]) -> list[Difference]:
    """Settings that decide results or the launch, contents of inputs and versions that differ between the
    runs that have them: those of a step that a run does not have are no difference.
    """
    settings = [dict(_settings(run)) for run in runs]
    keys = dict.fromkeys(key for found in settings for key in found)
    rows = [Difference(key, [found.get(key, "") for found in settings]) for key in keys]
    return [row for row in rows if len(set(filter(None, row.values))) > 1]


def _settings(run: RunFiles) -> Iterator[tuple[str, str]]:
    launch = {"launch": mapping(run.config.get("launch"))}
    yield from ((key, _text(value)) for key, value in _leaves({**decisive(run.config), **launch}))
    for node in run.lineage:
        yield from ((f"content of {key}", sha256[:12]) for key, sha256 in node.inputs.items())
    for step in run.steps:
        versions = mapping(step.details.get("packages")).items()
        yield from ((f"version of {clean(name)}", clean(version)) for name, version in versions)


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Those of `leaves`, and the entries of a list of mappings by their number."""
    for key, leaf in leaves(value):
        if isinstance(leaf, list) and leaf and all(isinstance(entry, dict) for entry in leaf):
            for index, entry in enumerate(leaf):
                yield from ((f"{key}[{index}].{below}", each) for below, each in _leaves(entry))
        else:
            yield key, leaf


def _text(value: Any) -> str:
    return clean(value if isinstance(value, str) else value_text(value))


def final_numbers(runs: Sequence[RunFiles], tables: Sequence[Sequence[Measure]]) -> list[FinalRow]:
    """Every measure that a run has, in the order in which they come. tables: the measures of each run."""
    by_run = [{(m.step, m.name, m.mode): m for m in table} for table in tables]
    keys = dict.fromkeys(key for found in by_run for key in found)
    return [_row(runs, [found.get(key) for found in by_run]) for key in keys]


def _row(runs: Sequence[RunFiles], measures: Sequence[Measure | None]) -> FinalRow:
    """The numbers of all runs with the decimals that the largest of them has."""
    known = [measure for measure in measures if measure is not None]
    lead = max(known, key=lambda m: (not m.is_share, max(map(abs, m.bounds))))
    numbers = []
    for index, measure in enumerate(measures):
        is_compared = index > 0 and measure is not None and measures[0] is not None
        change = _above_first(runs[0], measures[0], runs[index], measure) if is_compared else None
        numbers.append(None if measure is None else _number(lead, measure.after, change))
    return FinalRow(lead, numbers)


def _number(lead: Measure, after: Estimate, change: Estimate | None) -> Number:
    if change is None or not change.has_interval:
        return Number(lead.text(after.value), lead.interval(after), "")
    most = 1.0 if lead.is_share else float("inf")
    low, high = lead.signed(max(change.low, -most)), lead.signed(min(change.high, most))
    points = " points" if lead.is_share else ""
    said = f"{lead.signed(change.value)}{points} ({low} to {high})"
    return Number(lead.text(after.value), lead.interval(after), said)


def _above_first(
    first: RunFiles, before: Measure | None, run: RunFiles, after: Measure | None
) -> Estimate | None:
    """The mean difference of the same prompts; None where they, or a reward's units, are not the same."""
    if before is None or after is None or (after.name == REWARD and units_of(first) != units_of(run)):
        return None
    of_first, of_run = _by_prompt(first, before), _by_prompt(run, after)
    return estimates.of_change(of_first, of_run, after.after.value - before.after.value)


def units_of(run: RunFiles) -> list[tuple[str, str]]:
    """What decides how much a reward of 1 is: the reward model, what else scores, clipping, the penalty."""
    return sorted((key, value) for key, value in _settings(run) if key.startswith(UNITS))


def _by_prompt(run: RunFiles, measure: Measure) -> Mapping[str, list[float]]:
    step = next(step for step in run.steps if step.name == measure.step)
    return values_of(step, measure.after_step, measure.name, measure.mode)
