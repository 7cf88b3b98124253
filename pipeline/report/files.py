"""Reads a run's folder as far as it can be read: files in, plain typed values and a list of problems out.

Nothing here fails because of what a file holds: a damaged line or file is left out and named in
`RunFiles.problems`. A file that is not there is no problem: the run may be going on. What the numbers mean
is not known here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.artifacts import MANIFEST
from common.errors import UserError
from common.redact import redact_text
from common.stage import Step
from common.text import printable
from pipeline.lineage import LINEAGE
from pipeline.plan import EXPORT
from pipeline.state import LEDGER, METRICS, RESOLVED, SAMPLES, STATE, is_run

WARNINGS_KEPT = 50

_SPELLED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# with the indented lines that belong to it: the ways out
_WARNING = re.compile(r"^(\S+ \S+) (?:WARNING|ERROR) rlhf\S*: (.*(?:\n  +(?!File ).*)*)", re.MULTILINE)

Series = list[tuple[int, float]]
"""Values of one metric by step, in order of steps."""
Counted = tuple[str, int, list[str]]
"""A reason, the rows (or turns) it applies to, and the first places."""


@dataclass(frozen=True)
class SampleRow:
    """One line of samples.jsonl; None for what was not recorded."""

    prompt: str
    completion: str
    mode: str = ""  # "sampled", "greedy", or "" when the step knows one way only
    stopped: bool | None = None
    reward: float | None = None
    kl: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


Samples = Mapping[int, Sequence[SampleRow]]
"""The samples of the first and of the last step in a file, by step; one where there is one step only."""


@dataclass(frozen=True)
class LedgerRow:
    """What became of the rows of one source."""

    name: str
    format: str
    counts: Mapping[str, int]  # rows_read, rows_kept, rows_held_out, tokens, trained_tokens, ...
    dropped: list[Counted]  # of bad and split rows too
    lost: int  # rows dropped, without bad ones


@dataclass(frozen=True)
class Node:
    """An artifact of the run and what it was made from."""

    step: str
    role: str
    path: str
    sha256: str
    parents: list[list[str]]  # what each was taken as, path, sha256
    inputs: Mapping[str, str]  # sha256 by configuration key


@dataclass(frozen=True)
class StepFiles:
    """What is known of one step."""

    name: str
    state: Mapping[
        str, str
    ]  # status, started, launched, ended, seconds, exit_status; empty when never started
    metrics: Mapping[str, Series]
    errors: Mapping[str, Series]  # standard errors of some of them, by the metric's name
    samples: Samples
    ledger: list[LedgerRow]
    details: Mapping[str, Any]  # of the exported artifact's manifest; empty before there is one
    warnings: list[tuple[str, str]]  # time, text


@dataclass(frozen=True)
class RunFiles:
    """What is known of a run."""

    folder: Path
    config_text: str  # resolved.yaml as it is
    config: Mapping[str, Any]
    steps: list[StepFiles]
    lineage: list[Node]
    problems: list[tuple[str, str]]  # file, what could not be read

    def setting(self, key: str) -> Any:
        """The configuration's value under a dotted key; None when there is none."""
        return dig(self.config, key)


def read_run(folder: Path) -> RunFiles:
    """Everything in a run's folder. UserError when the folder is none of a run."""
    check_is_run(folder)
    reader = Reader(folder)
    text = reader.text(RESOLVED) or ""
    config = reader.yaml(RESOLVED, text)
    named = config.get("steps")
    planned = {str(name) for name in named} if isinstance(named, list) else set()
    names = [step.value for step in Step if step.value in planned or (folder / step.value).is_dir()]
    steps = [read_step(reader, name) for name in names]
    return RunFiles(folder, text, config, steps, reader.lineage(), reader.problems)


