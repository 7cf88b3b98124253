"""How to make a run again: its configuration in, a command, versions and hashes out.

The command names the experiment that comes nearest and overrides the rest. It is tried: it is given only when
composing it gives every setting that decides the recorded results. Nothing here runs anything.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.stage import Role, Step
from pipeline import state
from pipeline.report.files import RunFiles, clean, dig, listing, mapping
from pipeline.state import NO_PART_IN_RESULTS

_PLAIN = re.compile(r"[A-Za-z_/][\w/.@-]*")
_RESERVED = {"null", "true", "false", "nan", "inf", "yes", "no", "on", "off"}


@dataclass(frozen=True)
class Reproduction:
    """What somebody needs to know."""

    command: str  # empty when none gives this configuration
    seed: str
    commits: list[str]
    packages: list[tuple[str, str]]
    inputs: list[tuple[str, str, str]]  # configuration key, path, sha256


def reproduce(run: RunFiles) -> Reproduction:
    """Gather what is needed, from the configuration, manifests and lineage."""
    packages: dict[str, str] = {}
    commits: dict[str, None] = {}
    for step in run.steps:
        found = mapping(step.details.get("packages"))
        packages |= {clean(name): clean(version) for name, version in found.items()}
        if isinstance(commit := step.details.get("git_commit"), str):
            commits[clean(commit)] = None
    seed = run.setting("seed")
    inputs = {key: sha256 for node in run.lineage for key, sha256 in node.inputs.items()}
    name = clean(run.setting("run_name") or run.folder.resolve().name)
    return Reproduction(
        command_for(run.config_text, f"{name}-again"),
        "" if seed is None else clean(seed),
        list(commits),
        sorted(packages.items()),
        [(key, _path_of(run.config, key), sha256) for key, sha256 in inputs.items()],
    )


@functools.lru_cache(maxsize=16)  # a report is made after each step, and composing takes a while
def command_for(config_text: str, run_name: str) -> str:
    """The command line that composes to the configuration, under a new name; empty when none was found.

    config_text: resolved.yaml.
    """
    try:
        from pipeline.compose import prepare
        from pipeline.config import PipelineConfig

        config = yaml.safe_load(config_text)
        if {field.name for field in dataclasses.fields(PipelineConfig)} != config.keys():
            return ""
        wanted = decisive(config)
        experiment = nearest_experiment(wanted)
        base = [f"experiment={experiment}"] if experiment else []
        base.append(f"steps={value_text(wanted['steps'])}")
        changes = state.differing(_composed(base), wanted)
        overrides = [*base, *(f"{key}={value_text(value)}" for key, _, value in changes)]
        if _composed(prepare(overrides).overrides) != wanted:
            return ""
    # A configuration that was damaged, or written by another version, fails in as many ways as Hydra knows
    except Exception:
        return ""
    words = [*overrides, f"run_name={value_text(run_name)}"]
    return " ".join(["python -m pipeline run", *(shlex.quote(word) for word in words)])


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's results: without names, places and steps that do not run.

    Artifacts that one step hands to the next are wired by the steps, not by settings.
    """
    steps = [str(step) for step in listing(config.get("steps"))]
    idle = [step.value for step in Step if step.value not in steps]
    kept = {key: value for key, value in config.items() if key not in (*NO_PART_IN_RESULTS, *idle)}
    own = Path(str(config.get("output_dir"))) / str(config.get("run_name"))
    for step in steps:
        part = dict(mapping(kept.get(step)))
        for role in Role:
            if str(part.get(role.value)) in [str(own / other / "export") for other in steps]:
                part[role.value] = None
        kept[step] = part
    return kept


def nearest_experiment(config: Mapping[str, Any]) -> str | None:
    """The experiment of which most settings are in the configuration; None when less than half are in any."""
    from pipeline.config import CONF

    best, best_share = None, 0.5
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        settings = mapping(yaml.safe_load(path.read_text(encoding="utf-8")))
        found = [(k, v) for k, v in leaves(settings) if not k.startswith(("defaults", *NO_PART_IN_RESULTS))]
        known = [(key, value) for key, value in found if key.partition(".")[0] in config]
        same = sum(dig(config, key) == value for key, value in known)
        if known and same / len(known) > best_share:
            best, best_share = path.stem, same / len(known)
    return best


def value_text(value: Any) -> str:
    """A value as Hydra's override grammar writes it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ",".join(value_text(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{value_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and value.lower() not in _RESERVED:
            return value
        quoted = "'" + value.replace("'", "\\'") + "'"
        return quoted if "\\" in value else json.dumps(value, ensure_ascii=False)
    return repr(value)


def _composed(overrides: Sequence[str]) -> dict[str, Any]:
    from common.config import to_plain
    from pipeline.compose import compose

    return decisive(to_plain(compose(overrides)))


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested mappings; a list is one leaf."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, below in value.items():
        yield from leaves(below, f"{prefix}.{key}" if prefix else str(key))


def _path_of(config: Mapping[str, Any], key: str) -> str:
    """The value under a key such as sft.data.sources[0], or of `path` below it; empty when there is none."""
    value: Any = config
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(value, list):
            value = dict(enumerate(value)).get(int(part) if part.isdecimal() else -1)
        else:
            value = mapping(value).get(part)
    value = mapping(value).get("path", value)
    return clean(value) if isinstance(value, str) else ""
