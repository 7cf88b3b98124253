"""Which artifact was made from which: checked before a step and after it, and recorded in `lineage.json`.

Takes steps as they are wired and a run's folder; UserError where an artifact is damaged, or was made from
another one than the step was given.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.artifacts import MANIFEST, Artifact, Manifest, read_json, read_manifest, write_json
from common.config import TokenizerConfig
from common.errors import UserError
from common.handoff import check_same_tokens, input_of, load_named
from common.stage import Input, Stage
from pipeline.config import PipelineConfig
from pipeline.plan import EXPORT, Wired, start_of
from pipeline.state import run_folder

LINEAGE = "lineage.json"


def load_sources(wired: Wired, run_dir: Path) -> dict[Input, Artifact]:
    """What the step uses, every file re-hashed, and made with one tokenizer."""
    name = wired.stage.name.value
    loaded = {
        taken: load_named(str(wired.folder_of(taken, run_dir)), taken.role, f"{name}.{taken.value}")
        for taken in wired.sources
    }
    for left, right in itertools.combinations(loaded.values(), 2):
        check_same_tokens(left, right)
    return loaded


def check_parents(
    artifact: Artifact, wired: Wired, run_dir: Path, inputs: Mapping[str, Mapping[str, Any]]
) -> None:
    """The artifact was made from what the step was given, and reads text as that does."""
    recorded = {input_of(parent): parent for parent in artifact.manifest.details.get("parents", [])}
    for taken in wired.sources:
        given = inputs[f"{wired.stage.name.value}.{taken.value}"]["sha256"]
        made_from = str(recorded.get(taken.value, {}).get("manifest_sha256", "not recorded"))
        if made_from != given:
            raise UserError(
                f"{artifact.path} was made from another {taken.value} ({made_from[:12]}) than the one at "
                f"{wired.folder_of(taken, run_dir)} ({given[:12]})",
                hint="force=true makes it again from the one that is there",
            )
        folder = wired.folder_of(taken, run_dir)
        check_same_tokens(Artifact(folder, read_manifest(folder)), artifact)


def readable(
    config: PipelineConfig, step: Wired, wired: Sequence[Wired], tokenizer: Path | None
) -> PipelineConfig:
    """The configuration that a step's rows can be read with before the steps ahead of it have run.

    With the tokenizer of the policy that the step starts from, if there is one already; else the one that SFT
    trains, if it does; else the base model's own. tokenizer: where that of SFT is, or will be by then; None
    where there is none.
    """
    if Input.policy not in step.sources:
        return config
    name = step.stage.name.value
    made = step.folder_of(Input.policy, run_folder(config))
    policy = str(made) if (made / MANIFEST).exists() else start_of(step.stage.name, wired)
    changed: dict[str, Any] = {name: replace(getattr(config, name), policy=policy)}
    trains = config.model.tokenizer.train_vocab_size is not None
    if policy is None and trains and tokenizer is not None:
        changed["model"] = replace(config.model, tokenizer=TokenizerConfig(path=str(tokenizer)))
    return replace(config, **changed)


def record_lineage(run_dir: Path, stage: Stage, artifact: Artifact, ended: Mapping[str, Any]) -> None:
    """Add the artifact to the run's lineage: what it is, by hash, and what it was made from."""
    path, name = run_dir / LINEAGE, stage.name.value
    lineage = read_lineage(path)
    lineage[name] = entry_of(name, artifact.manifest, artifact.sha256, ended)
    write_json(path, {"format_version": 1, "artifacts": lineage})


def entry_of(step: str, manifest: Manifest, sha256: str, ended: Mapping[str, Any]) -> dict[str, Any]:
    """What the lineage says of a step's artifact. sha256: of its manifest. ended: the step's state."""
    return {
        "path": f"{step}/{EXPORT}",
        "role": None if manifest.role is None else manifest.role.value,
        "manifest_sha256": sha256,
        "parents": manifest.details.get("parents", []),
        "config_hash": ended["config_hash"],
        "inputs": {key: value["sha256"] for key, value in ended["inputs"].items()},
    }


def read_lineage(path: Path) -> dict[str, Any]:
    """The artifacts of a run by step; empty when there are none yet."""
    try:
        artifacts = read_json(path)["artifacts"]
        if not isinstance(artifacts, dict):
            raise TypeError("its artifacts are no object")
        return artifacts
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}", hint="move it away; it is written anew") from None