def check_is_run(folder: Path) -> None:
    """UserError, with what was found instead, unless the folder is a run's."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {found}", hint="name a run's folder, e.g. runs/demo")
    if is_run(folder):
        return
    for parent in folder.resolve().parents[:3]:
        if is_run(parent):
            raise UserError(f"{folder} is a part of the run {parent}", hint=f"name the run: {parent}")
    inside = sorted(path.name for path in folder.iterdir())[:8]
    runs = [name for name in inside if (folder / name / RESOLVED).exists()]
    found = f"it holds {', '.join(inside)}" if inside else "it is empty"
    raise UserError(
        f"{folder} is no run: there is no {RESOLVED} and no step's folder in it ({found})",
        hint=f"name one of the runs in it: {folder / runs[0]}" if runs else "name a run's folder: runs/NAME",
    )


def read_step(reader: Reader, name: str) -> StepFiles:
    """Everything in one step's folder."""
    state = reader.json(f"{name}/{STATE}")
    keys = ("status", "started", "launched", "ended", "seconds", "exit_status")
    metrics, errors = errors_apart(reader.metrics(f"{name}/{METRICS}"))
    if state.get("status") == "done" and not metrics:
        reader.problems.append((f"{name}/{METRICS}", "holds no numbers, although the step is done"))
    return StepFiles(
        name,
        {key: clean(state[key]) for key in keys if isinstance(state.get(key), str | int)},
        metrics,
        errors,
        reader.samples(f"{name}/{SAMPLES}"),
        reader.ledger(f"{name}/{LEDGER}"),
        mapping(reader.json(f"{name}/{EXPORT}/{MANIFEST}").get("details")),
        reader.warnings(f"{name}/logs/rank_0.log"),
    )


