"""How to make a run again: its configuration in, a command, versions and hashes out.

The command is the one whose overrides are fewest, and it is tried: it is shown only when composing it gives
the recorded configuration. Nothing here runs anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.report.files import RunFiles, clean, mapping


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
    inputs = {
        key: (_path_of(run.config, key), sha256)
        for node in run.lineage
        for key, sha256 in node.inputs.items()
    }
    return Reproduction(
        "",
        "" if seed is None else clean(seed),
        list(commits),
        sorted(packages.items()),
        [(key, path, sha256) for key, (path, sha256) in inputs.items()],
    )


def _path_of(config: Mapping[str, Any], key: str) -> str:
    """The value under a key such as sft.data.sources[0], or of `path` below it; empty when there is none."""
    value: Any = config
    for part in _parts(key):
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            value = mapping(value).get(str(part))
    value = mapping(value).get("path", value)
    return clean(value) if isinstance(value, str) else ""


def _parts(key: str) -> Iterator[str | int]:
    for part in key.split("."):
        name, _, index = part.partition("[")
        yield name
        if index.removesuffix("]").isdecimal():
            yield int(index.removesuffix("]"))