class Reader:
    """Reads files below one folder by relative path, and notes what could not be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[tuple[str, str]] = []

    def text(self, name: str) -> str | None:
        """A file's text; None when it is not there or cannot be read."""
        try:
            return clean((self.folder / name).read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            return None
        except OSError as error:
            self.problems.append((name, f"cannot be read: {error.strerror}"))
            return None

    def yaml(self, name: str, text: str) -> dict[str, Any]:
        """What YAML text says; empty when it is no mapping."""
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError, AttributeError) as error:
            self.problems.append((name, f"is no YAML: {str(error).splitlines()[0]}"))
            return {}
        return self._mapping(name, value, "holds no mapping") if value is not None else {}

    def json(self, name: str) -> dict[str, Any]:
        """A file's JSON object; empty when it is not there or damaged."""
        text = self.text(name)
        return {} if text is None else self._mapping(name, parsed(text), "holds no JSON object")

    def _mapping(self, name: str, value: Any, problem: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.problems.append((name, problem))
        return mapping(value)

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The JSON objects with a step of a file of lines. A last line without its end is being written."""
        bad: list[int] = []
        try:
            with (self.folder / name).open("rb") as file:
                for number, line in enumerate(file, 1):
                    record = parsed(line.decode("utf-8", "replace"))
                    if isinstance(record, dict) and is_step(record.get("step")):
                        yield record
                    elif line.endswith(b"\n") and line.strip():
                        bad.append(number)
        except FileNotFoundError:
            return
        except OSError as error:
            self.problems.append((name, f"cannot be read: {error.strerror}"))
        if bad:
            which = ", ".join(str(number) for number in bad[:5]) + (", …" if len(bad) > 5 else "")
            lines = "a line that is" if len(bad) == 1 else f"{len(bad)} lines that are"
            self.problems.append((name, f"has {lines} no JSON object with a step, left out: line {which}"))

    def metrics(self, name: str) -> dict[str, Series]:
        """Numbers by metric and step; of two values for one step the later one counts."""
        found: dict[str, dict[int, float]] = {}
        for record in self.lines(name):
            for metric, value in record.items():
                if metric != "step" and (value := number(value)) is not None:
                    found.setdefault(clean(metric), {})[record["step"]] = value
        return {metric: sorted(values.items()) for metric, values in found.items()}

    def samples(self, name: str) -> Samples:
        """The first and the last step's samples; those between are not kept in memory."""
        by_step: dict[int, list[SampleRow]] = {}
        for record in self.lines(name):
            if "prompt" in record and "completion" in record:
                by_step.setdefault(record["step"], []).append(sample_of(record))
                if len(by_step) > 2:
                    del by_step[sorted(by_step)[1]]
        return by_step

    def ledger(self, name: str) -> list[LedgerRow]:
        sources = self.json(name).get("sources")
        return [ledger_row(entry) for entry in listing(sources) if isinstance(entry, dict)]

    def lineage(self) -> list[Node]:
        """The run's artifacts, in the order of the steps."""
        entries = mapping(self.json(LINEAGE).get("artifacts"))
        return [node_of(step.value, mapping(entries[step.value])) for step in Step if step.value in entries]

    def warnings(self, name: str) -> list[tuple[str, str]]:
        """The latest warnings and errors of the pipeline in a rank's log, credentials hidden."""
        found = _WARNING.findall(self.text(name) or "")[-WARNINGS_KEPT:]
        return [(at.partition(",")[0], redact_text(said)) for at, said in found]


def sample_of(record: Mapping[str, Any]) -> SampleRow:
    """A sample, with what is not of its kind left out."""
    scores = {clean(name): number(value) for name, value in mapping(record.get("scores")).items()}
    stopped = record.get("stopped")
    return SampleRow(
        as_text(record["prompt"]),
        as_text(record["completion"]),
        clean(record.get("mode") or ""),
        stopped if isinstance(stopped, bool) else None,
        number(record.get("reward")),
        number(record.get("kl")),
        {name: value for name, value in scores.items() if value is not None},
    )


def counted(entry: Mapping[str, Any], name: str, says: str = "") -> list[Counted]:
    """What the ledger counts by reason."""
    pairs = [(says + clean(reason), mapping(found)) for reason, found in mapping(entry.get(name)).items()]
    return [
        (reason, whole(found.get("count")), [*map(clean, listing(found.get("places")))])
        for reason, found in pairs
    ]


def ledger_row(entry: Mapping[str, Any]) -> LedgerRow:
    """One source's counts."""
    dropped = counted(entry, "dropped")
    lost = sum(count for _, count, _ in dropped)
    dropped += counted(entry, "untrained", "not trained: ") + counted(entry, "split", "split: ")
    if examples := [*map(clean, listing(entry.get("bad_examples")))]:
        dropped.append(("bad rows", whole(entry.get("bad_rows")), examples))
    counts = {clean(key): value for key, value in entry.items() if is_step(value)}
    name, form = texts(entry, "name", "format")
    return LedgerRow(name, form, counts, dropped, lost)


def node_of(step: str, entry: Mapping[str, Any]) -> Node:
    """One artifact of the lineage."""
    keys = ("role", "path", "manifest_sha256")
    given = [
        {"taken_as": parent.get("role"), **parent} for parent in map(mapping, listing(entry.get("parents")))
    ]
    parents = [texts(parent, "taken_as", *keys[1:]) for parent in given]
    inputs = {clean(key): clean(value) for key, value in mapping(entry.get("inputs")).items()}
    role, path, sha256 = texts(entry, *keys)
    return Node(step, role, path, sha256, parents, inputs)


# --- values of unknown kind -------------------------------------------------------------------------


def parsed(text: str) -> Any:
    """What JSON text says; None when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def texts(entry: Mapping[str, Any], *keys: str) -> list[str]:
    """The text under each key; empty where there is none."""
    return [clean(entry.get(key) or "") for key in keys]


def is_step(value: Any) -> bool:
    """Whether a value is a count: a whole number, not negative, of a size that a float can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def whole(value: Any) -> int:
    return value if is_step(value) else 0


def number(value: Any) -> float | None:
    """A number, also one of the spelled ones that strict JSON cannot hold; None for anything else."""
    if isinstance(value, str):
        return _SPELLED.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def as_text(value: Any) -> str:
    """Text as it is; messages of a conversation as `role: content`, anything else as JSON."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list) and all(isinstance(turn, dict) and "content" in turn for turn in value):
        return "\n".join(f"{clean(turn.get('role', ''))}: {clean(turn['content'])}" for turn in value)
    return clean(json.dumps(value, ensure_ascii=False))


def clean(value: Any) -> str:
    """Text that a file can hold and that shows every character: no lone surrogates, no control codes."""
    return printable(str(value).replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8"))


def errors_apart(metrics: Mapping[str, Series]) -> tuple[dict[str, Series], dict[str, Series]]:
    """The metrics, and apart from them the standard errors (`<metric>_se`) under the metric's own name."""
    errors = {m.removesuffix("_se"): s for m, s in metrics.items() if m.endswith("_se") and m[:-3] in metrics}
    return {m: s for m, s in metrics.items() if m.removesuffix("_se") not in errors or m in errors}, errors


def dig(value: Any, key: str) -> Any:
    """The value under a dotted key of nested mappings; None when there is none."""
    for part in key.split("."):
        value = mapping(value).get(part)
    return value
